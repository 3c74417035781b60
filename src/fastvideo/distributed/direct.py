"""Exchanges by copy engines: each rank lays out what others need, and each fetches its parts.

Between the devices of one host, a copy engine moves memory over NVLink beside any kernel, while a collective's kernels take
multiprocessors from the attention that they should hide behind. An exchange is: pack what others need into this rank's staging
memory, which they can read (symmetric memory); say so; wait for each peer's word and copy its part straight to where it
belongs; say that it is copied. The words are numbers of exchanges that the devices write into each other's memory and wait for
(`fastvideo.distributed.symmetric`), so neither a kernel nor a host waits for a peer.

Staging memory is a ring: a later exchange overwrites an earlier one's region once all who read that have said so. All ranks
compute the same regions, because a `Route` knows what every rank sends to every other.
"""

from __future__ import annotations

import functools
import math
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from fastvideo.distributed.symmetric import SymmetricMemory, why_not_symmetric
from fastvideo.settings import Settings

if TYPE_CHECKING:
    from fastvideo.distributed.collectives import Route

__all__ = ["DirectExchange", "Fetch", "PeerMemory", "direct_exchange", "exchange_kind", "finish_direct", "has_own_places"]

_ALIGNMENT = 512
_LEAST_CAPACITY = 64 << 20
_REGIONS_HELD = 2
"""Exchanges of the largest size that staging memory holds: one is packed while another is read."""


class Fetch(NamedTuple):
    """What this rank copies from one peer.

    Attributes:
        peer: Whose staging memory it lies in.
        source: Where it starts there, in bytes; it has no gaps.
        target: Where it goes.
    """

    peer: int
    source: int
    target: torch.Tensor


class Job(NamedTuple):
    """One exchange as a rank carries it out.

    Attributes:
        number: Its number, the same on every rank.
        waits: Peers, and up to which exchange they must have read this rank's staging memory before it is written.
        packs: What goes to staging memory: targets and sources.
        own: What stays on this rank, likewise.
        readers: Peers that read what is packed.
        fetches: What this rank reads, what comes from one peer together.
        received: The tensors that are complete in the end.
        is_hidden: Other work goes on meanwhile, so that what stays is left to copy engines; kernels are faster, and in the way.
    """

    number: int
    waits: tuple[tuple[int, int], ...]
    packs: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    own: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    readers: tuple[int, ...]
    fetches: tuple[Fetch, ...]
    received: tuple[torch.Tensor, ...]
    is_hidden: bool


class PeerMemory(Protocol):
    """Memory that the ranks of a group read from each other, and words between their devices. All of it is asynchronous."""

    rank: int
    capacity: int

    def grow(self, capacity: int, waits: tuple[tuple[int, int], ...]) -> None:
        """Replace the staging memory by one of `capacity` bytes; a collective call. `waits` as of a `Job`."""
        ...

    def staging(self) -> torch.Tensor:
        """Return this rank's staging memory, uint8."""
        ...

    def run(self, job: Job) -> None:
        """Start an exchange."""
        ...

    def finish(self, received: torch.Tensor) -> bool:
        """Let what comes next wait until `received` is complete; return whether it was on its way."""
        ...


class _Region(NamedTuple):
    start: int
    number: int
    readers: tuple[int, ...]


class DirectExchange:
    """The exchanges of one group, in the order that all its ranks make them.

    Args:
        memory: Where the ranks meet.
        size: Number of ranks.
    """

    def __init__(self, memory: PeerMemory, size: int) -> None:
        self._memory, self._size = memory, size
        rank = memory.rank
        self._peers = [(rank + distance) % size for distance in range(1, size)]
        self._number = 0
        self._next = 0
        self._regions: deque[_Region] = deque()
        self._lock = threading.Lock()

    def start(
        self,
        tensors: Sequence[torch.Tensor],
        routes: Sequence[Route],
        into: torch.Tensor | None = None,
        *,
        is_hidden: bool = False,
    ) -> tuple[torch.Tensor, ...]:
        """Start the exchange of several tensors at once.

        Args:
            tensors: What this rank sends.
            routes: The route of each.
            into: Where what is received goes, of its shape, if there is one tensor.
            is_hidden: Other work goes on meanwhile.

        Returns:
            For each what is received, to be read after `finish`: of the route's shape, or flat if parts overlap there.
        """
        rank = self._memory.rank
        places, length = [], 0
        for x, route in zip(tensors, routes, strict=True):
            places.append(length)
            length += _aligned(max(_places(route.counts, route.is_gather).packed) * x.element_size())
        readers = tuple([peer for peer in self._peers if any(route.counts[rank][peer] for route in routes)])
        with self._lock:
            self._number += 1
            start, waits = self._claim(length, readers)
            received, packs, own, fetches = [], [], [], []
            for x, route, place in zip(tensors, routes, places, strict=True):
                packs += self._packs(x, route, start + place)
                target = _room(x, route) if into is None else into
                received.append(target)
                parts = [_parts_of(target, route, sender) for sender in range(self._size)]
                for piece, interval in zip(parts[rank], route.send.parts[rank], strict=True):
                    stays = x.narrow(route.send.dim, interval[0], interval[1] - interval[0])
                    own.append((piece.view(stays.shape), stays))
                for peer in self._peers:
                    source = start + place + _places(route.counts, route.is_gather).of[peer][rank] * x.element_size()
                    for piece in parts[peer]:
                        if piece.numel():
                            fetches.append(Fetch(peer, source, piece))
                            source += piece.numel() * x.element_size()
            fetches.sort(key=lambda fetch: self._peers.index(fetch.peer))
            own = [(to, x) for to, x in own if x.numel()]
            self._memory.run(
                Job(self._number, waits, tuple(packs), tuple(own), readers, tuple(fetches), tuple(received), is_hidden)
            )
        return tuple(received)

    def finish(self, received: torch.Tensor) -> bool:
        """Let what comes next on this stream wait until `received` is complete; return whether `start` returned it."""
        return self._memory.finish(received)

    def _claim(self, length: int, readers: tuple[int, ...]) -> tuple[int, tuple[tuple[int, int], ...]]:
        """Return where this exchange's region starts, and who must have read what was there.

        Regions follow one another, so those in the way are the oldest.
        """
        memory, regions = self._memory, self._regions
        before: list[_Region] = []
        if length > memory.capacity:
            before += regions
            regions.clear()
            memory.grow(max(_LEAST_CAPACITY, _REGIONS_HELD * length), _readers_of(before))
            before, self._next = [], 0
        start = self._next
        if start + length > memory.capacity:
            while regions and regions[0].start >= start:
                before.append(regions.popleft())
            start = 0
        while regions and start <= regions[0].start < start + length:
            before.append(regions.popleft())
        regions.append(_Region(start, self._number, readers))
        self._next = start + length
        return start, _readers_of(before)

    def _packs(self, x: torch.Tensor, route: Route, start: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return where in staging memory what peers need of `x` goes, part after part."""
        rank, item = self._memory.rank, x.element_size()
        staging = self._memory.staging()
        dim, parts = route.send
        if route.is_gather:
            return [(staging[start : start + x.numel() * item].view(x.dtype).view(x.shape), x)] if x.numel() else []
        packs, places = [], _places(route.counts, route.is_gather).of[rank]
        for peer in self._peers:
            position = start + places[peer] * item
            for first, last in parts[peer]:
                piece = x.narrow(dim, first, last - first)
                stop = position + piece.numel() * item
                if piece.numel():
                    packs.append((staging[position:stop].view(x.dtype).view(piece.shape), piece))
                position = stop
        return packs


def _readers_of(regions: Sequence[_Region]) -> tuple[tuple[int, int], ...]:
    """Return the readers of regions, oldest first, and the last exchange that each has read there."""
    last: dict[int, int] = {}
    for region in regions:
        last.update(dict.fromkeys(region.readers, region.number))
    return tuple(last.items())


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def has_own_places(route: Route) -> bool:
    """Return whether what is received falls into parts that do not overlap, so that each goes straight to its place."""
    intervals = sorted(interval for part in route.receive.parts for interval in part if interval[1] > interval[0])
    stops = [0, *[last for _, last in intervals]]
    return stops[-1] == route.shape[route.receive.dim] and [first for first, _ in intervals] == stops[:-1]


def _room(x: torch.Tensor, route: Route) -> torch.Tensor:
    """Return an empty tensor for what is received: of the route's shape if each part has a place of its own, else flat."""
    if has_own_places(route):
        return x.new_empty(route.shape)
    return x.new_empty(sum(math.prod(piece) for sender in range(len(route.counts)) for piece in _shapes(route, sender)))


def _parts_of(received: torch.Tensor, route: Route, sender: int) -> list[torch.Tensor]:
    """Return where the part of `sender` goes, an entry for each of its intervals."""
    dim, parts = route.receive
    if received.dim() == len(route.shape):
        return [received.narrow(dim, first, last - first) for first, last in parts[sender]]
    position = sum(math.prod(piece) for before in range(sender) for piece in _shapes(route, before))
    pieces = []
    for shape in _shapes(route, sender):
        pieces.append(received[position : position + math.prod(shape)])
        position += math.prod(shape)
    return pieces


def _shapes(route: Route, sender: int) -> list[tuple[int, ...]]:
    dim, parts = route.receive
    return [(*route.shape[:dim], last - first, *route.shape[dim + 1 :]) for first, last in parts[sender]]


class _Places(NamedTuple):
    """Where parts lie among what a sender lays out, in elements: `of[sender][receiver]`, and how many there are in all."""

    of: tuple[tuple[int, ...], ...]
    packed: tuple[int, ...]


@functools.lru_cache(maxsize=1024)
def _places(counts: tuple[tuple[int, ...], ...], is_gather: bool) -> _Places:
    """Return the places for a route's counts. Each sender begins with the part of its next rank."""
    size = len(counts)
    of, packed = [], []
    for sender, row in enumerate(counts):
        place, position = [0] * size, 0
        for distance in range(1, size):
            receiver = (sender + distance) % size
            place[receiver] = 0 if is_gather else position
            position = max(position, row[receiver]) if is_gather else position + row[receiver]
        of.append(tuple(place))
        packed.append(position)
    return _Places(tuple(of), tuple(packed))


_exchanges: dict[str, tuple[weakref.ref[object], DirectExchange | None]] = {}
"""By name of the process group: the group itself, and its exchange if it has one. A later group may bear the same name."""

_deciding = threading.Lock()


def exchange_kind(device: torch.device) -> str:
    """Return how eager code of this process would exchange tensors on `device`: `"direct"` or `"collective"`.

    Ranks agree on it before each call, since the two don't meet. Whether a group can do what is wished is settled once, by all
    its ranks together.

    Raises:
        RuntimeError: `FASTVIDEO_EXCHANGE=direct`, and the device is no CUDA device.
    """
    if torch.compiler.is_compiling():
        return "collective"
    wish = Settings.current().exchange
    if device.type != "cuda":
        if wish == "direct":
            raise RuntimeError(
                f"FASTVIDEO_EXCHANGE=direct was asked for, and tensors on {device} have no copy engines; "
                "use FASTVIDEO_EXCHANGE=auto or collective"
            )
        return "collective"
    return "collective" if wish == "collective" or torch.cuda.is_current_stream_capturing() else "direct"


def direct_exchange(x: torch.Tensor, name: str) -> DirectExchange | None:
    """Return the direct exchange of the process group `name` for tensors like `x`; `None` where collectives are to be used.

    The first call for a group is a collective one.

    Raises:
        RuntimeError: `FASTVIDEO_EXCHANGE=direct`, and this group can't; the message says why, on every rank.
    """
    if torch.compiler.is_compiling() or exchange_kind(x.device) == "collective":
        return None
    group = torch._C._distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
    known = _exchanges.get(name)
    if known is None or known[0]() is not group:
        with _deciding:
            known = _exchanges[name] = (weakref.ref(group), _open(x.device, group))
    return known[1]


def finish_direct(received: torch.Tensor, name: str) -> bool:
    """Wait for what a direct exchange of the process group `name` receives; return whether it is one's."""
    known = _exchanges.get(name)
    return known is not None and known[1] is not None and known[1].finish(received)


def _open(device: torch.device, group: torch.distributed.ProcessGroup) -> DirectExchange | None:
    wish = Settings.current().exchange
    reason = why_not_symmetric(device, group, wish)
    if reason is None:
        memory, reason = SymmetricMemory.open(device, group, _LEAST_CAPACITY)
        if memory is not None:
            return DirectExchange(memory, group.size())
    if wish == "direct":
        raise RuntimeError(
            f"FASTVIDEO_EXCHANGE=direct was asked for, and the ranks of group {group.group_name!r} can't: {reason}; "
            "use FASTVIDEO_EXCHANGE=auto or collective"
        )
    return None
