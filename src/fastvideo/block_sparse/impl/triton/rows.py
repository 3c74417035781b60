"""Rows for the Triton kernels: those that a program owns, those of a step of its walk, and blocks of them in memory.

Names: `i_` indices, `o_` offsets, `m_` masks, `p_` pointers, `b_` values of a block, `s_` strides in elements.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (the types of kernel arguments are Triton's, not Python's)

import triton
import triton.language as tl


@triton.jit
def own_rows(i_tile, i_piece, offsets, TILE: tl.constexpr, UNIFORM: tl.constexpr, BLOCK: tl.constexpr):
    """Packed rows of one piece of a tile, and which of them are real."""
    o_inside = i_piece * BLOCK + tl.arange(0, BLOCK)
    if UNIFORM:
        i_start = i_tile * TILE
        m_rows = o_inside < TILE
    else:
        i_start = tl.load(offsets + i_tile)
        m_rows = o_inside < tl.load(offsets + i_tile + 1) - i_start
    return i_start + o_inside, m_rows


@triton.jit
def num_steps(num_listed, TILE: tl.constexpr, SLOT: tl.constexpr, BLOCK: tl.constexpr):
    """Steps of a walk over `num_listed` tiles."""
    PIECES: tl.constexpr = (TILE + BLOCK - 1) // BLOCK
    return tl.cdiv(num_listed * PIECES, BLOCK // SLOT)


@triton.jit
def step_rows(
    i_step, p_list, num_listed, offsets, TILE: tl.constexpr, SLOT: tl.constexpr, UNIFORM: tl.constexpr, BLOCK: tl.constexpr
):
    """Packed rows of one step of a walk, as a first row and distances from it, and which of them are real."""
    if SLOT == BLOCK:
        PIECES: tl.constexpr = (TILE + BLOCK - 1) // BLOCK
        i_tile = tl.load(p_list + i_step // PIECES)
        i_first = i_step % PIECES * BLOCK
        o_row = tl.arange(0, BLOCK)
        if UNIFORM:
            m_rows = i_first + o_row < TILE
            i_first += i_tile * TILE
        else:
            i_start = tl.load(offsets + i_tile)
            m_rows = i_first + o_row < tl.load(offsets + i_tile + 1) - i_start
            i_first += i_start
    else:
        i_first = 0
        o_block = tl.arange(0, BLOCK)
        o_entry = i_step * (BLOCK // SLOT) + o_block // SLOT
        o_inside = o_block % SLOT
        m_rows = o_entry < num_listed
        o_tile = tl.load(p_list + o_entry, mask=m_rows, other=0)
        if UNIFORM:
            o_row = o_tile * TILE + o_inside
            m_rows = m_rows & (o_inside < TILE)
        else:
            o_start = tl.load(offsets + o_tile)
            o_row = o_start + o_inside
            m_rows = m_rows & (o_inside < tl.load(offsets + o_tile + 1) - o_start)
    return i_first, o_row, m_rows


@triton.jit
def tokens(order, o_packed, m_rows):
    """Tokens of packed rows, int64."""
    o_token = o_packed if order is None else tl.load(order + o_packed, mask=m_rows, other=0)
    return o_token.to(tl.int64)


@triton.jit
def step_tokens(order, i_first, o_row, m_rows):
    """Tokens of one step, likewise. Without an order distances are the same in every step, and addresses one addition."""
    if order is None:
        i_first_token, o_token = tl.cast(i_first, tl.int64), o_row.to(tl.int64)
    else:
        i_first_token, o_token = 0, tokens(order, i_first + o_row, m_rows)
    return i_first_token, o_token


@triton.jit
def load_block(p_base, o_token, s_token, m_rows, HEAD_SIZE: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    """Rows `[BLOCK, D]` of a tensor; what is not real is 0 and not read."""
    o_d = tl.arange(0, D)
    p_block = p_base + (o_token[:, None] * s_token + o_d[None, :])
    if HEAD_SIZE != D:
        b_block = tl.load(p_block, mask=m_rows[:, None] & (o_d < HEAD_SIZE)[None, :], other=0.0)
    elif MASKED:
        b_block = tl.load(p_block, mask=m_rows[:, None], other=0.0)
    else:
        b_block = tl.load(p_block)
    return b_block


@triton.jit
def store_block(p_base, o_token, s_token, m_rows, b_block, HEAD_SIZE: tl.constexpr, D: tl.constexpr):
    o_d = tl.arange(0, D)
    p_block = p_base + o_token[:, None] * s_token + o_d[None, :]
    tl.store(p_block, b_block.to(p_base.dtype.element_ty), mask=m_rows[:, None] & (o_d < HEAD_SIZE)[None, :])
