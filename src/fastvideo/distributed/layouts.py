"""How a sequence is shared: which ranks swap heads for tokens (Ulysses), and which share keys (ring, or K/V gather).

On a mesh with dims `("ring", "ulysses")` both happen at once: Ulysses along the inner dim, and ring or gather along the outer.
"""

from __future__ import annotations

from typing import NamedTuple

from fastvideo.distributed.mesh import LOCAL, SequenceGroup

__all__ = ["LAYOUTS", "Layout", "resolve_layout"]

LAYOUTS = ("auto", "ulysses", "ring", "gather")
"""What a layer may be asked for. `"auto"` follows the mesh's dims, and on one dim takes what keeps the ranks busiest."""

_LEAST_SHARE_OF_BUSY_HEADS = 0.75
"""Below it, `"auto"` shares keys instead of heads: 3 heads on 4 ranks still go by heads, 5 on 4 don't."""


class Layout(NamedTuple):
    """How one call is shared.

    Attributes:
        name: `"local"`, `"ulysses"`, `"ring"`, `"gather"`, `"ulysses+ring"` or `"ulysses+gather"`.
        ring: The ranks that share keys.
        ulysses: The ranks that swap heads for tokens.
        gathers: Keys are gathered at once instead of fetched in turn.
    """

    name: str
    ring: SequenceGroup
    ulysses: SequenceGroup
    gathers: bool


def resolve_layout(wish: str, group: SequenceGroup, num_heads: int, *, needs_whole_sequence: bool = False) -> Layout:
    """Return the layout that `wish` means on the ranks of `group`.

    Args:
        wish: One of `LAYOUTS`; named ones run as they are or raise.
        group: The ranks that share the sequence.
        num_heads: Query heads.
        needs_whole_sequence: The layer is sparse, so `"auto"` shares heads.

    Raises:
        ValueError: The wish contradicts the dims of the mesh.

    Example:
        >>> resolve_layout("auto", LOCAL, 8).name
        'local'
    """
    if group.size == 1:
        return Layout("local", LOCAL, LOCAL, False)
    if group.ring is None or group.ulysses is None:
        if wish == "auto":
            busy = num_heads / (group.size * -(-num_heads // group.size))
            wish = "ulysses" if needs_whole_sequence or busy >= _LEAST_SHARE_OF_BUSY_HEADS else "gather"
        ring, ulysses = (LOCAL, group) if wish == "ulysses" else (group, LOCAL)
    else:
        ring, ulysses = group.ring, group.ulysses
        if wish == "ulysses" and ring.size > 1:
            raise ValueError(
                f"layout='ulysses' on a mesh of ring={ring.size} × ulysses={ulysses.size} would leave the ring unused; use "
                f"layout='auto', 'ring' or 'gather', or a mesh of ring=1 × ulysses={group.size}"
            )
        if wish in ("ring", "gather") and ring.size == 1:
            raise ValueError(
                f"layout={wish!r} on a mesh of ring=1 × ulysses={ulysses.size} has nobody to share keys with; use "
                f"layout='auto' or 'ulysses', or a mesh of ring={group.size} × ulysses=1"
            )
    gathers = wish == "gather"
    outer = "" if ring.size == 1 else "gather" if gathers else "ring"
    inner = "" if ulysses.size == 1 else "ulysses"
    return Layout("+".join(filter(None, (inner, outer))), ring, ulysses, gathers)
