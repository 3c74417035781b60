"""Triton kernel of tile sums: one pass over the tokens, which stay where they are.

A program sums some columns of a run of tiles that follow each other along the width, and loads the next tile while it sums one.
Programs that follow each other read the other columns of the same tiles, so that memory is read in long runs.

Names: `i_` indices, `o_` offsets, `m_` masks, `p_` pointers, `b_` values of a block, `s_` strides in elements.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (the types of kernel arguments are Triton's, not Python's)

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastvideo.video.tiles import TileGrid

# A whole tile of 64 tokens at a time.
_ROWS = 64
_COLUMNS, _STAGES, _WARPS = 128, 3, 2
# Of tiles on their way; every GPU has as much shared memory for two programs.
_SHARED_BYTES = 32 << 10
# So many programs fill the largest GPU several times over.
_NUM_PROGRAMS = 6144


@triton.jit
def quotient(b_dividend, divisor):
    """The dividend over a whole divisor below 2 ** 18, rounded to nearest; infinity stays what it is.

    Newton's step makes the reciprocal exact to the last bit, and another the quotient (Markstein 1990), which costs less than
    a division for each entry.
    """
    b_zeros = tl.zeros_like(b_dividend)
    reciprocal = 1.0 / divisor
    reciprocal = tl.fma(reciprocal, tl.fma(reciprocal, -divisor, 1.0), reciprocal)
    b_first = b_dividend * reciprocal
    b_rest = tl.fma(b_first, b_zeros - divisor, b_dividend)
    return tl.where(tl.abs(b_first) < float("inf"), tl.fma(b_rest, b_zeros + reciprocal, b_first), b_first)


@triton.jit
def pool_run(
    x,
    total,
    mean,
    low,
    has_mean,
    factor,
    s_b,
    s_s,
    s_h,
    i_run,
    i_block,
    T,
    Y,
    X,
    RUN,
    HEADS,
    HEAD_SIZE: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Pool a run of RUN tiles of `x`, `[B, S, HEADS, D]`, in COLUMNS columns, to those `[B, N, HEADS, D]` that are given.

    `total` takes fp32 sums, `mean` fp32 means if `has_mean`, and `low` means times `factor` in its own dtype.
    """
    num_y, num_x = tl.cdiv(Y, TILE_Y), tl.cdiv(X, TILE_X)
    num_runs = tl.cdiv(num_x, RUN)
    i_ty, i_first, i_b = i_run // num_runs, i_run % num_runs * RUN, tl.program_id(1).to(tl.int64)
    i_t, i_y = i_ty // num_y * TILE_T, i_ty % num_y * TILE_Y
    o_column = i_block * COLUMNS + tl.arange(0, COLUMNS)
    # The product with a constant tells the compiler that the mask is the same for neighbours: loads are 16 bytes wide.
    num_columns = HEADS * HEAD_SIZE
    m_column = o_column < num_columns
    p_x = x + i_b * s_b + (o_column // HEAD_SIZE).to(tl.int64) * s_h + o_column % HEAD_SIZE
    p_x += ((i_t * Y + i_y).to(tl.int64) * X + i_first * TILE_X) * s_s
    o_tile = (i_b * tl.cdiv(T, TILE_T) * num_y + i_ty) * num_x * num_columns + o_column
    num_rows = tl.minimum(TILE_T, T - i_t) * tl.minimum(TILE_Y, Y - i_y)
    size, last_size = (num_rows * TILE_X).to(tl.float32), (num_rows * (X - (num_x - 1) * TILE_X)).to(tl.float32)
    for i_x in tl.range(i_first, tl.minimum(i_first + RUN, num_x), num_stages=STAGES):
        for i_row in tl.static_range(0, TILE_T * TILE_Y * TILE_X, ROWS):
            o_row = i_row + tl.arange(0, ROWS)
            o_t, o_y, o_x = o_row // (TILE_Y * TILE_X), o_row // TILE_X % TILE_Y, o_row % TILE_X
            m_row = (o_t < tl.minimum(TILE_T, T - i_t)) & (o_y < Y - i_y) & (o_x < X - i_x * TILE_X)
            p_row = p_x[None, :] + (((o_t * Y + o_y) * X + o_x).to(tl.int64) * s_s)[:, None]
            m_block = m_row[:, None] if HEAD_SIZE % COLUMNS == 0 else m_row[:, None] & m_column[None, :]
            b_x = tl.load(p_row, mask=m_block, other=0.0).to(tl.float32)
            if i_row == 0:
                b_sum = b_x
            else:
                b_sum += b_x
        p_x += TILE_X * s_s
        b_total = tl.sum(b_sum, 0)
        o_to = i_x * num_columns + o_tile
        if total is not None:
            tl.store(total + o_to, b_total, mask=m_column)
        b_mean = quotient(b_total, tl.where(i_x == num_x - 1, last_size, size))
        if mean is not None:
            tl.store(mean + o_to, b_mean, mask=o_column < tl.where(has_mean, num_columns, 0))
        if low is not None:
            tl.store(low + o_to, (b_mean * factor).to(low.dtype.element_ty), mask=m_column)


@triton.jit(do_not_specialize=["T", "Y", "X", "RUN", "HEADS"])
def tile_sum_kernel(
    x,
    sums,
    s_xb,
    s_xs,
    s_xh,
    T,
    Y,
    X,
    RUN,
    HEADS,
    HEAD_SIZE: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """fp32 sums `[B, N, HEADS, D]` of `[B, S, HEADS, D]`."""
    num_blocks = tl.cdiv(HEADS * HEAD_SIZE, COLUMNS)
    i_run, i_block = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    pool_run(
        x, sums, None, None, True, 1.0, s_xb, s_xs, s_xh, i_run, i_block,
        T, Y, X, RUN, HEADS, HEAD_SIZE, TILE_T, TILE_Y, TILE_X, ROWS, COLUMNS, STAGES,
    )  # fmt: skip


def num_column_blocks(shape: Sequence[int]) -> int:
    """Blocks of columns that programs take from a tensor of shape `[B, S, H, D]`."""
    return -(-shape[2] * shape[3] // _COLUMNS)


def pool_arguments(grid: TileGrid, num_blocks: int, itemsize: int) -> tuple[int, dict[str, int]]:
    """How many runs of tiles there are, for `num_blocks` programs each, and what `pool_run` takes from a grid."""
    num_t, num_y, num_x = grid.num_tiles_tyx
    num_parts = min(num_x, -(-_NUM_PROGRAMS // (num_t * num_y * num_blocks)))
    run = -(-num_x // num_parts)
    rows = min(_ROWS, 1 << (grid.max_size - 1).bit_length())
    num_ahead = _SHARED_BYTES // (-(-grid.max_size // rows) * rows * _COLUMNS * itemsize)
    (t, y, x), (tile_t, tile_y, tile_x) = grid.grid_tyx, map(min, grid.grid_tyx, grid.tile_tyx)
    arguments = {"T": t, "Y": y, "X": x, "RUN": run, "TILE_T": tile_t, "TILE_Y": tile_y, "TILE_X": tile_x}
    arguments |= {"ROWS": rows, "COLUMNS": _COLUMNS, "STAGES": min(_STAGES, 1 + num_ahead), "num_warps": _WARPS}
    return num_t * num_y * -(-num_x // run), arguments


def launch_tile_sum(x: Tensor, grid: TileGrid, sums: Tensor) -> None:
    """Fill `sums`, `[B, N, H, D]` fp32 contiguous, from `[B, S, H, D]` whose last dimension is contiguous."""
    num_blocks = num_column_blocks(x.shape)
    num_runs, arguments = pool_arguments(grid, num_blocks * x.shape[0], x.itemsize)
    tile_sum_kernel[(num_runs * num_blocks, x.shape[0])](
        x, sums, *x.stride()[:3], HEADS=x.shape[2], HEAD_SIZE=x.shape[3], **arguments
    )
