"""Which tile costs a block-sparse kernel least on a given video grid: `tile_tyx="auto"`.

The cost counts what kernels compute and not what they are asked for. They take queries in blocks of 64 rows and keys in
granules of 16, so a tile of n tokens costs `64 * ceil(n / 64)` query rows and `16 * ceil(n / 16)` key rows. When every
query tile sees the same share of all tiles, the work is that share of

    work_padded = sum over tiles of 64 * ceil(n / 64)  *  sum over tiles of 16 * ceil(n / 16),

of which `work_real = S * S` falls to the S tokens of the grid. Tiles at the far edges hold only the tokens that exist, so a
tile that leaves a thin last slab pays for whole query blocks there.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from fastvideo.compilation import constant_while_tracing
from fastvideo.video.tiles import as_tyx

AUTO = {"auto": 64, "auto128": 128}
"""What `tile_tyx` may say instead of three integers, and the tokens that a tile may then have at most."""

_QUERY_BLOCK, _KEY_GRANULE = 64, 16
_MAX_TOKENS = 64
_MAX_ASPECT = 2.0


@dataclass(frozen=True)
class TileChoice:
    """A tile on a grid, and what it costs there; of one head and one sample.

    Attributes:
        grid_tyx: Tokens of the grid along time, height and width.
        tile_tyx: Tokens of a full tile.
        num_tiles: Tiles of the grid.
        query_rows: Query rows with padding: whole blocks of 64.
        key_rows: Key rows with padding: whole granules of 16.
        work_padded: Pairs of query and key rows that kernels compute if all tiles see all.
        work_real: Pairs of tokens.
    """

    grid_tyx: tuple[int, int, int]
    tile_tyx: tuple[int, int, int]
    num_tiles: int
    query_rows: int
    key_rows: int
    work_padded: int
    work_real: int

    @property
    def padding(self) -> float:
        """Work with padding over real work, at least 1."""
        return self.work_padded / self.work_real

    def __str__(self) -> str:
        tile, grid = ("x".join(map(str, extents)) for extents in (self.tile_tyx, self.grid_tyx))
        share = 100 * (self.padding - 1)
        return f"tile {tile} on grid {grid}: {self.num_tiles} tiles, padding adds {share:.1f} % work"

    @property
    def account(self) -> str:
        """The same with what the padding consists of.

        Example:
            >>> print(choose_tile((5, 6, 8)).account.split(": ")[2])
            256 query rows (4 blocks of 64) and 256 key rows (16 granules of 16) for 240 tokens
        """
        num_tokens = self.grid_tyx[0] * self.grid_tyx[1] * self.grid_tyx[2]
        return (
            f"{self}: {self.query_rows} query rows ({self.query_rows // _QUERY_BLOCK} blocks of {_QUERY_BLOCK}) and "
            f"{self.key_rows} key rows ({self.key_rows // _KEY_GRANULE} granules of {_KEY_GRANULE}) for {num_tokens} tokens"
        )


def tile_cost(grid_tyx: Sequence[int], tile_tyx: Sequence[int]) -> TileChoice:
    """What a tile costs on a grid; the formula stands at the top of this module.

    Raises:
        ValueError: For anything but three integers of at least 1 each.

    Example:
        >>> print(tile_cost((21, 45, 80), (4, 4, 4)))
        tile 4x4x4 on grid 21x45x80: 1440 tiles, padding adds 22.3 % work
    """
    return _cost(as_tyx("grid_tyx", grid_tyx), as_tyx("tile_tyx", tile_tyx))


def choose_tile(grid_tyx: Sequence[int], max_tokens: int = _MAX_TOKENS, *, max_aspect: float = _MAX_ASPECT) -> TileChoice:
    """Pick the tile of at most `max_tokens` tokens that costs least on a grid; cached.

    Of tiles that cost the same, the most cubic is taken, then the largest, then that with the shorter time and height.

    Work alone would favour slats, such as (7, 9, 1) on 21x45x80, that fill query blocks to the last row. Tokens that lie far
    apart have little in common: the mean of a slat says less about them, and tiles are chosen by their means. So the
    longest side of a tile may be at most `max_aspect` times each other one; a side that covers the grid's whole axis can't
    grow and may be shorter.

    Args:
        grid_tyx: Tokens of the video along time, height and width.
        max_tokens: Tokens of the largest tile allowed; at least 1.
        max_aspect: The longest side over the shortest, at least 1.

    Returns:
        The tile and its cost.

    Raises:
        TypeError: `max_tokens` is not an integer.
        ValueError: An argument is out of range.

    Example:
        >>> choice = choose_tile((21, 45, 80))
        >>> choice.tile_tyx, choice.num_tiles, round(choice.padding, 3)
        ((3, 5, 4), 1260, 1.138)
    """
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int):
        raise TypeError(f"expected max_tokens to be an integer, got {max_tokens!r}")
    if max_tokens < 1:
        raise ValueError(f"expected max_tokens >= 1, got {max_tokens}")
    if not max_aspect >= 1:
        raise ValueError(f"expected max_aspect >= 1, got {max_aspect}")
    return _choose(as_tyx("grid_tyx", grid_tyx), max_tokens, float(max_aspect))


@constant_while_tracing
def resolve_tile(tile_tyx: Sequence[int] | str, grid_tyx: Sequence[int]) -> tuple[int, int, int]:
    """The tile that `tile_tyx` names: itself, or that of `choose_tile` for `"auto"` (64 tokens at most) and `"auto128"`.

    Raises:
        ValueError: For another string, or anything but three integers of at least 1 each.

    Example:
        >>> resolve_tile("auto", (21, 30, 52)), resolve_tile((4, 4, 4), (21, 30, 52))
        ((3, 5, 4), (4, 4, 4))
    """
    if isinstance(tile_tyx, str):
        if tile_tyx not in AUTO:
            names = " or ".join(map(repr, AUTO))
            raise ValueError(f"expected tile_tyx to be three integers (t, y, x) or {names}, got {tile_tyx!r}")
        return choose_tile(grid_tyx, AUTO[tile_tyx]).tile_tyx
    return as_tyx("tile_tyx", tile_tyx)


@functools.lru_cache(maxsize=128)
def _choose(grid_tyx: tuple[int, int, int], max_tokens: int, max_aspect: float) -> TileChoice:
    best: tuple[tuple[float, ...], tuple[int, int, int]] | None = None
    for tile_tyx in _tiles(grid_tyx, max_tokens):
        aspect = _aspect(grid_tyx, tile_tyx)
        if aspect > max_aspect:
            continue
        t, y, x = tile_tyx
        rank = (_cost(grid_tyx, tile_tyx).work_padded, aspect, -t * y * x, t, y)
        if best is None or rank < best[0]:
            best = rank, tile_tyx
    # A tile of one token always qualifies.
    return _cost(grid_tyx, (1, 1, 1) if best is None else best[1])


def _tiles(grid_tyx: tuple[int, int, int], max_tokens: int) -> list[tuple[int, int, int]]:
    """Every tile of at most `max_tokens` tokens that is no longer than the grid."""
    extent_t, extent_y, extent_x = grid_tyx
    return [
        (t, y, x)
        for t in range(1, min(extent_t, max_tokens) + 1)
        for y in range(1, min(extent_y, max_tokens // t) + 1)
        for x in range(1, min(extent_x, max_tokens // (t * y)) + 1)
    ]


def _aspect(grid_tyx: tuple[int, int, int], tile_tyx: tuple[int, int, int]) -> float:
    """The longest side over the shortest of those that don't cover their axis."""
    growing = [side for side, extent in zip(tile_tyx, grid_tyx, strict=True) if side < extent]
    return max(tile_tyx) / min(growing) if growing else 1.0


def _cost(grid_tyx: tuple[int, int, int], tile_tyx: tuple[int, int, int]) -> TileChoice:
    # Along an axis there are full tiles and at most one shorter: eight kinds of tiles in all.
    kinds = []
    for extent, side in zip(grid_tyx, tile_tyx, strict=True):
        num_full, rest = divmod(extent, side)
        kinds.append([(size, num) for size, num in ((side, num_full), (rest, min(rest, 1))) if num])
    num_tiles = query_rows = key_rows = 0
    for (t, num_t), (y, num_y), (x, num_x) in itertools.product(*kinds):
        num, size = num_t * num_y * num_x, t * y * x
        num_tiles += num
        query_rows += num * -(-size // _QUERY_BLOCK) * _QUERY_BLOCK
        key_rows += num * -(-size // _KEY_GRANULE) * _KEY_GRANULE
    num_tokens = grid_tyx[0] * grid_tyx[1] * grid_tyx[2]
    return TileChoice(grid_tyx, tile_tyx, num_tiles, query_rows, key_rows, query_rows * key_rows, num_tokens * num_tokens)
