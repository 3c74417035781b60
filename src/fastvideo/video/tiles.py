"""Tiles of a video's token grid: which tile a token is in, and the order of the tokens tile after tile.

Tokens are numbered in raster order, `token = (t * Y + y) * X + x`; tiles likewise. Inside a tile the tokens keep raster
order, and a tile at the far edge holds only the tokens that exist: there is no padding anywhere.

Shape legend: S tokens, N tiles; T, Y, X video grid.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvideo.tensor_cache import cache_tensors

# Tensors of this many (grid, tile, device) are kept; a generation uses one or two.
_NUM_CACHED = 16


@dataclass(frozen=True, eq=False)
class TileTensors:
    """The index arithmetic of one `TileGrid` as tensors on one device.

    Attributes:
        sizes: `[N]` int32, tokens of each tile.
        offsets: `[N + 1]` int32; tile `i` owns the packed rows `offsets[i] : offsets[i + 1]`.
        order: `[S]` int32, token of each packed row (tile after tile).
        inverse: `[S]` int32, packed row of each token.
        tile_of_token: `[S]` int64, tile of each token.
    """

    sizes: Tensor
    offsets: Tensor
    order: Tensor
    inverse: Tensor
    tile_of_token: Tensor


@dataclass(frozen=True)
class TileGrid:
    """A grid of video tokens, cut into tiles; the last tile of an axis takes what is left.

    Args:
        grid_tyx: Tokens per axis (time, height, width), each at least 1.
        tile_tyx: Tokens of a full tile per axis, each at least 1.

    Raises:
        ValueError: For anything but three integers of at least 1 each.

    Example:
        >>> grid = TileGrid((1, 2, 3), (1, 2, 2))
        >>> grid.num_tiles, grid.sizes
        (2, (4, 2))
        >>> grid.tensors("cpu").order.tolist()
        [0, 1, 3, 4, 2, 5]
    """

    grid_tyx: tuple[int, int, int]
    tile_tyx: tuple[int, int, int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid_tyx", as_tyx("grid_tyx", self.grid_tyx))
        object.__setattr__(self, "tile_tyx", as_tyx("tile_tyx", self.tile_tyx))

    @property
    def num_tokens(self) -> int:
        """Tokens of the grid, S."""
        return math.prod(self.grid_tyx)

    @property
    def num_tiles_tyx(self) -> tuple[int, int, int]:
        """Tiles per axis."""
        t, y, x = (-(-extent // tile) for extent, tile in zip(self.grid_tyx, self.tile_tyx, strict=True))
        return t, y, x

    @property
    def num_tiles(self) -> int:
        """Tiles of the grid, N."""
        return math.prod(self.num_tiles_tyx)

    @property
    def axis_sizes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Tokens along each axis of the tiles at each place of that axis."""
        t, y, x = (
            tuple(min(tile, extent - start) for start in range(0, extent, tile))
            for extent, tile in zip(self.grid_tyx, self.tile_tyx, strict=True)
        )
        return t, y, x

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of each tile."""
        t_sizes, y_sizes, x_sizes = self.axis_sizes
        planes = [t * y for t in t_sizes for y in y_sizes]
        return tuple(plane * x for plane in planes for x in x_sizes)

    @property
    def max_size(self) -> int:
        """Tokens of the largest tile."""
        (t, y, x), (tile_t, tile_y, tile_x) = self.grid_tyx, self.tile_tyx
        return min(t, tile_t) * min(y, tile_y) * min(x, tile_x)

    @property
    def is_uniform(self) -> bool:
        """Whether all tiles have `max_size` tokens."""
        return self.num_tiles * self.max_size == self.num_tokens

    @property
    def is_raster(self) -> bool:
        """Whether tile order is raster order, so that no token changes its place."""
        (tile_t, tile_y, _), (_, num_y, num_x) = map(min, self.grid_tyx, self.tile_tyx), self.num_tiles_tyx
        return (tile_t == 1 or num_y == num_x == 1) and (tile_y == 1 or num_x == 1)

    def tensors(self, device: torch.device | str) -> TileTensors:
        """The grid's index tensors on `device`, built once and shared; don't write to them."""
        # Dynamo would look through the cache, and warn.
        build = _tile_tensors if torch.compiler.is_compiling() else _cached_tile_tensors
        return build(self, torch.device(device))


def as_tyx(name: str, value: Sequence[int]) -> tuple[int, int, int]:
    """Check that `value` is three integers of at least 1 and return them as a tuple."""
    extents = tuple(value) if isinstance(value, Iterable) else ()
    if len(extents) != 3 or any(isinstance(extent, bool) or not isinstance(extent, int) for extent in extents):
        raise ValueError(f"expected {name} to be three integers (t, y, x), got {value!r}")
    if min(extents) < 1:
        raise ValueError(f"expected {name} to be at least 1 along each axis, got {extents}")
    return extents[0], extents[1], extents[2]


def _tile_tensors(grid: TileGrid, device: torch.device) -> TileTensors:
    (tile_t, tile_y, tile_x), (_, num_y, num_x) = grid.tile_tyx, grid.num_tiles_tyx
    # On the CPU whatever a caller's `with torch.device(...)` says.
    t, y, x = (torch.arange(extent, device="cpu") for extent in grid.grid_tyx)
    tile_ty = (t // tile_t)[:, None] * num_y + y // tile_y
    tile_of_token = (tile_ty[:, :, None] * num_x + x // tile_x).flatten()
    # Tokens of a tile keep their raster order because the sort is stable.
    order = torch.argsort(tile_of_token, stable=True)
    rows = torch.arange(grid.num_tokens, device="cpu")
    inverse = torch.empty_like(order).scatter_(0, order, rows)
    t_sizes, y_sizes, x_sizes = (torch.tensor(sizes, device="cpu") for sizes in grid.axis_sizes)
    sizes = (t_sizes[:, None, None] * y_sizes[:, None] * x_sizes).flatten()
    offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    sizes, offsets, order, inverse = (x.to(device, torch.int32) for x in (sizes, offsets, order, inverse))
    return TileTensors(sizes, offsets, order, inverse, tile_of_token.to(device))


_cached_tile_tensors = cache_tensors(_tile_tensors, _NUM_CACHED)
