"""What of an exchange follows from shapes, strides and routes alone: worked out once, kept, and carried out many times.

There are two ways to exchange. *Fetching*: each rank packs what others need into its staging memory, and each copies its parts
from there to where they belong. *Sending*: each rank copies parts straight into the memory of others, where they are
read in place; nothing is packed, but what is received has to be given back before its place is used again.

A recipe speaks of memories by number: tensors that are sent, tensors that are received, then the region of each rank.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from fastvideo.distributed.regions import aligned
from fastvideo.distributed.routes import Route, has_own_places
from fastvideo.distributed.rows import Form, Move, contiguous, moves, narrowed

__all__ = ["Fetching", "Layout", "Piece", "Sending", "fetching", "sending"]


class Layout(NamedTuple):
    """How a tensor lies in its memory: its shape, strides in elements and bytes of an element."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    item: int


class Piece(NamedTuple):
    """A part of a tensor, where it goes, and the rows that are copied there; `None` where it is none at equal distances."""

    target: Form
    source: Form
    moves: tuple[Move, ...] | None


class Fetching(NamedTuple):
    """How a rank carries out an exchange in which each fetches its parts.

    Attributes:
        length: Bytes of the region that every rank packs for its peers.
        readers: Peers that fetch from this rank.
        packs: What goes to this rank's region; what is fetched first comes first.
        own: What stays on this rank.
        stays: The moves of that, where it is rows.
        is_copied: All that is packed is rows, so that a stream beside the caller's can copy it.
        fetches: What this rank fetches, by peer, next rank first.
        shapes: Of what is received.
    """

    length: int
    readers: tuple[int, ...]
    packs: tuple[Piece, ...]
    own: tuple[Piece, ...]
    stays: tuple[Move, ...]
    is_copied: bool
    fetches: tuple[tuple[int, tuple[Move, ...]], ...]
    shapes: tuple[tuple[int, ...], ...]


class Sending(NamedTuple):
    """How a rank carries out an exchange in which each sends its parts.

    Attributes:
        length: Bytes of the region in which each rank receives.
        readers: Peers that receive from others.
        senders: Peers that send to this rank.
        receivers: Peers that this rank sends to.
        sends: What it sends, to the next rank first.
        own: What stays on this rank.
        received: What is received: where in this rank's region, and how.
        together: The same as one tensor, `[tensors, ...]`, if all are alike: then one view serves them all, which takes less
            host time than one each.
    """

    length: int
    readers: tuple[int, ...]
    senders: tuple[int, ...]
    receivers: tuple[int, ...]
    sends: tuple[Move, ...]
    own: tuple[Move, ...]
    received: tuple[Form, ...]
    together: Form | None


@functools.lru_cache(maxsize=1024)
def fetching(routes: tuple[Route, ...], layouts: tuple[Layout, ...], rank: int, into: Layout | None = None) -> Fetching:
    """Return how `rank` exchanges tensors by fetching.

    Args:
        routes: The route of each.
        layouts: How they lie.
        rank: This rank.
        into: How that lies where what is received goes, if there is one tensor; `None` makes room for it.

    Raises:
        ValueError: Where it goes are no rows at equal distances.
    """
    size, num = len(routes[0].counts), len(routes)
    peers = [(rank + distance) % size for distance in range(1, size)]
    packs: dict[int, list[Piece]] = {peer: [] for peer in reversed(peers)}
    own: list[Piece] = []
    fetches: dict[int, list[Move]] = {peer: [] for peer in peers}
    shapes: list[tuple[int, ...]] = []
    start = 0
    for number, (route, layout) in enumerate(zip(routes, layouts, strict=True)):
        places = _places(route.counts, route.is_gather)
        for peer, pieces in _packs(Form(number, 0, *layout), route, rank, 2 * num + rank, start).items():
            packs[peer] += pieces
        shapes.append(_shape(route))
        room = contiguous(num + number, 0, shapes[-1], layout.item) if into is None else Form(num + number, 0, *into)
        for target, (first, last) in zip(_parts_of(room, route, rank), route.send.parts[rank], strict=True):
            stays = narrowed(Form(number, 0, *layout), route.send.dim, first, last)
            target = _shaped(target, stays.shape)
            own.append(Piece(target, stays, moves(target, stays)))
        for peer in peers:
            place = start + places.of[peer][rank] * layout.item
            for target in _parts_of(room, route, peer):
                found = moves(target, contiguous(2 * num + peer, place, target.shape, layout.item))
                if found is None:
                    raise ValueError(f"expected room for rows, got strides {target.strides} of {target.shape}")
                fetches[peer] += found
                place += math.prod(target.shape) * layout.item
        start += aligned(max(places.packed) * layout.item)
    readers = tuple([peer for peer in packs if any(route.counts[rank][peer] for route in routes)])
    packed = tuple([piece for pieces in packs.values() for piece in pieces])
    return Fetching(
        start,
        readers,
        packed,
        tuple([piece for piece in own if piece.moves != ()]),
        tuple([move for piece in own for move in piece.moves or ()]),
        all(piece.moves is not None for piece in packed),
        tuple([(peer, tuple(found)) for peer, found in fetches.items() if found]),
        tuple(shapes),
    )


@functools.lru_cache(maxsize=1024)
def sending(routes: tuple[Route, ...], layouts: tuple[Layout, ...], rank: int) -> Sending | None:
    """Return how `rank` exchanges tensors by sending; `None` where one lies so that copy engines can't take its parts.

    What is received has to be joined along dim 1, in the order of ranks.

    Args:
        routes: The route of each.
        layouts: How they lie.
        rank: This rank.
    """
    size, num = len(routes[0].counts), len(routes)
    peers = [(rank + distance) % size for distance in range(1, size)]
    sends: dict[int, list[Move]] = {peer: [] for peer in (*peers, rank)}
    received: list[Form] = []
    start = 0
    for number, (route, layout) in enumerate(zip(routes, layouts, strict=True)):
        if route.receive.dim != 1 or not has_own_places(route):
            raise ValueError(f"expected parts that are joined along dim 1, got {route.receive}")
        batch, totals = route.shape[0], [sum(column) for column in zip(*route.counts, strict=True)]
        for peer, found in sends.items():
            # Each sample is what comes from one rank after another.
            place = start + sum(route.counts[sender][peer] for sender in range(rank)) // batch * layout.item
            for first, last in route.send.parts[peer]:
                piece = narrowed(Form(number, 0, *layout), route.send.dim, first, last)
                target = contiguous(2 * num + peer, place, piece.shape, layout.item)
                target = target._replace(strides=(totals[peer] // batch, *target.strides[1:]))
                part = moves(target, piece)
                if part is None:
                    return None
                found += part
                place += math.prod(piece.shape) // batch * layout.item
        received.append(contiguous(2 * num + rank, start, route.shape, layout.item))
        start += aligned(max(totals) * layout.item)
    everyone = range(size)
    return Sending(
        start,
        tuple([p for p in peers if any(route.counts[s][p] for route in routes for s in everyone if s != p)]),
        tuple([peer for peer in peers if any(route.counts[peer][rank] for route in routes)]),
        tuple([peer for peer in peers if sends[peer]]),
        tuple([move for peer in peers for move in sends[peer]]),
        tuple(sends[rank]),
        tuple(received),
        _together(received),
    )


def _together(forms: list[Form]) -> Form | None:
    """Return forms as one with a dim in front; `None` where they differ in more than their places, or these unevenly."""
    first, distance = forms[0], forms[-1].start - forms[-2].start if len(forms) > 1 else 0
    alike = [first._replace(start=first.start + number * distance) for number in range(len(forms))]
    if forms != alike or distance % first.item:
        return None
    return first._replace(shape=(len(forms), *first.shape), strides=(distance // first.item, *first.strides))


def _packs(x: Form, route: Route, rank: int, base: int, start: int) -> dict[int, list[Piece]]:
    """Return what each peer needs of `x`, and where in this rank's region it goes."""
    size = len(route.counts)
    packs: dict[int, list[Piece]] = {(rank + distance) % size: [] for distance in range(1, size)}
    if route.is_gather:
        whole = contiguous(base, start, x.shape, x.item)
        packs[(rank - 1) % size] += [Piece(whole, x, moves(whole, x))] if math.prod(x.shape) else []
        return packs
    places = _places(route.counts, route.is_gather).of[rank]
    for peer, pieces in packs.items():
        position = start + places[peer] * x.item
        for first, last in route.send.parts[peer]:
            piece = narrowed(x, route.send.dim, first, last)
            target = contiguous(base, position, piece.shape, x.item)
            if math.prod(piece.shape):
                pieces.append(Piece(target, piece, moves(target, piece)))
            position += math.prod(piece.shape) * x.item
    return packs


def _shape(route: Route) -> tuple[int, ...]:
    """Return the shape of what is received: the route's if each part has a place of its own, else flat."""
    if has_own_places(route):
        return tuple(route.shape)
    return (sum(math.prod(piece) for sender in range(len(route.counts)) for piece in _shapes(route, sender)),)


def _parts_of(received: Form, route: Route, sender: int) -> list[Form]:
    """Return where the part of `sender` goes, an entry for each of its intervals."""
    dim, parts = route.receive
    if len(received.shape) == len(route.shape):
        return [narrowed(received, dim, first, last) for first, last in parts[sender]]
    position = sum(math.prod(piece) for before in range(sender) for piece in _shapes(route, before))
    pieces = []
    for shape in _shapes(route, sender):
        pieces.append(contiguous(received.base, received.start + position * received.item, shape, received.item))
        position += math.prod(shape)
    return pieces


def _shapes(route: Route, sender: int) -> list[tuple[int, ...]]:
    dim, parts = route.receive
    return [(*route.shape[:dim], last - first, *route.shape[dim + 1 :]) for first, last in parts[sender]]


def _shaped(form: Form, shape: tuple[int, ...]) -> Form:
    """Return a form with dims of size 1 more or fewer, of as many elements."""
    if form.shape == shape:
        return form
    kept = iter([stride for size, stride in zip(form.shape, form.strides, strict=True) if size != 1])
    return form._replace(shape=shape, strides=tuple([1 if size == 1 else next(kept) for size in shape]))


class _Places(NamedTuple):
    """Where parts lie among what a sender packs, in elements: `of[sender][receiver]`, and how many there are in all."""

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
