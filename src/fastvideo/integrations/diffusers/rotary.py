"""Rotary embedding in the two channel orders of diffusers' models (RoFormer, 2104.09864).

Both compute in at least float32 and round once, to the dtype of the tokens.
"""

from __future__ import annotations

import torch

__all__ = ["rotate_halves", "rotate_neighbours"]


def rotate_neighbours(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate channel pairs `(2i, 2i + 1)`.

    Args:
        x: `[..., D]`.
        cos: Cosines, one per pair, broadcastable to `[..., D/2]`.
        sin: Sines, likewise.

    Example:
        >>> rotate_neighbours(torch.tensor([1.0, 0.0]), torch.zeros(1), torch.ones(1)).tolist()
        [0.0, 1.0]
    """
    even, odd = torch.unflatten(_widen(x), -1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


def rotate_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate channel pairs `(i, i + D/2)`.

    Args:
        x: `[..., D]`.
        cos: Cosines, one per pair, broadcastable to `[..., D/2]`.
        sin: Sines, likewise.

    Example:
        >>> rotate_halves(torch.tensor([1.0, 2.0, 0.0, 0.0]), torch.zeros(2), torch.ones(2)).tolist()
        [0.0, 0.0, 1.0, 2.0]
    """
    first, second = _widen(x).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x.dtype)


def _widen(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
