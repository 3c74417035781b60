"""Routes: which part of its tensor each rank sends to which other, and where it goes there.

Everything here is numbers. An exchange that follows a route is in `fastvideo.distributed.collectives`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

__all__ = ["Cut", "Interval", "Route", "consecutive", "gather_route", "has_own_places", "remembered"]

F = TypeVar("F", bound=Callable[..., Any])

Interval = tuple[int, int]
"""First index and the one after the last."""


class Cut(NamedTuple):
    """How a tensor falls into one part per rank: part `r` is made of `parts[r]`, intervals along `dim`, one after another."""

    dim: int
    parts: tuple[tuple[Interval, ...], ...]


class Route(NamedTuple):
    """An exchange as one rank sees it.

    Attributes:
        send: How its tensor is cut.
        receive: How what it receives is joined.
        source: Shape of what it sends.
        shape: Shape of what it receives.
        counts: Elements that every rank sends to every other, `counts[sender][receiver]`: the same on all ranks.
        is_gather: Every rank sends all it has to everyone.
    """

    send: Cut
    receive: Cut
    source: tuple[int, ...]
    shape: tuple[int, ...]
    counts: tuple[tuple[int, ...], ...]
    is_gather: bool = False

    def back(self) -> Route:
        """Return the route that gradients take."""
        return Route(self.receive, self.send, self.shape, self.source, tuple(zip(*self.counts, strict=True)))


def remembered(function: F) -> F:
    """Let eager code keep what a function of hashable arguments returned; traced code calls it as it is.

    Example:
        >>> remembered(lambda: [1])() == [1]
        True
    """
    kept = functools.lru_cache(maxsize=4096)(function)

    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
        return (function if torch.compiler.is_compiling() else kept)(*args, **keywords)

    return call  # type: ignore[return-value]


def consecutive(dim: int, lengths: Sequence[int]) -> Cut:
    """Return the cut along `dim` into neighbouring parts of `lengths`.

    Example:
        >>> consecutive(1, (3, 2))
        Cut(dim=1, parts=(((0, 3),), ((3, 5),)))
    """
    stops = [sum(lengths[: rank + 1]) for rank in range(len(lengths))]
    return Cut(dim, tuple(((stop - length, stop),) for stop, length in zip(stops, lengths, strict=True)))


@remembered
def gather_route(shape: tuple[int, ...], dim: int, lengths: tuple[int, ...]) -> Route:
    """Return the route on which everyone gets everyone's tensor, joined along `dim`; rank `r` has `lengths[r]` there."""
    everything = Cut(dim, (((0, shape[dim]),),) * len(lengths))
    row = math.prod(shape[:dim]) * math.prod(shape[dim + 1 :])
    counts = tuple([(row * length,) * len(lengths) for length in lengths])
    whole = (*shape[:dim], sum(lengths), *shape[dim + 1 :])
    return Route(everything, consecutive(dim, lengths), tuple(shape), whole, counts, is_gather=True)


def has_own_places(route: Route) -> bool:
    """Return whether what is received falls into parts that do not overlap, so that each goes straight to its place."""
    intervals = sorted(interval for part in route.receive.parts for interval in part if interval[1] > interval[0])
    stops = [0, *[last for _, last in intervals]]
    return stops[-1] == route.shape[route.receive.dim] and [first for first, _ in intervals] == stops[:-1]
