"""Memory for a whole tensor whose pieces arrive one by one, so that nothing is left to join.

What several exchanges receive lands side by side: the outputs of groups of heads and, in the backward pass, the gradients of
what was cut into such groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastvideo.second_derivatives import differentiable_once

__all__ = ["Room", "cut", "join"]


class Room:
    """Memory of one tensor, made when its first piece is to arrive.

    Args:
        lengths: What the pieces hold along `dim`.
        dim: The dim along which they are neighbours.

    Example:
        >>> room = Room((1, 2), -1)
        >>> first, second = (room.place(number, torch.ones(1), (4, number + 1)) for number in range(2))
        >>> room.whole([first.fill_(3), second.fill_(5)])[0].tolist()
        [3.0, 5.0, 5.0]
    """

    def __init__(self, lengths: Sequence[int], dim: int) -> None:
        self.lengths, self.dim = list(lengths), dim
        self._places: tuple[torch.Tensor, ...] = ()
        self._memory: torch.Tensor | None = None

    def place(self, number: int, like: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """Return where piece `number`, of `shape`, is to arrive, of the dtype and on the device of `like`."""
        if self._memory is None:
            whole = list(shape)
            whole[self.dim] = sum(self.lengths)
            with torch.no_grad():
                self._memory = like.new_empty(whole)
                self._places = torch.split(self._memory, self.lengths, self.dim)
        return self._places[number]

    def whole(self, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the tensor of these pieces: the memory, which is the caller's from now on, if all lie where they belong."""
        memory, places = self._memory, self._places
        self._memory, self._places = None, ()
        if memory is not None and all(map(_is_same, pieces, places)):
            return memory
        return torch.cat(list(pieces), dim=self.dim)


def cut(x: torch.Tensor, room: Room) -> tuple[torch.Tensor, ...]:
    """Return the pieces of `x`, views of it, whose gradients may arrive in `room`."""
    return _Cut.apply(x, room)  # type: ignore[no-any-return,no-untyped-call]


def join(pieces: Sequence[torch.Tensor], room: Room) -> torch.Tensor:
    """Return the tensor of pieces, without a copy if they arrived in `room`."""
    if not (torch.is_grad_enabled() and any(piece.requires_grad for piece in pieces)):
        return room.whole(pieces)
    return _Join.apply(room, *pieces)  # type: ignore[no-any-return,no-untyped-call]


def _is_same(x: torch.Tensor, y: torch.Tensor) -> bool:
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride() and x.dtype == y.dtype


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, room: Room) -> tuple[torch.Tensor, ...]:
        ctx.room = room
        return torch.split(x, room.lengths, room.dim)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.room.whole(grads), None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, room: Room, *pieces: torch.Tensor) -> torch.Tensor:
        ctx.room = room
        return room.whole(pieces)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (None, *torch.split(grad, ctx.room.lengths, ctx.room.dim))
