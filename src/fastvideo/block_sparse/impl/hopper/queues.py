"""Which blocks each consumer of the dkey and dvalue kernel works on, in which order; nothing waits for the device.

Walks differ in length: key tiles that many queries list, and small ones that share a block on the union of their lists, have
walks ten times as long as others. Those are dealt out first. The others follow head by head, so that all consumers read the
queries of one head at a time, and each consumer takes as many as make up for the long ones that it has or hasn't got.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (the types of kernel arguments are Triton's, not Python's)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvideo.block_sparse.impl.hopper.packing import PackedLayout
from fastvideo.block_sparse.impl.hopper.plan import Plan
from fastvideo.platforms.triton_launch import PreparedKernel

# What a block takes besides its walk, in half steps.
_BLOCK_COST = tl.constexpr(4)


class QueueFiller:
    """Distributes the blocks of `heads` key heads, each with `group` query heads, over `num_queues` consumers."""

    def __init__(self, own: PackedLayout, heads: int, group: int, num_queues: int, s_plan: int) -> None:
        """Prepare the launches for plans with `s_plan` blocks from one head to the next (0 where all share one)."""
        self._shape, self._num_queues = (heads, own.max_blocks), num_queues
        self._rows = -(-heads * own.max_blocks // num_queues)
        numbers = {
            "num_heads": heads,
            "max_blocks": own.max_blocks,
            "s_plan": s_plan,
            "GROUP": group,
            "CHUNK": 1024,
            "num_warps": 8,
        }
        self._rank = PreparedKernel(rank_places_kernel, (1,), ("meta", "own_counts", "lengths", "keys", "totals"), numbers)
        width = max(32, 1 << (num_queues - 1).bit_length())
        numbers = {"num_queues": num_queues, "num_rows": self._rows, "WIDTH": width, "num_warps": 8}
        self._fill = PreparedKernel(fill_queues_kernel, (1,), ("places", "lengths", "totals", "queues", "ends"), numbers)

    def __call__(self, plan: Plan, own: PackedLayout) -> tuple[Tensor, Tensor, Tensor]:
        """Fill the queues.

        Returns:
            `[rows, num_queues]` int32, places `head * M + block`, one a row for each consumer, where what lies behind its last
            place means nothing; `[num_queues]` int32, `consumer + num_queues * number of its places`, the end of a loop over
            the flat queues; `[heads, M]` int32, half steps of each place.
        """
        meta = plan.meta
        lengths = meta.new_empty(self._shape)
        keys = meta.new_empty(lengths.numel(), dtype=torch.int64)
        totals = meta.new_empty(3, dtype=torch.int64)
        self._rank(meta, own.counts, lengths, keys, totals)
        # A queue lets at most two thirds of the rows pass, and takes all others at most.
        queues = meta.new_empty(3 * self._rows, self._num_queues)
        ends = meta.new_empty(self._num_queues)
        self._fill(keys.argsort(), lengths, totals, queues, ends)
        return queues, ends, lengths


@triton.jit(do_not_specialize=["num_heads", "max_blocks", "s_plan"])
def rank_places_kernel(
    meta, own_counts, lengths, keys, totals, num_heads, max_blocks, s_plan, GROUP: tl.constexpr, CHUNK: tl.constexpr
):
    """Half steps of places, and keys that sort them; totals are the number of long ones, that of others, and all work.

    Long ones come first, then others, then those that are not there; within these by head, and within a head by length:
    downwards, but for others upwards in every other head, or the first queue of a row would always get the most.
    """
    num_blocks = tl.load(own_counts + 1)
    num_places = num_heads * max_blocks
    total = tl.zeros([], tl.int64)
    for i_first in range(0, num_places, CHUNK):
        i_place = i_first + tl.arange(0, CHUNK)
        i_head, i_block = i_place // max_blocks, i_place % max_blocks
        m_real = (i_place < num_places) & (i_block < num_blocks)
        length = tl.zeros([CHUNK], tl.int32)
        for i_group in range(GROUP):
            length += tl.load(meta + ((i_head * GROUP + i_group) * s_plan + i_block) * 8 + 5, mask=m_real, other=0)
        tl.store(lengths + i_place, length, mask=i_place < num_places)
        total += tl.sum(tl.where(m_real, length + _BLOCK_COST, 0).to(tl.int64), 0)
    tl.debug_barrier()
    num_real = (num_heads * num_blocks).to(tl.int64)
    num_long = tl.zeros([], tl.int64)
    for i_first in range(0, num_places, CHUNK):
        i_place = i_first + tl.arange(0, CHUNK)
        i_head, i_block = i_place // max_blocks, i_place % max_blocks
        m_real = (i_place < num_places) & (i_block < num_blocks)
        work = tl.load(lengths + i_place, mask=m_real, other=0).to(tl.int64) + _BLOCK_COST
        m_long = m_real & (work * num_real > 2 * total)
        rank = i_head + tl.where(m_real, tl.where(m_long, 0, num_heads), 2 * num_heads)
        goes_up = ((num_heads - 1 - i_head) % 2 == 1) & ~m_long
        tl.store(keys + i_place, (rank.to(tl.int64) << 32) + tl.where(goes_up, work, -work), mask=i_place < num_places)
        num_long += tl.sum(m_long.to(tl.int64), 0)
    tl.store(totals, num_long)
    tl.store(totals + 1, num_real - num_long)
    tl.store(totals + 2, total)


@triton.jit(do_not_specialize=["num_queues", "num_rows"])
def fill_queues_kernel(places, lengths, totals, queues, ends, num_queues, num_rows, WIDTH: tl.constexpr):
    """Deal long places row by row; of the others each queue takes one a row once it has let its long ones pass."""
    num_long, num_short = tl.load(totals).to(tl.int32), tl.load(totals + 1).to(tl.int32)
    o_queue = tl.arange(0, WIDTH)
    m_queue = o_queue < num_queues
    load = tl.zeros([WIDTH], tl.int64)
    for i_first in range(0, num_long, num_queues):
        m_long = m_queue & (i_first + o_queue < num_long)
        i_place = tl.load(places + i_first + o_queue, mask=m_long, other=0)
        load += tl.where(m_long, tl.load(lengths + i_place, mask=m_long, other=0) + _BLOCK_COST, 0)
    # How many of the others take as long as the long ones of a queue, in 1/1024; the fraction says who comes first in a row.
    rest = tl.maximum(tl.load(totals + 2) - tl.sum(load, 0), 1)
    passed = tl.minimum(load * num_short * 1024 // rest, num_rows * 2048)
    order = ((passed % 1024) << 48) | ((passed // 1024) << 16) | o_queue
    order = tl.sort(tl.where(m_queue, order, 1 << 62))
    o_dealt = (order & 65535).to(tl.int32)
    num_passed = ((order >> 16) & 0x7FFFFFFF).to(tl.int32)

    num_own = tl.zeros([WIDTH], tl.int32)
    for i_first in range(0, num_long, num_queues):
        m_long = m_queue & (i_first + o_dealt < num_long)
        i_place = tl.load(places + i_first + o_dealt, mask=m_long, other=0)
        tl.store(queues + i_first + o_queue, i_place.to(tl.int32), mask=m_long)
        num_own += m_long.to(tl.int32)
    num_given = 0
    i_row = 0
    while num_given < num_short:
        m_takes = m_queue & (i_row >= num_passed)
        i_short = num_given + tl.cumsum(m_takes.to(tl.int32), 0) - 1
        m_takes = m_takes & (i_short < num_short)
        i_place = tl.load(places + num_long + i_short, mask=m_takes, other=0)
        tl.store(queues + num_own * num_queues + o_queue, i_place.to(tl.int32), mask=m_takes)
        num_own += m_takes.to(tl.int32)
        num_given += tl.sum(m_takes.to(tl.int32), 0)
        i_row += 1
    tl.store(ends + o_queue, o_queue + num_own * num_queues, mask=m_queue)
