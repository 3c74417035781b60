"""The calls into the flash-attention packages, with one signature, traceable by `torch.compile(fullgraph=True)`.

Each `run_*` takes `(query, key, value, lengths, scale, is_causal, dropout_p, needs_lse)` and returns the output in
query's shape and the log-sum-exp, `[B, H, S_q]`, or `[H, B * S_q]` where samples are packed. FlashAttention-4 and the
forward-only FlashAttention-3 run inside a custom op of ours; the other two register their own.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from fastvideo.tangents import refuse_tangents

__all__ = ["NOT_PACKED", "Lengths", "run_fa2", "run_fa3", "run_fa3_forward", "run_fa4"]

Lengths = tuple[torch.Tensor | None, torch.Tensor | None, int, int]
"""First query and first key of each packed sample, int32 `[B + 1]`, and the largest number of each in a sample."""

NOT_PACKED: Lengths = (None, None, 0, 0)


@torch.library.custom_op("fastvideo::flash_attention", mutates_args=())
def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_query_lens: torch.Tensor | None,
    cu_key_lens: torch.Tensor | None,
    query_len: int,
    key_len: int,
    scale: float,
    is_causal: bool,
    package: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a package whose public function can't be traced, on `[B, S, H, D]` or packed `[B * S, H, D]`.

    Returns the output and the log-sum-exp, `[B, H, S]` or `[H, B * S]` in float32.
    """
    lengths = _length_arguments((cu_query_lens, cu_key_lens, query_len, key_len))
    if package == "fa3-fwd":
        import fa3_fwd_interface

        output, lse = _call_fa3(fa3_fwd_interface, query, key, value, lengths, scale, is_causal)
        return output, lse
    from flash_attn.cute import interface

    output, lse = interface._flash_attn_fwd(
        query, key, value, softmax_scale=scale, causal=is_causal, return_lse=True, **lengths
    )[:2]
    return output, lse


@_flash.register_fake
def _(query: torch.Tensor, *_others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *batch, num_tokens, num_heads, _head_size = query.shape
    return query.new_empty(query.shape), query.new_empty((*batch, num_heads, num_tokens), dtype=torch.float32)


@torch.library.custom_op("fastvideo::flash_attention_backward", mutates_args=())
def _flash_backward(
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    cu_query_lens: torch.Tensor | None,
    cu_key_lens: torch.Tensor | None,
    query_len: int,
    key_len: int,
    scale: float,
    is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return FlashAttention-4's gradients of query, key and value."""
    from flash_attn.cute import interface

    grads = interface._flash_attn_bwd(
        query,
        key,
        value,
        output,
        grad_output.contiguous(),
        lse,
        softmax_scale=scale,
        causal=is_causal,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        dlse=grad_lse,
        **_length_arguments((cu_query_lens, cu_key_lens, query_len, key_len)),
    )
    return grads[0].contiguous(), grads[1].contiguous(), grads[2].contiguous()


@_flash_backward.register_fake
def _(
    _grad_output: torch.Tensor,
    _grad_lse: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *_others: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, cu_query_lens, cu_key_lens, *ctx.numbers, _package = inputs
    ctx.save_for_backward(query, key, value, *output, cu_query_lens, cu_key_lens)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_output: torch.Tensor | None, grad_lse: torch.Tensor | None) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(tensors[3])
    return (*_flash_backward(grad_output, grad_lse, *tensors, *ctx.numbers), *[None] * 7)


_flash.register_autograd(_differentiate, setup_context=_save)


def _length_arguments(lengths: Lengths) -> dict[str, Any]:
    """Return the lengths by the names that all generations share; nothing where samples aren't packed."""
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    return {} if lengths[0] is None else dict(zip(names, lengths, strict=True))


def _call_fa3(
    interface: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: dict[str, Any],
    scale: float,
    is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    function = interface.flash_attn_varlen_func if lengths else interface.flash_attn_func
    output, lse = function(query, key, value, softmax_scale=scale, causal=is_causal, return_attn_probs=True, **lengths)
    return output, lse


def _run_op(
    package: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Lengths,
    scale: float,
    is_causal: bool,
    *_unused: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    refuse_tangents(query=query, key=key, value=value)
    output, lse = _flash(query, key, value, *lengths, scale, is_causal, package)
    return output, lse


def run_fa3(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Lengths,
    scale: float,
    is_causal: bool,
    *_unused: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    import flash_attn_interface

    return _call_fa3(flash_attn_interface, query, key, value, _length_arguments(lengths), scale, is_causal)


def run_fa2(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Lengths,
    scale: float,
    is_causal: bool,
    dropout_p: float,
    needs_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    import flash_attn

    function = flash_attn.flash_attn_func if lengths[0] is None else flash_attn.flash_attn_varlen_func
    result = function(
        query,
        key,
        value,
        dropout_p=dropout_p,
        softmax_scale=scale,
        causal=is_causal,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        return_attn_probs=needs_lse,
        **_length_arguments(lengths),
    )
    return (result[0], result[1]) if needs_lse else (result, None)


run_fa4 = functools.partial(_run_op, "flash-attn-4")
run_fa3_forward = functools.partial(_run_op, "fa3-fwd")
