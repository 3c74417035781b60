"""Masks as other libraries write them, in the forms that this system takes."""

from __future__ import annotations

import torch

__all__ = ["fit_mask"]


def fit_mask(mask: torch.Tensor, query: torch.Tensor, key_len: int) -> torch.Tensor:
    """Return a mask that broadcasts as torch's attention has it in the form that layers take.

    Args:
        mask: Bool (True attends) or additive: `[B, R]`, or broadcastable to `[B, H, S, R]` with the last dim in full.
        query: `[B, S, H, D]`; gives the shape and the dtype.
        key_len: R.

    Returns:
        Bool key padding `[B, R]` where the mask says nothing else, otherwise `[B|1, H|1, S, R]`.

    Raises:
        ValueError: Its shape doesn't fit.

    Example:
        >>> mask = torch.tensor([True, False]).view(1, 1, 1, 2)
        >>> fit_mask(mask, torch.zeros(3, 5, 2, 8), 2).shape
        torch.Size([3, 2])
    """
    batch, query_len = query.shape[:2]
    if mask.dim() == 2 and tuple(mask.shape) == (batch, key_len):
        mask = mask[:, None, None, :]
    while mask.dim() < 4:
        mask = mask.unsqueeze(0)
    if mask.dim() != 4 or mask.shape[3] != key_len:
        raise ValueError(f"expected a mask over {key_len} keys, broadcastable to [B, H, S, {key_len}], got {tuple(mask.shape)}")
    if mask.dtype == torch.bool and mask.shape[1] == 1 and mask.shape[2] == 1:
        return mask[:, 0, 0].expand(batch, key_len)
    mask = mask if mask.dtype == torch.bool else mask.to(query.dtype)
    return mask.expand(-1, -1, query_len, -1)
