"""The calls of CUDA's driver that an exchange is made of, by `ctypes`, which adds little to what the driver itself takes.

Streams and events are handles and memory is addresses, all as integers; the device's context is current, as it is after any
call of torch for that device.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import NoReturn

from fastvideo.distributed.rows import Move

__all__ = ["Driver", "open_driver"]

_LIBRARIES = ("libcuda.so.1", "libcuda.so")
_ANY_MEMORY = 4
"""`CU_MEMORYTYPE_UNIFIED`: addresses say themselves whose they are."""

_AT_LEAST = 0
"""`CU_STREAM_WAIT_VALUE_GEQ`: numbers are compared cyclically."""

_WAIT, _WRITE = 1, 2
"""`CU_STREAM_MEM_OP_WAIT_VALUE_32` and `CU_STREAM_MEM_OP_WRITE_VALUE_32`."""

_NO_TIMING = 2
"""`CU_EVENT_DISABLE_TIMING`."""

_Address, _Handle, _Size = ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t


class _Rectangle(ctypes.Structure):
    """`CUDA_MEMCPY2D`."""

    _fields_ = (
        ("source_x", _Size),
        ("source_y", _Size),
        ("source_type", ctypes.c_uint),
        ("source_host", ctypes.c_void_p),
        ("source", _Address),
        ("source_array", ctypes.c_void_p),
        ("source_distance", _Size),
        ("target_x", _Size),
        ("target_y", _Size),
        ("target_type", ctypes.c_uint),
        ("target_host", ctypes.c_void_p),
        ("target", _Address),
        ("target_array", ctypes.c_void_p),
        ("target_distance", _Size),
        ("length", _Size),
        ("number", _Size),
    )


class _Words:
    """Several words that are written or waited for by one call: an array of `CUstreamBatchMemOpParams`, 48 bytes each.

    Args:
        operation: What is done with them.
    """

    def __init__(self, operation: int) -> None:
        self._operation, self._count = operation, 0
        self._room: ctypes.Array[ctypes.c_uint64] = (ctypes.c_uint64 * 0)()

    def fill(self, words: Sequence[tuple[int, int]]) -> ctypes.Array[ctypes.c_uint64]:
        """Return the array for these addresses and numbers; the next call uses its memory again."""
        if len(words) > self._count:
            self._count = len(words)
            # The operation, the address, the number, flags (0 is `CU_STREAM_WAIT_VALUE_GEQ` too), an alias, and padding.
            self._room = (ctypes.c_uint64 * (6 * self._count))(*[self._operation, 0, 0, 0, 0, 0] * self._count)
        room = self._room
        for place, (address, number) in enumerate(words):
            room[6 * place + 1], room[6 * place + 2] = address, number & 0xFFFFFFFF
        return room


class Driver:
    """Copies, words between devices and the order of streams. One thread at a time.

    Args:
        library: The driver.

    Raises:
        AttributeError: The driver is too old to have one of the calls.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._copy_line = library.cuMemcpyAsync
        self._copy_line.argtypes = (_Address, _Address, _Size, _Handle)
        self._copy_rows = library.cuMemcpy2DAsync_v2
        self._copy_rows.argtypes = (ctypes.POINTER(_Rectangle), _Handle)
        self._write = library.cuStreamWriteValue32_v2
        self._wait = library.cuStreamWaitValue32_v2
        self._write.argtypes = self._wait.argtypes = (_Handle, _Address, ctypes.c_uint32, ctypes.c_uint)
        self._words = library.cuStreamBatchMemOp_v2
        self._words.argtypes = (_Handle, ctypes.c_uint, ctypes.c_void_p, ctypes.c_uint)
        self._create = library.cuEventCreate
        self._create.argtypes = (ctypes.POINTER(ctypes.c_void_p), ctypes.c_uint)
        self._record = library.cuEventRecord
        self._record.argtypes = (_Handle, _Handle)
        self._after = library.cuStreamWaitEvent
        self._after.argtypes = (_Handle, _Handle, ctypes.c_uint)
        self._rows = _Rectangle(source_type=_ANY_MEMORY, target_type=_ANY_MEMORY)
        self._rows_here = ctypes.byref(self._rows)
        self._writes, self._waits = _Words(_WRITE), _Words(_WAIT)

    def copy(self, stream: int, moves: Sequence[Move], bases: Sequence[int]) -> None:
        """Copy rows between memories that begin at `bases`."""
        rows, copy_rows, where = self._rows, self._copy_rows, self._rows_here
        for to, target, target_distance, of, source, source_distance, length, number in moves:
            if number == 1:
                error = self._copy_line(bases[to] + target, bases[of] + source, length, stream)
            else:
                rows.target, rows.target_distance = bases[to] + target, target_distance
                rows.source, rows.source_distance = bases[of] + source, source_distance
                rows.length, rows.number = length, number
                error = copy_rows(where, stream)
            if error:
                _fail(error)

    def write(self, stream: int, words: Sequence[tuple[int, int]]) -> None:
        """Write 32 bits each to addresses once all that was given to the stream before is done and seen by everyone."""
        if len(words) == 1:
            ((address, number),) = words
            error = self._write(stream, address, number & 0xFFFFFFFF, 0)
        else:
            error = self._words(stream, len(words), self._writes.fill(words), 0)
        if error:
            _fail(error)

    def wait(self, stream: int, words: Sequence[tuple[int, int]]) -> None:
        """Let what comes next on the stream wait until the 32 bits at each address are at least its number."""
        if len(words) == 1:
            ((address, number),) = words
            error = self._wait(stream, address, number & 0xFFFFFFFF, _AT_LEAST)
        else:
            error = self._words(stream, len(words), self._waits.fill(words), 0)
        if error:
            _fail(error)

    def new_event(self) -> int:
        """Return an event, which lasts as long as the process."""
        event = ctypes.c_void_p()
        error = self._create(ctypes.byref(event), _NO_TIMING)
        if error:
            _fail(error)
        return event.value or 0

    def record(self, event: int, stream: int) -> None:
        """Let the event stand for all that was given to the stream so far."""
        error = self._record(event, stream)
        if error:
            _fail(error)

    def after(self, stream: int, event: int) -> None:
        """Let what comes next on the stream wait for what the event stands for now."""
        error = self._after(stream, event, 0)
        if error:
            _fail(error)


@functools.cache
def _library() -> ctypes.CDLL | None:
    for name in _LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def open_driver() -> Driver | None:
    """Return the driver of this machine, or `None` where it has none, or one without these calls (before CUDA 11.7)."""
    library = _library()
    if library is None:
        return None
    try:
        return Driver(library)
    except AttributeError:
        return None


def _fail(error: int) -> NoReturn:
    raise RuntimeError(f"CUDA refused a copy or a word between devices: its driver returned error {error}")
