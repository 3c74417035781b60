"""A tensor cut into one shard per rank, and back; and the lengths of shards.

Lengths come from the caller: as an argument, or with the step's context (`set_forward_context(..., shard_lengths=)` or
`sequence_parallel(mesh, shard_lengths=)`). Without them shards are equal. No rank asks its peers for them; before anything is
exchanged ranks agree that all mean the same (`fastvideo.distributed.agreement`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fastvideo.compilation import plain
from fastvideo.distributed.agreement import agree, agree_on_backward
from fastvideo.distributed.collectives import all_gather, sum_gradient
from fastvideo.distributed.mesh import SequenceGroup, current_sequence_group
from fastvideo.forward_context import check_shard_lengths, restored, thread_state

__all__ = ["gather_sequence", "key_padding_shard", "resolve_lengths", "shard_sequence", "shards_of", "split_lengths"]


def split_lengths(length: int, num_shards: int) -> tuple[int, ...]:
    """Cut `length` tokens into shards that differ by one at most, longer ones first.

    Raises:
        ValueError: `length` is negative or `num_shards` isn't positive.

    Example:
        >>> split_lengths(8, 3)
        (3, 3, 2)
    """
    if length < 0 or num_shards < 1:
        raise ValueError(f"expected length >= 0 and num_shards >= 1, got {length} and {num_shards}")
    whole, rest = divmod(length, num_shards)
    return (whole + 1,) * rest + (whole,) * (num_shards - rest)


def resolve_lengths(
    own_length: int, group: SequenceGroup, given: Sequence[int] | None = None, what: str = "shard_lengths"
) -> tuple[int, ...]:
    """Return the shard lengths of a sequence of which this rank holds `own_length` tokens; equal ones where none are given.

    Raises:
        TypeError: The lengths are no integers.
        ValueError: They are of another number of ranks, or this rank's differs.

    Example:
        >>> resolve_lengths(8, current_sequence_group())
        (8,)
    """
    lengths = check_shard_lengths(given)
    own_length = plain(own_length)
    if lengths is None:
        return (own_length,) * group.size
    if len(lengths) != group.size:
        raise ValueError(f"expected {what} of the {group.size} ranks that share the sequence, got {lengths}")
    if lengths[group.rank] != own_length:
        raise ValueError(
            f"{what}={lengths} give rank {group.rank} {lengths[group.rank]} tokens, and its tensor has {own_length}; set those "
            "of this step with set_forward_context(..., shard_lengths=), or hand them to the layer"
        )
    return lengths


@contextlib.contextmanager
def shards_of(num_tokens: int) -> Iterator[tuple[int, ...]]:
    """Share a sequence of `num_tokens` tokens inside, in lengths that differ by one at most where none are given.

    A model that is handed the whole input on every rank, and cuts it itself, calls its layers inside.

    Raises:
        ValueError: The step's `shard_lengths` don't add up to `num_tokens`.

    Example:
        >>> with shards_of(7) as lengths:
        ...     lengths
        (7,)
    """
    group = current_sequence_group()
    if thread_state.shard_lengths is None:
        lengths = split_lengths(plain(num_tokens), group.size)
    else:
        lengths = _whole_lengths(num_tokens, group, None)
    with restored(shard_lengths=lengths):
        yield lengths


def shard_sequence(
    x: torch.Tensor,
    dim: int = 1,
    group: SequenceGroup | None = None,
    *,
    shard_lengths: Sequence[int] | None = None,
) -> torch.Tensor:
    """Return this rank's part of a tensor that every rank holds.

    Its gradient is the whole one on every rank, under the convention that the global loss is the sum of local losses. Every
    rank calls it, in the same place: only the backward pass exchanges anything, but a difference is told here.

    Args:
        x: The same on every rank.
        dim: What is cut.
        group: The ranks; `None` means those that count here.
        shard_lengths: Length of each rank's part; `None` takes those of the step's context, then equal parts.

    Raises:
        ValueError: The lengths don't add up to that of `x`, or there are none and it doesn't divide by the number of ranks; or
            it has no such dim.
        RanksDisagree: Another rank makes another call, or none within the timeout.

    Example:
        >>> torch.equal(shard_sequence(torch.arange(6), dim=0), torch.arange(6))
        True
    """
    group = current_sequence_group(group)
    lengths = _whole_lengths(_length(x, dim), group, shard_lengths)
    if group.size == 1:
        return x
    first = sum(lengths[: group.rank])
    fields = _agreed_on("shard_sequence", x, dim, lengths)
    # Nothing is sent before the backward pass, so the check may follow the cut, and in compiled code copies a part only.
    part = agree(sum_over_mesh(x, group).narrow(dim, first, lengths[group.rank]), group, **fields)
    return _agreed_backward(part, group, fields).contiguous()


def gather_sequence(
    x: torch.Tensor,
    dim: int = 1,
    group: SequenceGroup | None = None,
    *,
    shard_lengths: Sequence[int] | None = None,
) -> torch.Tensor:
    """Return the whole tensor on every rank from its shards, in the order of ranks.

    The gradient of a shard is the sum over ranks of the gradients that arrive for it: with a loss on the whole tensor, let one
    rank compute it, or each a share.

    Args:
        x: This rank's shard.
        dim: What was cut.
        group: The ranks; `None` means those that count here.
        shard_lengths: Length of each rank's shard; `None` takes those of the step's context, then equal shards.

    Raises:
        ValueError: The lengths don't fit this rank's shard, or it has no such dim.
        RanksDisagree: Another rank makes another call, or none within the timeout.

    Example:
        >>> torch.equal(gather_sequence(torch.arange(6), dim=0), torch.arange(6))
        True
    """
    group = current_sequence_group(group)
    given = thread_state.shard_lengths if shard_lengths is None else shard_lengths
    lengths = resolve_lengths(_length(x, dim), group, given)
    if group.size == 1:
        return x
    fields = _agreed_on("gather_sequence", x, dim, lengths)
    return _agreed_backward(gather_over_mesh(agree(x, group, **fields), dim, lengths, group), group, fields)


def key_padding_shard(
    lengths: torch.Tensor, group: SequenceGroup | None = None, *, shard_lengths: Sequence[int]
) -> torch.Tensor:
    """Return this rank's part of the key padding mask that says how many tokens of each sample are real.

    Args:
        lengths: Real tokens of each sample on all ranks together, integers `[B]`; they come first.
        group: The ranks; `None` means those that count here.
        shard_lengths: Tokens of each rank's shard of the keys.

    Returns:
        Bool `[B, S]` with S this rank's tokens; True is a real one.

    Raises:
        ValueError: `shard_lengths` is of another number of ranks.

    Example:
        >>> key_padding_shard(torch.tensor([1, 3]), shard_lengths=(3,)).int().tolist()
        [[1, 0, 0], [1, 1, 1]]
    """
    group = current_sequence_group(group)
    shards = resolve_lengths(shard_lengths[group.rank], group, shard_lengths)
    first = sum(shards[: group.rank])
    positions = torch.arange(first, first + shards[group.rank], device=lengths.device)
    return positions < lengths[:, None]


def sum_over_mesh(x: torch.Tensor, group: SequenceGroup) -> torch.Tensor:
    """Return `x`, which every rank holds and uses in part; its gradient is summed over all ranks."""
    for part in _parts(group):
        x = sum_gradient(x, part)
    return x


def gather_over_mesh(x: torch.Tensor, dim: int, lengths: Sequence[int], group: SequenceGroup) -> torch.Tensor:
    """Return every rank's `x` joined along `dim`, over one dim of the mesh after the other."""
    if group.name or group.size == 1:
        return all_gather(x, dim, lengths, group)
    ring, ulysses = _parts(group)
    rows = rows_of_mesh(lengths, ulysses)
    x = all_gather(x, dim, rows[ring.rank], ulysses)
    return all_gather(x, dim, [sum(row) for row in rows], ring)


def rows_of_mesh(lengths: Sequence[int], ulysses: SequenceGroup) -> tuple[tuple[int, ...], ...]:
    """Return the shard lengths of each Ulysses group, in the order of the ring."""
    return tuple(tuple(lengths[first : first + ulysses.size]) for first in range(0, len(lengths), ulysses.size))


def _agreed_on(operation: str, x: torch.Tensor, dim: int, lengths: tuple[int, ...]) -> dict[str, Any]:
    """Return what ranks have to agree on before they exchange shards."""
    dim = dim % x.dim()
    has_grad = x.requires_grad and torch.is_grad_enabled()
    return {
        "pass": "forward" if has_grad else "inference",
        "operation": operation,
        "dim": dim,
        "other_dims": (*x.shape[:dim], *x.shape[dim + 1 :]),
        "lengths": lengths,
        "dtype": x.dtype,
    }


def _agreed_backward(x: torch.Tensor, group: SequenceGroup, fields: dict[str, Any]) -> torch.Tensor:
    return agree_on_backward((x,), group, **fields)[0] if fields["pass"] == "forward" else x


def _parts(group: SequenceGroup) -> tuple[SequenceGroup, ...]:
    if group.name or group.ring is None or group.ulysses is None:
        return (group,)
    return group.ring, group.ulysses


def _length(x: torch.Tensor, dim: int) -> int:
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"expected a tensor with a dim {dim} along which it is shared, got shape {tuple(x.shape)}")
    return x.shape[dim]


def _whole_lengths(length: int, group: SequenceGroup, given: Sequence[int] | None) -> tuple[int, ...]:
    length = plain(length)
    lengths = check_shard_lengths(thread_state.shard_lengths if given is None else given)
    if lengths is None:
        if length % group.size:
            raise ValueError(
                f"a sequence of {length} tokens can't be divided over {group.size} devices without shard lengths; say them "
                f"with set_forward_context(..., shard_lengths=split_lengths({length}, {group.size})), "
                f"or bring a length that is a multiple of {group.size}"
            )
        return split_lengths(length, group.size)
    if len(lengths) != group.size or sum(lengths) != length:
        raise ValueError(f"expected shard_lengths of {group.size} ranks that add up to {length} tokens, got {lengths}")
    return lengths
