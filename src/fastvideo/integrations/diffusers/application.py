"""`apply` and `remove`: a model's or a pipeline's attention put on this system, and taken off it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
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
    Split,
    find_family,
    is_known,
    known_models,
)
from fastvideo.integrations.diffusers.hooks import CarryingCheckpoint, ModelHook
from fastvideo.integrations.diffusers.shards import add_shard_hooks, modules_named, parameter_names
from fastvideo.integrations.diffusers.steps import StepCounter
from fastvideo.integrations.plan import Plan
from fastvideo.integrations.policy import AttentionPolicy, as_policy

__all__ = ["Applied", "ParallelPlan", "Plans", "apply", "plan_of", "remove"]

_ATTRIBUTE = "_fastvideo_attention"


@dataclass(frozen=True)
class ParallelPlan:
    """Which devices share a video's tokens, and how.

    Attributes:
        mesh: A mesh of one dim, one with dims `"ring"` and `"ulysses"` or one of them, or a process group.
        layout: `"auto"`, `"ulysses"`, `"ring"` or `"gather"`, as of `DistributedAttention`; `fastvideo.distributed.plan`
            says what each costs.
        head_groups: Into how many groups a device's heads are cut at most, so that one travels while another is computed;
            `None` leaves it to the layer.
        exchange_dtype: `torch.float8_e4m3fn` sends in 8 bits, at inference; `None` sends tensors as they are.
        shards: Where a model's tokens are cut and joined, instead of what its family says.

    Example:
        >>> with sequence_parallel(None) as alone:  # yours: a mesh
        ...     ParallelPlan(alone, layout="ring", exchange_dtype=torch.float8_e4m3fn).layout
        'ring'
    """

    mesh: DeviceMesh | ProcessGroup | SequenceGroup
    layout: str = "auto"
    head_groups: int | None = None
    exchange_dtype: torch.dtype | None = None
    shards: ShardPlan | None = None


class Plans(dict[str, Plan]):
    """What runs where and when, by the name of each model."""

    def __str__(self) -> str:
        return "\n\n".join(f"{name}\n{plan}" for name, plan in self.items())


@dataclass(frozen=True)
class _Prepared:
    """All that `apply` puts on one model."""

    plan: Plan
    hook: ModelHook
    shards: ShardPlan
    group: SequenceGroup


class Applied:
    """What `apply` did to one model: enough to show it and to undo it.

    Attributes:
        plan: What runs where and when.
        ours: Our processors, by the names of their attention modules.
        before: The model's own processors, likewise.
        handles: The handles of the hooks.
        steps: What finds the step of a call.
    """

    def __init__(self, plan: Plan, ours: dict[str, Processor], steps: StepCounter) -> None:
        self.plan = plan
        self.ours = ours
        self.steps = steps
        self.before: dict[str, Any] = {}
        self.handles: list[Any] = []

    def undo(self, model: nn.Module) -> None:
        """Give the model its own processors back, where ours still stand, and take the hooks off."""
        for path, processor in self.before.items():
            attn: Any = model.get_submodule(path)
            if attn.processor is self.ours[path]:
                attn.processor = processor
        for handle in self.handles:
            handle.remove()
        CarryingCheckpoint.unwrap(model)


def apply(
    pipe_or_model: Any,
    attention: AttentionPolicy | BackendWish = "auto",
    parallel: DeviceMesh | ProcessGroup | SequenceGroup | ParallelPlan | None = None,
) -> Plans:
    """Run the attention of a diffusers pipeline or model by this system.

    Each model keeps its own projections, norms, positions, masks and streams. With `"auto"` the output is that of dense
    attention up to rounding. A second call replaces the first; `remove` undoes it.

    Args:
        pipe_or_model: A pipeline, all of whose known transformers are meant, or one model.
        attention: A policy, a backend's name for every place, or `"auto"`.
        parallel: The devices that share each video's tokens: a mesh of one dim, one with dims `"ring"` and `"ulysses"` or one
            of them, a process group, or a `ParallelPlan`, which says more. Every device calls with the whole inputs and gets
            the whole output. `None` shares nothing.

    Returns:
        What runs where and when, by the name of the model in the pipeline (`"model"` for one model); printable.

    Raises:
        TypeError: It is neither a model nor a pipeline, or `parallel` is of a wrong type.
        ValueError: A model is of an unknown class, has a processor or a parallelism of somebody else's, or the policy doesn't
            fit it.
        NotImplementedError: The model can't share its tokens over devices, or its tokens are no grid for a sparse backend.
        UnknownBackend: No backend has that name.
        BackendLoadError: A backend that is named has no class that can be had, as `NO_ATTENTION` has none.

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
    shared = parallel if parallel is None or isinstance(parallel, ParallelPlan) else ParallelPlan(parallel)
    with sequence_parallel(None if shared is None else shared.mesh) as group:
        pass
    # All are checked before any is changed.
    made = {name: _prepare(model, policy, group, shared, _steps_of(model, pipeline)) for name, model in models.items()}
    for name, model in models.items():
        _take_off(model)
        _put_on(model, made[name])
    return Plans({name: prepared.plan for name, prepared in made.items()})


def remove(pipe_or_model: Any) -> None:
    """Undo `apply`: the models run diffusers' own attention again. A model without it is left as it is.

    Raises:
        TypeError: It is neither a model nor a pipeline.
        ValueError: It has no model of a known class.

    Example:
        >>> from diffusers import WanTransformer3DModel
        >>> model = WanTransformer3DModel(
        ...     num_attention_heads=2, attention_head_dim=12, text_dim=8, freq_dim=8, ffn_dim=8, num_layers=1
        ... )
        >>> plans = apply(model, "TORCH_SDPA")
        >>> remove(model)
        >>> type(model.blocks[0].attn1.processor).__name__
        'WanAttnProcessor'
    """
    for _, model in _models(pipe_or_model):
        _take_off(model)


def plan_of(model: nn.Module) -> Plan | None:
    """Return what runs where and when in a model, or `None` where nothing was applied.

    Example:
        >>> from diffusers import WanTransformer3DModel
        >>> model = WanTransformer3DModel(
        ...     num_attention_heads=2, attention_head_dim=12, text_dim=8, freq_dim=8, ffn_dim=8, num_layers=1
        ... )
        >>> plans = apply(model, "TORCH_SDPA")
        >>> print(plan_of(model))
        role   layers  steps  backend
        self   0       all    TORCH_SDPA
        cross  0       all    TORCH_SDPA
    """
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


def _prepare(
    model: nn.Module, policy: AttentionPolicy, group: SequenceGroup, shared: ParallelPlan | None, steps: StepCounter
) -> _Prepared:
    """Check everything, and build what is put on the model, which stays as it is."""
    family = find_family(model)
    family.check(model)
    sites = tuple(family.sites(model))
    _check_model(model, family.name, sites, group)
    plan = Plan.resolve(policy, [site.place for site in sites], model_name=type(model).__name__)
    if plan.builders and family.without_grid:
        names = ", ".join(dict.fromkeys(name for name, _ in plan.builders))
        raise NotImplementedError(f"{names} works on a video's grid, and {family.without_grid}; use a dense backend")
    ours = {
        site.place.path: site.processor(_attend(site, choices, model.get_submodule(site.place.path), group, shared))
        for site, choices in zip(sites, plan.choices, strict=True)
    }
    shards, splits = _shards(model, group, shared)
    for path in shards:
        modules_named(model, path)
    hook = ModelHook(family, plan, steps, group, parameter_names(model), splits, ours)
    return _Prepared(plan, hook, shards, group)


def _steps_of(model: nn.Module, pipeline: Any | None) -> StepCounter:
    applied: Applied | None = getattr(model, _ATTRIBUTE, None)
    return StepCounter(pipeline, None if applied is None else applied.steps)


def _check_model(model: nn.Module, family: str, sites: tuple[Site, ...], group: SequenceGroup) -> None:
    name = type(model).__name__
    if getattr(model, "_parallel_config", None) is not None:
        raise ValueError(
            f"this {name} is parallel by diffusers' enable_parallelism; load it without, and pass parallel=mesh here"
        )
    applied: Applied | None = getattr(model, _ATTRIBUTE, None)
    for site in sites:
        path = site.place.path
        attn: Any = model.get_submodule(path)
        is_ours = applied is not None and attn.processor is applied.ours.get(path)
        processor = type(applied.before[path] if applied is not None and is_ours else attn.processor).__name__
        if processor not in site.replaces:
            raise ValueError(
                f"{path} of this {name} has a processor {processor}, whose work ours wouldn't do; expected "
                f"{' or '.join(site.replaces)}. Restore it, for example by unloading the adapter that set it"
            )
    known = {site.place.path for site in sites}
    others = [path for path, module in model.named_modules() if hasattr(module, "processor") and path not in known]
    if others:
        raise ValueError(f"this {name} has attention that the family {family!r} doesn't know: {', '.join(others)}")
    if group.size > 1 and any(module._compiled_call_impl is not None for module in model.modules()):
        raise ValueError(f"this {name} is compiled already, and what is compiled misses new hooks; apply first, then compile")


def _put_on(model: nn.Module, prepared: _Prepared) -> None:
    hook = prepared.hook
    applied = Applied(prepared.plan, hook.processors, hook.steps)
    for path, processor in hook.processors.items():
        attn: Any = model.get_submodule(path)
        applied.before[path] = attn.processor
        attn.processor = processor
    applied.handles = [
        *add_shard_hooks(model, prepared.shards, prepared.group),
        model.register_forward_pre_hook(hook, with_kwargs=True),
        model.register_forward_hook(hook.after, always_call=True),
    ]
    setattr(model, _ATTRIBUTE, applied)


def _attend(site: Site, choices: Any, attn: Any, group: SequenceGroup, shared: ParallelPlan | None) -> Attend:
    kind = VideoAttend if site.place.role == "self" else TextAttend
    sharing: dict[str, Any] = {}
    if shared is not None:
        sharing = {name: getattr(shared, name) for name in ("layout", "head_groups", "exchange_dtype")}
    return kind(site.place, choices, attn.heads, attn.inner_dim // attn.heads, group, sharing)


def _shards(model: nn.Module, group: SequenceGroup, shared: ParallelPlan | None) -> tuple[ShardPlan, dict[str, Split]]:
    """Return where a model's tokens are cut and joined inside it, and which of its own inputs are cut."""
    if group.size == 1:
        return {}, {}
    given = None if shared is None else shared.shards
    shards = dict(find_family(model).shard_plan(model) if given is None else given)
    own = shards.pop("", {})
    if isinstance(own, Gather):
        raise ValueError("a model's own output can't be gathered by its shard plan; name the module that makes it")
    if any(split.of_output for split in own.values()):
        raise ValueError("a model's own output can't be cut by its shard plan; name the module that makes it")
    return shards, {str(name): split for name, split in own.items()}


def _take_off(model: nn.Module) -> None:
    applied: Applied | None = getattr(model, _ATTRIBUTE, None)
    if applied is not None:
        applied.undo(model)
        delattr(model, _ATTRIBUTE)
