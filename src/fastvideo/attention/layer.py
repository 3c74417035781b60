"""The three layers for every place attention happens in a video model. They check, choose, exchange and call: no arithmetic.

`B batch, S tokens of this device's shard, P devices, R replicated tokens, H heads, D head size`; `[B, S, H, D]` everywhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from fastvideo.attention.backends.abstract import AttentionMetadata
from fastvideo.attention.dispatch import Dispatcher, Selected, check_sequence, find_metadata
from fastvideo.attention.functional import describe_call, forward_extras, run_impl
from fastvideo.attention.rope import apply_rope
from fastvideo.attention.selector import BackendWish, Decision
from fastvideo.attention.validation import (
    autocast,
    check_causal,
    check_causal_lengths,
    check_output_buffer,
    check_qkv,
    check_replicated,
    check_scale,
    check_sizes,
    mask_kind,
)
from fastvideo.distributed.mesh import LOCAL, SequenceGroup, as_sequence_group, current_sequence_group
from fastvideo.distributed.shards import keep_own_part
from fastvideo.distributed.ulysses import check_heads, exchange_mask, gather_heads, heads_to_tokens, tokens_to_heads
from fastvideo.platforms import AttentionBackendEnum

__all__ = ["DistributedAttention", "DistributedAttention_VSA", "LocalAttention"]

_Replicated = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class _AttentionLayer(nn.Module):
    """What the layers share: their sizes, their checks and their choice of backend. Adds nothing to the state dict."""

    _default_backend: str | None = None

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        num_kv_heads: int | None,
        softmax_scale: float | None,
        causal: bool,
        supported_attention_backends: tuple[AttentionBackendEnum, ...] | None,
        backend: BackendWish | None,
        prefix: str,
        extra_impl_args: dict[str, Any],
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_sizes(num_heads, num_kv_heads, head_size)
        check_scale(softmax_scale)
        check_causal(causal)
        self.num_heads = num_heads
        self.head_size = head_size
        self.num_kv_heads = num_kv_heads
        self.softmax_scale = float(head_size**-0.5 if softmax_scale is None else softmax_scale)
        self.causal = causal
        self.prefix = prefix
        self._dispatcher = Dispatcher(
            head_size=head_size,
            softmax_scale=self.softmax_scale,
            causal=causal,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            prefix=prefix,
            supported=supported_attention_backends,
            backend=backend,
            default_backend=self._default_backend,
            extra_impl_args=_meant(extra_impl_args),
        )

    @property
    def decision(self) -> Decision | None:
        """How the last eager call's backend was chosen; before any, how it was while compiling layers like this; or `None`."""
        return self._dispatcher.decision

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, head_size={self.head_size}, num_kv_heads={self.num_kv_heads}, "
            f"softmax_scale={self.softmax_scale:.6g}, causal={self.causal}"
        )

    def _check(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        check_qkv(q, k, v)
        if q.shape[2:] != (self.num_heads, self.head_size) or k.shape[2] != self.num_kv_heads:
            raise ValueError(
                f"this layer has {self.num_heads} query and {self.num_kv_heads} key heads of size {self.head_size}, "
                f"got query {tuple(q.shape)} and key {tuple(k.shape)}"
            )


class LocalAttention(_AttentionLayer):
    """Attention on one device: cross attention to text, or any attention whose tokens aren't shared with other devices.

    Args:
        num_heads: Query heads.
        head_size: Size of a head.
        num_kv_heads: Key and value heads; `None` means `num_heads`. Query head h reads key head
            `h // (num_heads / num_kv_heads)`.
        softmax_scale: Factor of the scores, any finite number; `None` means `head_size ** -0.5`.
        causal: Each query sees only keys up to its own position.
        supported_attention_backends: Backends that may run here; `None` means every one. A backend asked for by scope or
            environment that isn't among them doesn't address this layer.
        backend: The backend of this layer, by name: it runs or raises. `None` leaves it to scope, environment, automatic.
        prefix: The layer's dotted name in its model.
        **extra_impl_args: Handed to the implementation, which refuses what it doesn't know.

    Raises:
        TypeError: A size or the scale is of a wrong type.
        ValueError: A size or the scale is out of range.
        UnknownBackend: A backend's name is unknown.

    Example:
        >>> layer = LocalAttention(num_heads=4, head_size=32)
        >>> q, k = torch.randn(1, 16, 4, 32), torch.randn(1, 5, 4, 32)
        >>> layer(q, k, k, attn_mask=torch.tensor([[True, True, True, False, False]])).shape
        torch.Size([1, 16, 4, 32])
    """

    def __init__(  # type: ignore[no-untyped-def]  # the contract leaves `extra_impl_args` without annotation
        self,
        num_heads: int,
        head_size: int,
        num_kv_heads: int | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        supported_attention_backends: tuple[AttentionBackendEnum, ...] | None = None,
        *,
        backend: BackendWish | None = None,
        prefix: str = "",
        **extra_impl_args,
    ) -> None:
        super().__init__(
            num_heads,
            head_size,
            num_kv_heads,
            softmax_scale,
            causal,
            supported_attention_backends,
            backend,
            prefix,
            extra_impl_args,
        )

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        attn_mask: torch.Tensor | None = None,
        freqs_cis: tuple[torch.Tensor, torch.Tensor] | None = None,
        attn_metadata: AttentionMetadata | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend from `q` to `k` and `v`.

        Args:
            q: `[B, S_q, H, D]`.
            k: `[B, S_kv, H_kv, D]`.
            v: `[B, S_kv, H_kv, D]`.
            attn_mask: Key padding, bool `[B, S_kv]` (True attends), or bool or additive `[B|1, H|1, S_q, S_kv]`.
            freqs_cis: Cosines and sines `[S, D/2]` of a rotary embedding for `q` and `k`.
            attn_metadata: The step's metadata; `None` takes it from the forward context.
            out: A buffer like `q` for the output, for backends that accept one. Inference only.

        Returns:
            `[B, S_q, H, D]`. A query with nothing to attend to gets 0.

        Raises:
            TypeError: A type or dtype is wrong, or the metadata is of another backend's class.
            ValueError: A shape, device or value is wrong, or needed metadata is missing.
            NotImplementedError: Causal attention between unequal lengths.
            BackendUnavailable: No backend that may run here can.
        """
        q, k, v, attn_mask = autocast(q, k, v, attn_mask)  # type: ignore[assignment]
        self._check(q, k, v)
        if self.causal:
            check_causal_lengths(q.shape[1], k.shape[1])
        kind = mask_kind(attn_mask, tuple(q.shape), k.shape[1], q)
        check_output_buffer(out, q)
        call = describe_call(q, k, v, attn_mask, kind, self.softmax_scale, self.causal, out=out)
        selected = self._dispatcher.select(call, metadata=attn_metadata)
        metadata = find_metadata(selected, attn_metadata)
        if freqs_cis is not None:
            q, k = apply_rope(q, freqs_cis), apply_rope(k, freqs_cis)
        check_sequence(selected, metadata, q.shape[1])
        output: torch.Tensor = run_impl(selected, (q, k, v), metadata, forward_extras(attn_mask=attn_mask, out=out))
        return output


class DistributedAttention(_AttentionLayer):
    """Attention over tokens that are shared by several devices, with tokens that every device holds joined at the end.

    Each device holds an equal shard of the sequence. Ulysses swaps tokens of all heads for all tokens of some heads, attends,
    and swaps back, so that the numbers are those of one device. The devices are, in this order, those of `mesh`, of the
    `fastvideo.distributed.sequence_parallel(mesh)` scope, or of the default process group where one is initialised; on one
    device nothing is exchanged and no process group is needed.

    Gradients: the global loss is the sum over devices of their local losses, and a loss on the replicated output is counted
    once (on one device, or a share on each). Then every gradient equals one device's: that of a shard directly, that of a
    replicated input on every device (`replicated_grad="reduced"`), or its sum over devices (`"partial"`).

    Args:
        num_heads: Query heads, of all devices together.
        head_size: Size of a head.
        num_kv_heads: Key and value heads; `None` means `num_heads`.
        softmax_scale: Factor of the scores, any finite number; `None` means `head_size ** -0.5`.
        causal: Each query sees only keys up to its own position.
        supported_attention_backends: Backends that may run here; `None` means every one.
        prefix: The layer's dotted name in its model.
        backend: The backend of this layer, by name: it runs or raises.
        mesh: The devices that share the sequence: a one-dimensional `DeviceMesh`, one with a dim `"ulysses"`, or a process
            group.
        replicated_grad: `"reduced"` or `"partial"`, see above.
        **extra_impl_args: Handed to the implementation, which refuses what it doesn't know.

    Raises:
        TypeError: A size, the scale or the mesh is of a wrong type.
        ValueError: A size, the scale or `replicated_grad` is out of range.
        UnknownBackend: A backend's name is unknown.

    Example:
        >>> layer = DistributedAttention(num_heads=4, head_size=32)
        >>> video, text = torch.randn(1, 64, 4, 32), torch.randn(1, 7, 4, 32)
        >>> out, text_out = layer(video, video, video, text, text, text)
        >>> out.shape, text_out.shape
        (torch.Size([1, 64, 4, 32]), torch.Size([1, 7, 4, 32]))
    """

    def __init__(  # type: ignore[no-untyped-def]  # the contract leaves `extra_impl_args` without annotation
        self,
        num_heads: int,
        head_size: int,
        num_kv_heads: int | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        supported_attention_backends: tuple[AttentionBackendEnum, ...] | None = None,
        prefix: str = "",
        *,
        backend: BackendWish | None = None,
        mesh: DeviceMesh | ProcessGroup | SequenceGroup | None = None,
        replicated_grad: str = "reduced",
        **extra_impl_args,
    ) -> None:
        super().__init__(
            num_heads,
            head_size,
            num_kv_heads,
            softmax_scale,
            causal,
            supported_attention_backends,
            backend,
            prefix,
            extra_impl_args,
        )
        if replicated_grad not in ("reduced", "partial"):
            raise ValueError(f"expected replicated_grad 'reduced' or 'partial', got {replicated_grad!r}")
        self.replicated_grad = replicated_grad
        self.sequence_group = as_sequence_group(mesh)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        replicated_q: torch.Tensor | None = None,
        replicated_k: torch.Tensor | None = None,
        replicated_v: torch.Tensor | None = None,
        *,
        attn_mask: torch.Tensor | None = None,
        freqs_cis: tuple[torch.Tensor, torch.Tensor] | None = None,
        attn_metadata: AttentionMetadata | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend over the whole sequence, each device from its own tokens.

        Args:
            q: This device's queries, `[B, S_q, H, D]`.
            k: This device's keys, `[B, S_kv, H_kv, D]`.
            v: This device's values, `[B, S_kv, H_kv, D]`.
            replicated_q: Queries that every device holds, `[B, R, H, D]`, with their keys and values or not at all. They
                follow the sequence: all see all.
            replicated_k: Their keys, `[B, R, H_kv, D]`.
            replicated_v: Their values, `[B, R, H_kv, D]`.
            attn_mask: Key padding, sharded like the keys, bool `[B, S_kv + R]`; or a full mask of this device's rows over
                all keys, `[B|1, H|1, S_q + R, P S_kv + R]`.
            freqs_cis: Cosines and sines `[S, D/2]` of a rotary embedding for this device's `q` and `k`. Replicated tokens
                aren't rotated.
            attn_metadata: The step's metadata; `None` takes it from the forward context.

        Returns:
            The output of this device's tokens, `[B, S_q, H, D]`, and that of the replicated ones, `[B, R, H, D]`, or `None`.

        Raises:
            TypeError: A type or dtype is wrong, or the metadata is of another backend's class.
            ValueError: A shape, device or value is wrong, heads don't divide by the devices, or needed metadata is missing.
            NotImplementedError: Causal attention between unequal lengths or with replicated tokens.
            BackendUnavailable: No backend that may run here can.
        """
        return self._attend(q, k, v, (replicated_q, replicated_k, replicated_v), None, attn_mask, freqs_cis, attn_metadata)

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        replicated: tuple[torch.Tensor | None, ...],
        gate: torch.Tensor | None,
        attn_mask: torch.Tensor | None,
        freqs_cis: tuple[torch.Tensor, torch.Tensor] | None,
        attn_metadata: AttentionMetadata | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        q, k, v, gate, attn_mask, *replicated = autocast(q, k, v, gate, attn_mask, *replicated)  # type: ignore[assignment]
        self._check(q, k, v)
        group = current_sequence_group(self.sequence_group)
        check_heads(self.num_heads, self.num_kv_heads, group)
        rest = check_replicated(q, k, tuple(replicated))
        num_replicated = 0 if rest is None else rest[0].shape[1]
        if self.causal:
            check_causal_lengths(q.shape[1], k.shape[1])
            if rest is not None:
                raise NotImplementedError(
                    "causal attention with replicated tokens leaves open which tokens see which; pass a bool attn_mask instead"
                )
        if gate is not None and not isinstance(gate, torch.Tensor):
            raise TypeError(f"expected gate_compress as a tensor like q or None, got {type(gate).__name__}")
        if gate is not None and (gate.shape != q.shape or gate.dtype != q.dtype or gate.device != q.device):
            raise ValueError(f"expected gate_compress like q, {tuple(q.shape)} {q.dtype}, got {tuple(gate.shape)} {gate.dtype}")
        rows = (q.shape[0], q.shape[1] + num_replicated, self.num_heads, self.head_size)
        is_sharded = isinstance(attn_mask, torch.Tensor) and attn_mask.dim() == 2
        kind = mask_kind(attn_mask, rows, k.shape[1] * (1 if is_sharded else group.size) + num_replicated, q)
        call = describe_call(
            q, k, v, attn_mask, kind, self.softmax_scale, self.causal,
            gate=gate, num_replicated=num_replicated, world_size=group.size,
        )  # fmt: skip
        selected = self._dispatcher.select(call, metadata=attn_metadata)
        metadata = find_metadata(selected, attn_metadata)
        check_sequence(selected, metadata, q.shape[1] * group.size)
        if freqs_cis is not None:
            q, k = apply_rope(q, freqs_cis), apply_rope(k, freqs_cis)
        tensors = (q, k, v) if gate is None else (q, k, v, gate)
        if group == LOCAL:
            return self._run(selected, tensors, rest, attn_mask, metadata)
        return self._run_ulysses(selected, tensors, rest, attn_mask, metadata, group)

    def _run(
        self,
        selected: Selected,
        tensors: tuple[torch.Tensor, ...],
        replicated: _Replicated | None,
        attn_mask: torch.Tensor | None,
        metadata: AttentionMetadata | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        result = run_impl(selected, tensors, metadata, forward_extras(attn_mask=attn_mask), replicated)
        return (result, None) if replicated is None else result

    def _run_ulysses(
        self,
        selected: Selected,
        tensors: tuple[torch.Tensor, ...],
        replicated: _Replicated | None,
        attn_mask: torch.Tensor | None,
        metadata: AttentionMetadata | None,
        group: SequenceGroup,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        num_replicated = 0 if replicated is None else replicated[0].shape[1]
        if attn_mask is not None:
            attn_mask = exchange_mask(attn_mask, self.num_heads, num_replicated, group)
        if tensors[0].shape[1] == tensors[1].shape[1]:
            tensors = tokens_to_heads(tensors, group)
        else:  # cross attention: queries (and gate) and keys with values differ in length
            query, key, value, *gate = tensors
            query, *gate = tokens_to_heads((query, *gate), group)
            tensors = (query, *tokens_to_heads((key, value), group), *gate)
        if replicated is not None:
            replicated = tuple(keep_own_part(x, 2, group, self.replicated_grad) for x in replicated)  # type: ignore[assignment]
        output, rest = self._run(selected, tensors, replicated, attn_mask, metadata)
        return heads_to_tokens(output, group), None if rest is None else gather_heads(rest, group)


class DistributedAttention_VSA(DistributedAttention):
    """`DistributedAttention` by Video Sparse Attention (2505.13389), with a gate for its coarse part.

    Every video token sees the tokens of the tiles that its own tile selects, and all replicated tokens; replicated tokens see
    everything. The tiles and how many of them are kept stand in the step's metadata, built by
    `VideoSparseAttentionMetadataBuilder` and set with `set_forward_context`. Arguments, gradients and errors are those of
    `DistributedAttention`; `backend=None` means `VIDEO_SPARSE_ATTN`.

    Example:
        >>> from fastvideo.attention.backends.video_sparse_attn import VideoSparseAttentionMetadataBuilder
        >>> from fastvideo.forward_context import set_forward_context
        >>> metadata = VideoSparseAttentionMetadataBuilder().build(
        ...     current_timestep=0, raw_latent_shape=(4, 8, 8), patch_size=(1, 1, 1), VSA_sparsity=0.5, device="cpu"
        ... )
        >>> layer, video = DistributedAttention_VSA(num_heads=2, head_size=16), torch.randn(1, 256, 2, 16)
        >>> with set_forward_context(current_timestep=0, attn_metadata=metadata):
        ...     out, _ = layer(video, video, video, gate_compress=torch.zeros_like(video))
        >>> out.shape
        torch.Size([1, 256, 2, 16])
    """

    _default_backend = AttentionBackendEnum.VIDEO_SPARSE_ATTN.name

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        replicated_q: torch.Tensor | None = None,
        replicated_k: torch.Tensor | None = None,
        replicated_v: torch.Tensor | None = None,
        gate_compress: torch.Tensor | None = None,
        *,
        attn_mask: torch.Tensor | None = None,
        freqs_cis: tuple[torch.Tensor, torch.Tensor] | None = None,
        attn_metadata: AttentionMetadata | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend as `DistributedAttention` does, over selected tiles.

        Args:
            q: This device's queries, `[B, S, H, D]`.
            k: This device's keys, `[B, S, H_kv, D]`.
            v: This device's values, `[B, S, H_kv, D]`.
            replicated_q: Queries that every device holds, `[B, R, H, D]`, with their keys and values or not at all.
            replicated_k: Their keys, `[B, R, H_kv, D]`.
            replicated_v: Their values, `[B, R, H_kv, D]`.
            gate_compress: Factor of the coarse part's output, `[B, S, H, D]`; `None` means no coarse part at all.
            attn_mask: Refused by VSA; for backends that take one.
            freqs_cis: Cosines and sines `[S, D/2]` of a rotary embedding for this device's `q` and `k`.
            attn_metadata: The step's metadata; `None` takes it from the forward context.

        Returns:
            The output of this device's tokens, `[B, S, H, D]`, and that of the replicated ones, `[B, R, H, D]`, or `None`.
        """
        replicated = (replicated_q, replicated_k, replicated_v)
        return self._attend(q, k, v, replicated, gate_compress, attn_mask, freqs_cis, attn_metadata)


def _meant(extra_impl_args: dict[str, Any]) -> dict[str, Any]:
    """Drop `dropout_rate=0`, which real callers hand over without meaning it."""
    if extra_impl_args.get("dropout_rate", 0) != 0:
        raise NotImplementedError(f"layers apply no dropout, got dropout_rate={extra_impl_args['dropout_rate']}")
    return {name: value for name, value in extra_impl_args.items() if name != "dropout_rate"}
