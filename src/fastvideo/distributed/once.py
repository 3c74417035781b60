"""Backward passes that exchange tensors, of which there is no derivative."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch

__all__ = ["differentiable_once"]


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Let a second derivative through `backward` raise, and not be silently incomplete.

    Torch's own `once_differentiable` lets one go unnoticed where it is asked for with respect to some inputs, as by
    `torch.autograd.grad`: what it returns hangs from no input.

    Args:
        backward: The backward pass of a `torch.autograd.Function`, called with its context, gradients and whatever else its
            result is computed from.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *sources: torch.Tensor | None) -> Any:
        # Compiled code is differentiated once anyway.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return backward(ctx, *sources)
        with torch.no_grad():
            found = backward(ctx, *sources)
        if not isinstance(found, tuple):
            return _Refused.apply(found, *sources)  # type: ignore[no-untyped-call]
        return tuple([None if x is None else _Refused.apply(x, *sources) for x in found])  # type: ignore[no-untyped-call]

    return once


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: torch.Tensor, *_sources: torch.Tensor | None) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(_ctx: Any, *_grads: torch.Tensor) -> NoReturn:
        raise NotImplementedError(
            "expected first derivatives only, got a second one through what ranks exchange; compute it on one device, inside "
            "fastvideo.distributed.sequence_parallel(None)"
        )
