"""Block-sparse attention by torch's FlexAttention, for tiles of at most 128 tokens and head sizes from 16.

On CUDA the compiled kernels run; torch compiles them at the first call of a shape, for a minute or so. On a CPU FlexAttention
is not compiled and holds all scores, and it has no backward there. Tokens are packed into slots of 64 or 128, a copy each of
query, key, value and output unless they lie so already. Whole tiles are computed as they are, smaller ones with a mask.

Torch has no FlexAttention backward that can be called by itself, so the backward here runs the forward again and
differentiates it.

Shape legend: B batch, S tokens, H heads, D head size, N tiles.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastvideo.block_sparse.impl import Implementation
from fastvideo.block_sparse.impl.slots import Slots, fold_scale, repeat_heads, sum_groups, tokens_that_see_nothing
from fastvideo.block_sparse.pattern import BlockPattern, TileLayout

_SLOTS = (64, 128)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MIN_HEAD_SIZE, _MAX_HEAD_SIZE = 16, 256
# Shapes that one process may meet; each is compiled once.
_MAX_SHAPES = 256


def rejections(query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern) -> tuple[str, ...]:
    """Every reason why FlexAttention can't run; see `Implementation.rejections`."""
    reasons = []
    device, head_size = query.device.type, query.shape[3]
    if device not in ("cpu", "cuda"):
        reasons.append(f"needs tensors on cuda or cpu, got {query.device}")
    needs_grad = query.requires_grad or key.requires_grad or value.requires_grad
    if device == "cpu" and needs_grad:
        reasons.append("FlexAttention has no backward on a CPU; detach the inputs, or use impl='portable'")
    if query.dtype not in _DTYPES:
        reasons.append(f"needs float16, bfloat16 or float32, got {query.dtype}")
    if device == "cuda" and (head_size & (head_size - 1) or not _MIN_HEAD_SIZE <= head_size <= _MAX_HEAD_SIZE):
        reasons.append(f"needs a head size that is a power of two from {_MIN_HEAD_SIZE} to {_MAX_HEAD_SIZE}, got {head_size}")
    for name, layout in (("query", pattern.query_tiles), ("key", pattern.key_tiles)):
        if layout.max_size > _SLOTS[-1]:
            reasons.append(f"needs {name} tiles of at most {_SLOTS[-1]} tokens, got {layout.max_size}")
        elif device == "cuda" and needs_grad and _slot(layout) % (rows := _backward_block(query)):
            least = rows // 2 + 1
            reasons.append(f"its backward here needs {name} tiles of {least} to {rows} tokens, got {layout.max_size}")
    return tuple(reasons)


def _backward_block(query: Tensor) -> int:
    """Tokens that a tile's slot has to be a multiple of in the backward kernel that torch picks for a GPU.

    Whatever block sizes are asked for, torch first drops the kernels whose own defaults don't divide the slots. In 16 bit that
    default is 128 for some head sizes of each generation, and nothing is left there for slots of 64.
    """
    head_size, generation = query.shape[3], torch.cuda.get_device_capability(query.device)[0]
    is_wide = {9: 64 <= head_size <= 128, 10: head_size <= 128}.get(generation, head_size < 64)
    return 128 if is_wide and query.dtype != torch.float32 else 64


def _slot(layout: TileLayout) -> int:
    return next(size for size in _SLOTS if layout.max_size <= size)


@functools.cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # A whole graph or an error: past its limit of shapes torch would go on without a compiler, and then FlexAttention looks at
    # no list.
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    @functools.wraps(flex_attention)
    def with_room_for_shapes(*args: Any, **options: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=_MAX_SHAPES, accumulated_recompile_limit=_MAX_SHAPES):
            return compiled(*args, **options)

    return with_room_for_shapes


def _flex(device: torch.device) -> Callable[..., Any]:
    """FlexAttention, compiled where it has kernels."""
    if device.type == "cuda":
        return _compiled()
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


def _block_mask(pattern: BlockPattern, batch: int, num_heads: int, device: torch.device) -> Any:
    """The lists as FlexAttention takes them: whole key tiles in one, smaller ones in another that applies a mask."""
    from torch.nn.attention.flex_attention import BlockMask

    query_slot, key_slot = _slot(pattern.query_tiles), _slot(pattern.key_tiles)
    sizes = pattern.key_tiles.sizes
    listed = pattern.is_listed().expand(batch, num_heads, -1, -1)
    indices = pattern.indices.expand(batch, num_heads, -1, -1).masked_fill(~listed, 0)
    is_whole = listed & (sizes == key_slot)[indices.long()]

    def sorted_lists(member: Tensor) -> tuple[Tensor, Tensor]:
        order = (~member).to(torch.uint8).argsort(dim=-1, stable=True)
        # The package wants lists as wide as there are key tiles.
        lists = torch.zeros(*member.shape[:3], pattern.key_tiles.num_tiles, dtype=torch.int32, device=member.device)
        lists[..., : member.shape[3]] = indices.gather(-1, order)
        return member.sum(-1, dtype=torch.int32), lists

    def is_token(_b: Tensor, _h: Tensor, _q: Tensor, kv: Tensor) -> Tensor:
        return kv % key_slot < sizes[kv // key_slot]

    def is_seen(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        # Uncompiled, FlexAttention looks at no list.
        return sees[b, h, q // query_slot, kv // key_slot] & is_token(b, h, q, kv)

    sees = pattern.tile_mask().expand(batch, num_heads, -1, -1) if device.type == "cpu" else is_whole
    num_partial, partial_lists = sorted_lists(listed & ~is_whole)
    num_whole, whole_lists = sorted_lists(is_whole)
    lengths = [layout.num_tiles * _slot(layout) for layout in (pattern.query_tiles, pattern.key_tiles)]
    return BlockMask.from_kv_blocks(
        num_partial,
        partial_lists,
        num_whole,
        whole_lists,
        BLOCK_SIZE=(query_slot, key_slot),
        mask_mod=is_seen if device.type == "cpu" else is_token,
        seq_lengths=(lengths[0], lengths[1]),
    )


def _run(packed: list[Tensor], mask: Any, pattern: BlockPattern, scale: float) -> tuple[Tensor, Tensor]:
    """Output `[B, Hq, rows, D]` and log-sum-exp `[B, Hq, rows]` of packed tensors `[B, rows, H, D]`."""
    from torch.nn.attention.flex_attention import AuxRequest

    query, key, value = (x.transpose(1, 2) for x in packed)
    options = None
    if query.device.type == "cuda":
        # Blocks of the kernels have to divide the tiles.
        rows, columns = _slot(pattern.query_tiles), _slot(pattern.key_tiles)
        largest = 64 if query.dtype != torch.float32 else 32
        rows, columns = min(rows, largest), min(columns, largest)
        options = {"BLOCK_M": rows, "BLOCK_N": columns}
        options |= {"BLOCK_M1": rows, "BLOCK_N1": columns, "BLOCK_M2": rows, "BLOCK_N2": columns}
    out, aux = _flex(query.device)(
        query,
        key,
        value,
        block_mask=mask,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options=options,
        return_aux=AuxRequest(lse=True),
    )
    return out, aux.lse


def forward(query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern, scale: float) -> tuple[Tensor, Tensor]:
    """See `Implementation.forward`."""
    query_slots, key_slots = (Slots.of(x, _slot(x)) for x in (pattern.query_tiles, pattern.key_tiles))
    mask = _block_mask(pattern, query.shape[0], query.shape[2], query.device)
    folded, scale, _ = fold_scale(query.detach(), scale)
    packed = [query_slots.pack(folded), key_slots.pack(key.detach()), key_slots.pack(value.detach())]
    out, lse = _run(packed, mask, pattern, scale)
    out, lse = (query_slots.unpack(x.transpose(1, 2)) for x in (out, lse))
    empty = tokens_that_see_nothing(pattern)
    if empty is not None:
        out, lse = out.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, -torch.inf)
    return out.contiguous(), lse.contiguous()


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,  # noqa: ARG001  # computed anew
    lse: Tensor,
    pattern: BlockPattern,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `Implementation.backward`."""
    query_slots, key_slots = (Slots.of(x, _slot(x)) for x in (pattern.query_tiles, pattern.key_tiles))
    mask = _block_mask(pattern, query.shape[0], query.shape[2], query.device)
    folded, scale, factor = fold_scale(query.detach(), scale)
    keys, values = (key_slots.pack(repeat_heads(x.detach(), query.shape[2])) for x in (key, value))
    dlse = None if dlse is None else dlse.masked_fill(lse == -torch.inf, 0.0)
    with _recording():
        packed = [x.requires_grad_() for x in (query_slots.pack(folded), keys, values)]
        results = _run(packed, mask, pattern, scale)
        cotangents = [query_slots.pack(x).transpose(1, 2) for x in (dout, dlse) if x is not None]
        dq, dk, dv = torch.autograd.grad(results[: len(cotangents)], packed, cotangents)
    dq = query_slots.unpack(dq) * factor
    empty = tokens_that_see_nothing(pattern)
    if empty is not None:
        dq = dq.masked_fill(empty[..., None], 0.0)
    dk, dv = (sum_groups(key_slots.unpack(x), key.shape[2]) for x in (dk, dv))
    return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype)


@contextlib.contextmanager
def _recording() -> Any:
    """Let autograd record, which a custom op's body keeps it from."""
    below = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with torch.enable_grad(), below:
        yield


IMPLEMENTATION = Implementation(rejections, forward, backward)
