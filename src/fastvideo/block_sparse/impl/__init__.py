"""The table of block-sparse implementations, fastest first, and the rule that picks one.

Each line of the table names a module-level `Implementation`, imported when it is first considered. An implementation
says why it can't run a call (`rejections`); the automatic choice is the first that has no objection.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from fastvideo.block_sparse.pattern import BlockPattern

AUTOMATIC = ""
"""What custom ops take for no wish."""

Rejections = Callable[[Tensor, Tensor, Tensor, BlockPattern], tuple[str, ...]]
Forward = Callable[[Tensor, Tensor, Tensor, BlockPattern, float], tuple[Tensor, Tensor]]
Backward = Callable[
    [Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor, Tensor, BlockPattern, float],
    tuple[Tensor, Tensor, Tensor],
]


class GatedTiles(NamedTuple):
    """What a forward may add to its output rows before it rounds them: `gate * coarse[tile of the query]`.

    Attributes:
        gate: `[B, S, Hq, D]` in query's dtype.
        coarse: `[B, N, Hq, D]`, floating point, a row for each query tile.
    """

    gate: Tensor
    coarse: Tensor


ForwardInto = Callable[[Tensor, Tensor, Tensor, BlockPattern, float, Tensor, Tensor, GatedTiles | None], None]


@dataclass(frozen=True)
class Implementation:
    """One implementation of block-sparse attention. All tensors are in token order, BSHD.

    Attributes:
        rejections: `(query, key, value, pattern)` to every reason why it can't run; reads no values.
        forward: `(query, key, value, pattern, scale)` to `(out, lse)`: out `[B, S, H, D]` contiguous in query's dtype,
            lse `[B, S, H]` natural log in fp32 (fp64 for fp64).
        backward: `(dout, dlse or None, query, key, value, out, lse, pattern, scale)` to `(dquery, dkey, dvalue)` in the
            inputs' shapes and dtypes. With `delta = rowsum(dout * out) - dlse`, the gradient of the scores is
            `exp(score - lse) * (dout @ value^T - delta)`.
        forward_into: `(query, key, value, pattern, scale, out, lse, added)`: `forward` into tensors of the caller, of which
            only batches may lie apart, as many rows in `out` as in `lse`; with `added` the output is
            `fine + gate * coarse[tile of the query]`, summed in fp32 and rounded once. None for an implementation that can't.
        is_delta_given: Whether `backward` takes delta from `out` and `dlse` as they are, at no cost for the latter, so that
            another output will do, with the difference of the row sums in `dlse`.
    """

    rejections: Rejections
    forward: Forward
    backward: Backward
    forward_into: ForwardInto | None = None
    is_delta_given: bool = False


def kernels_of(module: str, rejections: Rejections) -> Implementation:
    """Return the implementation whose `forward`, `backward` and `forward_into` stand in a module imported at the first call.

    Args:
        module: Its full name. It needs what `rejections` asks for; its kernels take delta as `is_delta_given` says.
        rejections: As in `Implementation`.
    """

    def late(name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            return getattr(importlib.import_module(module), name)(*arguments)

        return call

    return Implementation(rejections, late("forward"), late("backward"), late("forward_into"), is_delta_given=True)


IMPLEMENTATIONS: dict[str, str] = {
    "hopper": "fastvideo.block_sparse.impl.hopper:IMPLEMENTATION",
    "triton": "fastvideo.block_sparse.impl.triton:IMPLEMENTATION",
    "portable": "fastvideo.block_sparse.impl.portable:IMPLEMENTATION",
    "reference": "fastvideo.block_sparse.impl.reference:IMPLEMENTATION",
    # Behind one that accepts everything: these run when they are asked for by name.
    "cudnn": "fastvideo.block_sparse.impl.cudnn:IMPLEMENTATION",
    "flash": "fastvideo.block_sparse.impl.flash:IMPLEMENTATION",
    "flex": "fastvideo.block_sparse.impl.flex:IMPLEMENTATION",
}


@functools.cache
def load_implementation(name: str) -> Implementation:
    """Import the implementation that the table lists under `name`."""
    module, _, attribute = IMPLEMENTATIONS[name].partition(":")
    implementation = getattr(importlib.import_module(module), attribute)
    if not isinstance(implementation, Implementation):
        raise TypeError(f"expected {IMPLEMENTATIONS[name]} to be an Implementation, got {type(implementation)}")
    return implementation


def choose_implementation(
    query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern, name: str | None = None
) -> tuple[str, dict[str, tuple[str, ...]]]:
    """Pick the implementation for a call.

    Args:
        query: `[B, S_q, Hq, D]`.
        key: `[B, S_k, Hkv, D]`.
        value: `[B, S_k, Hkv, D]`.
        pattern: Which tiles see which.
        name: The wanted implementation; None picks the first of the table that accepts.

    Returns:
        The chosen name, and for each one considered its reasons against (none for the chosen).

    Raises:
        ValueError: For a name that the table does not have.
        NotImplementedError: When the named one, or every one, rejects; lists all reasons.
    """
    if name is not None and name not in IMPLEMENTATIONS:
        raise ValueError(f"unknown block-sparse implementation {name!r}; there are {sorted(IMPLEMENTATIONS)}")
    trace: dict[str, tuple[str, ...]] = {}
    for candidate in IMPLEMENTATIONS if name is None else (name,):
        trace[candidate] = load_implementation(candidate).rejections(query, key, value, pattern)
        if not trace[candidate]:
            return candidate, trace
    reasons = "; ".join(f"{candidate}: {', '.join(why)}" for candidate, why in trace.items())
    raise NotImplementedError(f"no block-sparse implementation can run this call: {reasons}")
