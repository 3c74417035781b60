"""The bundled text-to-video model as one object: transformer, text encoder and the settings it samples best with.

A folder holds `config.json` and `model.safetensors`; text encoder weights carry the prefix `text_encoder.`. Clips are
`[B, 3, T, Y, X]` in [-1, 1], made in pixel space.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvideo.forward_context import set_forward_context
from fastvideo.models.flow import Solver, draw_noise, sample_flow
from fastvideo.models.sprites.prompts import ScenePrompt, tokenize
from fastvideo.models.text import WordEncoder, WordEncoderConfig
from fastvideo.models.wan import WanTransformer3DModel
from fastvideo.models.wan.checkpoint import read_json
from fastvideo.models.wan.config import AttentionKind

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
_TEXT_PREFIX = "text_encoder."
_FORMAT = "fastvideo-sprites-1"

NUM_COORDINATES = 3
"""Channels that `with_coordinates` appends: frame, row and column."""


def bundled_model() -> Path:
    """Return the folder of the model that comes with this package."""
    return Path(str(resources.files("fastvideo.models.sprites") / "bundled"))


def is_sprite_config(values: Mapping[str, Any]) -> bool:
    """Whether this is the content of the `config.json` of a folder that `SpriteVideoModel.load` reads."""
    return values.get("format") == _FORMAT


def with_coordinates(video: Tensor) -> Tensor:
    """Append each pixel's frame, row and column, from -1 to 1, as channels.

    Rotary positions are relative: without these, a model learns only late which of two opposite directions is which.

    Args:
        video: `[B, C, T, Y, X]`.

    Returns:
        `[B, C + 3, T, Y, X]`.

    Example:
        >>> with_coordinates(torch.zeros(1, 1, 3, 1, 1))[0, 1].flatten().tolist()
        [-1.0, 0.0, 1.0]
    """
    lines = [torch.linspace(-1, 1, length, device=video.device, dtype=video.dtype) for length in video.shape[2:]]
    coordinates = torch.stack(torch.meshgrid(*lines, indexing="ij"))
    return torch.cat([video, coordinates.expand(len(video), -1, -1, -1, -1)], dim=1)


@dataclass(frozen=True)
class SamplingSettings:
    """How to sample from a model.

    Attributes:
        num_steps: Steps from noise to data.
        guidance_scale: Classifier-free guidance; 1 turns it off.
        shift: Shift of the noise schedule towards high noise.
        solver: See `fastvideo.models.flow.sample_flow`.
        sparsity: Share of key tiles that a query tile skips, in [0, 1); 0 for a dense model.
    """

    num_steps: int = 16
    guidance_scale: float = 2.0
    shift: float = 6.0
    solver: Solver = "ab2"
    sparsity: float = 0.0


@dataclass
class SpriteVideoModel:
    """A text-to-video model of the sprite world.

    Attributes:
        transformer: Predicts velocities.
        text_encoder: Embeds the tokens of `prompts.tokenize`.
        video_tyx: (frames, rows, columns) of its clips.
        sampling: Settings to sample with.
        notes: Facts about the training, kept in `config.json`.
    """

    transformer: WanTransformer3DModel
    text_encoder: WordEncoder
    video_tyx: tuple[int, int, int] = (16, 64, 64)
    sampling: SamplingSettings = SamplingSettings()
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)

    def embed(self, prompts: Sequence[str | ScenePrompt | None]) -> Tensor:
        """Embed prompts, `[B, L, text_dim]` in the dtype of the transformer; None is the null prompt.

        Raises:
            ValueError: A word outside the vocabulary (the message lists the words), or a sentence outside the grammar.
        """
        weight = self.transformer.patch_embedding.weight
        return self.text_encoder(tokenize(prompts, weight.device)).to(weight.dtype)  # type: ignore[no-any-return]

    def velocity(self, x: Tensor, timestep: Tensor, /, **conditioning: Tensor) -> Tensor:
        """Predict the velocity of noisy clips `[B, 3, T, Y, X]`; `flow.sample_flow` calls it."""
        predicted: Tensor = self.transformer(with_coordinates(x), timestep, **conditioning)
        return predicted

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str | ScenePrompt],
        seeds: Sequence[int],
        *,
        settings: SamplingSettings | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Make one clip per prompt, each from its own seed, whatever the batch.

        Args:
            prompts: B prompts.
            seeds: B seeds; the noise is the same on every device.
            settings: Replaces the model's own.
            on_step: Called with the number of finished steps after each.

        Returns:
            `[B, 3, T, Y, X]`, float32, in [-1, 1].

        Raises:
            ValueError: Numbers of prompts and seeds differ, a prompt is outside the grammar, or a setting is out of
                range.
        """
        if len(prompts) != len(seeds) or not prompts:
            raise ValueError(f"expected as many prompts as seeds, at least one, got {len(prompts)} and {len(seeds)}")
        chosen = self.sampling if settings is None else settings
        weight = self.transformer.patch_embedding.weight
        shape = (1, 3, *self.video_tyx)
        noise = torch.cat([draw_noise(shape, seed, device=weight.device, dtype=weight.dtype) for seed in seeds])
        metadata = self.transformer.attention_metadata(self.video_tyx, 0, chosen.sparsity, weight.device)
        clip = sample_flow(
            self.velocity,
            noise,
            chosen.num_steps,
            conditioning={"encoder_hidden_states": self.embed(prompts)},
            negative={"encoder_hidden_states": self.embed([None] * len(prompts))},
            guidance_scale=chosen.guidance_scale,
            shift=chosen.shift,
            solver=chosen.solver,
            step_context=lambda index: set_forward_context(index, metadata),
            on_step=on_step,
        )
        return clip.float().clamp(-1, 1)

    def save(self, directory: str | Path, dtype: torch.dtype = torch.float16) -> None:
        """Write the folder that `load` reads, with every weight stored as `dtype`.

        Raises:
            ImportError: safetensors is missing.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "format": _FORMAT,
            "transformer": self.transformer.config.to_dict(),
            "text_encoder": self.text_encoder.config.to_dict(),
            "video_tyx": list(self.video_tyx),
            "sampling": dataclasses.asdict(self.sampling),
            "notes": self.notes,
        }
        weights = dict(self.transformer.state_dict())
        weights.update({_TEXT_PREFIX + name: weight for name, weight in self.text_encoder.state_dict().items()})
        stored = {name: weight.detach().to("cpu", dtype).contiguous() for name, weight in weights.items()}
        _safetensors().save_file(stored, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(
        cls,
        directory: str | Path,
        *,
        attention: AttentionKind | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> SpriteVideoModel:
        """Read a folder written by `save`.

        Args:
            directory: Holds `config.json` and `model.safetensors`.
            attention: Overrides the stored kind, as for `WanTransformer3DModel.load`.
            device: Where the model runs.
            dtype: Dtype of the transformer, whose timestep embedder and norms stay in float32, as does the text encoder.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: The folder holds another kind of model, or gates would be dropped.
            RuntimeError: Weights are missing, unknown or of another shape than the configuration says.
        """
        folder = Path(directory)
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name} is missing: give a folder that `fastvideo train` wrote")
        config = read_json(folder / CONFIG_NAME)
        if not is_sprite_config(config):
            raise ValueError(f"expected {_FORMAT!r} as the format of {folder / CONFIG_NAME}, got {config.get('format')!r}")
        weights = _safetensors().load_file(folder / WEIGHTS_NAME, device=str(device))
        text = {name.removeprefix(_TEXT_PREFIX): w for name, w in weights.items() if name.startswith(_TEXT_PREFIX)}
        video = {name: weight for name, weight in weights.items() if not name.startswith(_TEXT_PREFIX)}
        transformer = WanTransformer3DModel.from_weights(
            config["transformer"], video, attention=attention, dtype=dtype, source=str(folder)
        )
        with torch.device("meta"):
            encoder = WordEncoder(WordEncoderConfig.from_dict(config["text_encoder"]))
        wide = torch.promote_types(dtype, torch.float32)
        encoder.load_state_dict({name: weight.to(wide) for name, weight in text.items()}, strict=True, assign=True)
        return cls(
            transformer.eval(),
            encoder.eval(),
            tuple(config["video_tyx"]),
            SamplingSettings(**config["sampling"]),
            config["notes"],
        )


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("reading and writing weights needs safetensors: pip install 'fastvideo-attention[models]'") from error
    return safetensors.torch
