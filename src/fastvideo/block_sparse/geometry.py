"""The layouts of a video's tokens, with replicated text behind them, as the block-sparse engine reads them.

Shape legend: S video tokens, R replicated tokens, N tiles.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastvideo.block_sparse.pattern import TileLayout
from fastvideo.tensor_cache import cache_tensors
from fastvideo.video import TileGrid

# Training on videos of many sizes meets a few dozen grids.
_NUM_CACHED = 64
_captured: set[VideoGeometry] = set()
"""What CUDA graphs have captured: each replay reads these tensors again, so they outlive the cache."""


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
        text_keys: `[chunks]` int32, the tiles of `key_tiles` that are text, or None.
        text_lists: `[1, 1, chunks, N + chunks]` int32, the tiles that text queries see: all of them, or None.
    """

    grid: TileGrid
    num_replicated: int
    video_tiles: TileLayout
    key_tiles: TileLayout
    text_tiles: TileLayout | None
    tile_of_token: Tensor
    text_keys: Tensor | None = None
    text_lists: Tensor | None = None


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
    _refuse_capture(grid, device)
    tensors = grid.tensors(device)
    order = None if grid.is_raster else tensors.order
    video = TileLayout(tensors.offsets, grid.num_tokens, grid.max_size, grid.is_uniform, order, _kept())
    return VideoGeometry(grid, 0, video, video, None, tensors.tile_of_token)


_cached_video_geometry = cache_tensors(_video_geometry, _NUM_CACHED)


def geometry_of(
    grid_tyx: Sequence[int], tile_tyx: Sequence[int], device: torch.device, num_replicated: int = 0
) -> VideoGeometry:
    """`video_geometry` from the plain numbers that custom ops take."""
    geometry = _cached_geometry_of(tuple(grid_tyx), tuple(tile_tyx), device, num_replicated)
    if _is_capturing(device):
        _captured.add(geometry)
    return geometry


@functools.lru_cache(_NUM_CACHED)
def _cached_geometry_of(
    grid_tyx: tuple[int, int, int], tile_tyx: tuple[int, int, int], device: torch.device, num_replicated: int
) -> VideoGeometry:
    return video_geometry(TileGrid(grid_tyx, tile_tyx), device, num_replicated)


def with_replicated(geometry: VideoGeometry, num_replicated: int) -> VideoGeometry:
    """A geometry without text, with `num_replicated` text tokens behind it; cached."""
    if geometry.num_replicated:
        raise ValueError(f"expected a geometry without text, got {geometry.num_replicated=}")
    check_num_replicated(num_replicated)
    if not num_replicated:
        return geometry
    build = _append_text if torch.compiler.is_compiling() else _cached_append_text_from_host
    return build(geometry, num_replicated)


def check_num_replicated(num_replicated: int) -> None:
    """Raise TypeError for what is no integer, and ValueError for a negative one."""
    if isinstance(num_replicated, bool) or not isinstance(num_replicated, int):
        raise TypeError(f"expected num_replicated as an integer, got {num_replicated!r}")
    if num_replicated < 0:
        raise ValueError(f"expected num_replicated >= 0, got {num_replicated=}")


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
        _kept(),
    )
    is_even = num_chunks == 1 or are_chunks_full
    text = TileLayout(text_offsets, num_replicated, min(chunk, num_replicated), is_even, derived=_kept())
    tiles = torch.arange(grid.num_tiles + num_chunks, dtype=torch.int32, device=device)
    lists = tiles.expand(1, 1, num_chunks, -1).contiguous()
    return VideoGeometry(grid, num_replicated, video, keys, text, geometry.tile_of_token, tiles[grid.num_tiles :], lists)


def _append_text_from_host(geometry: VideoGeometry, num_replicated: int) -> VideoGeometry:
    """`_append_text`, whose tensors are copied to the device: once that returns, every stream may read them."""
    device = geometry.video_tiles.offsets.device
    if device.type == "cpu":
        return _append_text(geometry, num_replicated)
    _refuse_capture(geometry.grid, device)
    made = _append_text(_cached_video_geometry(geometry.grid, torch.device("cpu")), num_replicated)

    def moved(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(device)

    def moved_layout(layout: TileLayout) -> TileLayout:
        return replace(layout, offsets=layout.offsets.to(device), order=moved(layout.order), derived={})

    return replace(
        geometry,
        num_replicated=num_replicated,
        key_tiles=moved_layout(made.key_tiles),
        text_tiles=None if made.text_tiles is None else moved_layout(made.text_tiles),
        text_keys=moved(made.text_keys),
        text_lists=moved(made.text_lists),
    )


_cached_append_text_from_host = cache_tensors(_append_text_from_host, _NUM_CACHED)


def _kept() -> dict[str, Any] | None:
    return None if torch.compiler.is_compiling() else {}


def _is_capturing(device: torch.device) -> bool:
    # A torch without CUDA can't be asked whether it captures; nothing does before CUDA runs.
    is_running = device.type == "cuda" and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch's own
    return is_running and torch.cuda.is_current_stream_capturing()


def _refuse_capture(grid: TileGrid, device: torch.device) -> None:
    if not torch.compiler.is_compiling() and _is_capturing(device):
        raise RuntimeError(
            f"the layouts of {grid} on {device} are not built yet, and tensors that are kept can't be built while a CUDA graph "
            "is captured; run the same call once before"
        )
