"""Triton kernels that add a gated coarse part, broadcast from tiles to their tokens, and differentiate that, in one pass each.

A program owns some of the columns of one tile, H * D or whole heads. Programs that follow each other own the other columns of
the same tile, so that memory is read in long runs. Products and sums are in fp32, in a fixed order.

Names: `i_` indices, `o_` offsets, `m_` masks, `p_` pointers, `b_` values of a block, `s_` strides in elements.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (the types of kernel arguments are Triton's, not Python's)

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastvideo.block_sparse.pattern import TileLayout

_ROWS, _COLUMNS, _WARPS = 16, 128, 4
# Of the backward: with 4 warps for 128 columns it takes a fifth longer.
_COLUMNS_A_WARP = 64


@triton.jit
def _tokens(order, i_row, i_end, ROWS: tl.constexpr):
    """Tokens of packed rows, int64, and which of them belong to the tile."""
    o_row = i_row + tl.arange(0, ROWS)
    m_row = o_row < i_end
    o_token = o_row if order is None else tl.load(order + o_row, mask=m_row, other=0)
    return o_token.to(tl.int64)[:, None], m_row[:, None]


@triton.jit
def _columns(i_block, HEADS, s_h, HEAD_SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns of a program, which of them exist, and their places in a tensor with stride `s_h` of heads."""
    o_column = i_block * COLUMNS + tl.arange(0, COLUMNS)
    o_place = (o_column // HEAD_SIZE).to(tl.int64) * s_h + o_column % HEAD_SIZE
    # The product with a constant tells the compiler that the mask is the same for neighbours: loads are 16 bytes wide.
    return o_column[None, :], (o_column < HEADS * HEAD_SIZE)[None, :], o_place[None, :]


@triton.jit(do_not_specialize=["NUM_TILES", "HEADS"])
def gated_tiles_fwd_kernel(
    fine,
    coarse,
    gate,
    out,
    order,
    offsets,
    s_fb,
    s_ob,
    s_gb,
    s_gs,
    s_gh,
    NUM_TILES,
    HEADS,
    HEAD_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """`out = fine + coarse[tile of token] * gate`; `out` may be `fine`."""
    num_blocks = tl.cdiv(HEADS * HEAD_SIZE, COLUMNS)
    i_tile, i_b = tl.program_id(0) // num_blocks, tl.program_id(1).to(tl.int64)
    o_column, m_column, o_gate = _columns(tl.program_id(0) % num_blocks, HEADS, s_gh, HEAD_SIZE, COLUMNS)
    i_start, i_end = tl.load(offsets + i_tile), tl.load(offsets + i_tile + 1)
    b_coarse = tl.load(coarse + (i_b * NUM_TILES + i_tile) * HEADS * HEAD_SIZE + o_column, mask=m_column, other=0.0)
    b_coarse = b_coarse.to(tl.float32)
    for i_first in range(0, TILE, ROWS):
        o_token, m_row = _tokens(order, i_start + i_first, i_end, ROWS)
        m_block = m_row & m_column
        b_gate = tl.load(gate + i_b * s_gb + o_token * s_gs + o_gate, mask=m_block, other=0.0).to(tl.float32)
        o_own = o_token * (HEADS * HEAD_SIZE) + o_column
        b_fine = tl.load(fine + i_b * s_fb + o_own, mask=m_block, other=0.0).to(tl.float32)
        b_out = b_fine + b_coarse * b_gate
        tl.store(out + i_b * s_ob + o_own, b_out.to(out.dtype.element_ty), mask=m_block)


@triton.jit(do_not_specialize=["NUM_TILES", "HEADS"])
def gated_tiles_bwd_kernel(
    out,
    dout,
    coarse,
    gate,
    fine,
    dlse,
    dcoarse,
    dgate,
    order,
    offsets,
    s_ob,
    s_db,
    s_ds,
    s_dh,
    s_gb,
    s_gs,
    s_gh,
    s_nb,
    s_lb,
    s_ls,
    s_lh,
    NUM_TILES,
    HEADS,
    HEAD_SIZE: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """`dgate = dout * coarse`, `dcoarse` = sums over tiles of `dout * gate`, and one of two ways to the fine output.

    `dlse = rowsum(dout * coarse * gate)`, or without it `fine = out - coarse * gate` again. A program owns whole heads, each of
    `D` columns, a power of two.
    """
    NUM_OWN: tl.constexpr = COLUMNS // D
    num_blocks = tl.cdiv(HEADS, NUM_OWN)
    i_tile, i_b = tl.program_id(0) // num_blocks, tl.program_id(1).to(tl.int64)
    i_first_head = tl.program_id(0) % num_blocks * NUM_OWN
    o_head = i_first_head + tl.arange(0, COLUMNS) // D
    o_d = tl.arange(0, COLUMNS) % D
    m_column = o_head < HEADS if HEAD_SIZE == D else (o_head < HEADS) & (o_d < HEAD_SIZE)
    m_column = m_column[None, :]
    o_gate = (o_head.to(tl.int64) * s_gh + o_d)[None, :]
    o_dout = (o_head.to(tl.int64) * s_dh + o_d)[None, :]
    o_column = (o_head * HEAD_SIZE + o_d)[None, :]
    i_start, i_end = tl.load(offsets + i_tile), tl.load(offsets + i_tile + 1)
    o_tile = (i_b * NUM_TILES + i_tile) * HEADS * HEAD_SIZE + o_column
    b_coarse = tl.load(coarse + o_tile, mask=m_column, other=0.0).to(tl.float32)
    b_dcoarse = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i_first in range(0, TILE, ROWS):
        o_token, m_row = _tokens(order, i_start + i_first, i_end, ROWS)
        m_block = m_row & m_column
        b_gate = tl.load(gate + i_b * s_gb + o_token * s_gs + o_gate, mask=m_block, other=0.0).to(tl.float32)
        b_dout = tl.load(dout + i_b * s_db + o_token * s_ds + o_dout, mask=m_block, other=0.0).to(tl.float32)
        o_own = o_token * (HEADS * HEAD_SIZE) + o_column
        b_dcoarse += b_dout * b_gate
        b_dgate = b_dout * b_coarse
        if dlse is None:
            b_out = tl.load(out + i_b * s_ob + o_own, mask=m_block, other=0.0).to(tl.float32)
            tl.store(fine + i_b * s_nb + o_own, (b_out - b_coarse * b_gate).to(fine.dtype.element_ty), mask=m_block)
        else:
            b_sum = tl.sum(tl.reshape(b_dgate * b_gate, [ROWS, NUM_OWN, D]), 2)
            o_own_head = (i_first_head + tl.arange(0, NUM_OWN))[None, :]
            p_sum = dlse + i_b * s_lb + o_own_head.to(tl.int64) * s_lh + o_token * s_ls
            tl.store(p_sum, b_sum, mask=m_row & (o_own_head < HEADS))
        tl.store(dgate + i_b * s_nb + o_own, b_dgate.to(dgate.dtype.element_ty), mask=m_block)
    tl.store(dcoarse + o_tile, tl.sum(b_dcoarse, 0)[None, :].to(dcoarse.dtype.element_ty), mask=m_column)


def _launch(kernel: Any, layout: TileLayout, coarse: Tensor, num_blocks: int, num_warps: int, **arguments: Any) -> None:
    batch, num_tiles, num_heads, head_size = coarse.shape
    kernel[(num_tiles * num_blocks, batch)](
        coarse=coarse.contiguous(),
        order=layout.order,
        offsets=layout.offsets,
        NUM_TILES=num_tiles,
        HEADS=num_heads,
        HEAD_SIZE=head_size,
        TILE=layout.max_size,
        ROWS=min(_ROWS, 1 << (layout.max_size - 1).bit_length()),
        num_warps=num_warps,
        **arguments,
    )


def _strides(letter: str, x: Tensor) -> dict[str, int]:
    return {f"s_{letter}{dim}": x.stride(i) for i, dim in enumerate("bsh")}


def launch_add_gated(fine: Tensor, coarse: Tensor, gate: Tensor, out: Tensor, layout: TileLayout) -> None:
    """Fill the first S tokens of `out`; tokens of `fine` and `out` are contiguous, `coarse` is `[B, N, H, D]`."""
    gate = gate if gate.stride(-1) == 1 else gate.contiguous()
    _launch(
        gated_tiles_fwd_kernel,
        layout,
        coarse,
        -(-coarse.shape[2:].numel() // _COLUMNS),
        _WARPS,
        fine=fine,
        gate=gate,
        out=out,
        s_fb=fine.stride(0),
        s_ob=out.stride(0),
        COLUMNS=_COLUMNS,
        **_strides("g", gate),
    )


def launch_gated_backward(
    out: Tensor | None,
    dout: Tensor,
    coarse: Tensor,
    gate: Tensor,
    layout: TileLayout,
    fine_or_dlse: Tensor,
    dcoarse: Tensor,
    dgate: Tensor,
) -> None:
    """Fill `dgate`, `[B, S, H, D]`, `dcoarse`, `[B, N, H, D]`, and what the engine's backward needs; see the kernel.

    With `out`, whose tokens are contiguous, that is the fine output, `[B, S, H, D]`, else `dlse`, `[B, S, H]` in fp32. All
    others are contiguous.
    """
    gate, dout = (x if x.stride(-1) == 1 else x.contiguous() for x in (gate, dout))
    num_heads, head_size = coarse.shape[2:]
    padded = 1 << (head_size - 1).bit_length()
    columns = max(_COLUMNS, padded)
    is_fine = out is not None
    _launch(
        gated_tiles_bwd_kernel,
        layout,
        coarse,
        -(-num_heads * padded // columns),
        columns // _COLUMNS_A_WARP,
        out=out,
        dout=dout,
        gate=gate,
        fine=fine_or_dlse if is_fine else None,
        dlse=None if is_fine else fine_or_dlse,
        dcoarse=dcoarse,
        dgate=dgate,
        s_ob=0 if out is None else out.stride(0),
        s_nb=dgate.stride(0),
        D=padded,
        COLUMNS=columns,
        **_strides("d", dout),
        **_strides("g", gate),
        **_strides("l", fine_or_dlse),
    )
