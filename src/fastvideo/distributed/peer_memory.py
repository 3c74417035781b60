"""What an exchange needs of memory that ranks share: CUDA's is `fastvideo.distributed.symmetric`, tests have one of threads."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from fastvideo.distributed.rows import Move

__all__ = ["PeerMemory"]


class PeerMemory(Protocol):
    """Memory that the ranks of a group share, words between their devices, and streams that carry them out asynchronously.

    Attributes:
        rank: This process's place in the group.
        capacity: Bytes of memory of each rank.
        addresses: Where that of each rank starts.
        copies: A stream for copies between devices.
        own: A stream for copies that stay on this one.
        words: A stream for words that are to hold up nothing.
    """

    rank: int
    capacity: int
    addresses: tuple[int, ...]
    copies: Any
    own: Any
    words: Any

    def grow(self, capacity: int, waits: Sequence[tuple[int, int]]) -> None:
        """Replace the memory by one of `capacity` bytes once these peers have read up to these exchanges; a collective call.

        All streams are idle then, on every rank.
        """
        ...

    def view(self, dtype: torch.dtype) -> torch.Tensor:
        """Return this rank's memory as elements, flat."""
        ...

    def guard(self) -> contextlib.AbstractContextManager[object]:
        """Return a context in which the memory's device is the current one."""
        ...

    def current(self) -> Any:
        """Return the caller's stream."""
        ...

    def mark(self, stream: Any) -> Any:
        """Return a mark of all that was given to a stream so far."""
        ...

    def after(self, stream: Any, mark: Any) -> None:
        """Let what comes next on a stream wait for a mark."""
        ...

    def follow(self, streams: Sequence[Any], leader: Any) -> None:
        """Let what comes next on these streams wait for all that was given to `leader` so far."""
        ...

    def copy(self, stream: Any, moves: Sequence[Move], bases: Sequence[int]) -> None:
        """Copy rows between devices, whose memories begin at `bases`."""
        ...

    def copy_here(self, stream: Any, moves: tuple[Move, ...], bases: Sequence[int]) -> None:
        """Copy rows within this rank's device."""
        ...

    def write_written(self, stream: Any, peers: Sequence[int], number: int) -> None:
        """Tell peers, at least one, that this rank has written all of exchange `number`."""
        ...

    def write_read(self, stream: Any, peers: Sequence[int], number: int) -> None:
        """Tell peers, at least one, that this rank has read all of exchange `number`."""
        ...

    def wait_written(self, stream: Any, peers: Sequence[int], number: int) -> None:
        """Let what comes next on a stream wait until peers, at least one, have written all of exchange `number`."""
        ...

    def wait_read(self, stream: Any, waits: Sequence[tuple[int, int]]) -> None:
        """Let what comes next on a stream wait until peers, at least one, have each read all of an exchange."""
        ...
