"""Which ranks share a sequence.

A `SequenceGroup` describes them by the name of their process group and their ranks. It holds no process group, so layers that
keep one can be copied and pickled. A layer uses, in this order, its own mesh, the `sequence_parallel(...)` scope of its
thread, and the default process group where one is initialised. A group of one needs no process group at all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from fastvideo.compilation import constant_while_tracing
from fastvideo.forward_context import restored, thread_state

__all__ = ["LOCAL", "SequenceGroup", "current_sequence_group", "sequence_parallel", "sequence_parallel_world"]


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share a sequence, in the order of their shards.

    Attributes:
        name: Name under which functional collectives know the process group; empty for a group of one.
        ranks: Global ranks.
        rank: This process's place among `ranks`.
    """

    name: str
    ranks: tuple[int, ...]
    rank: int

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without this process's place, which is another one where the copy is loaded."""
        return _reload_group, (self.name, self.ranks)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    @classmethod
    def from_mesh(cls, mesh: DeviceMesh | dist.ProcessGroup) -> SequenceGroup:
        """Describe a one-dimensional mesh, the `"ulysses"` dim of a larger one, or a process group.

        Raises:
            TypeError: It is neither.
            ValueError: The mesh has several dims and none is called `"ulysses"`.
        """
        if isinstance(mesh, dist.ProcessGroup):
            return cls._from_process_group(mesh)
        if not isinstance(mesh, DeviceMesh):
            raise TypeError(f"expected a DeviceMesh or a ProcessGroup, got {type(mesh).__name__}")
        if mesh.ndim > 1:
            names = mesh.mesh_dim_names or ()
            if "ulysses" not in names:
                raise ValueError(f"expected a one-dimensional mesh or one with a dim 'ulysses', got dims {names}")
            mesh = mesh["ulysses"]
        return cls._from_process_group(mesh.get_group())

    @classmethod
    def _from_process_group(cls, group: dist.ProcessGroup) -> SequenceGroup:
        ranks = tuple(dist.get_process_group_ranks(group))
        if len(ranks) == 1:
            return LOCAL
        return cls(group.group_name, ranks, dist.get_rank(group))


LOCAL = SequenceGroup("", (0,), 0)
"""One device: nothing is exchanged."""

_known_groups = {LOCAL.name: LOCAL}


@contextlib.contextmanager
def sequence_parallel(mesh: DeviceMesh | dist.ProcessGroup | SequenceGroup | None) -> Iterator[SequenceGroup]:
    """Share sequences over `mesh` in every distributed layer called inside, on this thread; `None` shares over nobody.

    Raises:
        TypeError: `mesh` is neither a `DeviceMesh`, a `ProcessGroup`, a `SequenceGroup` nor `None`.
        ValueError: A mesh of several dims has none called `"ulysses"`.

    Example:
        >>> with sequence_parallel(None) as group:
        ...     group.size
        1
    """
    group = as_sequence_group(mesh) or LOCAL
    with restored(sequence_group=group):
        yield group


def as_sequence_group(mesh: DeviceMesh | dist.ProcessGroup | SequenceGroup | None) -> SequenceGroup | None:
    """Return the description of a mesh, or `None` for `None`."""
    return mesh if mesh is None or isinstance(mesh, SequenceGroup) else SequenceGroup.from_mesh(mesh)


def _reload_group(name: str, ranks: tuple[int, ...]) -> SequenceGroup:
    here = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    return SequenceGroup(name, ranks, ranks.index(here) if here in ranks else -1)


def current_sequence_group(own: SequenceGroup | None = None) -> SequenceGroup:
    """Return the group that counts for a layer whose own is `own`.

    Raises:
        RuntimeError: `own` was pickled elsewhere, and this process isn't among its ranks.
    """
    if own is not None:
        if own.rank < 0:
            raise RuntimeError(
                f"this layer shares its sequence over the ranks {own.ranks}, and this process is none of them; "
                "set `layer.sequence_group = SequenceGroup.from_mesh(mesh)`, or None for the default"
            )
        return own
    scoped: SequenceGroup | None = thread_state.sequence_group
    return _known_groups[_find_default_group()] if scoped is None else scoped


def sequence_parallel_world() -> tuple[int, int]:
    """Return `(rank, size)` of the group that counts here.

    Example:
        >>> sequence_parallel_world()
        (0, 1)
    """
    group = current_sequence_group()
    return group.rank, group.size


@constant_while_tracing
def _find_default_group() -> str:
    """Return the name of the default group, described in `_known_groups`; Dynamo keeps names and reads dicts."""
    if not (dist.is_available() and dist.is_initialized()):
        return LOCAL.name
    group = SequenceGroup.from_mesh(dist.group.WORLD)  # type: ignore[arg-type]  # set once initialised
    _known_groups[group.name] = group
    return group.name
