"""A model's tokens shared by several devices: hooks that cut what goes into its blocks and join what comes out.

Every device is handed the whole inputs and returns the whole output. Between, each works on its own part of the video's
tokens; text is whole everywhere. Gradients add up as they do in data parallelism: let each device compute the loss on the
whole output and average gradients over the devices, and each parameter's gradient is one device's.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fastvideo.distributed import SequenceGroup, gather_sequence, split_lengths
from fastvideo.integrations.diffusers.family import Gather, ShardPlan, Split
from fastvideo.integrations.diffusers.state import current_state

__all__ = ["add_shard_hooks", "modules_named", "parameter_names", "split_inputs"]


class _SplitInputs:
    """A forward pre-hook that cuts arguments by name."""

    def __init__(self, path: str, names: tuple[str, ...], splits: dict[str, Split], group: SequenceGroup) -> None:
        self.path, self.names, self.splits, self.group = path, names, splits, group

    def __call__(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return split_inputs(self.path, self.names, self.splits, self.group, args, kwargs)


class _SplitOutputs:
    """A forward hook that cuts what a module returns."""

    def __init__(self, path: str, splits: dict[int, Split], group: SequenceGroup) -> None:
        self.path, self.splits, self.group = path, splits, group

    def __call__(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            return _split(f"{self.path}'s output", output, self.splits[0], self.group)
        return tuple(
            _split(f"{self.path}'s output {i}", x, self.splits[i], self.group) if i in self.splits else x
            for i, x in enumerate(output)
        )


class _GatherOutput:
    """A forward hook that joins the devices' parts of what a module returns, or of one of its outputs."""

    def __init__(self, gather: Gather, group: SequenceGroup) -> None:
        self.dim, self.output, self.group = gather.dim, gather.output, group

    def __call__(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        if self.output is None:
            return self._join(output)
        return tuple(self._join(x) if i == self.output else x for i, x in enumerate(output))

    def _join(self, x: torch.Tensor) -> torch.Tensor:
        state = current_state()
        return gather_sequence(x, self.dim, self.group, shard_lengths=None if state is None else state.shard_lengths)


def split_inputs(
    path: str,
    names: tuple[str, ...],
    splits: dict[str, Split],
    group: SequenceGroup,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call with those named in `splits` cut.

    Args:
        path: Name of the module, for messages.
        names: Its parameters, in order.
        splits: What is cut.
        group: The devices.
        args: Positional arguments.
        kwargs: Arguments by name.

    Raises:
        ValueError: There are fewer tokens than devices.
    """

    def cut(name: str, value: Any) -> Any:
        return _split(f"{path}'s {name}", value, splits[name], group) if name in splits else value

    return (
        (*(cut(name, value) for name, value in zip(names, args, strict=False)), *args[len(names) :]),
        {name: cut(name, value) for name, value in kwargs.items()},
    )


def _split(what: str, value: Any, split: Split, group: SequenceGroup) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)([_split(what, x, split, group) for x in value])
    if isinstance(value, int):
        lengths = _known_lengths(what)
        return min(max(value - sum(lengths[: group.rank]), 0), lengths[group.rank])
    if value is None or (split.num_dims is not None and value.dim() != split.num_dims):
        return value
    length = value.shape[split.dim]
    if length < group.size:
        raise ValueError(f"{what} has {length} tokens, fewer than the {group.size} devices that share them; use fewer devices")
    lengths = split_lengths(length, group.size)
    if (state := current_state()) is not None:
        state.shard_lengths = lengths
    # Plain indexing leaves each device the gradient of its own part, which averaging over devices makes whole.
    return value.narrow(split.dim, sum(lengths[: group.rank]), lengths[group.rank])


def _known_lengths(what: str) -> tuple[int, ...]:
    state = current_state()
    if state is None or state.shard_lengths is None:
        raise ValueError(f"{what} counts tokens, and none have been cut before it; cut the video earlier in the shard plan")
    return state.shard_lengths


def add_shard_hooks(model: nn.Module, plan: ShardPlan, group: SequenceGroup) -> Iterable[Any]:
    """Register a plan's hooks on a model's submodules and yield their handles.

    Raises:
        ValueError: A module that the plan names doesn't exist.
    """
    for path, entry in plan.items():
        for name, module in modules_named(model, path):
            if isinstance(entry, Gather):
                yield module.register_forward_hook(_GatherOutput(entry, group))
                continue
            outputs = {int(key): split for key, split in entry.items() if split.of_output}
            inputs = {str(key): split for key, split in entry.items() if not split.of_output}
            if outputs:
                yield module.register_forward_hook(_SplitOutputs(name, outputs, group))
            if inputs:
                hook = _SplitInputs(name, parameter_names(module), inputs, group)
                yield module.register_forward_pre_hook(hook, with_kwargs=True)


def modules_named(model: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    """Return the modules that a shard plan's path names, `"blocks.*"` each of a list, with their names.

    Raises:
        AttributeError: There is none.

    Example:
        >>> model = nn.Sequential(nn.ModuleList([nn.Identity(), nn.Identity()]))
        >>> [name for name, _ in modules_named(model, "0.*")]
        ['0.0', '0.1']
    """
    if not path.endswith(".*"):
        return [(path, model.get_submodule(path))]
    parent = path[: -len(".*")]
    return [(f"{parent}.{name}", child) for name, child in model.get_submodule(parent).named_children()]


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters of a module's `forward`, in order.

    Example:
        >>> parameter_names(nn.Linear(1, 1))
        ('input',)
    """
    return tuple(inspect.signature(type(module).forward).parameters)[1:]
