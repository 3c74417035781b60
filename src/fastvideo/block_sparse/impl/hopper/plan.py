"""What the Hopper kernels walk: for each block of 64 packed rows the boxes and granules of the other side it meets.

A walk goes in half steps of 64 rows. First come boxes (whole pieces of four granules), then half steps put together from
four granules of 16 rows. Two half steps make a step. Half steps in which some row of the block must not see some row that
was loaded carry a mask: an int32 whose byte `g` says for granule `g` which granules of the block see it (bits 0 to 3), and
how many pads end it (bits 4 to 7). Boxes that need no mask come first, so that a kernel knows by counting.

Query blocks work in pairs, `2 i` and `2 i + 1` among the blocks of several tiles and among those of one: neighbours, whose
lists overlap. Walks of a pair begin with shared steps, boxes that both see and that are loaded once: step `j` lies in the rows
of the partner `j % 2`, and there are as many for each. In blocks of one tile shared boxes need no mask; blocks of several
tiles mask every step.

The plan of a block that holds several small tiles is the union of their lists. A plan is a set of plain tensors: the
tests walk the same arrays in torch, since Gluon has no interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastvideo.block_sparse.impl.hopper.packing import PackedLayout, keep_made
from fastvideo.block_sparse.impl.hopper.plan_kernels import mark_kernel, plan_lists_kernel, plan_marks_kernel
from fastvideo.block_sparse.pattern import BlockPattern
from fastvideo.platforms.triton_launch import PreparedKernel

# Producers read ahead of the last entry.
_SLACK = 16
# Marks, and entries of a list, that one program of a planner keeps in registers.
_MARK_CHUNK = 2048
_CHUNK = 256
_MARKS_A_WARP = 512
_ENTRIES_A_WARP = 64
# A pair shares steps if these make up so much of a full list; else its walks do not wait for each other.
_LEAST_SHARED = 1 / 8
_META = 8
# The tensors of a plan, and of what is walked, as both planners take them.
_PLANNED = ("block_tiles", "own_counts", "offsets", "piece_row", "rows", "masks", "meta", "used")


@dataclass(frozen=True, eq=False)
class Plan:
    """Walks of all blocks of some heads (G of them; 1 if all share one).

    Attributes:
        rows: `[G, ...]` int32, first packed rows: boxes two to a step, then granules eight to a step. Of shared steps a block
            has every other one.
        masks: `[G, ...]` int32, one for each half step from the first masked step on.
        meta: `[G, M, 8]` int32: offset into `rows`, offset into `masks`, steps without a mask, steps made of boxes, steps in
            all, half steps in all, shared steps (an even number), steps in `rows`; undefined for blocks that are not there.
        zeros: Int32 zeros for who walks the plan to count in, or None.
    """

    rows: Tensor
    masks: Tensor
    meta: Tensor
    zeros: Tensor | None = None


def planner_of(
    pattern: BlockPattern, own: PackedLayout, walked: PackedLayout, heads: tuple[int, int, int], *, by_key: bool = False
) -> Planner:
    """What plans `heads` (the first, how many, and how many there are in all, counted through batch and heads) of lists of this
    shape; kept with `own`.

    Walks are those of query blocks over keys; by key, of key blocks over queries, without masks for the pads of queries and
    without shared steps.
    """
    key = ("plan", by_key, walked.numbers, pattern.indices.shape, heads)
    return own.keep(key, lambda: Planner(pattern.indices.shape, own, walked, heads, by_key=by_key))


class Planner:
    """What plans of lists of one shape share: how much room they take, and the launches that fill it.

    Attributes:
        strides: By which a kernel finds the walks of a head.
    """

    def __init__(
        self, shape: torch.Size, own: PackedLayout, walked: PackedLayout, heads: tuple[int, int, int], *, by_key: bool
    ) -> None:
        batch, list_heads, num_queries, width = shape
        # Strides of contiguous lists, 0 where all share one.
        s_h = num_queries * width if list_heads > 1 else 0
        s_b = list_heads * num_queries * width if batch > 1 else 0
        first_head, num_heads, total = heads if s_b or s_h else (0, 1, heads[2])
        # Lists that all heads share have one plan, whichever heads a launch works on.
        self._name = ("hopper plan", by_key, *(heads if s_b or s_h else ()))
        # Heads of one sample; only lists that differ by sample or head ask.
        num_list_heads = list_heads if list_heads > 1 else total // batch if batch > 1 else total
        lists = {"s_b": s_b, "s_h": s_h, "first_head": first_head, "HEADS": num_list_heads, "WIDTH": width}
        # Each piece of a tile walks its whole list. A listed piece is a box or up to three granules; the ends of walks are
        # filled up, and an odd box may be split.
        num_listed = num_queries * width * own.pieces * walked.pieces
        num_entries = num_listed * (1 if walked.is_even and walked.piece_rows > 48 else 3) + own.max_blocks * 16 + _SLACK
        self._rows, self._masks = (num_heads, num_entries), (num_heads, num_listed + own.max_blocks * 4)
        self._meta, self._num_used = (num_heads, own.max_blocks, _META), 3 * num_heads
        # With one plan for all heads nothing leads from one to the next.
        s_plan = 0 if num_heads == 1 else own.max_blocks
        self.strides = {"s_rows": num_entries, "s_masks": self._masks[1], "s_plan": s_plan}
        least_shared = 0 if by_key else max(4, int(_LEAST_SHARED * width * walked.pieces))
        places = {"max_blocks": own.max_blocks, "s_rows": num_entries, "s_masks": self._masks[1], "least_shared": least_shared}
        places |= {"PIECES": walked.pieces, "PIECE_ROWS": walked.piece_rows}
        # Only tiles of queries that may share a block with others are marked.
        self._offsets = None if by_key else own.layout.offsets
        self._mark, self._plan_marks, self._plan_lists, self._num_mark_words = None, None, None, 0
        if by_key or own.may_join:
            # A byte for each pair of tiles; rows begin at 16 bytes.
            s_row = -(-walked.layout.num_tiles // 16) * 16
            s_marks = own.layout.num_tiles * s_row
            self._num_mark_words = num_heads * s_marks // 4
            self._mark = _prepare_mark(lists, own, num_queries, num_heads, (s_marks, s_row), by_key=by_key)
            self._plan_marks = _prepare_plan_marks(places, own, walked, num_heads, (s_marks, s_row), by_key=by_key)
        if not by_key and own.may_be_alone:
            self._plan_lists = _prepare_plan_lists(lists | places, own, walked, num_heads, width)

    def __call__(self, pattern: BlockPattern, own: PackedLayout, walked: PackedLayout, num_zeros: int) -> Plan:
        if pattern.derived is None:
            return self._plan(pattern, own, walked, num_zeros)
        device = pattern.indices.device
        plan = keep_made(pattern.derived, self._name, device, lambda: self._plan(pattern, own, walked, 0))
        return replace(plan, zeros=pattern.indices.new_zeros(num_zeros)) if num_zeros else plan

    def _plan(self, pattern: BlockPattern, own: PackedLayout, walked: PackedLayout, num_zeros: int) -> Plan:
        indices = pattern.indices.contiguous()
        counts = None if pattern.counts is None else pattern.counts.contiguous()
        # One launch clears marks, what the caller counts in, and counters of what is used of the plan's room. Each begins at a
        # multiple of 16 bytes, as memory of its own would.
        words = (self._num_mark_words, -(-num_zeros // 4) * 4, self._num_used)
        marks, zeros, used = indices.new_zeros(sum(words)).split_with_sizes(words)
        rows, masks, meta = indices.new_empty(*self._rows), indices.new_empty(*self._masks), indices.new_empty(*self._meta)
        planned = (own.block_tiles, own.counts, walked.layout.offsets, walked.piece_row, rows, masks, meta, used)
        if self._mark is not None and self._plan_marks is not None:
            marks = marks.view(torch.uint8)
            self._mark(indices, counts, self._offsets, marks)
            # What blocks see, before it becomes boxes and granules: at most the lists of all their tiles.
            self._plan_marks(marks, torch.empty_like(masks), *planned)
        if self._plan_lists is not None:
            self._plan_lists(indices, counts, *planned)
        return Plan(rows, masks, meta, zeros if num_zeros else None)


def _prepare_mark(
    lists: dict[str, int], own: PackedLayout, num_queries: int, heads: int, strides: tuple[int, int], *, by_key: bool
) -> PreparedKernel:
    """The launch that marks listed pairs of tiles in rows of `own`, at strides of heads and rows."""
    s_marks, s_row = strides
    places = {"s_marks": s_marks, "s_q": 1 if by_key else s_row, "s_k": s_row if by_key else 1, "NUM_QUERIES": num_queries}
    constants = {"PIECE_ROWS": 64 if by_key else own.piece_rows, "BLOCK": 128, "num_warps": 2}
    names = ("indices", "counts", "offsets", "marks")
    return PreparedKernel(mark_kernel, (heads * num_queries,), names, lists | places | constants)


def _prepare_plan_marks(
    places: dict[str, int], own: PackedLayout, walked: PackedLayout, heads: int, strides: tuple[int, int], *, by_key: bool
) -> PreparedKernel:
    """The launch that plans from marks: blocks of several tiles, or by key all of them."""
    num_walked = walked.layout.num_tiles
    chunk = min(_MARK_CHUNK, max(64, 1 << (num_walked - 1).bit_length()))
    arguments = {
        **places,
        "num_walked": num_walked,
        "s_marks": strides[0] // 16,
        "s_own": strides[1] // 16,
        "s_lists": places["s_masks"],
        # Kernels that walk queries cope with their pads, so that these ask for no masks.
        "CLEAN": 49 if by_key else walked.box_tokens,
        "IS_JOINT": not by_key,
        "MARK_CHUNK": chunk,
        "IS_ONE_CHUNK": num_walked <= chunk,
        "CHUNK": _CHUNK,
        "num_warps": max(1, chunk // _MARKS_A_WARP),
    }
    return PreparedKernel(plan_marks_kernel, (heads * own.max_blocks,), ("marks", "lists", *_PLANNED), arguments)


def _prepare_plan_lists(
    numbers: dict[str, int], own: PackedLayout, walked: PackedLayout, heads: int, width: int
) -> PreparedKernel:
    """The launch that plans query blocks of one tile from its list."""
    chunk = min(_CHUNK, max(64, 1 << (width * walked.pieces - 1).bit_length()))
    arguments = {
        **numbers,
        # A piece with at least so many tokens is a box without a mask.
        "CLEAN": walked.box_tokens,
        "IS_EVEN": walked.is_one_piece_a_block,
        "DEPTH": width.bit_length(),
        "CHUNK": chunk,
        "IS_ONE_CHUNK": width * walked.pieces <= chunk,
        "num_warps": max(1, chunk // _ENTRIES_A_WARP),
    }
    return PreparedKernel(plan_lists_kernel, (heads * own.max_blocks,), ("indices", "counts", *_PLANNED), arguments)
