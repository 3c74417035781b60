"""Folders of weights: `config.json` beside safetensors files, as diffusers lays them out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
INDEX_NAME = WEIGHTS_NAME + ".index.json"
GATE_NAME = "to_gate_compress"
SPARSITY_NOTE = "_sparsity"
"""Under which `config.json` notes the sparsity that a model was trained for."""

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
    """Read `config.json`, and tell by the weights a sparse model whose configuration doesn't say so.

    Checkpoints of the FastWan kind have diffusers' configuration, which knows no attention, beside the weights of gates.

    Raises:
        FileNotFoundError: The folder has none.
        ValueError: It is no JSON object.
    """
    path = directory / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: give a folder that holds {CONFIG_NAME} and {WEIGHTS_NAME}.")
    config = read_json(path)
    has_weights = any((directory / name).is_file() for name in (WEIGHTS_NAME, INDEX_NAME))
    if "attention" not in config and has_weights and gate_names(weight_names(directory)):
        config.update(attention="vsa", vsa_gate=True)
    return config


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: The file holds none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON ({error}); copy it again.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(found).__name__}.")
    return found


def read_weights(directory: Path, device: torch.device | str) -> dict[str, Tensor]:
    """Read the weights of a folder, from one safetensors file or from the shards that an index names.

    Raises:
        FileNotFoundError: There is neither a weight file nor an index, or a shard is missing.
        ValueError: A file is broken.
    """
    load_file = _safetensors().load_file
    weights: dict[str, Tensor] = {}
    for path in weight_files(directory):
        read_header(path)
        weights.update(load_file(path, device=str(device)))
    return weights


def weight_names(directory: Path) -> set[str]:
    """Return the names of a folder's weights, without reading them.

    Raises:
        FileNotFoundError: There is neither a weight file nor an index, or a shard is missing.
        ValueError: A file is broken.
    """
    return {name for path in weight_files(directory) for name in read_header(path)}


def weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files of a folder: the one, or the shards that an index names.

    Raises:
        FileNotFoundError: There is neither a weight file nor an index, or a shard is missing.
        ValueError: The index is broken.
    """
    if (directory / WEIGHTS_NAME).is_file():
        return [directory / WEIGHTS_NAME]
    if not (directory / INDEX_NAME).is_file():
        raise FileNotFoundError(f"{directory} holds neither {WEIGHTS_NAME} nor {INDEX_NAME}.")
    return indexed_files(directory / INDEX_NAME)


def indexed_files(index: Path) -> list[Path]:
    """Return the shards that an index names.

    Raises:
        FileNotFoundError: One is missing.
        ValueError: The index is broken.
    """
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{index} has no weight_map from weights to files; copy it again.")
    files = [index.parent / name for name in sorted(set(places.values()))]
    if missing := [path.name for path in files if not path.is_file()]:
        raise FileNotFoundError(f"{index.parent} lacks {', '.join(missing)}, which {index.name} names; copy it again.")
    return files


def read_header(path: Path) -> list[str]:
    """Return the names of the tensors in a safetensors file, which is checked to be whole.

    Raises:
        ValueError: The file is broken.
    """
    _safetensors()
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no whole safetensors file ({error}); copy it again.") from error


def gate_names(names: Iterable[str]) -> list[str]:
    """Return those names of weights that are of gates for the coarse part of Video Sparse Attention.

    Example:
        >>> gate_names(["blocks.0.to_gate_compress.weight", "blocks.0.attn1.to_q.weight"])
        ['blocks.0.to_gate_compress.weight']
    """
    return sorted(name for name in names if GATE_NAME in name.split("."))
