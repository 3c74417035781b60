"""What the integration has to know about a family of models, and the list of the families it knows.

A family says where attention happens and in which role, which processor of ours stands in for which of diffusers', how big the
video behind a call is, and where tokens are cut when several devices share them. `register_family` adds one.
"""

from __future__ import annotations

import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import nn

from fastvideo.integrations.plan import Place

__all__ = ["Family", "Gather", "Processor", "ShardPlan", "Site", "Split", "find_family", "known_models", "register_family"]


class Processor:
    """An attention processor: a model's own projections, norms and positions around `attend`.

    Subclasses give `__call__(attn, hidden_states, ...)` with the arguments that the model's attention module hands over.

    Args:
        attend: Attention at this place.

    Example:
        >>> class OwnProcessor(Processor):
        ...     def __call__(self, attn, hidden_states):
        ...         query, key, value = (x.unflatten(2, (2, 8)) for x in attn.to_qkv(hidden_states).chunk(3, dim=-1))
        ...         return self.attend(query, key, value)[0].flatten(2)
    """

    def __init__(self, attend: Any) -> None:
        self.attend = attend

    @property
    def _parallel_config(self) -> None:
        """diffusers' own context parallelism looks for this; it can't be had beside ours."""
        return None

    @_parallel_config.setter
    def _parallel_config(self, config: object) -> None:
        if config is not None:
            raise ValueError(
                "this model's attention runs by fastvideo.integrations.diffusers.apply; share its tokens over devices with "
                "apply(..., parallel=mesh), or call remove(...) before enable_parallelism"
            )

    @property
    def _attention_backend(self) -> None:
        """diffusers' `set_attention_backend` sets this where it finds it, and is silent where it doesn't."""
        return None

    @_attention_backend.setter
    def _attention_backend(self, backend: object) -> None:
        if backend is not None:
            raise ValueError(
                "this model's attention runs by fastvideo.integrations.diffusers.apply; name a backend there, as in "
                "apply(model, 'TORCH_SDPA'), or call remove(...) before set_attention_backend"
            )


@dataclass(frozen=True)
class Site:
    """An attention module and what replaces its processor.

    Attributes:
        place: Its name, role and layer.
        processor: Our processor, built with an `Attend`.
        replaces: Class names of the processors of diffusers that it does the work of; any other is refused.

    Example:
        >>> from fastvideo.integrations.diffusers.wan import WanSelfProcessor
        >>> Site(Place("blocks.3.attn1", "self", 3), WanSelfProcessor, replaces=("WanAttnProcessor",)).place.layer
        3
    """

    place: Place
    processor: type[Processor]
    replaces: tuple[str, ...]


@dataclass(frozen=True)
class Split:
    """Keep this device's part of a tensor, or of each tensor in a list; of a number of leading tokens, those that it holds.

    Attributes:
        dim: What is cut.
        num_dims: Cut only tensors of so many dims; `None` cuts all.
        of_output: Cut what the module returns instead of what it is given.

    Example:
        >>> plan = {"rope": {0: Split(1, of_output=True)}, "blocks.0": {"hidden_states": Split(1)}, "proj_out": Gather(1)}
    """

    dim: int
    num_dims: int | None = None
    of_output: bool = False


@dataclass(frozen=True)
class Gather:
    """Join the devices' parts of what a module returns.

    Attributes:
        dim: Where they are joined.
        output: Which of several outputs is joined; `None` where there is one.

    Example:
        >>> Gather(1)
        Gather(dim=1, output=None)
    """

    dim: int
    output: int | None = None


ShardPlan: TypeAlias = "dict[str, dict[str | int, Split] | Gather]"
"""By name of a module (`""` is the model, `"blocks.*"` each of a list): inputs by name or outputs by number, or the gather."""


class Family(ABC):
    """A family of models. Subclass it and hand an instance to `register_family`.

    Attributes:
        name: For people.
        model_classes: Names of the model classes; subclasses of theirs belong too.
        without_grid: Why the tokens that its blocks see are no video grid, so that sparse video attention can't run; empty
            where they are one.

    Example:
        >>> from fastvideo.integrations.diffusers.wan import WanSelfProcessor
        >>> class SmallFamily(Family):
        ...     name, model_classes = "Small", ("SmallModel",)
        ...
        ...     def sites(self, model):
        ...         for number, path, _ in blocks_of(model, "layers"):
        ...             yield Site(Place(path, "self", number), WanSelfProcessor, replaces=("WanAttnProcessor",))
        ...
        ...     def video_shape(self, model, inputs):
        ...         return inputs["hidden_states"].shape[2:], (1, 2, 2)
        >>> model = nn.Module()
        >>> model.layers = nn.ModuleList([nn.Identity()])
        >>> [site.place.path for site in SmallFamily().sites(model)]
        ['layers.0']
    """

    name: ClassVar[str]
    model_classes: ClassVar[tuple[str, ...]]
    without_grid: ClassVar[str] = ""

    @abstractmethod
    def sites(self, model: nn.Module) -> Iterable[Site]:
        """Return every attention module of the model, in the order of layers."""

    def check(self, model: nn.Module) -> None:  # noqa: B027  # most families have nothing to check
        """Refuse a model that would not make what its checkpoint was trained for, before anything is put on it.

        Raises:
            ValueError: It is such a model.
        """

    def video_shape(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:  # noqa: ARG002  # families look at it or not
        """Return the latent's frames, height and width, and the patch size along the same axes, for one call.

        Args:
            model: The model.
            inputs: Arguments of the call by name; those left out are missing.

        Raises:
            ValueError: The inputs don't tell.
        """
        raise ValueError(
            f"{type(model).__name__} doesn't say how large its video is; call it inside "
            "`with fastvideo.integrations.diffusers.denoising_step(step, grid_tyx=(t, y, x)):`"
        )

    def text_mask(self, inputs: Mapping[str, Any]) -> torch.Tensor | None:  # noqa: ARG002  # families look at it or not
        """Return which of the text tokens joined to the video are real, `[B, R]`, or `None` where all are."""
        return None

    def num_text(self, inputs: Mapping[str, Any]) -> int:  # noqa: ARG002  # families look at it or not
        """Return how many text tokens are joined to the video's."""
        return 0

    def follows_scheduler(self, inputs: Mapping[str, Any]) -> bool:  # noqa: ARG002  # families look at it or not
        """Return whether a call's step is the one that its pipeline's scheduler is at."""
        return True

    def shard_plan(self, model: nn.Module) -> ShardPlan:
        """Return where the model's tokens are cut and joined when several devices share them.

        Raises:
            NotImplementedError: The family has no such plan.
        """
        raise NotImplementedError(f"{self.name} models can't share their tokens over devices yet; leave out parallel")


def from_cp_plan(model: nn.Module, replicated: Iterable[str] = ()) -> ShardPlan:
    """Translate a model's own `_cp_plan`, leaving whole the inputs named in `replicated`.

    diffusers cuts text too; here every device holds it, as replicated tokens or as the keys of cross attention.
    """
    plan: ShardPlan = {}
    for path, entries in model._cp_plan.items():  # type: ignore[union-attr,operator]  # diffusers' own attribute
        if not isinstance(entries, dict):
            plan[path] = Gather(entries.gather_dim)
            continue
        kept = {
            key: Split(entry.split_dim, entry.expected_dims, entry.split_output)
            for key, entry in entries.items()
            if key not in replicated
        }
        if kept:
            plan[path] = kept
    return plan


_BUILT_INS = {
    "WanTransformer3DModel": "wan:WanFamily",
    "WanVACETransformer3DModel": "wan_vace:WanVACEFamily",
    "WanAnimateTransformer3DModel": "wan_animate:WanAnimateFamily",
    "ChronoEditTransformer3DModel": "wan:WanFamily",
    "SkyReelsV2Transformer3DModel": "wan:SkyReelsFamily",
    "HunyuanVideoTransformer3DModel": "hunyuan_video:HunyuanVideoFamily",
    "HunyuanVideoFramepackTransformer3DModel": "framepack:FramepackFamily",
    "HunyuanVideo15Transformer3DModel": "hunyuan_video_15:HunyuanVideo15Family",
    "LTXVideoTransformer3DModel": "ltx:LTXFamily",
    "CogVideoXTransformer3DModel": "cogvideox:CogVideoXFamily",
    "ConsisIDTransformer3DModel": "cogvideox:CogVideoXFamily",
    "MochiTransformer3DModel": "mochi:MochiFamily",
    "CosmosTransformer3DModel": "cosmos:CosmosFamily",
    "FluxTransformer2DModel": "flux:FluxFamily",
    "Flux2Transformer2DModel": "flux:Flux2Family",
}
_REGISTERED: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Teach the integration a family of models.

    Args:
        family: An instance of a subclass of `Family`.

    Raises:
        TypeError: It is none, or lacks `name` or `model_classes`.
        ValueError: One of its model classes is known already, by another class of family.

    Example:
        >>> from fastvideo.integrations.diffusers.wan import WanFamily
        >>> class MyFamily(WanFamily):
        ...     name, model_classes = "My Wan", ("MyWanTransformer",)
        >>> register_family(MyFamily())
    """
    if not isinstance(family, Family):
        raise TypeError(f"expected an instance of a subclass of Family, got {family!r}")
    classes = getattr(family, "model_classes", None)
    if not (isinstance(getattr(family, "name", None), str) and isinstance(classes, (tuple, list)) and classes):
        raise TypeError(f"expected {type(family).__name__} to have a name and model_classes, a tuple of names, got {classes!r}")
    for name in family.model_classes:
        known = _REGISTERED.get(name)
        if name in _BUILT_INS or (known is not None and type(known).__qualname__ != type(family).__qualname__):
            raise ValueError(f"the model class {name!r} belongs to the family {find_by_name(name).name!r} already")
    _REGISTERED.update(dict.fromkeys(family.model_classes, family))


def find_by_name(name: str) -> Family:
    """Return the family of a model class that is known by name."""
    if name in _REGISTERED:
        return _REGISTERED[name]
    module, _, cls = _BUILT_INS[name].partition(":")
    family: Family = getattr(importlib.import_module(f"fastvideo.integrations.diffusers.{module}"), cls)()
    return family


def known_models() -> tuple[str, ...]:
    """Return the names of the model classes that have a family.

    Example:
        >>> "WanTransformer3DModel" in known_models()
        True
    """
    return (*_BUILT_INS, *_REGISTERED)


def is_known(model: object) -> bool:
    """Return whether a model has a family."""
    return any(cls.__name__ in known_models() for cls in inspect.getmro(type(model)))


def find_family(model: nn.Module) -> Family:
    """Return a model's family.

    Raises:
        ValueError: It has none; the message lists the known models and says how to add one.
    """
    for cls in inspect.getmro(type(model)):
        if cls.__name__ in known_models():
            return find_by_name(cls.__name__)
    raise ValueError(
        f"expected a model of a known class, got {type(model).__name__}; known are {', '.join(known_models())}. Add one with "
        "fastvideo.integrations.diffusers.register_family(family), where family is an instance of your subclass of Family: "
        "its `sites` name the model's attention modules and the Processor of each"
    )


def blocks_of(model: nn.Module, *lists: str) -> Iterable[tuple[int, str, nn.Module]]:
    """Return number, name and module of each transformer block, across the lists of blocks in their order.

    Example:
        >>> model = nn.Module()
        >>> model.blocks = nn.ModuleList([nn.Identity(), nn.Identity()])
        >>> [(number, path) for number, path, _ in blocks_of(model, "blocks")]
        [(0, 'blocks.0'), (1, 'blocks.1')]
    """
    named = [(f"{name}.{i}", block) for name in lists for i, block in enumerate(getattr(model, name))]
    return [(number, path, block) for number, (path, block) in enumerate(named)]


def split_heads(attn: Any, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Return `[B, S, H * D]` tensors as `[B, S, H, D]`."""
    return [torch.unflatten(x, 2, (attn.heads, -1)) for x in tensors]


def project_out(attn: Any, x: torch.Tensor) -> torch.Tensor:
    """Apply the output projection and its dropout to attention's output, `[B, S, H, D]`."""
    projected: torch.Tensor = attn.to_out[1](attn.to_out[0](x.flatten(2, 3)))
    return projected
