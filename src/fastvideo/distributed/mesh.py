"""Which ranks share a sequence.

A `SequenceGroup` describes them by the names of their process groups and their ranks. It holds no process group, so layers
that keep one can be copied and pickled. A layer uses, in this order, its own mesh, the `sequence_parallel(...)` scope of its
thread, what `init_sequence_parallel` set, and the default process group where one is initialised. A group of one needs no
process group at all.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fastvideo.compilation import constant_while_tracing
from fastvideo.forward_context import check_shard_lengths, restored, thread_state

__all__ = [
    "LOCAL",
    "SequenceGroup",
    "as_sequence_group",
    "current_sequence_group",
    "init_sequence_parallel",
    "sequence_parallel",
    "sequence_parallel_world",
]

MESH_DIMS = ("ring", "ulysses")
"""Dims of a mesh that share a sequence, outer before inner: shard `i` belongs to `(i // ulysses size, i % ulysses size)`."""


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share a sequence, in the order of their shards.

    Attributes:
        name: Name under which functional collectives know the process group of all ranks; empty for a group of one, and for
            a mesh with two dims above 1, which talks along its dims only.
        ranks: Global ranks.
        rank: This process's place among `ranks`.
        ring: The ranks along the mesh's dim `"ring"`, this process's row of it; `None` where no mesh names dims.
        ulysses: The ranks along the mesh's dim `"ulysses"`; `None` together with `ring`.
    """

    name: str
    ranks: tuple[int, ...]
    rank: int
    ring: SequenceGroup | None = None
    ulysses: SequenceGroup | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without this process's place, which is another one where the copy is loaded."""
        return _reload_group, (self.name, self.ranks, self.ring, self.ulysses)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    @classmethod
    def from_mesh(cls, mesh: DeviceMesh | dist.ProcessGroup) -> SequenceGroup:
        """Describe a one-dimensional mesh, the dims `"ring"` and `"ulysses"` of a larger one, or a process group.

        A mesh of several dims may have either or both; the others (data, tensor) are left alone.

        Raises:
            TypeError: It is neither.
            ValueError: The mesh has several dims and neither name, or `"ulysses"` outside of `"ring"`.
        """
        if isinstance(mesh, dist.ProcessGroup):
            return cls._from_process_group(mesh)
        if not isinstance(mesh, DeviceMesh):
            raise TypeError(f"expected a DeviceMesh or a ProcessGroup, got {type(mesh).__name__}")
        names = mesh.mesh_dim_names or ()
        if mesh.ndim == 1 and "ring" not in names:
            return cls._from_process_group(mesh.get_group())
        if not set(MESH_DIMS) & set(names):
            raise ValueError(
                f"expected a one-dimensional mesh or one with dims 'ring' and 'ulysses', or one of them, got {names}"
            )
        ring, ulysses = (cls._along(mesh, name) if name in names else LOCAL for name in MESH_DIMS)
        if ulysses.size == 1 or ring.size == 1:
            flat = ring if ulysses.size == 1 else ulysses
            return cls(flat.name, flat.ranks, flat.rank, ring, ulysses)
        if names.index("ring") > names.index("ulysses"):
            raise ValueError(f"expected a mesh whose dim 'ring' comes before 'ulysses', which is the inner one, got {names}")
        ranks = tuple(mesh["ring", "ulysses"].mesh.flatten().tolist())
        return cls("", ranks, ring.rank * ulysses.size + ulysses.rank, ring, ulysses)

    @classmethod
    def _along(cls, mesh: DeviceMesh, name: str) -> SequenceGroup:
        return cls._from_process_group((mesh if mesh.ndim == 1 else mesh[name]).get_group())

    @classmethod
    def _from_process_group(cls, group: dist.ProcessGroup) -> SequenceGroup:
        ranks = tuple(dist.get_process_group_ranks(group))
        if len(ranks) == 1:
            return LOCAL
        return cls(group.group_name, ranks, dist.get_rank(group))


LOCAL = SequenceGroup("", (0,), 0)
"""One device: nothing is exchanged."""

_default_groups: dict[str, SequenceGroup] = {"": LOCAL}
"""Groups that hold where neither layer nor scope names one, by a label that Dynamo keeps as a constant."""

_INITIALISED = "init_sequence_parallel"

_worlds: dict[str, weakref.ref[dist.ProcessGroup]] = {}
"""The world that the group of a label is part of; the group ends with it."""


@contextlib.contextmanager
def sequence_parallel(
    mesh: DeviceMesh | dist.ProcessGroup | SequenceGroup | None, *, shard_lengths: Sequence[int] | None = None
) -> Iterator[SequenceGroup]:
    """Share sequences over `mesh` in every distributed layer called inside, on this thread; `None` shares over nobody.

    Args:
        mesh: A one-dimensional `DeviceMesh`, one with dims `"ring"` and `"ulysses"`, a process group, or `None`.
        shard_lengths: Tokens of each rank's shard, in the order of ranks; `None` keeps those of an enclosing context for as
            many ranks, and otherwise means equal shards. An inner `set_forward_context` may replace them.

    Raises:
        TypeError: `mesh` or `shard_lengths` is of a wrong type.
        ValueError: A mesh of several dims has neither name, or the lengths don't fit the mesh.

    Example:
        >>> with sequence_parallel(None) as group:
        ...     group.size
        1
    """
    group = as_sequence_group(mesh) or LOCAL
    lengths = check_shard_lengths(shard_lengths)
    outer = thread_state.shard_lengths
    if lengths is None and outer is not None and len(outer) == group.size:
        lengths = outer
    if lengths is not None and len(lengths) != group.size:
        raise ValueError(f"expected shard_lengths of {group.size} ranks, got {lengths}")
    with restored(sequence_group=group, shard_lengths=lengths):
        yield group


def init_sequence_parallel(
    ulysses: int | None = None, ring: int = 1, *, device_type: str | None = None, **arguments: Any
) -> DeviceMesh:
    """Join the process group that `torchrun` describes, and share sequences over `ring` × `ulysses` ranks from now on.

    Neighbouring ranks form an Ulysses group, these form rings, and what remains of the world is the dim `"data"`.

    Args:
        ulysses: Size of the mesh's inner dim; `None` takes the rest of the world.
        ring: Size of its outer dim.
        device_type: `"cuda"` or `"cpu"`; `None` takes CUDA where it is present. On CUDA the process's device is set
            from its local rank.
        **arguments: Handed to `torch.distributed.init_process_group` where no process group exists yet, such as `timeout`.

    Returns:
        The mesh of the whole world, dims `("data", "ring", "ulysses")`, for the caller to slice: FSDP takes `mesh["data"]`.

    Raises:
        ValueError: A size isn't positive, or `ring` × `ulysses` doesn't divide the world.
    """
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo", **arguments)
    if device_type == "cuda":
        torch.cuda.set_device(dist.get_node_local_rank(dist.get_rank() % max(1, torch.cuda.device_count())))
    world = dist.get_world_size()
    for name, size in (("ring", ring), ("ulysses", 1 if ulysses is None else ulysses)):
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"expected {name} as a positive number of ranks, got {size!r}")
    inner = max(1, world // ring) if ulysses is None else ulysses
    if world % (ring * inner):
        raise ValueError(
            f"a world of {world} ranks can't be cut into groups of ring={ring} × ulysses={inner} = {ring * inner}; "
            f"their product has to divide {world}"
        )
    mesh = init_device_mesh(device_type, (world // (ring * inner), ring, inner), mesh_dim_names=("data", *MESH_DIMS))
    _default_groups[_INITIALISED] = SequenceGroup.from_mesh(mesh)
    _worlds[_INITIALISED] = weakref.ref(_world())
    return mesh


def as_sequence_group(mesh: DeviceMesh | dist.ProcessGroup | SequenceGroup | None) -> SequenceGroup | None:
    """Return the description of a mesh, or `None` for `None`."""
    return mesh if mesh is None or isinstance(mesh, SequenceGroup) else SequenceGroup.from_mesh(mesh)


def _reload_group(
    name: str, ranks: tuple[int, ...], ring: SequenceGroup | None = None, ulysses: SequenceGroup | None = None
) -> SequenceGroup:
    if len(ranks) == 1:
        return LOCAL
    here = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    return SequenceGroup(name, ranks, ranks.index(here) if here in ranks else -1, ring, ulysses)


def current_sequence_group(own: SequenceGroup | None = None) -> SequenceGroup:
    """Return the group that counts for a layer whose own is `own`.

    Raises:
        RuntimeError: `own` was pickled elsewhere, and this process isn't among its ranks.
    """
    if own is not None:
        parts = (own, own.ring or own, own.ulysses or own)
        if min(part.rank for part in parts) < 0:
            raise RuntimeError(
                f"this layer shares its sequence over the ranks {own.ranks}, and this process is none of them; "
                "set `layer.sequence_group = SequenceGroup.from_mesh(mesh)`, or None for the default"
            )
        return own
    scoped: SequenceGroup | None = thread_state.sequence_group
    return _default_groups[_find_default_group()] if scoped is None else scoped


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
    """Return the label of the default group in `_default_groups`; Dynamo keeps strings and reads dicts."""
    if not (dist.is_available() and dist.is_initialized()):
        return ""
    world = _world()
    if _INITIALISED in _worlds and _worlds[_INITIALISED]() is world:
        return _INITIALISED
    group = SequenceGroup.from_mesh(world)
    _default_groups[group.name] = group
    return group.name


def _world() -> dist.ProcessGroup:
    return dist.group.WORLD  # type: ignore[return-value]  # set once initialised
