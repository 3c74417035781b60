"""Tensors of a shared run against those of a run alone: where a part belongs, how far it is off, and which is the first."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from fastvideo.distributed.agreement import RanksDisagree, agree
from fastvideo.distributed.mesh import SequenceGroup
from fastvideo.distributed.parity_record import Label

__all__ = [
    "Divergence",
    "ErrorsTold",
    "Place",
    "Row",
    "find_divergences",
    "fingerprint",
    "gather_objects",
    "measure",
    "place_of",
    "sum_over_ranks",
]

Shape = tuple[int, ...]
_EPS_OF_32_BITS = torch.finfo(torch.float32).eps


class Place(NamedTuple):
    """Where a rank's tensor belongs in the whole one: `length` from `start` along `dim`, or all of it where `dim` is `None`."""

    dim: int | None
    start: int = 0
    length: int = 0

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """Return the part of the whole tensor."""
        return whole if self.dim is None else whole.narrow(self.dim, self.start, self.length)


def place_of(whole: Shape, shapes: Sequence[Shape], rank: int) -> Place | None:
    """Return where a rank's tensor belongs, from the shapes on all ranks, or `None` where they fit in no way.

    Example:
        >>> place_of((2, 5), [(2, 3), (2, 2)], 1)
        Place(dim=1, start=3, length=2)
    """
    if all(shape == whole for shape in shapes):
        return Place(None)
    for dim in range(len(whole)):
        fits = all(
            len(shape) == len(whole) and (*shape[:dim], *shape[dim + 1 :]) == (*whole[:dim], *whole[dim + 1 :])
            for shape in shapes
        )
        if fits and sum(shape[dim] for shape in shapes) == whole[dim]:
            return Place(dim, sum(shape[dim] for shape in shapes[:rank]), shapes[rank][dim])
    return None


@dataclass(frozen=True)
class Divergence:
    """A tensor that differs.

    Attributes:
        label: Where it was seen.
        ranks: The ranks on which it differs most, or whose calls differ.
        kind: `"value"`: a shared run's differs from that of a run alone. `"alone"`: runs alone already differ between ranks.
            `"shape"`: the parts on all ranks don't make up the whole. `"calls"`: not every run has it.
        max_error: Largest difference.
        max_budget: What it may be.
        mean_error: Mean difference.
        mean_budget: What it may be.
    """

    label: Label
    ranks: tuple[int, ...]
    kind: str
    max_error: float = math.nan
    max_budget: float = math.nan
    mean_error: float = math.nan
    mean_budget: float = math.nan

    def __str__(self) -> str:
        who = f"rank{'s' if len(self.ranks) > 1 else ''} {', '.join(map(str, self.ranks))}"
        if self.kind == "alone":
            return f"{self.label}: already different on {who} when run alone; inputs, weights or devices differ"
        if self.kind == "shape":
            return f"{self.label}: the shapes of its parts on {who} don't make up the whole"
        if self.kind == "calls":
            return f"{self.label}: seen in some runs or ranks and not in others, on {who}"
        return (
            f"{self.label}, most on {who}: max error {self.max_error:.3g}, where rounding explains {self.max_budget:.3g}; "
            f"mean {self.mean_error:.3g} and {self.mean_budget:.3g}"
        )


@dataclass(frozen=True)
class Row:
    """How far one rank's tensor is off. Errors come in one or two readings: as it is, and summed over ranks.

    Attributes:
        errors: Largest and summed difference per reading.
        noise: Largest and summed difference that rounding makes.
        magnitude: Largest and summed magnitude.
        count: Elements.
        eps: Machine epsilon of the tensor's dtype.
        fingerprint: One number for the whole tensor of the run alone.
        problem: `"shape"`, `"calls"` or empty.
    """

    errors: tuple[tuple[float, float], ...] = ()
    noise: tuple[float, float] = (0.0, 0.0)
    magnitude: tuple[float, float] = (0.0, 0.0)
    count: int = 0
    eps: float = 0.0
    fingerprint: float = 0.0
    problem: str = ""


def measure(readings: Sequence[torch.Tensor], alone: torch.Tensor, noisy: torch.Tensor, whole_fingerprint: float) -> Row:
    """Return the errors of `readings` and of `noisy` against `alone`, all of one shape."""
    errors = tuple(_difference(reading, alone) for reading in readings)
    size = alone.double().abs().nan_to_num(nan=0.0, posinf=0.0)
    magnitude = (float(size.max()), float(size.sum())) if alone.numel() else (0.0, 0.0)
    eps = torch.finfo(alone.dtype).eps
    return Row(errors, _difference(noisy, alone), magnitude, alone.numel(), eps, whole_fingerprint)


def _difference(x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    if not y.numel():
        return 0.0, 0.0
    x, y = x.double(), y.double()
    same = (x == y) | (x.isnan() & y.isnan())
    distance = torch.where(same, 0.0, (x - y).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
    return float(distance.max()), float(distance.sum())


def fingerprint(x: torch.Tensor) -> float:
    """Return a number that changes with values and with their order."""
    flat = x.detach().flatten()
    weights = torch.arange(flat.numel(), device=x.device).mul_(7919).remainder_(101).to(torch.float32).sub_(50)
    return float((flat.to(torch.float32) * weights).sum(dtype=torch.float64))


def find_divergences(
    rows_by_rank: Sequence[Mapping[Label, Row]], ranks: Sequence[int], factor: float, floor_ulps: float | None
) -> tuple[Divergence, ...]:
    """Return what differs, in the order of the first rank's rows: forward, then backward."""
    labels = in_order(list(dict.fromkeys(label for rows in rows_by_rank for label in rows)))
    found = (_judge(label, [rows.get(label) for rows in rows_by_rank], ranks, factor, floor_ulps) for label in labels)
    return tuple(divergence for divergence in found if divergence is not None)


def in_order(labels: Sequence[Label]) -> list[Label]:
    """Return labels in the order in which a pass comes by: outputs, then gradients.

    A parameter's gradient, which is read at the end, belongs right after that of its layer's output, unless the layer has
    parts, whose gradients are computed in between.
    """
    has_parts = {label.layer[: end.start()] for label in labels for end in re.finditer(r"\.", label.layer)} | {""}
    first = {label.layer: place for place, label in reversed(list(enumerate(labels))) if label.is_gradient}

    def key(labelled: tuple[int, Label]) -> tuple[bool, float]:
        place, label = labelled
        comes_early = label.is_parameter and label.layer not in has_parts
        return label.is_gradient, first[label.layer] + 0.5 if comes_early else place

    return [label for _, label in sorted(enumerate(labels), key=key)]


def _judge(
    label: Label, rows: Sequence[Row | None], ranks: Sequence[int], factor: float, floor_ulps: float | None
) -> Divergence | None:
    present = [row for row in rows if row is not None]
    for problem in ("calls", "shape"):
        wrong = tuple(
            rank
            for rank, row in zip(ranks, rows, strict=True)
            if (row is None and problem == "calls") or (row and row.problem == problem)
        )
        if wrong:
            return Divergence(label, wrong, problem)
    eps = max(row.eps for row in present)
    floor = eps * ((1.0 if eps > _EPS_OF_32_BITS else 8.0) if floor_ulps is None else floor_ulps)
    size, count = sum(row.magnitude[1] for row in present), max(1, sum(row.count for row in present))
    differing = _differing_alone(present, ranks, floor, factor)
    if differing:
        return Divergence(label, differing, "alone")
    max_budget = factor * max(row.noise[0] for row in present) + floor * max(row.magnitude[0] for row in present)
    mean_budget = (factor * sum(row.noise[1] for row in present) + floor * size) / count
    readings = []
    for reading in range(len(present[0].errors)):
        largest = [row.errors[reading][0] for row in present]
        mean = sum(row.errors[reading][1] for row in present) / count
        readings.append((max(largest), mean, ranks[largest.index(max(largest))]))
    max_error, mean_error, worst = min(readings)
    if max_error <= max_budget and mean_error <= mean_budget:
        return None
    return Divergence(label, (worst,), "value", max_error, max_budget, mean_error, mean_budget)


def _differing_alone(rows: Sequence[Row], ranks: Sequence[int], floor: float, factor: float) -> tuple[int, ...]:
    """Return the ranks whose run alone isn't that of most, or of rank 0 in equal halves."""
    # Weights of a fingerprint are up to 50; devices of one kind compute the same numbers bit for bit.
    tolerance = 50 * max(floor * row.magnitude[1] + factor * row.noise[1] for row in rows)
    prints = [row.fingerprint for row in rows]
    sizes = [sum(_is_close(one, other, tolerance) for other in prints) for one in prints]
    meant = prints[sizes.index(max(sizes))]
    return tuple(rank for rank, value in zip(ranks, prints, strict=True) if not _is_close(value, meant, tolerance))


def _is_close(x: float, y: float, tolerance: float) -> bool:
    return x == y or (math.isnan(x) and math.isnan(y)) or abs(x - y) <= tolerance


class ErrorsTold:
    """A context in which an error on one rank ends the others too, which would wait for it.

    Args:
        group: The ranks.

    Raises:
        RanksDisagree: A rank raised, and the others didn't or raised something else. The message says which and what.

    Example:
        >>> with ErrorsTold(SequenceGroup("", (0,), 0)):
        ...     pass
    """

    def __init__(self, group: SequenceGroup) -> None:
        self._group = group

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, RanksDisagree):
            _agree_on(self._group, f"raised {type(error).__name__}: {error}")


def gather_objects(value: Any, group: SequenceGroup) -> list[Any]:
    """Return every rank's value in the order of shards, on every rank."""
    _agree_on(group, "gathers objects")
    return _gathered(value, group)


def sum_over_ranks(x: torch.Tensor, group: SequenceGroup) -> torch.Tensor:
    """Return the sum of every rank's tensor, on every rank."""
    _agree_on(group, f"adds up {tuple(x.shape)} of {x.dtype}")
    x = x.clone()
    for part in (group,) if group.name or group.size == 1 else (_part(group.ulysses), _part(group.ring)):
        if part.size > 1:
            dist.all_reduce(x, group=_process_group(part))
    return x


def _agree_on(group: SequenceGroup, step: str) -> None:
    agree(torch.empty(0), group, operation="check_parallel_parity", step=step)


def _gathered(value: Any, group: SequenceGroup) -> list[Any]:
    if group.size == 1:
        return [value]
    if group.name:
        found: list[Any] = [None] * group.size
        dist.all_gather_object(found, value, group=_process_group(group))
        return found
    return [part for row in _gathered(_gathered(value, _part(group.ulysses)), _part(group.ring)) for part in row]


def _part(group: SequenceGroup | None) -> SequenceGroup:
    if group is None:
        raise ValueError("expected the ranks of a process group or of a mesh with dims 'ring' and 'ulysses'")
    return group


def _process_group(group: SequenceGroup) -> dist.ProcessGroup:
    return torch._C._distributed_c10d._resolve_process_group(group.name)  # type: ignore[arg-type]
