"""The error of a shared result: against one card's on every token, and against float64 on sampled heads for the budget.

A row is within budget when on the sampled heads, one of each rank's by Ulysses, the max and mean error of output and every
gradient against float64 are at most twice those of one card's result, plus a rounding floor (`fastvideo.testing.budget`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fastvideo.benchmark.accuracy import head_results
from fastvideo.benchmark.parallel_problem import Call, Problem
from fastvideo.benchmark.parallel_ranks import Ranks
from fastvideo.distributed.mesh import SequenceGroup
from fastvideo.distributed.shards import gather_sequence
from fastvideo.testing.budget import assert_within_budget

__all__ = ["GRADIENTS", "OneCardResults", "outcome"]

GRADIENTS = ("dquery", "dkey", "dvalue", "dgate")
RMS = "out rms"
"""Name of the output's root mean square error, which says more than the largest where rounding is coarse."""

_Exact = tuple[dict[str, Tensor], Tensor | slice]


def outcome(call: Call, leaves: Sequence[Tensor], dout: Tensor | None) -> dict[str, Tensor]:
    """Return the output of a call, and with `dout` its gradients, by name."""
    if dout is None:
        with torch.no_grad():
            return {"out": call(*leaves)}
    out = call(*leaves)
    grads = torch.autograd.grad(out, list(leaves), dout)
    return {"out": out.detach(), **dict(zip(GRADIENTS, grads, strict=False))}


class OneCardResults:
    """What one card computes, for comparison; every rank computes it itself and keeps what it compares.

    Args:
        problem: The problem.
        call: The layer on one card.
        backend: Its backend.
        ranks: All ranks.
        needs_grad: Compute gradients too.
    """

    def __init__(self, problem: Problem, call: Call, backend: str, ranks: Ranks, *, needs_grad: bool) -> None:
        self._problem, self._ranks, self._backend, self._needs_grad = problem, ranks, backend, needs_grad
        self._is_sparse = backend == "VIDEO_SPARSE_ATTN"
        inputs = problem.inputs
        leaves = inputs.leaves(has_gate=self._is_sparse, needs_grad=needs_grad)
        whole = outcome(call, leaves, inputs.dout if needs_grad else None)
        self._shards = {name: problem.shard(x) for name, x in whole.items()}
        num_heads = problem.shape.num_heads
        self._heads = sorted({rank * num_heads // ranks.size for rank in range(ranks.size - 1)} | {num_heads - 1})
        self._sampled = {name: x[:, :, self._heads].clone() for name, x in whole.items()} if ranks.rank == 0 else {}
        self._exact: list[_Exact] | None = None

    def errors(self, results: dict[str, Tensor], *, with_rms: bool = False) -> dict[str, float]:
        """Return, by name, the largest difference of any rank's tokens over one card's largest magnitude."""
        found = {}
        for name, x in results.items():
            expected = self._shards[name]
            found[name] = (_largest(x.float() - expected.float()), _largest(expected))
        if with_rms:
            expected = self._shards["out"].float()
            squares = (results["out"].float() - expected).square().sum(), expected.square().sum()
            found[RMS] = (float(squares[0]), float(squares[1]))
        by_rank = self._ranks.tell(found)
        errors = {
            name: max(own[name][0] for own in by_rank) / max(1e-30, *(own[name][1] for own in by_rank))
            for name in found
            if name != RMS
        }
        if with_rms:
            errors[RMS] = (sum(own[RMS][0] for own in by_rank) / sum(own[RMS][1] for own in by_rank)) ** 0.5
        return errors

    def over_budget(self, results: dict[str, Tensor]) -> str | None:
        """Return the budget that is exceeded, or `None`; all ranks call it together."""
        world = SequenceGroup.from_mesh(dist.group.WORLD)  # type: ignore[arg-type]  # set once initialised
        lengths, verdict = self._problem.lengths, None
        gathered = {
            name: gather_sequence(x.detach()[:, :, self._heads].contiguous(), 1, world, shard_lengths=lengths)
            for name, x in results.items()
        }
        if self._ranks.rank == 0:
            verdict = self._judge(gathered)
        found: str | None = self._ranks.tell(verdict)[0]
        return found

    def _judge(self, gathered: dict[str, Tensor]) -> str | None:
        sample = self._problem.shape.batch - 1
        for place, (exact, rows) in enumerate(self._exact_heads(sample)):
            for name, got in gathered.items():
                if name in exact:
                    one = self._sampled[name]
                    try:
                        assert_within_budget(
                            got[sample, :, place][rows], exact[name][rows], one[sample, :, place][rows], name=name
                        )
                    except AssertionError as error:
                        return str(error)
        return None

    def _exact_heads(self, sample: int) -> list[_Exact]:
        """Return the sampled heads in float64, computed once."""
        if self._exact is None:
            inputs, attended = self._problem.inputs, self._problem.attended(self._backend)
            tensors = [*inputs.leaves(has_gate=self._is_sparse, needs_grad=False)]
            tensors += [inputs.dout] if self._needs_grad else []
            self._exact = [
                head_results(attended, sample, head, [x[sample, :, head].double() for x in tensors], self._needs_grad)
                for head in self._heads
            ]
        return self._exact


def _largest(x: Tensor) -> float:
    """Return the largest magnitude, infinity for NaN."""
    return float(x.abs().max().float().nan_to_num(nan=torch.inf)) if x.numel() else 0.0
