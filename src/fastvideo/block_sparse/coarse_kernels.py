"""Triton kernels of the coarse part's means: of query, key and value in one launch, and their gradients in another.

Means are fp32; beside them stand those that coarse attention multiplies, in the dtype of the tokens, query's times the scale.

Names: `i_` indices, `o_` offsets, `m_` masks, `p_` pointers, `b_` values of a block, `s_` strides in elements.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (the types of kernel arguments are Triton's, not Python's)

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastvideo.block_sparse.pattern import TileLayout
from fastvideo.video.pooling_kernels import sum_of_tile

# A whole tile of 64 tokens at a time to sum up, so that all its loads are on their way at once.
_ROWS, _ROWS_BACK, _COLUMNS = 64, 16, 128


@triton.jit
def _store_mean(
    x,
    mean,
    low,
    order,
    offsets,
    s_b,
    s_s,
    s_h,
    factor,
    i_block,
    HEADS,
    NUM_TILES,
    HEAD_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The mean of one tile in some columns, where `mean` is given, and times `factor` in the dtype of `low`, where that is."""
    i_tile, i_b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    o_column = i_block * COLUMNS + tl.arange(0, COLUMNS)
    # The product with a constant tells the compiler that the mask is the same for neighbours: loads are 16 bytes wide.
    num_columns = HEADS * HEAD_SIZE
    m_column = o_column < num_columns
    i_start, i_end = tl.load(offsets + i_tile), tl.load(offsets + i_tile + 1)
    p_x = x + i_b * s_b + (o_column // HEAD_SIZE).to(tl.int64) * s_h + o_column % HEAD_SIZE
    b_sum = sum_of_tile(p_x, s_s, order, i_start, i_end, m_column, TILE, ROWS, COLUMNS)
    b_mean = tl.div_rn(b_sum, tl.zeros([COLUMNS], tl.float32) + (i_end - i_start).to(tl.float32))
    o_to = (i_b * NUM_TILES + i_tile) * num_columns + o_column
    if mean is not None:
        tl.store(mean + o_to, b_mean, mask=m_column)
    if low is not None:
        tl.store(low + o_to, (b_mean * factor).to(low.dtype.element_ty), mask=m_column)


@triton.jit(do_not_specialize=["NUM_TILES", "HEADS", "KV_HEADS"])
def tile_means_kernel(
    query,
    key,
    value,
    mean_query,
    mean_key,
    low_query,
    low_key,
    low_value,
    order,
    offsets,
    s_qb,
    s_qs,
    s_qh,
    s_kb,
    s_ks,
    s_kh,
    s_vb,
    s_vs,
    s_vh,
    scale,
    NUM_TILES,
    HEADS,
    KV_HEADS,
    HEAD_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """`[B, NUM_TILES, HEADS, D]` of `[B, S, H, D]`, some of the columns of one tile of one tensor a program."""
    i_block = tl.program_id(1)
    num_query, num_key = tl.cdiv(HEADS * HEAD_SIZE, COLUMNS), tl.cdiv(KV_HEADS * HEAD_SIZE, COLUMNS)
    if i_block < num_query:
        _store_mean(
            query, mean_query, low_query, order, offsets, s_qb, s_qs, s_qh, scale,
            i_block, HEADS, NUM_TILES, HEAD_SIZE, TILE, ROWS, COLUMNS,
        )  # fmt: skip
    elif i_block < num_query + num_key:
        _store_mean(
            key, mean_key, low_key, order, offsets, s_kb, s_ks, s_kh, 1.0,
            i_block - num_query, KV_HEADS, NUM_TILES, HEAD_SIZE, TILE, ROWS, COLUMNS,
        )  # fmt: skip
    elif value is not None:
        _store_mean(
            value, None, low_value, order, offsets, s_vb, s_vs, s_vh, 1.0,
            i_block - num_query - num_key, KV_HEADS, NUM_TILES, HEAD_SIZE, TILE, ROWS, COLUMNS,
        )  # fmt: skip


@triton.jit
def _spread_gradient(
    dmean,
    dx,
    order,
    offsets,
    s_b,
    factor,
    i_block,
    HEADS,
    NUM_TILES,
    HEAD_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Give each token of one tile its share of the gradient of `factor` times the mean."""
    i_tile, i_b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    o_column = i_block * COLUMNS + tl.arange(0, COLUMNS)
    num_columns = HEADS * HEAD_SIZE
    m_column = o_column < num_columns
    i_start, i_end = tl.load(offsets + i_tile), tl.load(offsets + i_tile + 1)
    b_dmean = tl.load(dmean + (i_b * NUM_TILES + i_tile) * num_columns + o_column, mask=m_column, other=0.0).to(tl.float32)
    b_share = tl.div_rn(b_dmean * factor, tl.zeros([COLUMNS], tl.float32) + (i_end - i_start).to(tl.float32))
    b_dx = tl.zeros([ROWS, COLUMNS], dx.dtype.element_ty) + b_share.to(dx.dtype.element_ty)[None, :]
    for i_first in range(0, TILE, ROWS):
        o_row = i_start + i_first + tl.arange(0, ROWS)
        m_row = o_row < i_end
        o_token = o_row if order is None else tl.load(order + o_row, mask=m_row, other=0)
        p_dx = dx + i_b * s_b + o_token.to(tl.int64)[:, None] * num_columns + o_column[None, :]
        tl.store(p_dx, b_dx, mask=m_row[:, None] & m_column[None, :])


@triton.jit(do_not_specialize=["NUM_TILES", "HEADS", "KV_HEADS"])
def tile_means_bwd_kernel(
    dlow_query,
    dlow_key,
    dlow_value,
    dquery,
    dkey,
    dvalue,
    order,
    offsets,
    s_qb,
    s_kb,
    scale,
    NUM_TILES,
    HEADS,
    KV_HEADS,
    HEAD_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Gradients of tokens from contiguous ones of the low means; `s_qb` and `s_kb` lead from one sample to the next."""
    i_block = tl.program_id(1)
    num_query, num_key = tl.cdiv(HEADS * HEAD_SIZE, COLUMNS), tl.cdiv(KV_HEADS * HEAD_SIZE, COLUMNS)
    if i_block < num_query:
        _spread_gradient(
            dlow_query, dquery, order, offsets, s_qb, scale,
            i_block, HEADS, NUM_TILES, HEAD_SIZE, TILE, ROWS, COLUMNS,
        )  # fmt: skip
    elif i_block < num_query + num_key:
        _spread_gradient(
            dlow_key, dkey, order, offsets, s_kb, 1.0,
            i_block - num_query, KV_HEADS, NUM_TILES, HEAD_SIZE, TILE, ROWS, COLUMNS,
        )  # fmt: skip
    else:
        _spread_gradient(
            dlow_value, dvalue, order, offsets, s_kb, 1.0,
            i_block - num_query - num_key, KV_HEADS, NUM_TILES, HEAD_SIZE, TILE, ROWS, COLUMNS,
        )  # fmt: skip


def _launch(kernel: Any, query: Tensor, key: Tensor, num_tensors: int, layout: TileLayout, rows: int, *arguments: Any) -> None:
    batch, _, num_heads, head_size = query.shape
    kv_heads = key.shape[2]
    query_blocks, key_blocks = -(-num_heads * head_size // _COLUMNS), -(-kv_heads * head_size // _COLUMNS)
    kernel[(layout.num_tiles, query_blocks + (num_tensors - 1) * key_blocks, batch)](
        *arguments,
        layout.num_tiles,
        num_heads,
        kv_heads,
        HEAD_SIZE=head_size,
        TILE=layout.max_size,
        ROWS=min(rows, 1 << (layout.max_size - 1).bit_length()),
        COLUMNS=_COLUMNS,
        num_warps=4,
    )


def launch_means(
    query: Tensor, key: Tensor, value: Tensor | None, means: Sequence[Tensor | None], layout: TileLayout, scale: float
) -> None:
    """Fill `means`: of query and key in fp32, then `query * scale`, key and value in their dtype, or None each without value.

    Inputs have a contiguous last dimension and at least the rows of `layout`; `means` are `[B, N, H, D]`, contiguous.
    """
    strides = (*query.stride()[:3], *key.stride()[:3], *(key if value is None else value).stride()[:3])
    num_tensors = 2 if value is None else 3
    tensors = (query, key, value, *means, layout.order, layout.offsets)
    _launch(tile_means_kernel, query, key, num_tensors, layout, _ROWS, *tensors, *strides, float(scale))


def launch_means_backward(dlow: Sequence[Tensor], grads: Sequence[Tensor], layout: TileLayout, scale: float) -> None:
    """Fill the rows of `layout` in `grads`, contiguous `[B, S + R, H, D]`, from contiguous `dlow`, `[B, N, H, D]` each."""
    strides = (grads[0].stride(0), grads[1].stride(0))
    tensors = (*dlow, *grads, layout.order, layout.offsets)
    _launch(tile_means_bwd_kernel, grads[0], grads[1], 3, layout, _ROWS_BACK, *tensors, *strides, float(scale))
