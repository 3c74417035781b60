"""Windows over the tiles of a video: which key tiles each query tile of Sliding Tile Attention sees.

Paper: "Fast Video Generation with Sliding Tile Attention", arXiv 2502.04507. Along an axis of n tiles with a window of k
(odd), query tile q looks from the centre `c = clamp(q, k//2, n - 1 - k//2)` and sees the tiles x with `|x - c| <= k//2`: at
an edge the window stops instead of being cut, so that each query tile sees k tiles. A window as long as the axis, or
longer, sees the whole axis. A tile is seen where all three axes see it.

Tiles too large for a kernel are run as several parts, which see what their tile sees.

Shape legend: N cells (tiles, or the parts of tiles), K width of the lists.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastvideo.video.tiles import TileGrid, as_tyx

_MIN_PART = 16
"""Tokens of a part below which kernels would idle; a tile that has no larger divisors stays whole."""


def as_window_tyx(name: str, value: Sequence[int]) -> tuple[int, int, int]:
    """Check that `value` is three odd integers of at least 1 (tiles along time, height, width) and return them as a tuple.

    Raises:
        ValueError: For anything else.

    Example:
        >>> as_window_tyx("STA_window", [3, 1, 5])
        (3, 1, 5)
    """
    window_tyx = as_tyx(name, value)
    if even := [tiles for tiles in window_tyx if tiles % 2 == 0]:
        raise ValueError(
            f"expected odd windows in {name}, so that a tile stands in the middle of its window; got {window_tyx}: "
            f"replace {even[0]} by {even[0] - 1} or {even[0] + 1}"
        )
    return window_tyx


def num_visible_tiles(grid: TileGrid, window_tyx: tuple[int, int, int]) -> int:
    """How many tiles each tile of `grid` sees; the same number for all.

    Example:
        >>> num_visible_tiles(TileGrid((8, 8, 8), (4, 2, 2)), (3, 3, 1))
        6
    """
    return math.prod(min(window, num) for window, num in zip(window_tyx, grid.num_tiles_tyx, strict=True))


def largest_part(tile_tyx: tuple[int, int, int], max_tokens: int) -> tuple[int, int, int]:
    """The largest box of at most `max_tokens` tokens whose sides divide those of a tile; the most cubic of several.

    A tile that only falls into parts of fewer than 16 tokens is returned as it is.

    Example:
        >>> largest_part((6, 8, 8), 128)
        (2, 8, 8)
    """
    divisors = ([d for d in range(1, side + 1) if side % d == 0] for side in tile_tyx)
    parts = [(t, y, x) for t, y, x in itertools.product(*divisors) if t * y * x <= max_tokens]
    best = max(parts, key=lambda part: (math.prod(part), -max(part) / min(part)), default=tile_tyx)
    return best if math.prod(best) >= _MIN_PART else tile_tyx


def window_lists(
    grid: TileGrid,
    window_tyx: tuple[int, int, int],
    part_tyx: tuple[int, int, int] | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor | None]:
    """The cells that each cell sees, as ascending lists.

    Args:
        grid: The grid and its tiles.
        window_tyx: Tiles of a window per axis, odd.
        part_tyx: The cells: parts of the tiles, whose sides divide those of a tile. None means the tiles themselves.
        device: Where the lists go.

    Returns:
        `[N, K]` int32, cells in raster order; and `[N]` int32, how many entries of each list count (0 follows behind them),
        or None where all do.

    Raises:
        ValueError: For an even window, or parts that do not divide a tile.

    Example:
        >>> window_lists(TileGrid((1, 1, 5), (1, 1, 1)), (1, 1, 3))[0].tolist()
        [[0, 1, 2], [0, 1, 2], [1, 2, 3], [2, 3, 4], [2, 3, 4]]
    """
    window_tyx = as_window_tyx("window_tyx", window_tyx)
    part_tyx = grid.tile_tyx if part_tyx is None else as_tyx("part_tyx", part_tyx)
    if any(side % part for side, part in zip(grid.tile_tyx, part_tyx, strict=True)):
        raise ValueError(f"expected part_tyx to divide tile_tyx={grid.tile_tyx}, got {part_tyx=}")
    axes = zip(grid.grid_tyx, grid.tile_tyx, part_tyx, window_tyx, strict=True)
    (t, has_t), (y, has_y), (x, has_x) = (_axis_lists(*axis) for axis in axes)
    num_y, num_x = y.shape[0], x.shape[0]
    lists = t[:, None, None, :, None, None] * num_y + y[None, :, None, None, :, None]
    lists = lists * num_x + x[None, None, :, None, None, :]
    is_listed = has_t[:, None, None, :, None, None] & has_y[None, :, None, None, :, None] & has_x[None, None, :, None, None, :]
    num_cells = t.shape[0] * num_y * num_x
    lists = lists.reshape(num_cells, -1)
    if bool(is_listed.all()):
        return lists.to(device, torch.int32), None
    # A stable sort moves the entries that count to the front and keeps them ascending.
    is_listed = is_listed.reshape(num_cells, -1)
    lists = lists.masked_fill(~is_listed, 0).gather(-1, (~is_listed).to(torch.uint8).argsort(dim=-1, stable=True))
    counts = is_listed.sum(-1)
    return lists[:, : int(counts.max())].contiguous().to(device, torch.int32), counts.to(device, torch.int32)


def _axis_lists(extent: int, tile: int, part: int, window: int) -> tuple[Tensor, Tensor]:
    """Along one axis: what each cell sees, `[n, k]`, ascending, and which entries count."""
    num_tiles, num_cells, parts_per_tile = -(-extent // tile), -(-extent // part), tile // part
    seen = min(window, num_tiles)
    # A window of k tiles around the clamped centre starts here.
    # On the CPU whatever a caller's `with torch.device(...)` says.
    first = (torch.arange(num_cells, device="cpu") // parts_per_tile - window // 2).clamp(0, num_tiles - seen)
    lists = first[:, None] * parts_per_tile + torch.arange(seen * parts_per_tile, device="cpu")
    is_listed = lists < num_cells
    width = int(is_listed.sum(-1).max())
    return lists[:, :width], is_listed[:, :width]
