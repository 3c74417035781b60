"""Sets of layers or steps, as people write them: a number, `"0-3,7"`, a slice, a range or a list of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

__all__ = ["Intervals", "Numbers", "contains", "describe_intervals", "parse_intervals"]

Numbers: TypeAlias = "int | str | slice | range | Sequence[int] | None"
"""How a set of layers or steps is written; `None` means every one."""

Intervals: TypeAlias = "tuple[tuple[int, int | None], ...]"
"""Half-open intervals `(start, stop)` in rising order; a `stop` of `None` has no end."""

ALL: Intervals = ((0, None),)


def parse_intervals(name: str, numbers: Numbers) -> Intervals:
    """Return the intervals of a set of numbers counted from 0.

    Args:
        name: What is counted, for messages.
        numbers: `5`; `"0-3,7"` with both ends included, `"5-"` without end; `slice(5, None)`; `range(4)`; `[0, 2]`; `None`
            for all.

    Raises:
        TypeError: It is nothing of these.
        ValueError: It is empty, counts from the end, or has a stride.

    Example:
        >>> parse_intervals("layers", "0-3,7")
        ((0, 4), (7, 8))
        >>> parse_intervals("steps", slice(5, None))
        ((5, None),)
    """
    if numbers is None:
        return ALL
    if isinstance(numbers, bool):
        raise TypeError(f"expected {name} as numbers, got {numbers!r}")
    found: list[tuple[int, int | None]]
    if isinstance(numbers, int):
        found = [(numbers, numbers + 1)]
    elif isinstance(numbers, str):
        found = [_parse_part(name, part, numbers) for part in numbers.split(",")]
    elif isinstance(numbers, (slice, range)):
        if numbers.step not in (None, 1):
            raise ValueError(f"expected {name} without a stride, got {numbers!r}; list the numbers instead")
        if not all(end is None or type(end) is int for end in (numbers.start, numbers.stop)):
            raise TypeError(f"expected {name} between integers, got {numbers!r}")
        found = [(numbers.start or 0, numbers.stop)]
    elif isinstance(numbers, Sequence) and all(type(number) is int for number in numbers):
        found = [(int(number), int(number) + 1) for number in numbers]
    else:
        raise TypeError(f"expected {name} as an integer, a text like '0-3,7', a slice, a range or integers, got {numbers!r}")
    for start, stop in found:
        if start < 0 or (stop is not None and stop < 0):
            raise ValueError(f"expected {name} counted from 0, got {numbers!r}; numbers from the end have no meaning here")
    kept = sorted({(start, stop) for start, stop in found if stop is None or stop > start}, key=lambda pair: pair[0])
    if not kept:
        raise ValueError(f"expected at least one of the {name}, got {numbers!r}")
    return _merge(kept)


def _merge(intervals: list[tuple[int, int | None]]) -> Intervals:
    merged = [intervals[0]]
    for start, stop in intervals[1:]:
        last_start, last_stop = merged[-1]
        if last_stop is None or start <= last_stop:
            merged[-1] = (last_start, None if last_stop is None or stop is None else max(last_stop, stop))
        else:
            merged.append((start, stop))
    return tuple(merged)


def _parse_part(name: str, part: str, whole: str) -> tuple[int, int | None]:
    first, dash, last = (piece.strip() for piece in part.strip().partition("-"))
    is_open = bool(dash) and not last
    if not first.isdecimal() or not (last.isdecimal() or is_open or not dash):
        raise ValueError(f"expected {name} like '3', '0-3', '5-' or a list of these with commas, got {whole!r}")
    if is_open:
        return int(first), None
    if last and int(last) < int(first):
        raise ValueError(f"expected {name} in rising order, got {part.strip()!r} in {whole!r}")
    return int(first), int(last or first) + 1


def contains(intervals: Intervals, number: int) -> bool:
    """Return whether a number lies in one of the intervals.

    Example:
        >>> contains(((0, 4), (7, None)), 5), contains(((0, 4), (7, None)), 9)
        (False, True)
    """
    return any(start <= number and (stop is None or number < stop) for start, stop in intervals)


def describe_intervals(intervals: Intervals) -> str:
    """Return the text form of intervals.

    Example:
        >>> describe_intervals(((0, 4), (7, 8), (9, None))), describe_intervals(((0, None),))
        ('0-3,7,9-', 'all')
    """
    if intervals == ALL:
        return "all"
    parts = []
    for start, stop in intervals:
        last = "" if stop is None else stop - 1
        parts.append(str(start) if last == start else f"{start}-{last}")
    return ",".join(parts)
