"""The four calls of CUDA's driver that an exchange is made of, by `ctypes`, which adds little to what the driver itself takes.

Streams are handles and memory is addresses, both as integers; the device's context is current, as it is after any call of torch
for that device.
"""

from __future__ import annotations

import ctypes
import functools

__all__ = ["Driver", "open_driver"]

_LIBRARIES = ("libcuda.so.1", "libcuda.so")
_ANY_MEMORY = 4
"""`CU_MEMORYTYPE_UNIFIED`: addresses say themselves whose they are."""

_AT_LEAST = 0
"""`CU_STREAM_WAIT_VALUE_GEQ`: numbers are compared cyclically."""

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


class Driver:
    """Copies and words between devices. One thread at a time.

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
        self._rows = _Rectangle(source_type=_ANY_MEMORY, target_type=_ANY_MEMORY)
        self._rows_here = ctypes.byref(self._rows)

    def copy(self, target: int, source: int, length: int, stream: int) -> None:
        """Copy `length` bytes."""
        _check(self._copy_line(target, source, length, stream))

    def copy_rows(
        self, target: int, target_distance: int, source: int, source_distance: int, length: int, number: int, stream: int
    ) -> None:
        """Copy `number` rows of `length` bytes, at these distances from the start of one to that of the next."""
        rows = self._rows
        rows.target, rows.target_distance = target, target_distance
        rows.source, rows.source_distance = source, source_distance
        rows.length, rows.number = length, number
        _check(self._copy_rows(self._rows_here, stream))

    def write(self, stream: int, address: int, number: int) -> None:
        """Write 32 bits once all that was given to the stream before is done and seen by everyone."""
        _check(self._write(stream, address, number & 0xFFFFFFFF, 0))

    def wait(self, stream: int, address: int, number: int) -> None:
        """Let what comes next on the stream wait until the 32 bits at `address` are at least `number`."""
        _check(self._wait(stream, address, number & 0xFFFFFFFF, _AT_LEAST))


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


def _check(error: int) -> None:
    """Raise if a call failed."""
    if error != 0:
        raise RuntimeError(f"CUDA refused a copy or a word between devices: its driver returned error {error}")
