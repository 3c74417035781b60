"""The tile that "auto" picks: costs against brute force, and that no allowed tile costs less."""

from __future__ import annotations

import itertools
import math
import time

import pytest
import torch

from fastvideo.attention.backends.video_sparse_attn import VideoSparseAttentionMetadataBuilder
from fastvideo.block_sparse import video_sparse_attention
from fastvideo.video import TileGrid
from fastvideo.video.choose_tile import choose_tile, resolve_tile, tile_cost

GRIDS = [(21, 45, 80), (21, 30, 52), (33, 45, 80), (1, 45, 80), (2, 45, 80), (5, 5, 5), (3, 7, 11), (1, 1, 1), (17, 30, 53)]


def work(grid_tyx, tile_tyx) -> int:
    sizes = TileGrid(grid_tyx, tile_tyx).sizes
    return sum(64 * math.ceil(n / 64) for n in sizes) * sum(16 * math.ceil(n / 16) for n in sizes)


def test_tiles_of_wan() -> None:
    # By hand: 1,260 and 546 whole tiles of 60 tokens, each paid as 64 query and 64 key rows.
    for grid_tyx, num_tiles in (((21, 45, 80), 1260), ((21, 30, 52), 546)):
        choice = choose_tile(grid_tyx)
        assert choice.tile_tyx == (3, 5, 4)
        assert choice.num_tiles == num_tiles
        assert choice.query_rows == choice.key_rows == 64 * num_tiles
        assert choice.work_padded == (64 * num_tiles) ** 2
        assert choice.work_real == (60 * num_tiles) ** 2
        assert choice.padding == pytest.approx((64 / 60) ** 2)


def test_cost_of_the_papers_tile() -> None:
    # 12 x 20 tiles of 16 tokens behind 5 x 12 x 20, and so on: 1,100 of 64 tokens, 320 of 16, 20 of 4.
    cost = tile_cost((21, 45, 80), (4, 4, 4))
    assert cost.num_tiles == 1440
    assert cost.query_rows == 64 * 1440
    assert cost.key_rows == 64 * 1100 + 16 * 340
    assert cost.padding > choose_tile((21, 45, 80)).padding
    assert str(cost) == "tile 4x4x4 on grid 21x45x80: 1440 tiles, padding adds 22.3 % work"


@pytest.mark.parametrize("grid_tyx", GRIDS)
@pytest.mark.parametrize("tile_tyx", [(4, 4, 4), (3, 5, 4), (1, 7, 9), (6, 8, 8), (1, 1, 1)])
def test_costs_by_brute_force(grid_tyx, tile_tyx) -> None:
    cost, grid = tile_cost(grid_tyx, tile_tyx), TileGrid(grid_tyx, tile_tyx)
    assert cost.work_padded == work(grid_tyx, tile_tyx)
    assert (cost.num_tiles, cost.work_real) == (grid.num_tiles, grid.num_tokens**2)


@pytest.mark.parametrize("max_tokens", [64, 20, 1])
@pytest.mark.parametrize("grid_tyx", [(5, 6, 7), (1, 9, 16), (2, 5, 20), (1, 1, 30)])
def test_no_allowed_tile_costs_less(grid_tyx, max_tokens) -> None:
    choice = choose_tile(grid_tyx, max_tokens)
    assert math.prod(choice.tile_tyx) <= max_tokens

    def is_allowed(tile) -> bool:
        return math.prod(tile) <= max_tokens and all(
            2 * side >= max(tile) or side == extent for side, extent in zip(tile, grid_tyx, strict=True)
        )

    allowed = [tile for tile in itertools.product(*(range(1, extent + 1) for extent in grid_tyx)) if is_allowed(tile)]
    assert choice.tile_tyx in allowed
    assert choice.work_padded == min(work(grid_tyx, tile) for tile in allowed)


def test_ties_go_to_cubes() -> None:
    # (4, 4, 4) and (4, 4, 8) waste nothing here.
    assert choose_tile((16, 16, 16), 128).tile_tyx == (4, 4, 4)
    # At equal shape the larger: 16, 32, ... rows per tile all pay one query block of 64.
    assert choose_tile((1, 64, 64)).tile_tyx == (1, 8, 8)


def test_slats_need_to_be_asked_for() -> None:
    slat = choose_tile((21, 45, 80), max_aspect=math.inf)
    assert slat.padding < 1.04
    assert max(slat.tile_tyx) > 2 * min(slat.tile_tyx)


def test_larger_tiles_may_cost_less() -> None:
    choice = choose_tile((21, 45, 80), 128)
    assert 64 < math.prod(choice.tile_tyx) <= 128
    assert choice.padding < choose_tile((21, 45, 80)).padding


def test_choosing_is_fast_and_cached() -> None:
    best = math.inf
    for extent in (47, 48, 49):  # the best of three, as the machine may be busy
        start = time.perf_counter()
        first = choose_tile((21, extent, 83))
        best = min(best, time.perf_counter() - start)
    assert best < 0.05
    assert choose_tile([21, 49, 83]) is first


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (((21, 45),), ValueError, "grid_tyx"),
        (((21, 45, 0),), ValueError, "grid_tyx"),
        (((21, 45, 80), 0), ValueError, "max_tokens >= 1, got 0"),
        (((21, 45, 80), 64.0), TypeError, "max_tokens.*64.0"),
        (((21, 45, 80), True), TypeError, "max_tokens"),
    ],
)
def test_bad_arguments(arguments, error, text) -> None:
    with pytest.raises(error, match=text):
        choose_tile(*arguments)


@pytest.mark.parametrize("max_aspect", [0.5, math.nan])
def test_bad_aspect(max_aspect) -> None:
    with pytest.raises(ValueError, match="max_aspect >= 1"):
        choose_tile((4, 4, 4), max_aspect=max_aspect)


def test_names_of_tiles() -> None:
    assert resolve_tile("auto", (21, 30, 52)) == (3, 5, 4)
    assert resolve_tile("auto128", (21, 45, 80)) == choose_tile((21, 45, 80), 128).tile_tyx
    assert resolve_tile([2, 3, 4], (21, 30, 52)) == (2, 3, 4)
    with pytest.raises(ValueError, match="'auto' or 'auto128', got 'automatic'"):
        resolve_tile("automatic", (21, 30, 52))


def test_auto_in_the_metadata() -> None:
    metadata = VideoSparseAttentionMetadataBuilder().build(
        current_timestep=0, raw_latent_shape=(3, 20, 16), patch_size=(1, 2, 2), VSA_sparsity=0.5, tile_tyx="auto", device="cpu"
    )
    assert metadata.tile_tyx == choose_tile((3, 10, 8)).tile_tyx == (3, 5, 4)
    assert metadata.geometry.grid.num_tiles == 4
    assert metadata.num_kept_tiles == 2


@pytest.mark.parametrize("is_compiled", [False, True])
def test_auto_in_the_operation(is_compiled) -> None:
    query, key, value = torch.randn(3, 1, 240, 2, 8, generator=torch.Generator().manual_seed(0)).unbind(0)

    def attend(query, tile_tyx):
        return video_sparse_attention(query, key, value, (3, 10, 8), sparsity=0.5, tile_tyx=tile_tyx)

    run = torch.compile(attend, fullgraph=True, backend="aot_eager") if is_compiled else attend
    torch.testing.assert_close(run(query, "auto"), attend(query, (3, 5, 4)))
    assert not torch.allclose(attend(query, "auto"), attend(query, (4, 4, 4)))
