"""The settings of a training run and the schedules that follow from them, all functions of the step alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fastvideo.models.sprites.pipeline import NUM_COORDINATES
from fastvideo.models.sprites.prompts import MAX_TOKENS, VOCABULARY
from fastvideo.models.text import WordEncoderConfig
from fastvideo.models.wan import WanConfig

OptimizerName = Literal["adamw", "muon"]
CompileScope = Literal["none", "blocks", "model"]
Precision = Literal["bfloat16", "float32"]


@dataclass(frozen=True)
class TrainConfig:
    """What a run learns, and how; two runs of one configuration see the same clips, noise and schedules.

    Attributes:
        attention: Self attention, "vsa" (with gate) or "dense".
        dim: Channels of a token, a multiple of `head_size`.
        head_size: Channels per head.
        num_layers: Transformer blocks.
        ffn_dim: Hidden channels of the feed-forward layers; None means four times `dim`.
        text_dim: Channels of the text embeddings.
        num_frames: Frames of a clip.
        frame_size: Rows and columns of a clip, a divisor of 64.
        num_sprites: Restricts scenes to the first sprites, for small trials; None means all.
        two_sprite_share: Share of training scenes with two sprites; of the held-out scenes it is one half in any case, so
            that runs compare.
        max_steps: Length of every schedule.
        batch_size: Clips per step.
        optimizer: "muon" (orthogonalised momentum for the blocks' matrices, AdamW for the rest) or "adamw".
        learning_rate: Peak for AdamW.
        muon_learning_rate: Peak for Muon.
        weight_decay: Decoupled, on matrices.
        warmup_steps: Steps of linear warm-up.
        final_learning_rate: Share of the peak that the cosine ends at.
        max_grad_norm: Gradients are scaled down to this global norm.
        ema_decay: Largest decay of the averaged weights.
        text_dropout: Share of prompts replaced by the null prompt, for guidance.
        noise_shift: Shift of logit-normal noise levels towards high noise.
        uniform_share: Share of noise levels drawn uniformly instead, so that none is rare.
        sparsity_levels: Sparsities of "vsa", raised in equal steps over `sparsity_ramp`.
        sparsity_ramp: Share of the steps at which the last level begins.
        dense_interval: After the first level, every so-many-th step runs at the first level, so that the model keeps
            working there; 0 means never.
        precision: Weights and activations; master weights, averages and norms are float32 in any case.
        compile: What `torch.compile` works on: "blocks" takes each block whole, in graphs that all blocks share;
            "model" takes everything as one graph, anew for each sparsity.
        seed: Of weights, clips and noise.

    Raises:
        ValueError: A setting is out of range.

    Example:
        >>> TrainConfig(max_steps=100, sparsity_ramp=0.75).sparsity_at(99)
        0.75
    """

    attention: Literal["dense", "vsa"] = "vsa"
    dim: int = 256
    head_size: int = 64
    num_layers: int = 6
    ffn_dim: int | None = None
    text_dim: int = 128
    num_frames: int = 16
    frame_size: int = 64
    num_sprites: int | None = None
    two_sprite_share: float = 0.5
    max_steps: int = 7000
    batch_size: int = 32
    optimizer: OptimizerName = "muon"
    learning_rate: float = 2e-3
    muon_learning_rate: float = 1e-2
    weight_decay: float = 0.01
    warmup_steps: int = 150
    final_learning_rate: float = 0.02
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    text_dropout: float = 0.1
    noise_shift: float = 6.0
    uniform_share: float = 0.2
    sparsity_levels: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75)
    sparsity_ramp: float = 0.5
    dense_interval: int = 5
    precision: Precision = "bfloat16"
    compile: CompileScope = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity_levels", tuple(self.sparsity_levels))
        for name in ("dim", "head_size", "num_layers", "num_frames", "max_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("two_sprite_share", "text_dropout", "uniform_share", "sparsity_ramp", "final_learning_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {self.ema_decay}.")
        if not self.sparsity_levels or any(not 0 <= level < 1 for level in self.sparsity_levels):
            raise ValueError(f"sparsity_levels must lie in [0, 1), at least one, got {self.sparsity_levels}.")
        if self.dim % self.head_size:
            raise ValueError(f"head_size must divide dim, got {self.head_size} and {self.dim}.")
        if self.frame_size % 4:
            raise ValueError(f"frame_size must be a multiple of the patch edge 4, got {self.frame_size}.")

    @property
    def video_tyx(self) -> tuple[int, int, int]:
        """(frames, rows, columns) of a clip."""
        return (self.num_frames, self.frame_size, self.frame_size)

    def transformer_config(self) -> WanConfig:
        """Sizes of the video transformer: patches of 1 x 4 x 4 pixels of 3 colours and 3 coordinates."""
        return WanConfig(
            patch_size=(1, 4, 4),
            num_attention_heads=self.dim // self.head_size,
            attention_head_dim=self.head_size,
            in_channels=3 + NUM_COORDINATES,
            out_channels=3,
            text_dim=self.text_dim,
            freq_dim=256,
            ffn_dim=4 * self.dim if self.ffn_dim is None else self.ffn_dim,
            num_layers=self.num_layers,
            attention=self.attention,
        )

    def text_config(self) -> WordEncoderConfig:
        """Sizes of the text encoder."""
        return WordEncoderConfig(len(VOCABULARY), MAX_TOKENS, dim=self.text_dim)

    def learning_rate_at(self, step: int) -> float:
        """Factor of the peak learning rates at a step: linear warm-up, then a cosine to `final_learning_rate`.

        Example:
            >>> config = TrainConfig(max_steps=101, warmup_steps=1, final_learning_rate=0.0)
            >>> [round(config.learning_rate_at(step), 3) for step in (0, 1, 51, 101)]
            [1.0, 1.0, 0.5, 0.0]
        """
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        progress = max(0, step - self.warmup_steps) / max(1, self.max_steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return warm * (self.final_learning_rate + (1 - self.final_learning_rate) * cosine)

    def sparsity_at(self, step: int) -> float:
        """Sparsity of a step; 0 for dense attention.

        Example:
            >>> config = TrainConfig(max_steps=80, sparsity_ramp=0.75, dense_interval=0)
            >>> [config.sparsity_at(step) for step in (0, 19, 20, 40, 60, 79)]
            [0.0, 0.0, 0.25, 0.5, 0.75, 0.75]
        """
        if self.attention == "dense":
            return 0.0
        last = len(self.sparsity_levels) - 1
        ramp = self.sparsity_ramp * self.max_steps
        level = last if step >= ramp else int(step * last / ramp)
        if level > 0 and self.dense_interval > 0 and step % self.dense_interval == 0:
            level = 0
        return self.sparsity_levels[level]

    def ema_decay_at(self, step: int) -> float:
        """Decay of the averaged weights at a step: rises to `ema_decay` so that the first steps are forgotten.

        Example:
            >>> TrainConfig(ema_decay=0.99).ema_decay_at(0), TrainConfig(ema_decay=0.99).ema_decay_at(10_000)
            (0.1, 0.99)
        """
        return min(self.ema_decay, (1 + step) / (10 + step))

    def to_dict(self) -> dict[str, Any]:
        """Return the settings by name, ready for JSON."""
        return {**dataclasses.asdict(self), "sparsity_levels": list(self.sparsity_levels)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Build the configuration from its `to_dict()`; fields that an older one lacks have their defaults.

        Raises:
            ValueError: A name is no field of this configuration, or a setting is out of range.

        Example:
            >>> TrainConfig.from_dict({"attention": "dense"}).two_sprite_share
            0.5
        """
        unknown = sorted(values.keys() - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"TrainConfig has no fields {unknown}; it comes from another version of this package.")
        return cls(**values)
