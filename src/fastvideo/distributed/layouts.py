"""How a sequence is shared: which ranks swap heads for tokens (Ulysses), and which share keys (ring, or K/V gather).

On a mesh with dims `("ring", "ulysses")` both happen at once: Ulysses along the inner dim, and ring or gather along the outer.
Or Ulysses along one dim after the other, which is what sparse attention needs, whose tiles are chosen from the whole sequence.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from fastvideo.compilation import constant_while_tracing
from fastvideo.distributed.mesh import LOCAL, SequenceGroup
from fastvideo.distributed.plan import plan

__all__ = ["LAYOUTS", "Layout", "ranked_layouts", "resolve_layout"]

LAYOUTS = ("auto", "ulysses", "ring", "gather")
"""What a layer may be asked for. `"auto"` takes what `plan` expects to be fastest of those that mesh and backend allow."""


class Layout(NamedTuple):
    """How one call is shared.

    Attributes:
        name: `"local"`, `"ulysses"`, `"ring"`, `"gather"`, `"ulysses+ring"` or `"ulysses+gather"`.
        ring: The ranks that share keys.
        ulysses: The ranks that swap heads for tokens.
        gathers: Keys are gathered at once instead of fetched in turn.
        swaps_all: The ranks of `ring` don't share keys: they swap heads for tokens too, after those of `ulysses`.
    """

    name: str
    ring: SequenceGroup
    ulysses: SequenceGroup
    gathers: bool
    swaps_all: bool = False


def ranked_layouts(wish: str, group: SequenceGroup, *, needs_whole_sequence: bool = False, **call: Any) -> tuple[str, ...]:
    """Return the layouts that `wish` allows on the ranks of `group`, best first.

    Args:
        wish: One of `LAYOUTS`.
        group: The ranks that share the sequence.
        needs_whole_sequence: The layer is sparse.
        **call: The call as `fastvideo.distributed.plan.plan` takes it, the same on every rank.

    Example:
        >>> ranked_layouts("auto", LOCAL)
        ('auto',)
    """
    if wish != "auto" or group.size == 1:
        return (wish,)
    if group.ring is None or group.ulysses is None:
        return ("ulysses",) if needs_whole_sequence else _ranked(group.size, None, **call)
    if group.ring.size == 1 or needs_whole_sequence:
        return ("ulysses",)
    # The plan knows no Ulysses along both dims; it is left for backends that need the whole sequence.
    return (*_ranked(group.size, (group.ring.size, group.ulysses.size), **call), "ulysses")


@constant_while_tracing
def _ranked(size: int, mesh: tuple[int, int] | None, **call: Any) -> tuple[str, ...]:
    return _by_plan(size, mesh, **call)


@functools.lru_cache(maxsize=1024)
def _by_plan(size: int, mesh: tuple[int, int] | None, **call: Any) -> tuple[str, ...]:
    found = plan(world_size=size, mesh=mesh, **call)
    meshes = ((1, size), (size, 1)) if mesh is None else (mesh,)
    # Those that the plan calls illegal come last: one of them may be all there is, and its refusal says why.
    return tuple(layout.name.split("+")[-1] for layout in found.layouts if (layout.ring, layout.ulysses) in meshes)


def resolve_layout(wish: str, group: SequenceGroup) -> Layout:
    """Return the layout that `wish` means on the ranks of `group`.

    Args:
        wish: `"ulysses"`, `"ring"` or `"gather"`; they run as they are or raise.
        group: The ranks that share the sequence.

    Raises:
        ValueError: The wish contradicts the dims of the mesh.

    Example:
        >>> resolve_layout("ring", LOCAL).name
        'local'
    """
    if group.size == 1:
        return Layout("local", LOCAL, LOCAL, False)
    if group.ring is None or group.ulysses is None:
        ring, ulysses = (LOCAL, group) if wish == "ulysses" else (group, LOCAL)
    else:
        ring, ulysses = group.ring, group.ulysses
        if wish == "ulysses" and ring.size > 1:
            return Layout("ulysses", LOCAL, ring, False) if ulysses.size == 1 else Layout("ulysses", ring, ulysses, False, True)
        if wish in ("ring", "gather") and ring.size == 1:
            raise ValueError(
                f"layout={wish!r} on a mesh of ring=1 × ulysses={ulysses.size} has nobody to share keys with; use "
                f"layout='auto' or 'ulysses', or a mesh of ring={group.size} × ulysses=1"
            )
    gathers = wish == "gather"
    outer = "" if ring.size == 1 else "gather" if gathers else "ring"
    inner = "" if ulysses.size == 1 else "ulysses"
    return Layout("+".join(filter(None, (inner, outer))), ring, ulysses, gathers)
