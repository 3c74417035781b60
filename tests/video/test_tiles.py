"""Tile order against triple loops, ragged edges included."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastvideo.video import TileGrid

CASES = [
    ((1, 1, 1), (4, 4, 4)),
    ((4, 4, 8), (2, 2, 2)),
    ((5, 3, 7), (4, 4, 4)),
    ((3, 5, 7), (1, 1, 1)),
    ((2, 9, 1), (1, 4, 4)),
    ((3, 2, 8), (1, 1, 3)),
    ((6, 4, 4), (4, 4, 4)),
    ((4, 4, 6), (4, 1, 4)),
]


def tiles_by_loops(grid_tyx, tile_tyx) -> list[list[int]]:
    """Tokens of each tile, both in raster order."""
    starts = [range(0, extent, tile) for extent, tile in zip(grid_tyx, tile_tyx, strict=True)]
    tiles = []
    for corner in itertools.product(*starts):
        ranges = [range(c, min(c + tile, extent)) for c, tile, extent in zip(corner, tile_tyx, grid_tyx, strict=True)]
        tiles.append([(t * grid_tyx[1] + y) * grid_tyx[2] + x for t, y, x in itertools.product(*ranges)])
    return tiles


@pytest.mark.parametrize(("grid_tyx", "tile_tyx"), CASES)
def test_tensors_equal_loops(grid_tyx, tile_tyx) -> None:
    grid, tiles = TileGrid(grid_tyx, tile_tyx), tiles_by_loops(grid_tyx, tile_tyx)
    tensors = grid.tensors("cpu")
    order = [token for tile in tiles for token in tile]
    assert tensors.order.tolist() == order
    assert tensors.inverse.tolist() == [order.index(token) for token in range(len(order))]
    assert tensors.tile_of_token.tolist() == [
        next(i for i, tile in enumerate(tiles) if token in tile) for token in range(len(order))
    ]
    sizes = [len(tile) for tile in tiles]
    assert tensors.sizes.tolist() == sizes == list(grid.sizes)
    assert tensors.offsets.tolist() == [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    assert grid.num_tiles == len(tiles)
    assert grid.num_tokens == len(order)
    assert grid.max_size == max(sizes)
    assert grid.is_uniform == (len(set(sizes)) == 1)
    assert grid.is_raster == (order == sorted(order))


def test_tensors_are_shared_and_the_cache_is_bounded() -> None:
    first = TileGrid((4, 4, 4), (2, 2, 2)).tensors("cpu")
    assert TileGrid([4, 4, 4], (2, 2, 2)).tensors(torch.device("cpu")) is first
    for extent in range(1, 40):
        TileGrid((extent, 1, 1), (2, 2, 2)).tensors("cpu")
    again = TileGrid((4, 4, 4), (2, 2, 2)).tensors("cpu")
    assert again is not first
    assert torch.equal(again.order, first.order)


@pytest.mark.parametrize(
    ("grid_tyx", "tile_tyx", "name"),
    [
        ((4, 4), (4, 4, 4), "grid_tyx"),
        ((4, 4, 0), (4, 4, 4), "grid_tyx"),
        ((4, 4, 4.0), (4, 4, 4), "grid_tyx"),
        ((4, 4, True), (4, 4, 4), "grid_tyx"),
        ((4, 4, 4), (4, -1, 4), "tile_tyx"),
    ],
)
def test_bad_geometry(grid_tyx, tile_tyx, name) -> None:
    with pytest.raises(ValueError, match=name):
        TileGrid(grid_tyx, tile_tyx)
