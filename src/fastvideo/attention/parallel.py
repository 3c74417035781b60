"""One attention call over tokens that several devices share: choose a layout, exchange, attend, exchange back.

The layer has checked the call; here the tensors travel. Each layout is made of the same moves
(`fastvideo.distributed.collectives`), whose gradients are those moves backwards.

`B batch, S tokens of this device's shard, R replicated tokens, H heads, D head size`; `[B, S, H, D]` everywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastvideo.attention.backends.abstract import AttentionMetadata
from fastvideo.attention.dispatch import Dispatcher, Selected
from fastvideo.attention.functional import describe_call, forward_extras, run_impl
from fastvideo.attention.parts import BackendParts
from fastvideo.attention.positions import in_one_sequence, join_at, place_of, split_at
from fastvideo.attention.shared_call import SharedCall, as_planned, heads_at_backend, lengths_at_backend, num_head_groups
from fastvideo.distributed.agreement import agree_on_backward
from fastvideo.distributed.collectives import (
    Launched,
    distinct,
    exchange,
    finish_exchange,
    give_back,
    kept,
    lands_anywhere,
    launch_exchange,
    launch_exchanges,
    tied,
)
from fastvideo.distributed.layouts import Layout, ranked_layouts, resolve_layout
from fastvideo.distributed.mesh import LOCAL, SequenceGroup
from fastvideo.distributed.ring import attend_in_parts, causal_steps, regroup_route, ring_steps
from fastvideo.distributed.rooms import Room
from fastvideo.distributed.routes import gather_route
from fastvideo.distributed.shards import gather_over_mesh, rows_of_mesh, sum_over_mesh
from fastvideo.distributed.ulysses import (
    HeadShares,
    cut_heads,
    exchange_mask,
    group_lengths,
    head_route,
    join_heads,
    room_of,
    share_heads,
    token_route,
)

__all__ = ["Chosen", "place", "run_shared"]

Tensor = torch.Tensor


@dataclass(frozen=True)
class Chosen:
    """What runs on this device's heads.

    Attributes:
        whole: The implementation, causal if the layer is.
        parts: The one for parts without causal, where partial results are merged.
    """

    whole: Selected
    parts: Selected


def place(
    call: SharedCall,
    group: SequenceGroup,
    kind: str | None,
    dispatcher: Dispatcher,
    metadata: AttentionMetadata | None,
    *,
    wish: str,
    head_groups: int | None,
    needs_whole_sequence: bool,
) -> tuple[Layout, SharedCall, Chosen]:
    """Choose the layout and what runs in it.

    Args:
        call: The call.
        group: All ranks that share the sequence.
        kind: The mask's kind.
        dispatcher: The layer's.
        metadata: Metadata handed over with the call.
        wish: The layout asked for; `"auto"` takes the best that some backend accepts.
        head_groups: Groups of heads asked for.
        needs_whole_sequence: The layer is sparse.

    Returns:
        The layout, the call with its heads grouped for it, and what runs.

    Raises:
        ValueError: The layout contradicts the mesh.
        NotImplementedError: Sending in float8 with a gradient, or in a layout that lacks it.
        BackendUnavailable: Nothing that may run can.
    """
    planned = as_planned(call, head_groups) if wish == "auto" and group.size > 1 else {}
    names = ranked_layouts(wish, group, needs_whole_sequence=needs_whole_sequence, **planned)
    for name in names:
        layout = resolve_layout(name, group)
        count = num_head_groups(call, layout, head_groups, is_sparse=needs_whole_sequence)
        grouped = replace(call, head_groups=count)
        fields = _request_fields(grouped, kind, layout)
        lacks_float8 = call.sends_float8 and fields["needs_lse"]
        if name == names[-1] or (not lacks_float8 and dispatcher.accepts(fields, metadata)):
            break
    if call.sends_float8 and (fields["needs_lse"] or fields["needs_grad"]):
        raise NotImplementedError(
            "sending in float8 is for inference where no partial results are merged, by Ulysses or by gather without causal, "
            f"got layout {layout.name!r}, causal={call.is_causal} and needs_grad={fields['needs_grad']}; "
            "call under torch.no_grad(), or set exchange_dtype=None"
        )
    # Causal attention in parts runs causal on the diagonal, and the parts beside it without.
    is_split = fields["needs_lse"] and call.is_causal
    beside = dispatcher.select({**fields, "is_causal": False}, None, metadata) if is_split else None
    whole = dispatcher.select(fields, None, metadata)
    return layout, grouped, Chosen(whole, whole if beside is None else beside)


def _request_fields(call: SharedCall, kind: str | None, layout: Layout) -> dict[str, Any]:
    """Return the fields of the `AttentionRequest` for a group of this device's heads."""
    (query_len, key_len), merges = lengths_at_backend(call, layout)
    num_heads, num_kv_heads = heads_at_backend(call, layout)
    num_replicated = 0 if call.is_causal and call.in_front else call.num_more
    fields = describe_call(
        call.query, call.key, call.value, call.mask, kind, call.scale, call.is_causal,
        gate=call.gate, replicated=call.replicated, num_replicated=num_replicated, return_lse=merges,
        layout=layout.name, lengths=(query_len, key_len),
    )  # fmt: skip
    return {**fields, "num_heads": num_heads, "num_kv_heads": num_kv_heads}


def run_shared(call: SharedCall, group: SequenceGroup, layout: Layout, chosen: Chosen) -> tuple[Tensor, Tensor | None]:
    """Run a call on the ranks of `group`.

    Args:
        call: The call.
        group: All ranks that share the sequence.
        layout: How they share it.
        chosen: What runs.

    Returns:
        The output of this device's tokens, `[B, S_q, H, D]`, and that of the replicated ones, `[B, R, H, D]`, or `None`.
    """
    shared = _with_shared_gradients(call, group)
    output, rest = _attend_shared(shared, group, layout, chosen)
    if torch.compiler.is_compiling() and call.reduces and call.replicated is not None:
        # A device that doesn't work on them takes part in the sum of their gradients, after its peers' forward pass.
        output = _tied(output, replace(call, replicated=shared.replicated), only_replicated=True)
    exchanges = call.reduces or sum(call.kv_lengths) > 0
    if call.agreed_on is None or not (call.needs_grad and exchanges):
        return output, rest
    if rest is None:
        return agree_on_backward((output,), group, **call.agreed_on)[0], None
    output, rest = agree_on_backward((output, rest), group, **call.agreed_on)
    return output, rest


def _attend_shared(call: SharedCall, group: SequenceGroup, layout: Layout, chosen: Chosen) -> tuple[Tensor, Tensor | None]:
    if call.mask is not None and call.mask.dim() == 2:
        own, more = torch.split(call.mask, [call.mask.shape[1] - call.num_more, call.num_more], dim=1)
        whole = gather_over_mesh(own.to(torch.uint8), 1, call.kv_lengths, group).bool()
        call = replace(call, mask=torch.cat([whole, more], dim=1))
    if sum(call.kv_lengths) == 0:
        return _attend_here(call, chosen)
    if layout.ulysses.size > 1:
        return _swap_heads(call, layout, chosen)
    return _share_keys(call, layout, chosen) if layout.ring.size > 1 else _attend_here(call, chosen)


def _with_shared_gradients(call: SharedCall, group: SequenceGroup) -> SharedCall:
    """Return the call with gradients of what every rank holds summed over the ranks, if they are to be."""
    if not call.reduces:
        return call
    if call.replicated is not None:
        query, key, value = call.replicated
        query = None if query is None else sum_over_mesh(query, group)
        call = replace(call, replicated=(query, sum_over_mesh(key, group), sum_over_mesh(value, group)))
    if call.num_rows and call.mask is not None and call.mask.is_floating_point():
        own, rows = torch.split(call.mask, [call.mask.shape[2] - call.num_rows, call.num_rows], dim=2)
        call = replace(call, mask=torch.cat([own, sum_over_mesh(rows, group)], dim=2))
    return call


def _swap_heads(call: SharedCall, layout: Layout, chosen: Chosen) -> tuple[Tensor, Tensor | None]:
    """Swap tokens of all heads for all tokens of some heads, attend, and swap back; one group of heads after another."""
    ulysses, row = layout.ulysses, layout.ring.rank
    rows, kv_rows = rows_of_mesh(call.lengths, ulysses), rows_of_mesh(call.kv_lengths, ulysses)
    heads = (call.query.shape[2], call.key.shape[2], ulysses.size)
    groups = [share_heads(*heads, number, call.head_groups) for number in range(call.head_groups)]
    shared = replace(call, lengths=tuple(map(sum, rows)), kv_lengths=tuple(map(sum, kv_rows)), head_groups=1)
    if call.mask is not None and call.mask.dim() == 4:
        shared = replace(shared, mask=exchange_mask(call.mask, share_heads(*heads), rows[row], call.num_rows, ulysses))
    launch = _launcher(call, groups, rows[row], kv_rows[row], ulysses)
    # One group ahead of the one that is awaited, so that packing it fills the time.
    arriving = [launch(number) for number in range(min(2, len(groups)))]
    leaving, rests = [], []
    # Groups differ in heads alone, so each goes to its place in the whole.
    room = _room([shares.query[0][1] - shares.query[0][0] for shares in groups], call.query, ulysses)
    for number, shares in enumerate(groups):
        if 0 < number < len(groups) - 1:
            arriving.append(launch(number + 1))
        arrived = arriving.pop(0)
        query, key, value, *gate = [call.unpacked(finish_exchange(launched, ulysses)) for launched in arrived]
        part = replace(shared, query=query, key=key, value=value, gate=gate[0] if gate else None)
        part = _with_heads(part, groups, number, ulysses.rank, *heads[:2])
        output, rest = _attend_over_heads(part, layout, chosen)
        output, rest = kept(output, arrived[0]), None if rest is None else kept(rest, arrived[0])
        output = call.packed(output)
        route = token_route(output.shape, shares.query, rows[row], ulysses.rank, is_group=len(groups) > 1)
        into = None if room is None else functools.partial(room.place, number)
        leaving.append(launch_exchange(output, route, ulysses, into=into, is_hidden=number + 1 < len(groups)))
        if rest is not None:
            route = gather_route(rest.shape, 2, tuple([stop - start for start, stop in shares.query]))
            rests.append(launch_exchange(rest, route, ulysses))
        give_back(arrived[0])
    pieces = [finish_exchange(launched, ulysses) for launched in leaving]
    output = call.unpacked(join_heads(pieces, ulysses.size, room))
    return output, join_heads([finish_exchange(launched, ulysses) for launched in rests], ulysses.size) if rests else None


def _launcher(
    call: SharedCall, groups: list[HeadShares], lengths: tuple[int, ...], kv_lengths: tuple[int, ...], ulysses: SequenceGroup
) -> Callable[[int], list[Launched]]:
    """Return what sends the inputs of a group of heads on their way: query, key, value and, if there is one, the gate."""
    inputs = [(call.query, lengths), (call.key, kv_lengths), (call.value, kv_lengths)]
    inputs += [] if call.gate is None else [(call.gate, lengths)]
    key_heads = group_lengths(call.key.shape[2] // ulysses.size, len(groups))
    cut, rooms = [], []
    for x, _ in inputs:
        readers = x.shape[2] // call.key.shape[2]
        counts = [readers * count for count in key_heads]
        rooms.append(_room(counts, x, ulysses) if call.needs_grad and x.requires_grad else None)
        cut.append(cut_heads(call.packed(x), ulysses.size, counts, rooms[-1]))

    def launch(number: int) -> list[Launched]:
        shares, pieces = groups[number], [of_input[number] for of_input in cut]
        owners = (shares.query, shares.key, shares.key, shares.query)
        routes = [
            head_route(piece.shape, own, shards, ulysses.rank)
            for piece, own, (_, shards) in zip(pieces, owners, inputs, strict=False)
        ]
        intos = [None if room is None else functools.partial(room.place, number) for room in rooms]
        return launch_exchanges(pieces, routes, ulysses, gradient_intos=intos, is_lent=not call.needs_grad)

    return launch


def _room(lengths: list[int], x: Tensor, ulysses: SequenceGroup) -> Room | None:
    """Return the room for groups of so many heads, if there are several that can arrive in one."""
    return room_of(lengths) if len(lengths) > 1 and lands_anywhere(x, ulysses) else None


def _with_heads(
    call: SharedCall, groups: list[HeadShares], number: int, rank: int, num_heads: int, num_kv_heads: int
) -> SharedCall:
    """Return the call with replicated tokens and mask cut to a rank's heads of one group, and key heads repeated at need."""
    shares = groups[number]
    (start, stop), (kv_start, kv_stop) = shares.query[rank], shares.key[rank]
    if call.mask is not None and call.mask.dim() == 4 and len(groups) > 1 and call.mask.shape[1] > 1:
        first = groups[0].query[rank][0]
        call = replace(call, mask=call.mask[:, start - first : stop - first])
    if call.replicated is not None:
        query, key, value = call.replicated
        query = None if query is None else query[:, :, start:stop]
        call = replace(call, replicated=(query, key[:, :, kv_start:kv_stop], value[:, :, kv_start:kv_stop]))
    index = shares.key_index(rank, num_heads, num_kv_heads)
    if index == tuple(range(call.key.shape[2])):
        return call
    if call.replicated is not None:
        query, key, value = call.replicated
        call = replace(call, replicated=(query, _pick_heads(key, index), _pick_heads(value, index)))
    return replace(call, key=_pick_heads(call.key, index), value=_pick_heads(call.value, index))


def _pick_heads(x: Tensor, index: tuple[int, ...]) -> Tensor:
    return torch.cat([x[:, :, head : head + 1] for head in index], dim=2)


def _attend_over_heads(call: SharedCall, layout: Layout, chosen: Chosen) -> tuple[Tensor, Tensor | None]:
    """Attend with this rank's heads, of which there may be none."""
    if call.query.shape[2] == 0:
        # The other ranks exchange gradients too, so all inputs stay in the graph.
        rest = None if call.replicated is None or call.replicated[0] is None else _tied(call.replicated[0], call)
        return _tied(call.query, call), rest
    if layout.swaps_all:
        return _swap_heads(call, Layout(layout.name, LOCAL, layout.ring, False), chosen)
    return _share_keys(call, layout, chosen) if layout.ring.size > 1 else _attend_here(call, chosen)


def _attend_here(call: SharedCall, chosen: Chosen) -> tuple[Tensor, Tensor | None]:
    """Attend with queries and keys that are all on this rank."""
    if call.query.shape[1] + call.num_rows == 0:
        return _tied(call.query, call), None
    has_rows, is_in_front = call.num_rows > 0, call.is_causal and call.in_front
    if call.is_causal:
        call = in_one_sequence(call)
    tensors = (call.query, call.key, call.value) if call.gate is None else (call.query, call.key, call.value, call.gate)
    extras = forward_extras(attn_mask=call.mask)
    result = run_impl(chosen.whole, tensors, call.metadata, extras, call.replicated, in_front=is_in_front)
    output, rest = (result, None) if call.replicated is None else result
    return output, rest if has_rows else None


def _share_keys(call: SharedCall, layout: Layout, chosen: Chosen) -> tuple[Tensor, Tensor | None]:
    """Attend where queries stay and keys come from the ranks of the ring."""
    if call.is_causal and call.replicated is not None:
        return _share_in_one_sequence(call, layout, chosen)
    if layout.gathers and not call.is_causal:
        return _gather_keys(call, layout.ring, chosen)
    ring, (query, key, value, mask) = layout.ring, (call.query, call.key, call.value, call.mask)
    num_queries, shape = query.shape[1], query.shape
    if call.is_causal:
        query = exchange(query, regroup_route(shape, 1, call.lengths, ring.rank), ring)
        if mask is not None and mask.dim() == 4:
            rows = mask.to(torch.uint8) if mask.dtype == torch.bool else mask
            mask = exchange(rows, regroup_route(mask.shape, 2, call.lengths, ring.rank), ring).to(mask.dtype)
    more = None
    if call.replicated is not None:
        rows_too, *more_kv = call.replicated
        more = (more_kv[0], more_kv[1])
        query = query if rows_too is None else torch.cat([query, rows_too], dim=1)
    kernels = BackendParts(chosen.parts, chosen.whole if call.is_causal else None, call.scale)
    if torch.compiler.is_compiling():
        kernels.check_compilable(call.needs_grad, mask is not None)
    if layout.gathers:
        key, value = (exchange(x, gather_route(x.shape, 1, call.kv_lengths), ring) for x in (key, value))
        steps, source = causal_steps(ring.rank, ring.size, sum(call.lengths)), LOCAL
    else:
        if call.is_causal:
            route = regroup_route(key.shape, 1, call.kv_lengths, ring.rank)
            key, value = exchange(key, route, ring), exchange(value, route, ring)
        steps = ring_steps(ring.rank, query.shape[1], call.kv_lengths, key.shape, is_causal=call.is_causal)
        source = ring
    output = attend_in_parts(kernels, steps, query, key, value, source, mask=mask, replicated=more)
    if call.is_causal:
        return exchange(output, regroup_route(shape, 1, call.lengths, ring.rank).back(), ring), None
    rest = output[:, num_queries:] if call.num_rows else None
    return output[:, :num_queries], rest


def _share_in_one_sequence(call: SharedCall, layout: Layout, chosen: Chosen) -> tuple[Tensor, Tensor | None]:
    """Attend causally with replicated tokens at their place in the sequence; one rank has them, all get their output."""
    whole, ring = in_one_sequence(call), layout.ring
    if whole.replicated is None:
        return _share_keys(whole, layout, chosen)
    output, _ = _share_keys(join_at(whole, ring.rank), layout, chosen)
    output, rest = split_at(output, whole, ring.rank)
    if not call.num_rows:
        return output, None
    lengths = tuple([whole.num_more if rank == place_of(whole) else 0 for rank in range(ring.size)])
    return output, exchange(rest, gather_route(rest.shape, 1, lengths), ring)


def _gather_keys(call: SharedCall, ring: SequenceGroup, chosen: Chosen) -> tuple[Tensor, Tensor | None]:
    """Gather all keys and attend to them; one group of heads after another."""
    count = call.head_groups
    lengths = group_lengths(call.key.shape[2], count)
    readers = call.query.shape[2] // call.key.shape[2]
    cut = [cut_heads(call.query, 1, [readers * length for length in lengths])]
    cut += [cut_heads(call.packed(x), 1, lengths) for x in (call.key, call.value)]
    groups = [share_heads(call.query.shape[2], call.key.shape[2], 1, number, count) for number in range(count)]

    def launch(number: int) -> list[Launched]:
        route = gather_route(cut[1][number].shape, 1, call.kv_lengths)
        pieces = [of_input[number] for of_input in cut[1:]]
        return launch_exchanges(pieces, [route, route], ring, is_lent=not call.needs_grad)

    arriving = [launch(number) for number in range(min(2, count))]
    outputs, rests = [], []
    for number in range(count):
        if 0 < number < count - 1:
            arriving.append(launch(number + 1))
        arrived = arriving.pop(0)
        key, value = [call.unpacked(finish_exchange(launched, ring)) for launched in arrived]
        part = replace(call, query=cut[0][number], key=key, value=value)
        if count > 1:
            part = _with_heads(part, groups, number, 0, call.query.shape[2], call.key.shape[2])
        output, rest = _attend_here(part, chosen)
        output, rest = kept(output, arrived[0]), None if rest is None else kept(rest, arrived[0])
        give_back(arrived[0])
        outputs.append(output)
        rests += [] if rest is None else [rest]
    return torch.cat(outputs, dim=2), torch.cat(rests, dim=2) if rests else None


def _tied(x: Tensor, call: SharedCall, *, only_replicated: bool = False) -> Tensor:
    """Return `x` as the outcome of every input of the call, to which they add nothing: peers exchange their gradients."""
    inputs = [*(call.replicated or ())]
    inputs += [] if only_replicated else [call.query, call.key, call.value, call.gate, call.mask]
    return tied(x, distinct([y for y in inputs if y is not None and y is not x and y.is_floating_point()]))
