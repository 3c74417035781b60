"""Folders of weights: `config.json` beside safetensors files, as diffusers lays them out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
INDEX_NAME = WEIGHTS_NAME + ".index.json"

# These stay in float32 where the other weights are narrowed: they are small, and errors in them reach every token.
_FLOAT32_PARTS = ("time_embedder", "scale_shift_table", "norm2")


def _safetensors() -> ModuleType:
    """Import safetensors at the time of use, so that a model can be built where it is not installed."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("Saving and loading weights needs safetensors: pip install 'fastvideo-attention[models]'.") from error
    return safetensors.torch


def cast_weights(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Cast floating weights to `dtype`; timestep embedder, scale-shift tables and `norm2` to at least float32.

    Example:
        >>> both = {"proj_out.bias": torch.zeros(1), "scale_shift_table": torch.zeros(1)}
        >>> [weight.dtype for weight in cast_weights(both, torch.bfloat16).values()]
        [torch.bfloat16, torch.float32]
    """
    wide = torch.promote_types(dtype, torch.float32)
    return {
        name: weight.to(wide if any(part in name.split(".") for part in _FLOAT32_PARTS) else dtype)
        for name, weight in weights.items()
    }


def write_folder(directory: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write `config.json` and one safetensors file, making the folder where it is missing."""
    save_file = _safetensors().save_file
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG_NAME).write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
    contiguous = {name: weight.detach().contiguous() for name, weight in weights.items()}
    save_file(contiguous, directory / WEIGHTS_NAME, metadata={"format": "pt"})


def read_config(directory: Path) -> dict[str, Any]:
    """Read `config.json`.

    Raises:
        FileNotFoundError: The folder has none.
    """
    path = directory / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: give a folder that holds {CONFIG_NAME} and {WEIGHTS_NAME}.")
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config


def read_weights(directory: Path, device: torch.device | str) -> dict[str, Tensor]:
    """Read the weights of a folder, from one safetensors file or from the shards that an index names.

    Raises:
        FileNotFoundError: There is neither a weight file nor an index.
    """
    load_file = _safetensors().load_file
    if (directory / WEIGHTS_NAME).is_file():
        names = [WEIGHTS_NAME]
    elif (directory / INDEX_NAME).is_file():
        index = json.loads((directory / INDEX_NAME).read_text(encoding="utf-8"))
        names = sorted(set(index["weight_map"].values()))
    else:
        raise FileNotFoundError(f"{directory} holds neither {WEIGHTS_NAME} nor {INDEX_NAME}.")
    weights: dict[str, Tensor] = {}
    for name in names:
        weights.update(load_file(directory / name, device=str(device)))
    return weights
