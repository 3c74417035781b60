"""The resumable state of a training run: one file, replaced as a whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvideo.training.config import TrainConfig
from fastvideo.training.optim import MasterWeights

CHECKPOINT_NAME = "checkpoint.pt"
# What may differ between a run and its continuation: it doesn't change what is learned.
_FREE_FIELDS = ("compile",)


def save_checkpoint(
    folder: Path,
    config: TrainConfig,
    weights: MasterWeights,
    optimizers: list[torch.optim.Optimizer],
    step: int,
    elapsed: float,
) -> None:
    """Write `checkpoint.pt`; a run that is cut off while it writes leaves the file before it.

    Args:
        folder: Where the run keeps its files.
        config: Settings of the run.
        weights: Master weights and averages.
        optimizers: Optimisers of the master weights.
        step: Number of finished steps.
        elapsed: Seconds of training so far.
    """
    state = {
        "config": config.to_dict(),
        "step": step,
        "elapsed": elapsed,
        "masters": dict(zip(weights.names, [master.detach() for master in weights.masters], strict=True)),
        "average": dict(zip(weights.names, weights.average, strict=True)),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    partial = folder / (CHECKPOINT_NAME + ".partial")
    torch.save(state, partial)
    os.replace(partial, folder / CHECKPOINT_NAME)


def load_checkpoint(
    folder: Path, config: TrainConfig, weights: MasterWeights, optimizers: list[torch.optim.Optimizer]
) -> tuple[int, float]:
    """Restore a run; return its number of finished steps and its seconds of training so far.

    Raises:
        FileNotFoundError: The folder has no checkpoint.
        ValueError: The checkpoint belongs to other settings.
    """
    path = folder / CHECKPOINT_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: there is no run to resume")
    state: dict[str, Any] = torch.load(path, map_location=weights.masters[0].device, weights_only=True)
    wanted = config.to_dict()
    changed = {
        name: (state["config"].get(name), value)
        for name, value in wanted.items()
        if name not in _FREE_FIELDS and state["config"].get(name) != value
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
