"""The configuration of a Wan video transformer: a frozen dataclass that refuses what the model lacks."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

AttentionKind = Literal["dense", "vsa"]

_POSITIVE_FIELDS = (
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "out_channels",
    "text_dim",
    "freq_dim",
    "ffn_dim",
    "num_layers",
    "rope_max_seq_len",
)
_IMAGE_FIELDS = ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len")


@dataclass(frozen=True)
class WanConfig:
    """Sizes and switches of a Wan 2.1 transformer; the defaults are those of Wan 2.1 T2V 14B.

    Field names and meanings are those of a diffusers `config.json`; the last two fields are ours.

    Attributes:
        patch_size: Patch edge in frames, rows and columns, (t, y, x).
        num_attention_heads: Heads of self and cross attention.
        attention_head_dim: Channels per head, an even number of at least 6 (each video axis rotates its own share).
        in_channels: Channels of the noisy latent (or of the pixels).
        out_channels: Channels of the predicted velocity; None means `in_channels`.
        text_dim: Channels of the text embeddings.
        freq_dim: Channels of the sinusoidal timestep embedding, an even number.
        ffn_dim: Hidden channels of the feed-forward layers.
        num_layers: Transformer blocks.
        cross_attn_norm: Whether a layer norm with weights precedes cross attention.
        qk_norm: Only "rms_norm_across_heads" exists: one RMS norm over all heads of a token.
        eps: Added to the variance in every norm.
        image_dim: Image conditioning; must be None.
        added_kv_proj_dim: Image conditioning; must be None.
        rope_max_seq_len: Largest token grid edge along any axis.
        pos_embed_seq_len: Image conditioning; must be None.
        attention: Self attention, "dense" or "vsa" (Video Sparse Attention).
        vsa_gate: Whether a "vsa" model has the gated coarse part of arXiv 2505.13389; ignored when dense.

    Raises:
        ValueError: A size is not positive, or a head can't be split between the three axes.
        NotImplementedError: Image conditioning or another `qk_norm` is asked for.

    Example:
        >>> config = WanConfig(num_attention_heads=2, attention_head_dim=12, num_layers=1)
        >>> config.inner_dim, config.has_gate
        (24, False)
    """

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int | None = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    cross_attn_norm: bool = True
    qk_norm: str = "rms_norm_across_heads"
    eps: float = 1e-6
    image_dim: int | None = None
    added_kv_proj_dim: int | None = None
    rope_max_seq_len: int = 1024
    pos_embed_seq_len: int | None = None
    attention: AttentionKind = "dense"
    vsa_gate: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        if self.out_channels is None:
            object.__setattr__(self, "out_channels", self.in_channels)
        if len(self.patch_size) != 3 or any(edge < 1 for edge in self.patch_size):
            raise ValueError(f"patch_size must be three positive edges (t, y, x), got {self.patch_size}.")
        for name in _POSITIVE_FIELDS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.attention_head_dim % 2 or self.attention_head_dim < 6:
            raise ValueError(
                f"attention_head_dim must be even and at least 6, so that every video axis can rotate channel pairs, "
                f"got {self.attention_head_dim}."
            )
        if self.freq_dim % 2:
            raise ValueError(f"freq_dim must be even (cosines and sines), got {self.freq_dim}.")
        if self.attention not in ("dense", "vsa"):
            raise ValueError(f'attention must be "dense" or "vsa", got {self.attention!r}.')
        if self.qk_norm != "rms_norm_across_heads":
            raise NotImplementedError(f'qk_norm must be "rms_norm_across_heads", got {self.qk_norm!r}.')
        for name in _IMAGE_FIELDS:
            if getattr(self, name) is not None:
                raise NotImplementedError(
                    f"{name}={getattr(self, name)} asks for image conditioning, which this model lacks; "
                    f"use a text-to-video checkpoint, where {name} is None."
                )

    @property
    def inner_dim(self) -> int:
        """Channels of a token: heads times channels per head."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def has_gate(self) -> bool:
        """Whether each block holds a `to_gate_compress` linear."""
        return self.attention == "vsa" and self.vsa_gate

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> WanConfig:
        """Build a configuration from the content of a `config.json`.

        Args:
            values: Field names and values. Names that begin with an underscore (`_class_name`) are notes, not fields.

        Raises:
            ValueError: A name is no field of this configuration.

        Example:
            >>> WanConfig.from_dict({"_class_name": "WanTransformer3DModel", "patch_size": [1, 4, 4]}).patch_size
            (1, 4, 4)
        """
        known = [field.name for field in dataclasses.fields(cls)]
        given = {name: value for name, value in values.items() if not name.startswith("_")}
        for name in given:
            if name not in known:
                close = difflib.get_close_matches(name, known)
                hint = f" Did you mean {' or '.join(close)}?" if close else f" Known fields: {', '.join(known)}."
                raise ValueError(f"{name!r} is no field of WanConfig.{hint}")
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of a `config.json`; a dense model's has diffusers' fields only.

        Example:
            >>> WanConfig.from_dict(WanConfig().to_dict()) == WanConfig()
            True
        """
        values = dataclasses.asdict(self)
        values["patch_size"] = list(self.patch_size)
        if self.attention == "dense":
            del values["attention"], values["vsa_gate"]
        return {"_class_name": "WanTransformer3DModel", **values}
