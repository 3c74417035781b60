"""One attention call over tokens that several devices share: exchange, attend, exchange back.

The layer has checked the call and chosen the backend; here the tensors travel. Each layout is made of the same moves
(`fastvideo.distributed.collectives`), whose gradients are those moves backwards.

`B batch, S tokens of this device's shard, R replicated tokens, H heads, D head size`; `[B, S, H, D]` everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fastvideo.attention.backends.abstract import AttentionMetadata
from fastvideo.attention.dispatch import Selected
from fastvideo.attention.functional import forward_extras, run_impl
from fastvideo.attention.parts import BackendParts
from fastvideo.distributed.agreement import agree
from fastvideo.distributed.collectives import Launched, exchange, finish_exchange, gather_route, launch_exchange
from fastvideo.distributed.layouts import Layout
from fastvideo.distributed.mesh import LOCAL, SequenceGroup
from fastvideo.distributed.ring import attend_in_parts, causal_steps, regroup_route, ring_steps
from fastvideo.distributed.shards import gather_over_mesh, resolve_lengths, rows_of_mesh, sum_over_mesh
from fastvideo.distributed.ulysses import HeadShares, exchange_mask, gather_heads, head_route, share_heads, token_route
from fastvideo.forward_context import thread_state

__all__ = [
    "Chosen",
    "SharedCall",
    "agreed",
    "heads_at_backend",
    "lengths_at_backend",
    "replicated_last",
    "run_shared",
    "shard_lengths_of",
]

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


@dataclass(frozen=True)
class SharedCall:
    """A checked call of a distributed layer.

    Attributes:
        query: This device's queries, `[B, S_q, H, D]`.
        key: Its keys, `[B, S_kv, H_kv, D]`.
        value: Its values, likewise.
        gate: The gate of a sparse backend, like `query`, or `None`.
        replicated: Replicated query (or `None`), key and value, `[B, R, H, D]`, or `None`.
        mask: Key padding or full mask in this device's coordinates, replicated tokens last, or `None`.
        lengths: Queries of each device.
        kv_lengths: Keys of each device.
        is_causal: Each query sees only keys up to its own position.
        scale: Factor of the scores.
        reduces: Gradients of replicated inputs are summed over devices.
        head_groups: Into how many groups each device's heads are cut, so that one travels while another is computed.
        metadata: The step's metadata.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    gate: Tensor | None
    replicated: tuple[Tensor | None, Tensor, Tensor] | None
    mask: Tensor | None
    lengths: tuple[int, ...]
    kv_lengths: tuple[int, ...]
    is_causal: bool
    scale: float
    reduces: bool
    head_groups: int = 1
    metadata: AttentionMetadata | None = None

    @property
    def num_rows(self) -> int:
        """Replicated queries."""
        return 0 if self.replicated is None or self.replicated[0] is None else self.replicated[0].shape[1]

    @property
    def num_more(self) -> int:
        """Replicated keys."""
        return 0 if self.replicated is None else self.replicated[1].shape[1]


def shard_lengths_of(
    query: Tensor,
    key: Tensor,
    group: SequenceGroup,
    given: tuple[Sequence[int] | None, Sequence[int] | None],
    *,
    has_more: bool,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the queries and the keys of each device.

    Args:
        query: This device's queries.
        key: Its keys.
        group: The devices.
        given: The call's own lengths of queries and keys; `None` where it names none.
        has_more: There are replicated keys, so that the devices may have none of their own.

    Raises:
        TypeError: Lengths are no integers.
        ValueError: They don't fit the tensors, or those of keys can't be told, or there is nothing to attend to.
    """
    lengths = resolve_lengths(query.shape[1], group, thread_state.shard_lengths if given[0] is None else given[0])
    if given[1] is not None:
        kv_lengths = resolve_lengths(key.shape[1], group, given[1], "kv_shard_lengths")
    elif key.shape[1] == query.shape[1]:
        kv_lengths = lengths
    elif len(set(lengths)) == 1:
        kv_lengths = resolve_lengths(key.shape[1], group)
    else:
        raise ValueError(
            f"queries are sharded in lengths {lengths}, and this device has {key.shape[1]} keys to {query.shape[1]} queries; "
            "say how the keys are sharded with kv_shard_lengths="
        )
    if sum(lengths) == 0 or (sum(kv_lengths) == 0 and not has_more):
        raise ValueError(
            f"expected query and key without empty dims, got shape {tuple(query.shape)} and {tuple(key.shape)} on every device"
        )
    return lengths, kv_lengths


def replicated_last(call: SharedCall) -> SharedCall:
    """Return the call with a mask whose replicated tokens stand first put in the order in which they stand last."""
    mask = call.mask
    if mask is None or call.num_more == 0:
        return call
    mask = torch.cat([mask[..., call.num_more :], mask[..., : call.num_more]], dim=-1)
    if mask.dim() == 4 and call.num_rows:
        mask = torch.cat([mask[:, :, call.num_rows :], mask[:, :, : call.num_rows]], dim=2)
    return replace(call, mask=mask)


def lengths_at_backend(call: SharedCall, layout: Layout) -> tuple[tuple[int, int], bool]:
    """Return the most queries and keys that a backend sees at once, and whether its results are merged."""
    size = layout.ulysses.size
    lengths, kv_lengths = ([sum(x[i : i + size]) for i in range(0, len(x), size)] for x in (call.lengths, call.kv_lengths))
    if sum(kv_lengths) == 0:
        return (max(call.lengths) + call.num_rows, call.num_more), False
    if layout.ring.size == 1:
        return (sum(lengths) + call.num_rows, sum(kv_lengths) + call.num_more), False
    if call.is_causal:
        return (max(lengths), max(lengths)), True
    keys = sum(kv_lengths) if layout.gathers else max(kv_lengths)
    return (max(lengths) + call.num_rows, keys + call.num_more), not layout.gathers


def heads_at_backend(call: SharedCall, layout: Layout) -> tuple[int, int]:
    """Return the query and key heads that a backend sees at once; those of the first device where this one has none."""
    num_heads, num_kv_heads = call.query.shape[2], call.key.shape[2]
    if layout.ulysses.size == 1 or sum(call.kv_lengths) == 0:
        return num_heads, num_kv_heads
    shares = share_heads(num_heads, num_kv_heads, layout.ulysses.size, 0, call.head_groups)
    start, stop = shares.query[layout.ulysses.rank]
    rank = layout.ulysses.rank if stop > start else 0
    start, stop = shares.query[rank]
    return stop - start, len(shares.key_index(rank, num_heads, num_kv_heads))


def agreed(call: SharedCall, group: SequenceGroup, layout: Layout, chosen: Chosen, kind: str | None, prefix: str) -> SharedCall:
    """Return the call once no other rank can be making another one.

    Raises:
        RanksDisagree: A rank makes another call, or none within the timeout.
    """
    batch, _, num_heads, head_size = call.query.shape
    mask = None if call.mask is None or kind is None else (kind, *([call.mask.shape[1]] if call.mask.dim() == 4 else []))
    query = agree(
        call.query,
        group,
        layer=prefix,
        backend=chosen.whole.name,
        layout=layout.name,
        query=(batch, num_heads, head_size),
        key_heads=call.key.shape[2],
        lengths=call.lengths,
        kv_lengths=call.kv_lengths,
        replicated=(call.num_rows, call.num_more, call.reduces),
        dtype=call.query.dtype,
        mask=mask,
        gate=call.gate is not None,
        causal=call.is_causal,
        head_groups=call.head_groups,
    )
    return replace(call, query=query)


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
    call = _with_shared_gradients(call, group)
    if call.mask is not None and call.mask.dim() == 2:
        own, more = torch.split(call.mask, [call.mask.shape[1] - call.num_more, call.num_more], dim=1)
        whole = gather_over_mesh(own.to(torch.uint8), 1, call.kv_lengths, group).bool()
        call = replace(call, mask=torch.cat([whole, more], dim=1))
    if sum(call.kv_lengths) == 0:
        return _attend_here(call, chosen)
    if layout.ulysses.size > 1:
        return _swap_heads(call, group, layout, chosen)
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


def _swap_heads(call: SharedCall, group: SequenceGroup, layout: Layout, chosen: Chosen) -> tuple[Tensor, Tensor | None]:
    """Swap tokens of all heads for all tokens of some heads, attend, and swap back; one group of heads after another."""
    ulysses, row = layout.ulysses, layout.ring.rank
    rows, kv_rows = rows_of_mesh(call.lengths, group), rows_of_mesh(call.kv_lengths, group)
    heads = (call.query.shape[2], call.key.shape[2], ulysses.size)
    pieces = [share_heads(*heads, piece, call.head_groups) for piece in range(call.head_groups)]
    shared = replace(call, lengths=tuple(map(sum, rows)), kv_lengths=tuple(map(sum, kv_rows)))
    has_mask_per_head = False
    if call.mask is not None and call.mask.dim() == 4:
        has_mask_per_head = call.mask.shape[1] > 1
        shared = replace(shared, mask=exchange_mask(call.mask, share_heads(*heads), rows[row], call.num_rows, ulysses))
    arriving = _launch_to_heads(call, pieces[0], rows[row], kv_rows[row], ulysses)
    leaving: list[Launched] = []
    rests: list[Tensor] = []
    position = 0
    for number, shares in enumerate(pieces):
        query, key, value, *gate = [finish_exchange(launched, ulysses) for launched in arriving]
        if number + 1 < len(pieces):
            arriving = _launch_to_heads(call, pieces[number + 1], rows[row], kv_rows[row], ulysses)
        part = replace(shared, query=query, key=key, value=value, gate=gate[0] if gate else None)
        if has_mask_per_head and part.mask is not None:
            part = replace(part, mask=part.mask[:, position : position + query.shape[2]])
        position += query.shape[2]
        output, rest = _attend_over_heads(_with_heads(part, shares, ulysses.rank, *heads[:2]), layout, chosen)
        route = token_route(output.shape, shares.query, rows[row], ulysses.rank)
        leaving.append(launch_exchange(output, route, ulysses))
        if rest is not None:
            rests.append(gather_heads(rest, shares.query, ulysses))
    outputs = [finish_exchange(launched, ulysses) for launched in leaving]
    return _in_order(outputs, pieces), _in_order(rests, pieces) if rests else None


def _launch_to_heads(
    call: SharedCall, shares: HeadShares, lengths: Sequence[int], kv_lengths: Sequence[int], group: SequenceGroup
) -> list[Launched]:
    """Start the exchange of query, key, value and gate."""
    travelling = [
        (call.query, shares.query, lengths),
        (call.key, shares.key, kv_lengths),
        (call.value, shares.key, kv_lengths),
    ]
    if call.gate is not None:
        travelling.append((call.gate, shares.query, lengths))
    return [launch_exchange(x, head_route(x.shape, heads, tokens, group.rank), group) for x, heads, tokens in travelling]


def _with_heads(call: SharedCall, shares: HeadShares, rank: int, num_heads: int, num_kv_heads: int) -> SharedCall:
    """Return the call with replicated tokens cut to a rank's heads, and key heads repeated where kernels need it."""
    replicated = call.replicated
    if replicated is not None:
        (start, stop), (kv_start, kv_stop) = shares.query[rank], shares.key[rank]
        query, key, value = replicated
        query = None if query is None else query[:, :, start:stop]
        replicated = (query, key[:, :, kv_start:kv_stop], value[:, :, kv_start:kv_stop])
    index = shares.key_index(rank, num_heads, num_kv_heads)
    if index == tuple(range(call.key.shape[2])):
        return replace(call, replicated=replicated)
    if replicated is not None:
        replicated = (replicated[0], _pick_heads(replicated[1], index), _pick_heads(replicated[2], index))
    return replace(call, replicated=replicated, key=_pick_heads(call.key, index), value=_pick_heads(call.value, index))


def _pick_heads(x: Tensor, index: tuple[int, ...]) -> Tensor:
    return torch.cat([x[:, :, head : head + 1] for head in index], dim=2)


def _in_order(outputs: list[Tensor], pieces: list[HeadShares]) -> Tensor:
    """Return `[B, S, H, D]` from one tensor per group of heads, each with every rank's heads of that group."""
    if len(outputs) == 1:
        return outputs[0]
    by_rank = [
        torch.split(x, [stop - start for start, stop in shares.query], dim=2) for x, shares in zip(outputs, pieces, strict=True)
    ]
    return torch.cat([piece for of_rank in zip(*by_rank, strict=True) for piece in of_rank], dim=2)


def _attend_over_heads(call: SharedCall, layout: Layout, chosen: Chosen) -> tuple[Tensor, Tensor | None]:
    """Attend with this rank's heads, of which there may be none."""
    if call.query.shape[2] == 0:
        # The other ranks exchange gradients too, so all inputs stay in the graph.
        rest = None if call.replicated is None or call.replicated[0] is None else _tied(call.replicated[0], call)
        return _tied(call.query, call), rest
    return _share_keys(call, layout, chosen) if layout.ring.size > 1 else _attend_here(call, chosen)


def _attend_here(call: SharedCall, chosen: Chosen) -> tuple[Tensor, Tensor | None]:
    """Attend with queries and keys that are all on this rank."""
    if call.query.shape[1] + call.num_rows == 0:
        return _tied(call.query, call), None
    tensors = (call.query, call.key, call.value) if call.gate is None else (call.query, call.key, call.value, call.gate)
    result = run_impl(chosen.whole, tensors, call.metadata, forward_extras(attn_mask=call.mask), call.replicated)
    return (result, None) if call.replicated is None else result


def _share_keys(call: SharedCall, layout: Layout, chosen: Chosen) -> tuple[Tensor, Tensor | None]:
    """Attend where queries stay and keys come from the ranks of the ring."""
    ring = layout.ring
    if not call.is_causal and layout.gathers:
        route = gather_route(call.key.shape, 1, call.kv_lengths)
        launched = [launch_exchange(x, route, ring) for x in (call.key, call.value)]
        key, value = (finish_exchange(x, ring) for x in launched)
        return _attend_here(replace(call, key=key, value=value), chosen)
    query, key, value, mask = call.query, call.key, call.value, call.mask
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


def _tied(x: Tensor, call: SharedCall) -> Tensor:
    """Return `x`, which is empty, as the outcome of every input of the call, so that their gradients flow, being 0."""
    inputs = [call.query, call.key, call.value, call.gate, call.mask, *(call.replicated or ())]
    ties = [0 * tensor.sum() for tensor in inputs if tensor is not None and tensor.is_floating_point()]
    return x + torch.stack(ties).sum().to(x.dtype)
