"""The specification of block-sparse attention: dense, masked, plain torch; any device, any float dtype.

Memory and time are those of dense attention with materialised scores. Accumulates in fp32 (fp64 for fp64 inputs).
A key that no query sees is never read; a key that some queries see must be finite for the others as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvideo.block_sparse.impl import Implementation
from fastvideo.block_sparse.pattern import BlockPattern


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over inputs of `dtype`: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# The arguments are those of every implementation.
def rejections(query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern) -> tuple[str, ...]:  # noqa: ARG001
    """Nothing is refused."""
    return ()


def _heads_first(x: Tensor, num_heads: int) -> Tensor:
    """`[B, S, H, D]` to `[B, num_heads, S, D]` in the accumulation dtype, repeating shared heads."""
    x = x.to(accumulation_dtype(x.dtype)).transpose(1, 2)
    return x.repeat_interleave(num_heads // x.shape[1], dim=1)


def _probabilities(query: Tensor, key: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Masked softmax `[B, H, S_q, S_k]` and log-sum-exp `[B, H, S_q]` of heads-first tensors."""
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~mask, -torch.inf)
    top = scores.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0.0)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0.0, 1.0), (top + total.log()).squeeze(-1)


def _seen(x: Tensor, mask: Tensor) -> Tensor:
    """Zero the rows `[B, H, S_k, D]` that no query sees."""
    return x.masked_fill(~mask.any(dim=2)[..., None], 0.0)


def forward(query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern, scale: float) -> tuple[Tensor, Tensor]:
    """Dense masked attention; see `Implementation.forward`.

    Args:
        query: `[B, S_q, Hq, D]`.
        key: `[B, S_k, Hkv, D]`.
        value: `[B, S_k, Hkv, D]`.
        pattern: Which tiles see which.
        scale: Factor of the scores.

    Returns:
        Output `[B, S_q, Hq, D]` in query's dtype and log-sum-exp `[B, S_q, Hq]`.
    """
    num_heads, mask = query.shape[2], pattern.token_mask()
    q, k, v = (_heads_first(x, num_heads) for x in (query, key, value))
    probabilities, lse = _probabilities(q, _seen(k, mask), mask, scale)
    out = probabilities @ _seen(v, mask)
    return out.transpose(1, 2).to(query.dtype).contiguous(), lse.transpose(1, 2).contiguous()


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,  # noqa: ARG001 (the reference computes it anew)
    pattern: BlockPattern,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward`, written out; see `Implementation.backward`."""
    num_heads, mask = query.shape[2], pattern.token_mask()
    q, k, v, do, o = (_heads_first(x, num_heads) for x in (query, key, value, dout, out))
    k, v = _seen(k, mask), _seen(v, mask)
    delta = (do * o).sum(-1)
    if dlse is not None:
        delta = delta - dlse.transpose(1, 2)
    probabilities, _ = _probabilities(q, k, mask, scale)
    dscores = probabilities * (do @ v.transpose(-1, -2) - delta[..., None]) * scale
    dq, dk, dv = dscores @ k, dscores.transpose(-1, -2) @ q, probabilities.transpose(-1, -2) @ do

    def to_kv(x: Tensor, like: Tensor) -> Tensor:
        grouped = x.reshape(x.shape[0], like.shape[2], -1, *x.shape[2:])
        return grouped.sum(2).transpose(1, 2).to(like.dtype).contiguous()

    return dq.transpose(1, 2).to(query.dtype).contiguous(), to_kv(dk, key), to_kv(dv, value)


IMPLEMENTATION = Implementation(rejections, forward, backward)
