"""Triton kernels of the coarse part's means: of query, key and value in one launch, and their gradients in another.

Means are fp32; beside them stand those that coarse attention multiplies, in the dtype of the tokens, query's times the scale.

Names: `i_` indices, `o_` offsets, `m_` masks, `p_` pointers, `b_` values of a block, `s_` strides in elements.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (the types of kernel arguments are Triton's, not Python's)

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvideo.platforms.triton_launch import PreparedKernel
from fastvideo.video import TileGrid
from fastvideo.video.pooling_kernels import num_column_blocks, pool_arguments, pool_run, quotient

# Launches of so many shapes are kept.
_NUM_PREPARED = 64
_MEANS = ("query", "key", "value", "mean_query", "mean_key", "low_query", "low_key", "low_value")


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


@triton.jit(do_not_specialize=["T", "Y", "X", "RUN", "HEADS", "KV_HEADS"])
def tile_means_bwd_kernel(
    dlow_query,
    dlow_key,
    dlow_value,
    dquery,
    dkey,
    dvalue,
    s_qb,
    s_kb,
    scale,
    T,
    Y,
    X,
    RUN,
    HEADS,
    KV_HEADS,
    IS_SUM: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of tokens from contiguous ones of the low means, added to what is there if `IS_SUM`.

    `s_qb` and `s_kb` lead from one sample of the tokens' gradients, whose rows are contiguous, to the next.
    """
    num_query, num_key = tl.cdiv(HEADS * HEAD_SIZE, COLUMNS), tl.cdiv(KV_HEADS * HEAD_SIZE, COLUMNS)
    num_blocks = num_query + 2 * num_key
    i_run, i_block = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    is_key, is_value = i_block >= num_query, i_block >= num_query + num_key
    dlow, dx = dlow_query, dquery
    if is_key:
        dlow, dx = dlow_key, dkey
    if is_value:
        dlow, dx = dlow_value, dvalue
    i_block -= tl.where(is_key, num_query, 0) + tl.where(is_value, num_key, 0)
    factor = tl.where(is_key, 1.0, scale)
    i_b = tl.program_id(1).to(tl.int64)
    num_y, num_x = tl.cdiv(Y, TILE_Y), tl.cdiv(X, TILE_X)
    num_runs = tl.cdiv(num_x, RUN)
    i_ty, i_first = i_run // num_runs, i_run % num_runs * RUN
    i_t, i_y = i_ty // num_y * TILE_T, i_ty % num_y * TILE_Y
    o_column = i_block * COLUMNS + tl.arange(0, COLUMNS)
    # The product with a constant tells the compiler that the mask is the same for neighbours: loads are 16 bytes wide.
    num_columns = tl.where(is_key, KV_HEADS, HEADS) * HEAD_SIZE
    m_column = o_column < num_columns
    p_dx = dx + i_b * tl.where(is_key, s_kb, s_qb) + o_column
    p_dx += ((i_t * Y + i_y).to(tl.int64) * X + i_first * TILE_X) * num_columns
    p_dlow = dlow + (i_b * tl.cdiv(T, TILE_T) * num_y + i_ty) * num_x * num_columns + o_column
    num_rows = tl.minimum(TILE_T, T - i_t) * tl.minimum(TILE_Y, Y - i_y)
    for i_x in tl.range(i_first, tl.minimum(i_first + RUN, num_x), num_stages=STAGES):
        b_dlow = tl.load(p_dlow + i_x * num_columns, mask=m_column, other=0.0).to(tl.float32)
        num_tokens = num_rows * tl.minimum(TILE_X, X - i_x * TILE_X)
        b_share = quotient(b_dlow * factor, num_tokens.to(tl.float32))
        for i_row in tl.static_range(0, TILE_T * TILE_Y * TILE_X, ROWS):
            o_row = i_row + tl.arange(0, ROWS)
            o_t, o_y, o_x = o_row // (TILE_Y * TILE_X), o_row // TILE_X % TILE_Y, o_row % TILE_X
            m_row = (o_t < tl.minimum(TILE_T, T - i_t)) & (o_y < Y - i_y) & (o_x < X - i_x * TILE_X)
            p_row = p_dx[None, :] + (((o_t * Y + o_y) * X + o_x).to(tl.int64) * num_columns)[:, None]
            m_block = m_row[:, None] if HEAD_SIZE % COLUMNS == 0 else m_row[:, None] & m_column[None, :]
            b_dx = tl.zeros([ROWS, COLUMNS], tl.float32) + b_share[None, :]
            if IS_SUM:
                b_dx = tl.load(p_row, mask=m_block, other=0.0).to(tl.float32) + b_share[None, :]
            tl.store(p_row, b_dx.to(dx.dtype.element_ty), mask=m_block)
        p_dx += TILE_X * num_columns


def launch_means(
    query: Tensor, key: Tensor, value: Tensor | None, means: Sequence[Tensor | None], grid: TileGrid, scale: float
) -> None:
    """Fill `means`: of query and key in fp32, then `query * scale`, key and value in their dtype, or None each without value.

    Inputs have a contiguous last dimension and begin with the tokens of `grid`; `means` are `[B, N, H, D]`, contiguous.
    """
    shapes, strides = (query.shape, key.shape), (query.stride(), key.stride(), (key if value is None else value).stride())
    kernel = _prepared_means(grid, shapes, strides, value is not None, query.itemsize, float(scale))
    kernel(query, key, value, *means)


@functools.lru_cache(_NUM_PREPARED)
def _prepared_means(
    grid: TileGrid,
    shapes: tuple[torch.Size, torch.Size],
    strides: tuple[tuple[int, ...], ...],
    has_value: bool,
    itemsize: int,
    scale: float,
) -> PreparedKernel:
    query, key = shapes
    num_blocks = num_column_blocks(query) + (2 if has_value else 1) * num_column_blocks(key)
    num_runs, arguments = pool_arguments(grid, num_blocks * query[0], itemsize)
    for name, (s_b, s_s, s_h, _) in zip("qkv", strides, strict=True):
        arguments |= {f"s_{name}b": s_b, f"s_{name}s": s_s, f"s_{name}h": s_h}
    numbers = {"scale": scale, "HEADS": query[2], "KV_HEADS": key[2], "HEAD_SIZE": query[3]}
    return PreparedKernel(tile_means_kernel, (num_runs * num_blocks, query[0]), _MEANS, arguments | numbers)


def launch_means_backward(
    dlow: Sequence[Tensor], grads: Sequence[Tensor], grid: TileGrid, scale: float, *, is_sum: bool
) -> None:
    """Fill the tokens of `grid` in `grads` from `dlow`, `[B, N, H, D]`, or add to them; all are contiguous."""
    query, key = grads[:2]
    num_blocks = num_column_blocks(query.shape) + 2 * num_column_blocks(key.shape)
    num_runs, arguments = pool_arguments(grid, num_blocks * query.shape[0], query.itemsize)
    tile_means_bwd_kernel[(num_runs * num_blocks, query.shape[0])](
        *dlow,
        *grads,
        query.stride(0),
        key.stride(0),
        float(scale),
        HEADS=query.shape[2],
        KV_HEADS=key.shape[2],
        IS_SUM=is_sum,
        HEAD_SIZE=query.shape[3],
        **arguments,
    )
