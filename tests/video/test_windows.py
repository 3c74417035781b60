"""Windows over tiles: lists against the definition, tile by tile."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastvideo.video import TileGrid
from fastvideo.video.windows import as_window_tyx, largest_part, num_visible_tiles, window_lists

CASES = [
    # grid, tile, window, part
    ((5, 5, 5), (1, 1, 1), (3, 3, 3), (1, 1, 1)),
    ((4, 6, 7), (2, 2, 2), (1, 3, 5), (2, 2, 2)),
    ((2, 9, 4), (1, 2, 4), (5, 3, 7), (1, 2, 4)),
    ((1, 1, 11), (4, 4, 4), (1, 1, 1), (4, 4, 4)),
    ((6, 8, 8), (3, 4, 4), (1, 3, 1), (3, 2, 4)),
    ((7, 9, 5), (6, 4, 4), (1, 3, 1), (2, 2, 1)),
    ((13, 10, 9), (6, 4, 2), (3, 1, 3), (3, 4, 1)),
]


def sees(q: int, x: int, n: int, k: int) -> bool:
    """The definition of 2502.04507 along one axis, for a window that fits; a longer one sees everything."""
    if k >= n:
        return True
    center = min(max(q, k // 2), n - 1 - k // 2)
    return abs(x - center) <= k // 2


def lists_by_definition(grid_tyx, tile_tyx, window_tyx, part_tyx) -> list[list[int]]:
    num_tiles = [-(-extent // tile) for extent, tile in zip(grid_tyx, tile_tyx, strict=True)]
    cells = list(itertools.product(*(range(-(-e // p)) for e, p in zip(grid_tyx, part_tyx, strict=True))))
    tiles = [tuple(c * p // t for c, p, t in zip(cell, part_tyx, tile_tyx, strict=True)) for cell in cells]
    return [
        [number for number, x in enumerate(tiles) if all(map(sees, q, x, num_tiles, window_tyx))]
        for q in tiles
    ]  # fmt: skip


@pytest.mark.parametrize(("grid_tyx", "tile_tyx", "window_tyx", "part_tyx"), CASES)
def test_lists_follow_the_definition(grid_tyx, tile_tyx, window_tyx, part_tyx) -> None:
    indices, counts = window_lists(TileGrid(grid_tyx, tile_tyx), window_tyx, part_tyx)
    expected = lists_by_definition(grid_tyx, tile_tyx, window_tyx, part_tyx)
    lengths = [len(row) for row in expected] if counts is None else counts.tolist()
    assert [row[:length] for row, length in zip(indices.tolist(), lengths, strict=True)] == expected
    assert indices.shape[-1] == max(lengths)
    assert indices.dtype == torch.int32
    for row, length in zip(indices.tolist(), lengths, strict=True):
        assert not any(row[length:])
    assert (counts is None) == (len({len(row) for row in expected}) == 1)


@pytest.mark.parametrize(("grid_tyx", "tile_tyx", "window_tyx"), [case[:3] for case in CASES])
def test_every_tile_sees_as_many(grid_tyx, tile_tyx, window_tyx) -> None:
    grid = TileGrid(grid_tyx, tile_tyx)
    indices, counts = window_lists(grid, window_tyx)
    assert counts is None
    assert indices.shape == (grid.num_tiles, num_visible_tiles(grid, window_tyx))


def test_a_long_window_sees_all() -> None:
    indices, counts = window_lists(TileGrid((4, 4, 6), (2, 2, 2)), (99, 3, 5))
    assert counts is None
    assert torch.equal(indices, torch.arange(12, dtype=torch.int32).expand(12, -1))


@pytest.mark.parametrize("value", [(2, 3, 3), (3, 3, 4)])
def test_even_windows_name_their_neighbours(value) -> None:
    even = min(x for x in value if x % 2 == 0)
    with pytest.raises(ValueError, match=rf"odd windows in STA_window.*replace {even} by {even - 1} or {even + 1}"):
        as_window_tyx("STA_window", value)


@pytest.mark.parametrize("value", [(3, 3), (3, 3, 0), (3, 3, -1), (3.0, 3, 3), (True, 3, 3), "333"])
def test_windows_that_are_none(value) -> None:
    with pytest.raises(ValueError, match="STA_window"):
        as_window_tyx("STA_window", value)


def test_parts_that_do_not_divide_a_tile() -> None:
    with pytest.raises(ValueError, match=r"divide tile_tyx=\(6, 8, 8\), got part_tyx=\(4, 8, 8\)"):
        window_lists(TileGrid((6, 8, 8), (6, 8, 8)), (1, 1, 1), (4, 8, 8))


@pytest.mark.parametrize(
    ("tile_tyx", "max_tokens", "expected"),
    [
        ((6, 8, 8), 128, (2, 8, 8)),
        ((6, 8, 8), 64, (2, 4, 8)),
        ((8, 8, 8), 128, (4, 4, 8)),
        ((4, 4, 4), 128, (4, 4, 4)),
        ((1, 1, 509), 128, (1, 1, 509)),  # a prime: parts of one token would idle
        ((7, 7, 7), 128, (1, 7, 7)),
    ],
)
def test_largest_part(tile_tyx, max_tokens, expected) -> None:
    part = largest_part(tile_tyx, max_tokens)
    assert sorted(part) == sorted(expected)
    assert not any(t % p for t, p in zip(tile_tyx, part, strict=True))
