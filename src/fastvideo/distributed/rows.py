"""Tensors as rows of bytes at equal distances, which copy engines move, and where such rows lie.

A copy engine takes a rectangle: rows of one length, at one distance there and at another here. `moves` says of two tensors of
one shape by which rectangles one becomes the other, in bytes, so that it holds wherever the two are.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import torch

__all__ = ["Form", "Move", "Rows", "contiguous", "copy_wide", "form_of", "moves", "narrowed", "rows_of", "rows_of_both"]


class Form(NamedTuple):
    """Where the elements of a tensor lie.

    Attributes:
        base: Which memory it is in, a number of the caller's.
        start: Bytes from there to its first element.
        shape: Its shape.
        strides: Its strides, in elements.
        item: Bytes of an element.
    """

    base: int
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    item: int


class Move(NamedTuple):
    """Rows of bytes to be copied.

    Attributes:
        target: Which memory they go to.
        target_start: Bytes from its start to the first row.
        target_distance: Bytes from the start of a row to that of the next, there.
        source: Which memory they come from.
        source_start: As above.
        source_distance: As above.
        length: Bytes of a row.
        number: How many rows.
    """

    target: int
    target_start: int
    target_distance: int
    source: int
    source_start: int
    source_distance: int
    length: int
    number: int


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


def form_of(x: torch.Tensor, base: int) -> Form:
    """Return the form of a tensor whose memory, from its first element on, the caller calls `base`."""
    return Form(base, 0, tuple(x.shape), x.stride(), x.element_size())


def contiguous(base: int, start: int, shape: tuple[int, ...], item: int) -> Form:
    """Return the form of a contiguous tensor.

    Example:
        >>> contiguous(0, 64, (2, 3, 4), 2).strides
        (12, 4, 1)
    """
    strides = [1] * len(shape)
    for dim in range(len(shape) - 1, 0, -1):
        strides[dim - 1] = strides[dim] * shape[dim]
    return Form(base, start, tuple(shape), tuple(strides), item)


def narrowed(form: Form, dim: int, first: int, last: int) -> Form:
    """Return the form of what `torch.narrow` would cut out, from index `first` up to `last`.

    Example:
        >>> narrowed(contiguous(0, 64, (2, 3), 2), 1, 2, 3)
        Form(base=0, start=68, shape=(2, 1), strides=(3, 1), item=2)
    """
    base, start, shape, strides, item = form
    return Form(base, start + first * strides[dim] * item, (*shape[:dim], last - first, *shape[dim + 1 :]), strides, item)


def moves(target: Form, source: Form) -> tuple[Move, ...] | None:
    """Return what copies `source` to `target`, of one shape; `None` where copy engines would take too many rectangles.

    Example:
        >>> part = narrowed(contiguous(0, 0, (1, 6, 8, 4), 2), 2, 4, 6)
        >>> tuple(moves(contiguous(1, 0, part.shape, 2), part)[0])
        (1, 0, 16, 0, 32, 64, 16, 6)
    """
    if math.prod(source.shape) == 0:
        return ()
    pair = _rows_of_both(target, source)
    if pair is not None:
        to, of = pair
        return (Move(target.base, target.start, to.distance, source.base, source.start, of.distance, of.length, of.number),)
    if source.shape[0] == 1:
        return None
    # Samples of a batch may lie further apart than their rows.
    found: list[Move] = []
    for sample in range(source.shape[0]):
        one, other = (narrowed(form, 0, sample, sample + 1) for form in (target, source))
        if _rows_of_both(one, other) is None:
            return None
        found += moves(one, other) or ()
    return tuple(found)


def rows_of(x: torch.Tensor) -> Rows | None:
    """Return a tensor as rows, or `None` where these are at unequal distances.

    Example:
        >>> rows_of(torch.empty(2, 3, 8, 4)[:, :, 2:4])
        Rows(number=6, length=32, distance=128)
    """
    return _rows(tuple(x.shape), x.stride(), x.element_size())


def rows_of_both(x: torch.Tensor, y: torch.Tensor) -> tuple[Rows, Rows] | None:
    """Return two tensors of one shape as equally many and long rows, or `None` where they have none."""
    return _rows_of_both(form_of(x, 0), form_of(y, 1))


def _rows_of_both(x: Form, y: Form) -> tuple[Rows, Rows] | None:
    one, other = (_rows(form.shape, form.strides, form.item) for form in (x, y))
    if one is None or other is None:
        return None
    length = min(one.length, other.length)
    one, other = one.cut(length), other.cut(length)
    return None if one is None or other is None else (one, other)


_MAX_DISTANCE = (1 << 31) - 1
"""CUDA takes no rows further apart."""


def _rows(shape: tuple[int, ...], strides: tuple[int, ...], item: int) -> Rows | None:
    length = 1
    dims = [(size, stride) for size, stride in zip(shape, strides, strict=True) if size != 1]
    while dims and dims[-1][1] == length:
        length *= dims.pop()[0]
    if any(outer != size * inner for (_, outer), (size, inner) in itertools.pairwise(dims)):
        return None
    distance = dims[-1][1] if dims else length
    # Where elements share memory, as in an expanded tensor, rows do too.
    if distance < length or (dims and distance * item > _MAX_DISTANCE):
        return None
    return Rows(math.prod(size for size, _ in dims), length * item, distance * item)


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
