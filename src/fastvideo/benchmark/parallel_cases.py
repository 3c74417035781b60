"""What several ranks are measured with: one attention shared in every layout by the product's own layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from fastvideo.attention.registry import backend_name
from fastvideo.attention.shared_call import SharedCall, num_head_groups
from fastvideo.benchmark.cases import VSA
from fastvideo.benchmark.parallel_problem import Call, Problem
from fastvideo.distributed.layouts import resolve_layout
from fastvideo.distributed.mesh import SequenceGroup
from fastvideo.distributed.plan import PlannedLayout, plan
from fastvideo.distributed.precision import FLOAT8

__all__ = ["ParallelCase", "make_parallel_cases"]


@dataclass(frozen=True)
class ParallelCase:
    """One way to compute a problem on all ranks.

    Attributes:
        name: For people.
        library: `"fastvideo"`, or the peer.
        backend: The backend, or the peer's kernel.
        layout: The layout's name in a plan.
        ring: Ranks that share keys.
        ulysses: Ranks that swap heads for tokens.
        build: Makes the call of this rank's query, key, value and perhaps gate, under the layer name that it is handed; what it
            raises is a reason. A name for each series of calls keeps the ranks from asking each other before every call, as
            layers of a model don't (`fastvideo.distributed.agreement`).
        head_groups: Groups of heads of which one travels while another is computed.
        is_sparse: It is VSA, with a gate.
        is_float8: Tensors travel in float8, at inference.
        planned: What the model on paper says of it.
    """

    name: str
    library: str
    backend: str
    layout: str
    ring: int
    ulysses: int
    build: Callable[[str], Call]
    head_groups: int | None = None
    is_sparse: bool = False
    is_float8: bool = False
    planned: PlannedLayout | None = None


def make_parallel_cases(
    problem: Problem,
    *,
    backends: Sequence[str],
    layouts: Sequence[str] | None,
    head_groups: Sequence[int | None],
    with_float8: bool,
) -> list[ParallelCase]:
    """Return every layout of every backend; those that can't be are refused when they are built or called.

    Args:
        problem: What is shared.
        backends: By name.
        layouts: Names of layouts as `plan` gives them; `None` for all.
        head_groups: How many groups of heads to ask for; `None` is the layer's own choice.
        with_float8: Add the layouts that can send in float8.

    Raises:
        ValueError: A layout is unknown to this number of ranks.
        UnknownBackend: A backend is.
    """
    cases: list[ParallelCase] = []
    groups = _Groups(problem)
    for backend in dict.fromkeys(map(backend_name, backends)):
        seen: set[tuple[str, int, int, int]] = set()
        for wanted in head_groups:
            for layout, resolved in _layouts(problem, backend, layouts, wanted, groups):
                key = (layout.name, layout.ring, layout.ulysses, resolved)
                if key not in seen:
                    seen.add(key)
                    cases.append(_case(problem, backend, layout, resolved, groups, is_float8=False))
                    if with_float8 and layout.is_legal and not layout.name.endswith("ring"):
                        cases.append(_case(problem, backend, layout, resolved, groups, is_float8=True))
    return cases


class _Groups:
    """The ranks of each layout; a mesh is made once, by all ranks in the same order."""

    def __init__(self, problem: Problem) -> None:
        self._device_type = problem.device.type
        self._meshes: dict[tuple[int, int], SequenceGroup] = {}

    def of(self, ring: int, ulysses: int) -> SequenceGroup:
        if min(ring, ulysses) == 1:
            return SequenceGroup.from_mesh(dist.group.WORLD)  # type: ignore[arg-type]  # set once initialised
        if (ring, ulysses) not in self._meshes:
            mesh = init_device_mesh(self._device_type, (ring, ulysses), mesh_dim_names=("ring", "ulysses"))
            self._meshes[ring, ulysses] = SequenceGroup.from_mesh(mesh)
        return self._meshes[ring, ulysses]


def _layouts(
    problem: Problem, backend: str, names: Sequence[str] | None, wanted: int | None, groups: _Groups
) -> Iterator[tuple[PlannedLayout, int]]:
    """Yield every layout with the groups of heads that it comes to, as planned with them."""
    shape = problem.shape
    arguments: dict[str, Any] = {
        "head_size": shape.head_size,
        "batch": shape.batch,
        "dtype": problem.inputs.query.dtype,
        "sparsity": problem.sparsity if backend == VSA else None,
        "has_gate": backend == VSA,
    }

    def planned(head_groups: int) -> tuple[PlannedLayout, ...]:
        return plan(shape.num_heads, None, shape.num_tokens, problem.size, head_groups=head_groups, **arguments).layouts

    found = planned(1)
    unknown = set(names or ()) - {layout.name for layout in found}
    if unknown:
        known = ", ".join(dict.fromkeys(layout.name for layout in found))
        raise ValueError(f"{problem.size} ranks have no layout {', '.join(sorted(unknown))}; there are {known}")
    for layout in found:
        if names is None or layout.name in names:
            resolved = _num_head_groups(problem, backend, layout, wanted, groups)
            same = (layout.name, layout.ring, layout.ulysses)
            yield next(x for x in planned(resolved) if (x.name, x.ring, x.ulysses) == same), resolved


def _num_head_groups(problem: Problem, backend: str, layout: PlannedLayout, wanted: int | None, groups: _Groups) -> int:
    """Return into how many groups the layer cuts the heads."""
    shape, dtype = problem.shape, problem.inputs.query.dtype
    shard = torch.empty(
        shape.batch, problem.lengths[problem.rank], shape.num_heads, shape.head_size, dtype=dtype, device=problem.device
    )
    gate = shard if backend == VSA else None
    call = SharedCall(shard, shard, shard, gate, None, None, problem.lengths, problem.lengths, False, 1.0, reduces=True)
    resolved = resolve_layout(_wish(layout), groups.of(layout.ring, layout.ulysses))
    return num_head_groups(call, resolved, wanted, is_sparse=backend == VSA)


def _wish(layout: PlannedLayout) -> str:
    """Return what a layer on the layout's ranks is asked for."""
    return layout.name.split("+")[-1]


def _case(
    problem: Problem, backend: str, layout: PlannedLayout, head_groups: int, groups: _Groups, *, is_float8: bool
) -> ParallelCase:
    options: dict[str, Any] = {"layout": _wish(layout), "head_groups": head_groups}
    if is_float8:
        options["exchange_dtype"] = FLOAT8
    group = groups.of(layout.ring, layout.ulysses)
    mesh = f" {layout.ring}x{layout.ulysses}" if min(layout.ring, layout.ulysses) > 1 else ""
    pieces = f" in {head_groups} groups" if head_groups > 1 else ""
    return ParallelCase(
        name=f"{layout.name}{mesh} {backend}{pieces}{', float8' if is_float8 else ''}",
        library="fastvideo",
        backend=backend,
        layout=layout.name,
        ring=layout.ring,
        ulysses=layout.ulysses,
        build=lambda prefix: problem.layer(backend, problem.shape.num_heads, group, problem.lengths, prefix=prefix, **options),
        head_groups=head_groups,
        is_sparse=backend == VSA,
        is_float8=is_float8,
        # The model knows nothing of float8.
        planned=None if is_float8 else layout,
    )
