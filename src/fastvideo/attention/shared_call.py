"""One call of a distributed layer: the tensors and numbers of this device, and what follows from them before anything is sent.

`B batch, S tokens of this device's shard, R replicated tokens, H heads, D head size`; `[B, S, H, D]` everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastvideo.attention.backends.abstract import AttentionMetadata
from fastvideo.compilation import plain
from fastvideo.distributed.agreement import agree
from fastvideo.distributed.collectives import distinct, together
from fastvideo.distributed.direct import exchange_kind
from fastvideo.distributed.layouts import Layout
from fastvideo.distributed.mesh import SequenceGroup
from fastvideo.distributed.precision import from_float8, to_float8
from fastvideo.distributed.shards import resolve_lengths, rows_of_mesh
from fastvideo.distributed.ulysses import groups_that_pay, groups_that_travel, share_heads
from fastvideo.forward_context import thread_state

__all__ = [
    "SharedCall",
    "agreed",
    "as_planned",
    "heads_at_backend",
    "lengths_at_backend",
    "num_head_groups",
    "replicated_last",
    "shard_lengths_of",
]

Tensor = torch.Tensor


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
        sends_float8: Tensors travel in float8; inference only.
        in_front: Replicated tokens stand before the sequence, which matters to causal attention.
        metadata: The step's metadata.
        agreed_on: What the ranks have agreed on about this call, once they have.
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
    sends_float8: bool = False
    in_front: bool = False
    metadata: AttentionMetadata | None = None
    agreed_on: dict[str, Any] | None = None

    def packed(self, x: Tensor) -> Tensor:
        """Return a tensor as it travels."""
        return to_float8(x) if self.sends_float8 else x

    def unpacked(self, x: Tensor) -> Tensor:
        """Return a tensor that has travelled as it was."""
        return from_float8(x, self.query.dtype) if self.sends_float8 else x

    @property
    def needs_grad(self) -> bool:
        """Whether a backward pass may follow."""
        return self.gradients != ""

    @property
    def gradients(self) -> str:
        """Names of the inputs whose gradients are recorded, which decides what a backward pass exchanges."""
        names = ("query", "key", "value", "gate", "mask", "replicated_query", "replicated_key", "replicated_value")
        tensors = (self.query, self.key, self.value, self.gate, self.mask, *(self.replicated or ()))
        recorded = [name for name, x in zip(names, tensors, strict=False) if x is not None and x.requires_grad]
        return "+".join(recorded) if torch.is_grad_enabled() else ""

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
    lengths, kv_lengths = ([sum(row) for row in rows_of_mesh(x, layout.ulysses)] for x in (call.lengths, call.kv_lengths))
    if sum(kv_lengths) == 0:
        return (max(call.lengths) + call.num_rows, call.num_more), False
    # Under causal attention replicated keys have queries, or nothing sees them.
    more = call.num_more if call.in_front or call.num_rows else 0
    if layout.ring.size == 1 or layout.swaps_all:
        num_rows, num_more = (more, more) if call.is_causal else (call.num_rows, call.num_more)
        return (sum(lengths) + num_rows, sum(kv_lengths) + num_more), False
    if call.is_causal:
        longest = 2 * -(-(sum(lengths) + more) // (2 * layout.ring.size))
        return (longest, longest), True
    keys = sum(kv_lengths) if layout.gathers else max(kv_lengths)
    return (max(lengths) + call.num_rows, keys + call.num_more), not layout.gathers


def heads_at_backend(call: SharedCall, layout: Layout) -> tuple[int, int]:
    """Return the query and key heads that a backend sees at once; those of the first device where this one has none."""
    num_heads, num_kv_heads = call.query.shape[2], call.key.shape[2]
    if sum(call.kv_lengths) == 0:
        return num_heads, num_kv_heads
    stages = (
        [(layout.ulysses, call.head_groups), (layout.ring, 1)] if layout.swaps_all else [(layout.ulysses, call.head_groups)]
    )
    for group, num_groups in stages:
        shares = share_heads(num_heads, num_kv_heads, group.size, 0, num_groups)
        start, stop = shares.query[group.rank]
        rank = group.rank if stop > start else 0
        start, stop = shares.query[rank]
        num_heads, num_kv_heads = stop - start, len(shares.key_index(rank, num_heads, num_kv_heads))
    return num_heads, num_kv_heads


def as_planned(call: SharedCall, head_groups: int | None) -> dict[str, Any]:
    """Return the call as `fastvideo.distributed.plan.plan` takes it."""
    batch, _, num_heads, head_size = call.query.shape
    return {
        "heads": num_heads,
        "kv_heads": call.key.shape[2],
        "seq": sum(call.lengths),
        "cross_seq": max(1, sum(call.kv_lengths)),
        "head_size": head_size,
        "batch": plain(batch),
        "dtype": call.query.dtype,
        "replicated": call.num_more,
        "causal": call.is_causal,
        "has_gate": call.gate is not None,
        "head_groups": head_groups,
        "needs_grad": call.needs_grad,
    }


def agreed(call: SharedCall, group: SequenceGroup, layout: Layout, backend: str, kind: str | None, prefix: str) -> SharedCall:
    """Return the call once no other rank can be making another one.

    Raises:
        RanksDisagree: A rank makes another call, or none within the timeout.
    """
    batch, _, num_heads, head_size = call.query.shape
    mask = None if call.mask is None or kind is None else (kind, *(call.mask.shape[:2] if call.mask.dim() == 4 else []))
    gradients = call.gradients
    fields: dict[str, Any] = {
        "pass": "forward" if gradients else "inference",
        "layer": prefix,
        "backend": backend,
        "layout": layout.name,
        "query": (batch, num_heads, head_size),
        "key_heads": call.key.shape[2],
        "lengths": call.lengths,
        "kv_lengths": call.kv_lengths,
        "replicated": (call.num_rows, call.num_more, call.reduces, call.in_front),
        "dtype": call.query.dtype,
        "mask": mask,
        "gate": call.gate is not None,
        "gradients": gradients,
        "causal": call.is_causal,
        "head_groups": call.head_groups,
        "float8": call.sends_float8,
        "scale": call.scale,
    }
    query = agree(call.query, group, **fields)
    call = replace(call, query=query, agreed_on=fields)
    return _with_one_gradient(call) if "+" in gradients and group.size > 1 else call


def _with_one_gradient(call: SharedCall) -> SharedCall:
    """Return the call with inputs whose gradients come together: all are exchanged, whichever of them a rank asks for."""
    inputs = (call.query, call.key, call.value, call.gate, call.mask, *(call.replicated or ()))
    recorded = distinct([x for x in inputs if x is not None and x.requires_grad])
    views = list(zip(recorded, together(recorded), strict=True))
    query, key, value, gate, mask, *replicated = [next((view for y, view in views if x is y), x) for x in inputs]
    whole = replace(call, query=query, key=key, value=value, gate=gate, mask=mask)
    return replace(whole, replicated=(replicated[0], replicated[1], replicated[2])) if replicated else whole


def num_head_groups(call: SharedCall, layout: Layout, wanted: int | None, *, is_sparse: bool) -> int:
    """Return into how many groups heads are cut on their way: at most `wanted`, where heads divide by the devices.

    `None` wants those that pay over copy engines; NCCL's kernels take multiprocessors from attention.
    """
    if sum(call.kv_lengths) == 0:
        return 1
    ring, ulysses = layout.ring.size, layout.ulysses.size
    if wanted is None:
        batch, _, num_heads, head_size = call.query.shape
        elements = batch * sum(call.lengths) * num_heads // ulysses * head_size
        pay = groups_that_pay(elements, ulysses, ring, is_sparse=is_sparse, needs_grad=call.needs_grad)
        wanted = pay if exchange_kind(call.query.device) == "direct" else 1
    return groups_that_travel(wanted, call.key.shape[2], ulysses, gathers=layout.gathers, is_causal=call.is_causal)
