"""The resumable state of a fine-tuning run, sharded as the run is, written by `torch.distributed.checkpoint`.

A checkpoint is a folder `checkpoints/step-00000100`; it gets that name when it is whole, so a run that is killed while it
writes leaves the one before it. It can be resumed on another number of devices.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from fastvideo.training.finetune.config import FinetuneConfig
from fastvideo.training.finetune.parallel import local

__all__ = ["Progress", "check_settings", "last_checkpoint", "load_checkpoint", "save_checkpoint"]

SETTINGS_NAME = "run.json"
FOLDER_NAME = "checkpoints"
_KEPT = 2


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        step: Number of finished steps.
        elapsed: Seconds of training so far.
        loss_sum: Sum of the losses of steps that aren't logged yet, so that the line which tells them is the same after a kill.
        num_losses: How many those are.
    """

    step: int = 0
    elapsed: float = 0.0
    loss_sum: float = 0.0
    num_losses: int = 0


def check_settings(folder: Path, config: FinetuneConfig, sources: dict[str, str], *, resume: bool) -> None:
    """Keep a run's settings in its folder, or compare those of its continuation with them.

    Args:
        folder: Where the run keeps its files.
        config: Settings of the run.
        sources: Checkpoint and data that it begins with.
        resume: Whether this is a continuation.

    Raises:
        FileNotFoundError: There is no run to resume.
        ValueError: The run has other settings, or the folder holds a run and this is no continuation.
    """
    path = folder / SETTINGS_NAME
    wanted = {**config.to_dict(), **sources}
    if not resume:
        if last_checkpoint(folder) is not None:
            raise ValueError(f"{folder} holds a run with checkpoints: pass --resume to continue it, or another --out")
        if dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
        return
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: there is no run to resume; leave out --resume")
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = [
        f"{name} (was {before.get(name)!r}, is {value!r})" for name, value in wanted.items() if before.get(name) != value
    ]
    if changed:
        raise ValueError(f"{path} belongs to a run with other settings: {', '.join(changed)}; resume with the same")


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint of a run, or `None`."""
    found = [path for path in (folder / FOLDER_NAME).glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return max(found, default=None)


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Sequence[Tensor],
    progress: Progress,
) -> None:
    """Write a checkpoint, and drop those before the last two. Every process calls it.

    Args:
        folder: Where the run keeps its files.
        model: The sharded model; its parameters are the masters.
        optimizer: Of the model.
        average: Averages, in the order of the parameters.
        progress: How far the run is.
    """
    path = folder / FOLDER_NAME / f"step-{progress.step:08d}"
    partial = path.with_suffix(".partial")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    save(_state(model, optimizer, average, progress), checkpoint_id=partial)
    dist.barrier()
    if dist.get_rank() == 0:
        partial.rename(path)
        whole = sorted(old for old in path.parent.glob("step-*") if not old.suffix)
        for old in whole[:-_KEPT]:
            shutil.rmtree(old)
    dist.barrier()


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: Sequence[Tensor]) -> Progress:
    """Restore a run from a checkpoint, in place; return how far it is."""
    state = _state(model, optimizer, average, Progress())
    load(state, checkpoint_id=path)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    with torch.no_grad():
        for mine, saved in zip(average, state["average"].values(), strict=True):
            local(mine).copy_(local(saved))
    return Progress(**state["progress"])


def _state(model: nn.Module, optimizer: torch.optim.Optimizer, average: Sequence[Tensor], progress: Progress) -> dict[str, Any]:
    names = [name for name, _ in model.named_parameters()]
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "average": dict(zip(names, average, strict=True)),
        "progress": asdict(progress),
    }
