"""Triton kernels of the selection: coarse scores into a scratch, and the exact top-k of its rows as ascending lists.

Scores are fp32 products of fp32 means, in three TF32 products where the hardware has them. The top-k halves an interval of
order-preserving integers until exactly `K` of them lie above it, or only ties are left, which go to the lowest index.
One program reads its row once and keeps it in registers.

Names: `i_` indices, `o_` offsets, `m_` masks, `b_` values of a block, `s_` strides in elements.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (the types of kernel arguments are Triton's, not Python's)

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK, _BLOCK_D = 64, 64


@triton.jit(do_not_specialize=["I_LIST", "I_ROW", "NUM_ROWS", "NUM_TILES", "HEADS", "GROUP"])
def coarse_scores_kernel(
    query,
    key,
    scores,
    s_qb,
    s_qn,
    s_qh,
    s_kb,
    s_kn,
    s_kh,
    scale,
    I_LIST,
    I_ROW,
    NUM_ROWS,
    NUM_TILES,
    HEADS,
    GROUP,
    HEAD_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores `[lists, NUM_ROWS, NUM_TILES]` of the query tiles from `I_ROW` on, of the heads (of samples) from `I_LIST` on."""
    num_row_blocks, num_key_blocks = tl.cdiv(NUM_ROWS, BLOCK), tl.cdiv(NUM_TILES, BLOCK)
    i_list = (tl.program_id(0) // (num_row_blocks * num_key_blocks)).to(tl.int64)
    i_block = tl.program_id(0) % (num_row_blocks * num_key_blocks)
    i_b, i_h = (I_LIST + i_list) // HEADS, (I_LIST + i_list) % HEADS
    o_row = (i_block // num_key_blocks) * BLOCK + tl.arange(0, BLOCK)
    o_key = (i_block % num_key_blocks) * BLOCK + tl.arange(0, BLOCK)
    m_row, m_key = o_row < NUM_ROWS, o_key < NUM_TILES
    p_query = query + i_b * s_qb + i_h * s_qh + (I_ROW + o_row).to(tl.int64)[:, None] * s_qn
    p_key = key + i_b * s_kb + (i_h // GROUP) * s_kh + o_key.to(tl.int64)[None, :] * s_kn
    b_scores = tl.zeros([BLOCK, BLOCK], tl.float32)
    for i_d in range(0, HEAD_SIZE, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)
        m_d = o_d < HEAD_SIZE
        b_query = tl.load(p_query + o_d[None, :], mask=m_row[:, None] & m_d[None, :], other=0.0) * scale
        b_key = tl.load(p_key + o_d[:, None], mask=m_d[:, None] & m_key[None, :], other=0.0)
        b_scores = tl.dot(b_query, b_key, b_scores, input_precision=PRECISION)
    o_score = (i_list * NUM_ROWS + o_row)[:, None] * NUM_TILES + o_key[None, :]
    tl.store(scores + o_score, b_scores, mask=m_row[:, None] & m_key[None, :])


@triton.jit(do_not_specialize=["NUM_COLUMNS", "K"])
def top_k_kernel(scores, indices, NUM_COLUMNS, K, COLUMNS: tl.constexpr):
    """The `K` highest of each row of `[rows, NUM_COLUMNS]`, ascending: `[rows, K]`; NaN ranks below -inf, -0 equals +0."""
    i_row = tl.program_id(0).to(tl.int64)
    o_column = tl.arange(0, COLUMNS)
    m_column = o_column < NUM_COLUMNS
    b_score = tl.load(scores + i_row * NUM_COLUMNS + o_column, mask=m_column, other=float("nan"))
    b_bits = tl.where(b_score == 0.0, 0.0, b_score).to(tl.int32, bitcast=True)
    # Integers in the order of the floats; the lowest integer is that of NaN, and of what is no column.
    b_rank = tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)
    b_rank = tl.where(b_score == b_score, b_rank, -2147483648)
    # At least K columns rank `i_low` or higher, fewer than K rank `i_high` or higher.
    i_low = tl.min(tl.where(m_column, b_rank, 2147483647), 0).to(tl.int64)
    i_high = tl.max(b_rank, 0).to(tl.int64) + 1
    num_above = NUM_COLUMNS
    while (num_above != K) & (i_high - i_low > 1):
        i_middle = (i_low + i_high) >> 1
        num_from_middle = tl.sum((b_rank >= i_middle.to(tl.int32)).to(tl.int32), 0)
        is_enough = num_from_middle >= K
        num_above = tl.where(is_enough, num_from_middle, num_above)
        i_low = tl.where(is_enough, i_middle, i_low)
        i_high = tl.where(is_enough, i_high, i_middle)
    i_last = i_low.to(tl.int32)
    m_above = b_rank > i_last
    m_tie = m_column & (b_rank == i_last)
    num_ties = K - tl.sum(m_above.to(tl.int32), 0)
    # One scan counts both; neither count reaches 2 ** 15.
    b_counts = tl.cumsum(m_above.to(tl.int32) + (m_tie.to(tl.int32) << 15), 0)
    b_ties = b_counts >> 15
    o_entry = (b_counts & 0x7FFF) + tl.minimum(b_ties, num_ties) - 1
    m_kept = m_above | (m_tie & (b_ties <= num_ties))
    tl.store(indices + i_row * K + o_entry, o_column, mask=m_kept)


def launch_scores(query: Tensor, key: Tensor, scores: Tensor, first_list: int, first_row: int, scale: float) -> None:
    """Fill `scores`, `[lists, rows, N]`, times `scale`, from means `[B, N, Hq, D]` and `[B, N, Hkv, D]`.

    A list is a head of a sample.
    """
    num_lists, num_rows, num_tiles = scores.shape
    num_heads, head_size = query.shape[2:]
    num_programs = num_lists * -(-num_rows // _BLOCK) * -(-num_tiles // _BLOCK)
    coarse_scores_kernel[(num_programs,)](
        query,
        key,
        scores,
        *query.stride()[:3],
        *key.stride()[:3],
        float(scale),
        I_LIST=first_list,
        I_ROW=first_row,
        NUM_ROWS=num_rows,
        NUM_TILES=num_tiles,
        HEADS=num_heads,
        GROUP=num_heads // key.shape[2],
        HEAD_SIZE=head_size,
        BLOCK=_BLOCK,
        BLOCK_D=min(_BLOCK_D, max(16, 1 << (head_size - 1).bit_length())),
        PRECISION="ieee" if torch.version.hip else "tf32x3",
        num_warps=4,
        num_stages=2,
    )


def top_k_warps(num_columns: int) -> int:
    """Warps of a program that holds a row of `num_columns` scores: 32 scores a thread."""
    return max(1, (1 << (num_columns - 1).bit_length()) // 1024)


def launch_top_k(scores: Tensor, indices: Tensor) -> None:
    """Fill `indices`, `[rows, k]` int32, with the k highest of each row of `scores`, `[rows, N]` fp32; both contiguous."""
    num_rows, num_columns = scores.shape
    top_k_kernel[(num_rows,)](
        scores,
        indices,
        num_columns,
        indices.shape[1],
        COLUMNS=max(32, 1 << (num_columns - 1).bit_length()),
        num_warps=top_k_warps(num_columns),
    )
