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

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastvideo.block_sparse.impl.hopper.packing import PackedLayout
from fastvideo.block_sparse.impl.hopper.plan_kernels import mark_kernel, plan_lists_kernel, plan_marks_kernel
from fastvideo.block_sparse.pattern import BlockPattern

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


@dataclass(frozen=True, eq=False)
class Plan:
    """Walks of all blocks of some heads (G of them; 1 if all share one).

    Attributes:
        rows: `[G, ...]` int32, first packed rows: boxes two to a step, then granules eight to a step. Of shared steps a block
            has every other one.
        masks: `[G, ...]` int32, one for each half step from the first masked step on.
        meta: `[G, M, 8]` int32: offset into `rows`, offset into `masks`, steps without a mask, steps made of boxes, steps in
            all, half steps in all, shared steps (an even number), steps in `rows`; undefined for blocks that are not there.
    """

    rows: Tensor
    masks: Tensor
    meta: Tensor


def plan_queries(
    pattern: BlockPattern, own: PackedLayout, walked: PackedLayout, first_head: int, heads: int, total: int
) -> Plan:
    """The walks of query blocks over keys, for `heads` of the `total` heads counted through batch and heads."""
    indices, (s_b, s_h) = _lists(pattern)
    if s_b == s_h == 0:
        first_head, heads = 0, 1
    plan, used = _new_plan(pattern, own, walked, heads)
    width = indices.shape[3]
    least_shared = max(4, int(_LEAST_SHARED * width * walked.pieces))
    if own.may_join:
        marks = mark(pattern, first_head, heads, total, own=own)
        _plan_marks(marks, plan, used, own, walked, least_shared)
    if own.may_be_alone:
        chunk = min(_CHUNK, max(64, 1 << (width * walked.pieces - 1).bit_length()))
        plan_lists_kernel[(heads * own.max_blocks,)](
            indices,
            None if pattern.counts is None else pattern.counts.contiguous(),
            own.block_tiles,
            own.counts,
            walked.layout.offsets,
            walked.piece_row,
            plan.rows,
            plan.masks,
            plan.meta,
            used,
            s_b,
            s_h,
            first_head,
            pattern_heads(pattern, total),
            width,
            own.max_blocks,
            plan.rows.stride(0),
            plan.masks.stride(0),
            least_shared,
            IS_EVEN=walked.is_one_piece_a_block,
            DEPTH=width.bit_length(),
            CHUNK=chunk,
            IS_ONE_CHUNK=width * walked.pieces <= chunk,
            num_warps=max(1, chunk // _ENTRIES_A_WARP),
            **_piece_constants(walked),
        )
    return plan


def plan_keys(pattern: BlockPattern, own: PackedLayout, walked: PackedLayout, first_head: int, heads: int, total: int) -> Plan:
    """The walks of key blocks over queries, without masks for the pads of queries and without shared steps."""
    marks = mark(pattern, first_head, heads, total)
    plan, used = _new_plan(pattern, own, walked, marks.shape[0])
    _plan_marks(marks, plan, used, own, walked, None)
    return plan


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


def mark(pattern: BlockPattern, first_head: int, heads: int, total: int, *, own: PackedLayout | None = None) -> Tensor:
    """A byte for each pair of tiles: 1 where listed. G is 1 if all heads share lists.

    With `own` of the queries `[G, Nq, Nk]`, and only for tiles that may share a block with others; without it by key,
    `[G, Nk, Nq]`; the last axis is padded with zeros to a multiple of 16.
    """
    indices, (s_b, s_h) = _lists(pattern)
    if s_b == s_h == 0:
        first_head, heads = 0, 1
    num_queries, num_keys = pattern.query_tiles.num_tiles, pattern.key_tiles.num_tiles
    shape = (num_keys, num_queries) if own is None else (num_queries, num_keys)
    # Rows begin at 16 bytes.
    s_row = -(-shape[1] // 16) * 16
    marks = torch.zeros(heads, shape[0], s_row, dtype=torch.uint8, device=indices.device)
    mark_kernel[(heads * num_queries,)](
        indices,
        None if pattern.counts is None else pattern.counts.contiguous(),
        None if own is None else own.layout.offsets,
        marks,
        s_b,
        s_h,
        first_head,
        pattern_heads(pattern, total),
        indices.shape[3],
        num_queries,
        marks.stride(0),
        1 if own is None else s_row,
        s_row if own is None else 1,
        PIECE_ROWS=64 if own is None else own.piece_rows,
        BLOCK=128,
        num_warps=2,
    )
    return marks


def _new_plan(pattern: BlockPattern, own: PackedLayout, walked: PackedLayout, heads: int) -> tuple[Plan, Tensor]:
    """A plan with room for everything that is listed, and zeroed counters of what is used of it."""
    device = pattern.indices.device
    # Each piece of a tile walks its whole list. A listed piece is a box or up to three granules; the ends of walks are filled
    # up, and an odd box may be split.
    num_listed = pattern.indices.shape[2:].numel() * own.pieces * walked.pieces
    entries = num_listed * (1 if walked.is_even and walked.piece_rows > 48 else 3) + own.max_blocks * 16 + _SLACK
    rows = torch.empty(heads, entries, dtype=torch.int32, device=device)
    masks = torch.empty(heads, num_listed + own.max_blocks * 4, dtype=torch.int32, device=device)
    meta = torch.empty(heads, own.max_blocks, _META, dtype=torch.int32, device=device)
    return Plan(rows, masks, meta), torch.zeros(heads, 3, dtype=torch.int32, device=device)


def _piece_constants(walked: PackedLayout) -> dict[str, Any]:
    # A piece with at least so many tokens is a box without a mask.
    return {"PIECES": walked.pieces, "PIECE_ROWS": walked.piece_rows, "CLEAN": walked.box_tokens}


def _plan_marks(
    marks: Tensor, plan: Plan, used: Tensor, own: PackedLayout, walked: PackedLayout, least_shared: int | None
) -> None:
    """Plan from marks `[G, own tiles, walked tiles]`: blocks of several tiles, or with no `least_shared` all of them.

    Those kernels cope with pads of the walked side by themselves, so that pads ask for no masks.
    """
    num_walked = walked.layout.num_tiles
    mark_chunk = min(_MARK_CHUNK, max(64, 1 << (num_walked - 1).bit_length()))
    # What blocks see, before it becomes boxes and granules: at most the lists of all their tiles.
    lists = torch.empty(marks.shape[0], plan.masks.shape[1], dtype=torch.int32, device=marks.device)
    plan_marks_kernel[(marks.shape[0] * own.max_blocks,)](
        marks,
        own.block_tiles,
        own.counts,
        walked.layout.offsets,
        walked.piece_row,
        lists,
        plan.rows,
        plan.masks,
        plan.meta,
        used,
        own.max_blocks,
        num_walked,
        marks.stride(0) // 16,
        marks.stride(1) // 16,
        lists.stride(0),
        plan.rows.stride(0),
        plan.masks.stride(0),
        least_shared or 0,
        IS_JOINT=least_shared is not None,
        MARK_CHUNK=mark_chunk,
        IS_ONE_CHUNK=num_walked <= mark_chunk,
        CHUNK=_CHUNK,
        num_warps=max(1, mark_chunk // _MARKS_A_WARP),
        **_piece_constants(walked) | ({"CLEAN": 49} if least_shared is None else {}),
    )
