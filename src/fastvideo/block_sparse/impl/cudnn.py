"""Block-sparse attention by cuDNN frontend's CuTe kernels for tiles of at most 64 tokens, on Hopper and datacentre Blackwell.

Package `nvidia-cudnn-frontend` from 1.32, and `nvidia-cutlass-dsl`, by which its kernels are compiled at the first call of a
shape. Tokens are packed into slots of 64, a copy each of query, key, value and output unless they lie so already, and heads
that are shared are repeated. The package has a forward and an explicit backward without a gradient of the log-sum-exp; that
one is a second backward with values that make `dout @ value^T` the log-sum-exp's gradient. The order of the sums of dquery
is not fixed.

Shape legend: B batch, S tokens, H heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastvideo.block_sparse.impl import Implementation
from fastvideo.block_sparse.impl.slots import (
    Slots,
    fold_scale,
    needs_cuda,
    package_rejections,
    repeat_heads,
    sum_groups,
    tile_rejections,
    tokens_that_see_nothing,
)
from fastvideo.block_sparse.pattern import BlockPattern

PACKAGE = "nvidia-cudnn-frontend"
# The second compiles the first one's kernels.
_PACKAGES = ((PACKAGE, (1, 32)), ("nvidia-cutlass-dsl", (4, 8)))
_SLOT = 64
_HEAD_SIZE = 128


def rejections(query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern) -> tuple[str, ...]:  # noqa: ARG001
    """Every reason why the package can't run both passes; see `Implementation.rejections`."""
    reasons = [reason for package, least in _PACKAGES for reason in package_rejections(package, least, "cudnn")]
    reasons += needs_cuda(query, (9, 10, 11))
    if query.dtype != torch.bfloat16:
        reasons.append(f"needs bfloat16, for which it has a backward, got {query.dtype}")
    if query.shape[3] != _HEAD_SIZE:
        reasons.append(f"needs a head size of {_HEAD_SIZE}, for which it has a backward, got {query.shape[3]}")
    return (*reasons, *tile_rejections(pattern, _SLOT, exactly=False))


@dataclass(frozen=True)
class _Packed:
    """What both passes hand to the package: tensors `[B, rows, Hq, D]` and the lists."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    query_factor: float
    query_slots: Slots
    key_slots: Slots
    lists: dict[str, Any]


def _pack(query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern, scale: float) -> _Packed:
    batch, _, num_heads, _ = query.shape
    query, scale, factor = fold_scale(query, scale)
    key_tiles = pattern.key_tiles
    query_slots, key_slots = Slots.of(pattern.query_tiles, _SLOT), Slots.of(key_tiles, _SLOT)
    lists = {
        "q2k_block_index": pattern.indices.expand(batch, num_heads, -1, -1).contiguous(),
        "block_sparse_num": pattern.indices.shape[3],
        "block_sizes": None if key_slots.num_rows == key_tiles.num_tokens else key_tiles.sizes,
        "q2k_block_nums": None if pattern.counts is None else pattern.counts.expand(batch, num_heads, -1).contiguous(),
    }
    packed_key, packed_value = (key_slots.pack(repeat_heads(x, num_heads)) for x in (key, value))
    return _Packed(query_slots.pack(query), packed_key, packed_value, scale, factor, query_slots, key_slots, lists)


def forward(query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern, scale: float) -> tuple[Tensor, Tensor]:
    """See `Implementation.forward`."""
    from cudnn.block_sparse_attention import block_sparse_attention_forward

    packed = _pack(query, key, value, pattern, scale)
    result = block_sparse_attention_forward(
        packed.query,
        packed.key,
        packed.value,
        **packed.lists,
        sparse_block_size=_SLOT,
        allow_empty_block_nums=pattern.counts is not None,
        softmax_scale=packed.scale,
        layout="bshd",
    )
    out = packed.query_slots.unpack(result["o_tensor"])
    lse = packed.query_slots.unpack(result["lse_tensor"].transpose(1, 2))
    empty = tokens_that_see_nothing(pattern)
    if empty is not None:
        out, lse = out.masked_fill_(empty[..., None], 0.0), lse.masked_fill_(empty, -torch.inf)
    return out, lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    pattern: BlockPattern,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `Implementation.backward`."""
    packed = _pack(query, key, value, pattern, scale)
    # Where nothing is seen nothing is computed either, but infinities must not meet zeros.
    lse_bhs = packed.query_slots.pack(lse.masked_fill(lse == -torch.inf, 0.0)).transpose(1, 2).contiguous()
    grads = _run_backward(packed, packed.query_slots.pack(dout), packed.value, packed.query_slots.pack(out), lse_bhs)
    dq, dk, dv = (x.float() for x in grads) if dlse is not None else grads
    if dlse is not None:
        # With values of 1 in the first channel, dout @ value^T is the log-sum-exp's gradient, and delta is 0.
        first = torch.zeros_like(packed.query)
        first[..., 0] = packed.query_slots.pack(dlse.masked_fill(lse == -torch.inf, 0.0))
        ones = torch.zeros_like(packed.value)
        ones[..., 0] = 1.0
        more_q, more_k, _ = _run_backward(packed, first, ones, torch.zeros_like(packed.query), lse_bhs)
        dq, dk = dq + more_q, dk + more_k
    dq = packed.query_slots.unpack(dq)
    if packed.query_factor != 1.0:
        dq = dq * packed.query_factor
    empty = tokens_that_see_nothing(pattern)
    if empty is not None:
        dq = dq.masked_fill(empty[..., None], 0.0)
    dk, dv = (sum_groups(packed.key_slots.unpack(x), key.shape[2]) for x in (dk, dv))
    return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype)


def _run_backward(packed: _Packed, dout: Tensor, value: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from cudnn.block_sparse_attention import block_sparse_attention_backward

    result = block_sparse_attention_backward(
        dout,
        packed.query,
        packed.key,
        value,
        out,
        lse,
        **packed.lists,
        softmax_scale=packed.scale,
        sparse_block_size=_SLOT,
        layout="bshd",
    )
    return result["dq_tensor"], result["dk_tensor"], result["dv_tensor"]


IMPLEMENTATION = Implementation(rejections, forward, backward)
