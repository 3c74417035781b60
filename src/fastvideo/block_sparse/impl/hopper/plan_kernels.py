"""The kernels that make plans (`plan.py`): from lists for blocks of one tile, from marks of pairs of tiles for others.

`plan_lists_kernel` reads the list of its block's tile and, for shared steps, looks its entries up in the list of the block's
partner. `plan_marks_kernel` first makes such a list, of the tiles that some tile of its block has marked: that gives the union
of several tiles' lists, and lists by key, in ascending order. From there on work goes with what is listed.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (the types of kernel arguments are Triton's, not Python's)

import triton
import triton.language as tl

from fastvideo.block_sparse.impl.hopper.plan_walks import plan_list


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
        plan_list(
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
    lists,
    block_tiles,
    own_counts,
    offsets,
    piece_row,
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
        plan_list(
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
