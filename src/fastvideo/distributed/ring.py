"""Attention in parts: each rank keeps its queries, keys come shard by shard, and partial results are merged (2310.01889).

`B batch, S tokens of this rank, H heads, D head size, P ranks`. In step j a rank gets the keys of rank `r - j` straight from
it while it computes with those of step j - 1. The backward pass gets them again, computes each part's gradients from the
merged output and log-sum-exp, and sends the keys' gradients straight home, where they are added in float32. So memory holds
the keys of two ranks at a time, whatever P. All that comes is lent (`fastvideo.distributed.collectives.lend`): a step reads it
where it lands.

Causal attention is balanced by order: the sequence is cut into 2P pieces, and rank r works on pieces r and 2P - 1 - r
(zigzag). Callers don't see it: tokens come in neighbouring shards, are regrouped, and go back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch

from fastvideo.distributed.collectives import Launched, arrive, give_back, kept, lend
from fastvideo.distributed.merge import PartialMerger
from fastvideo.distributed.mesh import SequenceGroup
from fastvideo.distributed.routes import Cut, Interval, Route
from fastvideo.distributed.shards import split_lengths
from fastvideo.second_derivatives import differentiable_once

__all__ = [
    "PartKernels",
    "Step",
    "attend_in_parts",
    "balanced_pieces",
    "causal_steps",
    "regroup_route",
    "ring_steps",
    "way_home",
]


class PartKernels(Protocol):
    """Attention over some of the keys, and its gradients when the result over all keys is known."""

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, is_causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the output `[B, S_q, H, D]` over these keys and its log-sum-exp `[B, S_q, H]`."""
        ...

    def backward(
        self,
        grad_output: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor,
        mask: torch.Tensor | None,
        is_causal: bool,
        mask_needs_grad: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return the gradients of query, key, value and mask; `output` and `lse` are those over all keys."""
        ...


class Step(NamedTuple):
    """One part of the work of one rank.

    Attributes:
        rows: Its queries that take part.
        keys: Where the keys that they see stand: among this rank's own, or in what is fetched.
        columns: The same keys as columns of a mask over all keys, one after another.
        is_causal: The step is the diagonal: row i sees keys up to i.
        fetch: How keys come, `[B, S, H, D]`, and values likewise; `None` where they are here.
    """

    rows: Interval
    keys: Interval
    columns: tuple[Interval, ...]
    is_causal: bool = False
    fetch: Route | None = None


def ring_steps(
    rank: int, num_rows: int, lengths: Sequence[int], key_shape: Sequence[int], *, is_causal: bool
) -> tuple[Step, ...]:
    """Return the steps of a ring, its own keys first.

    Args:
        rank: This rank's place.
        num_rows: Its queries.
        lengths: Keys of each rank in neighbouring shards.
        key_shape: Shape of this rank's keys, `[B, S, H, D]`.
        is_causal: Queries and keys have been regrouped by `regroup_route`.
    """
    size = len(lengths)
    pieces = balanced_pieces(sum(lengths), size) if is_causal else _whole_pieces(lengths)
    steps = []
    for distance in range(size):
        source, target = (rank - distance) % size, (rank + distance) % size
        seen, shown = _seen(source, rank, pieces, is_causal), _seen(rank, target, pieces, is_causal)
        count = _count(seen)
        # Of a later rank's keys, only the late piece of the queries sees any.
        first_row = _count(pieces[rank][:1]) if is_causal and source > rank else 0
        fetch = None
        if distance:
            # What a rank shows of its keys is all of them, or the early piece, which stands first.
            nothing: tuple[Interval, ...] = ()
            send, receive = [nothing] * size, [nothing] * size
            send[target], receive[source] = ((0, _count(shown)),), ((0, count),)
            batch, own, *head = key_shape
            counts = [[0] * size for _ in range(size)]
            for reader in range(size):
                owner = (reader - distance) % size
                counts[owner][reader] = batch * math.prod(head) * _count(_seen(owner, reader, pieces, is_causal))
            fetch = Route(
                Cut(1, tuple(send)),
                Cut(1, tuple(receive)),
                (batch, own, *head),
                (batch, count, *head),
                tuple([tuple(row) for row in counts]),
            )
        steps.append(Step((first_row, num_rows), (0, count), seen, is_causal and not distance, fetch))
    return tuple(steps)


def way_home(fetch: Route) -> Route:
    """Return the route of the gradients of what `fetch` brings, to the first tokens of the rank that they belong to."""
    back = fetch.back()
    batch, _, *head = back.shape
    count = sum(last - first for part in back.receive.parts for first, last in part)
    return back._replace(shape=(batch, count, *head))


def causal_steps(rank: int, size: int, total: int) -> tuple[Step, ...]:
    """Return the steps of causal attention where all keys are here, in order, and queries are those of `balanced_pieces`."""
    steps, row = [], 0
    for first, last in balanced_pieces(total, size)[rank]:
        rows, row = (row, row + last - first), row + last - first
        steps.append(Step(rows, (first, last), ((first, last),), is_causal=True))
        steps.append(Step(rows, (0, first), ((0, first),)))
    return tuple(steps)


def balanced_pieces(total: int, size: int) -> list[tuple[Interval, ...]]:
    """Return the two pieces of a sequence that each rank works on in causal attention, so that all have the same work.

    Example:
        >>> balanced_pieces(8, 2)
        [((0, 2), (6, 8)), ((2, 4), (4, 6))]
    """
    lengths = split_lengths(total, 2 * size)
    stops = [sum(lengths[: piece + 1]) for piece in range(2 * size)]
    pieces = [(stop - length, stop) for stop, length in zip(stops, lengths, strict=True)]
    return [(pieces[rank], pieces[2 * size - 1 - rank]) for rank in range(size)]


def regroup_route(shape: Sequence[int], dim: int, lengths: Sequence[int], rank: int) -> Route:
    """Return the route from neighbouring shards of `lengths` along `dim` to `balanced_pieces`."""
    size = len(lengths)
    pieces, shards = balanced_pieces(sum(lengths), size), _whole_pieces(lengths)
    send = tuple(_positions(_common(shards[rank][0], pieces[r]), shards[rank]) for r in range(size))
    receive = tuple(_positions(_common(shards[r][0], pieces[rank]), pieces[rank]) for r in range(size))
    own, row = _count(pieces[rank]), math.prod(shape[:dim]) * math.prod(shape[dim + 1 :])
    counts = tuple([tuple([row * _count(_common(shard[0], wanted)) for wanted in pieces]) for shard in shards])
    return Route(Cut(dim, send), Cut(dim, receive), tuple(shape), (*shape[:dim], own, *shape[dim + 1 :]), counts)


def attend_in_parts(
    kernels: PartKernels,
    steps: tuple[Step, ...],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    group: SequenceGroup,
    *,
    mask: torch.Tensor | None = None,
    replicated: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return attention of this rank's queries over the keys of all steps.

    Args:
        kernels: What computes a part.
        steps: The work, at least one step.
        query: `[B, S_q, H, D]`.
        key: This rank's keys, `[B, S_kv, H_kv, D]`.
        value: Its values, likewise.
        group: The ranks that share the keys.
        mask: Key padding `[B, N + R]` or `[B|1, H|1, S_q, N + R]` over all N keys in the order of the sequence, and the R
            replicated ones.
        replicated: Keys and values that every rank holds, `[B, R, H_kv, D]`; every query sees them.

    Returns:
        `[B, S_q, H, D]`.
    """
    more_keys, more_values = (None, None) if replicated is None else replicated
    if torch.compiler.is_compiling():
        # Dynamo takes no tensor twice.
        key = key.view_as(key) if key is query else key
        value = value.view_as(value) if value is query or value is key else value
        more_values = more_values.view_as(more_values) if more_values is not None and more_values is more_keys else more_values
    return _Parts.apply(query, key, value, mask, more_keys, more_values, kernels, steps, group.name)  # type: ignore[no-any-return,no-untyped-call]


class _Parts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        more_keys: torch.Tensor | None,
        more_values: torch.Tensor | None,
        kernels: PartKernels,
        steps: tuple[Step, ...],
        name: str,
    ) -> torch.Tensor:
        merger = PartialMerger(query)
        parts = _Keys(key, value, more_keys, more_values, steps, name)
        for number, step in enumerate(steps):
            k, v = parts.of_step(number)
            first, last = step.rows
            if last > first and k.shape[1]:
                part_mask = _part_mask(mask, step, parts.num_more if number == 0 else 0)
                out, part_lse = kernels.forward(query[:, first:last], k, v, part_mask, step.is_causal)
                merger.add(parts.kept(out), part_lse, step.rows)
            parts.give_back()
        output, lse = merger.output()
        ctx.save_for_backward(query, key, value, mask, more_keys, more_values, output, lse)
        ctx.work = (kernels, steps, name)
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _gradients(ctx, grad, *ctx.saved_tensors)  # type: ignore[no-any-return]


@differentiable_once
def _gradients(ctx: Any, grad: torch.Tensor, *saved: Any) -> tuple[torch.Tensor | None, ...]:
    query, key, value, mask, more_keys, more_values, output, lse = saved
    kernels, steps, name = ctx.work
    wide = lse.dtype
    # A row that sees nothing anywhere has no finite log-sum-exp; its weights are 0 with any.
    lse = lse.masked_fill(lse == -torch.inf, 0.0)
    grad_query, grad_kv = _Sum(query, wide), (_Sum(key, wide), _Sum(value, wide))
    mask_needs_grad = mask is not None and ctx.needs_input_grad[3]
    grad_mask = torch.zeros(mask.shape, dtype=wide, device=mask.device) if mask_needs_grad else None
    grad_more: list[torch.Tensor | None] = [None, None]
    parts = _Keys(key, value, more_keys, more_values, steps, name)
    on_the_way: list[Launched] = []
    for number, step in enumerate(steps):
        k, v = parts.of_step(number)
        num_more = parts.num_more if number == 0 else 0
        first, last = step.rows
        if last > first and k.shape[1]:
            rows = slice(first, last)
            part_mask = _part_mask(mask, step, num_more)
            result = (output[:, rows], lse[:, rows])
            of_query, of_key, of_value, of_mask = kernels.backward(
                grad[:, rows], query[:, rows], k, v, *result, part_mask, step.is_causal, mask_needs_grad
            )
            grad_query.add(of_query, step.rows)
            part_kv = [of_key, of_value]
            if grad_mask is not None and of_mask is not None:
                _add_to_mask(grad_mask, of_mask, step, num_more)
        else:
            part_kv = [torch.zeros_like(k), torch.zeros_like(v)]
        if num_more:
            grad_more = [x[:, k.shape[1] - num_more :] for x in part_kv]
            part_kv = [x[:, : k.shape[1] - num_more] for x in part_kv]
        if step.fetch is None:
            for total, part in zip(grad_kv, part_kv, strict=True):
                total.add(part, step.keys)
        else:
            parts.give_back()
            sent = lend(part_kv, [way_home(step.fetch)] * 2, name)
            _add_arrived(grad_kv, on_the_way, name)
            on_the_way = sent
    _add_arrived(grad_kv, on_the_way, name)
    return (
        grad_query.result(),
        *[total.result() for total in grad_kv],
        None if grad_mask is None else grad_mask.to(mask.dtype),
        *grad_more,
        None,
        None,
        None,
    )


class _Keys:
    """The keys and values of each step; those of the next are on their way while a step computes."""

    def __init__(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        more_keys: torch.Tensor | None,
        more_values: torch.Tensor | None,
        steps: tuple[Step, ...],
        name: str,
    ) -> None:
        self._own = (key, value)
        self._more = None if more_keys is None or more_values is None else (more_keys, more_values)
        self._steps, self._name = steps, name
        self._here: list[Launched] = []
        self._next = self._start(0)
        self.num_more = 0 if more_keys is None else more_keys.shape[1]

    def of_step(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values, `[B, n, H, D]`, with the replicated ones behind those of the first step."""
        step, self._here = self._steps[number], self._next
        if step.fetch is None:
            first, last = step.keys
            k, v = (x[:, first:last] for x in self._own)
        else:
            k, v = (arrive(launched.received, step.fetch, self._name) for launched in self._here)
        self._next = self._start(number + 1)
        if number == 0 and self._more is not None:
            k, v = torch.cat([k, self._more[0]], dim=1), torch.cat([v, self._more[1]], dim=1)
        return k, v

    def kept(self, x: torch.Tensor) -> torch.Tensor:
        """Return a result of this step, or a copy of it where it is a view of the step's keys or values."""
        return kept(x, self._here[0]) if self._here else x

    def give_back(self) -> None:
        """Let peers have the memory of this step's keys and values, which nothing reads any more."""
        if self._here:
            give_back(self._here[0])

    def _start(self, number: int) -> list[Launched]:
        fetch = self._steps[number].fetch if number < len(self._steps) else None
        return [] if fetch is None else lend(self._own, [fetch] * 2, self._name)


class _Sum:
    """The gradient of a tensor, `[B, S, H, D]`, added up in float32 at least."""

    def __init__(self, x: torch.Tensor, wide: torch.dtype) -> None:
        self._x, self._wide = x, wide
        self._total: torch.Tensor | None = None

    def add(self, part: torch.Tensor, tokens: Interval) -> None:
        """Add the gradient of some tokens."""
        first, last = tokens
        if self._total is None and last - first == self._x.shape[1]:
            self._total = part.to(self._wide, copy=True)
            return
        if self._total is None:
            self._total = torch.zeros(self._x.shape, dtype=self._wide, device=self._x.device)
        self._total[:, first:last] += part

    def result(self) -> torch.Tensor:
        """Return the gradient in the tensor's dtype."""
        return torch.zeros_like(self._x) if self._total is None else self._total.to(self._x.dtype)


def _add_arrived(totals: Sequence[_Sum], on_the_way: list[Launched], name: str) -> None:
    """Wait for the gradients of keys and values that another rank has sent home, and add them."""
    for total, launched in zip(totals, on_the_way, strict=False):
        arrived = arrive(launched.received, launched.route, name)
        total.add(arrived, (0, arrived.shape[1]))
    if on_the_way:
        give_back(on_the_way[0])


def _part_mask(mask: torch.Tensor | None, step: Step, num_more: int) -> torch.Tensor | None:
    """Return the rows and columns of a step, those of the replicated keys last."""
    if mask is None:
        return None
    if mask.dim() == 4:
        mask = mask[:, :, step.rows[0] : step.rows[1]]
    columns = [mask[..., first:last] for first, last in _with_more(step, mask.shape[-1], num_more)]
    return columns[0] if len(columns) == 1 else torch.cat(columns, dim=-1)


def _add_to_mask(grad_mask: torch.Tensor, part: torch.Tensor, step: Step, num_more: int) -> None:
    rows, position = grad_mask[:, :, step.rows[0] : step.rows[1]], 0
    for first, last in _with_more(step, grad_mask.shape[-1], num_more):
        rows[..., first:last] += part[..., position : position + last - first]
        position += last - first


def _with_more(step: Step, num_columns: int, num_more: int) -> tuple[Interval, ...]:
    return (*step.columns, (num_columns - num_more, num_columns)) if num_more else step.columns


def _whole_pieces(lengths: Sequence[int]) -> list[tuple[Interval, ...]]:
    stops = [sum(lengths[: rank + 1]) for rank in range(len(lengths))]
    return [((stop - length, stop),) for stop, length in zip(stops, lengths, strict=True)]


def _seen(source: int, rank: int, pieces: Sequence[tuple[Interval, ...]], is_causal: bool) -> tuple[Interval, ...]:
    """Return the tokens of `source` that queries of `rank` see: under causal attention, of an earlier rank the early piece."""
    return pieces[source][:1] if is_causal and source < rank else pieces[source]


def _count(intervals: Sequence[Interval]) -> int:
    return sum(last - first for first, last in intervals)


def _common(shard: Interval, owned: tuple[Interval, ...]) -> tuple[Interval, ...]:
    cuts = [(max(shard[0], first), min(shard[1], last)) for first, last in owned]
    return tuple((first, last) for first, last in cuts if last > first)


def _positions(tokens: tuple[Interval, ...], owned: tuple[Interval, ...]) -> tuple[Interval, ...]:
    """Return where `tokens` stand among those of a rank that holds `owned`, one after another."""
    result = []
    for first, last in tokens:
        position = 0
        for start_, stop in owned:
            if start_ <= first and last <= stop:
                result.append((position + first - start_, position + last - start_))
                break
            position += stop - start_
    return tuple(result)
