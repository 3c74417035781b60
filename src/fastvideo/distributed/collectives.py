"""Differentiable collectives that `torch.compile` traces, on gloo and NCCL.

The names of torch's own autograd collectives differ between releases, so these are built on the functional ones, which
don't. Gradients follow one convention: the global loss is the sum over ranks of their local losses.
"""

from __future__ import annotations

from typing import Any

import torch

from fastvideo.distributed.mesh import SequenceGroup

__all__ = ["all_gather", "all_to_all"]

_functional = torch.ops._c10d_functional


def all_to_all(x: torch.Tensor, group: SequenceGroup) -> torch.Tensor:
    """Send `x[r]` to rank r and return what came, by sender. `x`: `[size, ...]`."""
    return _AllToAll.apply(x, group.name, group.size)  # type: ignore[no-any-return,no-untyped-call]


def all_gather(x: torch.Tensor, group: SequenceGroup) -> torch.Tensor:
    """Return every rank's `x`, stacked: `[size, *x.shape]`. The gradient is summed over ranks."""
    return _AllGather.apply(x, group.name, group.size)  # type: ignore[no-any-return,no-untyped-call]


def _exchange(x: torch.Tensor, name: str, size: int) -> torch.Tensor:
    splits = [x.shape[0] // size] * size
    sent = _functional.all_to_all_single(x.contiguous(), splits, splits, name)
    return _functional.wait_tensor(sent)  # type: ignore[no-any-return]


def _gather(x: torch.Tensor, name: str, size: int) -> torch.Tensor:
    gathered = _functional.all_gather_into_tensor(x.contiguous().flatten(), size, name)
    return _functional.wait_tensor(gathered).view(size, *x.shape)  # type: ignore[no-any-return]


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, name: str, size: int) -> torch.Tensor:
        ctx.group = (name, size)
        return _exchange(x, name, size)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _exchange(grad, *ctx.group), None, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, name: str, size: int) -> torch.Tensor:
        ctx.group = (name, size)
        return _gather(x, name, size)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _exchange(grad, *ctx.group).sum(dim=0), None, None
