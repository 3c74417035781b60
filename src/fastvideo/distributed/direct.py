"""Exchanges without kernels: each rank lays out what others need, and each fetches its parts by its copy engines.

Between the devices of one host, a copy engine moves memory over NVLink beside any kernel, while a collective's kernels take
multiprocessors from the attention that they should hide behind. An exchange is: pack what others need into this rank's staging
memory, which they can read (symmetric memory); say so; wait for each peer's word and copy its part straight to where it
belongs; say that it is copied. The words are numbers of exchanges that the devices write into each other's memory and wait for
(`fastvideo.distributed.symmetric`), so neither a kernel nor a host waits for a peer.

Staging memory is a ring: a later exchange overwrites an earlier one's region once all who read that have said so. All ranks
compute the same regions, because a `Route` knows what every rank sends to every other.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from fastvideo.distributed.symmetric import SymmetricMemory, why_not_symmetric
from fastvideo.settings import Settings

if TYPE_CHECKING:
    from fastvideo.distributed.collectives import Route

__all__ = ["DirectExchange", "Fetch", "PeerMemory", "direct_exchange", "exchange_kind", "finish_direct"]

_ALIGNMENT = 512
_LEAST_CAPACITY = 64 << 20
_REGIONS_HELD = 4
"""Exchanges of the largest size that staging memory holds: query, key, value and gate of one group of heads."""


class Fetch(NamedTuple):
    """What this rank copies from one peer, in bytes.

    Attributes:
        peer: Whose staging memory it lies in.
        source: Where it starts there.
        target: Where it goes in what this rank receives.
        num_bytes: How long it is; 0 where the peer has nothing for this rank.
    """

    peer: int
    source: int
    target: int
    num_bytes: int


class PeerMemory(Protocol):
    """Memory that the ranks of a group read from each other, and words between their devices. All of it is asynchronous."""

    rank: int
    capacity: int

    def grow(self, capacity: int) -> None:
        """Replace the staging memory by at least `capacity` bytes; a collective call, once no rank reads the old one."""
        ...

    def staging(self) -> torch.Tensor:
        """Return this rank's staging memory, uint8."""
        ...

    def wait_until_read(self, peer: int, number: int) -> None:
        """Let what comes next wait until `peer` has read this rank's part of exchange `number`."""
        ...

    def fetch(self, number: int, readers: tuple[int, ...], received: torch.Tensor, fetches: tuple[Fetch, ...]) -> None:
        """Tell `readers` that this rank's part is packed, and copy from the peers of `fetches` into `received`."""
        ...

    def finish(self, received: torch.Tensor) -> bool:
        """Let what comes next wait until `received` is complete; return whether it was on its way."""
        ...


class _Region(NamedTuple):
    start: int
    stop: int
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
        self._number = 0
        self._next = 0
        self._regions: deque[_Region] = deque()
        self._lock = threading.Lock()

    def start(self, x: torch.Tensor, route: Route) -> torch.Tensor:
        """Start an exchange and return what will be received, flat; read it after `finish`."""
        rank, counts, item = self._memory.rank, route.counts, x.element_size()
        peers = [(rank + distance) % self._size for distance in range(1, self._size)]
        with self._lock:
            self._number += 1
            readers = tuple([peer for peer in peers if counts[rank][peer]])
            start = self._claim(max(_packed(route, sender) for sender in range(self._size)) * item, readers)
            received = x.new_empty(sum(counts[sender][rank] for sender in range(self._size)))
            self._pack(x, route, start)
            own = sum(counts[sender][rank] for sender in range(rank))
            _copy_parts(x, route.send.dim, route.send.parts[rank], received[own : own + counts[rank][rank]])
            fetches, position = [], 0
            for sender in range(self._size):
                if sender != rank and counts[sender][rank]:
                    source = start + _place(route, sender, rank) * item
                    fetches.append(Fetch(sender, source, position * item, counts[sender][rank] * item))
                position += counts[sender][rank]
            fetches.sort(key=lambda fetch: peers.index(fetch.peer))
            self._memory.fetch(self._number, readers, received, tuple(fetches))
        return received

    def finish(self, received: torch.Tensor) -> bool:
        """Let what comes next on this stream wait until `received` is complete; return whether `start` returned it."""
        return self._memory.finish(received)

    def _claim(self, num_bytes: int, readers: tuple[int, ...]) -> int:
        """Return where this exchange's region starts, once nobody reads what was there."""
        length = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        memory = self._memory
        if length > memory.capacity:
            self._free(0, memory.capacity)
            memory.grow(max(_LEAST_CAPACITY, _REGIONS_HELD * length))
            self._next = 0
        start = self._next if self._next + length <= memory.capacity else 0
        self._free(start, start + length)
        self._regions.append(_Region(start, start + length, self._number, readers))
        self._next = start + length
        return start

    def _free(self, start: int, stop: int) -> None:
        """Wait for the readers of every region that overlaps one that begins at `start`."""
        last: dict[int, int] = {}
        kept: deque[_Region] = deque()
        for region in self._regions:
            if region.start < stop and start < region.stop:
                last.update(dict.fromkeys(region.readers, region.number))
            else:
                kept.append(region)
        self._regions = kept
        for peer, number in last.items():
            self._memory.wait_until_read(peer, number)

    def _pack(self, x: torch.Tensor, route: Route, start: int) -> None:
        rank, item = self._memory.rank, x.element_size()
        staging = self._memory.staging()
        if route.is_gather:
            flat = staging[start : start + x.numel() * item].view(x.dtype)
            flat.view(x.shape).copy_(x)
            return
        for peer in range(self._size):
            count = route.counts[rank][peer]
            if peer != rank and count:
                first = start + _place(route, rank, peer) * item
                flat = staging[first : first + count * item].view(x.dtype)
                _copy_parts(x, route.send.dim, route.send.parts[peer], flat)


def _packed(route: Route, sender: int) -> int:
    """Return the elements that `sender` lays out."""
    row = [count for receiver, count in enumerate(route.counts[sender]) if receiver != sender]
    return max(row, default=0) if route.is_gather else sum(row)


def _place(route: Route, sender: int, receiver: int) -> int:
    """Return where in the region of `sender` the part for `receiver` starts, in elements."""
    if route.is_gather:
        return 0
    return sum(route.counts[sender][before] for before in range(receiver) if before != sender)


def _copy_parts(x: torch.Tensor, dim: int, part: tuple[tuple[int, int], ...], flat: torch.Tensor) -> None:
    """Write intervals of `x` along `dim`, one after another, to `flat`."""
    position = 0
    row = math.prod(x.shape[:dim]) * math.prod(x.shape[dim + 1 :])
    for first, last in part:
        count = row * (last - first)
        shape = (*x.shape[:dim], last - first, *x.shape[dim + 1 :])
        if count:
            flat[position : position + count].view(shape).copy_(x.narrow(dim, first, last - first))
        position += count


_exchanges: dict[str, tuple[object, DirectExchange | None]] = {}
"""By name of the process group: the group itself, and its exchange if it has one."""

_deciding = threading.Lock()


def exchange_kind(device: torch.device) -> str:
    """Return how eager code of this process would exchange tensors on `device`: `"direct"` or `"collective"`.

    Ranks agree on it before each call, since the two don't meet. Whether a group can do what is wished is settled once, by all
    its ranks together.
    """
    if torch.compiler.is_compiling() or device.type != "cuda":
        return "collective"
    if Settings.current().exchange == "collective" or torch.cuda.is_current_stream_capturing():
        return "collective"
    return "direct"


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
    if known is None or known[0] is not group:
        with _deciding:
            known = _exchanges[name] = (group, _open(x.device, group))
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
