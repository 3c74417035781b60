"""A Triton kernel that copies rows of bytes within a device.

No copy engine does that: CUDA's driver runs a kernel of its own for it, which takes twice as long where rows lie apart.

Names: `i_` indices, `o_` offsets, `m_` masks, `p_` pointers, `b_` values of a block, `s_` distances.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (the types of kernel arguments are Triton's, not Python's)

import functools
from collections.abc import Sequence

import triton
import triton.language as tl

from fastvideo.distributed.rows import Move
from fastvideo.platforms.triton_launch import PreparedKernel

__all__ = ["launch_moves"]

_TOGETHER = 4
"""Moves that one launch carries out: query, key, value and gate."""

_WIDTH = 16
"""Bytes that a thread reads and writes at a time; addresses, distances and lengths are multiples of it."""

_BLOCK, _MOST_COLUMNS, _WARPS = 2048, 256, 4
"""Words of 8 bytes that a program copies, and how many of them at most are of one row."""

_FEW_COLUMNS = 16
"""Where rows divide by no more words than these, programs take whole rows instead."""


_ADDRESSES = tuple([f"{place}_{number}" for place in ("target", "source") for number in range(_TOGETHER)])


@triton.jit(do_not_specialize=[*_ADDRESSES, "s_target", "s_source", "NUMBER", "LENGTH"])
def copy_rows_kernel(
    target_0,
    target_1,
    target_2,
    target_3,
    source_0,
    source_1,
    source_2,
    source_3,
    s_target,
    s_source,
    NUMBER,
    LENGTH,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """`NUMBER` rows between addresses, of words of 8 bytes; their length and distances are in 16 bytes."""
    i_move = tl.program_id(1)
    num_chunks = tl.cdiv(2 * LENGTH, COLUMNS)
    i_row, i_chunk = tl.program_id(0) // num_chunks, tl.program_id(0) % num_chunks
    target = tl.where(i_move == 0, target_0, tl.where(i_move == 1, target_1, tl.where(i_move == 2, target_2, target_3)))
    source = tl.where(i_move == 0, source_0, tl.where(i_move == 1, source_1, tl.where(i_move == 2, source_2, source_3)))
    p_target = tl.multiple_of(target.to(tl.int64).to(tl.pointer_type(tl.int64)), 16)
    p_source = tl.multiple_of(source.to(tl.int64).to(tl.pointer_type(tl.int64)), 16)
    o_row = (i_row * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    o_word = (i_chunk * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    m_words = (o_row < NUMBER) & (o_word < 2 * LENGTH)
    b_words = tl.load(p_source + o_row * (2 * s_source) + o_word, mask=m_words)
    tl.store(p_target + o_row * (2 * s_target) + o_word, b_words, mask=m_words)


def launch_moves(moves: tuple[Move, ...], bases: Sequence[int], device: int, stream: int) -> list[Move]:
    """Carry out moves within the current device, several whose rows are alike by one launch.

    Args:
        moves: The moves.
        bases: Where the memories begin that they number.
        device: The device's index.
        stream: Handle of the stream.

    Returns:
        The moves left over: of a single row, and of rows whose length or places are no multiples of 16 bytes.
    """
    rest: list[Move] = []
    for together, kernel in _launches(moves):
        targets = [bases[move.target] + move.target_start for move in together]
        sources = [bases[move.source] + move.source_start for move in together]
        if kernel is None or any(address % _WIDTH for address in (*targets, *sources)):
            rest += together
        else:
            missing = _TOGETHER - len(together)
            kernel(*targets, *targets[:1] * missing, *sources, *sources[:1] * missing, on=(device, stream))
    return rest


@functools.lru_cache(maxsize=1024)
def _launches(moves: tuple[Move, ...]) -> tuple[tuple[tuple[Move, ...], PreparedKernel | None], ...]:
    """Return moves by launches, each with what carries it out, or `None`."""
    groups: list[list[Move]] = []
    for move in moves:
        if not groups or len(groups[-1]) == _TOGETHER or _rows(move) != _rows(groups[-1][0]):
            groups.append([])
        groups[-1].append(move)
    return tuple([(tuple(group), _kernel(*_rows(group[0]), len(group))) for group in groups])


def _rows(move: Move) -> tuple[int, int, int, int]:
    return move.target_distance, move.source_distance, move.length, move.number


@functools.lru_cache(maxsize=1024)
def _kernel(target_distance: int, source_distance: int, length: int, number: int, count: int) -> PreparedKernel | None:
    """Return what carries out `count` moves of such rows, or `None`."""
    if number == 1 or any(size % _WIDTH for size in (target_distance, source_distance, length)):
        return None
    words = length // 8
    columns = words & -words
    columns = min(columns if columns >= _FEW_COLUMNS else triton.next_power_of_2(words), _MOST_COLUMNS)
    rows = _BLOCK // columns
    distances = {"s_target": target_distance // _WIDTH, "s_source": source_distance // _WIDTH}
    sizes = {"NUMBER": number, "LENGTH": length // _WIDTH, "ROWS": rows, "COLUMNS": columns, "num_warps": _WARPS}
    grid = (triton.cdiv(number, rows) * triton.cdiv(words, columns), count)
    return PreparedKernel(copy_rows_kernel, grid, _ADDRESSES, distances | sizes)
