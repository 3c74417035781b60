"""How a list of what a block meets becomes its walk (`plan.py`): counted, given its places, and written.

Places are taken from one scan: up to CHUNK entries stay in registers between counting and writing; longer lists are read
twice, a chunk at a time.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (the types of kernel arguments are Triton's, not Python's)

import triton
import triton.language as tl

from fastvideo.block_sparse.impl.hopper.packing import piece_size

# Three counts share an int64: of boxes that come first, of other boxes, of granules. A box holds more than 48 tokens, so that
# 20 bits are enough for 50 million.
_FIELD = tl.constexpr(20)
_FIELD_MASK = tl.constexpr((1 << 20) - 1)


@triton.jit
def _counted(m_first, m_other, num_granules):
    """What entries add to the three counts."""
    return m_first.to(tl.int64) + (m_other.to(tl.int64) << _FIELD) + (num_granules.to(tl.int64) << (2 * _FIELD))


@triton.jit
def _begin_walk(total, num_common, least_shared, used, p_meta, MASKS_ALL: tl.constexpr):
    """Take what a walk needs of the buffers and describe it in its row of `meta`.

    Where the buffers are taken depends on chance, what is read from them doesn't.
    """
    num_first = (total & _FIELD_MASK).to(tl.int32)
    num_boxes = num_first + ((total >> _FIELD) & _FIELD_MASK).to(tl.int32)
    num_granules = (total >> (2 * _FIELD)).to(tl.int32)
    # Whole steps to each ring. Both partners count the same common boxes.
    num_shared = num_common // 4 * 4
    num_shared = tl.where(num_shared >= least_shared, num_shared, 0)
    # An odd box joins the granules if there are any: that is never more steps.
    is_split = (num_boxes % 2 == 1) & (num_granules > 0)
    num_boxes -= tl.where(is_split, 1, 0)
    num_granules += tl.where(is_split, 4, 0)
    clean_steps = tl.minimum(num_first, num_boxes) // 2
    if MASKS_ALL:
        clean_steps *= 0
    box_steps = (num_boxes + 1) // 2
    granule_steps = (num_granules + 7) // 8
    steps = box_steps + granule_steps
    halves = tl.where(num_granules > 0, box_steps * 2 + (num_granules + 3) // 4, num_boxes)
    o_rows = tl.atomic_add(used, box_steps * 2 - num_shared // 2 + granule_steps * 8)
    o_masks = tl.atomic_add(used + 1, (steps - clean_steps) * 2)
    tl.store(p_meta, o_rows)
    tl.store(p_meta + 1, o_masks)
    tl.store(p_meta + 2, clean_steps)
    tl.store(p_meta + 3, box_steps)
    tl.store(p_meta + 4, steps)
    tl.store(p_meta + 5, halves)
    tl.store(p_meta + 6, num_shared // 2)
    tl.store(p_meta + 7, steps - num_shared // 4)
    return o_rows, o_masks, num_first, num_boxes, num_granules, num_shared, clean_steps, box_steps, granule_steps


@triton.jit
def _write(
    b_seen,
    size,
    b_row,
    b_count,
    m_common,
    counted,
    num_common,
    parity,
    p_rows,
    p_granules,
    p_mask,
    p_granule_mask,
    num_first,
    num_boxes,
    num_granules,
    num_shared,
    clean_steps,
):
    """Write the entries of pieces, before which `counted` and `num_common` have been; shared boxes go to two rings in turn."""
    b_place = counted + tl.cumsum(b_count, 0) - b_count
    m_first = (b_count & _FIELD_MASK) != 0
    m_box = m_first | (((b_count >> _FIELD) & _FIELD_MASK) != 0)
    o_first = (b_place & _FIELD_MASK).to(tl.int32)
    m_shared = m_common & (size < 0)
    if num_shared > 0:
        i_common = num_common + tl.cumsum(m_common.to(tl.int32), 0) - m_common.to(tl.int32)
        m_shared = m_common & (i_common < num_shared)
        o_first = tl.where(m_shared, i_common, o_first + num_shared - tl.minimum(i_common, num_shared))
    o_box = tl.where(m_first, o_first, num_first + ((b_place >> _FIELD) & _FIELD_MASK).to(tl.int32))
    # The odd box is the last of all boxes; its granules are the last too.
    m_split = m_box & (o_box >= num_boxes)
    m_box = m_box & ~m_split
    o_row = tl.where(m_shared, o_box // 4 * 2 + o_box % 2, o_box - num_shared // 2)
    tl.store(p_rows + o_row, b_row, mask=m_box & (~m_shared | (o_box // 2 % 2 == parity)))
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


@triton.jit
def _places(rows, masks, i_head, s_rows, s_masks, o_rows, o_masks, num_shared, clean_steps, box_steps):
    """Where the entries of a walk and its granules lie, and the bytes of their masks.

    Masks begin with half step 0, which may lie before the first masked one.
    """
    p_rows = rows + i_head * s_rows + o_rows
    p_mask = (masks + i_head * s_masks + o_masks).to(tl.pointer_type(tl.uint8)) - clean_steps * 8
    return p_rows, p_rows + box_steps * 2 - num_shared // 2, p_mask, p_mask + box_steps * 8


@triton.jit
def _end_walk(p_rows, p_granules, p_mask, p_granule_mask, num_boxes, num_granules, num_shared, granule_steps, last_row):
    """Fill up the last steps: what is loaded there are rows that the block sees, but masked."""
    o_fill = tl.arange(0, 8)
    m_fill = num_granules + o_fill < granule_steps * 8
    tl.store(p_granules + num_granules + o_fill, last_row, mask=m_fill)
    tl.store(p_granule_mask + num_granules + o_fill, tl.zeros([8], tl.uint8), mask=m_fill)
    if num_boxes % 2 == 1:
        tl.store(p_rows + num_boxes - num_shared // 2, last_row)
        tl.store(p_mask + num_boxes * 4 + tl.arange(0, 4), tl.zeros([4], tl.uint8))


@triton.jit
def _is_listed(p_list, count, i_tile, m_entry, DEPTH: tl.constexpr):
    """Which tiles an ascending list holds; it has less than `2 ** DEPTH` entries."""
    num_before = tl.zeros_like(i_tile)
    for i_turn in tl.static_range(DEPTH):
        i_next = num_before + (1 << (DEPTH - 1 - i_turn))
        m_next = m_entry & (i_next <= count)
        b_tile = tl.load(p_list + i_next - 1, mask=m_next, other=0)
        num_before = tl.where(m_next & (b_tile < i_tile), i_next, num_before)
    m_found = m_entry & (num_before < count)
    return m_found & (tl.load(p_list + num_before, mask=m_found, other=-1) == i_tile)


@triton.jit
def _read(
    p_list,
    count,
    p_other,
    other_count,
    offsets,
    piece_row,
    o_entry,
    PIECES: tl.constexpr,
    PIECE_ROWS: tl.constexpr,
    CLEAN: tl.constexpr,
    IS_EVEN: tl.constexpr,
    IS_JOINT: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """What sees listed pieces, their sizes and rows, what each adds to the counts, and which boxes the partner sees too.

    A list holds tiles, or without DEPTH what `_list_marked` makes.
    """
    m_entry = o_entry < count * PIECES
    b_entry = tl.load(p_list + o_entry // PIECES, mask=m_entry, other=0)
    b_seen = tl.full(o_entry.shape, 15, tl.int32)
    i_tile = b_entry
    if DEPTH == 0:
        b_seen = b_entry >> 24 & 15
        i_tile = b_entry & 0xFFFFFF
    i_piece = i_tile * PIECES + o_entry % PIECES
    if IS_EVEN:
        size = tl.where(m_entry, PIECE_ROWS, 0)
        b_row = tl.where(m_entry, i_piece * 64, 0)
    else:
        size = piece_size(offsets, i_piece, m_entry, PIECES, PIECE_ROWS)
        b_row = tl.load(piece_row + i_piece, mask=size > 0, other=0)
    m_box = size > 48
    if IS_JOINT:
        # All steps have masks, whoever sees the box.
        m_first = m_box
        m_common = m_box & (b_entry >> 28 != 0)
    else:
        m_first = (size >= CLEAN) & (b_seen == 15)
        m_common = m_first & (size < 0)
        if DEPTH > 0:
            m_common = m_first & _is_listed(p_other, other_count, i_tile, m_first, DEPTH)
    num_granules = tl.where(m_box, 0, (size + 15) // 16)
    return b_seen, size, b_row, _counted(m_first, m_box & ~m_first, num_granules), m_common


@triton.jit
def plan_list(
    p_list,
    count,
    p_other,
    other_count,
    offsets,
    piece_row,
    rows,
    masks,
    p_meta,
    used,
    i_head,
    s_rows,
    s_masks,
    parity,
    least_shared,
    PIECES: tl.constexpr,
    PIECE_ROWS: tl.constexpr,
    CLEAN: tl.constexpr,
    IS_EVEN: tl.constexpr,
    IS_JOINT: tl.constexpr,
    DEPTH: tl.constexpr,
    CHUNK: tl.constexpr,
    IS_ONE_CHUNK: tl.constexpr,
):
    """Count what a list makes of boxes and granules, take that much of the buffers, and write it in ascending order."""
    o_chunk = tl.arange(0, CHUNK)
    b_seen, size, b_row, b_count, m_common = _read(
        p_list,
        count,
        p_other,
        other_count,
        offsets,
        piece_row,
        o_chunk,
        PIECES,
        PIECE_ROWS,
        CLEAN,
        IS_EVEN,
        IS_JOINT,
        DEPTH,
    )
    total = tl.sum(b_count, 0)
    num_common = tl.sum(m_common.to(tl.int32), 0)
    last_row = tl.max(b_row, 0)
    counted, common = total, num_common
    if not IS_ONE_CHUNK:
        for i_first in range(CHUNK, count * PIECES, CHUNK):
            _seen, _size, b_more, b_counted, m_more = _read(
                p_list,
                count,
                p_other,
                other_count,
                offsets,
                piece_row,
                i_first + o_chunk,
                PIECES,
                PIECE_ROWS,
                CLEAN,
                IS_EVEN,
                IS_JOINT,
                DEPTH,
            )
            total += tl.sum(b_counted, 0)
            num_common += tl.sum(m_more.to(tl.int32), 0)
            last_row = tl.maximum(last_row, tl.max(b_more, 0))
    o_rows, o_masks, num_first, num_boxes, num_granules, num_shared, clean_steps, box_steps, granule_steps = _begin_walk(
        total, num_common, least_shared, used + i_head * 3, p_meta, IS_JOINT
    )
    p_rows, p_granules, p_mask, p_granule_mask = _places(
        rows, masks, i_head, s_rows, s_masks, o_rows, o_masks, num_shared, clean_steps, box_steps
    )
    _write(
        b_seen,
        size,
        b_row,
        b_count,
        m_common,
        0,
        0,
        parity,
        p_rows,
        p_granules,
        p_mask,
        p_granule_mask,
        num_first,
        num_boxes,
        num_granules,
        num_shared,
        clean_steps,
    )
    if not IS_ONE_CHUNK:
        for i_first in range(CHUNK, count * PIECES, CHUNK):
            b_seen, size, b_row, b_count, m_common = _read(
                p_list,
                count,
                p_other,
                other_count,
                offsets,
                piece_row,
                i_first + o_chunk,
                PIECES,
                PIECE_ROWS,
                CLEAN,
                IS_EVEN,
                IS_JOINT,
                DEPTH,
            )
            _write(
                b_seen,
                size,
                b_row,
                b_count,
                m_common,
                counted,
                common,
                parity,
                p_rows,
                p_granules,
                p_mask,
                p_granule_mask,
                num_first,
                num_boxes,
                num_granules,
                num_shared,
                clean_steps,
            )
            counted += tl.sum(b_count, 0)
            common += tl.sum(m_common.to(tl.int32), 0)
    _end_walk(p_rows, p_granules, p_mask, p_granule_mask, num_boxes, num_granules, num_shared, granule_steps, last_row)
