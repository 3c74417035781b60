"""Folders of diffusers pipelines: what they hold, what they lack, and the pipeline loaded from one, with no weight lost.

A folder is checked before anything is loaded, by file names and headers alone, and everything that is wrong is said at once.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastvideo.models.wan import WanTransformer3DModel
from fastvideo.models.wan.checkpoint import gate_names, indexed_files, read_header, read_json
from fastvideo.models.wan.pipeline import WanInPipeline

__all__ = ["IMAGE_TO_VIDEO", "MODEL_INDEX", "PipelineFolder", "load_pipeline", "read_pipeline_folder"]

MODEL_INDEX = "model_index.json"
IMAGE_TO_VIDEO = "WanImageToVideoPipeline"
"""Of Wan 2.1, with an encoder of the image besides, and of 2.2, without."""

_INSTALL = "pip install 'fastvideo-attention[pipelines]'"
_TOKENIZER = re.compile(r"Tokenizer")
_WITHOUT_WEIGHTS = re.compile(r"Scheduler$|Tokenizer|Processor(Fast|Pil)?$|Extractor$")
# What names a component's class or sizes, where it isn't config.json.
_CONFIGS = ((re.compile(r"Scheduler$"), "scheduler_config.json"), (_TOKENIZER, "tokenizer_config.json"))
_TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "vocab.json", "tokenizer.model")
# Pipelines of other packages whose folders are laid out as one of diffusers'.
_LAID_OUT_AS = {"WanDMDPipeline": "WanPipeline"}


@dataclass(frozen=True)
class PipelineFolder:
    """A folder that holds a whole pipeline.

    Attributes:
        path: The folder.
        class_name: The pipeline's class in diffusers.
        gated: Names of transformers whose checkpoints have gates of Video Sparse Attention.
        weights: Names of the weights in each component's files.
        takes_image: Whether it makes videos from an image; `None` where it does either, as Wan 2.2's model of 5B does.
    """

    path: Path
    class_name: str
    gated: tuple[str, ...]
    weights: dict[str, frozenset[str]]
    takes_image: bool | None = False

    def for_image(self) -> PipelineFolder:
        """Return the same files as a pipeline of image to video."""
        return replace(self, class_name=IMAGE_TO_VIDEO, takes_image=True)


def read_pipeline_folder(path: Path) -> PipelineFolder:
    """Check a folder.

    Raises:
        FileNotFoundError: The folder or something in it is missing; the message lists everything.
        ValueError: Files are broken, or the index isn't one of a pipeline.

    Example:
        >>> try:
        ...     read_pipeline_folder(Path("a/folder/that/is/gone"))
        ... except FileNotFoundError as error:
        ...     print(error)
        a/folder/that/is/gone is no folder; give the folder of a diffusers pipeline, with model_index.json in it
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is no folder; give the folder of a diffusers pipeline, with {MODEL_INDEX} in it")
    if not (path / MODEL_INDEX).is_file():
        raise FileNotFoundError(f"{path / MODEL_INDEX} is missing; give the folder of a whole diffusers pipeline")
    index = read_json(path / MODEL_INDEX)
    class_name = index.get("_class_name")
    if not isinstance(class_name, str):
        raise ValueError(f"{path / MODEL_INDEX} has no _class_name; copy it again")
    components = {
        name: place[1]
        for name, place in index.items()
        if isinstance(place, list) and len(place) == 2 and isinstance(place[1], str)
    }
    weights: dict[str, frozenset[str]] = {}
    missing, broken = [], []
    for name, component in components.items():
        try:
            weights[name] = _check_component(path / name, component)
        except FileNotFoundError as error:
            missing.append(str(error))
        except ValueError as error:
            broken.append(str(error))
    if missing or broken:
        listed = "\n".join(f"  - {problem}" for problem in [*missing, *broken])
        kind = FileNotFoundError if missing else ValueError
        raise kind(f"{path} is no whole {class_name}:\n{listed}")
    gated = tuple(name for name, names in weights.items() if gate_names(names))
    class_name = _LAID_OUT_AS.get(class_name, class_name)
    # A model whose tokens have timesteps of their own takes a first frame that has no noise.
    is_either = class_name == "WanPipeline" and bool(index.get("expand_timesteps"))
    return PipelineFolder(path, class_name, gated, weights, None if is_either else class_name == IMAGE_TO_VIDEO)


def _check_component(folder: Path, class_name: str) -> frozenset[str]:
    """Return the names of a component's weights; none for one without."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder.name}/ ({class_name}) is missing")
    for kind, config in _CONFIGS:
        if kind.search(class_name) and not (folder / config).is_file():
            raise FileNotFoundError(f"{folder.name}/{config} is missing")
    if _TOKENIZER.search(class_name) and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise FileNotFoundError(f"{folder.name}/ ({class_name}) holds none of {', '.join(_TOKENIZER_FILES)}")
    for path in sorted(folder.glob("*.json")):
        read_json(path)
    if _WITHOUT_WEIGHTS.search(class_name):
        return frozenset()
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder.name}/config.json is missing")
    files = {path for index in folder.glob("*.safetensors.index.json") for path in indexed_files(index)}
    files |= set(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder.name}/ ({class_name}) holds no safetensors file")
    return frozenset(name for path in sorted(files) for name in read_header(path))


def load_pipeline(folder: PipelineFolder, device: torch.device, dtype: torch.dtype) -> Any:
    """Load a pipeline. Transformers with gates become ours, at sparsity 0; every weight of the others must find its place.

    Args:
        folder: What is loaded.
        device: Where to.
        dtype: Of all weights but the VAE's and the image encoder's, which work in float32.

    Raises:
        ImportError: diffusers or transformers is missing.
        NotImplementedError: diffusers has no such pipeline, or gates stand in a transformer that isn't Wan's.
        ValueError: A component can't be loaded or is absent, or weights would be dropped, or made up.

    Warns:
        UserWarning: Weights are dropped that a model's class says it doesn't need.
    """
    try:
        import accelerate  # noqa: F401  # diffusers' own message doesn't say what to install
        import diffusers
        import ftfy  # noqa: F401  # some of diffusers' pipelines call it whether it is there or not
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError(f"diffusers pipelines need diffusers, transformers, accelerate and ftfy: {_INSTALL}") from error
    pipeline_cls = getattr(diffusers, folder.class_name, None)
    if pipeline_cls is None or not hasattr(pipeline_cls, "from_pretrained"):
        raise NotImplementedError(
            f"diffusers {diffusers.__version__} has no pipeline {folder.class_name}, which {folder.path} is"
        )
    if folder.gated and folder.class_name != "WanPipeline":
        raise NotImplementedError(
            f"{folder.path} has gates of Video Sparse Attention in {', '.join(folder.gated)}, which only WanPipeline's "
            f"transformers have here, not {folder.class_name}'s"
        )
    # An optional component that is None isn't loaded.
    instead = dict.fromkeys(folder.gated)
    dtypes = {"default": dtype} | {name: torch.float32 for name in ("vae", "image_encoder") if name in folder.weights}
    try:
        pipe = pipeline_cls.from_pretrained(str(folder.path), dtype=dtypes, local_files_only=True, **instead)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{folder.path} can't be loaded as a {folder.class_name} ({error}); copy it again") from error
    for name in folder.gated:
        model = WanTransformer3DModel.load(folder.path / name, dtype=dtype)
        pipe.register_modules(**{name: WanInPipeline(model)})
    _check_all_there(folder, pipe)
    for name, component in pipe.components.items():
        if name not in folder.gated and isinstance(component, torch.nn.Module):
            _check_all_used(folder.path / name, component, folder.weights[name])
    return pipe.to(device)


def _check_all_there(folder: PipelineFolder, pipe: Any) -> None:
    """Raise where a component that every sampler calls is absent; diffusers fails at its first use."""
    optional = getattr(pipe, "_optional_components", ())
    absent = [name for name, component in pipe.components.items() if component is None and name not in optional]
    models = [name for name in pipe.components if name.startswith("transformer")]
    if models and all(getattr(pipe, name) is None for name in models):
        absent.append(" or ".join(models))
    if absent:
        raise ValueError(
            f"{folder.path / MODEL_INDEX} names no {', no '.join(absent)}; copy the whole {folder.class_name} again"
        )


def _check_all_used(folder: Path, model: Any, stored: frozenset[str]) -> None:
    """Raise where weights were dropped or made up, which diffusers and transformers only log, and warn of needless ones."""
    from transformers import PreTrainedModel

    ignored = tuple(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    name = type(model).__name__
    unplaced = stored.difference(model.state_dict())
    made_up: set[str]
    dropped: set[str]
    if isinstance(model, PreTrainedModel):
        # transformers ties and renames weights, and knows itself what it lacked; on "meta" it reads headers alone.
        model_cls: Any = type(model)
        _, found = model_cls.from_pretrained(folder, device_map="meta", output_loading_info=True, local_files_only=True)
        made_up, dropped = set(found["missing_keys"]), set(found["unexpected_keys"])
    else:
        dropped = set(unplaced) - _matching(unplaced, ignored)
        made_up = {weight for weight, _ in model.named_parameters()} - stored
    kinds = ((made_up, "are missing"), (dropped, "would be dropped: its class has no place for them"))
    if wrong := [f"weights of {name} {what}: {_listed(names)}" for names, what in kinds if names]:
        raise ValueError(f"{folder}: {'; '.join(wrong)}")
    if needless := _matching(unplaced, ignored):
        warnings.warn(f"{folder}: {name} is loaded without weights that it doesn't need: {_listed(needless)}", stacklevel=3)


def _matching(names: Iterable[str], patterns: Iterable[str]) -> set[str]:
    return {name for name in names if any(re.search(pattern, name) for pattern in patterns)}


def _listed(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
