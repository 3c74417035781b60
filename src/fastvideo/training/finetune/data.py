"""Folders of latents and text embeddings: what their shards hold, and in what order a run reads them.

A folder holds shards `*.safetensors`, each with

- `latents`: `[N, C, T, Y, X]`, videos as the model sees them (encoded and normalised), one shape per shard,
- `text`: `[N, L, text_dim]`, the embeddings of their texts, padded as the checkpoint was trained,
- `condition`: `[N, C', T, Y, X]`, where the model's input has C' channels more than its output: what stands behind the noisy
  latents and gets no noise, such as the mask and the first frame of image to video,

in any float dtype, and, for text dropout, a file `null_text.safetensors` with `text`, `[L, text_dim]`. Shards may differ in
shape; a batch never does. Nothing is read but what a step needs.

Shape legend: N examples of a shard, C latent channels, T, Y, X latent frames, rows and columns, L text tokens.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastvideo.models.wan.config import WanConfig
from fastvideo.training.finetune.config import derived_seed

__all__ = ["Example", "ExampleStore", "LatentFolder", "Shape", "epoch_of_batches", "write_null_text", "write_shard"]

NULL_NAME = "null_text.safetensors"
Shape = tuple[tuple[int, ...], tuple[int, ...]]
"""Shapes of a latent, `(C, T, Y, X)`, and of a text, `(L, text_dim)`."""


class Example(NamedTuple):
    """One example.

    Attributes:
        latent: `[C, T, Y, X]`.
        text: `[L, text_dim]`.
        condition: `[C', T, Y, X]`, or `None` where the model needs none.
    """

    latent: Tensor
    text: Tensor
    condition: Tensor | None = None


class ExampleStore(Protocol):
    """Examples by number, as a run reads them."""

    null_text: Tensor | None

    @property
    def shapes(self) -> list[Shape]:
        """The shapes of each example."""

    def read(self, index: int) -> Example:
        """Return an example."""


@dataclass(frozen=True)
class _Shard:
    path: Path
    first: int
    count: int
    shape: Shape


class LatentFolder:
    """The examples of a folder, checked against a model when it is opened.

    Args:
        folder: Holds the shards.
        config: The model that they are for.
        num_appended: Channels of its input that the run appends itself, and shards don't hold.

    Raises:
        FileNotFoundError: The folder or its shards are missing.
        ImportError: safetensors is missing.
        TypeError: A tensor isn't of a float dtype.
        ValueError: A shard isn't what the format says or the model needs; the message names it.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> write_shard(Path(folder.name) / "0.safetensors", torch.zeros(3, 16, 2, 4, 6), torch.zeros(3, 5, 4096))
        >>> examples = LatentFolder(Path(folder.name), WanConfig())
        >>> len(examples), examples.read(2)[0].shape
        (3, torch.Size([16, 2, 4, 6]))
    """

    def __init__(self, folder: Path, config: WanConfig, num_appended: int = 0) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is no folder; give one that holds shards *.safetensors of latents and text")
        paths = sorted(path for path in folder.glob("*.safetensors") if path.name != NULL_NAME)
        if not paths:
            raise FileNotFoundError(f"{folder} holds no shard *.safetensors; write them with write_shard(path, latents, text)")
        self.folder = folder
        num_channels = config.out_channels or config.in_channels
        self._num_channels = {"latents": num_channels, "condition": config.in_channels - num_channels - num_appended}
        if self._num_channels["condition"] < 0:
            raise ValueError(
                f"this model's input of {config.in_channels} channels is narrower than its output of {num_channels} channels "
                f"and the {num_appended} that are appended"
            )
        self._shards: list[_Shard] = []
        self._files: dict[Path, Any] = {}
        for path in paths:
            count, shape = _check_shard(path, self._open(path), config, self._num_channels)
            self._shards.append(_Shard(path, len(self), count, shape))
        self.null_text = self._read_null_text(config)

    def __len__(self) -> int:
        return self._shards[-1].first + self._shards[-1].count if self._shards else 0

    @property
    def shapes(self) -> list[Shape]:
        """The shapes of each example's latent and text."""
        return [shard.shape for shard in self._shards for _ in range(shard.count)]

    def read(self, index: int) -> Example:
        """Return an example, on the CPU.

        Raises:
            ValueError: They hold NaN or infinity.
        """
        shard = self._shards[bisect.bisect_right(self._shards, index, key=lambda shard: shard.first) - 1]
        row, file = index - shard.first, self._open(shard.path)
        tensors = {name: file.get_slice(name)[row] for name in _names(self._num_channels)}
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{shard.path}: {name}[{row}] holds NaN or infinity; drop or mend this example")
        return Example(tensors["latents"], tensors["text"], tensors.get("condition"))

    def _open(self, path: Path) -> Any:
        if path not in self._files:
            self._files[path] = _open_safetensors(path)
        return self._files[path]

    def _read_null_text(self, config: WanConfig) -> Tensor | None:
        path = self.folder / NULL_NAME
        if not path.is_file():
            return None
        file = _open_safetensors(path)
        text: Tensor | None = file.get_tensor("text") if "text" in file.keys() else None  # noqa: SIM118  # no mapping
        if text is None or text.ndim != 2 or text.shape[1] != config.text_dim:
            found = "none" if text is None else str(list(text.shape))
            raise ValueError(f"{path}: expected `text` as [L, {config.text_dim}], got {found}")
        lengths = {shard.shape[1][0] for shard in self._shards}
        if lengths != {len(text)}:
            raise ValueError(f"{path}: expected {sorted(lengths)} text tokens, as the shards have, got {len(text)}")
        return text


def write_shard(path: Path, latents: Tensor, text: Tensor, condition: Tensor | None = None) -> None:
    """Write a shard.

    Args:
        path: Ends in `.safetensors`; its folder is made where it is missing.
        latents: `[N, C, T, Y, X]`.
        text: `[N, L, text_dim]`.
        condition: `[N, C', T, Y, X]`, for a model whose input has C' channels more than its output.

    Raises:
        TypeError: A tensor isn't of a float dtype.
        ValueError: The shapes don't fit each other, or the name has another ending.
    """
    if path.suffix != ".safetensors" or path.name == NULL_NAME:
        raise ValueError(f"expected a name that ends in .safetensors, other than {NULL_NAME}, got {path.name!r}")
    tensors = {"latents": latents, "text": text, **({} if condition is None else {"condition": condition})}
    _check_tensors(path, tensors)
    _save(path, tensors)


def write_null_text(folder: Path, text: Tensor) -> None:
    """Write the embedding of the null text, `[L, text_dim]`, to a folder of shards."""
    if text.ndim != 2 or not text.is_floating_point():
        raise ValueError(f"expected text as floats [L, text_dim], got {text.dtype} {list(text.shape)}")
    _save(folder / NULL_NAME, {"text": text})


def epoch_of_batches(shapes: list[Shape], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return an epoch's batches of example numbers: a random order, one shape per batch, what is left over dropped.

    Raises:
        ValueError: No shape has enough examples for a batch.

    Example:
        >>> shape = ((16, 1, 2, 2), (5, 8))
        >>> batches = epoch_of_batches([shape] * 5, batch_size=2, seed=0, epoch=0)
        >>> len(batches), len({index for batch in batches for index in batch})
        (2, 4)
    """
    generator = torch.Generator().manual_seed(derived_seed(seed, "order", epoch))
    by_shape: defaultdict[Shape, list[int]] = defaultdict(list)
    for index, shape in enumerate(shapes):
        by_shape[shape].append(index)
    batches = []
    for indices in by_shape.values():
        order = [indices[place] for place in torch.randperm(len(indices), generator=generator).tolist()]
        batches += [order[first : first + batch_size] for first in range(0, len(order) - batch_size + 1, batch_size)]
    if not batches:
        most = max(map(len, by_shape.values()))
        raise ValueError(f"batch_size={batch_size} needs so many examples of one shape; the data has at most {most}")
    return [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]


def _names(num_channels: dict[str, int]) -> tuple[str, ...]:
    """The tensors of a shard, for a model that needs so many channels of latents and of condition."""
    return ("latents", "text", "condition") if num_channels["condition"] else ("latents", "text")


def _check_shard(path: Path, file: Any, config: WanConfig, num_channels: dict[str, int]) -> tuple[int, Shape]:
    names, expected = sorted(file.keys()), _names(num_channels)
    if set(names) != set(expected):
        why = f"; `condition` is [N, {num_channels['condition']}, T, Y, X]" if "condition" in expected else ""
        if "condition" in names and "condition" not in expected:
            why = ": this model's input has no channels that a shard would bring"
        raise ValueError(f"{path}: expected the tensors {', '.join(f'`{name}`' for name in expected)}, got {names}{why}")
    # One row shows the dtype; shapes are read without data.
    shapes = {name: list(file.get_slice(name).get_shape()) for name in expected}
    if any(0 in shape for shape in shapes.values()):
        raise ValueError(f"{path}: expected as many latents as texts, at least one, got {shapes}")
    _check_tensors(path, {name: file.get_slice(name)[:1] for name in expected})
    _check_counts(path, shapes)
    for name, channels in num_channels.items():
        shape = shapes.get(name, [0, 0])
        if shape[1] != channels or any(size % edge for size, edge in zip(shape[2:], config.patch_size, strict=False)):
            raise ValueError(
                f"{path}: expected {name} [N, {channels}, T, Y, X] in whole patches of {config.patch_size}, got {shape}"
            )
    if shapes["text"][2] != config.text_dim:
        raise ValueError(f"{path}: expected text [N, L, {config.text_dim}], got {shapes['text']}")
    return shapes["latents"][0], (tuple(shapes["latents"][1:]), tuple(shapes["text"][1:]))


def _check_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    dims = {"latents": "[N, C, T, Y, X]", "text": "[N, L, text_dim]", "condition": "[N, C', T, Y, X]"}
    for name, tensor in tensors.items():
        if tensor.ndim != dims[name].count(",") + 1:
            raise ValueError(f"{path}: expected {name} as {dims[name]}, got {list(tensor.shape)}")
        if not tensor.is_floating_point():
            raise TypeError(f"{path}: expected {name} in a float dtype, got {tensor.dtype}")
    _check_counts(path, {name: list(tensor.shape) for name, tensor in tensors.items()})


def _check_counts(path: Path, shapes: dict[str, list[int]]) -> None:
    if len({shape[0] for shape in shapes.values()}) > 1 or not shapes["text"][0]:
        raise ValueError(f"{path}: expected as many latents as texts, at least one, got {shapes}")
    if "condition" in shapes and shapes["condition"][2:] != shapes["latents"][2:]:
        raise ValueError(f"{path}: expected a condition of the latents' frames, rows and columns, got {shapes}")


def _open_safetensors(path: Path) -> Any:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError("reading shards needs safetensors: pip install 'fastvideo-attention[train]'") from error
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is no readable safetensors file ({error}); write it again") from error


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError("writing shards needs safetensors: pip install 'fastvideo-attention[train]'") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
