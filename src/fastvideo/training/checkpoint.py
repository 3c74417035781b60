"""What a run starts from: its own resumable state, one file that is replaced as a whole, or the weights of a finished model."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastvideo.models.sprites.pipeline import WEIGHTS_NAME, SpriteVideoModel, bundled_model
from fastvideo.training.config import TrainConfig
from fastvideo.training.finetune.origin import BUNDLED, model_folder
from fastvideo.training.optim import MasterWeights

CHECKPOINT_NAME = "checkpoint.pt"
# What may differ between a run and its continuation: it doesn't change what is learned.
_FREE_FIELDS = ("compile",)


def load_initial_weights(model: str | Path, config: TrainConfig, module: nn.ModuleDict) -> str:
    """Replace a run's weights by those of a model that `fastvideo train` wrote.

    Args:
        model: Its folder, or "bundled", as `model_folder` reads it.
        config: Settings of the run.
        module: "transformer" and "text_encoder" of the run, in float32.

    Returns:
        Its name, the same on every machine: "bundled", or the folder's name and the first digits of a hash of the weights.

    Raises:
        FileNotFoundError: The folder holds no model.
        ValueError: The model is of another kind, of other sizes, or has another attention.
    """
    folder = model_folder(model)
    found = SpriteVideoModel.load(folder)
    given = {
        **dataclasses.asdict(found.transformer.config),
        **{f"text_encoder.{name}": value for name, value in found.text_encoder.config.to_dict().items()},
        "video_tyx": found.video_tyx,
    }
    wanted = {
        **dataclasses.asdict(config.transformer_config()),
        **{f"text_encoder.{name}": value for name, value in config.text_config().to_dict().items()},
        "video_tyx": config.video_tyx,
    }
    differing = [name for name, value in wanted.items() if given[name] != value]
    if differing:
        listed = ", ".join(f"{name} (it has {given[name]!r}, the run {wanted[name]!r})" for name in differing)
        raise ValueError(f"{folder} holds a model that this run can't start from: {listed}; give the settings of that model")
    module["transformer"].load_state_dict(found.transformer.state_dict(), strict=True)
    module["text_encoder"].load_state_dict(found.text_encoder.state_dict(), strict=True)
    if folder.resolve() == bundled_model().resolve():
        return BUNDLED
    digest = hashlib.blake2b((folder / WEIGHTS_NAME).read_bytes(), digest_size=4).hexdigest()
    return f"{folder.resolve().name}-{digest}"


def save_checkpoint(
    folder: Path,
    config: TrainConfig,
    weights: MasterWeights,
    optimizers: list[torch.optim.Optimizer],
    step: int,
    elapsed: float,
    initial_weights: str | None = None,
) -> None:
    """Write `checkpoint.pt`; a run that is cut off while it writes leaves the file before it.

    Args:
        folder: Where the run keeps its files.
        config: Settings of the run.
        weights: Master weights and averages.
        optimizers: Optimisers of the master weights.
        step: Number of finished steps.
        elapsed: Seconds of training so far.
        initial_weights: Name of the model that the run started from; None for random weights.
    """
    state = {
        "config": config.to_dict(),
        "step": step,
        "elapsed": elapsed,
        "initial_weights": initial_weights,
        "masters": dict(zip(weights.names, [master.detach() for master in weights.masters], strict=True)),
        "average": dict(zip(weights.names, weights.average, strict=True)),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    partial = folder / (CHECKPOINT_NAME + ".partial")
    torch.save(state, partial)
    os.replace(partial, folder / CHECKPOINT_NAME)


def load_checkpoint(
    folder: Path,
    config: TrainConfig,
    weights: MasterWeights,
    optimizers: list[torch.optim.Optimizer],
    initial_weights: str | None = None,
) -> tuple[int, float]:
    """Restore a run; return its number of finished steps and its seconds of training so far.

    Raises:
        FileNotFoundError: The folder has no checkpoint.
        ValueError: The checkpoint belongs to other settings, or to a run that started from other weights.
    """
    path = folder / CHECKPOINT_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: there is no run to resume")
    state: dict[str, Any] = torch.load(path, map_location=weights.masters[0].device, weights_only=True)
    before = {**TrainConfig.from_dict(state["config"]).to_dict(), "initial_weights": state.get("initial_weights")}
    wanted = {**config.to_dict(), "initial_weights": initial_weights}
    changed = {
        name: (before[name], value) for name, value in wanted.items() if name not in _FREE_FIELDS and before[name] != value
    }
    if changed:
        listed = ", ".join(f"{name} (was {old!r}, is {new!r})" for name, (old, new) in changed.items())
        raise ValueError(f"{path} belongs to a run with other settings: {listed}; resume with the same, or start anew")
    _copy(weights.masters, weights.names, state["masters"])
    _copy(weights.average, weights.names, state["average"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    weights.write()
    return int(state["step"]), float(state["elapsed"])


@torch.no_grad()
def _copy(targets: list[Any], names: list[str], saved: dict[str, Tensor]) -> None:
    for name, target in zip(names, targets, strict=True):
        target.copy_(saved[name])
