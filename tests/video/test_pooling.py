"""Tile means and sums against loops; sums in fp32, gradients."""

from __future__ import annotations

import pytest
import torch

from fastvideo.video import TileGrid, tile_mean, tile_sum

CASES = [((1, 1, 1), (4, 4, 4)), ((4, 2, 6), (2, 2, 2)), ((5, 3, 7), (4, 4, 4)), ((3, 5, 2), (1, 1, 1)), ((2, 3, 9), (3, 2, 4))]


def loops(x: torch.Tensor, grid: TileGrid, reduce) -> torch.Tensor:
    tile_of_token = grid.tensors("cpu").tile_of_token
    return torch.stack([reduce(x.double()[:, tile_of_token == tile], dim=1) for tile in range(grid.num_tiles)], dim=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("grid_tyx", "tile_tyx"), CASES)
def test_values(grid_tyx, tile_tyx, dtype) -> None:
    grid = TileGrid(grid_tyx, tile_tyx)
    torch.manual_seed(0)
    x = (50 * torch.randn(2, grid.num_tokens, 3, 5)).to(dtype)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    for function, reduce in ((tile_mean, torch.mean), (tile_sum, torch.sum)):
        result, expected = function(x, grid), loops(x, grid, reduce)
        assert result.dtype == wanted
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=4e-4 if wanted == torch.float32 else 1e-11)
    assert torch.equal(tile_mean(x, grid, grid.tensors("cpu").sizes), tile_mean(x, grid))


@pytest.mark.parametrize(("grid_tyx", "tile_tyx"), CASES)
def test_gradients(grid_tyx, tile_tyx) -> None:
    grid = TileGrid(grid_tyx, tile_tyx)
    x = torch.randn(1, grid.num_tokens, 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: tile_mean(x, grid), x, fast_mode=True)


def test_strided_input() -> None:
    grid = TileGrid((3, 5, 7), (2, 2, 2))
    x = torch.randn(2, 3, 130, 4).transpose(1, 2)[:, : grid.num_tokens]
    assert torch.equal(tile_mean(x, grid), tile_mean(x.contiguous(), grid))


def test_wrong_number_of_tokens() -> None:
    with pytest.raises(ValueError, match=r"S=8.*\(1, 9, 1, 1\)"):
        tile_mean(torch.zeros(1, 9, 1, 1), TileGrid((2, 2, 2), (2, 2, 2)))
