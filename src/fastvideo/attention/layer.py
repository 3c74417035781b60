"""The three layers for every place attention happens in a video model. They check, choose, exchange and call: no arithmetic.

`B batch, S tokens of this device's shard, P devices, R replicated tokens, H heads, D head size`; `[B, S, H, D]` everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from fastvideo.attention.backends.abstract import AttentionMetadata
from fastvideo.attention.dispatch import Dispatcher, check_sequence, find_metadata
from fastvideo.attention.functional import describe_call, forward_extras, run_impl
from fastvideo.attention.parallel import place, run_shared
from fastvideo.attention.rope import apply_rope
from fastvideo.attention.selector import BackendWish, Decision
from fastvideo.attention.shared_call import (
    SharedCall,
    agreed,
    replicated_last,
    shard_lengths_of,
)
from fastvideo.attention.validation import (
    as_size,
    autocast,
    check_causal_lengths,
    check_flags,
    check_output_buffer,
    check_qkv,
    check_replicated,
    check_scale,
    check_sizes,
    mask_kind,
)
from fastvideo.distributed.layouts import LAYOUTS
from fastvideo.distributed.mesh import SequenceGroup, as_sequence_group, current_sequence_group
from fastvideo.distributed.precision import FLOAT8
from fastvideo.platforms import AttentionBackendEnum

__all__ = ["DistributedAttention", "DistributedAttention_VSA", "LocalAttention"]


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
        num_heads, num_kv_heads, head_size = check_sizes(num_heads, num_kv_heads, head_size)
        check_scale(softmax_scale)
        check_flags(causal=causal)
        self.num_heads = num_heads
        self.head_size = head_size
        self.num_kv_heads = num_kv_heads
        self.softmax_scale = float(head_size**-0.5 if softmax_scale is None else softmax_scale)
        self.causal = causal
        self.prefix = prefix
        self._dispatcher = Dispatcher(
            built_for=(num_heads, head_size, num_kv_heads, self.softmax_scale, causal),
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

    def _check(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, may_lack_tokens: bool = False) -> None:
        check_qkv(q, k, v, may_lack_tokens=may_lack_tokens)
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
        check_sequence(selected, metadata, q.shape[1], self.num_heads)
        output: torch.Tensor = run_impl(selected, (q, k, v), metadata, forward_extras(attn_mask=attn_mask, out=out))
        return output


class DistributedAttention(_AttentionLayer):
    """Attention over tokens that several devices share, with tokens that every device holds joined to them.

    Each device holds a shard of the sequence: any lengths, given with the step's context (`set_forward_context(...,
    shard_lengths=)`), or equal ones. The numbers are those of one device, for any number of heads. The devices are, in this
    order, those of `mesh`, of the `fastvideo.distributed.sequence_parallel(mesh)` scope, of `init_sequence_parallel`, or of the
    default process group where one is initialised; on one device nothing is exchanged and no process group is needed.

    Layouts: `"ulysses"` swaps tokens of all heads for all tokens of some heads, attends, and swaps back. `"ring"` leaves
    queries where they are, fetches keys from one device after another and merges; `"gather"` fetches them all at once. On a
    mesh with dims `"ring"` and `"ulysses"` both happen along their dims, and `layout` says how keys are shared along the
    former, or, as `"ulysses"`, that heads are swapped along both. `"auto"` takes what `fastvideo.distributed.plan` expects to
    be fastest. A sparse backend needs `"ulysses"`, which `"auto"` takes for it.

    Gradients: the global loss is the sum over devices of their local losses, and a loss on the replicated output is counted
    once (on one device, or a share on each). Then every gradient equals one device's: that of a shard directly, that of a
    replicated input, and of a mask's rows for it, on every device (`replicated_grad="reduced"`), or its sum over devices
    (`"partial"`).

    Args:
        num_heads: Query heads, of all devices together.
        head_size: Size of a head.
        num_kv_heads: Key and value heads; `None` means `num_heads`.
        softmax_scale: Factor of the scores, any finite number; `None` means `head_size ** -0.5`.
        causal: Each query sees only keys up to its own position in the whole sequence, the one that one device would
            concatenate: the shards in their order, with replicated tokens behind them or, with `joint_strategy="front"`,
            before them. Behind, only replicated queries see replicated keys.
        supported_attention_backends: Backends that may run here; `None` means every one.
        prefix: The layer's dotted name in its model.
        backend: The backend of this layer, by name: it runs or raises.
        mesh: The devices that share the sequence: a one-dimensional `DeviceMesh`, one with dims `"ring"` and `"ulysses"`, or
            a process group.
        layout: `"auto"`, `"ulysses"`, `"ring"` or `"gather"`: a named one runs or raises.
        joint_strategy: Where replicated tokens stand, for masks and causal attention: `"rear"`, behind the sequence, or
            `"front"`.
        replicated_grad: `"reduced"` or `"partial"`, see above.
        head_groups: Into how many groups a device's heads are cut at most, so that one travels while another is computed
            (by Ulysses and gather; the first and the last are small); `None` is one, or three in sparse attention without
            gradient whose exchange copy engines carry.
        exchange_dtype: `torch.float8_e4m3fn` sends queries, keys, values and outputs in 8 bits with a scale per token and
            head, by Ulysses and gather, without gradient; outputs are then off by about 5 %. `None` sends them as they are.
        **extra_impl_args: Handed to the implementation, which refuses what it doesn't know.

    Raises:
        TypeError: A size, the scale or the mesh is of a wrong type.
        ValueError: A size, the scale, or one of the named choices is out of range.
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
        layout: str = "auto",
        joint_strategy: str = "rear",
        replicated_grad: str = "reduced",
        head_groups: int | None = None,
        exchange_dtype: torch.dtype | None = None,
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
        for name, value, known in (
            ("layout", layout, LAYOUTS),
            ("joint_strategy", joint_strategy, ("rear", "front")),
            ("replicated_grad", replicated_grad, ("reduced", "partial")),
        ):
            if value not in known:
                raise ValueError(f"expected {name} as one of {', '.join(known)}, got {value!r}")
        if exchange_dtype not in (None, FLOAT8):
            raise ValueError(f"expected exchange_dtype as {FLOAT8} or None, got {exchange_dtype!r}")
        self.exchange_dtype = exchange_dtype
        self.layout = layout
        self.joint_strategy = joint_strategy
        self.replicated_grad = replicated_grad
        self.head_groups = None if head_groups is None else as_size("head_groups", head_groups)
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
        shard_lengths: Sequence[int] | None = None,
        kv_shard_lengths: Sequence[int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend over the whole sequence, each device from its own tokens.

        Args:
            q: This device's queries, `[B, S_q, H, D]`; `S_q` may be 0 on some devices.
            k: This device's keys, `[B, S_kv, H_kv, D]`; `S_kv` may be 0, on all devices where replicated keys are given.
            v: This device's values, `[B, S_kv, H_kv, D]`.
            replicated_q: Queries that every device holds, `[B, R, H, D]`, with their keys and values; all see all, unless
                the layer is causal.
            replicated_k: Keys that every device holds, `[B, R, H_kv, D]`, with values, and with queries or without.
            replicated_v: Their values, `[B, R, H_kv, D]`.
            attn_mask: Key padding, sharded like the keys, bool `[B, S_kv + R]`; or a full mask of this device's rows over
                all N keys, `[B|1, H|1, S_q + R, N + R]`, without the R rows where there are no replicated queries. With
                `joint_strategy="front"` the replicated tokens come first.
            freqs_cis: Cosines and sines `[S, D/2]` of a rotary embedding for this device's `q` and `k`. Replicated tokens
                aren't rotated.
            attn_metadata: The step's metadata; `None` takes it from the forward context.
            shard_lengths: Queries of each device; `None` takes those of the step's context, then equal shards.
            kv_shard_lengths: Keys of each device; `None` means those of the queries, or equal shards of another sequence.

        Returns:
            The output of this device's tokens, `[B, S_q, H, D]`, and that of the replicated ones, `[B, R, H, D]`, or `None`.

        Raises:
            TypeError: A type or dtype is wrong, or the metadata is of another backend's class.
            ValueError: A shape, length, device or value is wrong, the layout contradicts the mesh, or needed metadata is
                missing.
            NotImplementedError: Causal attention between unequal lengths, those of all devices together.
            BackendUnavailable: No backend that may run here can, in this layout.
        """
        more, lengths = (replicated_q, replicated_k, replicated_v), (shard_lengths, kv_shard_lengths)
        return self._attend(q, k, v, more, None, attn_mask, freqs_cis, attn_metadata, lengths)

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
        given_lengths: tuple[Sequence[int] | None, Sequence[int] | None],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        q, k, v, gate, attn_mask, *replicated = autocast(q, k, v, gate, attn_mask, *replicated)  # type: ignore[assignment]
        self._check(q, k, v, may_lack_tokens=True)
        group = current_sequence_group(self.sequence_group)
        rest = check_replicated(q, k, tuple(replicated))
        lengths, kv_lengths = shard_lengths_of(q, k, group, given_lengths, has_more=rest is not None)
        if self.causal:
            check_causal_lengths(sum(lengths), sum(kv_lengths))
        _check_gate(gate, q)
        call = SharedCall(
            q, k, v, gate, rest, attn_mask, lengths, kv_lengths, self.causal, self.softmax_scale,
            reduces=self.replicated_grad == "reduced", sends_float8=self.exchange_dtype is not None,
            in_front=self.joint_strategy == "front",
        )  # fmt: skip
        rows = (q.shape[0], q.shape[1] + call.num_rows, self.num_heads, self.head_size)
        is_padding = isinstance(attn_mask, torch.Tensor) and attn_mask.dim() == 2
        kind = mask_kind(attn_mask, rows, (k.shape[1] if is_padding else sum(kv_lengths)) + call.num_more, q)
        if call.in_front:
            call = replicated_last(call)
        layout, call, chosen = place(
            call, group, kind, self._dispatcher, attn_metadata,
            wish=self.layout, head_groups=self.head_groups, needs_whole_sequence=self._default_backend is not None,
        )  # fmt: skip
        metadata = find_metadata(chosen.whole, attn_metadata)
        are_cut = layout.ulysses.size > 1 or call.head_groups > 1
        check_sequence(chosen.whole, metadata, sum(lengths), self.num_heads, are_cut=are_cut)
        if freqs_cis is not None:
            q, k = apply_rope(q, freqs_cis), apply_rope(k, freqs_cis)
        call = replace(call, query=q, key=k, metadata=metadata)
        return run_shared(agreed(call, group, layout, chosen.whole.name, kind, self.prefix), group, layout, chosen)


class DistributedAttention_VSA(DistributedAttention):
    """`DistributedAttention` by Video Sparse Attention (2505.13389), with a gate for its coarse part.

    Every video token sees the tokens of the tiles that its own tile selects, and all replicated tokens; replicated tokens see
    everything. A NaN among a tile's keys counts as the highest score, so that it shows. The tiles and how many of them are kept
    stand in the step's metadata, built by `VideoSparseAttentionMetadataBuilder` and set with `set_forward_context`. Arguments,
    gradients and errors are those of `DistributedAttention`; `backend=None` means `VIDEO_SPARSE_ATTN`.

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
        shard_lengths: Sequence[int] | None = None,
        kv_shard_lengths: Sequence[int] | None = None,
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
            shard_lengths: Tokens of each device; `None` takes those of the step's context, then equal shards.
            kv_shard_lengths: The same; for backends that take other keys.

        Returns:
            The output of this device's tokens, `[B, S, H, D]`, and that of the replicated ones, `[B, R, H, D]`, or `None`.
        """
        more, lengths = (replicated_q, replicated_k, replicated_v), (shard_lengths, kv_shard_lengths)
        return self._attend(q, k, v, more, gate_compress, attn_mask, freqs_cis, attn_metadata, lengths)


def _check_gate(gate: torch.Tensor | None, q: torch.Tensor) -> None:
    if gate is None:
        return
    # Not the annotated type where a caller hands over something else.
    given: object = gate
    if not isinstance(given, torch.Tensor):
        raise TypeError(f"expected gate_compress as a tensor like q or None, got {type(given).__name__}")
    if gate.shape != q.shape or gate.dtype != q.dtype or gate.device != q.device:
        raise ValueError(f"expected gate_compress like q, {tuple(q.shape)} {q.dtype}, got {tuple(gate.shape)} {gate.dtype}")


def _meant(extra_impl_args: dict[str, Any]) -> dict[str, Any]:
    """Drop `dropout_rate=0`, which real callers hand over without meaning it."""
    if extra_impl_args.get("dropout_rate", 0) != 0:
        raise NotImplementedError(f"layers apply no dropout, got dropout_rate={extra_impl_args['dropout_rate']!r}")
    return {name: value for name, value in extra_impl_args.items() if name != "dropout_rate"}
