"""Block-sparse attention: the one engine that runs every rule that picks tiles.

Layout BSHD `[batch, seq, heads, head_size]` in token order, in and out; scores and sums in fp32 (fp64 for fp64
inputs). One custom op with a fake and an autograd formula wraps all implementations, which live in `impl/`.
"""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastvideo.block_sparse.eager import eager_function, function_of
from fastvideo.block_sparse.impl import AUTOMATIC, choose_implementation, load_implementation
from fastvideo.block_sparse.impl.reference import accumulation_dtype
from fastvideo.block_sparse.pattern import BlockPattern, TileLayout, reusable_pattern
from fastvideo.tangents import refuse_tangents


@overload
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: BlockPattern,
    *,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    impl: str | None = None,
) -> Tensor: ...


@overload
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: BlockPattern,
    *,
    scale: float | None = None,
    return_lse: Literal[True],
    impl: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: BlockPattern,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of each query tile over the key tiles that `pattern` lists for it.

    Query head `h` uses key and value head `h // (Hq // Hkv)`. Queries that see nothing get output 0, log-sum-exp -inf
    and zero gradients. Key tiles that a query tile does not list are not read for it. Under `torch.autocast` the inputs
    are cast as those of scaled dot product attention are.

    Args:
        query: `[B, S_q, Hq, D]`, floating point.
        key: `[B, S_k, Hkv, D]`, same dtype and device.
        value: `[B, S_k, Hkv, D]`, same dtype and device.
        pattern: Which tiles see which; its batch and head sizes are 1 or those of `query`.
        scale: Factor of the scores, any finite number; None means `1 / sqrt(D)`.
        return_lse: Also return the log-sum-exp of the scaled scores.
        impl: Name of an implementation (see `fastvideo.block_sparse.impl`); None picks the fastest that accepts.

    Returns:
        Output `[B, S_q, Hq, D]`, contiguous; with `return_lse` also `[B, S_q, Hq]`, natural log, fp32 (fp64 for fp64),
        differentiable.

    Raises:
        TypeError: For tensors that are not floating point, or something else in the place of a tensor or the pattern.
        ValueError: For shapes, dtypes, devices or a scale that do not fit, or an `impl` that nobody knows.
        NotImplementedError: When `impl` (or every implementation) can't run the call; lists all reasons. Also for tensors with
            a forward-mode tangent.

    Example:
        >>> layout = TileLayout.uniform(8, 4)
        >>> pattern = BlockPattern.from_mask(torch.eye(2, dtype=torch.bool), layout, layout)
        >>> q, k, v = torch.randn(3, 1, 8, 2, 16).unbind(0)
        >>> out = block_sparse_attention(q, k, v, pattern)
        >>> alone = block_sparse_attention(q, k, v.index_fill(1, torch.arange(4, 8), 0.0), pattern)
        >>> torch.equal(out[:, :4], alone[:, :4])
        True
    """
    check_types(query=query, key=key, value=value)
    if not isinstance(pattern, BlockPattern):
        raise TypeError(f"expected pattern as a BlockPattern, got {type(pattern).__name__}; see BlockPattern.from_mask")
    check_impl(impl)
    refuse_tangents(query=query, key=key, value=value)
    query, key, value = as_autocast(query, key, value)
    _check_tensors(query, key, value, pattern)
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    check_scale(scale)
    run = eager_function(_forward_op, _EagerAttention, (query, key, value))
    out, lse = run(query, key, value, *_flatten(pattern), scale, AUTOMATIC if impl is None else impl)
    return (out, lse) if return_lse else out


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast as `torch.autocast` casts the inputs of scaled dot product attention."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def check_types(**tensors: Any) -> None:
    """Raise TypeError for what stands in the place of a tensor."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"expected {name} as a tensor, got {type(x).__name__}")


def check_scale(scale: float) -> None:
    """Raise TypeError for a scale that is no number, and ValueError for one that isn't finite."""
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"expected scale as a number, got {scale!r}")
    # Not `math.isfinite`, which Dynamo can't trace for a symbolic scale.
    if not -math.inf < scale < math.inf:
        raise ValueError(f"expected a finite scale, got {scale=}")


def check_impl(impl: str | None) -> None:
    """Raise ValueError for the empty name, which custom ops take for no wish."""
    if impl == AUTOMATIC:
        raise ValueError("expected impl as None or the name of an implementation, got ''")


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4:
            raise ValueError(f"expected {name} [batch, seq, heads, head_size], got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"expected a floating-point {name}, got {x.dtype}")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"expected one dtype, got {query.dtype=}, {key.dtype=}, {value.dtype=}")
    if not query.device == key.device == value.device == pattern.indices.device:
        raise ValueError(f"expected one device, got {query.device=}, {key.device=}, {value.device=}, {pattern.indices.device=}")
    batch, num_queries, num_heads, head_size = query.shape
    if key.shape != value.shape or key.shape[0] != batch or key.shape[3] != head_size:
        raise ValueError(
            f"expected key and value [B={batch}, S_k, Hkv, D={head_size}] of one shape, "
            f"got {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if min(query.shape) < 1 or min(key.shape) < 1:
        raise ValueError(f"expected no empty dimension, got query {tuple(query.shape)} and key {tuple(key.shape)}")
    if num_heads % key.shape[2]:
        raise ValueError(f"expected query heads to be a multiple of key heads, got {num_heads} and {key.shape[2]}")
    tokens = (pattern.query_tiles.num_tokens, pattern.key_tiles.num_tokens)
    if tokens != (num_queries, key.shape[1]):
        raise ValueError(f"the pattern is for S_q, S_k = {tokens}, the tensors have {(num_queries, key.shape[1])}")
    if pattern.indices.shape[0] not in (1, batch) or pattern.indices.shape[1] not in (1, num_heads):
        raise ValueError(f"expected indices [1 or {batch}, 1 or {num_heads}, ...], got shape {tuple(pattern.indices.shape)}")


def _flatten_layout(layout: TileLayout) -> tuple[Tensor, int, int, bool, Tensor | None]:
    return layout.offsets, layout.num_tokens, layout.max_size, layout.is_uniform, layout.order


def _flatten(pattern: BlockPattern) -> tuple[Any, ...]:
    """The pattern as arguments of the custom ops, which take tensors and numbers only."""
    return (
        pattern.indices,
        pattern.counts,
        *_flatten_layout(pattern.query_tiles),
        *_flatten_layout(pattern.key_tiles),
    )


def _unflatten(indices: Tensor, counts: Tensor | None, *layouts: Any) -> BlockPattern:
    query_tiles, key_tiles = TileLayout(*layouts[:5]), TileLayout(*layouts[5:])
    reusable = reusable_pattern(indices, counts, query_tiles, key_tiles)
    return BlockPattern(query_tiles, key_tiles, indices, counts) if reusable is None else reusable


@torch.library.custom_op("fastvideo::block_sparse_attention", mutates_args=())
def _forward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    counts: Tensor | None,
    query_offsets: Tensor,
    num_queries: int,
    max_query_tile: int,
    is_query_uniform: bool,
    query_order: Tensor | None,
    key_offsets: Tensor,
    num_keys: int,
    max_key_tile: int,
    is_key_uniform: bool,
    key_order: Tensor | None,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    pattern = _unflatten(
        indices,
        counts,
        *(query_offsets, num_queries, max_query_tile, is_query_uniform, query_order),
        *(key_offsets, num_keys, max_key_tile, is_key_uniform, key_order),
    )
    name, _ = choose_implementation(query, key, value, pattern, impl or None)
    with torch.autocast(query.device.type, enabled=False):
        return load_implementation(name).forward(query, key, value, pattern, scale)


@_forward_op.register_fake
def _forward_fake(query: Tensor, *_rest: Any) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    return out, query.new_empty(query.shape[:3], dtype=accumulation_dtype(query.dtype))


@torch.library.custom_op("fastvideo::block_sparse_attention_backward", mutates_args=())
def _backward_op(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    indices: Tensor,
    counts: Tensor | None,
    query_offsets: Tensor,
    num_queries: int,
    max_query_tile: int,
    is_query_uniform: bool,
    query_order: Tensor | None,
    key_offsets: Tensor,
    num_keys: int,
    max_key_tile: int,
    is_key_uniform: bool,
    key_order: Tensor | None,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    pattern = _unflatten(
        indices,
        counts,
        *(query_offsets, num_queries, max_query_tile, is_query_uniform, query_order),
        *(key_offsets, num_keys, max_key_tile, is_key_uniform, key_order),
    )
    name, _ = choose_implementation(query, key, value, pattern, impl or None)
    with torch.autocast(query.device.type, enabled=False):
        return load_implementation(name).backward(dout, dlse, query, key, value, out, lse, pattern, scale)


@_backward_op.register_fake
def _backward_fake(
    _dout: Tensor, _dlse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *_rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
    return dq, dk, dv


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, *rest = inputs
    ctx.set_materialize_grads(False)
    ctx.rest = [None if isinstance(x, Tensor) else x for x in rest]
    ctx.slots = [i for i, x in enumerate(rest) if isinstance(x, Tensor)]
    ctx.save_for_backward(query, key, value, *output, *(rest[i] for i in ctx.slots))


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    query, key, value, out, lse, *tensors = ctx.saved_tensors
    rest = list(ctx.rest)
    for slot, x in zip(ctx.slots, tensors, strict=True):
        rest[slot] = x
    if dout is None and dlse is None:
        return (None,) * (3 + len(rest))
    dout = torch.zeros_like(out) if dout is None else dout
    return *_backward_op(dout, dlse, query, key, value, out, lse, *rest), *(None,) * len(rest)


_forward_op.register_autograd(_backward, setup_context=_setup_context)
_EagerAttention = function_of(_forward_op, _backward, _setup_context)
