"""Launches of the Triton kernels: block sizes, strides and the constants that a kernel is compiled for."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from fastvideo.block_sparse.impl import GatedTiles
from fastvideo.block_sparse.impl.triton import kernels
from fastvideo.block_sparse.pattern import BlockPattern, InvertedLists, TileLayout

_LOG2E = math.log2(math.e)
# Above this the lists are inverted by sorting.
_MAX_MARK_BYTES = 1 << 30


@dataclass(frozen=True)
class Blocks:
    """What one program works on: `m` query rows, `n` key rows; and how it is compiled."""

    m: int
    n: int
    num_warps: int
    num_stages: int


BlockTable = dict[str, tuple[tuple[int, Blocks], ...]]
# Per kernel: the head size up to which a row holds, and its blocks. The second table is for programs that own more than
# 64 rows of a tile. All 16-bit rows up to head size 128 compile without spills for sm_90.
BLOCKS_16_BIT: BlockTable = {
    "fwd": ((64, Blocks(64, 64, 4, 3)), (128, Blocks(64, 64, 4, 3)), (256, Blocks(64, 32, 4, 2))),
    "dq": ((64, Blocks(64, 64, 4, 3)), (128, Blocks(64, 64, 4, 2)), (256, Blocks(64, 32, 8, 2))),
    "dkdv": ((64, Blocks(64, 64, 4, 3)), (128, Blocks(32, 64, 4, 3)), (256, Blocks(32, 64, 8, 2))),
}
BLOCKS_16_BIT_LARGE: BlockTable = {
    "fwd": ((128, Blocks(128, 64, 8, 3)), (256, Blocks(64, 32, 4, 2))),
    "dq": ((64, Blocks(128, 64, 8, 3)), (128, Blocks(128, 64, 8, 2)), (256, Blocks(64, 32, 8, 2))),
    "dkdv": ((64, Blocks(64, 128, 8, 3)), (128, Blocks(32, 128, 8, 3)), (256, Blocks(32, 64, 8, 2))),
}
BLOCKS_32_BIT: BlockTable = {
    kernel: ((64, Blocks(32, 32, 4, 2)), (128, Blocks(16, 32, 4, 1)), (256, Blocks(16, 16, 4, 1)))
    for kernel in ("fwd", "dq", "dkdv")
}


def is_interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, which also takes CPU tensors."""
    return isinstance(kernels.block_sparse_fwd_kernel, InterpretedFunction)


def choose_blocks(kernel: str, head_size: int, dtype: torch.dtype, max_query_tile: int, max_key_tile: int) -> Blocks:
    """Blocks of a kernel (`"fwd"`, `"dq"` or `"dkdv"`) from a fixed table, so that sums keep their order.

    The side that a program owns shrinks to its tiles; the side that it walks packs several small tiles.
    """
    owned = max_key_tile if kernel == "dkdv" else max_query_tile
    table_16_bit = BLOCKS_16_BIT_LARGE if owned > 64 else BLOCKS_16_BIT
    table = BLOCKS_32_BIT if dtype == torch.float32 else table_16_bit
    blocks = next(row for limit, row in table[kernel] if head_size <= limit)
    if kernel == "dkdv":
        return Blocks(blocks.m, _shrunk(blocks.n, owned), blocks.num_warps, blocks.num_stages)
    return Blocks(_shrunk(blocks.m, owned), blocks.n, blocks.num_warps, blocks.num_stages)


def _next_power_of_2(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _shrunk(block: int, tile_size: int) -> int:
    return max(16, min(block, _next_power_of_2(tile_size)))


def _walked(layout: TileLayout, block: int) -> tuple[int, bool]:
    """Rows of a slot on the walked side, and whether a step can hold rows that aren't real."""
    return min(block, _next_power_of_2(layout.max_size)), not layout.is_uniform or layout.max_size % block != 0


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _list_strides(x: Tensor) -> tuple[int, int]:
    """Strides of batch and head of a contiguous tensor, 0 where all share one."""
    return x.stride(0) if x.shape[0] > 1 else 0, x.stride(1) if x.shape[1] > 1 else 0


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _padded_head_size(head_size: int) -> int:
    return max(16, _next_power_of_2(head_size))


def _walk_keys(query: Tensor, key: Tensor, pattern: BlockPattern, blocks: Blocks) -> tuple[int, dict[str, Any]]:
    """Number of programs and the arguments that the kernels share which own queries and walk keys."""
    query_tiles, key_tiles = pattern.query_tiles, pattern.key_tiles
    slot, is_masked = _walked(key_tiles, blocks.n)
    indices = pattern.indices.contiguous()
    s_ib, s_ih = _list_strides(indices)
    arguments = {
        "indices": indices,
        "counts": None if pattern.counts is None else pattern.counts.contiguous(),
        "q_offsets": query_tiles.offsets,
        "k_offsets": key_tiles.offsets,
        "q_order": query_tiles.order,
        "k_order": key_tiles.order,
        "s_ib": s_ib,
        "s_ih": s_ih,
        "WIDTH": indices.shape[3],
        "NUM_Q_TILES": query_tiles.num_tiles,
        "NUM_QUERIES": query.shape[1],
        "HEADS": query.shape[2],
        "GROUP": query.shape[2] // key.shape[2],
        "HEAD_SIZE": query.shape[3],
        "D": _padded_head_size(query.shape[3]),
        "Q_TILE": query_tiles.max_size,
        "Q_UNIFORM": query_tiles.is_uniform,
        "K_TILE": key_tiles.max_size,
        "K_SLOT": slot,
        "K_UNIFORM": key_tiles.is_uniform,
        "K_MASKED": is_masked,
        "M": blocks.m,
        "N": blocks.n,
        "PRECISION": "ieee",
        "enable_fp_fusion": True,
        "num_warps": blocks.num_warps,
        "num_stages": blocks.num_stages,
    }
    num_blocks = query_tiles.num_tiles * -(-query_tiles.max_size // blocks.m)
    return num_blocks * query.shape[0] * query.shape[2], arguments


def _strides(**tensors: Tensor) -> dict[str, int]:
    return {f"s_{name}{dim}": x.stride(i) for name, x in tensors.items() for i, dim in enumerate("bsh")}


def forward(query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern, scale: float) -> tuple[Tensor, Tensor]:
    """See `Implementation.forward`."""
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    forward_into(query, key, value, pattern, scale, out, lse, None)
    return out, lse


def forward_into(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: BlockPattern,
    scale: float,
    out: Tensor,
    lse: Tensor,
    added: GatedTiles | None,
) -> None:
    """See `Implementation.forward_into`."""
    query, key, value = _rows_contiguous(query), _rows_contiguous(key), _rows_contiguous(value)
    gated: dict[str, Any] = {"gate": None, "coarse": None, "s_gb": 0, "s_gs": 0, "s_gh": 0}
    if added is not None:
        gate = _rows_contiguous(added.gate)
        gated = {"gate": gate, "coarse": added.coarse.contiguous(), **_strides(g=gate)}
    sizes = pattern.query_tiles.max_size, pattern.key_tiles.max_size
    blocks = choose_blocks("fwd", query.shape[3], query.dtype, *sizes)
    num_programs, walk = _walk_keys(query, key, pattern, blocks)
    del walk["NUM_QUERIES"]
    with _on(query.device):
        kernels.block_sparse_fwd_kernel[(num_programs,)](
            query=query,
            key=key,
            value=value,
            out=out,
            lse=lse,
            scale_log2=scale * _LOG2E,
            SCALE_IS_POSITIVE=scale > 0,
            NUM_ROWS=out.stride(0) // out.shape[2:].numel(),
            **_strides(q=query, k=key, v=value),
            **gated,
            **walk,
        )


def _row_sums(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, layout: TileLayout) -> tuple[Tensor, Tensor]:
    """Base-2 log-sum-exp and delta, `[B, Hq, S_q]` by packed row; see the kernel."""
    batch, num_queries, num_heads, head_size = out.shape
    lse_log2 = lse.new_empty(batch, num_heads, num_queries)
    delta = torch.empty_like(lse_log2)
    block = 64
    kernels.block_sparse_bwd_rows_kernel[(-(-num_queries // block) * batch * num_heads,)](
        out=out,
        dout=dout,
        lse=lse,
        dlse=dlse,
        q_order=layout.order,
        lse_log2=lse_log2,
        delta=delta,
        **_strides(d=dout, l=lse if dlse is None else dlse),
        NUM_QUERIES=num_queries,
        HEADS=num_heads,
        HEAD_SIZE=head_size,
        D=_padded_head_size(head_size),
        M=block,
        num_warps=4,
    )
    return lse_log2, delta


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
    query, key, value, dout = (_rows_contiguous(x) for x in (query, key, value, dout))
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
    with _on(query.device):
        lse_log2, delta = _row_sums(dout, dlse, out.contiguous(), lse.contiguous(), pattern.query_tiles)
        shared = {
            "query": query,
            "key": key,
            "value": value,
            "dout": dout,
            "lse_log2": lse_log2,
            "delta": delta,
            # Next to 16-bit rounding the error of the log-sum-exp is nothing.
            "correction": torch.empty_like(delta) if query.dtype == torch.float32 else None,
            "scale": scale,
            "scale_log2": scale * _LOG2E,
            **_strides(q=query, k=key, v=value, d=dout),
        }
        sizes = pattern.query_tiles.max_size, pattern.key_tiles.max_size
        blocks = choose_blocks("dq", query.shape[3], query.dtype, *sizes)
        num_programs, walk = _walk_keys(query, key, pattern, blocks)
        kernels.block_sparse_bwd_dq_kernel[(num_programs,)](dquery=dq, **shared, **walk)
        # Reads the correction that the kernel above writes.
        _launch_dkdv(shared, dk, dv, pattern)
    return dq, dk, dv


def inverted_lists(pattern: BlockPattern) -> InvertedLists:
    """The same lists as `pattern.invert()`, by marking a byte per pair of tiles instead of sorting; no host waits."""
    batch, heads, num_query_tiles, width = pattern.indices.shape
    num_key_tiles = pattern.key_tiles.num_tiles
    if batch * heads * num_query_tiles * num_key_tiles > _MAX_MARK_BYTES:
        return pattern.invert()
    indices = pattern.indices.contiguous()
    marks = indices.new_zeros(batch, heads, num_key_tiles, num_query_tiles, dtype=torch.uint8)
    offsets = indices.new_zeros(batch, heads, num_key_tiles + 1)
    lists = indices.new_empty(batch, heads, num_query_tiles * width)
    sizes = {"WIDTH": width, "NUM_Q_TILES": num_query_tiles, "NUM_K_TILES": num_key_tiles, "num_warps": 4}
    with _on(indices.device):
        kernels.block_sparse_mark_kernel[(batch * heads * num_query_tiles,)](
            indices=indices,
            counts=None if pattern.counts is None else pattern.counts.contiguous(),
            marks=marks,
            BLOCK=128,
            **sizes,
        )
        offsets[..., 1:] = marks.sum(-1, dtype=torch.int32).cumsum(-1, dtype=torch.int32)
        kernels.block_sparse_compress_kernel[(batch * heads * num_key_tiles,)](
            marks=marks, offsets=offsets, lists=lists, BLOCK=1024 if num_query_tiles > 128 else 128, **sizes
        )
    return InvertedLists(offsets, lists)


def heavy_first(offsets: Tensor, kv_heads: int) -> Tensor:
    """Key tiles of each key head, those that the most query tiles list first, equal ones ascending; no host waits.

    A program that starts last with the longest list keeps the others waiting.

    Args:
        offsets: Of inverted lists, `[B|1, H|1, Nk + 1]` int32.
        kv_heads: Key heads, of which each serves `H // kv_heads` of the lists.

    Returns:
        `[B|1, kv_heads|1, Nk]` int32.
    """
    lengths = offsets.diff(dim=-1)
    if lengths.shape[1] > kv_heads:
        lengths = lengths.view(lengths.shape[0], kv_heads, -1, lengths.shape[2]).sum(2)
    return lengths.argsort(dim=-1, descending=True, stable=True).to(torch.int32)


def _launch_dkdv(shared: dict[str, Any], dk: Tensor, dv: Tensor, pattern: BlockPattern) -> None:
    """Write the gradients of keys and values."""
    query_tiles, key_tiles = pattern.query_tiles, pattern.key_tiles
    batch, num_keys, kv_heads, head_size = dk.shape
    blocks = choose_blocks("dkdv", head_size, dk.dtype, query_tiles.max_size, key_tiles.max_size)
    slot, is_masked = _walked(query_tiles, blocks.m)
    inverted = inverted_lists(pattern)
    s_ob, s_oh = _list_strides(inverted.offsets)
    s_ib, s_ih = _list_strides(inverted.query_tiles)
    tile_order = heavy_first(inverted.offsets, kv_heads)
    s_tb, s_th = _list_strides(tile_order)
    num_blocks = key_tiles.num_tiles * -(-key_tiles.max_size // blocks.n)
    kernels.block_sparse_bwd_dkdv_kernel[(num_blocks * batch * kv_heads,)](
        **shared,
        dkey=dk,
        dvalue=dv,
        list_offsets=inverted.offsets,
        lists=inverted.query_tiles,
        tile_order=tile_order,
        q_offsets=query_tiles.offsets,
        k_offsets=key_tiles.offsets,
        q_order=query_tiles.order,
        k_order=key_tiles.order,
        s_ob=s_ob,
        s_oh=s_oh,
        s_ib=s_ib,
        s_ih=s_ih,
        s_tb=s_tb,
        s_th=s_th,
        NUM_K_TILES=key_tiles.num_tiles,
        NUM_QUERIES=query_tiles.num_tokens,
        NUM_KEYS=num_keys,
        KV_HEADS=kv_heads,
        GROUP=shared["query"].shape[2] // kv_heads,
        HEAD_SIZE=head_size,
        D=_padded_head_size(head_size),
        Q_TILE=query_tiles.max_size,
        Q_SLOT=slot,
        Q_UNIFORM=query_tiles.is_uniform,
        K_TILE=key_tiles.max_size,
        K_UNIFORM=key_tiles.is_uniform,
        M=blocks.m,
        N=blocks.n,
        Q_MASKED=is_masked,
        PRECISION="ieee",
        enable_fp_fusion=True,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )
