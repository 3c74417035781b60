"""What is measured: dense backends, sparse backends and the engine's implementations, each as one callable on one shape."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvideo.attention.backends.sliding_tile_attn import SlidingTileAttentionMetadataBuilder
from fastvideo.attention.functional import attention
from fastvideo.attention.registry import backend_name
from fastvideo.benchmark.accuracy import Attended
from fastvideo.benchmark.inputs import Inputs, make_lists
from fastvideo.benchmark.shapes import BenchmarkShape
from fastvideo.block_sparse import (
    BlockPattern,
    TileLayout,
    block_sparse_attention,
    num_kept_tiles,
    pool_tiles,
    video_geometry,
    video_sparse_attention,
)
from fastvideo.block_sparse.impl import IMPLEMENTATIONS, choose_implementation
from fastvideo.block_sparse.selection import select_tiles
from fastvideo.video import TileGrid
from fastvideo.video.choose_tile import AUTO, resolve_tile

__all__ = ["AUTOMATIC", "DEFAULT_TILE", "STA", "VSA", "Case", "make_cases", "parse_tile"]

AUTOMATIC = "auto"
DEFAULT_TILE = "4x4x4"
VSA, STA = "VIDEO_SPARSE_ATTN", "SLIDING_TILE_ATTN"


@dataclass(frozen=True)
class Case:
    """One operation on one shape.

    Attributes:
        name: Backend, implementation and tile, for people.
        call: Query, key, value and perhaps gate to the output.
        has_gate: The call takes a gate.
        attended: What it computes, for the reference; made when it is asked for, since that may cost a selection.
        real_pairs: Pairs of query and key tokens that are listed.
        padded_pairs: The same with every tile padded to the largest.
        sparsity: Share of pairs of tiles that is skipped; 0 for dense attention.
        is_dense: It is dense attention.
    """

    name: str
    call: Callable[..., Tensor]
    has_gate: bool
    attended: Callable[[], Attended]
    real_pairs: Callable[[], float]
    padded_pairs: float
    sparsity: float
    is_dense: bool = False


def parse_tile(text: str, grid_tyx: tuple[int, int, int]) -> tuple[int, int, int]:
    """Read `"4x4x4"`, `"auto"` (of at most 64 tokens) or `"auto128"`.

    Raises:
        ValueError: It is none of those.

    Example:
        >>> parse_tile("4x4x8", (21, 45, 80)), parse_tile("auto", (21, 45, 80))
        ((4, 4, 8), (3, 5, 4))
    """
    if text in AUTO:
        return resolve_tile(text, grid_tyx)
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"expected a tile like 4x4x4, 'auto' or 'auto128', got {text!r}")
    return resolve_tile([int(part) for part in parts], grid_tyx)


def make_cases(
    shape: BenchmarkShape,
    inputs: Inputs,
    kind: str,
    *,
    backends: Sequence[str],
    impls: Sequence[str],
    sparsities: Sequence[float],
    tiles: Sequence[str],
    window_tyx: tuple[int, int, int],
) -> list[Case]:
    """The cases of a shape: every dense backend, and every sparse one at each sparsity, tile and implementation, each once.

    A fine stage alone is handed its lists, so a backend that makes its own is a case that says why it can't run.

    Raises:
        ValueError: A backend, an implementation or a tile is unknown.
    """
    for impl in impls:
        if impl != AUTOMATIC and impl not in IMPLEMENTATIONS:
            raise ValueError(f"unknown implementation {impl!r}; there are {AUTOMATIC}, {', '.join(IMPLEMENTATIONS)}")
    impls, sparsities = list(dict.fromkeys(impls)), list(dict.fromkeys(sparsities))
    cases: list[Case] = []
    for name in dict.fromkeys(map(backend_name, backends)):
        if name == VSA:
            for sparsity in sparsities:
                if shape.fine_tile_tyx is not None:
                    cases += [_fine(shape, inputs, kind, sparsity, impl) for impl in impls]
                    continue
                for tile_tyx in dict.fromkeys(parse_tile(tile, shape.grid_tyx) for tile in tiles):
                    cases += [_layer(shape, inputs, sparsity, tile_tyx, impl) for impl in impls]
        elif name == STA:
            is_whole = shape.fine_tile_tyx is None
            cases.append(_sliding(shape, inputs, window_tyx) if is_whole else _sliding_refused())
        else:
            cases.append(_dense(shape, name))
    return cases


def _dense(shape: BenchmarkShape, name: str) -> Case:
    pairs = float(shape.batch * shape.num_heads) * shape.num_tokens**2
    return Case(name, functools.partial(attention, backend=name), False, Attended, lambda: pairs, pairs, 0.0, is_dense=True)


def _as_impl(impl: str) -> str | None:
    return None if impl == AUTOMATIC else impl


def _label(backend: str, impl: str, tile_tyx: tuple[int, int, int], shape: BenchmarkShape, inputs: Inputs) -> str:
    """Backend, implementation and tile; an automatic choice is named."""
    if impl == AUTOMATIC:
        grid = TileGrid(shape.grid_tyx, tile_tyx)
        layout = video_geometry(grid, inputs.query.device).video_tiles
        lists = torch.zeros(1, 1, grid.num_tiles, 1, dtype=torch.int32, device=inputs.query.device)
        chosen, _ = choose_implementation(inputs.query, inputs.key, inputs.value, BlockPattern(layout, layout, lists))
        impl = f"{AUTOMATIC}: {chosen}"
    return f"{backend}[{impl}] {'x'.join(map(str, tile_tyx))}"


def _layer(shape: BenchmarkShape, inputs: Inputs, sparsity: float, tile_tyx: tuple[int, int, int], impl: str) -> Case:
    grid = TileGrid(shape.grid_tyx, tile_tyx)
    layout = video_geometry(grid, inputs.query.device).video_tiles
    num_kept = num_kept_tiles(grid.num_tiles, sparsity)

    def call(query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
        return video_sparse_attention(
            query, key, value, shape.grid_tyx, sparsity=sparsity, gate=gate, tile_tyx=tile_tyx, impl=_as_impl(impl)
        )

    @functools.cache
    def lists() -> Tensor:
        means = [pool_tiles(x, shape.grid_tyx, tile_tyx=tile_tyx) for x in (inputs.query, inputs.key)]
        # The scale as the layer passes it: multiplied in beforehand it rounds otherwise, and near ties fall otherwise.
        return select_tiles(means[0], means[1], num_kept, 1.0 / math.sqrt(shape.head_size))

    return Case(
        _label(VSA, impl, tile_tyx, shape, inputs),
        call,
        True,
        lambda: Attended(lists(), None, layout, has_coarse=True),
        lambda: _real_pairs(BlockPattern(layout, layout, lists()), shape),
        float(shape.batch * shape.num_heads * grid.num_tiles * num_kept) * grid.max_size**2,
        1.0 - num_kept / grid.num_tiles,
    )


def _fine(shape: BenchmarkShape, inputs: Inputs, kind: str, sparsity: float, impl: str) -> Case:
    tile_tyx = shape.fine_tile_tyx or (1, 1, 1)
    grid = TileGrid(shape.grid_tyx, tile_tyx)
    num_kept = num_kept_tiles(grid.num_tiles, sparsity)
    layout = TileLayout.from_sizes(sorted(grid.sizes, reverse=True), device=inputs.query.device)

    @functools.cache
    def pattern() -> BlockPattern:
        # Lists are given and stay: what kernels make of them is made at the first call.
        return BlockPattern(layout, layout, make_lists(shape, kind, num_kept, inputs.query.device)).reusable()

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return block_sparse_attention(query, key, value, pattern(), impl=_as_impl(impl))

    return Case(
        _label("block_sparse", impl, tile_tyx, shape, inputs),
        call,
        False,
        lambda: Attended(pattern().indices, None, layout),
        lambda: _real_pairs(pattern(), shape),
        float(shape.batch * shape.num_heads * grid.num_tiles * num_kept) * grid.max_size**2,
        1.0 - num_kept / grid.num_tiles,
    )


def _sliding(shape: BenchmarkShape, inputs: Inputs, window_tyx: tuple[int, int, int]) -> Case:
    metadata = SlidingTileAttentionMetadataBuilder().build(
        current_timestep=0,
        raw_latent_shape=shape.grid_tyx,
        patch_size=(1, 1, 1),
        STA_window=window_tyx,
        device=inputs.query.device,
    )
    pattern = metadata.pattern
    real = _real_pairs(pattern, shape)
    all_pairs = float(shape.batch * shape.num_heads) * shape.num_tokens**2
    label = f"{STA} {'x'.join(map(str, metadata.tile_tyx))} window {'x'.join(map(str, window_tyx))}"
    listed = float(pattern.is_listed().sum()) / (pattern.indices.shape[0] * pattern.indices.shape[1])
    return Case(
        label,
        functools.partial(attention, backend=STA, attn_metadata=metadata),
        False,
        lambda: Attended(pattern.indices, pattern.counts, pattern.key_tiles),
        lambda: real,
        listed * shape.batch * shape.num_heads * pattern.key_tiles.max_size**2,
        1.0 - real / all_pairs,
    )


def _sliding_refused() -> Case:
    def call(*_: Tensor) -> Tensor:
        raise NotImplementedError(f"a fine stage alone is handed its lists, and {STA} makes its own; name another shape")

    return Case(STA, call, False, Attended, lambda: 0.0, 0.0, 0.0)


def _real_pairs(pattern: BlockPattern, shape: BenchmarkShape) -> float:
    """Pairs of tokens of all samples and heads that are listed."""
    sizes = pattern.key_tiles.sizes
    total = torch.zeros((), dtype=torch.float64)
    for entries, listed in zip(pattern.indices.flatten(0, 1), pattern.is_listed().flatten(0, 1), strict=True):
        keys = torch.where(listed, sizes[torch.where(listed, entries, 0).long()], 0).sum(-1)
        total += (keys.double() * pattern.query_tiles.sizes).sum().cpu()
    return float(total) * shape.batch * shape.num_heads / (pattern.indices.shape[0] * pattern.indices.shape[1])
