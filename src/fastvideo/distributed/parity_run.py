"""One run of a module for `check_parallel_parity`: its outputs, its loss, its gradients, taken down by label."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastvideo.distributed.mesh import SequenceGroup
from fastvideo.distributed.parity_compare import Place, fingerprint, gather_objects, place_of
from fastvideo.distributed.parity_record import Label, Recorder, Rounding, flatten

__all__ = ["Runner", "Taken", "input_label", "without_meshes"]

_SEED = 0


@dataclass
class Taken:
    """What one run showed.

    Attributes:
        values: Tensors, or the parts of them that this rank compares.
        shapes: The shapes of the tensors.
        fingerprints: One number for each whole tensor.
        output_shapes: Shapes of the module's outputs by path.
    """

    values: dict[Label, torch.Tensor] = field(default_factory=dict)
    shapes: dict[Label, tuple[int, ...]] = field(default_factory=dict)
    fingerprints: dict[Label, float] = field(default_factory=dict)
    output_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def take(self, label: Label, tensor: torch.Tensor, places: Mapping[Label, Place] | None) -> None:
        self.shapes[label] = tuple(tensor.shape)
        if places is None:
            self.values[label] = tensor.clone()
        elif label in places:
            self.fingerprints[label] = fingerprint(tensor)
            self.values[label] = places[label].cut(tensor).clone()


@dataclass
class Runner:
    """Runs a module again and again from the same random state.

    Attributes:
        module: The module.
        loss: The loss of its outputs, or `None`.
        backward: Run a backward pass too.
        only: Which submodules to look at.
        by_name: Inputs are handed over by name.
    """

    module: nn.Module
    loss: Callable[[Any], torch.Tensor] | None
    backward: bool
    only: Callable[[str], bool] | None
    by_name: bool

    def run(
        self,
        inputs: Mapping[Any, Any],
        group: SequenceGroup,
        output_shapes: Mapping[str, tuple[int, ...]] | None,
        *,
        places: Mapping[Label, Place] | None = None,
        rounding: Rounding | None = None,
    ) -> Taken:
        """Run the module on inputs that `group` shares.

        Args:
            inputs: This rank's inputs.
            group: The ranks.
            output_shapes: Shapes of the module's whole outputs by path; `None` runs forward only, to see them.
            places: Which part of each tensor to keep; `None` means all of it.
            rounding: Perturbs inputs and values on their way.
        """
        taken = Taken()

        def keep(label: Label, tensor: torch.Tensor) -> None:
            if output_shapes is None:
                taken.shapes[label] = tuple(tensor.shape)
            else:
                taken.take(label, tensor, places)

        recorder = Recorder(self.module, keep, self.only, rounding)
        is_backward = self.backward and output_shapes is not None
        leaves = {name: _leaf(x, is_backward, rounding) for name, x in inputs.items()}
        with torch.random.fork_rng(), _gradients_set_aside(self.module), torch.set_grad_enabled(is_backward):
            torch.manual_seed(_SEED)
            with recorder.in_forward():
                output = self.module(**leaves) if self.by_name else self.module(*leaves.values())
            taken.output_shapes = {path: tuple(x.shape) for path, x in flatten(output)}
            if is_backward and output_shapes is not None:
                total = self._total(output, group, output_shapes)
                if total is not None:
                    total.backward()  # type: ignore[no-untyped-call]
                self._keep_gradients(leaves, keep)
        return taken

    def _total(self, output: Any, group: SequenceGroup, whole_shapes: Mapping[str, tuple[int, ...]]) -> torch.Tensor | None:
        """Return this rank's share of the loss, or `None` where nothing has a gradient."""
        tensors = dict(flatten(output))
        all_shapes = gather_objects({path: tuple(x.shape) for path, x in tensors.items()}, group)
        total: torch.Tensor | None = None
        shares = set()
        for index, (path, x) in enumerate(tensors.items()):
            known = path in whole_shapes and all(path in shapes for shapes in all_shapes)
            place = place_of(whole_shapes[path], [shapes[path] for shapes in all_shapes], group.rank) if known else None
            if place is None or not x.requires_grad:
                continue
            share = 1 / group.size if place.dim is None else 1.0
            shares.add(share)
            generator = torch.Generator().manual_seed(_SEED + index)
            weights = place.cut(torch.randn(whole_shapes[path], generator=generator)).to(x)
            part = share * (x * weights).sum()
            total = part if total is None else total + part
        if self.loss is None or not shares:
            return total
        if len(shares) > 1:
            raise ValueError(
                "some outputs are whole on every rank and some aren't, so loss= has no one share; leave it to None"
            )
        return shares.pop() * self.loss(output)

    def _keep_gradients(self, leaves: Mapping[Any, Any], keep: Callable[[Label, torch.Tensor], None]) -> None:
        for name, leaf in leaves.items():
            if isinstance(leaf, torch.Tensor) and leaf.grad is not None:
                keep(input_label(name), leaf.grad)
        for name, parameter in self.module.named_parameters():
            layer, _, own = name.rpartition(".")
            if parameter.grad is not None and (self.only is None or self.only(layer)):
                keep(Label(layer, 0, f"parameter {own!r}", True), parameter.grad)


def input_label(name: Any) -> Label:
    return Label("", 0, f"input {name!r}", True)


def _leaf(x: Any, needs_grad: bool, rounding: Rounding | None) -> Any:
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        return x
    x = x.detach() if rounding is None else rounding(x.detach())
    return x.clone().requires_grad_(needs_grad)


@contextlib.contextmanager
def _gradients_set_aside(module: nn.Module) -> Iterator[None]:
    before = {parameter: parameter.grad for parameter in module.parameters()}
    for parameter in before:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, grad in before.items():
            parameter.grad = grad


@contextlib.contextmanager
def without_meshes(module: nn.Module) -> Iterator[None]:
    """Let layers that name their own ranks run alone."""
    before = [(layer, layer.sequence_group) for layer in module.modules() if hasattr(layer, "sequence_group")]
    for layer, _ in before:
        layer.sequence_group = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer, group in before:
            layer.sequence_group = group
