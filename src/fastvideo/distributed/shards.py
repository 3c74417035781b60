"""A replicated tensor cut into one shard per rank, and back."""

from __future__ import annotations

from typing import Any

import torch

from fastvideo.distributed.collectives import _gather, all_gather
from fastvideo.distributed.mesh import SequenceGroup, current_sequence_group

__all__ = ["gather_sequence", "keep_own_part", "shard_sequence", "sum_gradient"]


def shard_sequence(x: torch.Tensor, dim: int = 1, group: SequenceGroup | None = None) -> torch.Tensor:
    """Return this rank's part of a tensor that every rank holds.

    Its gradient is the whole one on every rank, under the convention that the global loss is the sum of local losses.

    Raises:
        ValueError: The length doesn't divide by the number of ranks.

    Example:
        >>> torch.equal(shard_sequence(torch.arange(6), dim=0), torch.arange(6))
        True
    """
    group = current_sequence_group(group)
    length = x.shape[dim]
    if length % group.size:
        fitting = [size for size in range(1, group.size + 1) if length % size == 0]
        raise ValueError(
            f"a sequence of {length} tokens can't be divided over {group.size} devices; "
            f"{', '.join(map(str, fitting))} devices would fit, or a length that is a multiple of {group.size}"
        )
    return keep_own_part(x, dim, group)


def keep_own_part(x: torch.Tensor, dim: int, group: SequenceGroup, grad: str = "reduced") -> torch.Tensor:
    """Return part `group.rank` of `group.size` of a replicated tensor along `dim`.

    Args:
        x: The same on every rank; `dim` divides by `group.size`.
        dim: What is cut: tokens or heads.
        group: The ranks.
        grad: `"reduced"`: the gradient of `x` is the whole one, gathered from the ranks. `"partial"`: it is zero outside
            this rank's part, and the caller sums over ranks.
    """
    if group.size == 1:
        return x
    if grad == "reduced":
        return _KeepOwnPart.apply(x, dim % x.dim(), group.name, group.size, group.rank)  # type: ignore[no-any-return,no-untyped-call]
    return x.chunk(group.size, dim)[group.rank]


def gather_sequence(x: torch.Tensor, dim: int = 1, group: SequenceGroup | None = None) -> torch.Tensor:
    """Return the whole tensor on every rank from equal shards, in the order of ranks.

    The gradient of a shard is the sum over ranks of the gradients that arrive for it: with a loss on the whole tensor, let one
    rank compute it, or each a share.

    Example:
        >>> torch.equal(gather_sequence(torch.arange(6), dim=0), torch.arange(6))
        True
    """
    group = current_sequence_group(group)
    if group.size == 1:
        return x
    return torch.cat(all_gather(x, group).unbind(0), dim=dim)


def sum_gradient(x: torch.Tensor, group: SequenceGroup) -> torch.Tensor:
    """Return `x`, which every rank holds and uses in part; its gradient is summed over the ranks."""
    if group.size == 1 or not x.is_floating_point():
        return x
    return _SumGradient.apply(x, group.name, group.size)  # type: ignore[no-any-return,no-untyped-call]


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, name: str, size: int) -> torch.Tensor:
        ctx.group = (name, size)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _gather(grad, *ctx.group).sum(dim=0), None, None


class _KeepOwnPart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, name: str, size: int, rank: int) -> torch.Tensor:
        ctx.place = (dim, name, size)
        return x.chunk(size, dim)[rank].contiguous()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        dim, name, size = ctx.place
        return torch.cat(_gather(grad, name, size).unbind(0), dim=dim), None, None, None, None
