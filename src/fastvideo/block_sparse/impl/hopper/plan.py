"""What the Hopper kernels walk: for each block of 64 packed rows the boxes and granules of the other side it meets.

A walk goes in half steps of 64 rows. First come boxes (whole pieces of four granules), then half steps put together from
four granules of 16 rows. Two half steps make a step. Half steps in which some row of the block must not see some row that
was loaded carry a mask: an int32 whose byte `g` says for granule `g` which granules of the block see it (bits 0 to 3), and
how many pads end it (bits 4 to 7). Boxes that need no mask come first, so that a kernel knows by counting.

The plan of a block that holds several small tiles is the union of their lists. A plan is a set of plain tensors: the
tests walk the same arrays in torch, since Gluon has no interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastvideo.block_sparse.impl.hopper.packing import PackedLayout
from fastvideo.block_sparse.impl.hopper.plan_kernels import mark_kernel, plan_direct_kernel, plan_marks_kernel
from fastvideo.block_sparse.pattern import BlockPattern

# Producers read ahead of the last entry.
_SLACK = 16
# Pieces that one program of the planner keeps in registers.
_CHUNK = 2048


@dataclass(frozen=True, eq=False)
class Plan:
    """Walks of all blocks of some heads (G of them; 1 if all share one).

    Attributes:
        rows: `[G, ...]` int32, first packed rows: boxes two to a step, then granules eight to a step.
        masks: `[G, ...]` int32, one for each half step from the first masked step on.
        meta: `[G, M, 6]` int32: offset into `rows`, offset into `masks`, steps without a mask, steps made of boxes, steps in
            all, half steps in all; undefined for blocks that are not there.
    """

    rows: Tensor
    masks: Tensor
    meta: Tensor


def plan_lists(pattern: BlockPattern, own: PackedLayout, walked: PackedLayout, first_head: int, heads: int, total: int) -> Plan:
    """The walks of query blocks over keys, for `heads` of the `total` heads counted through batch and heads."""
    is_direct = own.is_one_piece_a_block and walked.is_even and walked.piece_rows > 48
    if not is_direct:
        marks = mark(pattern, first_head, heads, total, by_key=False)
        return plan_marks(marks, own, walked, pattern.indices.shape[2:].numel())
    indices, (s_b, s_h) = _lists(pattern)
    if s_b == s_h == 0:
        first_head, heads = 0, 1
    width = indices.shape[3] * walked.pieces
    steps = -(-width // 2)
    rows = indices.new_empty(heads, own.max_blocks * steps * 2 + _SLACK)
    meta = indices.new_empty(heads, own.max_blocks, 6)
    pads = 64 - walked.piece_rows
    # The last box of an odd list is masked: the box itself, then a copy that nobody sees.
    last = 0x0F0F0F0F | pads << 28
    masks = torch.zeros(heads, 2, dtype=torch.int32, device=indices.device)
    masks[:, 0] = last - (1 << 32) if last >= 1 << 31 else last
    plan_direct_kernel[(heads * own.max_blocks,)](
        indices,
        None if pattern.counts is None else pattern.counts.contiguous(),
        rows,
        meta,
        s_b,
        s_h,
        first_head,
        pattern_heads(pattern, total),
        indices.shape[3],
        own.max_blocks,
        rows.stride(0),
        OWN_PIECES=own.pieces,
        PIECES=walked.pieces,
        BLOCK=256 if width > 128 else 128,
        num_warps=2,
    )
    return Plan(rows, masks, meta)


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


def mark(pattern: BlockPattern, first_head: int, heads: int, total: int, *, by_key: bool) -> Tensor:
    """A byte for each pair of tiles, `[G, Nq, Nk]` or by key `[G, Nk, Nq]`: 1 where listed. G is 1 if all heads share lists."""
    indices, (s_b, s_h) = _lists(pattern)
    if s_b == s_h == 0:
        first_head, heads = 0, 1
    num_queries, num_keys = pattern.query_tiles.num_tiles, pattern.key_tiles.num_tiles
    shape = (num_keys, num_queries) if by_key else (num_queries, num_keys)
    marks = torch.zeros(heads, *shape, dtype=torch.uint8, device=indices.device)
    mark_kernel[(heads * num_queries,)](
        indices,
        None if pattern.counts is None else pattern.counts.contiguous(),
        marks,
        s_b,
        s_h,
        first_head,
        pattern_heads(pattern, total),
        indices.shape[3],
        num_queries,
        num_keys,
        1 if by_key else num_keys,
        num_queries if by_key else 1,
        BLOCK=128,
        num_warps=2,
    )
    return marks


def plan_marks(marks: Tensor, own: PackedLayout, walked: PackedLayout, num_listed: int, *, has_pads: bool = True) -> Plan:
    """The walks of own blocks over the other side from marks `[G, own tiles, walked tiles]`, up to `num_listed` a head.

    Without `has_pads` the kernel copes with pads of the walked side by itself, so that they ask for no masks.
    """
    heads = marks.shape[0]
    # Each piece of a tile walks its whole list. A listed piece is a box or up to three granules; the ends of walks are filled
    # up, and an odd box may be split.
    num_listed *= own.pieces * walked.pieces
    entries = num_listed * (1 if walked.is_even and walked.piece_rows > 48 else 3) + own.max_blocks * 16 + _SLACK
    rows = torch.empty(heads, entries, dtype=torch.int32, device=marks.device)
    masks = torch.empty(heads, num_listed + own.max_blocks * 4, dtype=torch.int32, device=marks.device)
    meta = torch.empty(heads, own.max_blocks, 6, dtype=torch.int32, device=marks.device)
    used = torch.zeros(heads, 2, dtype=torch.int32, device=marks.device)
    num_pieces = walked.layout.num_tiles * walked.pieces
    chunk = min(_CHUNK, max(64, 1 << (num_pieces - 1).bit_length()))
    plan_marks_kernel[(heads * own.max_blocks,)](
        marks,
        own.block_tiles,
        own.counts,
        walked.layout.offsets,
        walked.piece_row,
        rows,
        masks,
        meta,
        used,
        own.max_blocks,
        own.layout.num_tiles,
        walked.layout.num_tiles,
        num_pieces,
        rows.stride(0),
        masks.stride(0),
        PIECES=walked.pieces,
        PIECE_ROWS=walked.piece_rows,
        # A piece with at least so many tokens is a box without a mask.
        CLEAN=walked.box_tokens if has_pads else 49,
        CHUNK=chunk,
        IS_ONE_CHUNK=num_pieces <= chunk,
        num_warps=max(1, chunk // 128),
    )
    return Plan(rows, masks, meta)
