"""The kernels that make plans (`plan.py`): from lists for blocks of one tile, from marks of pairs of tiles for others.

`plan_lists_kernel` reads the list of its block's tile and, for shared steps, looks its entries up in the list of the block's
partner. `plan_marks_kernel` first makes such a list, of the tiles that some tile of its block has marked: that gives the union
of several tiles' lists, and lists by key, in ascending order. From there on work goes with what is listed.

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
def _list_place(i_head, i_tile, s_b, s_h, first_head, HEADS, WIDTH):
    i_b, i_h = ((first_head + i_head) // HEADS).to(tl.int64), ((first_head + i_head) % HEADS).to(tl.int64)
    return i_b * s_b + i_h * s_h + i_tile.to(tl.int64) * WIDTH


@triton.jit(do_not_specialize=["s_b", "s_h", "first_head", "HEADS", "WIDTH", "NUM_QUERIES", "s_marks", "s_q", "s_k"])
def mark_kernel(
    indices,
    counts,
    offsets,
    marks,
    s_b,
    s_h,
    first_head,
    HEADS,
    WIDTH,
    NUM_QUERIES,
    s_marks,
    s_q,
    s_k,
    PIECE_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Set the bytes of one list to 1; with `offsets` of queries only if a piece of the tile may share a block with others."""
    i_q, i_head = tl.program_id(0) % NUM_QUERIES, tl.program_id(0) // NUM_QUERIES
    o_list = _list_place(i_head, i_q, s_b, s_h, first_head, HEADS, WIDTH)
    num_listed = WIDTH
    if counts is not None:
        num_listed = tl.load(counts + o_list // WIDTH)
    if offsets is not None:
        size = tl.load(offsets + i_q + 1) - tl.load(offsets + i_q)
        num_listed = tl.where((size - 1) % PIECE_ROWS < 32, num_listed, 0)
    p_marks = marks + i_head.to(tl.int64) * s_marks + i_q.to(tl.int64) * s_q
    for i_first in range(0, num_listed, BLOCK):
        o_entry = i_first + tl.arange(0, BLOCK)
        m_entry = o_entry < num_listed
        i_k = tl.load(indices + o_list + o_entry, mask=m_entry, other=0).to(tl.int64)
        tl.store(p_marks + i_k * s_k, tl.full([BLOCK], 1, tl.uint8), mask=m_entry)


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
def _plan_list(
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


@triton.jit(
    do_not_specialize=[
        *("s_b", "s_h", "first_head", "HEADS", "WIDTH", "max_blocks", "s_rows", "s_masks", "least_shared"),
    ]
)
def plan_lists_kernel(
    indices,
    counts,
    block_tiles,
    own_counts,
    offsets,
    piece_row,
    rows,
    masks,
    meta,
    used,
    s_b,
    s_h,
    first_head,
    HEADS,
    WIDTH,
    max_blocks,
    s_rows,
    s_masks,
    least_shared,
    PIECES: tl.constexpr,
    PIECE_ROWS: tl.constexpr,
    CLEAN: tl.constexpr,
    IS_EVEN: tl.constexpr,
    DEPTH: tl.constexpr,
    CHUNK: tl.constexpr,
    IS_ONE_CHUNK: tl.constexpr,
):
    """Plan a block of one tile from its list and its partner's, with IS_EVEN where piece `i` is at row `64 i`."""
    i_block, i_head = tl.program_id(0) % max_blocks, (tl.program_id(0) // max_blocks).to(tl.int64)
    num_joint, num_blocks = tl.load(own_counts), tl.load(own_counts + 1)
    if (i_block >= num_joint) & (i_block < num_blocks):
        parity = (i_block - num_joint) % 2
        i_partner = i_block + 1 - 2 * parity
        i_tile = tl.load(block_tiles + i_block * 4)
        i_other = tl.load(block_tiles + i_partner * 4, mask=i_partner < num_blocks, other=0)
        o_list = _list_place(i_head, i_tile, s_b, s_h, first_head, HEADS, WIDTH)
        o_other = _list_place(i_head, i_other, s_b, s_h, first_head, HEADS, WIDTH)
        count, other_count = WIDTH, WIDTH
        if counts is not None:
            count, other_count = tl.load(counts + o_list // WIDTH), tl.load(counts + o_other // WIDTH)
        _plan_list(
            indices + o_list,
            count,
            indices + o_other,
            tl.where(i_partner < num_blocks, other_count, 0),
            offsets,
            piece_row,
            rows,
            masks,
            meta + tl.program_id(0).to(tl.int64) * 8,
            used,
            i_head,
            s_rows,
            s_masks,
            parity,
            least_shared,
            PIECES,
            PIECE_ROWS,
            CLEAN,
            IS_EVEN,
            False,
            DEPTH,
            CHUNK,
            IS_ONE_CHUNK,
        )


@triton.jit
def _seen_by(p_marks, p_tiles, s_own, i_walked, m_walked):
    """Which granules of the own block (bits 0 to 3) see the tiles; granules without a tile count as seeing what others see."""
    i_first = tl.load(p_tiles)
    b_mark = tl.load(p_marks + i_first.to(tl.int64) * s_own * 16 + i_walked, mask=m_walked, other=0)
    # A block of one tile, which most are.
    b_seen = tl.where(b_mark != 0, 15, 0)
    if tl.load(p_tiles + 3) != i_first:
        b_seen = tl.where(b_mark != 0, 1, 0)
        absent = 0
        for i_slot in tl.static_range(1, 4):
            i_tile = tl.load(p_tiles + i_slot)
            absent |= tl.where(i_tile < 0, 1 << i_slot, 0)
            p_list = p_marks + tl.maximum(i_tile, 0).to(tl.int64) * s_own * 16
            b_mark = tl.load(p_list + i_walked, mask=m_walked, other=0)
            b_seen |= tl.where((b_mark != 0) & (i_tile >= 0), 1 << i_slot, 0)
        b_seen = tl.where(b_seen != 0, b_seen | absent, 0)
    return b_seen


@triton.jit
def _list_marked(p_marks, p_tiles, p_others, s_own, i_first, IS_JOINT: tl.constexpr, CHUNK: tl.constexpr):
    """Of CHUNK tiles: entries of those that the block sees, and which these are.

    An entry is a tile, what of the block sees it from bit 24 on, and in bit 28 whether the partner does.
    """
    i_walked = i_first + tl.arange(0, CHUNK)
    # Rows are padded, so that a thread reads its marks at once.
    m_walked = i_walked // 16 < s_own
    b_seen = _seen_by(p_marks, p_tiles, s_own, i_walked, m_walked)
    b_entry = i_walked | b_seen << 24
    if IS_JOINT:
        b_entry |= tl.where(_seen_by(p_marks, p_others, s_own, i_walked, m_walked) != 0, 1 << 28, 0)
    return b_entry, b_seen != 0


@triton.jit(do_not_specialize=["max_blocks", "num_walked", "s_marks", "s_own", "s_lists", "s_rows", "s_masks", "least_shared"])
def plan_marks_kernel(
    marks,
    block_tiles,
    own_counts,
    offsets,
    piece_row,
    lists,
    rows,
    masks,
    meta,
    used,
    max_blocks,
    num_walked,
    s_marks,
    s_own,
    s_lists,
    s_rows,
    s_masks,
    least_shared,
    PIECES: tl.constexpr,
    PIECE_ROWS: tl.constexpr,
    CLEAN: tl.constexpr,
    IS_JOINT: tl.constexpr,
    MARK_CHUNK: tl.constexpr,
    IS_ONE_CHUNK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Plan a block from marks: with IS_JOINT blocks of several tiles and their partners, else all, without shared steps.

    Rows of marks are `16 * s_own` apart and padded with zeros.
    """
    i_block, i_head = tl.program_id(0) % max_blocks, (tl.program_id(0) // max_blocks).to(tl.int64)
    num_blocks = tl.load(own_counts + (0 if IS_JOINT else 1))
    if i_block < num_blocks:
        parity = i_block % 2
        i_partner = i_block + 1 - 2 * parity
        p_marks = marks + i_head * s_marks * 16
        p_tiles = block_tiles + i_block * 4
        p_others = block_tiles + tl.where(i_partner < num_blocks, i_partner, i_block) * 4
        b_entry, m_seen = _list_marked(p_marks, p_tiles, p_others, s_own, 0, IS_JOINT, MARK_CHUNK)
        b_place = tl.cumsum(m_seen.to(tl.int32), 0)
        num_first = tl.max(b_place, 0)
        count = num_first
        if not IS_ONE_CHUNK:
            for i_first in range(MARK_CHUNK, num_walked, MARK_CHUNK):
                _entry, m_more = _list_marked(p_marks, p_tiles, p_others, s_own, i_first, IS_JOINT, MARK_CHUNK)
                count += tl.sum(m_more.to(tl.int32), 0)
        p_list = lists + i_head * s_lists + tl.atomic_add(used + i_head * 3 + 2, count)
        tl.store(p_list + b_place - 1, b_entry, mask=m_seen)
        if not IS_ONE_CHUNK:
            for i_first in range(MARK_CHUNK, num_walked, MARK_CHUNK):
                b_entry, m_seen = _list_marked(p_marks, p_tiles, p_others, s_own, i_first, IS_JOINT, MARK_CHUNK)
                b_place = num_first + tl.cumsum(m_seen.to(tl.int32), 0)
                tl.store(p_list + b_place - 1, b_entry, mask=m_seen)
                num_first += tl.sum(m_seen.to(tl.int32), 0)
        # Other threads of the program read what one has written.
        tl.debug_barrier()
        _plan_list(
            p_list,
            count,
            p_list,
            0,
            offsets,
            piece_row,
            rows,
            masks,
            meta + tl.program_id(0).to(tl.int64) * 8,
            used,
            i_head,
            s_rows,
            s_masks,
            parity,
            tl.where(i_partner < num_blocks, least_shared, 1 << 30),
            PIECES,
            PIECE_ROWS,
            CLEAN,
            False,
            IS_JOINT,
            0,
            CHUNK,
            False,
        )
