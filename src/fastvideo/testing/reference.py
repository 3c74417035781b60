"""Dense attention written out in plain torch: the specification that backends are tested against.

Tensors are `[batch, seq, heads, head_size]`. The arithmetic runs in the dtype of the inputs (float64 for a reference, a
16-bit dtype for the error that this dtype has anyway), with the softmax in float32 at least. It is differentiable in
every floating point input, an additive mask included, and holds all scores in memory.
"""

from __future__ import annotations

from typing import Literal, overload

import torch

__all__ = ["reference_attention"]


@overload
def reference_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    attn_mask: torch.Tensor | None = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
) -> torch.Tensor: ...


@overload
def reference_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    attn_mask: torch.Tensor | None = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...


def reference_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Return `softmax(scale * query @ key^T + mask) @ value`, head by head.

    A row with nothing to attend to gives output 0, log-sum-exp -inf and gradients 0.

    Args:
        query: `[B, S_q, H, D]`.
        key: `[B, S_kv, H_kv, D]`; `H_kv` divides `H` (query head `h` reads key head `h * H_kv // H`).
        value: `[B, S_kv, H_kv, D_v]`.
        attn_mask: Bool `[B, S_kv]` (key padding, True attends), bool `[B|1, H|1, S_q, S_kv]`, or floating point of that
            4-D shape, added to the scores.
        is_causal: Each query sees only keys up to its own position; needs `S_q == S_kv`.
        scale: Factor of the scores, by default `D ** -0.5`.
        return_lse: Return the natural log-sum-exp of the scores too.

    Returns:
        `[B, S_q, H, D_v]` in the dtype of `query`, and with `return_lse` also `[B, S_q, H]` in float32 (float64 for
        float64 inputs).

    Raises:
        ValueError: Causal with unequal lengths, or a mask that is neither 2-D nor 4-D.

    Example:
        >>> query, key = torch.zeros(1, 2, 1, 4), torch.zeros(1, 3, 1, 4)
        >>> value = torch.tensor([1.0, 2.0, 6.0]).view(1, 3, 1, 1)
        >>> reference_attention(query, key, value).flatten().tolist()
        [3.0, 3.0]
    """
    num_groups = query.shape[2] // key.shape[2]
    q_bhsd = query.transpose(1, 2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    k_bhsd = key.transpose(1, 2).repeat_interleave(num_groups, dim=1)
    v_bhsd = value.transpose(1, 2).repeat_interleave(num_groups, dim=1)
    scores = q_bhsd @ k_bhsd.mT
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = _masked(scores, attn_mask, is_causal=is_causal)

    row_max = scores.detach().amax(-1, keepdim=True)
    is_empty = row_max == -torch.inf
    shift = row_max.masked_fill(is_empty, 0.0)
    weights = (scores - shift).exp()
    # An empty row sums to 0; dividing by 1 there keeps its output and its gradients at 0.
    total = weights.sum(-1, keepdim=True).masked_fill(is_empty, 1.0)
    output = ((weights / total).to(value.dtype) @ v_bhsd).transpose(1, 2)
    if not return_lse:
        return output
    lse = (shift + total.log()).masked_fill(is_empty, -torch.inf)
    return output, lse.squeeze(-1).transpose(1, 2)


def _masked(scores: torch.Tensor, attn_mask: torch.Tensor | None, *, is_causal: bool) -> torch.Tensor:
    """Return `scores`, `[B, H, S_q, S_kv]`, with -inf where nothing is attended and an additive mask added."""
    query_len, key_len = scores.shape[-2:]
    if attn_mask is not None:
        if attn_mask.dim() not in (2, 4):
            raise ValueError(
                f"expected a mask [B, S_kv] or [B|1, H|1, S_q, S_kv], got {tuple(attn_mask.shape)}; add missing dims"
            )
        mask = attn_mask[:, None, None, :] if attn_mask.dim() == 2 else attn_mask
        is_bool = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -torch.inf) if is_bool else scores + mask.to(scores.dtype)
    if is_causal:
        if query_len != key_len:
            raise ValueError(f"causal needs equal lengths, got {query_len} queries and {key_len} keys; pass a mask")
        is_later = torch.ones(query_len, key_len, dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(is_later, -torch.inf)
    return scores
