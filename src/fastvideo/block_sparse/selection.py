"""Which tiles a query tile keeps: an exact top-k of coarse scores with a fixed answer for every input.

Ties go to the lowest index, NaN ranks below -inf, -0 equals +0, and there are always exactly `k` distinct indices. No
host waits, and no gradient passes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Scores and the sorted copies of one group of heads stay below this.
_SCRATCH_BYTES = 256 << 20


def num_kept_tiles(num_tiles: int, sparsity: float) -> int:
    """How many of `num_tiles` are kept at a sparsity: `max(1, ceil((1 - sparsity) * num_tiles))`.

    Rounding of the product does not count as a further tile: 0.7 of 10 dropped keeps 3, although
    `(1 - 0.7) * 10 > 3` in floating point.

    Args:
        num_tiles: Tiles of the grid, at least 1.
        sparsity: Share of tiles to drop, in [0, 1).

    Raises:
        ValueError: For a sparsity outside [0, 1) or NaN.

    Example:
        >>> [num_kept_tiles(10, sparsity) for sparsity in (0.0, 0.7, 0.9, 0.99)]
        [10, 3, 1, 1]
    """
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"expected sparsity in [0, 1), got {sparsity=}")
    return max(1, math.ceil((1.0 - sparsity) * num_tiles - 1e-6))


@torch.no_grad()
def top_k_ascending(scores: Tensor, k: int) -> Tensor:
    """Indices of the `k` highest scores of each row, in ascending order.

    Args:
        scores: `[..., N]`, floating point.
        k: How many to keep, 1 to N.

    Returns:
        `[..., k]` int32, distinct and ascending.

    Raises:
        ValueError: For `k` outside `[1, N]`.

    Example:
        >>> top_k_ascending(torch.tensor([1.0, float("nan"), 3.0, 3.0, 3.0]), 2).tolist()
        [2, 3]
    """
    num_tiles = scores.shape[-1]
    if not 1 <= k <= num_tiles:
        raise ValueError(f"expected k in [1, {num_tiles}], got {k=}")
    if k == num_tiles:
        everything = torch.arange(num_tiles, dtype=torch.int32, device=scores.device)
        return everything.expand(scores.shape).contiguous()
    # An ascending sort of the negated scores puts NaN last; subtracting from +0 makes one zero of both.
    ranked = torch.sort(0.0 - scores, dim=-1, stable=True).indices[..., :k]
    return ranked.to(torch.int32).sort(dim=-1).values


@torch.no_grad()
def select_tiles(pooled_query: Tensor, pooled_key: Tensor, num_kept: int) -> Tensor:
    """The `num_kept` key tiles of highest dot product for each query tile.

    Args:
        pooled_query: `[B, N, H, D]` in fp32 or fp64, with the scale of the scores already applied.
        pooled_key: `[B, N, H, D]`.
        num_kept: Tiles to keep.

    Returns:
        `[B, H, N, num_kept]` int32, ascending.
    """
    batch, num_tiles, num_heads, _ = pooled_query.shape
    query, key = pooled_query.detach().transpose(1, 2), pooled_key.detach().permute(0, 2, 3, 1)
    # A score, its negation, the sorted copy and the 8-byte indices.
    step = max(1, _SCRATCH_BYTES // (batch * num_tiles * num_tiles * (3 * query.itemsize + 8)))
    groups = [slice(first, first + step) for first in range(0, num_heads, step)]
    kept = [top_k_ascending(query[:, group] @ key[:, group], num_kept) for group in groups]
    return torch.cat(kept, dim=1) if len(kept) > 1 else kept[0]
