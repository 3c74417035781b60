"""The pair of hooks at a model's door: before a call they work out its phase and metadata, after it they put all back.

A compiled model (`torch.compile(model)`, or its blocks) runs the hooks as they are, outside of its graph. Where the call of a
model is part of a larger compiled function, Dynamo traces them: then what a trace must not hold (builders, caches) runs while
it is made, and its answer is kept under a name; and the step, where a rule asks for it, is a constant that Dynamo guards, so
that each step compiles anew.
"""

from __future__ import annotations

import functools
import itertools
import uuid
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fastvideo.attention.backends.abstract import AttentionMetadata
from fastvideo.compilation import constant_while_tracing, plain
from fastvideo.distributed import SequenceGroup
from fastvideo.forward_context import checkpoint_context_fn, restored, thread_state
from fastvideo.integrations.diffusers.family import Family, Processor, Split
from fastvideo.integrations.diffusers.shards import split_inputs
from fastvideo.integrations.diffusers.state import ForwardState, current_state, enter_state, leave_state, with_state
from fastvideo.integrations.diffusers.steps import StepCounter, told_grid, told_step
from fastvideo.integrations.plan import Plan, build_metadata

__all__ = ["CarryingCheckpoint", "ModelHook"]

_metadata: OrderedDict[str, AttentionMetadata] = OrderedDict()
"""Metadata by what it was built from. Index tensors are large, so only the last few geometries stay."""

_MAX_METADATA = 32

_Arguments = tuple[tuple[Any, ...], dict[str, Any]]
_Before = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], _Arguments]


class ModelHook:
    """Forward pre-hook of a model; its `after` is the forward hook.

    Args:
        family: The model's family.
        plan: What runs where and when.
        steps: Finds the step.
        group: The devices that share the video's tokens.
        names: Parameters of the model's `forward`, in order.
        splits: Which of the model's own inputs are cut.
        processors: Our processors, by the names of their attention modules.
    """

    def __init__(
        self,
        family: Family,
        plan: Plan,
        steps: StepCounter,
        group: SequenceGroup,
        names: tuple[str, ...],
        splits: dict[str, Split],
        processors: dict[str, Processor],
    ) -> None:
        self.family, self.plan, self.steps, self.group = family, plan, steps, group
        self.names, self.splits, self.processors = names, splits, processors
        self.keys = tuple(f"{name} {_told_apart(rule.builder_options)}" for name, rule in plan.builders)
        self.needed = tuple(tuple(sorted(plan.metadata_of_phase(phase))) for phase in range(len(plan.boundaries) + 1))
        self.cuts_text = tuple(
            any(row[phase].refuses_padding for row in plan.choices) for phase in range(len(plan.boundaries) + 1)
        )
        _run_uncompiled()

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Arguments:
        """Set the state of the call, and cut its inputs where devices share them."""
        if torch.compiler.is_dynamo_compiling():
            return self.before(model, args, kwargs)
        before: _Before = torch.compiler.disable(self.before)  # type: ignore[no-untyped-call]  # torch leaves it without
        return before(model, args, kwargs)

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Arguments:
        """Do the work of `__call__`."""
        if not torch.compiler.is_compiling():
            self._check_processors(model)
        inputs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        step = self._step(inputs)
        phase = 0
        for boundary in self.plan.boundaries:
            if step >= boundary:
                phase += 1
        # Set first, so that the second hook finds it whatever goes wrong below.
        state = ForwardState(self, phase, len(self.plan.builders), self.family.num_text(inputs))
        enter_state(state)
        if self.needed[phase]:
            state.metadata = self._build(model, inputs, phase, step)
        if self.cuts_text[phase]:
            state.text_lengths = real_text_lengths(self.family.text_mask(inputs))
        if getattr(model, "gradient_checkpointing", False) and torch.is_grad_enabled():
            CarryingCheckpoint.wrap(model)
        if self.splits:
            return split_inputs(type(model).__name__, self.names, self.splits, self.group, args, kwargs)
        return args, kwargs

    def after(self, _model: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        """Put back what was before the call; it runs after a failed call too."""
        leave_state(self)

    def _check_processors(self, model: nn.Module) -> None:
        for path, processor in self.processors.items():
            found: Any = model.get_submodule(path).processor
            if found is not processor:
                raise RuntimeError(
                    f"{path} of this {type(model).__name__} was given another processor, {type(found).__name__}, after apply; "
                    "call remove(model) before something sets processors, and apply(model) after it"
                )

    def _step(self, inputs: Mapping[str, Any]) -> int:
        if not self.plan.boundaries and torch.compiler.is_compiling():
            return 0  # reading it would compile a graph per step, and no rule asks
        if self.plan.boundaries:
            step = self.steps.current(inputs) if self.family.follows_scheduler(inputs) else told_step()
            if step is None:
                raise ValueError(
                    "the policy has rules on steps, and nobody says which step this call belongs to: apply it to the whole "
                    "pipeline and run that one, or call the model inside "
                    "`with fastvideo.integrations.diffusers.denoising_step(step):`"
                )
            if step == 0 and not torch.compiler.is_compiling():
                self._warn_of_idle_rules()
            return step
        return self.steps.hint() or 0

    def _warn_of_idle_rules(self) -> None:
        num_steps = self.steps.num_steps()
        if num_steps is not None and (idle := self.plan.idle_rules(num_steps)):
            warnings.warn(f"this run has {num_steps} steps, and {idle} in none of them", stacklevel=2)

    def _build(
        self, model: nn.Module, inputs: Mapping[str, Any], phase: int, step: int
    ) -> tuple[AttentionMetadata | None, ...]:
        grid = told_grid()
        latent, patch = (grid, (1, 1, 1)) if grid is not None else self.family.video_shape(model, inputs)
        tensors = [x for x in (inputs.get("hidden_states"), *inputs.values()) if isinstance(x, torch.Tensor)]
        device = tensors[0].device
        sizes = tuple(plain(int(size)) for size in (*latent, *patch))
        found: list[AttentionMetadata | None] = [None] * len(self.plan.builders)
        for number in self.needed[phase]:
            metadata = _metadata[self._remember(number, sizes, str(device))]
            is_same = torch.compiler.is_compiling() or metadata.current_timestep == step
            found[number] = metadata if is_same else replace(metadata, current_timestep=step)
        return tuple(found)

    # A method, because Dynamo of torch 2.11 hands no rule (a frozen dataclass) to what it runs while it traces.
    @constant_while_tracing
    def _remember(self, number: int, sizes: tuple[int, ...], device: str) -> str:
        """Build metadata once per geometry, keep it, and return its name: Dynamo keeps names and reads dicts."""
        key = f"{self.keys[number]} {sizes} {device}"
        if key not in _metadata:
            name, rule = self.plan.builders[number]
            # Caches of index tensors inside hold for training too.
            with torch.inference_mode(False), torch.no_grad():
                _metadata[key] = build_metadata(name, rule.builder_options, 0, sizes[:3], sizes[3:], device)
            while len(_metadata) > _MAX_METADATA:
                _metadata.popitem(last=False)
        return key


class CarryingCheckpoint:
    """A model's checkpoint function, such that each block is computed again in the state of its own forward call.

    Tiles that sparse attention has chosen in the forward pass are kept, so that a choice runs once.

    Args:
        original: diffusers' function or the user's: it takes a block and its arguments.
    """

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original

    def __call__(self, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run `block` under activation checkpointing."""
        state, snapshot = current_state(), thread_state.snapshot()

        def run(*inner: Any, **named: Any) -> Any:
            with restored(**snapshot), with_state(state):
                return block(*inner, **named)

        if torch.compiler.is_dynamo_compiling():
            return self.original(run, *args, **kwargs)
        # The function may be anybody's, and need not take a context of ours: its first call of the block is the forward pass.
        forward, recomputation = checkpoint_context_fn()
        calls = itertools.count()

        def run_and_keep(*inner: Any, **named: Any) -> Any:
            with recomputation if next(calls) else forward:
                return run(*inner, **named)

        return self.original(run_and_keep, *args, **kwargs)

    @classmethod
    def wrap(cls, model: nn.Module) -> None:
        """Put one around the model's function, if there is none yet; `enable_gradient_checkpointing` sets a bare one."""
        function: Any = model._gradient_checkpointing_func
        if not isinstance(function, cls):
            model._gradient_checkpointing_func = cls(function)  # type: ignore[assignment]  # diffusers' own attribute

    @classmethod
    def unwrap(cls, model: nn.Module) -> None:
        """Give the model its own function back."""
        function: Any = getattr(model, "_gradient_checkpointing_func", None)
        if isinstance(function, cls):
            model._gradient_checkpointing_func = function.original  # type: ignore[assignment]  # as above


@functools.cache
def _run_uncompiled() -> None:
    """Let Dynamo, which takes each hook of a compiled model for a function of its own, run ours as it is."""
    from torch._dynamo.eval_frame import skip_code  # the compiler is imported late: it takes a second

    skip_code(ModelHook.__call__.__code__)


def real_text_lengths(mask: torch.Tensor | None) -> tuple[int, ...] | None:
    """Return each sample's number of real text tokens; read once per forward call, from the device.

    Args:
        mask: `[B, R]`, nonzero where text is real; `None` where all of it is.

    Raises:
        NotImplementedError: Padding stands before or between real tokens.

    Example:
        >>> real_text_lengths(torch.tensor([[1, 1, 0], [1, 0, 0]]))
        (2, 1)
    """
    if mask is None:
        return None
    lengths = []
    for row in (mask != 0).tolist():
        length = sum(row)
        if not all(row[:length]):
            raise NotImplementedError(
                "a backend without padding masks needs padded text at the end, and this mask has it before or between real "
                "tokens; use a dense backend"
            )
        lengths.append(length)
    return tuple(lengths)


def _told_apart(options: Mapping[str, Any]) -> str:
    """Return a text that no other options have: equal ones share it where they are plain values, which a text says whole."""
    return repr(sorted(options.items())) if _is_plain(list(options.values())) else uuid.uuid4().hex


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)
