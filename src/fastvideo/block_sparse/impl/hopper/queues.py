"""Which blocks each consumer of the dkey and dvalue kernel works on, in which order; in torch, without waiting for the device.

Walks differ in length: key tiles that many queries list, and small ones that share a block on the union of their lists, have
walks ten times as long as others. Those are dealt out first. The others follow head by head, so that all consumers read the
queries of one head at a time, and each consumer takes as many as make up for the long ones that it has or hasn't got.
"""

from __future__ import annotations

import torch
from torch import Tensor

# What a block takes besides its walk, in half steps.
_BLOCK_COST = 4


def fill_queues(lengths: Tensor, num_blocks: Tensor, num_queues: int) -> tuple[Tensor, Tensor]:
    """Distribute blocks over consumers.

    Args:
        lengths: `[heads, M]` integers, half steps of each place `head * M + block`.
        num_blocks: int32 scalar, blocks of a head that are there.
        num_queues: Consumers.

    Returns:
        `[rows, num_queues]` int32, a place a row for each consumer, and `[num_queues]` int32: `consumer + num_queues * number
        of its places`, the end of a loop over the flat queues. What lies behind it means nothing.

    Example:
        >>> queues, ends = fill_queues(torch.tensor([[30, 2, 1, 9, 2, 3]]), torch.tensor(6), 2)
        >>> [queues[: end // 2, i].tolist() for i, end in enumerate(ends.tolist())]
        [[3, 5, 1, 4, 2], [0]]
    """
    num_heads, max_blocks = lengths.shape
    device, num_places = lengths.device, lengths.numel()
    is_real = (torch.arange(max_blocks, device=device) < num_blocks).expand(num_heads, -1)
    work = torch.where(is_real, lengths.long() + _BLOCK_COST, 0)
    is_long = work * (num_heads * num_blocks) > 2 * work.sum()
    # Long ones, others, those that are not there; within these by head, and within a head by length: downwards, but upwards
    # in every other head, or the first queue of a row would always get the most. The last head goes downwards.
    i_head = torch.arange(num_heads, device=device)[:, None]
    rank = i_head + torch.where(is_real, torch.where(is_long, 0, num_heads), 2 * num_heads)
    goes_up = (num_heads - 1 - i_head) % 2 == 1
    places = ((rank << 32) + torch.where(goes_up & ~is_long, work, -work)).flatten().argsort()
    num_long, num_short = is_long.sum(), num_heads * num_blocks - is_long.sum()

    # The long ones row by row.
    rows = -(-num_places // num_queues)
    i_long = torch.arange(rows * num_queues, device=device).view(rows, num_queues)
    long_places = places[i_long.clamp(max=num_places - 1)]
    load = torch.where(i_long < num_long, work.flatten()[long_places], 0).sum(0)
    # How many rows of the others a queue lets pass for them; the fraction says which queue comes first in a row.
    passed = (load * num_short / (work.sum() - load.sum()).clamp(min=1)).clamp(max=2 * rows)
    by_fraction = passed.frac().argsort()
    passed, long_places = passed[by_fraction].long(), long_places[:, by_fraction]
    num_own = (i_long < num_long).sum(0)[by_fraction]

    # Of the others each queue takes one a row.
    i_row = torch.arange(3 * rows, device=device)[:, None]
    takes = i_row >= passed
    i_short = takes.flatten().cumsum(0).view_as(takes) - 1
    takes &= i_short < num_short
    short_places = places[(num_long + i_short).clamp(0, num_places - 1)]
    i_taken = (i_row - num_own + passed).clamp(0, 3 * rows - 1)
    queues = torch.where(i_row < num_own, long_places.repeat(3, 1), short_places.gather(0, i_taken))
    ends = torch.arange(num_queues, device=device) + num_queues * (num_own + takes.sum(0))
    return queues.int(), ends.int()
