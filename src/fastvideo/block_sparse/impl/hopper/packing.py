"""Packed rows for the Hopper kernels: tiles cut into pieces of 16-row granules, pieces gathered into blocks of 64 rows.

A tile of up to 64 tokens is one piece, a larger one several. A piece takes as many granules of 16 rows as it needs and
starts at a granule. A block of 64 rows, what one warpgroup of the tensor cores works on, holds one piece of 3 or 4
granules, two of 2 or four of 1, so that work follows real tokens. Rows behind the end of a piece are pads: they are
written as zero and never copied back. Blocks of several pieces come first, because their lists of tiles are longest.

Nothing here waits for the device: sizes on the host are upper bounds, the real number of blocks stays in a tensor.

Shape legend: N tiles, P pieces of a tile, M blocks at most, R = 64 M packed rows, D head size.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (the types of kernel arguments are Triton's, not Python's)

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvideo.block_sparse.pattern import TileLayout

T = TypeVar("T")

BLOCK_ROWS = 64
# Of so many kinds of calls what they share is kept with a layout.
_NUM_KEPT = 64
_LOG2E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True, eq=False)
class PackedLayout:
    """Where the tokens of a `TileLayout` lie among packed rows.

    Attributes:
        layout: The tiles.
        pieces: Pieces of a tile, P.
        piece_rows: Tokens of a piece but for the last of a tile, up to 64.
        max_blocks: Upper bound of the number of blocks, M.
        piece_row: `[N P]` int32, first packed row of each piece.
        block_tiles: `[M, 4]` int32, tile of each granule of a block, -1 where there is none.
        counts: `[2]` int32, blocks of several pieces and blocks in all.
        row_token: `[R]` int32, token of each packed row, -1 for pads; None where both are the same.
        kept: What calls with these rows share, see `keep`.
    """

    layout: TileLayout
    pieces: int
    piece_rows: int
    max_blocks: int
    piece_row: Tensor
    block_tiles: Tensor
    counts: Tensor
    row_token: Tensor | None
    kept: dict[tuple[Any, ...], Any] = field(default_factory=dict, repr=False)

    def keep(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        """What `make` gave when `key` was new: launches, and sizes that follow from shapes."""
        found: T | None = self.kept.get(key)
        if found is None:
            if len(self.kept) >= _NUM_KEPT:
                self.kept.clear()
            found = self.kept[key] = make()
        return found

    @functools.cached_property
    def numbers(self) -> tuple[int | bool, ...]:
        """All that launches read of these rows on the host."""
        layout = self.layout
        sizes = (layout.num_tokens, layout.num_tiles, layout.max_size, layout.is_uniform)
        return *sizes, self.pieces, self.piece_rows, self.max_blocks, self.row_token is None

    @property
    def max_rows(self) -> int:
        """Packed rows of one head, R."""
        return self.max_blocks * BLOCK_ROWS

    @property
    def max_pairs(self) -> int:
        """Upper bound of the pairs of neighbouring blocks, where blocks of several pieces and of one pair among themselves."""
        return self.max_blocks // 2 + 1

    @property
    def is_even(self) -> bool:
        """Whether all pieces are known to have `piece_rows` tokens."""
        return self.layout.is_uniform and self.layout.max_size == self.pieces * self.piece_rows

    @property
    def is_one_piece_a_block(self) -> bool:
        """Whether block `i` is known to be piece `i`."""
        return self.is_even and self.piece_rows > 32

    @property
    def may_join(self) -> bool:
        """Whether some blocks may hold several pieces."""
        return not self.is_one_piece_a_block

    @property
    def may_be_alone(self) -> bool:
        """Whether some blocks may hold one piece alone."""
        return not self.is_even or self.piece_rows > 32

    @property
    def box_tokens(self) -> int:
        """Tokens of every piece of four granules if that is known to be one number, else 64."""
        return self.piece_rows if self.is_even and self.piece_rows > 48 else BLOCK_ROWS


def num_pieces(layout: TileLayout) -> int:
    """Into how many pieces of up to 64 tokens the tiles are cut."""
    return -(-layout.max_size // BLOCK_ROWS)


def keep_made(derived: dict[Any, Any] | None, key: Any, device: torch.device, make: Callable[[], T]) -> T:
    """What `make` gave when `key` was new, tensors that kernels write; made for each call where nothing is kept."""
    if derived is None:
        return make()
    made: T | None = derived.get(key)
    if made is None:
        made = make()
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                # What a graph makes belongs to the graph.
                return made
            # Later calls read it on any stream, and nothing there waits for this one.
            torch.cuda.current_stream(device).synchronize()
        derived[key] = made
    return made


def pack_layout(layout: TileLayout) -> PackedLayout:
    """Place the pieces of a layout: two small kernels, or what they made for a layout that keeps it."""
    return keep_made(layout.derived, "hopper", layout.offsets.device, lambda: _pack_layout(layout))


def _pack_layout(layout: TileLayout) -> PackedLayout:
    pieces = num_pieces(layout)
    # Equal tiles are cut evenly, so that all pieces have the same pads.
    piece_rows = -(-layout.max_size // pieces) if layout.is_uniform else BLOCK_ROWS
    piece_count = layout.num_tiles * pieces
    a_block = {1: 4, 2: 2}.get(-(-piece_rows // 16), 1)
    is_even = layout.is_uniform and layout.max_size == pieces * piece_rows
    max_blocks = -(-piece_count // a_block) if is_even else piece_count
    offsets = layout.offsets
    piece_row = torch.empty(piece_count, dtype=torch.int32, device=offsets.device)
    block_tiles = torch.full((max_blocks, 4), -1, dtype=torch.int32, device=offsets.device)
    counts = torch.empty(2, dtype=torch.int32, device=offsets.device)
    shape = {"PIECES": pieces, "PIECE_ROWS": piece_rows}
    place_pieces_kernel[(1,)](offsets, piece_row, block_tiles, counts, piece_count, CHUNK=1024, num_warps=4, **shape)
    row_token = None
    if layout.order is not None or not is_even or piece_rows != BLOCK_ROWS:
        row_token = torch.full((max_blocks * BLOCK_ROWS,), -1, dtype=torch.int32, device=offsets.device)
        row_tokens_kernel[(piece_count,)](offsets, layout.order, piece_row, row_token, num_warps=1, **shape)
    return PackedLayout(layout, pieces, piece_rows, max_blocks, piece_row, block_tiles, counts, row_token)


@triton.jit
def piece_size(offsets, i_piece, m_piece, PIECES: tl.constexpr, PIECE_ROWS: tl.constexpr):
    """Tokens of pieces, 0 where a tile ends before them."""
    i_tile, i_part = i_piece // PIECES, i_piece % PIECES
    first = tl.load(offsets + i_tile, mask=m_piece, other=0)
    size = tl.load(offsets + i_tile + 1, mask=m_piece, other=0) - first - i_part * PIECE_ROWS
    return tl.minimum(tl.maximum(size, 0), PIECE_ROWS)


@triton.jit(do_not_specialize=["num_pieces"])
def place_pieces_kernel(
    offsets,
    piece_row,
    block_tiles,
    counts,
    num_pieces,
    PIECES: tl.constexpr,
    PIECE_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Give each piece its rows: pieces of one granule four to a block, of two granules two to a block, others one."""
    o_chunk = tl.arange(0, CHUNK)
    num_quarters = 0
    num_halves = 0
    num_wholes = 0
    for i_first in range(0, num_pieces, CHUNK):
        i_piece = i_first + o_chunk
        size = piece_size(offsets, i_piece, i_piece < num_pieces, PIECES, PIECE_ROWS)
        num_quarters += tl.sum(((size > 0) & (size <= 16)).to(tl.int32), 0)
        num_halves += tl.sum(((size > 16) & (size <= 32)).to(tl.int32), 0)
        num_wholes += tl.sum((size > 32).to(tl.int32), 0)
    i_half_block = tl.cdiv(num_quarters, 4)
    i_whole_block = i_half_block + tl.cdiv(num_halves, 2)
    tl.store(counts, i_whole_block)
    tl.store(counts + 1, i_whole_block + num_wholes)

    i_quarter = 0
    i_half = i_half_block * 2
    i_whole = i_whole_block
    for i_first in range(0, num_pieces, CHUNK):
        i_piece = i_first + o_chunk
        m_piece = i_piece < num_pieces
        size = piece_size(offsets, i_piece, m_piece, PIECES, PIECE_ROWS)
        m_quarter, m_half, m_whole = (size > 0) & (size <= 16), (size > 16) & (size <= 32), size > 32
        place_quarter = i_quarter + tl.cumsum(m_quarter.to(tl.int32), 0) - 1
        place_half = i_half + tl.cumsum(m_half.to(tl.int32), 0) - 1
        place_whole = i_whole + tl.cumsum(m_whole.to(tl.int32), 0) - 1
        granule = tl.where(m_quarter, place_quarter, tl.where(m_half, place_half * 2, place_whole * 4))
        tl.store(piece_row + i_piece, granule * 16, mask=m_piece & (size > 0))
        i_tile = i_piece // PIECES
        tl.store(block_tiles + granule, i_tile, mask=size > 0)
        tl.store(block_tiles + granule + 1, i_tile, mask=size > 16)
        tl.store(block_tiles + granule + 2, i_tile, mask=m_whole)
        tl.store(block_tiles + granule + 3, i_tile, mask=m_whole)
        i_quarter += tl.sum(m_quarter.to(tl.int32), 0)
        i_half += tl.sum(m_half.to(tl.int32), 0)
        i_whole += tl.sum(m_whole.to(tl.int32), 0)


@triton.jit
def row_tokens_kernel(offsets, order, piece_row, row_token, PIECES: tl.constexpr, PIECE_ROWS: tl.constexpr):
    """Write the token of each real row of one piece."""
    i_piece = tl.program_id(0)
    o_row = tl.arange(0, 64)
    size = piece_size(offsets, i_piece + o_row * 0, o_row >= 0, PIECES, PIECE_ROWS)
    o_packed = tl.load(offsets + i_piece // PIECES) + i_piece % PIECES * PIECE_ROWS + o_row
    m_row = o_row < size
    o_token = o_packed if order is None else tl.load(order + o_packed, mask=m_row, other=0)
    # Garbage for a piece without tokens, which writes nothing.
    i_row = tl.load(piece_row + i_piece)
    tl.store(row_token + i_row + o_row, o_token, mask=m_row)


@triton.jit
def block_tokens(row_token, i_block):
    """Tokens of the rows of a block (int64), and which rows are real."""
    o_row = i_block * 64 + tl.arange(0, 64)
    o_token = o_row if row_token is None else tl.load(row_token + o_row)
    return o_token.to(tl.int64), o_token >= 0


@triton.jit(do_not_specialize=["first_head", "max_blocks", "HEADS"])
def pack_keys_kernel(
    key,
    value,
    packed_key,
    packed_value,
    row_token,
    counts,
    s_kb,
    s_ks,
    s_kh,
    s_vb,
    s_vs,
    s_vh,
    first_head,
    max_blocks,
    HEADS,
    D: tl.constexpr,
    SIGN: tl.constexpr,
):
    """Rows `[heads, R, D]` of keys, times SIGN, and values; `first_head` counts through batch and heads."""
    i_block, i_head = tl.program_id(0) % max_blocks, tl.program_id(0) // max_blocks
    if i_block < tl.load(counts + 1):
        i_b, i_h = ((first_head + i_head) // HEADS).to(tl.int64), ((first_head + i_head) % HEADS).to(tl.int64)
        o_token, m_row = block_tokens(row_token, i_block)
        o_d = tl.arange(0, D)
        o_to = (tl.program_id(0).to(tl.int64) * 64 + tl.arange(0, 64))[:, None] * D + o_d[None, :]
        p_key = key + i_b * s_kb + i_h * s_kh + o_token[:, None] * s_ks + o_d[None, :]
        b_key = tl.load(p_key, mask=m_row[:, None], other=0.0)
        p_value = value + i_b * s_vb + i_h * s_vh + o_token[:, None] * s_vs + o_d[None, :]
        b_value = tl.load(p_value, mask=m_row[:, None], other=0.0)
        if SIGN == 0:
            b_key = tl.zeros_like(b_key)
        elif SIGN < 0:
            b_key = -b_key
        tl.store(packed_key + o_to, b_key)
        tl.store(packed_value + o_to, b_value)


@triton.jit(do_not_specialize=["first_head", "max_blocks", "HEADS", "NUM_QUERIES"])
def pack_queries_kernel(
    query,
    dout,
    out,
    lse,
    dlse,
    packed_query,
    packed_dout,
    stats,
    row_token,
    counts,
    s_qb,
    s_qs,
    s_qh,
    s_db,
    s_ds,
    s_dh,
    s_lb,
    s_ls,
    s_lh,
    first_head,
    max_blocks,
    HEADS,
    NUM_QUERIES,
    D: tl.constexpr,
    PACK: tl.constexpr,
):
    """For the backward: `stats [heads, R, 2]`, and with PACK rows `[heads, R, D]` of queries and the output's gradient.

    Statistics are the base-2 log-sum-exp and `rowsum(dout * out) - dlse`, side by side so that 16 rows are 128 bytes, the
    least that a tensor copy can place. Pads and rows that see nothing get +inf and 0, so that their probabilities are 0.
    """
    i_block, i_head = tl.program_id(0) % max_blocks, tl.program_id(0) // max_blocks
    if i_block < tl.load(counts + 1):
        i_b, i_h = ((first_head + i_head) // HEADS).to(tl.int64), ((first_head + i_head) % HEADS).to(tl.int64)
        o_token, m_row = block_tokens(row_token, i_block)
        o_d = tl.arange(0, D)
        o_row = (i_b * NUM_QUERIES + o_token) * HEADS + i_h
        p_dout = dout + i_b * s_db + i_h * s_dh + o_token[:, None] * s_ds + o_d[None, :]
        b_dout = tl.load(p_dout, mask=m_row[:, None], other=0.0)
        b_out = tl.load(out + o_row[:, None] * D + o_d[None, :], mask=m_row[:, None], other=0.0)
        b_lse = tl.load(lse + o_row, mask=m_row, other=-float("inf"))
        b_delta = tl.sum(b_out.to(tl.float32) * b_dout.to(tl.float32), 1)
        if dlse is not None:
            b_delta -= tl.load(dlse + i_b * s_lb + o_token * s_ls + i_h * s_lh, mask=m_row, other=0.0)
        m_seen = b_lse != -float("inf")
        o_to = tl.program_id(0).to(tl.int64) * 64 + tl.arange(0, 64)
        tl.store(stats + o_to * 2, tl.where(m_seen, b_lse * _LOG2E, float("inf")))
        tl.store(stats + o_to * 2 + 1, tl.where(m_seen, b_delta, 0.0))
        if PACK:
            p_query = query + i_b * s_qb + i_h * s_qh + o_token[:, None] * s_qs + o_d[None, :]
            b_query = tl.load(p_query, mask=m_row[:, None], other=0.0)
            tl.store(packed_query + o_to[:, None] * D + o_d[None, :], b_query)
            tl.store(packed_dout + o_to[:, None] * D + o_d[None, :], b_dout)
