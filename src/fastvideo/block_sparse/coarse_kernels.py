"""Triton kernels of the coarse part's means: of query, key and value in one launch, and their gradients in another.

Means are fp32; beside them stand those that coarse attention multiplies, in the dtype of the tokens, query's times the scale.

Names: `i_` indices, `o_` offsets, `m_` masks, `p_` pointers, `b_` values of a block, `s_` strides in elements.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (the types of kernel arguments are Triton's, not Python's)

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastvideo.block_sparse.pattern import TileLayout
from fastvideo.video import TileGrid
from fastvideo.video.pooling_kernels import num_column_blocks, pool_arguments, pool_run

_ROWS, _COLUMNS = 16, 128


@triton.jit(do_not_specialize=["T", "Y", "X", "RUN", "HEADS", "KV_HEADS"])
def tile_means_kernel(
    query,
    key,
    value,
    mean_query,
    mean_key,
    low_query,
    low_key,
    low_value,
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
    T,
    Y,
    X,
    RUN,
    HEADS,
    KV_HEADS,
    HEAD_SIZE: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """`[B, N, HEADS, D]` of `[B, S, HEADS, D]`, some of the columns of a run of tiles of one tensor a program."""
    num_query, num_key = tl.cdiv(HEADS * HEAD_SIZE, COLUMNS), tl.cdiv(KV_HEADS * HEAD_SIZE, COLUMNS)
    num_blocks = num_query + (num_key if value is None else 2 * num_key)
    i_run, i_block = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    is_key, has_mean = i_block >= num_query, i_block < num_query + num_key
    # One loop for all three, whose buffers in shared memory would otherwise lie side by side.
    x, mean, low = query, mean_query, low_query
    if is_key:
        x, mean, low = key, mean_key, low_key
    s_b, s_s, s_h = tl.where(is_key, s_kb, s_qb), tl.where(is_key, s_ks, s_qs), tl.where(is_key, s_kh, s_qh)
    if value is not None:
        is_value = i_block >= num_query + num_key
        if is_value:
            x, low = value, low_value
        s_b, s_s, s_h = tl.where(is_value, s_vb, s_b), tl.where(is_value, s_vs, s_s), tl.where(is_value, s_vh, s_h)
        i_block -= tl.where(is_value, num_key, 0)
    i_block -= tl.where(is_key, num_query, 0)
    pool_run(
        x, None, mean, low, has_mean, tl.where(is_key, 1.0, scale), s_b, s_s, s_h, i_run, i_block, T, Y, X, RUN,
        tl.where(is_key, KV_HEADS, HEADS), HEAD_SIZE, TILE_T, TILE_Y, TILE_X, ROWS, COLUMNS, STAGES,
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


def launch_means(
    query: Tensor, key: Tensor, value: Tensor | None, means: Sequence[Tensor | None], grid: TileGrid, scale: float
) -> None:
    """Fill `means`: of query and key in fp32, then `query * scale`, key and value in their dtype, or None each without value.

    Inputs have a contiguous last dimension and begin with the tokens of `grid`; `means` are `[B, N, H, D]`, contiguous.
    """
    num_blocks = num_column_blocks(query) + (1 if value is None else 2) * num_column_blocks(key)
    num_runs, arguments = pool_arguments(grid, num_blocks * query.shape[0], query.itemsize)
    tile_means_kernel[(num_runs * num_blocks, query.shape[0])](
        query,
        key,
        value,
        *means,
        *query.stride()[:3],
        *key.stride()[:3],
        *(key if value is None else value).stride()[:3],
        float(scale),
        HEADS=query.shape[2],
        KV_HEADS=key.shape[2],
        HEAD_SIZE=query.shape[3],
        **arguments,
    )


def launch_means_backward(dlow: Sequence[Tensor], grads: Sequence[Tensor], layout: TileLayout, scale: float) -> None:
    """Fill the rows of `layout` in `grads`, contiguous `[B, S + R, H, D]`, from contiguous `dlow`, `[B, N, H, D]` each."""
    query, key = grads[:2]
    query_blocks, key_blocks = (-(-x.shape[2] * x.shape[3] // _COLUMNS) for x in (query, key))
    tile_means_bwd_kernel[(layout.num_tiles, query_blocks + 2 * key_blocks, query.shape[0])](
        *dlow,
        *grads,
        layout.order,
        layout.offsets,
        query.stride(0),
        key.stride(0),
        float(scale),
        NUM_TILES=layout.num_tiles,
        HEADS=query.shape[2],
        KV_HEADS=key.shape[2],
        HEAD_SIZE=query.shape[3],
        TILE=layout.max_size,
        ROWS=min(_ROWS, 1 << (layout.max_size - 1).bit_length()),
        COLUMNS=_COLUMNS,
        num_warps=4,
    )
