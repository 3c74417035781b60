"""Causal attention with replicated tokens: where they stand, and so which tokens see which.

A token's position is its place in the whole sequence as one device concatenates it: the shards in the order of ranks, with the
replicated tokens behind all of them (`joint_strategy="rear"`) or before (`"front"`). So in front, replicated tokens are seen by
all others and see each other up to themselves; behind, they see the whole sequence and no token of it sees them, which leaves
keys without queries there unseen.

`B batch, S tokens of this device's shard, N keys of all devices, R replicated tokens, H heads, D head size`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fastvideo.attention.shared_call import SharedCall

__all__ = ["in_one_sequence", "join_at", "place_of", "split_at"]

Tensor = torch.Tensor


def in_one_sequence(call: SharedCall) -> SharedCall:
    """Return a causal call whose replicated tokens have queries, keys and values, or are gone because no query sees them.

    Keys in front that came without queries get some, of zeros, whose output nobody reads: then rows and columns count positions
    alike, which is what every causal kernel takes. They cost R rows of R keys at most.

    Args:
        call: A causal call with replicated tokens; they stand last in its mask.

    Returns:
        The call, with a mask in the order of the sequence.
    """
    if call.replicated is None:
        return call
    query, key, value = call.replicated
    count, mask = call.num_more, call.mask
    if query is None and not call.in_front:
        # Not a token of them, but all of their graph: gradients of 0 flow, and with them the sum over the ranks.
        joined = [torch.cat([own, more[:, :0]], dim=1) for own, more in ((call.key, key), (call.value, value))]
        mask = None if mask is None else mask[..., : mask.shape[-1] - count]
        return replace(call, key=joined[0], value=joined[1], replicated=None, mask=mask)
    if query is None:
        query = call.query.new_zeros((call.query.shape[0], count, *call.query.shape[2:]))
        if mask is not None and mask.dim() == 4:
            rows = mask.new_full((*mask.shape[:2], count, mask.shape[3]), mask.dtype == torch.bool)
            mask = torch.cat([mask, rows], dim=2)
    if mask is not None and call.in_front:
        mask = torch.cat([mask[..., mask.shape[-1] - count :], mask[..., : mask.shape[-1] - count]], dim=-1)
        if mask.dim() == 4:
            mask = torch.cat([mask[:, :, mask.shape[2] - count :], mask[:, :, : mask.shape[2] - count]], dim=2)
    return replace(call, replicated=(query, key, value), mask=mask)


def join_at(call: SharedCall, rank: int) -> SharedCall:
    """Return the call with its replicated tokens as tokens of the first shard or the last, whose rank alone works on them.

    Args:
        call: What `in_one_sequence` returned, with replicated tokens.
        rank: This rank's place among those that `call.lengths` counts.

    Returns:
        The call without replicated tokens. On the other ranks their gradients are 0.
    """
    count, mask, place = call.num_more, call.mask, place_of(call)
    own = count if rank == place else 0
    if mask is not None and mask.dim() == 4:
        mask = mask[:, :, count - own :] if call.in_front else mask[:, :, : mask.shape[2] - count + own]
    query, key, value = [
        x if more is None else torch.cat([more[:, :own], x] if call.in_front else [x, more[:, :own]], dim=1)
        for more, x in zip(call.replicated or (None,) * 3, (call.query, call.key, call.value), strict=True)
    ]
    lengths, kv_lengths = _longer(call.lengths, place, count), _longer(call.kv_lengths, place, count)
    return replace(call, query=query, key=key, value=value, replicated=None, mask=mask, lengths=lengths, kv_lengths=kv_lengths)


def split_at(output: Tensor, call: SharedCall, rank: int) -> tuple[Tensor, Tensor]:
    """Return the output of a rank's own tokens, and that of the replicated ones, which is empty where others have it.

    Args:
        output: What came of `join_at(call, rank)`.
        call: The call before it.
        rank: This rank's place.
    """
    own = call.num_more if rank == place_of(call) else 0
    if call.in_front:
        return output[:, own:], output[:, :own]
    return output[:, : output.shape[1] - own], output[:, output.shape[1] - own :]


def place_of(call: SharedCall) -> int:
    """Return the place of the rank whose shard the replicated tokens stand beside."""
    return 0 if call.in_front else len(call.lengths) - 1


def _longer(lengths: Sequence[int], place: int, count: int) -> tuple[int, ...]:
    return tuple(length + (count if rank == place else 0) for rank, length in enumerate(lengths))
