"""`plan`: every way to share one attention over several ranks, with what it costs, or why it can't be.

The numbers come from a model on paper (`fastvideo.distributed.plan_cost`), whose parameters are arguments. It ranks layouts and
measures nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastvideo.distributed.plan_cost import H200, HGX, Call, Cost, DeviceModel, LinkModel, cost_of, shares_of
from fastvideo.distributed.ulysses import groups_that_pay, groups_that_travel

__all__ = ["DeviceModel", "LinkModel", "Plan", "PlannedLayout", "plan"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What layers take."""


@dataclass(frozen=True)
class PlannedLayout:
    """One way to share the call, and what it costs the busiest rank.

    Attributes:
        name: `"local"`, `"ulysses"`, `"ring"`, `"gather"`, `"ulysses+ring"` or `"ulysses+gather"`.
        ring: Ranks that share keys, the mesh's outer dim.
        ulysses: Ranks that swap heads for tokens, its inner dim.
        reasons: Why it can't be; empty for a legal one.
        heads: Query heads of the busiest rank.
        kv_heads: Key heads that it holds.
        head_groups: Pieces of its heads, of which one travels while another is computed.
        tokens: Queries that it works on, per head.
        padding: Work of the busiest rank beyond the average, as a share of the average: what heads or tokens that don't divide
            cost. Nothing is really padded; the other ranks wait, and with more ranks than heads some have nothing to do.
        kv_bytes: Bytes of keys and values that it holds at once.
        forward: Cost of the forward pass.
        backward: Cost of the backward pass alone.
    """

    name: str
    ring: int
    ulysses: int
    reasons: tuple[str, ...]
    heads: int
    kv_heads: int
    head_groups: int
    tokens: int
    padding: float
    kv_bytes: float
    forward: Cost
    backward: Cost

    @property
    def is_legal(self) -> bool:
        """Whether it can be."""
        return not self.reasons


@dataclass(frozen=True)
class Plan:
    """What `plan` found: data, whose string is a table.

    Attributes:
        call: The call.
        world_size: Ranks that share it.
        needs_grad: A backward pass follows, and counts.
        device: The device model.
        links: The link model.
        layouts: Every layout, legal ones first, fastest first.
        one_device: Seconds that one device would take.
    """

    call: Call
    world_size: int
    needs_grad: bool
    device: DeviceModel
    links: LinkModel
    layouts: tuple[PlannedLayout, ...]
    one_device: float

    @property
    def best(self) -> PlannedLayout | None:
        """The fastest legal layout, or `None`."""
        return next((layout for layout in self.layouts if layout.is_legal), None)

    def time(self, layout: PlannedLayout) -> float:
        """Return the seconds of a layout's passes that count."""
        return layout.forward.time + (layout.backward.time if self.needs_grad else 0.0)

    def efficiency(self, layout: PlannedLayout) -> float:
        """Return one device's time over the ranks' time together: 1 means that `world_size` ranks are as many times faster."""
        return self.one_device / (self.world_size * self.time(layout))

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values that `json` can write."""
        return {
            "call": asdict(self.call),
            "world_size": self.world_size,
            "needs_grad": self.needs_grad,
            "device": asdict(self.device),
            "links": asdict(self.links),
            "one_device": self.one_device,
            "best": None if self.best is None else self.layouts.index(self.best),
            "layouts": [
                {**asdict(layout), "legal": layout.is_legal, "time": self.time(layout), "efficiency": self.efficiency(layout)}
                for layout in self.layouts
            ],
        }

    def __str__(self) -> str:
        titles = ["layout", "ring", "ulysses", "heads", "groups", "tokens", "padding", "moved", "exposed", "time", "efficiency"]
        rows = [titles, *(self._row(layout) for layout in self.layouts)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
        lines.insert(1, "-" * max(map(len, lines)))
        passes = "forward and backward" if self.needs_grad else "forward"
        head = (
            f"{self.world_size} × {self.device.name}, {self.links.ranks_per_node} a node; {passes}; "
            f"one device: {_seconds(self.one_device)}"
        )
        reasons = [f"{_label(layout)}: {reason}" for layout in self.layouts for reason in layout.reasons]
        best = self.best
        verdict = "no layout can be" if best is None else f"best: {_label(best)}"
        return "\n".join([head, *lines, verdict, *reasons])

    def _row(self, layout: PlannedLayout) -> list[str]:
        cells = [layout.name, str(layout.ring), str(layout.ulysses)]
        if not layout.is_legal:
            return [*cells, *["-"] * 8]
        passes = (layout.forward, layout.backward) if self.needs_grad else (layout.forward,)
        time = self.time(layout)
        return [
            *cells,
            str(layout.heads),
            str(layout.head_groups),
            str(layout.tokens),
            f"{layout.padding:.1%}",
            _bytes(sum(cost.num_bytes for cost in passes)),
            f"{sum(cost.exposed for cost in passes) / time:.1%}",
            _seconds(time),
            f"{self.efficiency(layout):.1%}",
        ]


def plan(
    heads: int,
    kv_heads: int | None,
    seq: int,
    world_size: int,
    *,
    head_size: int = 128,
    batch: int = 1,
    dtype: torch.dtype | str = torch.bfloat16,
    replicated: int = 0,
    cross_seq: int | None = None,
    causal: bool = False,
    sparsity: float | None = None,
    has_gate: bool = False,
    head_groups: int | None = None,
    needs_grad: bool = False,
    mesh: tuple[int, int] | None = None,
    device: DeviceModel = H200,
    links: LinkModel = HGX,
) -> Plan:
    """List every layout of one attention call over `world_size` ranks, with its cost or the reasons against it.

    Args:
        heads: Query heads, any number.
        kv_heads: Key and value heads, which divide `heads`; `None` means `heads`.
        seq: Tokens of all ranks together, any number.
        world_size: Ranks that share the sequence.
        head_size: Size of a head.
        batch: Batch size.
        dtype: float16, bfloat16, float32 or float64, or its name.
        replicated: Tokens that every rank holds and that join the sequence.
        cross_seq: Keys of all ranks together, in cross attention; `None` means self attention.
        causal: Each query sees only keys up to its own position.
        sparsity: Share of key tiles that a query tile skips, in [0, 1), for sparse attention; `None` means dense.
        has_gate: A gate of sparse attention travels with the query; dense attention has none.
        head_groups: Pieces of each rank's heads at most, of which one travels while another is computed; `None` is the number
            that layers choose, see `groups_that_pay`, where all ranks are of one node.
        needs_grad: A backward pass follows and counts.
        mesh: Sizes of the mesh's dims ring and ulysses where the caller has one; others are then refused.
        device: How fast a device is.
        links: How fast ranks talk.

    Raises:
        TypeError: A size is no integer, or `dtype` is none that layers take.
        ValueError: A size is out of range, the mesh isn't two sizes of `world_size` ranks together, or there is a gate without
            a sparsity.

    Example:
        >>> found = plan(heads=40, kv_heads=None, seq=75600, world_size=8)
        >>> found.best.name, round(found.efficiency(found.best), 2)
        ('ulysses', 0.96)
        >>> plan(40, None, 75600, 8, sparsity=0.9).best.name
        'ulysses'
    """
    kv_heads = heads if kv_heads is None else kv_heads
    key_len = seq if cross_seq is None else cross_seq
    _check_sizes(
        heads=heads, kv_heads=kv_heads, seq=seq, world_size=world_size, head_size=head_size, batch=batch, cross_seq=key_len,
        head_groups=1 if head_groups is None else head_groups, replicated=replicated,
    )  # fmt: skip
    if heads % kv_heads:
        raise ValueError(f"expected kv_heads to divide heads, got {heads} and {kv_heads}")
    if sparsity is not None and not 0 <= sparsity < 1:
        raise ValueError(f"expected a sparsity in [0, 1), or None for dense attention, got {sparsity}")
    if has_gate and sparsity is None:
        raise ValueError(
            "a gate belongs to sparse attention, and without a sparsity this is dense; give the sparsity too (0 keeps every "
            "tile), or leave the gate out"
        )
    if mesh is not None:
        mesh = _checked_mesh(mesh, world_size)
    call = Call(
        heads, kv_heads, seq, key_len, head_size, batch, _dtype(dtype).itemsize,
        replicated, causal, sparsity is not None, sparsity or 0.0, has_gate,
    )  # fmt: skip
    return _plan(call, world_size, head_groups, needs_grad, mesh, device, links)


@functools.lru_cache(maxsize=256)
def _plan(
    call: Call,
    world_size: int,
    head_groups: int | None,
    needs_grad: bool,
    mesh: tuple[int, int] | None,
    device: DeviceModel,
    links: LinkModel,
) -> Plan:
    layouts = []
    is_one_node = world_size <= links.ranks_per_node
    for name, ring, ulysses in _candidates(world_size):
        part = shares_of(call, ring, ulysses)
        gathers = name.endswith("gather")
        rows_held = call.key_len if gathers or ring == 1 else min(2, ring) * part.keys
        kv_bytes = call.size(rows_held + call.replicated, 2 * part.kv_heads)
        average = call.heads * call.seq / world_size
        pieces = _pieces(call, ring, ulysses, gathers, head_groups, needs_grad, is_one_node)
        forward, backward = (cost_of(call, ring, ulysses, gathers, pieces, b, device, links) for b in (False, True))
        reasons = tuple(_reasons(call, ring, ulysses, mesh, kv_bytes, world_size, device))
        padding = part.heads * part.rows / average - 1
        sizes = (part.heads, part.kv_heads, pieces, part.rows, padding, kv_bytes)
        layouts.append(PlannedLayout(name, ring, ulysses, reasons, *sizes, forward, backward))
    alone = [cost_of(call, 1, 1, False, 1, backward, device, links).time for backward in (False, True)]
    found = Plan(call, world_size, needs_grad, device, links, (), alone[0] + (alone[1] if needs_grad else 0.0))
    layouts.sort(key=lambda layout: (not layout.is_legal, found.time(layout)))
    return Plan(call, world_size, needs_grad, device, links, tuple(layouts), found.one_device)


def _pieces(call: Call, ring: int, ulysses: int, gathers: bool, wanted: int | None, needs_grad: bool, is_one_node: bool) -> int:
    """Return into how many pieces each rank's heads are cut."""
    if wanted is None:
        elements = call.batch * call.seq * call.heads // ulysses * call.head_size
        pay = groups_that_pay(elements, ulysses, ring, is_sparse=call.is_sparse, needs_grad=needs_grad)
        wanted = pay if is_one_node else 1
    return groups_that_travel(wanted, call.kv_heads, ulysses, gathers=gathers, is_causal=call.causal)


def _candidates(world_size: int) -> Iterator[tuple[str, int, int]]:
    """Yield the name, the ring and the Ulysses ranks of every layout."""
    if world_size == 1:
        yield "local", 1, 1
        return
    for ulysses in range(world_size, 0, -1):
        if world_size % ulysses:
            continue
        ring = world_size // ulysses
        inner = "ulysses" if ulysses > 1 else ""
        if ring == 1:
            yield inner, ring, ulysses
        else:
            for outer in ("ring", "gather"):
                yield "+".join(filter(None, (inner, outer))), ring, ulysses


def _reasons(
    call: Call,
    ring: int,
    ulysses: int,
    mesh: tuple[int, int] | None,
    kv_bytes: float,
    world_size: int,
    device: DeviceModel,
) -> Iterator[str]:
    if mesh is not None and (ring, ulysses) != mesh:
        yield f"the mesh is ring={mesh[0]} × ulysses={mesh[1]}"
    if call.causal and call.seq != call.key_len:
        yield f"causal attention needs as many queries as keys, got {call.seq} and {call.key_len}"
    if call.is_sparse and call.causal:
        yield "sparse attention can't be causal: tiles see each other in both directions; leave out causal, or the sparsity"
    if call.is_sparse and call.seq != call.key_len:
        yield (
            f"sparse attention needs queries and keys to be the same tokens, got {call.seq} and {call.key_len}; cross "
            "attention is dense"
        )
    if call.is_sparse and ring > 1:
        yield (
            f"sparse attention selects tiles of the whole sequence; use ulysses, a mesh of ring=1 × ulysses={world_size}, or "
            "layout='ulysses', which swaps heads along both dims of a mesh"
        )
    if kv_bytes > device.memory:
        yield f"keys and values take {_bytes(kv_bytes)} at once, and the device has {_bytes(device.memory)}"


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"expected {name} as an integer, got {size!r}")
        least = 0 if name == "replicated" else 1
        if size < least:
            raise ValueError(f"expected {name} of at least {least}, got {size}")


def _checked_mesh(mesh: Sequence[int], world_size: int) -> tuple[int, int]:
    if not isinstance(mesh, (tuple, list)) or len(mesh) != 2:
        raise ValueError(f"expected mesh as two sizes (ring, ulysses), got {mesh!r}; a mesh's other dims share no sequence")
    ring, ulysses = mesh
    _check_sizes(**{"the mesh's ring": ring, "the mesh's ulysses": ulysses})
    if ring * ulysses != world_size:
        raise ValueError(f"expected a mesh (ring, ulysses) of {world_size} ranks, got {(ring, ulysses)}")
    return ring, ulysses


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in _DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in _DTYPES)
        raise TypeError(f"expected a torch dtype or its name among {names}, got {dtype!r}")
    return found


def _label(layout: PlannedLayout) -> str:
    return f"{layout.name} (ring={layout.ring}, ulysses={layout.ulysses})"


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def _seconds(number: float) -> str:
    return f"{number * 1e6:.0f} µs" if number < 1e-3 else f"{number * 1e3:.4g} ms"
