"""Means over the tiles of a video's token grid.

Sums run in fp32 (fp64 for fp64 inputs), one axis after the other, so that no permuted or padded copy is made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvideo.video.tiles import TileGrid


def tile_mean(x: Tensor, grid: TileGrid, sizes: Tensor | None = None) -> Tensor:
    """Mean of each tile's tokens.

    Args:
        x: `[B, S, H, D]` in raster order, S the grid's tokens.
        grid: The grid and its tiles, N of them.
        sizes: `[N]`, tokens of each tile, if at hand on the device of `x`.

    Returns:
        `[B, N, H, D]` in fp32 (fp64 for fp64), differentiable.

    Raises:
        ValueError: For a tensor of another rank or number of tokens.

    Example:
        >>> x = torch.arange(6.0).view(1, 6, 1, 1)
        >>> tile_mean(x, TileGrid((1, 2, 3), (1, 2, 2))).flatten().tolist()
        [2.0, 3.5]
    """
    if grid.is_uniform:
        return tile_sum(x, grid) / grid.max_size
    sizes = grid.tensors(x.device).sizes if sizes is None else sizes
    return tile_sum(x, grid) / sizes[:, None, None]


def tile_sum(x: Tensor, grid: TileGrid) -> Tensor:
    """Sum of each tile's tokens; layout, dtype and errors as those of `tile_mean`.

    Example:
        >>> x = torch.arange(6.0).view(1, 6, 1, 1)
        >>> tile_sum(x, TileGrid((1, 2, 3), (1, 2, 2))).flatten().tolist()
        [8.0, 7.0]
    """
    if x.ndim != 4 or x.shape[1] != grid.num_tokens:
        raise ValueError(f"expected [B, S={grid.num_tokens}, H, D] for {grid.grid_tyx=}, got {tuple(x.shape)}")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, _, num_heads, head_size = x.shape
    x = x.reshape(batch, *grid.grid_tyx, num_heads, head_size)
    for axis, tile in enumerate(grid.tile_tyx):
        x = _sum_runs(x, axis + 1, tile, dtype)
    return x.reshape(batch, grid.num_tiles, num_heads, head_size)


def _sum_runs(x: Tensor, dim: int, run: int, dtype: torch.dtype) -> Tensor:
    """Sum consecutive runs of `run` entries along `dim`; the last one may be shorter."""
    num_full, rest = divmod(x.shape[dim], run)
    sums = []
    if num_full:
        # Narrowing to the whole would cost a copy in the backward.
        full = x.narrow(dim, 0, num_full * run) if rest else x
        shape = (*x.shape[:dim], num_full, run, *x.shape[dim + 1 :])
        sums.append(full.reshape(shape).sum(dim + 1, dtype=dtype))
    if rest:
        tail = x.narrow(dim, num_full * run, rest) if num_full else x
        sums.append(tail.sum(dim, keepdim=True, dtype=dtype))
    return torch.cat(sums, dim=dim) if len(sums) > 1 else sums[0]
