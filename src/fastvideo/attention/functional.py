"""`attention()`: one attention call on one device, by whichever backend is asked for or fits best."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch

from fastvideo.attention.backends.abstract import AttentionMetadata
from fastvideo.attention.dispatch import Dispatcher, Selected, check_sequence, find_metadata
from fastvideo.attention.selector import BackendWish
from fastvideo.attention.validation import (
    autocast,
    check_causal_lengths,
    check_dropout,
    check_flags,
    check_output_buffer,
    check_qkv,
    check_scale,
    mask_kind,
)

__all__ = ["attention"]


@overload
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    attn_mask: torch.Tensor | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    return_lse: Literal[False] = ...,
    backend: BackendWish | None = ...,
    attn_metadata: AttentionMetadata | None = ...,
    out: torch.Tensor | None = ...,
) -> torch.Tensor: ...


@overload
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    attn_mask: torch.Tensor | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    return_lse: Literal[True],
    backend: BackendWish | None = ...,
    attn_metadata: AttentionMetadata | None = ...,
    out: torch.Tensor | None = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    backend: BackendWish | None = None,
    attn_metadata: AttentionMetadata | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Return `softmax(scale * query @ key^T + mask) @ value`, exactly as asked or not at all.

    Args:
        query: `[B, S_q, H, D]` in float16, bfloat16, float32 or float64.
        key: `[B, S_kv, H_kv, D]`.
        value: `[B, S_kv, H_kv, D]`.
        attn_mask: Key padding, bool `[B, S_kv]`; or bool (True attends) or additive, in query's dtype,
            `[B|1, H|1, S_q, S_kv]`.
        dropout_p: Probability of dropping an attention weight.
        is_causal: Each query sees only keys up to its own position; needs `S_q == S_kv`.
        scale: Any finite number; `None` means `D ** -0.5`.
        enable_gqa: Allow fewer key and value heads than query heads; query head h reads key head `h // (H / H_kv)`.
        return_lse: Return the log-sum-exp of the scores too, `[B, S_q, H]`, natural logarithm, fp32 (fp64 for fp64).
        backend: Name of the backend to run; it runs or raises. `None` follows scope, environment, then the fastest exact.
        attn_metadata: Step metadata for a sparse backend; `None` takes it from the forward context.
        out: A buffer like query for the output, where the backend accepts one. Inference only.

    Returns:
        The output, `[B, S_q, H, D]`; with `return_lse`, the pair of output and log-sum-exp. A query with nothing to attend
        to gets output 0 and log-sum-exp minus infinity.

    Raises:
        TypeError: A dtype or a type is wrong.
        ValueError: A shape, a device or a value is wrong, or needed metadata is missing.
        NotImplementedError: Causal attention between unequal lengths.
        UnknownBackend: No backend has that name.
        BackendUnavailable: The backend asked for can't run this, or none can; the message has every reason.

    Example:
        >>> query, key = torch.randn(1, 8, 4, 32), torch.randn(1, 16, 2, 32)
        >>> out, lse = attention(query, key, key, enable_gqa=True, return_lse=True)
        >>> out.shape, lse.shape
        (torch.Size([1, 8, 4, 32]), torch.Size([1, 8, 4]))
    """
    query, key, value, attn_mask = autocast(query, key, value, attn_mask)  # type: ignore[assignment]
    check_qkv(query, key, value)
    check_scale(scale)
    check_dropout(dropout_p)
    check_flags(is_causal=is_causal, enable_gqa=enable_gqa, return_lse=return_lse)
    if query.shape[2] != key.shape[2] and not enable_gqa:
        raise ValueError(
            f"expected as many key heads as query heads, got {key.shape[2]} and {query.shape[2]}; "
            "pass enable_gqa=True for grouped-query attention"
        )
    if is_causal:
        check_causal_lengths(query.shape[1], key.shape[1])
    kind = mask_kind(attn_mask, tuple(query.shape), key.shape[1], query)
    check_output_buffer(out, query)
    softmax_scale = float(query.shape[3] ** -0.5 if scale is None else scale)
    call = describe_call(
        query, key, value, attn_mask, kind, softmax_scale, is_causal,
        dropout_p=dropout_p, return_lse=return_lse, out=out,
    )  # fmt: skip
    selected = _DISPATCHER.select(call, backend, attn_metadata)
    metadata = find_metadata(selected, attn_metadata)
    check_sequence(selected, metadata, query.shape[1], query.shape[2])
    extras = forward_extras(attn_mask=attn_mask, dropout_p=dropout_p or None, return_lse=return_lse or None, out=out)
    result: torch.Tensor | tuple[torch.Tensor, torch.Tensor] = run_impl(selected, (query, key, value), metadata, extras)
    return result


def describe_call(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    kind: str | None,
    softmax_scale: float,
    is_causal: bool,
    *,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    gate: torch.Tensor | None = None,
    replicated: tuple[torch.Tensor | None, ...] | None = None,
    out: torch.Tensor | None = None,
    num_replicated: int = 0,
    layout: str = "local",
    lengths: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Return the fields of a checked call's `AttentionRequest`.

    `lengths` are the queries and keys that the backend will see, where other devices' tokens or replicated ones join those of
    `query` and `key`.
    """
    mask_needs_grad = attn_mask is not None and attn_mask.requires_grad
    inputs = (query, key, value, attn_mask, gate, *(replicated or ()))
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    return dict(  # noqa: C408  # reads as the class it becomes
        num_heads=query.shape[2],
        num_kv_heads=key.shape[2],
        head_size=query.shape[3],
        query_len=query.shape[1] if lengths is None else lengths[0],
        key_len=key.shape[1] if lengths is None else lengths[1],
        dtype=query.dtype,
        device=query.device.type,
        batch=query.shape[0],
        scale=softmax_scale,
        is_causal=is_causal,
        mask=kind,
        mask_needs_grad=mask_needs_grad and needs_grad,
        dropout_p=dropout_p,
        needs_grad=needs_grad,
        needs_lse=return_lse,
        has_gate=gate is not None,
        has_out=out is not None,
        num_replicated=num_replicated,
        layout=layout,
    )


def forward_extras(**values: Any) -> dict[str, Any]:
    """Return the keyword arguments that a call really asks for, so that a minimal `forward` isn't handed the others."""
    return {name: value for name, value in values.items() if value is not None}


def run_impl(
    selected: Selected,
    tensors: tuple[torch.Tensor, ...],
    metadata: AttentionMetadata | None,
    extras: dict[str, Any],
    replicated: tuple[torch.Tensor | None, torch.Tensor, torch.Tensor] | None = None,
    *,
    in_front: bool = False,
) -> Any:
    """Run preprocess, forward and postprocess of an implementation on one device.

    Args:
        selected: What runs.
        tensors: Query, key and value, and the gate if there is one.
        metadata: The step's metadata.
        extras: Keyword arguments of `forward`.
        replicated: Replicated query, key and value, joined after the first hook; query may be `None`.
        in_front: Join them before the sequence instead of behind it; with a query only.

    Returns:
        What `forward` returns; with `replicated`, the pair of sequence part and replicated part, `None` without its query.
    """
    like, has_hooks = tensors[0], selected.has_preprocess or selected.has_postprocess
    if selected.has_preprocess:
        tensors = _preprocess(selected.impl, tensors, metadata)
    query, key, value, *gate = tensors
    if gate:
        extras = {**extras, "gate_compress": gate[0]}
    if replicated is None:
        if not has_hooks:
            return selected.forward(query, key, value, metadata, extras)
        # The buffer takes tokens in the caller's order, so it is filled after the hook.
        buffer = extras.pop("out", None)
        result = selected.forward(query, key, value, metadata, extras)
        output, *lse = result if isinstance(result, tuple) else (result,)
        output = selected.postprocess(output, metadata, like)
        output = output if buffer is None else buffer.copy_(output)
        if not lse:
            return output
        return output, selected.impl.postprocess_output(lse[0].unsqueeze(-1), metadata).squeeze(-1)
    length, count = query.shape[1], replicated[1].shape[1]
    if "num_replicated" in selected.keywords and not in_front:
        extras = {**extras, "num_replicated": count}
    query, key, value = (
        own if more is None else torch.cat([more, own] if in_front else [own, more], dim=1)
        for own, more in zip((query, key, value), replicated, strict=True)
    )
    output = selected.forward(query, key, value, metadata, extras)
    sequence, rest = (output[:, count:], output[:, :count]) if in_front else (output[:, :length], output[:, length:])
    rest = None if replicated[0] is None else rest
    if has_hooks:
        sequence = selected.postprocess(sequence, metadata, like)
    return sequence, rest


def _preprocess(impl: Any, tensors: tuple[torch.Tensor, ...], metadata: AttentionMetadata | None) -> tuple[torch.Tensor, ...]:
    if all(tensor.shape == tensors[0].shape for tensor in tensors):
        stacked = impl.preprocess_qkv(torch.cat(tensors, dim=0), metadata)
        return tuple(stacked.chunk(len(tensors), dim=0))
    return tuple(impl.preprocess_qkv(tensor, metadata) for tensor in tensors)


_DISPATCHER = Dispatcher()
