"""`apply` and `remove`: a model's or a pipeline's attention put on this system, and taken off it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from fastvideo.attention.selector import BackendWish
from fastvideo.distributed import SequenceGroup, sequence_parallel
from fastvideo.integrations.diffusers.attend import Attend, TextAttend, VideoAttend
from fastvideo.integrations.diffusers.family import (
    Gather,
    Processor,
    ShardPlan,
    Site,
    find_family,
    is_known,
    known_models,
)
from fastvideo.integrations.diffusers.hooks import ModelHook
from fastvideo.integrations.diffusers.shards import add_shard_hooks, parameter_names
from fastvideo.integrations.diffusers.steps import StepCounter
from fastvideo.integrations.plan import Plan
from fastvideo.integrations.policy import AttentionPolicy, as_policy

__all__ = ["Applied", "Plans", "apply", "plan_of", "remove"]

_ATTRIBUTE = "_fastvideo_attention"


class Plans(dict[str, Plan]):
    """What runs where and when, by the name of each model."""

    def __str__(self) -> str:
        return "\n\n".join(f"{name}\n{plan}" for name, plan in self.items())


class Applied:
    """What `apply` did to one model: enough to show it and to undo it.

    Attributes:
        plan: What runs where and when.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.processors: dict[str, Any] = {}
        self.handles: list[Any] = []

    def undo(self, model: nn.Module) -> None:
        """Give the model its own processors back and take the hooks off."""
        for path, processor in self.processors.items():
            model.get_submodule(path).processor = processor
        for handle in self.handles:
            handle.remove()


def apply(
    pipe_or_model: Any,
    attention: AttentionPolicy | BackendWish = "auto",
    parallel: DeviceMesh | ProcessGroup | SequenceGroup | None = None,
) -> Plans:
    """Run the attention of a diffusers pipeline or model by this system.

    Each model keeps its own projections, norms, positions, masks and streams. With `"auto"` the output is that of dense
    attention up to rounding. A second call replaces the first; `remove` undoes it.

    Args:
        pipe_or_model: A pipeline, all of whose known transformers are meant, or one model.
        attention: A policy, a backend's name for every place, or `"auto"`.
        parallel: The devices that share each video's tokens: a mesh of one dim, one with a dim `"ulysses"`, or a process
            group. Every device calls with the whole inputs and gets the whole output. `None` shares nothing.

    Returns:
        What runs where and when, by the name of the model in the pipeline (`"model"` for one model); printable.

    Raises:
        TypeError: It is neither a model nor a pipeline, or `parallel` is of a wrong type.
        ValueError: A model is of an unknown class, has a processor or a parallelism of somebody else's, or the policy doesn't
            fit it.
        NotImplementedError: The model can't share its tokens over devices.
        UnknownBackend: No backend has that name.

    Example:
        >>> import torch
        >>> from fastvideo.integrations.diffusers import AttentionPolicy, Rule, apply
        >>> try:
        ...     apply(torch.nn.Linear(1, 1))
        ... except ValueError as error:
        ...     print(str(error)[:54])
        expected a model of a known class, got Linear; known a
    """
    policy = as_policy(attention)
    models = dict(_models(pipe_or_model))
    pipeline = None if isinstance(pipe_or_model, nn.Module) else pipe_or_model
    with sequence_parallel(parallel) as group:
        pass
    # All are checked before any is changed.
    plans = Plans({name: _plan(model, policy, group) for name, model in models.items()})
    for name, model in models.items():
        _take_off(model)
        _put_on(model, plans[name], group, StepCounter(pipeline))
    return plans


def remove(pipe_or_model: Any) -> None:
    """Undo `apply`: the models run diffusers' own attention again. A model without it is left as it is.

    Raises:
        TypeError: It is neither a model nor a pipeline.
        ValueError: It has no model of a known class.
    """
    for _, model in _models(pipe_or_model):
        _take_off(model)


def plan_of(model: nn.Module) -> Plan | None:
    """Return what runs where and when in a model, or `None` where nothing was applied."""
    applied: Applied | None = getattr(model, _ATTRIBUTE, None)
    return None if applied is None else applied.plan


def _models(pipe_or_model: Any) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(pipe_or_model, nn.Module):
        model = getattr(pipe_or_model, "_orig_mod", pipe_or_model)  # inside of what torch.compile returns
        find_family(model)
        yield "model", model
        return
    components = getattr(pipe_or_model, "components", None)
    if not isinstance(components, dict):
        raise TypeError(f"expected a diffusers pipeline or model, got {type(pipe_or_model).__name__}")
    modules = {name: getattr(x, "_orig_mod", x) for name, x in components.items() if isinstance(x, nn.Module)}
    for name, module in modules.items():
        if name.startswith("transformer"):
            find_family(module)  # raises for one that isn't known
    found = {name: module for name, module in modules.items() if is_known(module)}
    if not found:
        raise ValueError(
            f"{type(pipe_or_model).__name__} has no model of a known class; it has "
            f"{', '.join(type(module).__name__ for module in modules.values())}, and known are {', '.join(known_models())}"
        )
    yield from found.items()


def _plan(model: nn.Module, policy: AttentionPolicy, group: SequenceGroup) -> Plan:
    name, family = type(model).__name__, find_family(model)
    sites = tuple(family.sites(model))
    family.check(model, group.size)
    if getattr(model, "_parallel_config", None) is not None:
        raise ValueError(
            f"this {name} is parallel by diffusers' enable_parallelism; load it without, and pass parallel=mesh here"
        )
    applied: Applied | None = getattr(model, _ATTRIBUTE, None)
    own = {} if applied is None else applied.processors
    for site in sites:
        path = site.place.path
        processor = type(own.get(path, model.get_submodule(path).processor)).__name__
        if processor not in site.replaces:
            raise ValueError(
                f"{path} of this {name} has a processor {processor}, whose work ours wouldn't do; expected "
                f"{' or '.join(site.replaces)}. Restore it, for example by unloading the adapter that set it"
            )
    known = {site.place.path for site in sites}
    others = [path for path, module in model.named_modules() if hasattr(module, "processor") and path not in known]
    if others:
        raise ValueError(f"this {name} has attention that the family {family.name!r} doesn't know: {', '.join(others)}")
    if group.size > 1:
        family.shard_plan(model)
        if any(module._compiled_call_impl is not None for module in model.modules()):
            raise ValueError(
                f"this {name} is compiled already, and what is compiled misses new hooks; apply first, then compile"
            )
    return Plan.resolve(policy, [site.place for site in sites], model_name=name)


def _put_on(model: nn.Module, plan: Plan, group: SequenceGroup, steps: StepCounter) -> None:
    family, applied = find_family(model), Applied(plan)
    ours: dict[str, Processor] = {}
    for site, choices in zip(family.sites(model), plan.choices, strict=True):
        path, attn = site.place.path, model.get_submodule(site.place.path)
        applied.processors[path] = attn.processor
        ours[path] = site.processor(_attend(site, choices, attn, group))
        attn.processor = ours[path]  # type: ignore[assignment]  # no module
    shards: ShardPlan = family.shard_plan(model) if group.size > 1 else {}
    own = shards.get("", {})
    if isinstance(own, Gather):
        raise ValueError(f"the family {family.name!r} gathers the model's own output; name the module that makes it instead")
    splits = {str(name): split for name, split in own.items()}
    hook = ModelHook(family, plan, steps, group, parameter_names(model), splits, ours)
    applied.handles = [
        *add_shard_hooks(model, shards, group),
        model.register_forward_pre_hook(hook, with_kwargs=True),
        model.register_forward_hook(hook.after, always_call=True),
    ]
    setattr(model, _ATTRIBUTE, applied)


def _attend(site: Site, choices: Any, attn: Any, group: SequenceGroup) -> Attend:
    kind = VideoAttend if site.place.role == "self" else TextAttend
    return kind(site.place, choices, attn.heads, attn.inner_dim // attn.heads, group)


def _take_off(model: nn.Module) -> None:
    applied: Applied | None = getattr(model, _ATTRIBUTE, None)
    if applied is not None:
        applied.undo(model)
        delattr(model, _ATTRIBUTE)
