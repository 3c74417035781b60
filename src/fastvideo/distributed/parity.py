"""`check_parallel_parity`: does a module give one rank's numbers on many, and if not, which layer is the first that doesn't?

Each rank runs the module three times on the same inputs and random state: shared with the others, alone, and alone with every
value rounded by chance one unit in the last place up or down, forward and backward. The last run says how far rounding alone
carries each tensor, which is the budget for the first: the order of a sum may change, a value may not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from fastvideo.distributed.mesh import LOCAL, SequenceGroup, as_sequence_group, current_sequence_group, sequence_parallel
from fastvideo.distributed.parity_compare import (
    Divergence,
    ErrorsTold,
    Place,
    Row,
    find_divergences,
    gather_objects,
    measure,
    place_of,
    sum_over_ranks,
)
from fastvideo.distributed.parity_record import Label, Rounding
from fastvideo.distributed.parity_run import Runner, Taken, input_label, without_meshes
from fastvideo.distributed.shards import split_lengths

__all__ = ["Divergence", "ParityError", "ParityReport", "check_parallel_parity"]

_ROUNDING_SEED = 1


class ParityError(AssertionError):
    """Several ranks don't give one rank's numbers. The message names the first layer and tensor that differ."""


@dataclass(frozen=True)
class ParityReport:
    """What `check_parallel_parity` found, the same on every rank.

    Attributes:
        world_size: Ranks that shared the module.
        num_compared: Tensors that were compared.
        divergences: Those that differ: in the order of the forward pass, then in that of the backward pass.
    """

    world_size: int
    num_compared: int
    divergences: tuple[Divergence, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing differs."""
        return not self.divergences

    @property
    def first(self) -> Divergence | None:
        """What differs first, or `None`."""
        return self.divergences[0] if self.divergences else None

    def raise_if_failed(self) -> None:
        """Raise the report where something differs.

        Raises:
            ParityError: Something does.
        """
        if not self.passed:
            raise ParityError(str(self))

    def __str__(self) -> str:
        if self.passed:
            return f"{self.world_size} ranks give one rank's numbers in all {self.num_compared} tensors"
        rest = len(self.divergences) - 1
        more = f"; {rest} more of {self.num_compared} tensors differ after it" if rest else ""
        return f"{self.world_size} ranks differ from one, first at {self.first}{more}"


def check_parallel_parity(
    module: nn.Module,
    inputs: Mapping[str, Any] | Sequence[Any],
    *,
    mesh: DeviceMesh | ProcessGroup | SequenceGroup | None = None,
    shard: Mapping[str | int, int] | None = None,
    shard_lengths: Sequence[int] | None = None,
    loss: Callable[[Any], torch.Tensor] | None = None,
    backward: bool = True,
    only: Callable[[str], bool] | None = None,
    factor: float = 2.0,
    floor_ulps: float | None = None,
) -> ParityReport:
    """Run a module on one rank and on all, and name the first layer and tensor that differ.

    Call it on every rank with the same weights and the same whole inputs. Outputs of every submodule, the gradients with
    respect to them, to the inputs and to the parameters are compared; what is cut along one dim is compared part by part.
    The global loss is the sum over ranks of local losses: a gradient of what every rank holds may be whole on each, or add
    up to the whole one; a parameter's has to add up. Memory holds two shares of all compared tensors; `only` makes them fewer.
    The module is run eagerly. The forward context of the caller holds in every run.

    Args:
        module: What is tested. Dropout has to be off.
        inputs: The whole inputs, by name or in order; floating point tensors get gradients.
        mesh: Who shares the sequence; `None` means who would in a layer called here.
        shard: Dim along which an input is cut, by its name or number; others go whole to every rank. `None` cuts nothing: the
            module shards its sequence itself.
        shard_lengths: Length of each rank's part; `None` cuts as evenly as it goes. Layers are told where all inputs are cut
            alike; where they aren't, and not into equal parts, the module has to tell its layers itself.
        loss: The loss of a rank's outputs, a sum over their elements; `None` weighs outputs with fixed random numbers. What
            every rank returns whole counts with a share of one over the number of ranks.
        backward: Run and compare the backward pass too.
        only: Which submodules to compare, by dotted name; `None` means all.
        factor: How many times the effect of rounding a tensor may differ.
        floor_ulps: What it may differ in any case, in units in the last place of its largest (its mean) magnitude; `None` means
            1 in 16 bits and 8 in more.

    Returns:
        The report, the same on every rank.

    Raises:
        TypeError: `module` is no module, or `inputs` no mapping and no sequence.
        ValueError: `shard` names an input that isn't there or no tensor, or a dim that it lacks, or the lengths don't fit; or
            there was nothing to compare, because no wanted submodule returns floating point tensors.
        RanksDisagree: One rank raised, or made other calls; the message names it and the error, on every rank.

    Example:
        >>> str(check_parallel_parity(nn.Linear(3, 2), [torch.ones(4, 3)]))
        "1 ranks give one rank's numbers in all 5 tensors"
    """
    group = as_sequence_group(mesh) or current_sequence_group()
    with ErrorsTold(group):
        module = getattr(module, "_orig_mod", module)
        if not isinstance(module, nn.Module):
            raise TypeError(f"expected module as an nn.Module, whose layers are compared, got {type(module).__name__}")
        whole = _named(inputs)
        cuts, lengths = _cuts(whole, shard or {}, shard_lengths, group)
        own = {name: cuts[name].cut(x) if name in cuts else x for name, x in whole.items()}
        runner = Runner(module, loss, backward, only, isinstance(inputs, Mapping))

        with sequence_parallel(None), without_meshes(module), torch.no_grad():
            survey = runner.run(whole, LOCAL, None)
        with sequence_parallel(group, shard_lengths=lengths):
            shared = runner.run(own, group, survey.output_shapes)
        tables = gather_objects((survey.shapes, shared.shapes), group)
        places = _places(tables, cuts, group)
        with sequence_parallel(None), without_meshes(module):
            alone = runner.run(whole, LOCAL, survey.output_shapes, places=places)
            noisy = runner.run(whole, LOCAL, survey.output_shapes, places=places, rounding=Rounding(_ROUNDING_SEED))
        rows = _rows(shared, alone, noisy, places, _partial_gradients(tables), group)
        if not any(gather_objects(len(rows), group)):
            raise ValueError(
                "there was nothing to compare: expected some submodule, of those that only= asks for, to return floating "
                "point tensors, alone or in tuples, lists, mappings or dataclasses; integers, complex numbers and other "
                "objects aren't compared, so let the module return real tensors (torch.view_as_real)"
            )
        found = find_divergences(gather_objects(rows, group), group.ranks, factor, floor_ulps)
        return ParityReport(group.size, len(rows), found)


_Shapes = dict[Label, tuple[int, ...]]


def _rows(
    shared: Taken,
    alone: Taken,
    noisy: Taken,
    places: Mapping[Label, Place],
    partial: Sequence[Label],
    group: SequenceGroup,
) -> dict[Label, Row]:
    sums = {label: sum_over_ranks(shared.values[label], group) for label in partial if group.size > 1}
    rows = {}
    for label in dict.fromkeys([*alone.shapes, *shared.shapes]):
        if label not in shared.values or label not in alone.shapes or label not in noisy.shapes:
            rows[label] = Row(problem="calls")
        elif label not in places or shared.values[label].shape != alone.values[label].shape:
            rows[label] = Row(problem="shape")
        else:
            # A parameter's gradient adds up over ranks; what every rank holds may have a whole gradient on each instead.
            readings = [] if label in sums and label.is_parameter else [shared.values[label]]
            readings += [sums[label]] if label in sums else []
            rows[label] = measure(readings, alone.values[label], noisy.values[label], alone.fingerprints[label])
    return rows


def _places(
    tables: Sequence[tuple[_Shapes, _Shapes]],
    cuts: Mapping[Any, Place],
    group: SequenceGroup,
) -> dict[Label, Place]:
    """Return where each of this rank's tensors belongs; without those that have no place."""
    surveyed, shared = tables[0][0], [shapes for _, shapes in tables]
    places = {input_label(name): place for name, place in cuts.items()}
    for label in dict.fromkeys(label for shapes in shared for label in shapes):
        if label in places or not all(label in shapes for shapes in shared):
            continue
        output = label._replace(is_gradient=False)
        whole = surveyed.get(output, shared[0][label])  # inputs that aren't cut and parameters are whole
        place = place_of(whole, [shapes[label] for shapes in shared], group.rank)
        if place is not None:
            places[label] = place
    return places


def _partial_gradients(
    tables: Sequence[tuple[_Shapes, _Shapes]],
) -> list[Label]:
    """Return the gradients that every rank has whole or a summand of, in one order on all ranks."""
    surveyed, shared = tables[0][0], [shapes for _, shapes in tables]
    found = []
    for label, shape in shared[0].items():
        whole = surveyed.get(label._replace(is_gradient=False), shape)
        if label.is_gradient and all(shapes.get(label) == whole for shapes in shared):
            found.append(label)
    return found


def _named(inputs: Any) -> dict[Any, Any]:
    """Return inputs by name, or by their place."""
    if isinstance(inputs, Mapping):
        return dict(inputs)
    if not isinstance(inputs, Sequence):
        raise TypeError(f"expected inputs by name or in order, got {type(inputs).__name__}; put a lone one into a list")
    return dict(enumerate(inputs))


def _cuts(
    whole: Mapping[Any, Any], shard: Mapping[Any, int], lengths: Sequence[int] | None, group: SequenceGroup
) -> tuple[dict[Any, Place], tuple[int, ...] | None]:
    """Return this rank's part of each input that is cut, and the lengths to tell layers, if there are any."""
    cuts, found = {}, set()
    for name, dim in shard.items():
        x = whole.get(name)
        if not isinstance(x, torch.Tensor):
            raise ValueError(f"expected shard to name inputs that are tensors, got {name!r}; there are {list(whole)}")
        if not isinstance(dim, int) or isinstance(dim, bool) or not -x.dim() <= dim < x.dim():
            raise ValueError(f"expected shard to name one of the {x.dim()} dims of input {name!r}, got {dim!r}")
        dim = dim % x.dim()
        parts = split_lengths(x.shape[dim], group.size) if lengths is None else tuple(lengths)
        if len(parts) != group.size or sum(parts) != x.shape[dim]:
            raise ValueError(f"expected shard_lengths of {group.size} ranks that add up to {x.shape[dim]}, got {parts}")
        cuts[name] = Place(dim, sum(parts[: group.rank]), parts[group.rank])
        found.add(parts)
    if lengths is not None:
        return cuts, tuple(lengths)
    # Equal parts are what layers expect, and some may be of other lengths than the inputs.
    return cuts, found.pop() if len(found) == 1 and len(set(*found)) > 1 else None
