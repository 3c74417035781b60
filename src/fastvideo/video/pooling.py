"""Means over the tiles of a video's token grid.

Sums run in fp32 (fp64 for fp64 inputs), and no permuted, padded or converted copy is made: on GPUs a Triton kernel reads
each token once, elsewhere torch sums one axis after the other. Both are custom ops with an autograd formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvideo.platforms.triton_support import device_of, runs_triton
from fastvideo.tangents import refuse_tangents
from fastvideo.video.tiles import TileGrid

_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


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
        NotImplementedError: For one with a forward-mode tangent.

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
    refuse_tangents(x=x)
    sums: Tensor = _tile_sum_op(x, grid.grid_tyx, grid.tile_tyx)
    return sums


@torch.library.custom_op("fastvideo::tile_sum", mutates_args=())
def _tile_sum_op(x: Tensor, grid_tyx: Sequence[int], tile_tyx: Sequence[int]) -> Tensor:
    grid = _grid(grid_tyx, tile_tyx)
    batch, _, num_heads, head_size = x.shape
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if dtype == torch.float32 and x.dtype in _KERNEL_DTYPES and runs_triton(x.device):
        from fastvideo.video.pooling_kernels import launch_tile_sum

        x = x if x.stride(-1) == 1 else x.contiguous()
        sums = x.new_empty(batch, grid.num_tiles, num_heads, head_size, dtype=dtype)
        with device_of(x):
            launch_tile_sum(x, grid, sums)
        return sums
    frames = x.reshape(batch, *grid.grid_tyx, num_heads, head_size)
    # On a CPU, torch would first convert all of a 16-bit input, so that one gets a few frames at a time.
    step = grid.tile_tyx[0] if x.device.type == "cpu" and x.dtype != dtype else grid.grid_tyx[0]
    parts = [_sum_tiles(part, grid, dtype) for part in torch.split(frames, step, dim=1)]
    return torch.cat(parts, dim=1).reshape(batch, grid.num_tiles, num_heads, head_size)


@_tile_sum_op.register_fake
def _(x: Tensor, grid_tyx: Sequence[int], tile_tyx: Sequence[int]) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape[0], _grid(grid_tyx, tile_tyx).num_tiles, *x.shape[2:], dtype=dtype)


@torch.library.custom_op("fastvideo::tile_expand", mutates_args=())
def _tile_expand_op(tiles: Tensor, grid_tyx: Sequence[int], tile_tyx: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`[B, N, H, D]` to `[B, S, H, D]`: each token gets its tile's entry, in `dtype`."""
    tile_of_token = _grid(grid_tyx, tile_tyx).tensors(tiles.device).tile_of_token
    return tiles.to(dtype).index_select(1, tile_of_token)


@_tile_expand_op.register_fake
def _(tiles: Tensor, grid_tyx: Sequence[int], tile_tyx: Sequence[int], dtype: torch.dtype) -> Tensor:
    return tiles.new_empty(tiles.shape[0], _grid(grid_tyx, tile_tyx).num_tokens, *tiles.shape[2:], dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001  # torch's signature
    ctx.dtype, ctx.grid_tyx, ctx.tile_tyx = inputs[0].dtype, inputs[1], inputs[2]


def _differentiate(ctx: Any, dsums: Tensor) -> tuple[Tensor, None, None]:
    return _tile_expand_op(dsums, ctx.grid_tyx, ctx.tile_tyx, ctx.dtype), None, None


_tile_sum_op.register_autograd(_differentiate, setup_context=_save)


def _grid(grid_tyx: Sequence[int], tile_tyx: Sequence[int]) -> TileGrid:
    return TileGrid((grid_tyx[0], grid_tyx[1], grid_tyx[2]), (tile_tyx[0], tile_tyx[1], tile_tyx[2]))


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
