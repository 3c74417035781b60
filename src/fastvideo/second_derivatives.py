"""Second derivatives, which gradients that aren't made by autograd lack: they raise instead of being wrong in silence.

`torch.autograd.function.once_differentiable` cuts its gradients off their inputs, so `torch.autograd.grad` finds none and
raises nothing; here they stay tied. Compiled code is left alone: AOTAutograd has no second derivatives.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

__all__ = ["differentiable_once", "without_second_derivatives"]

P = ParamSpec("P")
R = TypeVar("R", bound=tuple[torch.Tensor | None, ...])


def differentiable_once(x: torch.Tensor) -> torch.Tensor:
    """Return `x`, whose gradient by what is made of it can't be differentiated again.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> torch.autograd.grad(differentiable_once(x).square().sum(), x)
        (tensor([2., 2.]),)
    """
    return x if torch.compiler.is_compiling() else _Once.apply(x)  # type: ignore[no-untyped-call]


def without_second_derivatives(differentiate: Callable[P, R]) -> Callable[P, R]:
    """Return a function from tensors to their gradients, whose results can't be differentiated again."""

    @functools.wraps(differentiate)
    def tied(*args: P.args, **kwargs: P.kwargs) -> R:
        gradients = differentiate(*args, **kwargs)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return gradients
        inputs = [x for x in args if isinstance(x, torch.Tensor)]
        return tuple(None if x is None else _Last.apply(x, *inputs) for x in gradients)  # type: ignore[no-untyped-call,return-value]

    return tied


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
    def forward(gradient: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:  # noqa: ARG004  # ties
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError(
            "expected one derivative of the log-sum-exp, or of attention whose keys are shared by a ring, got a second one, "
            "which is not implemented; write the attention out in torch"
        )
