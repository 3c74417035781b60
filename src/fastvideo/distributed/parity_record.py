"""What passes through a module's submodules, forward and backward, taken down by hooks."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

__all__ = ["Label", "Recorder", "Rounding", "flatten"]


class Label(NamedTuple):
    """Where a tensor was seen.

    Attributes:
        layer: Dotted name of the submodule; empty for the module itself.
        call: How many calls of it came before, in one forward pass.
        tensor: Which tensor: `"output"`, `"output[1]"`, `"input 'q'"`, `"parameter 'weight'"`.
        is_gradient: It is the gradient with respect to that tensor.
    """

    layer: str
    call: int
    tensor: str
    is_gradient: bool = False

    def __str__(self) -> str:
        call = f" (call {self.call + 1})" if self.call else ""
        return f"{self.layer or 'the module'}{call}: {'gradient of ' if self.is_gradient else ''}{self.tensor}"

    @property
    def is_parameter(self) -> bool:
        """Whether this is a parameter's gradient."""
        return self.tensor.startswith("parameter ")


def flatten(value: Any, path: str = "output") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the floating point tensors in a value of tuples, lists, mappings and dataclasses, each with its path.

    Example:
        >>> [path for path, _ in flatten((torch.zeros(1), {"a": torch.zeros(1)}))]
        ['output[0]', "output[1]['a']"]
    """
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield path, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from flatten(part, f"{path}[{key!r}]")
    elif _is_dataclass(value):
        for name, part in _fields_of(value).items():
            yield from flatten(part, f"{path}.{name}")
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for index, part in enumerate(value):
            yield from flatten(part, f"{path}[{index}]")


def replace_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return the value with its floating point tensors changed."""
    if isinstance(value, torch.Tensor):
        return change(value) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return _with_items(value, {key: replace_tensors(part, change) for key, part in value.items()})
    if _is_dataclass(value):
        changed = copy.copy(value)
        for name, part in _fields_of(value).items():
            object.__setattr__(changed, name, replace_tensors(part, change))  # also of a frozen one
        return changed
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(replace_tensors(part, change) for part in value))
    if isinstance(value, tuple | list):
        return type(value)(replace_tensors(part, change) for part in value)
    return value


def _with_items(value: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """Return a mapping like `value` with other items under its keys."""
    if _is_dataclass(value):  # items are fields too, as in the outputs of diffusers and transformers
        return type(value)(**items)
    if not isinstance(value, dict):
        return type(value)(items)  # type: ignore[call-arg]
    changed = copy.copy(value)  # a defaultdict is made of more than its items
    changed.update(items)
    return changed


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _fields_of(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if hasattr(value, field.name)}


class Rounding:
    """Rounds values one unit in the last place up or down, by chance."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        signs = torch.randint(0, 2, x.shape, generator=self._generator, dtype=torch.int8).to(x.device) * 2 - 1
        return x * (1 + torch.finfo(x.dtype).eps * signs.to(x.dtype))


class Recorder:
    """Calls `keep(label, tensor)` for every output of a submodule and, in a backward pass, every gradient of one.

    Args:
        module: The module.
        keep: What to do with a tensor.
        only: Which submodules to look at, by dotted name.
        rounding: Changes the outputs and their gradients of what computes: submodules without parts, and attention layers.
    """

    def __init__(
        self,
        module: nn.Module,
        keep: Callable[[Label, torch.Tensor], None],
        only: Callable[[str], bool] | None,
        rounding: Rounding | None,
    ) -> None:
        self._module, self._keep, self._only, self._rounding = module, keep, only, rounding
        self._calls: Counter[str] = Counter()

    @contextlib.contextmanager
    def in_forward(self) -> Iterator[None]:
        """Take down the calls made inside. A forward pass repeated by activation checkpointing comes later and isn't one."""
        handles = [layer.register_forward_hook(self._hook_of(name, layer)) for name, layer in self._module.named_modules()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook_of(self, name: str, layer: nn.Module) -> Callable[[nn.Module, Any, Any], Any]:
        computes = not any(True for _ in layer.children()) or hasattr(layer, "sequence_group")
        rounding = self._rounding if computes else None
        is_wanted = self._only is None or self._only(name)

        def hook(_layer: nn.Module, _arguments: Any, output: Any) -> Any:
            call = self._calls[name]
            self._calls[name] += 1
            if rounding is not None:
                output = replace_tensors(output, rounding)
            for path, tensor in flatten(output):
                if is_wanted:
                    self._keep(Label(name, call, path), tensor.detach())
                if tensor.requires_grad:
                    on_gradient = self._gradient_hook(Label(name, call, path, True), is_wanted, rounding)
                    tensor.register_hook(on_gradient)  # type: ignore[no-untyped-call]
            return output

        return hook

    def _gradient_hook(
        self, label: Label, is_wanted: bool, rounding: Rounding | None
    ) -> Callable[[torch.Tensor], torch.Tensor | None]:
        def hook(grad: torch.Tensor) -> torch.Tensor | None:
            changed = grad if rounding is None else rounding(grad)
            if is_wanted:
                self._keep(label, changed.detach())
            return None if rounding is None else changed

        return hook
