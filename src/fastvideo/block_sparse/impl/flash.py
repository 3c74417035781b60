"""Block-sparse attention by FlashAttention-4's CuTe kernels for tiles of exactly 128 tokens, on Hopper and Blackwell.

Package `flash-attn-4` from 4.0.0b36; its kernels are compiled at the first call. They take whole tiles as they are, so a tile
with fewer tokens than 128 is refused. Tokens are packed tile after tile, a copy each of query, key, value and output unless
they lie so already, and heads that are shared are repeated. The order of the sums of dquery is not fixed.

Shape legend: B batch, S tokens, H heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvideo.block_sparse.impl import Implementation
from fastvideo.block_sparse.impl.slots import (
    Slots,
    fold_scale,
    needs_cuda,
    package_rejections,
    repeat_heads,
    sum_groups,
    tile_rejections,
    tokens_that_see_nothing,
)
from fastvideo.block_sparse.pattern import BlockPattern, InvertedLists
from fastvideo.platforms.triton_support import runs_triton

PACKAGE = "flash-attn-4"
# The second compiles the first one's kernels.
_PACKAGES = ((PACKAGE, (4, 0, 0, 36)), ("nvidia-cutlass-dsl", (4, 6, 2)))
_TILE = 128
_DTYPES = (torch.bfloat16, torch.float16)
# Above it the kernels' own tiles are no longer 128 keys.
_MAX_HEAD_SIZE = 128


def rejections(query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern) -> tuple[str, ...]:  # noqa: ARG001
    """Every reason why the package can't run both passes; see `Implementation.rejections`."""
    reasons = [reason for package, least in _PACKAGES for reason in package_rejections(package, least, "flash")]
    reasons += needs_cuda(query, (9, 10, 11))
    if query.dtype not in _DTYPES:
        reasons.append(f"needs float16 or bfloat16, got {query.dtype}")
    if query.shape[3] > _MAX_HEAD_SIZE or query.shape[3] % 8:
        reasons.append(f"needs a head size that is a multiple of 8 up to {_MAX_HEAD_SIZE}, got {query.shape[3]}")
    return (*reasons, *tile_rejections(pattern, _TILE, exactly=True))


def _sparse_tensors(counts: Tensor, indices: Tensor) -> Any:
    """Lists as the package takes them: every listed tile is whole, none is partial."""
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    counts, indices = counts.contiguous(), indices.contiguous()
    return BlockSparseTensorsTorch(
        mask_block_cnt=torch.zeros_like(counts),
        mask_block_idx=torch.zeros_like(indices),
        full_block_cnt=counts,
        full_block_idx=indices,
        block_size=(_TILE, _TILE),
    )


def _forward_lists(pattern: BlockPattern) -> Any:
    counts = pattern.counts
    if counts is None:
        counts = torch.full_like(pattern.indices[..., 0], pattern.indices.shape[3])
    # Entries that don't count may hold anything.
    indices = pattern.indices.masked_fill(~pattern.is_listed(), 0) if pattern.counts is not None else pattern.indices
    return _sparse_tensors(counts, indices)


def _backward_lists(pattern: BlockPattern) -> Any:
    """For each key tile the query tiles that see it, ascending."""
    inverted = _invert(pattern)
    num_query_tiles = pattern.query_tiles.num_tiles
    first = inverted.offsets[..., :-1, None]
    places = first + torch.arange(num_query_tiles, dtype=torch.int32, device=first.device)
    # Entries behind a list are those of others, and not read.
    entries = places.clamp(max=inverted.query_tiles.shape[-1] - 1).flatten(-2).long()
    indices = inverted.query_tiles.gather(-1, entries).view_as(places)
    return _sparse_tensors(inverted.offsets.diff(dim=-1), indices)


def _invert(pattern: BlockPattern) -> InvertedLists:
    if not runs_triton(pattern.indices.device):
        return pattern.invert()
    from fastvideo.block_sparse.impl.triton.launch import inverted_lists

    return inverted_lists(pattern)


def _pack(
    query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern, scale: float
) -> tuple[tuple[Tensor, Tensor, Tensor], float, float, Slots, Slots]:
    query, scale, factor = fold_scale(query, scale)
    query_slots, key_slots = (Slots.of(layout, _TILE) for layout in (pattern.query_tiles, pattern.key_tiles))
    keys, values = (key_slots.pack(repeat_heads(x, query.shape[2])) for x in (key, value))
    return (query_slots.pack(query), keys, values), scale, factor, query_slots, key_slots


def forward(query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern, scale: float) -> tuple[Tensor, Tensor]:
    """See `Implementation.forward`."""
    from flash_attn.cute import interface

    packed, scale, _, query_slots, _ = _pack(query, key, value, pattern, scale)
    out, lse = interface._flash_attn_fwd(
        *packed, softmax_scale=scale, block_sparse_tensors=_forward_lists(pattern), return_lse=True
    )[:2]
    out, lse = query_slots.unpack(out), query_slots.unpack(lse.transpose(1, 2))
    empty = tokens_that_see_nothing(pattern)
    if empty is not None:
        out, lse = out.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, -torch.inf)
    return out, lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    pattern: BlockPattern,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `Implementation.backward`."""
    from flash_attn.cute import interface

    packed, scale, factor, query_slots, key_slots = _pack(query, key, value, pattern, scale)
    empty = tokens_that_see_nothing(pattern)
    if empty is not None:
        # No tile lists these queries, but infinities must not meet zeros.
        lse = lse.masked_fill(empty, 0.0)
        dlse = None if dlse is None else dlse.masked_fill(empty, 0.0)
    dq, dk, dv = interface._flash_attn_bwd(
        *packed,
        query_slots.pack(out),
        query_slots.pack(dout),
        query_slots.pack(lse).transpose(1, 2).contiguous(),
        softmax_scale=scale,
        block_sparse_tensors=_backward_lists(pattern),
        dlse=None if dlse is None else query_slots.pack(dlse).transpose(1, 2).contiguous(),
    )[:3]
    dq = query_slots.unpack(dq)
    if factor != 1.0:
        dq = dq * factor
    if empty is not None:
        dq = dq.masked_fill(empty[..., None], 0.0)
    dk, dv = (sum_groups(key_slots.unpack(x), key.shape[2]) for x in (dk, dv))
    return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype)


IMPLEMENTATION = Implementation(rejections, forward, backward)
