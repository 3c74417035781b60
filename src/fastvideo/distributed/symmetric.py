"""Memory of CUDA devices of one host that they read and write in each other, and numbers by which they wait for each other.

The memory is torch's symmetric memory, mapped into every process of a group. Words between devices are 32-bit numbers in it,
written and waited for by operations of the stream itself (CUDA's stream memory operations), which need no multiprocessor: a
kernel that waited would not start beside a persistent attention kernel, and hold one up that came after it.

Counters are compared cyclically, so they may overflow.
"""

from __future__ import annotations

import contextlib
import importlib
import pathlib
import platform
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from fastvideo.distributed.driver import Driver, open_driver
from fastvideo.distributed.rows import Move
from fastvideo.platforms.triton_support import runs_triton

__all__ = ["SymmetricMemory", "release", "why_not_symmetric"]

_WORDS = 4096
"""Bytes in front of the memory: one word per peer that says `written`, and one that says `read`."""

_READ = 2048
_MAX_RANKS = 512
_FAR_AHEAD = 1 << 30


def why_not_symmetric(device: torch.device, group: dist.ProcessGroup, wish: str) -> str | None:
    """Return why the ranks of `group` have no memory in common, or `None`; the same answer on every rank.

    A collective call.
    """
    lack = "" if open_driver() is not None else "libcuda.so.1, CUDA's driver, can't be loaded or lacks stream memory operations"
    here = (wish, _host(), lack)
    told: list[Any] = [None] * group.size()
    with torch.cuda.device(device):
        dist.all_gather_object(told, here, group=group)
    if len({wish for wish, _, _ in told}) > 1:
        raise RuntimeError(f"expected the same FASTVIDEO_EXCHANGE on every rank, got {', '.join(wish for wish, _, _ in told)}")
    if len({host for _, host, _ in told}) > 1:
        return "they sit on several hosts"
    if group.size() > _MAX_RANKS:
        return f"they are {group.size()}, and there is room for {_MAX_RANKS}"
    return next((lack for _, _, lack in told if lack), None)


def release(name: str) -> None:
    """Let every wait of the group `name` on this process's device pass, so that its host can go on to raise an error."""
    for memory in list(_open_memories):
        if memory.name == name:
            memory.release()


_open_memories: weakref.WeakSet[SymmetricMemory] = weakref.WeakSet()


class _Mark:
    """An event that stands for what a stream was given; it is used again once nobody holds the mark."""

    __slots__ = ("_free", "event")

    def __init__(self, event: int, free: list[int]) -> None:
        self.event, self._free = event, free

    def __del__(self) -> None:
        self._free.append(self.event)


class SymmetricMemory:
    """Memory and words of one group. `fastvideo.distributed.peer_memory.PeerMemory` says what its methods do.

    Attributes:
        name: The process group's name.
        rank: This process's place in it.
        capacity: Bytes of memory of each rank.
        addresses: Where that of each rank starts.
        copies: The stream of copies between devices.
        own: The stream of copies that stay on this device.
        words: The stream of words that are to hold up nothing.
    """

    def __init__(self, device: torch.device, group: dist.ProcessGroup, capacity: int, driver: Driver) -> None:
        self.name, self.rank, self.capacity = group.group_name, group.rank(), 0
        self._device, self._size, self._driver = device, group.size(), driver
        self._streams = [torch.cuda.Stream(device, priority=-1) for _ in range(3)]  # type: ignore[no-untyped-call]
        self.copies, self.own, self.words = (int(stream.cuda_stream) for stream in self._streams)
        self._last_waited = 0
        self._allocate(capacity)
        with torch.cuda.device(device):
            self._passing = driver.new_event()
        self._events: list[int] = []
        self._launch = (
            importlib.import_module("fastvideo.distributed.row_kernels").launch_moves if runs_triton(device) else None
        )

    @classmethod
    def open(cls, device: torch.device, group: dist.ProcessGroup, capacity: int) -> tuple[SymmetricMemory | None, str | None]:
        """Return the memory, or `None` and why there is none; a collective call with the same answer on every rank."""
        memory, reason, driver = None, "", open_driver()
        try:
            memory = None if driver is None else cls(device, group, capacity, driver)
        except RuntimeError as error:
            reason = f"rank {group.rank()}: {str(error).splitlines()[0]}"
        told: list[Any] = [None] * group.size()
        with torch.cuda.device(device):
            dist.all_gather_object(told, reason, group=group)
        reason = next((text for text in told if text), "")
        if reason or memory is None:
            return None, reason
        _open_memories.add(memory)
        return memory, None

    def _allocate(self, capacity: int) -> None:
        symmetric = importlib.import_module("torch.distributed._symmetric_memory")
        with torch.cuda.device(self._device):
            memory = symmetric.empty(_WORDS + capacity, dtype=torch.uint8, device=self._device)
            memory[:_WORDS].zero_()
            torch.cuda.synchronize()
            # Ends with a barrier of the hosts: nobody writes a word before all are 0.
            handle = symmetric.rendezvous(memory, self.name)
        self._memory, self._handle, self.capacity = memory, handle, capacity
        self._bases = [int(pointer) for pointer in handle.buffer_ptrs]
        self.addresses = tuple([base + _WORDS for base in self._bases])
        self._views: dict[torch.dtype, torch.Tensor] = {}

    def grow(self, capacity: int, waits: Sequence[tuple[int, int]]) -> None:
        """See `PeerMemory`."""
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            if waits:
                self.wait_read(stream.cuda_stream, waits)
            # Then this rank has copied all it is to copy, and so have its peers.
            for busy in (*self._streams, stream):
                busy.synchronize()
            self._allocate(capacity)

    def view(self, dtype: torch.dtype) -> torch.Tensor:
        """See `PeerMemory`."""
        found = self._views.get(dtype)
        if found is None:
            item = torch.empty((), dtype=dtype).element_size()
            whole = self._memory[_WORDS:]
            found = self._views[dtype] = whole[: whole.numel() // item * item].view(dtype)
        return found

    def guard(self) -> contextlib.AbstractContextManager[object]:
        """See `PeerMemory`."""
        # What `torch.cuda.current_device` returns, which asks first whether CUDA is initialised.
        is_current = self._device.index == torch._C._cuda_getDevice()
        return contextlib.nullcontext() if is_current else torch.cuda.device(self._device)

    def current(self) -> int:
        """See `PeerMemory`."""
        # What `torch.cuda.current_stream` wraps in an object, for a tenth of the time.
        return torch._C._cuda_getCurrentRawStream(self._device.index)

    def mark(self, stream: int) -> _Mark:
        """See `PeerMemory`."""
        mark = _Mark(self._events.pop() if self._events else self._driver.new_event(), self._events)
        self._driver.record(mark.event, stream)
        return mark

    def after(self, stream: int, mark: _Mark) -> None:
        """See `PeerMemory`."""
        self._driver.after(stream, mark.event)

    def follow(self, streams: Sequence[int], leader: int) -> None:
        """See `PeerMemory`."""
        # Streams wait for what the event stands for when they are told to, so that one event serves them all.
        self._driver.record(self._passing, leader)
        for stream in streams:
            self._driver.after(stream, self._passing)

    def copy(self, stream: int, moves: Sequence[Move], bases: Sequence[int]) -> None:
        """See `PeerMemory`."""
        self._driver.copy(stream, moves, bases)

    def copy_here(self, stream: int, moves: tuple[Move, ...], bases: Sequence[int]) -> None:
        """See `PeerMemory`."""
        rest = moves if self._launch is None else self._launch(moves, bases, self._device.index, stream)
        self._driver.copy(stream, rest, bases)

    def write_written(self, stream: int, peers: Sequence[int], number: int) -> None:
        """See `PeerMemory`."""
        place, bases = 4 * self.rank, self._bases
        self._driver.write(stream, [(bases[peer] + place, number) for peer in peers])

    def write_read(self, stream: int, peers: Sequence[int], number: int) -> None:
        """See `PeerMemory`."""
        place, bases = _READ + 4 * self.rank, self._bases
        self._driver.write(stream, [(bases[peer] + place, number) for peer in peers])

    def wait_written(self, stream: int, peers: Sequence[int], number: int) -> None:
        """See `PeerMemory`."""
        self._last_waited, here = number, self._bases[self.rank]
        self._driver.wait(stream, [(here + 4 * peer, number) for peer in peers])

    def wait_read(self, stream: int, waits: Sequence[tuple[int, int]]) -> None:
        """See `PeerMemory`."""
        self._last_waited, here = waits[0][1], self._bases[self.rank] + _READ
        self._driver.wait(stream, [(here + 4 * peer, number) for peer, number in waits])

    def release(self) -> None:
        """Write numbers into this rank's words that no wait is above."""
        with torch.cuda.device(self._device), contextlib.suppress(RuntimeError):
            stream = torch.cuda.Stream(self._device).cuda_stream  # type: ignore[no-untyped-call]
            for place in range(0, _READ + 4 * self._size, 4):
                if place % _READ < 4 * self._size:
                    self._driver.write(stream, [(self._bases[self.rank] + place, self._last_waited + _FAR_AHEAD)])


def _host() -> str:
    """Return what processes of one running machine have in common."""
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text(encoding="ascii").strip() if boot.exists() else platform.node()
