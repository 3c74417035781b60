"""Measuring shared attention on all ranks of a run: each case checked, then all timed in turns beside one card.

- `ms`: a call on its slowest rank, calls following each other without a pause; the median over calls, then over rounds.
- Efficiency: `t_1 / (N t_N)`, with `t_1` the whole problem by the same backend on rank 0's device in the same rounds, while the
  others wait on their hosts.
- Exposed communication: `(t_N - t_local) / t_N`, with `t_local` one call of the same backend on what this rank attends to
  once everything has arrived (its queries, all keys they see, its heads), on all ranks at once, without any exchange. So
  packing, merging of partial results and waiting for slower ranks count as communication; what hides behind computation
  doesn't.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastvideo.benchmark.inputs import Inputs
from fastvideo.benchmark.measure import extra_peak_bytes
from fastvideo.benchmark.parallel_accuracy import OneCardResults, outcome
from fastvideo.benchmark.parallel_cases import ParallelCase
from fastvideo.benchmark.parallel_problem import Call, Problem, local_call, one_card
from fastvideo.benchmark.parallel_ranks import Ranks
from fastvideo.benchmark.parallel_row import ONE_CARD, ParallelRow
from fastvideo.benchmark.run import PASSES

__all__ = ["run_parallel"]

_GIB = float(1 << 30)
# What a call may raise when it can't run here; anything else is a fault of ours and ends the run.
_REFUSALS = (NotImplementedError, RuntimeError, ValueError, TypeError, ImportError)
# Other libraries check by other errors too.
_FOREIGN_REFUSALS = (*_REFUSALS, AssertionError, AttributeError, LookupError, OSError)


@dataclass
class _Entry:
    """A row with what it takes to time it; `repeats` is 0 until it has been checked."""

    case: ParallelCase
    row: ParallelRow
    repeats: int = 0


@dataclass
class _Timed:
    """A call without any exchange: one card, or the local part of a layout."""

    call: Call
    inputs: Inputs
    has_gate: bool
    repeats: dict[str, int] = field(default_factory=dict)
    rounds_ms: dict[str, list[float]] = field(default_factory=dict)

    def ms(self, pass_name: str) -> float | None:
        """Return the median of the rounds so far."""
        return statistics.median(self.rounds_ms[pass_name]) if self.rounds_ms.get(pass_name) else None


class _Backend:
    """One card's results and time, and the local parts of the layouts."""

    def __init__(self, problem: Problem, case: ParallelCase, ranks: Ranks, *, needs_grad: bool) -> None:
        self.problem, self.name, self.is_sparse = problem, case.backend, case.is_sparse
        call = one_card(problem, case.backend)
        self.results = OneCardResults(problem, call, case.backend, ranks, needs_grad=needs_grad)
        self.alone = _Timed(call, problem.inputs, case.is_sparse)
        self._parts: dict[tuple[int, int], _Timed] = {}

    def part(self, ring: int, ulysses: int) -> _Timed:
        """Return the local part of a layout."""
        if (ring, ulysses) not in self._parts:
            inputs = self.problem.local_part(ulysses)
            call = local_call(self.problem, self.name, inputs.query.shape[2])
            self._parts[ring, ulysses] = _Timed(call, inputs, self.is_sparse)
        return self._parts[ring, ulysses]


class _Run:
    """The state of `run_parallel`."""

    def __init__(
        self,
        problem: Problem,
        ranks: Ranks,
        passes: Sequence[str],
        round_ms: float,
        checks_errors: bool,
        report: Callable[[str], None],
    ) -> None:
        self.problem, self.ranks, self.passes = problem, ranks, passes
        self.round_ms, self.checks_errors, self.report = round_ms, checks_errors, report
        self.shards = problem.shards()
        self.backends: dict[str, _Backend | str] = {}
        self.rows: list[ParallelRow] = []
        self.entries: list[_Entry] = []

    def add(self, case: ParallelCase) -> None:
        """Make the rows of a case, and of one card the first time that its backend comes."""
        if case.library == "fastvideo" and case.backend not in self.backends:
            self._add_backend(case)
        found = self._backend(case)
        if isinstance(found, str) and case.library == "fastvideo":
            return  # the row of one card says why
        for pass_name in self.passes:
            if case.is_float8 and pass_name == "backward":
                continue  # tensors travel in float8 at inference alone
            row = ParallelRow(
                case.name, pass_name, case.library, case.backend, case.layout, case.ring, case.ulysses,
                case.head_groups, case.is_sparse, case.is_float8,
            )  # fmt: skip
            if isinstance(found, str):
                row.refused = found
            elif case.planned is not None and case.planned.is_legal:
                cost = case.planned.forward if pass_name == "forward" else case.planned.backward
                row.model_ms = 1000 * cost.time
            self.rows.append(row)
            self.entries.append(_Entry(case, row))

    def _add_backend(self, case: ParallelCase) -> None:
        self.report(f"one card {case.backend}")
        reason: str | None = None
        try:
            found = _Backend(self.problem, case, self.ranks, needs_grad="backward" in self.passes)
        except _REFUSALS as error:
            reason = _said(error)
        said = self._first_reason(reason)
        self.backends[case.backend] = found if said is None else said
        for pass_name in self.passes:
            row = ParallelRow(f"one card {case.backend}", pass_name, ONE_CARD, case.backend, "local", 1, 1)
            row.is_sparse, row.refused = case.is_sparse, said
            self.rows.append(row)

    def _backend(self, case: ParallelCase) -> _Backend | str:
        """Return what a case is compared with: its backend, or for a peer the first dense one."""
        if case.library == "fastvideo":
            return self.backends[case.backend]
        dense = [found for found in self.backends.values() if isinstance(found, _Backend) and not found.is_sparse]
        return dense[0] if dense else "no dense backend of ours runs here to compare it with; name one with --backends"

    def _first_reason(self, own: str | None) -> str | None:
        """Return why some rank can't go on; all ranks hear the same."""
        return next((text for text in self.ranks.tell(own) if text is not None), None)

    def round(self, number: int, save: Callable[[list[ParallelRow]], None]) -> None:
        """Time everything once; in the first round check it before."""
        for row in self.rows:
            found = self.backends.get(row.backend)
            if row.library == ONE_CARD and isinstance(found, _Backend):
                self.report(f"round {number}: {row.case}, {row.pass_name}")
                row.rounds_ms.append(self._time_alone(found.alone, row.pass_name))
                row.ms = row.one_card_ms = statistics.median(row.rounds_ms)
        parts: set[tuple[str, int, int, str]] = set()
        for entry in self.entries:
            row, backend = entry.row, self._backend(entry.case)
            if row.refused is None and isinstance(backend, _Backend):
                self.report(f"round {number}: {row.case}, {row.pass_name}")
                if number == 1:
                    self._check(entry, backend)
            if row.refused is None and isinstance(backend, _Backend):
                part = (backend.name, row.ring, row.ulysses, row.pass_name)
                if row.library == "fastvideo" and part not in parts:
                    parts.add(part)
                    self._time_part(backend.part(row.ring, row.ulysses), row.pass_name)
                row.rounds_ms.append(self._time_shared(entry, number))
                self._finish(row, backend)
            save(self.rows)

    def _time_alone(self, timed: _Timed, pass_name: str) -> float:
        """Return the time of a call that rank 0 makes while the others wait on their hosts."""
        self.ranks.tell(None)
        own = 0.0
        if self.ranks.rank == 0:
            for call in _calls(timed.call, timed.inputs, pass_name, has_gate=timed.has_gate):
                own = self.ranks.alone_ms(call, self.round_ms)
        own = float(self.ranks.tell(own)[0])
        timed.rounds_ms.setdefault(pass_name, []).append(own)
        return own

    def _time_part(self, timed: _Timed, pass_name: str) -> None:
        for call in _calls(timed.call, timed.inputs, pass_name, has_gate=timed.has_gate):
            if pass_name not in timed.repeats:
                timed.repeats[pass_name] = self.ranks.repeats(call, self.round_ms)
            timed.rounds_ms.setdefault(pass_name, []).append(self.ranks.together_ms(call, timed.repeats[pass_name]))

    def _time_shared(self, entry: _Entry, number: int) -> float:
        found = 0.0
        shared = entry.case.build(f"{entry.row.case}, {entry.row.pass_name}, round {number}")
        for call in _calls(shared, self.shards, entry.row.pass_name, has_gate=entry.row.is_sparse):
            found = self.ranks.together_ms(call, entry.repeats)
        return found

    def _check(self, entry: _Entry, backend: _Backend) -> None:
        """Run a case once, with its errors and memory, or say why it doesn't run; the ranks agree on which."""
        row, case = entry.row, entry.case
        needs_grad = row.pass_name == "backward"
        leaves = self.shards.leaves(has_gate=case.is_sparse, needs_grad=needs_grad)
        results: dict[str, Tensor] = {}
        shared: Call | None = None
        reason: str | None = None
        refusals: tuple[type[Exception], ...] = _REFUSALS if case.library == "fastvideo" else _FOREIGN_REFUSALS
        try:
            shared = case.build(f"{row.case}, {row.pass_name}, check")
            results = outcome(shared, leaves, self.shards.dout if needs_grad else None)
        except refusals as error:
            reason = _said(error)
            if self.problem.device.type == "cuda":
                # What it has sent by then still writes to memory that is about to be used again.
                torch.cuda.synchronize(self.problem.device)
        row.refused = self._first_reason(reason)
        if row.refused is not None and case.planned is not None and case.planned.reasons:
            row.refused = f"{'; '.join(case.planned.reasons)} ({row.refused})"
        if row.refused is not None or shared is None:
            return
        if self.checks_errors:
            row.errors = backend.results.errors(results, with_rms=case.is_float8)
            verdict = backend.results.over_budget(results)
            row.over_budget = None if case.is_float8 else verdict
        results.clear()
        for call in _calls(shared, self.shards, row.pass_name, has_gate=case.is_sparse):
            entry.repeats = self.ranks.repeats(call, self.round_ms)
            peak = extra_peak_bytes(call, self.problem.device)
            held = sum(x.nbytes for x in leaves) if needs_grad else 0
            peaks = self.ranks.tell(None if peak is None else max(0, peak - held) / _GIB)
            row.extra_peak_gib = None if None in peaks else max(peaks)

    def _finish(self, row: ParallelRow, backend: _Backend) -> None:
        row.ms = statistics.median(row.rounds_ms)
        row.one_card_ms = backend.alone.ms(row.pass_name)
        if row.one_card_ms is not None:
            row.efficiency = row.one_card_ms / (self.problem.size * row.ms)
        # A peer's kernel may be another, and then the difference isn't communication.
        if row.library == "fastvideo":
            row.local_ms = backend.part(row.ring, row.ulysses).ms(row.pass_name)
        if row.local_ms is not None:
            row.exposed_share = (row.ms - row.local_ms) / row.ms


def run_parallel(
    problem: Problem,
    cases: Sequence[ParallelCase],
    ranks: Ranks,
    *,
    passes: Sequence[str] = PASSES,
    rounds: int = 3,
    round_ms: float = 150.0,
    checks_errors: bool = True,
    report: Callable[[str], None] = lambda _: None,
    save: Callable[[list[ParallelRow]], None] = lambda _: None,
) -> list[ParallelRow]:
    """Check every case, and time all of them in turns; every rank calls it alike.

    Args:
        problem: What is shared.
        cases: The ways to share it.
        ranks: All ranks.
        passes: `"forward"`, `"backward"` or both.
        rounds: How many times each case is timed.
        round_ms: How long one case is timed for in a round, about; at least two calls.
        checks_errors: Compare with one card, and with float64 on sampled heads.
        report: Is told what happens.
        save: Is handed the rows so far after each case, so that they outlive one that ends the process.

    Returns:
        The rows of one card and of the cases, the same on every rank.
    """
    run = _Run(problem, ranks, passes, round_ms, checks_errors, report)
    for case in cases:
        run.add(case)
    for number in range(1, rounds + 1):
        run.round(number, save)
    return run.rows


def _calls(call: Call, inputs: Inputs, pass_name: str, *, has_gate: bool) -> Iterator[Callable[[], object]]:
    """What is timed; with the backward its graph lives as long as the iterator."""
    needs_grad = pass_name == "backward"
    leaves = inputs.leaves(has_gate=has_gate, needs_grad=needs_grad)
    if not needs_grad:

        def forward() -> Tensor:
            with torch.no_grad():
                return call(*leaves)

        yield forward
        return
    out = call(*leaves)
    yield lambda: torch.autograd.grad(out, leaves, inputs.dout, retain_graph=True)


def _said(error: BaseException) -> str:
    return str(error) or type(error).__name__
