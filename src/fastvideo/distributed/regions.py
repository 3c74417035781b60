"""Regions of memory that ranks share: a ring in which a later exchange overwrites an earlier one's region.

All ranks claim the same regions in the same order, so each knows where those of the others lie.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

__all__ = ["LEAST_CAPACITY", "Claim", "Regions", "aligned"]

LEAST_CAPACITY = 64 << 20
_ALIGNMENT = 512
_REGIONS_HELD = 2
"""Exchanges of the largest size that a memory holds where one is written while another is read."""

Waits = tuple[tuple[int, int], ...]
"""Ranks, and up to which exchange they must have read."""


class Claim(NamedTuple):
    """A region.

    Attributes:
        number: Of the exchange, from 1 on.
        start: Bytes from the start of the memory.
        waits: Who must have read what was there before.
    """

    number: int
    start: int
    waits: Waits


class _Region(NamedTuple):
    start: int
    length: int
    number: int
    readers: tuple[int, ...]


class Regions:
    """The regions of one memory, oldest first, and the number of exchanges so far."""

    def __init__(self) -> None:
        self._number = 0
        self._next = 0
        self._regions: deque[_Region] = deque()

    def claim(
        self,
        length: int,
        readers: tuple[int, ...],
        capacity: int,
        grow: Callable[[int, Waits], None],
        num_lent: int | None = None,
    ) -> Claim:
        """Return the region of the next exchange.

        Args:
            length: Its bytes.
            readers: Ranks that read it.
            capacity: Bytes of the memory.
            grow: Replaces it by one of as many bytes, once these ranks have read.
            num_lent: How many of the last exchanges' regions are still in use here, so that they must not be waited for; `None`
                where regions are read as soon as they are written.
        """
        before: list[_Region] = []
        if num_lent == 0:
            # From the start, so that equal calls use equal regions, and the memory needs no more than one of them.
            before, self._next = list(self._regions), 0
            self._regions.clear()
        start = self._fit(length, capacity, before) if length <= capacity else 0
        first_lent = self._number + 1 - (num_lent or 0)
        self._number += 1
        if length > capacity or any(region.number >= first_lent for region in before):
            before += self._regions
            self._regions.clear()
            lent = sum(region.length for region in before if region.number >= first_lent)
            least = _REGIONS_HELD * length if num_lent is None else length + lent
            grow(max(LEAST_CAPACITY, least if length > capacity else capacity + length), _readers_of(before))
            before, start = [], 0
        self._regions.append(_Region(start, length, self._number, readers))
        self._next = start + length
        return Claim(self._number, start, _readers_of(before))

    def _fit(self, length: int, capacity: int, before: list[_Region]) -> int:
        """Return where the next region starts, and move those in its way, which are the oldest, to `before`."""
        regions, start = self._regions, self._next
        if start + length > capacity:
            while regions and regions[0].start >= start:
                before.append(regions.popleft())
            start = 0
        while regions and start <= regions[0].start < start + length:
            before.append(regions.popleft())
        return start


def aligned(num_bytes: int) -> int:
    """Return the bytes that a tensor takes, so that the next begins at a multiple of 512."""
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _readers_of(regions: Sequence[_Region]) -> Waits:
    """Return the readers of regions, oldest first, and the last exchange that each has read there."""
    last: dict[int, int] = {}
    for region in regions:
        last.update(dict.fromkeys(region.readers, region.number))
    return tuple(last.items())
