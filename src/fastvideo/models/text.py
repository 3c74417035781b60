"""A small learned text encoder: token and slot embeddings, then transformer layers over the few tokens of a prompt.

It is trained together with the video model. Empty slots have an embedding of their own ("there is no second sprite" is
information), so every token is attended to and no padding mask is needed, here or in cross attention. The null prompt of
classifier-free guidance (arXiv 2207.12598) is a token like any other.

Shape legend: `B` batch, `L` tokens, `C` channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastvideo.attention.layer import LocalAttention
from fastvideo.platforms import AttentionBackendEnum


@dataclass(frozen=True)
class WordEncoderConfig:
    """Sizes of a `WordEncoder`.

    Attributes:
        vocab_size: Number of token ids.
        max_tokens: Number of slots.
        dim: Channels of the embeddings, the video model's `text_dim`.
        num_heads: Attention heads; divides `dim`.
        num_layers: Transformer layers; 0 leaves the sum of both embeddings.

    Raises:
        ValueError: A size is out of range.

    Example:
        >>> WordEncoderConfig.from_dict({"vocab_size": 9, "max_tokens": 7}).dim
        128
    """

    vocab_size: int
    max_tokens: int
    dim: int = 128
    num_heads: int = 2
    num_layers: int = 1

    def __post_init__(self) -> None:
        for name in ("vocab_size", "max_tokens", "dim", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.num_layers < 0:
            raise ValueError(f"num_layers must be at least 0, got {self.num_layers}.")
        if self.dim % self.num_heads:
            raise ValueError(f"num_heads must divide dim, got {self.num_heads} and {self.dim}.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> WordEncoderConfig:
        """Build a configuration from its `to_dict()`.

        Raises:
            ValueError: A name is no field of this configuration.
        """
        unknown = sorted(values.keys() - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"WordEncoderConfig has no fields {unknown}.")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, ready for JSON."""
        return dataclasses.asdict(self)


class _EncoderLayer(nn.Module):
    """Self attention and feed-forward, each after a norm, each added to its input."""

    def __init__(self, config: WordEncoderConfig, prefix: str) -> None:
        super().__init__()
        dim = config.dim
        self.num_heads = config.num_heads
        self.norm1 = nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.to_out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.widen = nn.Linear(dim, 4 * dim)
        self.narrow = nn.Linear(4 * dim, dim)
        self.attention = LocalAttention(
            config.num_heads,
            dim // config.num_heads,
            supported_attention_backends=(AttentionBackendEnum.FLASH_ATTN, AttentionBackendEnum.TORCH_SDPA),
            prefix=prefix,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, L, C]` to `[B, L, C]`."""
        query, key, value = (part.unflatten(-1, (self.num_heads, -1)) for part in self.to_qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.to_out(self.attention(query, key, value).flatten(2))
        out: Tensor = x + self.narrow(F.gelu(self.widen(self.norm2(x)), approximate="tanh"))
        return out


class WordEncoder(nn.Module):
    """Embeds the tokens of prompts.

    Args:
        config: Sizes.

    Example:
        >>> import torch
        >>> encoder = WordEncoder(WordEncoderConfig(vocab_size=9, max_tokens=7, dim=16))
        >>> tuple(encoder(torch.zeros(2, 7, dtype=torch.int64)).shape)
        (2, 7, 16)
    """

    def __init__(self, config: WordEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.dim)
        self.slot_embedding = nn.Embedding(config.max_tokens, config.dim)
        self.layers = nn.ModuleList(_EncoderLayer(config, f"layers.{index}") for index in range(config.num_layers))
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Embed prompts.

        Args:
            token_ids: `[B, max_tokens]`, int64, in `[0, vocab_size)`.

        Returns:
            `[B, max_tokens, C]` in the dtype of the weights, of about unit variance.

        Raises:
            ValueError: The shape or dtype of `token_ids` doesn't fit.
        """
        expected = self.config.max_tokens
        if token_ids.ndim != 2 or token_ids.shape[1] != expected or token_ids.is_floating_point():
            raise ValueError(f"token_ids must be integers [B, {expected}], got {tuple(token_ids.shape)} of {token_ids.dtype}.")
        x = self.token_embedding(token_ids) + self.slot_embedding.weight
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.norm(x)
        return out
