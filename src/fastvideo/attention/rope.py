"""Rotary position embedding on `[batch, seq, heads, head_size]` (RoFormer, 2104.09864)."""

from __future__ import annotations

import torch

__all__ = ["apply_rope"]


def apply_rope(x: torch.Tensor, freqs_cis: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate each pair of neighbouring channels `(x[2i], x[2i+1])` by its position's angle.

    Args:
        x: `[B, S, H, D]`.
        freqs_cis: Cosines and sines of the angles, `[S, D/2]` each. The arithmetic runs in their dtype or x's, the wider.

    Returns:
        `[B, S, H, D]` in the dtype of `x`.

    Raises:
        TypeError: `freqs_cis` is no pair of real tensors.
        ValueError: Their shapes don't fit `x`.

    Example:
        >>> x = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
        >>> apply_rope(x, (torch.zeros(1, 1), torch.ones(1, 1))).flatten().tolist()
        [0.0, 1.0]
    """
    is_pair = isinstance(freqs_cis, tuple) and len(freqs_cis) == 2
    if not (is_pair and all(isinstance(x, torch.Tensor) and not x.is_complex() for x in freqs_cis)):
        given = freqs_cis if isinstance(freqs_cis, (tuple, list)) else [freqs_cis]
        kinds = ", ".join(str(x.dtype) if isinstance(x, torch.Tensor) else type(x).__name__ for x in given)
        raise TypeError(
            f"expected freqs_cis as a pair of tensors (cosines, sines), got {kinds}; of complex numbers pass (real, imag)"
        )
    expected = (x.shape[1], x.shape[3] // 2)
    for name, table in zip(("cosines", "sines"), freqs_cis, strict=True):
        if tuple(table.shape) != expected or x.shape[3] % 2:
            raise ValueError(f"expected {name} [S, D/2] = {expected} for {tuple(x.shape)}, got {tuple(table.shape)}")
    cos, sin = (table[None, :, None, :] for table in freqs_cis)
    even, odd = x[..., 0::2], x[..., 1::2]
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return rotated.flatten(-2).to(x.dtype)
