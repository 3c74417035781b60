"""What costs eager code less: gradients of custom ops without `register_autograd`, and code without `torch.autocast`.

An autograd formula that is registered with a custom op reads the op's schema anew for each of its arguments at each forward
call that needs a gradient (torch 2.11 to 2.13): some 50 to 200 us for an op of 10 to 20 arguments. A `torch.autograd.Function`
around the same op with the same formula doesn't. Traced code takes the op itself, which is one node of its graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_NO_CONTEXT = contextlib.nullcontext()

__all__ = ["eager_function", "function_of", "without_autocast"]


def function_of(
    op: Callable[..., Any], differentiate: Callable[..., Any], save: Callable[[Any, tuple[Any, ...], Any], None]
) -> type[torch.autograd.Function]:
    """Return an autograd function that runs `op`, with the formula and context that `register_autograd` takes.

    Args:
        op: Called with positional arguments; its own autograd formula isn't used.
        differentiate: `(ctx, *gradients of the outputs)` to a gradient or None for each argument.
        save: `(ctx, inputs, output)`, keeps what `differentiate` needs.
    """

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = op(*inputs)
        save(ctx, inputs, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(differentiate)}
    return type("EagerFunction", (torch.autograd.Function,), members)


def eager_function(
    op: Callable[..., Any], function: type[torch.autograd.Function], tensors: Sequence[Tensor | None]
) -> Callable[..., Any]:
    """Return what to call with the arguments of `op`: `function.apply` in eager code that needs gradients, else `op`."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return op
    needs_grad = any(x is not None and x.requires_grad for x in tensors)
    return function.apply if needs_grad else op


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Return a context without `torch.autocast`; where it is off, that is no context, which spares eager code microseconds.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16), without_autocast("cpu"):
        ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        torch.float32
    """
    if not torch.compiler.is_compiling() and not torch.is_autocast_enabled(device_type):
        return _NO_CONTEXT
    return torch.autocast(device_type, enabled=False)
