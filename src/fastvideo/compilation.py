"""What this package tells `torch.compile` about its own functions."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

__all__ = ["compiled_for_training", "constant_while_tracing", "plain"]

F = TypeVar("F", bound=Callable[..., Any])
H = TypeVar("H", bound=Hashable)


def constant_while_tracing(function: F) -> F:
    """Let Dynamo run `function` while it traces, on guarded constants, and keep the answer: a constant itself.

    The mark is that of `torch.compiler.assume_constant_result`, whose call would import the compiler, 1.5 s, for every user.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def compiled_for_training(backend: str) -> dict[str, Any]:
    """Return the arguments with which `torch.compile` compiles for training by `backend`.

    Inductor of torch 2.10 to 2.13 fuses sums over tokens with sums over channels such that slices of the gradient of a chunked
    modulation table are never written, with one sample and some 16 thousand tokens
    (https://github.com/pytorch/pytorch/issues/193061); it is told not to.

    Example:
        >>> compiled_for_training("eager")
        {'backend': 'eager'}
    """
    if backend != "inductor":
        return {"backend": backend}
    from torch._inductor import config  # the compiler is imported late: it takes a second

    has_it = hasattr(config.triton, "mix_order_reduction")
    return {"backend": backend, "options": {"triton.mix_order_reduction": False} if has_it else {}}


def plain(value: H) -> H:
    """Return a hashable value as it is, and in traced code as a constant that Dynamo guards.

    After a change Dynamo makes sizes and floats symbolic, which a function that is constant while tracing can't take; being
    hashed brings them back.

    Example:
        >>> plain(0.5)
        0.5
    """
    return next(iter({value}))
