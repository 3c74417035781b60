"""One group's calls, counted and agreed upon through its process group's store.

Every rank counts the calls that it makes, backward passes among them. `_successors` holds, for each call, the one that all
ranks were seen to make next. Where in a training step a call stands is part of it: of equal blocks, the last one's forward pass
is followed by a backward pass, and the others' by that of the next block.
A rank whose next call is the only known successor needs no word of its peers; a rank that does anything else (a call that
is new, or one of several known successors) first publishes its call under its number and reads its peers'. The tables
change only when all ranks agree, so they are alike everywhere, and no two ranks can enter the transport with different calls:
one that deviates from the rest stops before it. Ranks that went ahead and now wait for it inside the transport are what the
`Watchdog` is for; where the transport can't be aborted (gloo), every call is confirmed instead.

Threads of one process take turns: a call that waits for its peers holds up those of other threads, and where it fails they do.
Their order has to be that of the peers' threads. Two locks are always taken in one order: `_turn`, held through a whole call,
then `lock`, held for a few assignments. The `Watchdog` takes `lock` alone, so it can speak while a call waits; whoever waits
for its turn is freed by the call that has it, which finds the verdict itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
import weakref
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from fastvideo.distributed.agreement.records import Fields, decode, describe_difference, encode

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

__all__ = ["Ledger", "RanksDisagree"]

_NUM_REMEMBERED = 4096
"""Calls that can be looked up for a peer that asks. A host runs ahead of its device by less than this."""


class RanksDisagree(RuntimeError):
    """Ranks that share a sequence made different calls, or one of them stopped. The message names them and the difference."""


_NUM_KNOWN = 1 << 16
"""Calls whose successor is remembered. All ranks forget at the same call."""

_NUM_PLACES = 4096
"""Forward or backward passes in a row that are told apart. Where gradients are recorded that nobody ever asks for, each call is
new until there have been so many."""

_BRANCH: Fields = (("", "several known successors"),)
_LOOK_EVERY = 0.05
"""Seconds between two looks for a verdict, an answer or a process that ended."""


class Ledger:
    """The calls of one group on one rank.

    Args:
        ranks: Global ranks of the group.
        rank: This process's place among `ranks`.
        timeout: Seconds without a sign of life after which the `Watchdog` takes a peer for dead.
        generation: How many ledgers of these ranks came before in this process; a store may outlive a process group.

    Attributes:
        count: Calls made so far.
        waiting: Number of the call that waits for its peers, or 0.
        failure: Why no further call may be made, or `None`.
        raised: Whether a caller was told.
        transports: Names of the process groups through which its ranks exchange tensors.
        thread: Identifier of the thread that made the last call outside of a backward pass.
        lock: Guards `waiting`, `failure` and `raised`, which the `Watchdog` reads and writes.
    """

    def __init__(self, ranks: tuple[int, ...], rank: int, timeout: float, generation: int = 0) -> None:
        # Torch may be built without them.
        from torch._C._distributed_c10d import PrefixStore
        from torch.distributed.distributed_c10d import _get_default_group

        self.ranks, self.rank, self.timeout, self.generation = ranks, rank, timeout, generation
        self.transports: frozenset[str] = frozenset()
        self.count = 0
        self.waiting = 0
        self.failure: str | None = None
        self.raised = False
        self.thread = threading.get_ident()
        self.lock = threading.Lock()
        self._turn = threading.Lock()
        self._own = threading.local()
        self._met: set[str] = set()
        self._previous: tuple[Fields, int] = ((), 0)
        self._direction = ""
        self._successors: dict[tuple[Fields, int], Fields] = {}
        self._log: list[tuple[int, Fields] | None] = [None] * _NUM_REMEMBERED
        self._world = weakref.ref(_get_default_group())
        self._published: set[int] = set()
        digest = hashlib.sha1(repr(ranks).encode(), usedforsecurity=False).hexdigest()[:10]
        store = _default_store()
        try:
            # Where its server is gone, this fails at once; a new connection would be tried until the transport's timeout.
            store.check(["fastvideo/agreement"])
            # A clone is a connection of its own: it keeps no server alive after the process group is destroyed.
            clone = store.clone()  # type: ignore[attr-defined]  # the stubs lack it
        except dist.DistNetworkError as error:
            raise RanksDisagree(self._lost_store("before its first call", error)) from error
        self.store: Store = PrefixStore(f"fastvideo/agreement/{digest}/{generation}", clone)

    @property
    def is_current(self) -> bool:
        """Whether the process group that this ledger was made for still is the one in use."""
        return dist.is_initialized() and self._world() is dist.group.WORLD

    @property
    def peers(self) -> list[int]:
        """Places of the others."""
        return [place for place in range(len(self.ranks)) if place != self.rank]

    @property
    def own_number(self) -> int:
        """Number of the last call that this thread made, or 0."""
        number: int = getattr(self._own, "number", 0)
        return number

    def agree(self, fields: Fields, every: bool, timeout: float, transports: str = "", backward_of: int | None = None) -> None:
        """Count a call and return once no rank of the group can be making another one.

        Args:
            fields: What the ranks have to agree on.
            every: Confirm it although it is the only known successor.
            timeout: Seconds to wait for peers.
            transports: Names of the process groups through which the call exchanges tensors, a line each.
            backward_of: The number of the call whose backward pass this is.

        Raises:
            RanksDisagree: Another rank makes another call, or doesn't come in time.
        """
        with self._turn:
            self._raise_if_failed()
            if torch._C._current_graph_task_id() == -1:
                # In a backward pass this may be a thread of autograd's, and the one that asked for it is told.
                self.thread = threading.get_ident()
            if transports not in self._met:
                self._met.add(transports)
                # Another set in place of the old one, which the watchdog may be going through.
                self.transports |= set(transports.split())
            number = self.count + 1
            if backward_of is not None:
                fields = (*fields, ("calls_back", str(number - backward_of)))
            known = self._successors.get(self._previous)
            if every or known is None or known != fields:
                self._confirm(number, fields, timeout)
                if not every:
                    self._learn(fields)
            self._log[number % _NUM_REMEMBERED] = (number, fields)
            self.count = self._own.number = number
            self._previous = (fields, self._place_of(fields))
            # A verdict may have come meanwhile, and behind this point is the transport.
            self._raise_if_failed()

    def _raise_if_failed(self) -> None:
        if self.failure is None:
            return
        with self.lock:
            # What the watchdog has raised in this thread is pending since before the lock was free, and comes up in the call.
            self._raise_failure()

    def _raise_failure(self) -> None:
        self.raised = True
        raise RanksDisagree(self.failure)

    def _place_of(self, fields: Fields) -> int:
        """Return which of the forward or backward passes in a row a call is; 0 where no gradient is recorded."""
        direction, before = next((value for name, value in fields if name == "pass"), ""), self._direction
        self._direction = direction
        if direction not in ("forward", "backward"):
            return 0
        return min(_NUM_PLACES, self._previous[1] + 1) if direction == before else 1

    def _learn(self, fields: Fields) -> None:
        if len(self._successors) >= _NUM_KNOWN:
            self._successors.clear()
        known = self._successors.setdefault(self._previous, fields)
        if known != fields:
            self._successors[self._previous] = _BRANCH

    def answer(self, number: int) -> None:
        """Publish a call that was made without a word, for a peer that asks for it."""
        entry = self._log[number % _NUM_REMEMBERED]
        if entry is not None and entry[0] == number:
            self.store.set(f"answer/{self.rank}", encode(*entry))

    def fail(self, text: str) -> RanksDisagree:
        """Tell every rank that the group is broken, for the first reason that any of them gave, and return the error."""
        with contextlib.suppress(RuntimeError):  # without a store each rank keeps its own reason
            text = self.store.compare_set("verdict", "", text).decode()
        with self.lock:
            self.failure = text
        return RanksDisagree(text)

    def verdict(self) -> str | None:
        """Return why another rank ended the group, or `None`."""
        return self.store.get("verdict").decode() if self.store.check(["verdict"]) else None

    def leave(self, error: str) -> None:
        """Tell peers that this process ends, and by which error, empty for none."""
        with contextlib.suppress(RuntimeError):  # the store may have gone first
            self.store.set(f"left/{self.rank}", f"{self.count} {error}")

    def departure(self, place: int) -> tuple[int, str] | None:
        """Return after which call a peer's process ended, and by which error, or `None` where it goes on."""
        if not self.store.check([f"left/{place}"]):
            return None
        count, _, error = self.store.get(f"left/{place}").decode().partition(" ")
        return int(count), error

    def describe_departure(self, place: int, count: int, error: str, here: str) -> str:
        """Return the sentence about a peer that ended, with where this rank is."""
        by = f" by {error}" if error else ""
        return f"rank {self.ranks[place]} ended{by} after call {count} of the shared attention, where {self._me} {here}"

    def _confirm(self, number: int, fields: Fields, timeout: float) -> None:
        try:
            with self.lock:
                self.waiting = number
            self.store.set(f"call/{self.rank}/{number % 2}", encode(number, fields))
            self._wait_for_peers(number, fields, timeout)
        except dist.DistNetworkError as error:
            text = self._lost_store(f"at call {number} ({_shown(fields)})", error)
            with self.lock:
                self.failure = text
            raise RanksDisagree(text) from error
        finally:
            with self.lock:
                self.waiting = 0
                self.raised = self.failure is not None

    def _wait_for_peers(self, number: int, fields: Fields, timeout: float) -> None:
        start = time.monotonic()
        pause, next_look = 1e-4, start + _LOOK_EVERY
        while True:
            now = time.monotonic()
            looks = now >= next_look
            calls = self._calls_of_peers(number, with_answers=looks)
            everyone = {self.ranks[place]: call for place, call in {**calls, self.rank: fields}.items()}
            difference = describe_difference(number, everyone)
            if difference is not None:
                raise self.fail(difference)
            if len(calls) == len(self.ranks) - 1:
                return
            if looks:
                next_look = now + _LOOK_EVERY
                missing = [place for place in self.peers if place not in calls]
                self._look_for_trouble(number, fields, missing)
                if now - start >= timeout:
                    raise self._give_up(number, fields, missing, timeout)
            time.sleep(pause)
            pause = min(0.005, 2 * pause)

    def _calls_of_peers(self, number: int, with_answers: bool) -> dict[int, Fields]:
        """Return by place what peers published as their call `number`."""
        # Two places in turn are enough: a peer overwrites one two calls later, when it has seen that this rank read it.
        keys = {place: f"call/{place}/{number % 2}" for place in self.peers}
        if number % 2 not in self._published:
            if self.store.check(list(keys.values())):
                self._published.add(number % 2)
            else:
                keys = {place: key for place, key in keys.items() if self.store.check([key])}
        records = list(zip(keys, self.store.multi_get(list(keys.values())), strict=True)) if keys else []
        if with_answers:
            for place in self.peers:
                if self.store.check([f"answer/{place}"]):
                    records.append((place, self.store.get(f"answer/{place}")))
        found = ((place, decode(record)) for place, record in records)
        return {place: call for place, (at, call) in found if at == number}

    def _look_for_trouble(self, number: int, fields: Fields, missing: list[int]) -> None:
        verdict = self.verdict()
        if verdict is not None:
            raise self.fail(verdict)
        for place in missing:
            departure = self.departure(place)
            if departure is not None:
                raise self.fail(self.describe_departure(place, *departure, f"makes call {number} ({_shown(fields)})"))

    def _give_up(self, number: int, fields: Fields, missing: list[int], timeout: float) -> RanksDisagree:
        absent = ", ".join(str(self.ranks[place]) for place in missing)
        error = self.fail(
            f"rank{'s' if len(missing) > 1 else ''} {absent} did not come to call {number} of the shared attention within "
            f"{timeout:g} s, where {self._me} asks for {_shown(fields)}: dead, waiting elsewhere, or slow; raise "
            "FASTVIDEO_AGREEMENT_TIMEOUT if slowness is expected"
        )
        # Who comes later finds no matching call, then the reason.
        self.store.set(f"call/{self.rank}/{number % 2}", encode(0, ()))
        return error

    def _lost_store(self, when: str, error: Exception) -> str:
        return (
            f"{self._me} lost the store of the process group {when} of the shared attention: "
            f"the process that hosts it, usually rank 0, has ended ({error})"
        )

    @property
    def _me(self) -> str:
        return f"rank {self.ranks[self.rank]}"


def _shown(fields: Fields) -> str:
    return ", ".join(f"{name}={value}" for name, value in fields if value)


def _default_store() -> Store:
    from torch.distributed.distributed_c10d import _get_default_store

    store = _get_default_store()
    if store is None:
        raise RuntimeError(
            "the default process group has no store through which ranks could agree; initialise it with one, "
            "or set FASTVIDEO_AGREEMENT=off"
        )
    return store
