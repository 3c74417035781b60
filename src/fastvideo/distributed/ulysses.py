"""Ulysses: each rank swaps its tokens of all heads for all tokens of its heads, and back (DeepSpeed-Ulysses, 2309.14509).

`B batch, S tokens, H heads, D head size, P ranks`. Rank r holds tokens `r S/P ... (r+1) S/P` and works on heads
`r H/P ... (r+1) H/P`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastvideo.distributed.collectives import all_gather, all_to_all
from fastvideo.distributed.mesh import SequenceGroup
from fastvideo.distributed.shards import keep_own_part, sum_gradient

__all__ = ["check_heads", "exchange_mask", "gather_heads", "heads_to_tokens", "tokens_to_heads"]


def check_heads(num_heads: int, num_kv_heads: int, group: SequenceGroup) -> None:
    """Check that heads divide by the number of ranks.

    Raises:
        ValueError: They don't; the message says what would.
    """
    if num_heads % group.size or num_kv_heads % group.size:
        fitting = [size for size in range(1, num_kv_heads + 1) if num_heads % size == 0 == num_kv_heads % size]
        raise ValueError(
            f"{num_heads} query and {num_kv_heads} key heads can't be divided over {group.size} devices by Ulysses; "
            f"{', '.join(map(str, fitting))} devices would fit"
        )


def tokens_to_heads(tensors: Sequence[torch.Tensor], group: SequenceGroup) -> tuple[torch.Tensor, ...]:
    """Exchange `[B, S/P, H, D]` each for `[B, S, H/P, D]`, tensors of one length in one message.

    The tensors may differ in heads; they share batch, length and head size.
    """
    size = group.size
    batch, length, _, head_size = tensors[0].shape
    by_rank = [torch.unflatten(x, 2, (size, -1)).permute(2, 0, 1, 3, 4) for x in tensors]
    received = all_to_all(torch.cat(by_rank, dim=3), group)
    whole = received.permute(1, 0, 2, 3, 4).reshape(batch, size * length, -1, head_size)
    return torch.split(whole, [x.shape[2] // size for x in tensors], dim=2)


def heads_to_tokens(x: torch.Tensor, group: SequenceGroup) -> torch.Tensor:
    """Exchange `[B, S, H/P, D]` for `[B, S/P, H, D]`."""
    batch, length, heads, head_size = x.shape
    by_rank = x.reshape(batch, group.size, length // group.size, heads, head_size).permute(1, 0, 2, 3, 4)
    received = all_to_all(by_rank, group)
    return received.permute(1, 2, 0, 3, 4).reshape(batch, length // group.size, group.size * heads, head_size)


def gather_heads(x: torch.Tensor, group: SequenceGroup) -> torch.Tensor:
    """Return `[B, R, H, D]` on every rank from each rank's `[B, R, H/P, D]`."""
    return torch.cat(all_gather(x, group).unbind(0), dim=2)


def exchange_mask(mask: torch.Tensor, num_heads: int, num_replicated: int, group: SequenceGroup) -> torch.Tensor:
    """Turn a mask in a shard's coordinates into the one that this rank's heads need.

    Args:
        mask: Key padding `[B, S_kv/P + R]`, sharded like the keys, or a full mask `[B|1, H|1, S_q/P + R, S_kv + R]`. The R
            replicated tokens come last.
        num_heads: H.
        num_replicated: R.
        group: The ranks.

    Returns:
        `[B, S_kv + R]`, or `[B|1, H/P|1, S_q + R, S_kv + R]`.
    """
    if group.size == 1:
        return mask
    sendable = mask.to(torch.uint8) if mask.dtype == torch.bool else mask
    row_dim = mask.dim() - 1 if mask.dim() == 2 else 2
    own, replicated = torch.split(sendable, [mask.shape[row_dim] - num_replicated, num_replicated], dim=row_dim)
    if mask.dim() == 4 and mask.shape[1] == num_heads and num_heads > 1:
        (rows,) = tokens_to_heads([own.transpose(1, 2)], group)
        whole = torch.cat([rows.transpose(1, 2), keep_own_part(replicated, 1, group)], dim=2)
    else:
        whole = torch.cat([*all_gather(own, group).unbind(0), sum_gradient(replicated, group)], dim=row_dim)
    return whole.to(mask.dtype)
