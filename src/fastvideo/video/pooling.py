"""Means over the tiles of a video's token grid.

Sums run in fp32 (fp64 for fp64 inputs), one axis after the other, so that no permuted, padded or converted copy is made.
"""

from __future__ import annotations

from typing import Any

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
    result: Tensor = _TileSum.apply(x, grid)  # type: ignore[no-untyped-call]  # torch's own
    return result


class _TileSum(torch.autograd.Function):
    """Sums without a copy of the input in the sums' dtype, and a backward without fp32 gradients of the input's size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: TileGrid) -> Tensor:
        ctx.grid, ctx.dtype = grid, x.dtype
        batch, _, num_heads, head_size = x.shape
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        frames = x.reshape(batch, *grid.grid_tyx, num_heads, head_size)
        # On a CPU, torch would first convert all of a 16-bit input, so that one gets a few frames at a time.
        step = grid.tile_tyx[0] if x.device.type == "cpu" and x.dtype != dtype else grid.grid_tyx[0]
        parts = [_sum_tiles(part, grid, dtype) for part in torch.split(frames, step, dim=1)]
        sums = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        return sums.reshape(batch, grid.num_tiles, num_heads, head_size)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grid: TileGrid = ctx.grid
        (dsums,) = grads
        grad = dsums.to(ctx.dtype).reshape(dsums.shape[0], *grid.num_tiles_tyx, *dsums.shape[2:])
        for axis in (3, 2, 1):
            extent = grid.grid_tyx[axis - 1]
            grad = grad.repeat_interleave(min(grid.tile_tyx[axis - 1], extent), dim=axis).narrow(axis, 0, extent)
        return grad.flatten(1, 3), None


def _sum_tiles(x: Tensor, grid: TileGrid, dtype: torch.dtype) -> Tensor:
    """`[B, T', Y, X, H, D]` to the sums of its tiles, `[B, nt', ny, nx, H, D]`."""
    for axis, tile in enumerate(grid.tile_tyx):
        x = _sum_runs(x, axis + 1, tile, dtype)
    return x


def _sum_runs(x: Tensor, dim: int, run: int, dtype: torch.dtype) -> Tensor:
    """Sum consecutive runs of `run` entries along `dim`; the last one may be shorter."""
    num_full, rest = divmod(x.shape[dim], run)
    sums = []
    if num_full:
        full = x.narrow(dim, 0, num_full * run)
        shape = (*x.shape[:dim], num_full, run, *x.shape[dim + 1 :])
        sums.append(full.reshape(shape).sum(dim + 1, dtype=dtype))
    if rest:
        sums.append(x.narrow(dim, num_full * run, rest).sum(dim, keepdim=True, dtype=dtype))
    return torch.cat(sums, dim=dim) if len(sums) > 1 else sums[0]
