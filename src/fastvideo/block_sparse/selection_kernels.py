"""Triton kernels of the selection: coarse scores into a scratch, and the exact top-k of its rows as ascending lists.

Scores are fp32 products of fp32 means, in three TF32 products where the hardware has them. The top-k narrows an interval of
floats until exactly `K` scores of the row reach its lower end, or no float lies between its ends: then scores equal to the
lower end are ties, which go to the lowest index. Where to cut is guessed, first from mean and deviation of the row, then by
interpolation between the counts at both ends; a poor guess costs time and never exactness, and after some guesses the interval
is halved. A program reads its row once and keeps it in registers while it cuts.

Names: `i_` indices, `o_` offsets, `m_` masks, `b_` values of a block, `s_` strides in elements.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
# (the types of kernel arguments are Triton's, not Python's)

import functools
from statistics import NormalDist

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvideo.platforms.triton_launch import PreparedKernel

# Launches of so many shapes are kept.
_NUM_PREPARED = 64
_BLOCK, _BLOCK_KEYS, _BLOCK_D, _WARPS, _STAGES = 64, 128, 64, 4, 1
# Cuts that may be guessed before the interval is halved: all floats take 32 halvings.
_NUM_GUESSES = tl.constexpr(16)
# Ranks of NaN, below that of -inf, and of what is above inf.
_LOWEST, _ABOVE = tl.constexpr(-0x7F800002), tl.constexpr(0x7F800001)


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
    s_score,
    scale,
    I_LIST,
    I_ROW,
    NUM_ROWS,
    NUM_TILES,
    HEADS,
    GROUP,
    HEAD_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores of the query tiles from `I_ROW` on, of the heads (of samples) from `I_LIST` on.

    They are `[lists, NUM_ROWS, NUM_TILES]`, infinite where they would be NaN; a row takes `s_score` of memory, filled up with
    NaN.
    """
    num_row_blocks, num_key_blocks = tl.cdiv(NUM_ROWS, BLOCK), tl.cdiv(NUM_TILES, BLOCK_KEYS)
    i_list = (tl.program_id(0) // (num_row_blocks * num_key_blocks)).to(tl.int64)
    i_block = tl.program_id(0) % (num_row_blocks * num_key_blocks)
    i_b, i_h = (I_LIST + i_list) // HEADS, (I_LIST + i_list) % HEADS
    o_row = (i_block // num_key_blocks) * BLOCK + tl.arange(0, BLOCK)
    o_key = (i_block % num_key_blocks) * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    m_row, m_key = o_row < NUM_ROWS, o_key < NUM_TILES
    p_query = query + i_b * s_qb + i_h * s_qh + (I_ROW + o_row).to(tl.int64)[:, None] * s_qn
    p_key = key + i_b * s_kb + (i_h // GROUP) * s_kh + o_key.to(tl.int64)[None, :] * s_kn
    b_scores = tl.zeros([BLOCK, BLOCK_KEYS], tl.float32)
    for i_d in range(0, HEAD_SIZE, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)
        m_d = o_d < HEAD_SIZE
        b_query = tl.load(p_query + o_d[None, :], mask=m_row[:, None] & m_d[None, :], other=0.0) * scale
        b_key = tl.load(p_key + o_d[:, None], mask=m_d[:, None] & m_key[None, :], other=0.0)
        b_scores = tl.dot(b_query, b_key, b_scores, input_precision=PRECISION)
    b_scores = tl.where(b_scores == b_scores, b_scores, float("inf"))
    b_scores = tl.where(m_key[None, :], b_scores, float("nan"))
    o_score = (i_list * NUM_ROWS + o_row)[:, None] * s_score + o_key[None, :]
    tl.store(scores + o_score, b_scores, mask=m_row[:, None] & (o_key < s_score)[None, :])


@triton.jit
def _rank(value):
    """Integers in the order of the floats; -0 is next to +0."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _of_rank(rank):
    """The float of a rank."""
    return tl.where(rank < 0, rank ^ 0x7FFFFFFF, rank).to(tl.float32, bitcast=True)


@triton.jit
def _guess_cut(i_low, i_high, num_low, num_high, low_weight, high_weight, cut, step, K, i_turn):
    """Rank at which to cut next: what a guess says, within the interval, or the middle of the ranks."""
    # Both ends have been counted: between them, by the Illinois rule, which moves an end that stays.
    low, high = _of_rank(i_low), _of_rank(i_high)
    num_over, num_under = (num_low - K + 0.5) * low_weight, (K - num_high - 0.5) * high_weight
    between = low + (high - low) * (num_over / (num_over + num_under))
    guess = tl.where((i_low > _LOWEST) & (i_high < _ABOVE), between, cut + step)
    # Rounds down, without overflow.
    i_middle = (i_low & i_high) + ((i_low ^ i_high) >> 1)
    is_usable = (i_turn < _NUM_GUESSES) & (tl.abs(guess) < float("inf"))
    i_guess = tl.minimum(tl.maximum(_rank(guess), i_low + 1), i_high - 1)
    return tl.where(is_usable, i_guess, i_middle)


@triton.jit
def _write_reaching(p_row, s_row, p_index, low, COLUMNS: tl.constexpr, PIECES: tl.constexpr, BITS: tl.constexpr):
    """Indices of the scores of a row that reach `low`, of which there are as many as wanted.

    One scan counts in several pieces at a time, in BITS bits each.
    """
    o_column = tl.arange(0, COLUMNS)
    num_before = 0
    for i_first in range(0, PIECES * COLUMNS, 31 // BITS * COLUMNS):
        b_kept = tl.zeros([COLUMNS], tl.int32)
        for i in tl.static_range(0, 31 // BITS):
            o_piece = i_first + i * COLUMNS + o_column
            m_kept = tl.load(p_row + o_piece, mask=o_piece < s_row, other=float("nan")) >= low
            b_kept += m_kept.to(tl.int32) << (i * BITS)
        b_counts, num_kept = tl.cumsum(b_kept, 0), tl.sum(b_kept, 0)
        for i in tl.static_range(0, 31 // BITS):
            o_entry = num_before - 1 + ((b_counts >> (i * BITS)) & ((1 << BITS) - 1))
            tl.store(p_index + o_entry, i_first + i * COLUMNS + o_column, mask=((b_kept >> (i * BITS)) & 1) != 0)
            num_before += (num_kept >> (i * BITS)) & ((1 << BITS) - 1)


@triton.jit
def _write_with_ties(p_row, s_row, p_index, i_low, num_wanted, NUM_COLUMNS, COLUMNS: tl.constexpr, PIECES: tl.constexpr):
    """Indices of the scores that rank above `i_low`, and of the first `num_wanted` that rank so."""
    low = _of_rank(i_low)
    num_above, num_ties = 0, 0
    for i_first in range(0, PIECES * COLUMNS, COLUMNS):
        o_column = i_first + tl.arange(0, COLUMNS)
        b_score = tl.load(p_row + o_column, mask=o_column < s_row, other=float("nan"))
        is_number = b_score == b_score
        m_above = tl.where(i_low == _LOWEST, is_number, b_score > low)
        m_tie = tl.where(i_low == _LOWEST, ~is_number & (o_column < NUM_COLUMNS), b_score == low)
        b_above, b_tie = m_above.to(tl.int32), m_tie.to(tl.int32)
        b_ties = num_ties + tl.cumsum(b_tie, 0)
        o_entry = num_above - 1 + tl.cumsum(b_above, 0) + tl.minimum(b_ties, num_wanted)
        tl.store(p_index + o_entry, o_column, mask=m_above | (m_tie & (b_ties <= num_wanted)))
        num_above += tl.sum(b_above, 0)
        num_ties += tl.sum(b_tie, 0)


@triton.jit(do_not_specialize=["NUM_COLUMNS", "K"])
def top_k_kernel(
    scores, indices, s_row, quantile, density, NUM_COLUMNS, K, COLUMNS: tl.constexpr, PIECES: tl.constexpr, BITS: tl.constexpr
):
    """The `K` highest of each row of `[rows, NUM_COLUMNS]`, ascending: `[rows, K]`; NaN ranks below -inf, -0 equals +0.

    A row takes `s_row` of memory, and is kept as PIECES times COLUMNS scores. For normal scores, the K-th highest is `quantile`
    deviations above the mean, and `density` scores lie in a deviation there.
    """
    i_row = tl.program_id(0).to(tl.int64)
    o_column = tl.arange(0, COLUMNS)
    p_row = scores + i_row * s_row
    # Each is NaN where there is no column. The mask has the stride's divisors, so loads are 16 bytes wide.
    b_pieces = (tl.load(p_row + o_column, mask=o_column < s_row, other=float("nan")),)
    for i in tl.static_range(1, PIECES):
        o_piece = i * COLUMNS + o_column
        b_piece = tl.load(p_row + o_piece, mask=o_piece < s_row, other=float("nan"))
        b_pieces = b_pieces + (b_piece,)  # noqa: RUF005  # Triton unpacks nothing
    b_sum, b_squares = tl.zeros([COLUMNS], tl.float32), tl.zeros([COLUMNS], tl.float32)
    for i in tl.static_range(0, PIECES):
        b_number = tl.where(b_pieces[i] == b_pieces[i], b_pieces[i], 0.0)
        b_sum += b_number
        b_squares += b_number * b_number
    mean = tl.sum(b_sum, 0) / NUM_COLUMNS
    deviation = tl.sqrt(tl.maximum(tl.sum(b_squares, 0) / NUM_COLUMNS - mean * mean, 0.0))
    cut, step, spacing = mean, quantile * deviation, deviation / density
    # At least K scores rank `i_low` or higher, fewer than K rank `i_high` or higher.
    i_low, i_high, num_low, num_high = _LOWEST + 0, _ABOVE + 0, NUM_COLUMNS, 0
    low_weight, high_weight, margin, i_turn = 1.0, 1.0, 1.0, 0
    while (num_low != K) & (i_low + 1 < i_high):
        i_cut = _guess_cut(i_low, i_high, num_low, num_high, low_weight, high_weight, cut, step, K, i_turn)
        cut = _of_rank(i_cut)
        b_counts = tl.zeros([COLUMNS], tl.int32)
        for i in tl.static_range(0, PIECES):
            b_counts += (b_pieces[i] >= cut).to(tl.int32)
        num_from_cut = tl.sum(b_counts, 0)
        is_enough = num_from_cut >= K
        # Where the density leads, and a bit beyond, so that the other end is found soon.
        over = (num_from_cut - K).to(tl.float32)
        step = (over + tl.where(is_enough, margin, -margin)) * spacing
        margin *= 4.0
        i_low, i_high = tl.where(is_enough, i_cut, i_low), tl.where(is_enough, i_high, i_cut)
        num_low, num_high = tl.where(is_enough, num_from_cut, num_low), tl.where(is_enough, num_high, num_from_cut)
        low_weight = tl.where(is_enough, 1.0, low_weight * 0.7)
        high_weight = tl.where(is_enough, high_weight * 0.7, 1.0)
        i_turn += 1
    # The row is read once more, from a cache: registers that all of it would take until here keep other rows waiting.
    if num_low == K:
        _write_reaching(p_row, s_row, indices + i_row * K, _of_rank(i_low), COLUMNS, PIECES, BITS)
    else:
        _write_with_ties(p_row, s_row, indices + i_row * K, i_low, K - num_high, NUM_COLUMNS, COLUMNS, PIECES)


def row_stride(num_tiles: int) -> int:
    """Elements from one row of scores to the next in a scratch: whole 64 bytes, so that rows are read 16 bytes at a time."""
    return -(-num_tiles // 16) * 16


def launch_scores(query: Tensor, key: Tensor, scores: Tensor, first_list: int, first_row: int, scale: float) -> None:
    """Fill `scores`, `[lists, rows, row_stride(N)]`, times `scale`, from means `[B, N, Hq, D]` and `[B, N, Hkv, D]`.

    A list is a head of a sample. Behind the N scores of a row come NaN.
    """
    shapes, strides = (query.shape, key.shape, scores.shape), (query.stride(), key.stride())
    _prepared_scores(shapes, strides, first_list, first_row, float(scale))(query, key, scores)


@functools.lru_cache(_NUM_PREPARED)
def _prepared_scores(
    shapes: tuple[torch.Size, ...], strides: tuple[tuple[int, ...], ...], first_list: int, first_row: int, scale: float
) -> PreparedKernel:
    (_, num_tiles, num_heads, head_size), key, (num_lists, num_rows, stride) = shapes
    num_programs = num_lists * -(-num_rows // _BLOCK) * -(-num_tiles // _BLOCK_KEYS)
    names = ("s_qb", "s_qn", "s_qh", "s_kb", "s_kn", "s_kh")
    arguments = dict(zip(names, (*strides[0][:3], *strides[1][:3]), strict=True)) | {
        "s_score": stride,
        "scale": scale,
        "I_LIST": first_list,
        "I_ROW": first_row,
        "NUM_ROWS": num_rows,
        "NUM_TILES": num_tiles,
        "HEADS": num_heads,
        "GROUP": num_heads // key[2],
        "HEAD_SIZE": head_size,
        "BLOCK": _BLOCK,
        "BLOCK_KEYS": _BLOCK_KEYS,
        "BLOCK_D": min(_BLOCK_D, max(16, 1 << (head_size - 1).bit_length())),
        "PRECISION": "ieee" if torch.version.hip else "tf32x3",
        "num_warps": _WARPS,
        "num_stages": _STAGES,
    }
    return PreparedKernel(coarse_scores_kernel, (num_programs,), ("query", "key", "scores"), arguments)


def top_k_options(num_columns: int) -> dict[str, int]:
    """Pieces of a row, each a power of two, that cover it with few scores too many, and warps to hold it."""
    columns = max(32, 1 << (-(-num_columns // 8) - 1).bit_length())
    pieces = -(-num_columns // columns)
    num_warps = max(1, 1 << (-(-columns * pieces // 2048) - 1).bit_length())
    return {"COLUMNS": columns, "PIECES": pieces, "BITS": columns.bit_length(), "num_warps": num_warps}


def launch_top_k(scores: Tensor, indices: Tensor, num_columns: int | None = None) -> None:
    """Fill `indices`, `[..., k]` int32, with the k highest of each row of `scores`, `[..., N]` fp32; both contiguous.

    With `num_columns`, those are N, and rows are longer and filled up with NaN.
    """
    _prepared_top_k(scores.shape, scores.shape[-1] if num_columns is None else num_columns, indices.shape[-1])(scores, indices)


@functools.lru_cache(_NUM_PREPARED)
def _prepared_top_k(shape: torch.Size, num_columns: int, k: int) -> PreparedKernel:
    # Where the k-th highest of normal scores lies, in deviations above the mean, and how many lie in a deviation there.
    quantile = NormalDist().inv_cdf(1.0 - (k - 0.5) / num_columns)
    arguments = {
        "s_row": shape[-1],
        "quantile": quantile,
        "density": num_columns * NormalDist().pdf(quantile),
        "NUM_COLUMNS": num_columns,
        "K": k,
        **top_k_options(num_columns),
    }
    return PreparedKernel(top_k_kernel, (shape[:-1].numel(),), ("scores", "indices"), arguments)
