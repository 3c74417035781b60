"""Triton kernel of tile sums: one pass over the tokens, which stay where they are.

Names: `i_` indices, `o_` offsets, `m_` masks, `p_` pointers, `b_` values of a block, `s_` strides in elements.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (the types of kernel arguments are Triton's, not Python's)

import triton
import triton.language as tl
from torch import Tensor

# A whole tile of 64 tokens at a time, so that all its loads are on their way at once.
_ROWS, _COLUMNS = 64, 128


@triton.jit
def sum_of_tile(p_x, s_xs, order, i_start, i_end, m_column, TILE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """fp32 sum of the packed rows from `i_start` to `i_end`, in COLUMNS columns that begin at `p_x`."""
    b_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i_first in tl.static_range(0, TILE, ROWS):
        o_row = i_start + i_first + tl.arange(0, ROWS)
        m_row = o_row < i_end
        o_token = o_row if order is None else tl.load(order + o_row, mask=m_row, other=0)
        p_row = p_x[None, :] + o_token.to(tl.int64)[:, None] * s_xs
        b_sum += tl.load(p_row, mask=m_row[:, None] & m_column[None, :], other=0.0).to(tl.float32)
    return tl.sum(b_sum, 0)


@triton.jit(do_not_specialize=["NUM_TILES", "HEADS"])
def tile_sum_kernel(
    x,
    order,
    offsets,
    sums,
    s_xb,
    s_xs,
    s_xh,
    NUM_TILES,
    HEADS,
    HEAD_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """fp32 sums `[B, NUM_TILES, HEADS, D]` of `[B, S, H, D]`, some of the H * D columns of one tile a program."""
    i_tile, i_b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    o_column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    # The product with a constant tells the compiler that the mask is the same for neighbours: loads are 16 bytes wide.
    num_columns = HEADS * HEAD_SIZE
    m_column = o_column < num_columns
    p_x = x + i_b * s_xb + (o_column // HEAD_SIZE).to(tl.int64) * s_xh + o_column % HEAD_SIZE
    i_start, i_end = tl.load(offsets + i_tile), tl.load(offsets + i_tile + 1)
    b_sum = sum_of_tile(p_x, s_xs, order, i_start, i_end, m_column, TILE, ROWS, COLUMNS)
    tl.store(sums + (i_b * NUM_TILES + i_tile) * num_columns + o_column, b_sum, mask=m_column)


def launch_tile_sum(x: Tensor, order: Tensor, offsets: Tensor, max_size: int, sums: Tensor) -> None:
    """Fill `sums`, `[B, N, H, D]` fp32 contiguous, from `[B, S, H, D]` whose last dimension is contiguous."""
    batch, num_tiles, num_heads, head_size = sums.shape
    tile_sum_kernel[(num_tiles, -(-num_heads * head_size // _COLUMNS), batch)](
        x,
        order,
        offsets,
        sums,
        *x.stride()[:3],
        NUM_TILES=num_tiles,
        HEADS=num_heads,
        HEAD_SIZE=head_size,
        TILE=max_size,
        ROWS=min(_ROWS, 1 << (max_size - 1).bit_length()),
        COLUMNS=_COLUMNS,
        num_warps=4,
    )
