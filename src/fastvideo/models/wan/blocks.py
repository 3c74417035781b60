"""The transformer block of Wan 2.1: modulated self attention, cross attention to text, feed-forward.

Shape legend: `B` batch, `S` video tokens (of this rank), `L` text tokens, `H` heads, `D` head size, `C = H * D`.
Norms, modulation and residual sums are computed in at least float32 and rounded to the dtype of the token stream.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvideo.attention.layer import DistributedAttention, DistributedAttention_VSA, LocalAttention
from fastvideo.models.wan.config import WanConfig
from fastvideo.models.wan.embeddings import RotaryTables
from fastvideo.platforms import AttentionBackendEnum

DENSE_BACKENDS = (AttentionBackendEnum.FLASH_ATTN, AttentionBackendEnum.TORCH_SDPA)
"""What attention to text may run: a scope that asks for a sparse backend means self attention."""


def widen(x: Tensor) -> Tensor:
    """Return `x` in at least float32.

    Example:
        >>> widen(torch.zeros(1, dtype=torch.bfloat16)).dtype, widen(torch.zeros(1, dtype=torch.float64)).dtype
        (torch.float32, torch.float64)
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


class WideLayerNorm(nn.LayerNorm):
    """Layer norm over the last dim that computes and returns at least float32."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `[..., C]`."""
        x = widen(input)
        weight = None if self.weight is None else self.weight.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        normed: Tensor = F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
        return normed


def modulate(norm: WideLayerNorm, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Adaptive layer norm: `norm(x) * (1 + scale) + shift`, rounded to the dtype of `x`.

    Args:
        norm: Layer norm without weights.
        x: `[B, S, C]`.
        scale: `[B, 1, C]`, at least float32.
        shift: `[B, 1, C]`, at least float32.

    Example:
        >>> x = torch.tensor([[[-1.0, 1.0]]])
        >>> modulate(WideLayerNorm(2, eps=0.0, elementwise_affine=False), x, torch.ones(1, 1, 2), torch.ones(1, 1, 2))
        tensor([[[-1.,  3.]]])
    """
    modulated: Tensor = norm(x) * (1 + scale) + shift
    return modulated.to(x.dtype)


class _Projections(nn.Module):
    """Query, key, value and output projections with QK RMS norm over all heads of a token."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim = config.inner_dim
        self.num_heads = config.num_attention_heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        # A list of one, because checkpoints name it `to_out.0`.
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q = nn.RMSNorm(dim, eps=config.eps)
        self.norm_k = nn.RMSNorm(dim, eps=config.eps)

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return query `[B, S, H, D]`, key and value `[B, S_context, H, D]` in one dtype."""
        heads = (self.num_heads, -1)
        value: Tensor = self.to_v(context)
        # The norms' weights are wider than the products under autocast.
        wide = self.norm_q.weight.dtype
        query = self.norm_q(self.to_q(x).to(wide)).to(value.dtype)
        key = self.norm_k(self.to_k(context).to(wide)).to(value.dtype)
        return query.unflatten(-1, heads), key.unflatten(-1, heads), value.view(*value.shape[:2], *heads)

    def project_out(self, out: Tensor) -> Tensor:
        """Map attention output `[B, S, H, D]` to `[B, S, C]`."""
        projected: Tensor = self.to_out[0](out.flatten(2))
        return projected


class WanSelfAttention(_Projections):
    """Self attention with 3D rotary positions over the tokens of all ranks, dense or Video Sparse Attention.

    Args:
        config: The model's configuration.
        prefix: The layer's name within the model.
    """

    def __init__(self, config: WanConfig, prefix: str) -> None:
        super().__init__(config)
        layer_cls = DistributedAttention_VSA if config.attention == "vsa" else DistributedAttention
        self.attention = layer_cls(config.num_attention_heads, config.attention_head_dim, prefix=prefix)

    def forward(self, x: Tensor, rotary: RotaryTables, gate: Tensor | None = None) -> Tensor:
        """Attend within the video.

        Args:
            x: `[B, S, C]`.
            rotary: Cosines and sines for these tokens, each `[S, D / 2]`.
            gate: `[B, S, C]`, the gate of the coarse part of Video Sparse Attention, or None without one.

        Returns:
            `[B, S, C]`.
        """
        query, key, value = self.project(x, x)
        if gate is None:
            out, _ = self.attention(query, key, value, freqs_cis=rotary)
        else:
            gate = gate.to(value.dtype).view(value.shape)
            out, _ = self.attention(query, key, value, gate_compress=gate, freqs_cis=rotary)
        return self.project_out(out)


class WanCrossAttention(_Projections):
    """Cross attention from video tokens to text tokens, which every rank holds in full.

    Args:
        config: The model's configuration.
        prefix: The layer's name within the model.
    """

    def __init__(self, config: WanConfig, prefix: str) -> None:
        super().__init__(config)
        self.attention = LocalAttention(
            config.num_attention_heads,
            config.attention_head_dim,
            supported_attention_backends=DENSE_BACKENDS,
            prefix=prefix,
        )

    def forward(self, x: Tensor, text: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """Attend to the text.

        Args:
            x: `[B, S, C]`.
            text: `[B, L, C]`.
            text_mask: Key padding `[B, L]`, bool, True = attend; None attends to all.

        Returns:
            `[B, S, C]`.
        """
        query, key, value = self.project(x, text)
        return self.project_out(self.attention(query, key, value, attn_mask=text_mask))


class _GeluLinear(nn.Module):
    """A linear layer named `proj` followed by the tanh form of GELU."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """Linear, GELU, linear.

    Args:
        dim: Channels in and out.
        hidden_dim: Channels between.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        # The middle place keeps the checkpoints' name `net.2` for the second linear.
        self.net = nn.Sequential(_GeluLinear(dim, hidden_dim), nn.Identity(), nn.Linear(hidden_dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., dim]` to `[..., dim]`."""
        out: Tensor = self.net(x)
        return out


class WanTransformerBlock(nn.Module):
    """One block: self attention and feed-forward modulated by the timestep, cross attention between them.

    Args:
        config: The model's configuration.
        index: The block's place in the model, for the layer's name.
    """

    def __init__(self, config: WanConfig, index: int = 0) -> None:
        super().__init__()
        dim, eps = config.inner_dim, config.eps
        self.norm1 = WideLayerNorm(dim, eps, elementwise_affine=False)
        self.attn1 = WanSelfAttention(config, prefix=f"blocks.{index}.attn1")
        self.to_gate_compress = nn.Linear(dim, dim) if config.has_gate else None
        self.norm2 = WideLayerNorm(dim, eps) if config.cross_attn_norm else nn.Identity()
        self.attn2 = WanCrossAttention(config, prefix=f"blocks.{index}.attn2")
        self.norm3 = WideLayerNorm(dim, eps, elementwise_affine=False)
        self.ffn = FeedForward(dim, config.ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self, x: Tensor, text: Tensor, modulation: Tensor, rotary: RotaryTables, text_mask: Tensor | None = None
    ) -> Tensor:
        """Run the block.

        Args:
            x: `[B, S, C]`.
            text: `[B, L, C]`.
            modulation: `[B, 6, C]`: shift, scale and gate of self attention, then of the feed-forward layers.
            rotary: Cosines and sines for these tokens, each `[S, D / 2]`.
            text_mask: Key padding `[B, L]`, bool, or None.

        Returns:
            `[B, S, C]` in the dtype of `x`.
        """
        table = widen(self.scale_shift_table) + widen(modulation)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = table.chunk(6, dim=1)

        normed = modulate(self.norm1, x, scale, shift)
        gate_compress = None if self.to_gate_compress is None else self.to_gate_compress(normed)
        x = (widen(x) + self.attn1(normed, rotary, gate_compress) * gate).to(x.dtype)

        x = x + self.attn2(self.norm2(x).to(x.dtype), text, text_mask)

        hidden = self.ffn(modulate(self.norm3, x, ffn_scale, ffn_shift))
        out: Tensor = (widen(x) + hidden * ffn_gate).to(x.dtype)
        return out
