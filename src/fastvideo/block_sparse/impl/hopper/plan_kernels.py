"""The kernels that make plans (`plan.py`): copy lists that lie as they are walked, mark pairs of tiles, plan from marks.

`plan_marks_kernel` reads marks once and takes places from one scan: up to CHUNK pieces stay in registers between counting
and writing; longer sides are read twice, a chunk at a time.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (the types of kernel arguments are Triton's, not Python's)

import triton
import triton.language as tl

from fastvideo.block_sparse.impl.hopper.packing import piece_size

# Three counts share an int64: of boxes without a mask, of other boxes, of granules. A box holds more than 48 tokens, so that
# 20 bits are enough for 50 million.
_FIELD = tl.constexpr(20)
_FIELD_MASK = tl.constexpr((1 << 20) - 1)


@triton.jit
def _list_place(i_head, i_tile, s_b, s_h, first_head, HEADS, WIDTH):
    i_b, i_h = ((first_head + i_head) // HEADS).to(tl.int64), ((first_head + i_head) % HEADS).to(tl.int64)
    return i_b * s_b + i_h * s_h + i_tile.to(tl.int64) * WIDTH


@triton.jit(do_not_specialize=["s_b", "s_h", "first_head", "HEADS", "WIDTH", "max_blocks", "s_rows"])
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
    i_first = tl.load(p_tiles)
    b_mark = tl.load(p_marks + i_first.to(tl.int64) * NUM_WALKED + i_walked, mask=m_piece, other=0)
    # A block of one tile, which most are.
    b_seen = tl.where(b_mark != 0, 15, 0)
    if tl.load(p_tiles + 3) != i_first:
        b_seen = tl.where(b_mark != 0, 1, 0)
        absent = 0
        for i_slot in tl.static_range(1, 4):
            i_tile = tl.load(p_tiles + i_slot)
            absent |= tl.where(i_tile < 0, 1 << i_slot, 0)
            p_list = p_marks + tl.maximum(i_tile, 0).to(tl.int64) * NUM_WALKED
            b_mark = tl.load(p_list + i_walked, mask=m_piece, other=0)
            b_seen |= tl.where((b_mark != 0) & (i_tile >= 0), 1 << i_slot, 0)
        b_seen = tl.where(b_seen != 0, b_seen | absent, 0)
    return b_seen


@triton.jit
def _read(
    p_marks,
    p_tiles,
    offsets,
    piece_row,
    i_piece,
    num_pieces,
    NUM_WALKED,
    PIECES: tl.constexpr,
    PIECE_ROWS: tl.constexpr,
    CLEAN: tl.constexpr,
):
    """What sees pieces, their sizes and rows, and what each adds to the three counts."""
    m_piece = i_piece < num_pieces
    size = piece_size(offsets, i_piece, m_piece, PIECES, PIECE_ROWS)
    b_seen = _seen_by(p_marks, p_tiles, NUM_WALKED, i_piece // PIECES, m_piece)
    m_meet = (b_seen != 0) & (size > 0)
    b_row = tl.load(piece_row + i_piece, mask=m_meet, other=0)
    m_clean = m_meet & (size >= CLEAN) & (b_seen == 15)
    m_other = m_meet & (size > 48) & ~m_clean
    num_granules = tl.where(m_meet & (size <= 48), (size + 15) // 16, 0).to(tl.int64)
    b_count = m_clean.to(tl.int64) + (m_other.to(tl.int64) << _FIELD) + (num_granules << (2 * _FIELD))
    return b_seen, size, b_row, b_count


@triton.jit
def _write(
    b_seen,
    size,
    b_row,
    b_count,
    counted,
    p_rows,
    p_granules,
    p_mask,
    p_granule_mask,
    num_clean,
    num_boxes,
    num_granules,
    clean_steps,
):
    """Write the entries of pieces, before which `counted` have been."""
    b_place = counted + tl.cumsum(b_count, 0) - b_count
    m_clean = (b_count & _FIELD_MASK) != 0
    m_box = m_clean | (((b_count >> _FIELD) & _FIELD_MASK) != 0)
    o_other = num_clean + ((b_place >> _FIELD) & _FIELD_MASK).to(tl.int32)
    o_box = tl.where(m_clean, (b_place & _FIELD_MASK).to(tl.int32), o_other)
    # The odd box is the last of all boxes; its granules are the last too.
    m_split = m_box & (o_box >= num_boxes)
    m_box = m_box & ~m_split
    tl.store(p_rows + o_box, b_row, mask=m_box)
    if clean_steps * 2 < num_boxes:
        word = b_seen * 0x01010101 | (tl.minimum(64 - size, 15) << 28)
        tl.store(p_mask.to(tl.pointer_type(tl.int32)) + o_box, word, mask=m_box & (o_box >= clean_steps * 2))
    if num_granules > 0:
        num_own = tl.where(m_split, 4, (b_count >> (2 * _FIELD)).to(tl.int32))
        o_granule = tl.where(m_split, num_granules - 4, (b_place >> (2 * _FIELD)).to(tl.int32))
        for i_part in tl.static_range(4):
            m_part = i_part < num_own
            pads = tl.minimum(tl.maximum(i_part * 16 + 16 - size, 0), 15)
            tl.store(p_granules + o_granule + i_part, b_row + i_part * 16, mask=m_part)
            tl.store(p_granule_mask + o_granule + i_part, (b_seen | (pads << 4)).to(tl.uint8), mask=m_part)


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
    IS_ONE_CHUNK: tl.constexpr,
):
    """Count what one block meets, take that much of the buffers, and write it in ascending order.

    Where the buffers are taken depends on chance, what is read from them doesn't.
    """
    i_block, i_head = tl.program_id(0) % max_blocks, (tl.program_id(0) // max_blocks).to(tl.int64)
    if i_block < tl.load(own_counts + 1):
        p_marks = marks + i_head * NUM_OWN * NUM_WALKED
        p_tiles = block_tiles + i_block * 4
        o_chunk = tl.arange(0, CHUNK)
        b_seen, size, b_row, b_count = _read(
            p_marks, p_tiles, offsets, piece_row, o_chunk, num_pieces, NUM_WALKED, PIECES, PIECE_ROWS, CLEAN
        )
        total = tl.sum(b_count, 0)
        last_row = tl.max(b_row, 0)
        if not IS_ONE_CHUNK:
            for i_first in range(CHUNK, num_pieces, CHUNK):
                _seen, _size, b_more, b_counted = _read(
                    p_marks,
                    p_tiles,
                    offsets,
                    piece_row,
                    i_first + o_chunk,
                    num_pieces,
                    NUM_WALKED,
                    PIECES,
                    PIECE_ROWS,
                    CLEAN,
                )
                total += tl.sum(b_counted, 0)
                last_row = tl.maximum(last_row, tl.max(b_more, 0))
        num_clean = (total & _FIELD_MASK).to(tl.int32)
        num_boxes = num_clean + ((total >> _FIELD) & _FIELD_MASK).to(tl.int32)
        num_granules = (total >> (2 * _FIELD)).to(tl.int32)

        # An odd box joins the granules if there are any: that is never more steps.
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
        _write(
            b_seen,
            size,
            b_row,
            b_count,
            0,
            p_rows,
            p_granules,
            p_mask,
            p_granule_mask,
            num_clean,
            num_boxes,
            num_granules,
            clean_steps,
        )
        if not IS_ONE_CHUNK:
            counted = tl.sum(b_count, 0)
            for i_first in range(CHUNK, num_pieces, CHUNK):
                b_seen, size, b_row, b_count = _read(
                    p_marks,
                    p_tiles,
                    offsets,
                    piece_row,
                    i_first + o_chunk,
                    num_pieces,
                    NUM_WALKED,
                    PIECES,
                    PIECE_ROWS,
                    CLEAN,
                )
                _write(
                    b_seen,
                    size,
                    b_row,
                    b_count,
                    counted,
                    p_rows,
                    p_granules,
                    p_mask,
                    p_granule_mask,
                    num_clean,
                    num_boxes,
                    num_granules,
                    clean_steps,
                )
                counted += tl.sum(b_count, 0)

        # What fills the last steps is loaded, from rows that the block sees, but masked.
        o_fill = tl.arange(0, 8)
        m_fill = num_granules + o_fill < granule_steps * 8
        tl.store(p_granules + num_granules + o_fill, last_row, mask=m_fill)
        tl.store(p_granule_mask + num_granules + o_fill, tl.zeros([8], tl.uint8), mask=m_fill)
        if num_boxes % 2 == 1:
            tl.store(p_rows + num_boxes, last_row)
            tl.store(p_mask + num_boxes * 4 + tl.arange(0, 4), tl.zeros([4], tl.uint8))
