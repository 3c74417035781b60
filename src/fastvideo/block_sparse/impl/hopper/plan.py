"""What the Hopper kernels walk: for each block of 64 packed rows the boxes and granules of the other side it meets.

A walk goes in half steps of 64 rows. First come boxes (whole pieces of four granules), then half steps put together from
four granules of 16 rows. Two half steps make a step. Half steps in which some row of the block must not see some row that
was loaded carry a mask: an int32 whose byte `g` says for granule `g` which granules of the block see it (bits 0 to 3), and
how many pads end it (bits 4 to 7). Boxes that need no mask come first, so that a kernel knows by counting.

The plan of a block that holds several small tiles is the union of their lists. A plan is a set of plain tensors: the
tests walk the same arrays in torch, since Gluon has no interpreter.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (the types of kernel arguments are Triton's, not Python's)

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvideo.block_sparse.impl.hopper.packing import PackedLayout, piece_size
from fastvideo.block_sparse.impl.hopper.plan_once import plan_once_kernel
from fastvideo.block_sparse.pattern import BlockPattern

# Producers read ahead of the last entry.
_SLACK = 16
# Pieces that one program keeps in registers.
_ONE_CHUNK = 2048


@dataclass(frozen=True, eq=False)
class Plan:
    """Walks of all blocks of some heads (G of them; 1 if all share one).

    Attributes:
        rows: `[G, ...]` int32, first packed rows: boxes two to a step, then granules eight to a step.
        masks: `[G, ...]` int32, one for each half step from the first masked step on.
        meta: `[G, M, 6]` int32: offset into `rows`, offset into `masks`, steps without a mask, steps made of boxes, steps in
            all, half steps in all.
    """

    rows: Tensor
    masks: Tensor
    meta: Tensor


def plan_lists(
    pattern: BlockPattern,
    own: PackedLayout,
    walked: PackedLayout,
    first_head: int,
    heads: int,
    total: int,
    *,
    in_one_pass: bool = False,
) -> Plan:
    """The walks of query blocks over keys, for `heads` of the `total` heads counted through batch and heads."""
    is_direct = own.is_one_piece_a_block and walked.is_even and walked.piece_rows > 48
    if not is_direct:
        marks = mark(pattern, first_head, heads, total, by_key=False)
        return plan_marks(marks, own, walked, pattern.indices.shape[2:].numel(), in_one_pass=in_one_pass)
    indices, (s_b, s_h) = _lists(pattern)
    if s_b == s_h == 0:
        first_head, heads = 0, 1
    width = indices.shape[3] * walked.pieces
    steps = -(-width // 2)
    rows = indices.new_empty(heads, own.max_blocks * steps * 2 + _SLACK)
    meta = indices.new_empty(heads, own.max_blocks, 6)
    pads = 64 - walked.piece_rows
    # The last box of an odd list is masked: the box itself, then a copy that nobody sees.
    last = 0x0F0F0F0F | pads << 28
    masks = torch.zeros(heads, 2, dtype=torch.int32, device=indices.device)
    masks[:, 0] = last - (1 << 32) if last >= 1 << 31 else last
    plan_direct_kernel[(heads * own.max_blocks,)](
        indices,
        None if pattern.counts is None else pattern.counts.contiguous(),
        rows,
        meta,
        s_b,
        s_h,
        first_head,
        pattern_heads(pattern, total),
        indices.shape[3],
        own.max_blocks,
        rows.stride(0),
        OWN_PIECES=own.pieces,
        PIECES=walked.pieces,
        BLOCK=256 if width > 128 else 128,
        num_warps=2,
    )
    return Plan(rows, masks, meta)


def pattern_heads(pattern: BlockPattern, total: int) -> int:
    """Heads of one sample where `total` counts those of all; only lists that differ by sample or head ask."""
    batch, heads = pattern.indices.shape[:2]
    if heads > 1:
        return heads
    return total // batch if batch > 1 else total


def _lists(pattern: BlockPattern) -> tuple[Tensor, tuple[int, int]]:
    """Contiguous index lists, and the strides of batch and head, 0 where all share one."""
    indices = pattern.indices.contiguous()
    batch, heads = (indices.stride(i) if indices.shape[i] > 1 else 0 for i in (0, 1))
    return indices, (batch, heads)


def mark(pattern: BlockPattern, first_head: int, heads: int, total: int, *, by_key: bool) -> Tensor:
    """A byte for each pair of tiles, `[G, Nq, Nk]` or by key `[G, Nk, Nq]`: 1 where listed. G is 1 if all heads share lists."""
    indices, (s_b, s_h) = _lists(pattern)
    if s_b == s_h == 0:
        first_head, heads = 0, 1
    num_queries, num_keys = pattern.query_tiles.num_tiles, pattern.key_tiles.num_tiles
    shape = (num_keys, num_queries) if by_key else (num_queries, num_keys)
    marks = torch.zeros(heads, *shape, dtype=torch.uint8, device=indices.device)
    mark_kernel[(heads * num_queries,)](
        indices,
        None if pattern.counts is None else pattern.counts.contiguous(),
        marks,
        s_b,
        s_h,
        first_head,
        pattern_heads(pattern, total),
        indices.shape[3],
        num_queries,
        num_keys,
        1 if by_key else num_keys,
        num_queries if by_key else 1,
        BLOCK=128,
        num_warps=2,
    )
    return marks


def plan_marks(
    marks: Tensor,
    own: PackedLayout,
    walked: PackedLayout,
    num_listed: int,
    *,
    has_pads: bool = True,
    in_one_pass: bool = False,
) -> Plan:
    """The walks of own blocks over the other side from marks `[G, own tiles, walked tiles]`, up to `num_listed` a head.

    Without `has_pads` the kernel copes with pads of the walked side by itself, so that they ask for no masks.
    """
    heads = marks.shape[0]
    # A listed piece is a box or up to three granules; the ends of walks are filled up, and an odd box may be split.
    num_listed *= walked.pieces
    entries = num_listed * (1 if walked.is_even and walked.piece_rows > 48 else 3) + own.max_blocks * 16 + _SLACK
    rows = torch.empty(heads, entries, dtype=torch.int32, device=marks.device)
    masks = torch.empty(heads, num_listed + own.max_blocks * 4, dtype=torch.int32, device=marks.device)
    meta = torch.zeros(heads, own.max_blocks, 6, dtype=torch.int32, device=marks.device)
    used = torch.zeros(heads, 2, dtype=torch.int32, device=marks.device)
    num_pieces = walked.layout.num_tiles * walked.pieces
    arguments = (
        *(marks, own.block_tiles, own.counts, walked.layout.offsets, walked.piece_row, rows, masks, meta, used),
        *(own.max_blocks, own.layout.num_tiles, walked.layout.num_tiles, num_pieces, rows.stride(0), masks.stride(0)),
    )
    constants = {
        "PIECES": walked.pieces,
        "PIECE_ROWS": walked.piece_rows,
        # A piece with at least so many tokens is a box without a mask.
        "CLEAN": walked.box_tokens if has_pads else 49,
    }
    grid, padded = (heads * own.max_blocks,), max(64, triton.next_power_of_2(num_pieces))
    if in_one_pass:
        chunk = min(_ONE_CHUNK, padded)
        is_one_chunk = num_pieces <= chunk
        plan_once_kernel[grid](*arguments, **constants, CHUNK=chunk, IS_ONE_CHUNK=is_one_chunk, num_warps=max(1, chunk // 128))
    else:
        plan_marks_kernel[grid](*arguments, **constants, CHUNK=min(1024, padded), num_warps=4)
    return Plan(rows, masks, meta)


@triton.jit
def _list_place(i_head, i_tile, s_b, s_h, first_head, HEADS, WIDTH):
    i_b, i_h = ((first_head + i_head) // HEADS).to(tl.int64), ((first_head + i_head) % HEADS).to(tl.int64)
    return i_b * s_b + i_h * s_h + i_tile.to(tl.int64) * WIDTH


@triton.jit(
    do_not_specialize=["s_b", "s_h", "first_head", "HEADS", "WIDTH", "max_blocks", "s_rows"],
)
def plan_direct_kernel(
    indices,
    counts,
    rows,
    meta,
    s_b,
    s_h,
    first_head,
    HEADS,
    WIDTH,
    max_blocks,
    s_rows,
    OWN_PIECES: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy one list of tiles as packed rows, where piece `i` lies at row `64 i` on both sides."""
    i_block, i_head = tl.program_id(0) % max_blocks, tl.program_id(0) // max_blocks
    o_list = _list_place(i_head, i_block // OWN_PIECES, s_b, s_h, first_head, HEADS, WIDTH)
    num_boxes = WIDTH
    if counts is not None:
        num_boxes = tl.load(counts + o_list // WIDTH)
    num_boxes = num_boxes * PIECES
    capacity = (WIDTH * PIECES + 1) // 2 * 2
    p_rows = rows + i_head.to(tl.int64) * s_rows + i_block * capacity
    for i_first in range(0, num_boxes + num_boxes % 2, BLOCK):
        o_box = i_first + tl.arange(0, BLOCK)
        m_box = o_box < num_boxes + num_boxes % 2
        o_from = tl.minimum(o_box, num_boxes - 1)
        i_tile = tl.load(indices + o_list + o_from // PIECES, mask=m_box, other=0)
        tl.store(p_rows + o_box, (i_tile * PIECES + o_from % PIECES) * 64, mask=m_box)
    p_meta = meta + tl.program_id(0).to(tl.int64) * 6
    tl.store(p_meta, i_block * capacity)
    tl.store(p_meta + 1, 0)
    tl.store(p_meta + 2, num_boxes // 2)
    tl.store(p_meta + 3, (num_boxes + 1) // 2)
    tl.store(p_meta + 4, (num_boxes + 1) // 2)
    tl.store(p_meta + 5, num_boxes)


@triton.jit(do_not_specialize=["s_b", "s_h", "first_head", "HEADS", "WIDTH", "NUM_QUERIES", "NUM_KEYS", "s_q", "s_k"])
def mark_kernel(
    indices,
    counts,
    marks,
    s_b,
    s_h,
    first_head,
    HEADS,
    WIDTH,
    NUM_QUERIES,
    NUM_KEYS,
    s_q,
    s_k,
    BLOCK: tl.constexpr,
):
    """Set the bytes of one list to 1."""
    i_q, i_head = tl.program_id(0) % NUM_QUERIES, tl.program_id(0) // NUM_QUERIES
    o_list = _list_place(i_head, i_q, s_b, s_h, first_head, HEADS, WIDTH)
    num_listed = WIDTH
    if counts is not None:
        num_listed = tl.load(counts + o_list // WIDTH)
    p_marks = marks + i_head.to(tl.int64) * NUM_QUERIES * NUM_KEYS + i_q.to(tl.int64) * s_q
    for i_first in range(0, num_listed, BLOCK):
        o_entry = i_first + tl.arange(0, BLOCK)
        m_entry = o_entry < num_listed
        i_k = tl.load(indices + o_list + o_entry, mask=m_entry, other=0).to(tl.int64)
        tl.store(p_marks + i_k * s_k, tl.full([BLOCK], 1, tl.uint8), mask=m_entry)


@triton.jit
def _seen_by(p_marks, p_tiles, NUM_WALKED, i_walked, m_piece):
    """Which granules of the own block (bits 0 to 3) see the tiles; granules without a tile count as seeing what others see."""
    b_seen = tl.zeros_like(i_walked)
    absent = 0
    for i_slot in tl.static_range(4):
        i_tile = tl.load(p_tiles + i_slot)
        absent |= tl.where(i_tile < 0, 1 << i_slot, 0)
        p_list = p_marks + tl.maximum(i_tile, 0).to(tl.int64) * NUM_WALKED
        b_mark = tl.load(p_list + i_walked, mask=m_piece, other=0)
        b_seen |= tl.where((b_mark != 0) & (i_tile >= 0), 1 << i_slot, 0)
    return tl.where(b_seen != 0, b_seen | absent, 0)


@triton.jit(do_not_specialize=["max_blocks", "NUM_OWN", "NUM_WALKED", "num_pieces", "s_rows", "s_masks"])
def plan_marks_kernel(
    marks,
    block_tiles,
    own_counts,
    offsets,
    piece_row,
    rows,
    masks,
    meta,
    used,
    max_blocks,
    NUM_OWN,
    NUM_WALKED,
    num_pieces,
    s_rows,
    s_masks,
    PIECES: tl.constexpr,
    PIECE_ROWS: tl.constexpr,
    CLEAN: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Count what one block meets, take that much of the buffers, and write it in ascending order.

    Where the buffers are taken depends on chance, what is read from them doesn't.
    """
    i_block, i_head = tl.program_id(0) % max_blocks, (tl.program_id(0) // max_blocks).to(tl.int64)
    if i_block < tl.load(own_counts + 1):
        p_marks = marks + i_head * NUM_OWN * NUM_WALKED
        p_tiles = block_tiles + i_block * 4
        o_chunk = tl.arange(0, CHUNK)
        num_clean = 0
        num_other = 0
        num_granules = 0
        last_row = 0
        for i_first in range(0, num_pieces, CHUNK):
            i_piece = i_first + o_chunk
            m_piece = i_piece < num_pieces
            size = piece_size(offsets, i_piece, m_piece, PIECES, PIECE_ROWS)
            b_seen = _seen_by(p_marks, p_tiles, NUM_WALKED, i_piece // PIECES, m_piece)
            m_meet = (b_seen != 0) & (size > 0)
            m_clean = m_meet & (size >= CLEAN) & (b_seen == 15)
            m_other = m_meet & (size > 48) & ~m_clean
            num_clean += tl.sum(m_clean.to(tl.int32), 0)
            num_other += tl.sum(m_other.to(tl.int32), 0)
            num_granules += tl.sum(tl.where(m_meet & (size <= 48), (size + 15) // 16, 0), 0)
            b_row = tl.load(piece_row + i_piece, mask=m_meet, other=0)
            last_row = tl.maximum(last_row, tl.max(b_row, 0))

        # An odd box joins the granules if there are any: that is never more steps.
        num_boxes = num_clean + num_other
        is_split = (num_boxes % 2 == 1) & (num_granules > 0)
        num_boxes -= tl.where(is_split, 1, 0)
        num_granules += tl.where(is_split, 4, 0)
        clean_steps = tl.minimum(num_clean, num_boxes) // 2
        box_steps = (num_boxes + 1) // 2
        granule_steps = (num_granules + 7) // 8
        steps = box_steps + granule_steps
        halves = tl.where(num_granules > 0, box_steps * 2 + (num_granules + 3) // 4, num_boxes)
        o_rows = tl.atomic_add(used + i_head * 2, box_steps * 2 + granule_steps * 8)
        o_masks = tl.atomic_add(used + i_head * 2 + 1, (steps - clean_steps) * 2)
        p_meta = meta + tl.program_id(0).to(tl.int64) * 6
        tl.store(p_meta, o_rows)
        tl.store(p_meta + 1, o_masks)
        tl.store(p_meta + 2, clean_steps)
        tl.store(p_meta + 3, box_steps)
        tl.store(p_meta + 4, steps)
        tl.store(p_meta + 5, halves)

        p_rows = rows + i_head * s_rows + o_rows
        p_granules = p_rows + box_steps * 2
        # Bytes of the masks: of half step 0 (which may lie before the first masked one), and of the granules.
        p_mask = (masks + i_head * s_masks + o_masks).to(tl.pointer_type(tl.uint8)) - clean_steps * 8
        p_granule_mask = p_mask + box_steps * 8
        i_clean = 0
        i_other = num_clean
        i_granule = 0
        for i_first in range(0, num_pieces, CHUNK):
            i_piece = i_first + o_chunk
            m_piece = i_piece < num_pieces
            size = piece_size(offsets, i_piece, m_piece, PIECES, PIECE_ROWS)
            b_seen = _seen_by(p_marks, p_tiles, NUM_WALKED, i_piece // PIECES, m_piece)
            m_meet = (b_seen != 0) & (size > 0)
            m_clean = m_meet & (size >= CLEAN) & (b_seen == 15)
            m_other = m_meet & (size > 48) & ~m_clean
            b_row = tl.load(piece_row + i_piece, mask=m_meet, other=0)
            place_clean = i_clean + tl.cumsum(m_clean.to(tl.int32), 0) - 1
            place_other = i_other + tl.cumsum(m_other.to(tl.int32), 0) - 1
            o_box = tl.where(m_clean, place_clean, place_other)
            m_box = (m_clean | m_other) & (o_box < num_boxes)
            tl.store(p_rows + o_box, b_row, mask=m_box)
            num_own = tl.where(m_meet & (size <= 48), (size + 15) // 16, 0)
            o_granule = i_granule + tl.cumsum(num_own, 0) - num_own
            # The odd box is the last of all boxes; its granules are the last too.
            m_split = (m_clean | m_other) & (o_box >= num_boxes)
            o_granule = tl.where(m_split, num_granules - 4, o_granule)
            num_own = tl.where(m_split, 4, num_own)
            for i_part in tl.static_range(4):
                m_part = i_part < num_own
                pads = tl.minimum(tl.maximum(i_part * 16 + 16 - size, 0), 15)
                b_mask = (b_seen | (pads << 4)).to(tl.uint8)
                tl.store(p_mask + o_box * 4 + i_part, b_mask, mask=m_box & (o_box >= clean_steps * 2))
                tl.store(p_granules + o_granule + i_part, b_row + i_part * 16, mask=m_part)
                tl.store(p_granule_mask + o_granule + i_part, b_mask, mask=m_part)
            i_clean += tl.sum(m_clean.to(tl.int32), 0)
            i_other += tl.sum(m_other.to(tl.int32), 0)
            i_granule += tl.sum(tl.where(m_split, 0, num_own), 0)

        # What fills the last steps is loaded, from rows that the block sees, but masked.
        o_fill = tl.arange(0, 8)
        m_fill = num_granules + o_fill < granule_steps * 8
        tl.store(p_granules + num_granules + o_fill, last_row, mask=m_fill)
        tl.store(p_granule_mask + num_granules + o_fill, tl.zeros([8], tl.uint8), mask=m_fill)
        if num_boxes % 2 == 1:
            tl.store(p_rows + num_boxes, last_row)
            tl.store(p_mask + num_boxes * 4 + tl.arange(0, 4), tl.zeros([4], tl.uint8))
