"""Running cases side by side: each one tried and its memory taken, then all timed in turns, forward and backward, then checked.

Cases are interleaved: a round times each of them once, and a row's time is the median of its rounds, so that a card that
warms up or is shared treats all alike. Clocks and errors are taken after the last round, since the load of that would slow
what is timed next. A card at its power limit still runs slower the longer it runs: with a rest before each timing, every
one begins on a card that has just done nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastvideo.benchmark.accuracy import compare
from fastvideo.benchmark.cases import Case
from fastvideo.benchmark.inputs import Inputs, list_overlap
from fastvideo.benchmark.measure import extra_peak_bytes, median_ms, sm_clock_mhz, synchronize

__all__ = ["PASSES", "Row", "run_cases"]

PASSES = ("forward", "backward")
_GIB = float(1 << 30)
# What a call may raise when it can't run here; anything else is a fault of ours and ends the run.
_REFUSALS = (NotImplementedError, RuntimeError, ValueError, TypeError, ImportError)


@dataclass
class Row:
    """One case, one pass.

    Attributes:
        case: What ran.
        pass_name: `"forward"` or `"backward"`.
        is_dense: It is dense attention.
        sparsity: Share of pairs of tiles that is skipped.
        ms: Median of the rounds; `None` where it could not run.
        rounds_ms: Median of each round.
        tflops_real: 4 D operations a listed pair of tokens forward, 10 D backward.
        tflops_padded: The same with every tile padded to the largest.
        errors: Largest difference from float64 over largest magnitude, by output and gradient, on sampled heads.
        over_budget: The budget that an error exceeded; such a row is not ranked.
        refused: Why it could not run.
        extra_peak_gib: Peak memory beyond what was held before, and for the backward beyond the gradients.
        saved_gib: Kept for the backward beyond inputs and output.
        clock_mhz: SM clock under this load.
        power_w: Power under this load.
        overlap: Share of its list that a query tile has in common with its neighbour.
    """

    case: str
    pass_name: str
    is_dense: bool
    sparsity: float
    ms: float | None = None
    rounds_ms: list[float] = field(default_factory=list)
    tflops_real: float | None = None
    tflops_padded: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    over_budget: str | None = None
    refused: str | None = None
    extra_peak_gib: float | None = None
    saved_gib: float | None = None
    clock_mhz: float | None = None
    power_w: float | None = None
    overlap: float | None = None

    @property
    def is_ranked(self) -> bool:
        """It ran, within budget."""
        return self.ms is not None and self.over_budget is None

    def as_dict(self) -> dict[str, Any]:
        """The row as data."""
        return asdict(self)


def run_cases(
    cases: Sequence[Case],
    inputs: Inputs,
    *,
    passes: Sequence[str] = PASSES,
    rounds: int = 3,
    rest: float = 0.0,
    checks_errors: bool = True,
    report: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Try every case, time all of them in turns, and compare what they give.

    Args:
        cases: What to measure.
        inputs: What to measure it with.
        passes: `"forward"`, `"backward"` or both.
        rounds: How many times each case is timed.
        rest: Seconds in which nothing runs before each timing.
        checks_errors: Compare with float64 on sampled heads.
        report: Is told what happens.
    """
    rows: list[tuple[Case, Row]] = []
    for case in cases:
        report(f"trying {case.name}")
        rows += [(case, _try(case, inputs, name)) for name in passes]
    running = [(case, row) for case, row in rows if row.refused is None]
    for number in range(rounds):
        for case, row in running:
            report(f"round {number + 1} of {rounds}: {case.name}, {row.pass_name}")
            _time(case, inputs, row, rest)
    for case, row in running:
        _finish(case, inputs, row)
    if checks_errors:
        for case, row in running:
            report(f"checking {case.name}, {row.pass_name}")
            _check(case, inputs, row)
    return [row for _, row in rows]


def _try(case: Case, inputs: Inputs, pass_name: str) -> Row:
    """Run a case once, with its memory, or say why it doesn't run."""
    row = Row(case.name, pass_name, case.is_dense, case.sparsity)
    needs_grad = pass_name == "backward"
    leaves = inputs.leaves(has_gate=case.has_gate, needs_grad=needs_grad)
    device = inputs.query.device
    try:
        if needs_grad:
            saved: list[int] = []
            out = _call_and_count(case, leaves, saved)
            _backward(out, leaves, inputs.dout)
            row.saved_gib = sum(saved) / _GIB
            gradients = sum(x.nbytes for x in leaves)
            peak = extra_peak_bytes(lambda: _backward(out, leaves, inputs.dout), device)
            row.extra_peak_gib = None if peak is None else max(0, peak - gradients) / _GIB
        else:
            _forward(case, leaves)
            peak = extra_peak_bytes(lambda: _forward(case, leaves), device)
            row.extra_peak_gib = None if peak is None else peak / _GIB
    except _REFUSALS as error:
        row.refused = str(error) or type(error).__name__
    return row


def _check(case: Case, inputs: Inputs, row: Row) -> None:
    """Compare what a case gives with float64 on sampled heads."""
    needs_grad = row.pass_name == "backward"
    leaves = inputs.leaves(has_gate=case.has_gate, needs_grad=needs_grad)
    with torch.set_grad_enabled(needs_grad):
        out = case.call(*leaves)
    results = {"out": out.detach()}
    if needs_grad:
        results |= dict(zip(("dquery", "dkey", "dvalue", "dgate"), _backward(out, leaves, inputs.dout), strict=False))
    del out
    comparison = compare(case.attended(), [x.detach() for x in leaves], inputs.dout if needs_grad else None, results)
    row.errors, row.over_budget = comparison.errors, comparison.over_budget


def _forward(case: Case, leaves: Sequence[Tensor]) -> Tensor:
    with torch.no_grad():
        return case.call(*leaves)


def _backward(out: Tensor, leaves: Sequence[Tensor], dout: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, list(leaves), dout, retain_graph=True)


def _call_and_count(case: Case, leaves: Sequence[Tensor], saved: list[int]) -> Tensor:
    """Call with a graph; append the bytes of each memory that the graph keeps and that is neither input nor output."""
    kept: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = case.call(*leaves)
    own = {x.untyped_storage().data_ptr() for x in (*leaves, out)}
    saved += [size for place, size in kept.items() if place not in own]
    return out


def _calls(case: Case, inputs: Inputs, pass_name: str) -> Iterator[Callable[[], object]]:
    """What is timed; with the backward its graph lives as long as the iterator."""
    needs_grad = pass_name == "backward"
    leaves = inputs.leaves(has_gate=case.has_gate, needs_grad=needs_grad)
    if not needs_grad:
        yield lambda: _forward(case, leaves)
        return
    out = case.call(*leaves)
    yield lambda: _backward(out, leaves, inputs.dout)


def _time(case: Case, inputs: Inputs, row: Row, rest: float) -> None:
    for call in _calls(case, inputs, row.pass_name):
        if rest > 0:
            synchronize(inputs.query.device)
            time.sleep(rest)
        row.rounds_ms.append(median_ms(call, inputs.query.device))


def _finish(case: Case, inputs: Inputs, row: Row) -> None:
    row.ms = statistics.median(row.rounds_ms)
    operations = (4 if row.pass_name == "forward" else 10) * inputs.query.shape[-1]
    row.tflops_real = operations * case.real_pairs() / row.ms / 1e9
    row.tflops_padded = operations * case.padded_pairs / row.ms / 1e9
    attended = case.attended()
    if attended.lists is not None:
        row.overlap = list_overlap(attended.lists)
    for call in _calls(case, inputs, row.pass_name):
        if (clock := sm_clock_mhz(call, inputs.query.device)) is not None:
            row.clock_mhz, row.power_w = clock
