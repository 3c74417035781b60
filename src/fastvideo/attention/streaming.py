"""`StreamingAttention`: attention of an autoregressive video model, chunk after chunk, over a rolling cache of the past.

Generating a clip chunk by chunk gives the numbers of one block-causal pass over the whole clip (`block_causal_mask`). The cache
and the rule of what a frame sees stand in `fastvideo.attention.kv_cache`; rotary embedding is the caller's, who rotates queries
and keys by `attn_metadata.frames`, so that keys are cached rotated.

Shape legend: B batch, S tokens of a chunk (of this device), C slots in tokens, H heads, H_kv key heads, D head size, P devices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from fastvideo.attention.backends.abstract import AttentionLayer, AttentionMetadata
from fastvideo.attention.dispatch import check_sequence, find_metadata
from fastvideo.attention.functional import describe_call, forward_extras, run_impl
from fastvideo.attention.kv_cache import StreamingMetadata
from fastvideo.attention.layer import _AttentionLayer
from fastvideo.attention.selector import BackendWish
from fastvideo.attention.validation import autocast, mask_kind
from fastvideo.distributed.agreement import agree
from fastvideo.distributed.mesh import SequenceGroup, as_sequence_group, current_sequence_group
from fastvideo.distributed.shards import resolve_lengths
from fastvideo.distributed.ulysses import check_heads, heads_to_tokens, tokens_to_heads
from fastvideo.forward_context import thread_state
from fastvideo.platforms import AttentionBackendEnum

__all__ = ["StreamingAttention"]


class StreamingAttention(_AttentionLayer):
    """Self attention of one chunk over itself and what is cached, by any backend that accepts.

    The layer is an `AttentionLayer`: it takes its cache as a tensor and the chunk's place in it as metadata. Both come from one
    `KVCache`. Where a sequence is shared by several devices, each holds a shard of the chunk's tokens, of the length that the
    step's context gives or equal ones, and caches all tokens of its heads (Ulysses), as in `DistributedAttention`.

    Args:
        num_heads: Query heads, of all devices together.
        head_size: Size of a head.
        num_kv_heads: Key and value heads; `None` means `num_heads`. Query head h reads key head
            `h // (num_heads / num_kv_heads)`.
        softmax_scale: Factor of the scores, any finite number; `None` means `head_size ** -0.5`.
        supported_attention_backends: Backends that may run here; `None` means every one.
        prefix: The layer's dotted name in its model.
        backend: The backend of this layer, by name: it runs or raises.
        mesh: The devices that share the sequence, as for `DistributedAttention`.
        **extra_impl_args: Handed to the implementation, which refuses what it doesn't know.

    Raises:
        TypeError: A size, the scale or the mesh is of a wrong type, or `causal` is given.
        ValueError: A size or the scale is out of range.
        UnknownBackend: A backend's name is unknown.

    Example:
        >>> from fastvideo.attention import KVCache
        >>> cache = KVCache(1, 2, 16, tokens_per_frame=6, window_frames=3, sink_frames=1)
        >>> layer = StreamingAttention(num_heads=2, head_size=16)
        >>> with torch.no_grad():
        ...     for frame in torch.randn(5, 1, 6, 2, 16):
        ...         out = layer(frame, frame, frame, cache[0], cache.plan())
        ...         cache.advance()
        >>> out.shape, cache.num_frames
        (torch.Size([1, 6, 2, 16]), 5)
    """

    def __init__(  # type: ignore[no-untyped-def]  # as the contract's layers: `extra_impl_args` without annotation
        self,
        num_heads: int,
        head_size: int,
        num_kv_heads: int | None = None,
        softmax_scale: float | None = None,
        supported_attention_backends: tuple[AttentionBackendEnum, ...] | None = None,
        prefix: str = "",
        *,
        backend: BackendWish | None = None,
        mesh: DeviceMesh | ProcessGroup | SequenceGroup | None = None,
        **extra_impl_args,
    ) -> None:
        if "causal" in extra_impl_args:
            raise TypeError("a streaming layer takes no causal: its KVCache says which frames see which; leave it out")
        super().__init__(
            num_heads,
            head_size,
            num_kv_heads,
            softmax_scale,
            False,
            supported_attention_backends,
            backend,
            prefix,
            extra_impl_args,
        )
        self.sequence_group = as_sequence_group(mesh)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Write the chunk's keys and values to the cache, in place, and attend to what its frames see.

        Args:
            query: This device's queries, `[B, S, H, D]`, rotated.
            key: `[B, S, H_kv, D]`, rotated.
            value: `[B, S, H_kv, D]`.
            kv_cache: A layer's buffer of a `KVCache`, `[2, B, C, H_kv / P, D]`.
            attn_metadata: What `KVCache.plan` returned for this chunk, a `StreamingMetadata`.

        Returns:
            `[B, S, H, D]`.

        Raises:
            TypeError: A type or dtype is wrong.
            ValueError: A shape, device or shard length is wrong, or heads don't divide by the devices.
            RanksDisagree: Another device makes another call.
            NotImplementedError: A gradient is needed, and none flows through the cache; or the devices form a ring.
            BackendUnavailable: No backend that may run here can. The cache is as it was.
        """
        query, key, value = autocast(query, key, value)  # type: ignore[assignment]
        self._check(query, key, value, may_lack_tokens=True)
        if key.shape[1] != query.shape[1]:
            raise ValueError(
                f"expected key and value of the query's length, {query.shape[1]} tokens of the chunk, got {key.shape[1]}"
            )
        group = current_sequence_group(self.sequence_group)
        check_heads(self.num_heads, self.num_kv_heads, group)
        if not isinstance(attn_metadata, StreamingMetadata):
            raise TypeError(
                f"expected attn_metadata as KVCache.plan() returns it (StreamingMetadata), got {type(attn_metadata).__name__}"
            )
        lengths = resolve_lengths(query.shape[1], group, thread_state.shard_lengths)
        attn_metadata.check_sequence(sum(lengths))
        _check_cache(kv_cache, key, attn_metadata, group.size)
        _check_no_gradient(query, key, value, kv_cache)
        if group.size > 1:
            fields: dict[str, Any] = {
                "pass": "inference",
                "layer": self.prefix,
                "layout": "streaming",
                "query": (query.shape[0], self.num_heads, self.head_size),
                "key_heads": self.num_kv_heads,
                "lengths": lengths,
                "keys": attn_metadata.num_keys,
                "dtype": query.dtype,
            }
            query = agree(query, group, **fields)
            query, key, value = tokens_to_heads((query, key, value), lengths, group)

        keys, values = kv_cache[0, :, : attn_metadata.num_keys], kv_cache[1, :, : attn_metadata.num_keys]
        mask = attn_metadata.attn_mask
        kind = mask_kind(mask, tuple(query.shape), attn_metadata.num_keys, query)
        selected = self._dispatcher.select(describe_call(query, keys, values, mask, kind, self.softmax_scale, False))
        metadata = find_metadata(selected, None)
        check_sequence(selected, metadata, query.shape[1], self.num_heads, are_cut=group.size > 1)
        kv_cache[0].index_copy_(1, attn_metadata.slots, key)
        kv_cache[1].index_copy_(1, attn_metadata.slots, value)
        output: torch.Tensor = run_impl(selected, (query, keys, values), metadata, forward_extras(attn_mask=mask))
        return output if group.size == 1 else heads_to_tokens(output, lengths, group)


if TYPE_CHECKING:
    _is_a_layer_of_the_contract: type[AttentionLayer] = StreamingAttention


def _check_cache(kv_cache: torch.Tensor, key: torch.Tensor, step: StreamingMetadata, world_size: int) -> None:
    """Check a cache against a chunk's key, `[B, S, H_kv, D]` of this device."""
    if not isinstance(kv_cache, torch.Tensor):
        raise TypeError(f"expected kv_cache as a tensor, one layer's of a KVCache (cache[0]), got {type(kv_cache).__name__}")
    batch, _, num_heads, head_size = key.shape
    expected = (2, batch, num_heads // world_size, head_size)
    if kv_cache.dim() != 5 or (*kv_cache.shape[:2], *kv_cache.shape[3:]) != expected:
        raise ValueError(
            f"expected kv_cache [2, batch, slots, num_kv_heads, head_size] = [2, {batch}, C, {expected[2]}, {head_size}] for "
            f"keys {tuple(key.shape)} on {world_size} device(s), got {tuple(kv_cache.shape)}; build the KVCache for this "
            "model, with its mesh or inside the sequence_parallel scope that it runs in"
        )
    if kv_cache.shape[2] < step.num_keys:
        raise ValueError(
            f"attn_metadata reads {step.num_keys} slots and kv_cache has {kv_cache.shape[2]}; take both from one KVCache"
        )
    if kv_cache.dtype != key.dtype:
        raise TypeError(f"expected kv_cache in the keys' dtype {key.dtype}, got {kv_cache.dtype}; build the KVCache with it")
    if kv_cache.device != key.device or step.slots.device != key.device:
        raise ValueError(
            f"expected kv_cache and attn_metadata on {key.device}, got {kv_cache.device} and {step.slots.device}; "
            "build the KVCache there"
        )


def _check_no_gradient(*tensors: torch.Tensor) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise NotImplementedError(
            "no gradient flows through the cache, whose slots are overwritten: call under torch.no_grad(); to train, attend "
            "over the whole clip with attn_mask=block_causal_mask(...)"
        )
