"""Two rings of a program of the forward and of the dquery kernel as a model: who loads, reads and lets go of which stage, when.

Barriers tell a phase from the next alone, as the real ones do, so that a reader who comes a phase too early reads what another
left there; that, a stage overwritten while somebody reads it, and a standstill are errors. Who goes on next is drawn by lot.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

Entry = tuple[int, ...]
Waiting = Iterator[Callable[[], bool]]


@dataclass
class Walk:
    """A block's part in its pair.

    Attributes:
        loads: What its ring carries, one entry a use: shared ones first.
        steps: How many steps the block walks.
    """

    loads: list[Entry]
    steps: int


@dataclass
class Pair:
    """Walks of two partners, None where a block is missing, and how many of the steps of each are shared."""

    walks: tuple[Walk | None, Walk | None]
    shared: int


class Barrier:
    """Counts arrivals; `is_past(parity)` is what a wait looks for."""

    def __init__(self, count: int) -> None:
        self.count = self.missing = count
        self.phase = 0

    def arrive(self) -> None:
        self.missing -= 1
        if self.missing == 0:
            self.phase, self.missing = self.phase + 1, self.count

    def is_past(self, parity: int) -> Callable[[], bool]:
        return lambda: self.phase & 1 != parity


class Unheeded(Barrier):
    """Nobody waits for it."""

    def is_past(self, parity: int) -> Callable[[], bool]:
        return lambda: True


@dataclass
class Rings:
    """Stages of both rings of keys, or of values."""

    stages: int
    full: list[Barrier] = field(init=False)
    empty: list[Barrier] = field(init=False)
    held: list[Entry | None] = field(init=False)
    readers: list[int] = field(init=False)

    def __post_init__(self) -> None:
        num = 2 * self.stages
        self.full, self.empty = [Barrier(1) for _ in range(num)], [Barrier(2) for _ in range(num)]
        self.held, self.readers = [None] * num, [0] * num

    def place(self, ring: int, use: int) -> tuple[int, int]:
        return ring * self.stages + use % self.stages, use // self.stages & 1

    def wait(self, ring: int, use: int) -> Waiting:
        stage, parity = self.place(ring, use)
        yield self.full[stage].is_past(parity)
        self.readers[stage] += 1

    def read(self, ring: int, use: int) -> Entry | None:
        """Let go of a stage and say what was in it."""
        stage, _ = self.place(ring, use)
        entry = self.held[stage]
        self.readers[stage] -= 1
        self.empty[stage].arrive()
        return entry

    def fill(self, pairs: list[Pair], wg: int, unit: int) -> Waiting:
        """A producer; of `unit` uses a step."""
        use = 0
        for pair in pairs:
            walk = pair.walks[wg]
            for i, entry in enumerate(walk.loads if walk else ()):
                stage, parity = self.place(wg, use)
                yield self.empty[stage].is_past(parity ^ 1)
                assert self.readers[stage] == 0
                if i >= pair.shared // 2 * unit:
                    self.empty[stage].arrive()
                self.held[stage] = entry
                # The copy takes a while.
                yield lambda: True
                self.full[stage].arrive()
                use += 1


def place_of(i: int, shared: int, bases: list[int], wg: int, unit: int) -> tuple[int, int]:
    """Ring and use of a step, or with `unit` 2 of a half step."""
    if i < shared * unit:
        ring = i // unit % 2
        return ring, bases[ring] + i // (2 * unit) * unit + i % unit
    return wg, bases[wg] + i - shared * unit // 2


def _bases_after(bases: list[int], pair: Pair) -> list[int]:
    return [base + (len(walk.loads) if walk else 0) for base, walk in zip(bases, pair.walks, strict=True)]


def forward_consumer(
    pairs: list[Pair], wg: int, k: Rings, v: Rings, started: Barrier, found: list[list[Entry | None]]
) -> Waiting:
    """Keys of the next step are awaited before the values of the last are let go."""
    bases = [0, 0]
    num_met = 0
    for pair in pairs:
        if pair.shared:
            started.arrive()
        walk = pair.walks[wg]
        if walk:
            seen: list[Entry | None] = []
            if pair.shared:
                yield started.is_past(num_met & 1)
                num_met += 1
            if walk.steps:
                yield from k.wait(*place_of(0, pair.shared, bases, wg, 1))
            for i in range(walk.steps):
                here = place_of(i, pair.shared, bases, wg, 1)
                if i:
                    before = place_of(i - 1, pair.shared, bases, wg, 1)
                    yield from v.wait(*before)
                seen.append(k.read(*here))
                if i + 1 < walk.steps:
                    yield from k.wait(*place_of(i + 1, pair.shared, bases, wg, 1))
                if i:
                    assert v.read(*before) == seen[i - 1]
            if walk.steps:
                yield from v.wait(*here)
                assert v.read(*here) == seen[-1]
            found.append(seen)
        bases = _bases_after(bases, pair)


def dq_consumer(pairs: list[Pair], wg: int, ring: Rings, started: Barrier, found: list[list[Entry | None]]) -> Waiting:
    """The next half step is awaited before the last is let go."""
    bases = [0, 0]
    num_met = 0
    for pair in pairs:
        if pair.shared:
            started.arrive()
        walk = pair.walks[wg]
        if walk:
            seen: list[Entry | None] = []
            if pair.shared:
                yield started.is_past(num_met & 1)
                num_met += 1
            if walk.steps:
                yield from ring.wait(*place_of(0, pair.shared, bases, wg, 2))
            for i in range(walk.steps):
                if i + 1 < walk.steps:
                    yield from ring.wait(*place_of(i + 1, pair.shared, bases, wg, 2))
                seen.append(ring.read(*place_of(i, pair.shared, bases, wg, 2)))
            found.append(seen)
        bases = _bases_after(bases, pair)


def run(coroutines: list[Waiting], seed: int) -> None:
    """Run until all have ended.

    Raises:
        RuntimeError: At a standstill.
    """
    lot = random.Random(seed)
    # Some are much slower than others.
    weights = [lot.choice((1, 1, 8, 64)) for _ in coroutines]
    waiting = {i: next(c, None) for i, c in enumerate(coroutines)}
    while waiting := {i: condition for i, condition in waiting.items() if condition is not None}:
        ready = [i for i, condition in waiting.items() if condition()]
        if not ready:
            raise RuntimeError(f"nobody can go on: {sorted(waiting)} of {len(coroutines)} wait")
        i = lot.choices(ready, [weights[j] for j in ready])[0]
        waiting[i] = next(coroutines[i], None)


def simulate_forward(
    pairs: list[Pair], k_stages: int, v_stages: int, seed: int, *, awaits_partner: bool = True
) -> list[list[list[Entry | None]]]:
    """What each consumer reads, step by step, block by block."""
    k, v, started = Rings(k_stages), Rings(v_stages), Barrier(2) if awaits_partner else Unheeded(1)
    found: list[list[list[Entry | None]]] = [[], []]
    run(
        [
            *(forward_consumer(pairs, wg, k, v, started, found[wg]) for wg in (0, 1)),
            *(rings.fill(pairs, wg, 1) for rings in (k, v) for wg in (0, 1)),
        ],
        seed,
    )
    return found


def simulate_dq(pairs: list[Pair], stages: int, seed: int) -> list[list[list[Entry | None]]]:
    """The same of the dquery kernel, half step by half step."""
    ring, started = Rings(stages), Barrier(2)
    found: list[list[list[Entry | None]]] = [[], []]
    run(
        [*(dq_consumer(pairs, wg, ring, started, found[wg]) for wg in (0, 1)), *(ring.fill(pairs, wg, 2) for wg in (0, 1))],
        seed,
    )
    return found
