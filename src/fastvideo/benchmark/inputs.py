"""Inputs to measure with: independent normal numbers, smooth fields like those of a video, and skewed popularity of tiles.

What matters for speed is which tiles the lists name. `random` gives independent lists, the worst case for caches;
`video-like` gives neighbouring query tiles about 60 % of their lists in common, by smooth queries and keys; `skewed` makes
a twentieth of the key tiles popular with every query, the worst case for a backward that owns key tiles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvideo.benchmark.shapes import BenchmarkShape
from fastvideo.block_sparse import pool_tiles, top_k_ascending
from fastvideo.block_sparse.selection import select_tiles
from fastvideo.video import TileGrid

__all__ = ["KINDS", "Inputs", "list_overlap", "make_inputs", "make_lists"]

KINDS = ("random", "video-like", "skewed")
TARGET_OVERLAP = 0.6
_POPULAR_SHARE = 0.05


@dataclass(frozen=True)
class Inputs:
    """Tensors `[B, S, H, D]` of one shape; none requires a gradient."""

    query: Tensor
    key: Tensor
    value: Tensor
    gate: Tensor
    dout: Tensor

    def leaves(self, *, has_gate: bool, needs_grad: bool) -> list[Tensor]:
        """Query, key, value and perhaps gate, fresh and detached."""
        used = (self.query, self.key, self.value, self.gate)[: 4 if has_gate else 3]
        return [x.detach().requires_grad_(needs_grad) for x in used]


def make_inputs(shape: BenchmarkShape, kind: str, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
    """Make the inputs of a kind; those of a fine stage alone are normal numbers, since its lists are given.

    Raises:
        ValueError: `kind` is unknown.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of inputs {kind!r}; there are {', '.join(KINDS)}")
    generator = torch.Generator(device).manual_seed(seed)
    size = (shape.batch, shape.num_tokens, shape.num_heads, shape.head_size)

    def normal() -> Tensor:
        return torch.randn(size, generator=generator, dtype=dtype, device=device)

    query, key, value, gate, dout = (normal() for _ in range(5))
    if shape.fine_tile_tyx is None and kind == "video-like":
        spacing = _calibrated_spacing(shape, device, generator)
        for x in (query, key):
            for sample in x:
                for head in range(shape.num_heads):
                    field = _smooth_field(shape, spacing, device, generator)
                    # Half the variance is shared by neighbours.
                    sample[:, head].add_(field.to(dtype)).mul_(math.sqrt(0.5))
    elif shape.fine_tile_tyx is None and kind == "skewed":
        _make_some_tiles_popular(query, key, shape, generator)
    return Inputs(query, key, value, gate, dout)


def _smooth_field(shape: BenchmarkShape, spacing: float, device: torch.device, generator: torch.Generator) -> Tensor:
    """`[S, D]`, unit variance, interpolated between normal numbers that stand `spacing` tokens apart."""
    knots = [max(2, math.ceil(extent / spacing) + 1) for extent in shape.grid_tyx]
    noise = torch.randn(1, shape.head_size, *knots, generator=generator, device=device)
    field = F.interpolate(noise, size=shape.grid_tyx, mode="trilinear", align_corners=True)
    return (field / field.std()).flatten(2)[0].T


def _calibrated_spacing(shape: BenchmarkShape, device: torch.device, generator: torch.Generator) -> float:
    """The spacing at which lists of one head overlap by `TARGET_OVERLAP` at the shape's sparsity, by bisection."""
    small = BenchmarkShape(shape.grid_tyx, 1, shape.head_size, sparsity=shape.sparsity)
    low, high = 1.0, 4.0 * max(shape.grid_tyx)
    for _ in range(7):
        middle = math.sqrt(low * high)
        query, key = (_smooth_field(small, middle, device, generator)[None, :, None] for _ in range(2))
        is_too_smooth = list_overlap(_choose(query, key, small)) > TARGET_OVERLAP
        low, high = (low, middle) if is_too_smooth else (middle, high)
    return math.sqrt(low * high)


def _choose(query: Tensor, key: Tensor, shape: BenchmarkShape) -> Tensor:
    means = [pool_tiles(x, shape.grid_tyx) for x in (query, key)]
    num_tiles = means[0].shape[1]
    return select_tiles(means[0], means[1], max(1, math.ceil((1 - shape.sparsity) * num_tiles)))


def _make_some_tiles_popular(query: Tensor, key: Tensor, shape: BenchmarkShape, generator: torch.Generator) -> None:
    grid = TileGrid(shape.grid_tyx, (4, 4, 4))
    popular = _popular(grid.num_tiles, query.device, generator)
    direction = torch.randn(shape.num_heads, shape.head_size, generator=generator, device=query.device)
    direction = F.normalize(direction, dim=-1).mul_(3.0).to(query.dtype)
    query += direction
    key += direction * popular[grid.tensors(query.device).tile_of_token][:, None, None].to(key.dtype)


def _popular(num_tiles: int, device: torch.device, generator: torch.Generator) -> Tensor:
    """Bool `[N]`, a twentieth of the tiles."""
    ranks = torch.rand(num_tiles, generator=generator, device=device).argsort()
    return ranks < max(1, round(_POPULAR_SHARE * num_tiles))


def make_lists(shape: BenchmarkShape, kind: str, num_kept: int, device: torch.device, seed: int = 0) -> Tensor:
    """Lists of a fine stage alone, `[B, H, N, k]` int32; video-like ones name the tiles nearest to the query's, with noise.

    Raises:
        ValueError: The shape is that of a whole layer.
    """
    if shape.fine_tile_tyx is None:
        raise ValueError(f"{shape} is a whole layer, which chooses its lists")
    grid = TileGrid(shape.grid_tyx, shape.fine_tile_tyx)
    generator = torch.Generator(device).manual_seed(seed)

    def noise() -> Tensor:
        return torch.rand(1, 1, grid.num_tiles, grid.num_tiles, generator=generator, device=device)

    base = torch.zeros((), device=device)
    weight = 1.0
    if kind == "video-like":
        axes = [torch.arange(n, device=device, dtype=torch.float32) for n in grid.num_tiles_tyx]
        places = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).view(-1, 3)
        base, weight = -torch.cdist(places, places), 2.8
    elif kind == "skewed":
        base = _popular(grid.num_tiles, device, generator).float()
    heads = [top_k_ascending(base + weight * noise(), num_kept) for _ in range(shape.batch * shape.num_heads)]
    return torch.cat(heads).view(shape.batch, shape.num_heads, grid.num_tiles, num_kept)


def list_overlap(lists: Tensor) -> float:
    """Mean share of its list that a query tile has in common with its neighbour, tiles in pairs.

    Example:
        >>> list_overlap(torch.tensor([[[[0, 1], [1, 2]]]]))
        0.5
    """
    num_pairs = lists.shape[2] // 2
    if not num_pairs:
        return 1.0
    shared = torch.zeros((), dtype=torch.float64)
    for heads in torch.split(lists.flatten(0, 1), 4):
        marks = torch.zeros(*heads.shape[:2], int(lists.max()) + 1, dtype=torch.bool, device=lists.device)
        marks.scatter_(-1, heads.long(), True)
        both = marks[:, 0 : 2 * num_pairs : 2] & marks[:, 1 : 2 * num_pairs : 2]
        shared += both.sum().double().cpu()
    return float(shared / (lists.shape[0] * lists.shape[1] * num_pairs * lists.shape[3]))
