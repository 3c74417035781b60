"""Memory of CUDA devices of one host that they read from each other, and numbers by which they wait for each other.

The memory is torch's symmetric memory, mapped into every process of a group. Words between devices are 32-bit numbers in it,
written and waited for by operations of the stream itself (CUDA's stream memory operations), which need no multiprocessor: a
kernel that waited would not start beside a persistent attention kernel, and hold one up that came after it.

Counters are compared cyclically, so they may overflow.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import math
import pathlib
import platform
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from fastvideo.distributed.direct import Job

__all__ = ["Rows", "SymmetricMemory", "copy_wide", "release", "rows_of", "rows_of_both", "why_not_symmetric"]

_WORDS = 4096
"""Bytes in front of the staging memory: one word per peer that is `packed`, and one that is `read`."""

_READ = 2048
_MAX_RANKS = 512
_FAR_AHEAD = 1 << 30


def why_not_symmetric(device: torch.device, group: dist.ProcessGroup, wish: str) -> str | None:
    """Return why the ranks of `group` have no memory in common, or `None`; the same answer on every rank.

    A collective call.
    """
    here = (
        wish,
        _host(),
        "" if _bindings("driver") is not None else "the package cuda-bindings, which CUDA builds of torch need, is missing",
    )
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


class Rows(NamedTuple):
    """A tensor as rows of bytes at equal distances.

    Attributes:
        number: How many.
        length: Bytes of a row.
        distance: Bytes from the start of one to that of the next.
    """

    number: int
    length: int
    distance: int

    def cut(self, length: int) -> Rows | None:
        """Return them as rows of `length`, a divisor of theirs: themselves, or pieces of a single row."""
        if length == self.length:
            return self
        return Rows(self.length // length, length, length) if self.number == 1 else None


def rows_of(x: torch.Tensor) -> Rows | None:
    """Return a tensor as rows, or `None` where these are at unequal distances.

    Example:
        >>> rows_of(torch.empty(2, 3, 8, 4)[:, :, 2:4])
        Rows(number=6, length=32, distance=128)
    """
    return _rows(x.shape, x.stride(), x.element_size())


@functools.lru_cache(maxsize=4096)
def _rows(shape: tuple[int, ...], strides: tuple[int, ...], item: int) -> Rows | None:
    length = 1
    dims = [(size, stride) for size, stride in zip(shape, strides, strict=True) if size != 1]
    while dims and dims[-1][1] == length:
        length *= dims.pop()[0]
    if any(outer != size * inner for (_, outer), (size, inner) in itertools.pairwise(dims)):
        return None
    return Rows(math.prod(size for size, _ in dims), length * item, (dims[-1][1] if dims else length) * item)


def copy_wide(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy between tensors of one shape by a kernel, 16 bytes at a time where both allow it: twice as fast as two at a time."""
    if _is_wide(target) and _is_wide(source):
        target, source = target.view(torch.complex128), source.view(torch.complex128)
    target.copy_(source)


def _is_wide(x: torch.Tensor) -> bool:
    return x.data_ptr() % 16 == 0 and not x.is_complex() and _has_wide_steps(x.shape[-1], x.stride(), x.element_size())


@functools.lru_cache(maxsize=4096)
def _has_wide_steps(length: int, strides: tuple[int, ...], item: int) -> bool:
    return strides[-1] == 1 and all(step * item % 16 == 0 for step in (length, *strides[:-1]))


def rows_of_both(x: torch.Tensor, y: torch.Tensor) -> tuple[Rows, Rows] | None:
    """Return two tensors of one shape as equally many and long rows, or `None` where they have none."""
    one, other = rows_of(x), rows_of(y)
    if one is None or other is None:
        return None
    length = min(one.length, other.length)
    one, other = one.cut(length), other.cut(length)
    return None if one is None or other is None else (one, other)


_open_memories: weakref.WeakSet[SymmetricMemory] = weakref.WeakSet()


class SymmetricMemory:
    """Staging memory and words of one group. `fastvideo.distributed.direct.PeerMemory` says what its methods do.

    Attributes:
        name: The process group's name.
        rank: This process's place in it.
        capacity: Bytes of staging memory of each rank.
    """

    def __init__(self, device: torch.device, group: dist.ProcessGroup, capacity: int) -> None:
        self.name, self.rank, self.capacity = group.group_name, group.rank(), 0
        self._device, self._size = device, group.size()
        self._copies: torch.cuda.Stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._stay: torch.cuda.Stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._driver, self._runtime = _bindings("driver"), _bindings("runtime")
        self._coming: dict[int, tuple[torch.cuda.Event, torch.Tensor, tuple[torch.Tensor, ...]]] = {}
        self._last_waited = 0
        self._allocate(capacity)

    @classmethod
    def open(cls, device: torch.device, group: dist.ProcessGroup, capacity: int) -> tuple[SymmetricMemory | None, str | None]:
        """Return the memory, or `None` and why there is none; a collective call with the same answer on every rank."""
        memory, reason = None, ""
        try:
            memory = cls(device, group, capacity)
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

    def grow(self, capacity: int, waits: tuple[tuple[int, int], ...]) -> None:
        """See `PeerMemory`."""
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            for peer, number in waits:
                self._wait(stream.cuda_stream, _READ + 4 * peer, number)
            # Then this rank has read all it is to read, and so have its readers.
            self._copies.synchronize()
            stream.synchronize()
            self._allocate(capacity)

    def staging(self) -> torch.Tensor:
        """See `PeerMemory`."""
        words_and_staging: torch.Tensor = self._memory
        return words_and_staging[_WORDS:]

    def run(self, job: Job) -> None:
        """See `PeerMemory`."""
        current, copies = torch.cuda.current_stream(self._device), self._copies
        for peer, number in job.waits:
            self._wait(current.cuda_stream, _READ + 4 * peer, number)
        if job.is_hidden:
            self._stay.wait_stream(current)
        # Peers wait for what is packed, and a kernel packs thrice as fast; what stays may take its time.
        for target, source in job.packs:
            copy_wide(target, source)
        copies.wait_stream(current)
        for target, source in job.own:
            pair = rows_of_both(target, source) if job.is_hidden else None
            if pair is None:
                copy_wide(target, source)
            else:
                self._copy(target.data_ptr(), pair[0], source.data_ptr(), pair[1], self._stay.cuda_stream)
        stream = copies.cuda_stream
        for reader in job.readers:
            self._write(stream, reader, 4 * self.rank, job.number)
        for peer, parts in itertools.groupby(job.fetches, key=lambda fetch: fetch.peer):
            self._wait(stream, 4 * peer, job.number)
            for part in parts:
                rows = rows_of(part.target)
                if rows is None:
                    raise ValueError(
                        f"expected room for rows, got strides {part.target.stride()} of {tuple(part.target.shape)}"
                    )
                source_rows = Rows(rows.number, rows.length, rows.length)
                self._copy(part.target.data_ptr(), rows, self._bases[peer] + _WORDS + part.source, source_rows, stream)
            self._write(stream, peer, _READ + 4 * self.rank, job.number)
        copies.wait_stream(self._stay if job.is_hidden else current)
        done: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(copies)
        # What the copy engines read here must not be given to others before they have.
        sources = tuple([source for _, source in job.own]) if job.is_hidden else ()
        for x in job.received:
            if x.numel():
                self._coming[x.data_ptr()] = (done, x, sources)

    def _copy(self, target: int, to: Rows, source: int, rows: Rows, stream: int) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDefault
        if to.number == 1:
            _checked(self._runtime.cudaMemcpyAsync(target, source, to.length, kind, stream))
        else:
            copy = self._runtime.cudaMemcpy2DAsync
            _checked(copy(target, to.distance, source, rows.distance, to.length, to.number, kind, stream))

    def finish(self, received: torch.Tensor) -> bool:
        """See `PeerMemory`."""
        coming = self._coming.pop(received.data_ptr(), None) if received.numel() else None
        if coming is not None:
            torch.cuda.current_stream(self._device).wait_event(coming[0])
        return coming is not None

    def release(self) -> None:
        """Write numbers into this rank's words that no wait is above."""
        with torch.cuda.device(self._device), contextlib.suppress(RuntimeError):
            stream = torch.cuda.Stream(self._device).cuda_stream  # type: ignore[no-untyped-call]
            for peer in range(self._size):
                for place in (4 * peer, _READ + 4 * peer):
                    self._write(stream, self.rank, place, self._last_waited + _FAR_AHEAD)

    def _write(self, stream: int, peer: int, place: int, number: int) -> None:
        _checked(self._driver.cuStreamWriteValue32(stream, self._bases[peer] + place, number & 0xFFFFFFFF, 0))

    def _wait(self, stream: int, place: int, number: int) -> None:
        at_least = self._driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ
        self._last_waited = number
        _checked(self._driver.cuStreamWaitValue32(stream, self._bases[self.rank] + place, number & 0xFFFFFFFF, at_least))


def _checked(result: tuple[Any, ...]) -> None:
    """Raise if a call of the driver failed."""
    error = result[0]
    if int(error) != 0:
        raise RuntimeError(f"CUDA refused a copy or a word between devices: {error!r}")


@functools.cache
def _bindings(name: str) -> Any:
    """Return a part of CUDA's API, or `None` where the package that brings it is missing."""
    try:
        return importlib.import_module(f"cuda.bindings.{name}")
    except ImportError:
        return None


def _host() -> str:
    """Return what processes of one running machine have in common."""
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text(encoding="ascii").strip() if boot.exists() else platform.node()
