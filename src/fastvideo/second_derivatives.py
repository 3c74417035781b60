"""Second derivatives, which gradients that aren't made by autograd lack: they raise instead of being wrong in silence.

Torch's own `once_differentiable` cuts its gradients off their inputs, so that `torch.autograd.grad` finds none and raises
nothing; here they stay tied. Compiled code is left alone: AOTAutograd has no second derivatives.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch

__all__ = ["differentiable_once", "differentiable_once_view"]


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Let a derivative of what `backward` returns raise.

    Args:
        backward: The backward pass of a `torch.autograd.Function`, called with its context, gradients and whatever else its
            result is computed from.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *sources: torch.Tensor | None) -> Any:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return backward(ctx, *sources)
        with torch.no_grad():
            found = backward(ctx, *sources)
        if not isinstance(found, tuple):
            return _Last.apply(found, *sources)  # type: ignore[no-untyped-call]
        return tuple([None if x is None else _Last.apply(x, *sources) for x in found])  # type: ignore[no-untyped-call]

    return once


def differentiable_once_view(x: torch.Tensor) -> torch.Tensor:
    """Return `x`, whose gradient by what is made of it can't be differentiated again.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> torch.autograd.grad(differentiable_once_view(x).square().sum(), x)
        (tensor([2., 2.]),)
    """
    return x if torch.compiler.is_compiling() else _Once.apply(x)  # type: ignore[no-untyped-call]


class _Once(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:  # noqa: ARG004  # autograd's names
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return _Last.apply(grad, *ctx.saved_tensors)  # type: ignore[no-any-return,no-untyped-call]


class _Last(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: torch.Tensor, *sources: torch.Tensor | None) -> torch.Tensor:  # noqa: ARG004  # ties
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(_ctx: Any, *_grads: torch.Tensor) -> NoReturn:
        raise NotImplementedError(
            "expected first derivatives only, got a second one, of the log-sum-exp or through what ranks exchange; compute "
            "attention's on one device, inside fastvideo.distributed.sequence_parallel(None), and write the log-sum-exp out "
            "in torch"
        )
