"""What a run starts from, and what its result is written as: a folder of Wan weights, or of a model like the bundled one.

The channels that a model's input has beyond those of its output are its conditions. The bundled kind of model has three, the
coordinates of each pixel, which a run appends itself; those of any other model stand in the shards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastvideo.models.sprites.pipeline import SpriteVideoModel, bundled_model, is_sprite_config
from fastvideo.models.wan import WanConfig, WanTransformer3DModel
from fastvideo.models.wan.checkpoint import CONFIG_NAME, SPARSITY_NOTE, read_config, write_folder
from fastvideo.models.wan.config import AttentionKind
from fastvideo.training.finetune.config import FinetuneConfig

__all__ = ["BUNDLED", "Origin", "model_folder"]

BUNDLED = "bundled"
"""Stands for the folder of the bundled model."""

TRANSFORMER = "transformer"
"""Where diffusers' pipelines keep the model."""


def model_folder(folder: str | Path) -> Path:
    """Return the folder that is meant: `"bundled"`, where no folder has that name, is the bundled model's.

    Example:
        >>> model_folder("runs/vsa/model").as_posix()
        'runs/vsa/model'
    """
    place = Path(folder)
    return bundled_model() if str(folder) == BUNDLED and not place.exists() else place


@dataclass(frozen=True)
class Origin:
    """The folder that a run starts from.

    Attributes:
        folder: As `WanTransformer3DModel.load` or `SpriteVideoModel.load` reads it.
        config: Sizes of its transformer.
        is_sprites: Whether it is of the bundled kind: with a text encoder, which stays as it is, and with coordinates.

    Example:
        >>> Origin.open("bundled").config.in_channels
        6
    """

    folder: Path
    config: WanConfig
    is_sprites: bool

    @classmethod
    def open(cls, folder: str | Path) -> Origin:
        """Read the configuration of `model_folder(folder)`.

        Raises:
            FileNotFoundError: The folder has none.
            ValueError: It is no JSON object, or not one of a model.
        """
        place = model_folder(folder)
        if not (place / CONFIG_NAME).exists() and (place / TRANSFORMER / CONFIG_NAME).is_file():
            raise FileNotFoundError(f"{place} is a whole pipeline; give the model in it, {place / TRANSFORMER}")
        values = read_config(place)
        is_sprites = is_sprite_config(values)
        return cls(place, WanConfig.from_dict(values["transformer"] if is_sprites else values), is_sprites)

    def load(self, attention: AttentionKind) -> WanTransformer3DModel:
        """Load the transformer in float32, with another kind of attention where that is asked for.

        Raises:
            FileNotFoundError: Weights are missing.
            ValueError: A file is broken, or gates would be dropped.
        """
        if self.is_sprites:
            return SpriteVideoModel.load(self.folder, attention=attention, dtype=torch.float32).transformer
        return WanTransformer3DModel.load(self.folder, attention=attention, dtype=torch.float32)

    def stored_dtype(self, settings: FinetuneConfig) -> torch.dtype:
        """Dtype of a result's weights: float32, or the 16 bits that checkpoints of this kind have."""
        if settings.precision == "float32":
            return torch.float32
        return torch.float16 if self.is_sprites else torch.bfloat16

    def save(self, folder: Path, config: WanConfig, weights: Mapping[str, Tensor], settings: FinetuneConfig) -> None:
        """Write a result that loads as this folder does.

        Args:
            folder: Where; made where it is missing.
            config: Of the transformer as it has become.
            weights: By name, on the CPU, in the dtype that they are stored in.
            settings: Of the run.
        """
        sparsity = settings.sparsity if config.attention == "vsa" else 0.0
        if not self.is_sprites:
            notes = {SPARSITY_NOTE: sparsity} if config.attention == "vsa" else {}
            write_folder(folder, {**config.to_dict(), **notes}, weights)
            return
        model = SpriteVideoModel.load(self.folder)
        model.transformer = WanTransformer3DModel.from_weights(config.to_dict(), weights)
        model.sampling = dataclasses.replace(model.sampling, sparsity=sparsity)
        model.notes = {**model.notes, "finetuning": settings.to_dict()}
        model.save(folder, self.stored_dtype(settings))
