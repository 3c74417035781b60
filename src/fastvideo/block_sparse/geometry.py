"""The layouts of a video's tokens, with replicated text behind them, as the block-sparse engine reads them.

Shape legend: S video tokens, R replicated tokens, N tiles.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvideo.block_sparse.pattern import TileLayout
from fastvideo.tensor_cache import cache_tensors
from fastvideo.video import TileGrid

# Training on videos of many sizes meets a few dozen grids.
_NUM_CACHED = 64


@dataclass(frozen=True, eq=False)
class VideoGeometry:
    """The layouts of one grid on one device; built once by `video_geometry` and shared between layers and steps.

    Attributes:
        grid: The grid and its tiles.
        num_replicated: Text tokens behind the video tokens.
        video_tiles: Layout of the video tokens: as queries, and as keys where there is no text.
        key_tiles: Layout of all keys: the video's tiles, then chunks of text.
        text_tiles: Layout of the text queries, or None.
        tile_of_token: `[S]` int64, tile of each video token.
    """

    grid: TileGrid
    num_replicated: int
    video_tiles: TileLayout
    key_tiles: TileLayout
    text_tiles: TileLayout | None
    tile_of_token: Tensor


def video_geometry(grid: TileGrid, device: torch.device | str, num_replicated: int = 0) -> VideoGeometry:
    """The layouts of a grid with `num_replicated` text tokens behind it; cached.

    Example:
        >>> video_geometry(TileGrid((2, 2, 2), (1, 2, 2)), "cpu", 3).key_tiles.sizes.tolist()
        [4, 4, 3]
    """
    # Dynamo would look through the cache, and warn.
    build = _video_geometry if torch.compiler.is_compiling() else _cached_video_geometry
    return with_replicated(build(grid, torch.device(device)), num_replicated)


def _video_geometry(grid: TileGrid, device: torch.device) -> VideoGeometry:
    tensors = grid.tensors(device)
    order = None if grid.is_raster else tensors.order
    video = TileLayout(tensors.offsets, grid.num_tokens, grid.max_size, grid.is_uniform, order)
    return VideoGeometry(grid, 0, video, video, None, tensors.tile_of_token)


_cached_video_geometry = cache_tensors(_video_geometry, _NUM_CACHED)


def geometry_of(
    grid_tyx: Sequence[int], tile_tyx: Sequence[int], device: torch.device, num_replicated: int = 0
) -> VideoGeometry:
    """`video_geometry` from the plain numbers that custom ops take."""
    return _cached_geometry_of(tuple(grid_tyx), tuple(tile_tyx), device, num_replicated)


@functools.lru_cache(_NUM_CACHED)
def _cached_geometry_of(
    grid_tyx: tuple[int, int, int], tile_tyx: tuple[int, int, int], device: torch.device, num_replicated: int
) -> VideoGeometry:
    return video_geometry(TileGrid(grid_tyx, tile_tyx), device, num_replicated)


def with_replicated(geometry: VideoGeometry, num_replicated: int) -> VideoGeometry:
    """A geometry without text, with `num_replicated` text tokens behind it; cached."""
    if geometry.num_replicated:
        raise ValueError(f"expected a geometry without text, got {geometry.num_replicated=}")
    if num_replicated < 0:
        raise ValueError(f"expected num_replicated >= 0, got {num_replicated=}")
    if not num_replicated:
        return geometry
    build = _append_text if torch.compiler.is_compiling() else _cached_append_text
    return build(geometry, num_replicated)


def _append_text(geometry: VideoGeometry, num_replicated: int) -> VideoGeometry:
    grid, video = geometry.grid, geometry.video_tiles
    device, chunk, num_tokens = video.offsets.device, grid.max_size, grid.num_tokens + num_replicated
    num_chunks = -(-num_replicated // chunk)
    starts = torch.arange(num_chunks + 1, dtype=torch.int32, device=device) * chunk
    text_offsets = starts.clamp(max=num_replicated)
    text_rows = torch.arange(grid.num_tokens, num_tokens, dtype=torch.int32, device=device)
    are_chunks_full = num_replicated % chunk == 0
    keys = TileLayout(
        torch.cat([video.offsets, text_offsets[1:] + grid.num_tokens]),
        num_tokens,
        chunk,
        grid.is_uniform and are_chunks_full,
        None if video.order is None else torch.cat([video.order, text_rows]),
    )
    text = TileLayout(text_offsets, num_replicated, min(chunk, num_replicated), num_chunks == 1 or are_chunks_full)
    return VideoGeometry(grid, num_replicated, video, keys, text, geometry.tile_of_token)


_cached_append_text = cache_tensors(_append_text, _NUM_CACHED)
