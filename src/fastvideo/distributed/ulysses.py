"""Ulysses: each rank swaps its tokens of all heads for all tokens of its heads, and back (DeepSpeed-Ulysses, 2309.14509).

`B batch, S tokens, H heads, D head size, P ranks`. Any heads and any lengths: rank r holds `lengths[r]` tokens and works on
`shares.query[r]`, the heads of `split_lengths(H, P)`; it gets the key heads that those read, so that a key head whose readers
sit on several ranks goes to each of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastvideo.distributed.collectives import all_gather, exchange
from fastvideo.distributed.mesh import SequenceGroup
from fastvideo.distributed.rooms import Room, cut, join
from fastvideo.distributed.routes import Cut, Interval, Route, consecutive, remembered
from fastvideo.distributed.shards import split_lengths

__all__ = [
    "HeadShares",
    "check_heads",
    "cut_heads",
    "exchange_mask",
    "group_lengths",
    "groups_that_pay",
    "groups_that_travel",
    "head_route",
    "heads_to_tokens",
    "join_heads",
    "room_of",
    "share_heads",
    "token_route",
    "tokens_to_heads",
]


_WORK_WORTH_GROUPS = 5 << 24
"""Elements of a device's queries from which on groups of heads pay for their launches.

At 720p two and four H200s gain by three groups; with half of four cards' work these would be as slow as their host.
"""


class HeadShares(NamedTuple):
    """Which heads each rank works on.

    Attributes:
        query: Each rank's query heads; neighbouring, and every head once.
        key: The key heads that they read.
    """

    query: tuple[Interval, ...]
    key: tuple[Interval, ...]

    def key_index(self, rank: int, num_heads: int, num_kv_heads: int) -> tuple[int, ...]:
        """Return which of a rank's key heads each group of its query heads reads, groups being of equal size.

        A rank may hold query heads that read its key heads unequally often, which kernels don't take; then a key head is
        named more than once.

        Example:
            >>> share_heads(12, 4, 3).key_index(0, 12, 4)
            (0, 0, 0, 1)
        """
        (start, stop), first = self.query[rank], self.key[rank][0]
        readers = num_heads // num_kv_heads
        group = math.gcd(stop - start, readers, -start % readers)
        return tuple(head // readers - first for head in range(start, stop, group)) if group else ()


@remembered
def share_heads(num_heads: int, num_kv_heads: int, size: int, piece: int = 0, num_pieces: int = 1) -> HeadShares:
    """Share query heads over `size` ranks as evenly as they go, and key heads with those who read them.

    Args:
        num_heads: Query heads.
        num_kv_heads: Key heads; query head h reads key head `h // (num_heads / num_kv_heads)`.
        size: Number of ranks.
        piece: Which piece of each rank's heads to return.
        num_pieces: Into how many pieces each rank's heads are cut, see `group_lengths`.

    Example:
        >>> share_heads(6, 2, 4)
        HeadShares(query=((0, 2), (2, 4), (4, 5), (5, 6)), key=((0, 1), (0, 2), (1, 2), (1, 2)))
    """
    readers = num_heads // num_kv_heads
    query, key, position = [], [], 0
    for count in split_lengths(num_heads, size):
        if count % readers == 0:
            pieces = [readers * length for length in group_lengths(count // readers, num_pieces)]
        else:
            pieces = list(split_lengths(count, num_pieces))
        start = position + sum(pieces[:piece])
        stop = start + pieces[piece]
        query.append((start, stop))
        key.append((start // readers, -(-stop // readers)) if stop > start else (0, 0))
        position += count
    return HeadShares(tuple(query), tuple(key))


def check_heads(num_heads: int, num_kv_heads: int, group: SequenceGroup) -> None:
    """Check that heads divide by the number of ranks, for callers that need as many heads on each.

    Raises:
        NotImplementedError: The ranks form a mesh of two dims.
        ValueError: They don't; the message says what would.
    """
    if group.size > 1 and not group.name:
        raise NotImplementedError("expected the ranks of one process group, got a mesh with 'ring' and 'ulysses' above 1")
    if num_heads % group.size or num_kv_heads % group.size:
        fitting = [size for size in range(1, num_kv_heads + 1) if num_heads % size == 0 == num_kv_heads % size]
        raise ValueError(
            f"{num_heads} query and {num_kv_heads} key heads can't be divided over {group.size} devices by Ulysses; "
            f"{', '.join(map(str, fitting))} devices would fit"
        )


def groups_that_pay(elements: int, ulysses: int, ring: int, *, is_sparse: bool, needs_grad: bool) -> int:
    """Return into how many groups heads are best cut where copy engines carry them, so that one travels behind another's work.

    Three, where they hide something: in sparse attention of much work. Dense attention takes so long that its exchange counts
    between more than two ranks alone, where heads are swapped for tokens and nothing else travels, and where no backward pass
    follows, which has thrice the work to hide an exchange behind.

    Args:
        elements: Those of a rank's queries.
        ulysses: Ranks that swap heads for tokens.
        ring: Ranks that share keys.
        is_sparse: A query selects tiles of keys.
        needs_grad: A backward pass follows.

    Example:
        >>> groups_that_pay(75_600 * 10 * 128, 4, 1, is_sparse=False, needs_grad=False)
        3
    """
    hides = is_sparse or (ulysses > 2 and ring == 1 and not needs_grad)
    return 3 if hides and elements >= _WORK_WORTH_GROUPS else 1


def groups_that_travel(wanted: int, kv_heads: int, ulysses: int, *, gathers: bool, is_causal: bool) -> int:
    """Return into how many groups heads are cut: at most `wanted`, where they divide by the ranks and groups can travel alone.

    Args:
        wanted: Groups asked for.
        kv_heads: Key heads.
        ulysses: Ranks that swap heads for tokens.
        gathers: Keys of other rows come at once, not around a ring.
        is_causal: Tokens are regrouped, all heads together.

    Example:
        >>> [groups_that_travel(3, heads, 4, gathers=False, is_causal=False) for heads in (40, 8, 10)]
        [3, 2, 1]
    """
    own_heads, rest = divmod(kv_heads, ulysses)
    travels = ulysses > 1 or (gathers and not is_causal)
    return max(1, min(wanted, own_heads)) if travels and rest == 0 else 1


def group_lengths(num_heads: int, num_groups: int) -> tuple[int, ...]:
    """Return into which groups a rank's heads are cut, of which one travels while another is computed.

    Nothing hides the way of the first one here, or of the last one's output back, so these two are small.

    Args:
        num_heads: Heads of one rank, or what is to stay together of them.
        num_groups: How many groups.

    Example:
        >>> group_lengths(20, 3), group_lengths(20, 1)
        ((3, 14, 3), (20,))
    """
    if num_groups < 3 or num_heads < num_groups:
        return split_lengths(num_heads, num_groups)
    end = max(1, round(num_heads / (2 * num_groups)))
    return (end, *split_lengths(num_heads - 2 * end, num_groups - 2), end)


def cut_heads(x: torch.Tensor, size: int, lengths: Sequence[int], room: Room | None = None) -> list[torch.Tensor]:
    """Return one tensor per group of heads, each with every rank's heads of that group.

    Args:
        x: `[B, S, H, D]`.
        size: Number of ranks.
        lengths: Heads of each group on one rank; above one group, H is `size` times their sum.
        room: Where gradients of several groups arrive, `room_of(lengths)`, if they can.

    Returns:
        `[B, S, size, length, D]` each, or `[B, S, length, D]` on one rank; `x` itself if there is one group.
    """
    if len(lengths) == 1:
        return [x]
    if size == 1:
        return list(torch.split(x, list(lengths), dim=2))
    by_rank = torch.unflatten(x, 2, (size, -1))
    return list(torch.split(by_rank, list(lengths), dim=3) if room is None else cut(by_rank, room))


def room_of(lengths: Sequence[int]) -> Room:
    """Return the room for groups of heads `[B, S, size, length, D]`."""
    return Room(lengths, 3)


def join_heads(pieces: Sequence[torch.Tensor], size: int, room: Room | None = None) -> torch.Tensor:
    """Return `[B, S, H, D]` from what `cut_heads` would make of it, without a copy where that arrived in `room`."""
    if len(pieces) == 1:
        return pieces[0]
    if room is not None:
        return join(pieces, room).flatten(2, 3)
    by_rank = [piece if piece.dim() == 5 else torch.unflatten(piece, 2, (size, -1)) for piece in pieces]
    return torch.cat(by_rank, dim=3).flatten(2, 3)


@remembered
def head_route(shape: tuple[int, ...], heads: tuple[Interval, ...], lengths: tuple[int, ...], rank: int) -> Route:
    """Return the route of a rank's tokens of all heads to all tokens of its heads.

    Args:
        shape: `[B, S_r, H, D]`, or `[B, S_r, P, h, D]` with as many heads for every rank.
        heads: Heads of each rank.
        lengths: Tokens of each rank, S together.
        rank: This rank.

    Returns:
        The route to `[B, S, h, D]`.
    """
    start, stop = heads[rank]
    by_heads = Cut(2, tuple((interval,) for interval in heads))
    if len(shape) == 5:
        by_heads = consecutive(2, (1,) * len(heads))
    counts = _swapped(lengths, heads, shape[0] * shape[-1])
    return Route(by_heads, consecutive(1, lengths), tuple(shape), (shape[0], sum(lengths), stop - start, shape[-1]), counts)


@remembered
def token_route(
    shape: tuple[int, ...], heads: tuple[Interval, ...], lengths: tuple[int, ...], rank: int, *, is_group: bool = False
) -> Route:
    """Return the route of all tokens of a rank's heads back to its tokens of all heads.

    Args:
        shape: `[B, S, h, D]`.
        heads: Heads of each rank.
        lengths: Tokens of each rank.
        rank: This rank.
        is_group: They are one group of each rank's heads, as many for every rank, for `join_heads`.

    Returns:
        The route to `[B, S_r, H, D]`, or for a group `[B, S_r, P, h, D]`, which then needs no copy of its own.
    """
    batch, _, num_heads, head_size = shape
    counts = [stop - start for start, stop in heads]
    by_rank = consecutive(2, (1,) * len(heads) if is_group else counts)
    own = (len(heads), num_heads) if is_group else (sum(counts),)
    back = _swapped(lengths, heads, batch * head_size)
    shape_here = (batch, lengths[rank], *own, head_size)
    return Route(consecutive(1, lengths), by_rank, tuple(shape), shape_here, tuple(zip(*back, strict=True)))


def tokens_to_heads(tensors: Sequence[torch.Tensor], lengths: Sequence[int], group: SequenceGroup) -> tuple[torch.Tensor, ...]:
    """Exchange `[B, S_r, H, D]` each for `[B, S, H/P, D]`, rank r having `lengths[r]` tokens; heads divide by the ranks."""
    result = []
    for x in tensors:
        shares = share_heads(x.shape[2], x.shape[2], group.size)
        result.append(exchange(x, head_route(x.shape, shares.query, tuple(lengths), group.rank), group))
    return tuple(result)


def heads_to_tokens(x: torch.Tensor, lengths: Sequence[int], group: SequenceGroup) -> torch.Tensor:
    """Exchange `[B, S, H/P, D]` for `[B, S_r, H, D]`, rank r having `lengths[r]` tokens."""
    size, num_heads = group.size, x.shape[2]
    heads = share_heads(num_heads * size, num_heads * size, size).query
    return exchange(x, token_route(x.shape, heads, tuple(lengths), group.rank), group)


def exchange_mask(
    mask: torch.Tensor, shares: HeadShares, lengths: Sequence[int], num_replicated: int, group: SequenceGroup
) -> torch.Tensor:
    """Return the rows of all ranks of a full mask, for this rank's heads.

    Args:
        mask: `[B|1, H|1, S_r, S_kv]`, bool or additive, rows of this rank's tokens and then of the replicated ones.
        shares: Which heads each rank works on.
        lengths: Rows of each rank, replicated ones not counted.
        num_replicated: Rows of replicated tokens, R.
        group: The ranks.

    Returns:
        `[B|1, h|1, S + R, S_kv]`.
    """
    own, replicated = torch.split(_sendable(mask), [mask.shape[2] - num_replicated, num_replicated], dim=2)
    if shares.query[-1][1] > 1 and mask.shape[1] == shares.query[-1][1]:
        start, stop = shares.query[group.rank]
        by_heads = Cut(1, tuple((interval,) for interval in shares.query))
        shape = (mask.shape[0], stop - start, sum(lengths), mask.shape[3])
        counts = _swapped(lengths, shares.query, mask.shape[0] * mask.shape[3])
        rows = exchange(own, Route(by_heads, consecutive(2, lengths), tuple(own.shape), shape, counts), group)
        replicated = replicated[:, start:stop]
    else:
        rows = all_gather(own, 2, lengths, group)
    return torch.cat([rows, replicated], dim=2).to(mask.dtype)


def _swapped(lengths: Sequence[int], heads: Sequence[Interval], row: int) -> tuple[tuple[int, ...], ...]:
    """Return what each rank sends each other, when tokens of all heads are swapped for all tokens of some heads."""
    return tuple([tuple([length * (stop - start) * row for start, stop in heads]) for length in lengths])


def _sendable(mask: torch.Tensor) -> torch.Tensor:
    return mask.to(torch.uint8) if mask.dtype == torch.bool else mask
