"""The kernels around the engine (selection, means, gate) in Triton's interpreter; `test_video_kernels.py` runs this file.

The interpreter has to be switched on before the kernels are defined: `TRITON_INTERPRET=1 python -m pytest <this file>`.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from fastvideo.block_sparse import coarse, geometry, selection, selection_kernels, video_sparse_attention
from fastvideo.block_sparse.fine_stage import _add_gated, _differentiate_added, _differentiate_gated
from fastvideo.block_sparse.selection_kernels import launch_top_k
from fastvideo.block_sparse.video_sparse import pool_tiles
from fastvideo.block_sparse.video_sparse_reference import reference_top_k, video_sparse_attention_reference
from fastvideo.platforms.triton_support import runs_triton
from fastvideo.testing import assert_op_within_budget, assert_within_budget
from fastvideo.video import TileGrid, pooling, tile_mean

NAN, INF = math.nan, math.inf


def test_kernels_run_here() -> None:
    assert runs_triton(torch.device("cpu"))


def make_scores(kind: str, num_rows: int, num_columns: int) -> torch.Tensor:
    scores = torch.randn(num_rows, num_columns, generator=torch.Generator().manual_seed(num_columns))
    if kind == "ties":
        return (3 * scores).round()
    if kind == "equal":
        return torch.full_like(scores, -7.0)
    if kind == "nan":
        return scores.masked_fill(scores > 0.2, NAN)
    if kind == "all_nan":
        return torch.full_like(scores, NAN)
    if kind == "zeros":
        return torch.where(scores > 0, 0.0, -0.0)
    if kind == "infinite":
        return torch.where(scores > 1, INF, torch.where(scores < -0.5, -INF, scores))
    if kind == "tiny":
        return (scores * 3).round() * 1e-45
    if kind == "spread":  # over all exponents, so that no guess is near
        return scores.sign() * torch.exp2(60 * scores)
    if kind == "steps":  # two values a bit apart
        return torch.where(scores > 1.28, 1.0, 1.0 - 2.0**-24)
    return scores


@pytest.mark.parametrize("kind", ["random", "ties", "equal", "nan", "all_nan", "zeros", "infinite", "tiny", "spread", "steps"])
@pytest.mark.parametrize(("num_columns", "k"), [(2, 1), (37, 5), (64, 63), (100, 1), (1440, 144)])
def test_top_k_is_exact(num_columns: int, k: int, kind: str) -> None:
    scores = make_scores(kind, 2, num_columns)
    indices = torch.full((2, k), -7, dtype=torch.int32)
    launch_top_k(scores, indices)
    assert indices.tolist() == [reference_top_k(row, k) for row in scores.tolist()]


@pytest.mark.parametrize("num_columns", [5000, 16_384])
def test_rows_of_more_than_4096(num_columns: int) -> None:
    scores = make_scores("ties", 1, num_columns)
    k = num_columns // 30
    assert selection.top_k_ascending(scores, k)[0].tolist() == reference_top_k(scores[0].tolist(), k)


def test_longer_rows_are_left_to_torch(monkeypatch) -> None:
    scores = make_scores("ties", 2, 40)
    expected = selection.top_k_ascending(scores, 7)
    monkeypatch.setattr(selection, "_MAX_KERNEL_COLUMNS", 39)
    assert torch.equal(selection.top_k_ascending(scores, 7), expected)


# All lists at once, and nine rows of one at a time.
@pytest.mark.parametrize(("scratch", "head_size"), [(64 << 20, 5), (64 << 20, 72), (4 * 20 * 9, 64)])
def test_selection_in_chunks(scratch: int, head_size: int, monkeypatch) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(1, 20, 4, head_size), torch.randn(1, 2, 20, head_size).transpose(1, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", query.double(), key.repeat_interleave(2, dim=2).double())
    expected = scores.topk(9).indices.sort().values.int()
    monkeypatch.setattr(selection_kernels, "_BLOCK", 16)
    monkeypatch.setattr(selection_kernels, "_BLOCK_KEYS", 16)
    monkeypatch.setattr(selection, "_SCRATCH_BYTES", scratch)
    assert torch.equal(selection.select_tiles(query, key, 9), expected)


def test_means_that_are_nan_and_infinite_give_k_distinct_tiles() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 20, 1, 8).unbind(0)
    query[:, 3], key[:, 5], key[:, 6], query[:, 4] = NAN, INF, -INF, INF
    lists = selection.select_tiles(query, key, 6)
    assert ((lists >= 0) & (lists < 20)).all()
    assert (lists.diff(dim=-1) > 0).all()
    assert lists[0, 0, 3].tolist() == [0, 1, 2, 3, 4, 5]
    key[:, 17] = NAN
    assert (selection.select_tiles(query, key, 6) == 17).any(-1)[0, 0, [0, 1, 2, 5, 6, 19]].all()


CASES = [((1, 1, 1), (4, 4, 4)), ((2, 2, 4), (2, 2, 2)), ((5, 3, 3), (4, 4, 4)), ((3, 6, 5), (3, 5, 4)), ((1, 2, 3), (1, 1, 1))]
# Text is left alone in the same way whatever the dtype.
TEXT_AND_DTYPE = [(0, torch.float32), (3, torch.float16)]


def surrounded(x: torch.Tensor) -> torch.Tensor:
    """The same values in memory whose other bytes are NaN."""
    room = x.new_full((x.shape[0], x.shape[1] + 6, x.shape[2], x.shape[3] + 8), NAN)
    inside = room[:, 3:-3, :, : x.shape[3]]
    inside.copy_(x)
    return inside


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("grid_tyx", "tile_tyx"), CASES)
def test_tile_means(grid_tyx, tile_tyx, dtype, monkeypatch) -> None:
    grid = TileGrid(grid_tyx, tile_tyx)
    torch.manual_seed(0)
    x = surrounded((50 * torch.randn(2, grid.num_tokens, 3, 5)).to(dtype))
    got = tile_mean(x, grid)
    monkeypatch.setattr(pooling, "_KERNEL_DTYPES", ())
    torch.testing.assert_close(got, tile_mean(x, grid), rtol=1e-6, atol=1e-5)
    assert got.dtype == torch.float32


@pytest.mark.parametrize(("num_text", "dtype"), TEXT_AND_DTYPE)
@pytest.mark.parametrize(("grid_tyx", "tile_tyx"), CASES)
def test_means_of_three_at_once(grid_tyx, tile_tyx, num_text, dtype, monkeypatch) -> None:
    layouts = geometry.video_geometry(TileGrid(grid_tyx, tile_tyx), "cpu", num_text)
    torch.manual_seed(0)
    rows = layouts.grid.num_tokens + num_text
    tensors = [surrounded((50 * torch.randn(2, rows, heads, 40)).to(dtype)) for heads in (6, 2, 2)]
    dlow = [torch.randn(2, layouts.grid.num_tiles, heads, 40).to(dtype).transpose(1, 2).contiguous() for heads in (6, 2, 2)]

    def run() -> tuple[coarse.TileMeans, tuple[torch.Tensor, ...], coarse.TileMeans]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        means = coarse.tile_means(*leaves, layouts, -0.3)
        grads = torch.autograd.grad(means.low, leaves, [x.transpose(1, 2) for x in dlow])
        return means, grads, coarse.tile_means(*leaves[:2], None, layouts, -0.3)

    means, grads, alone = run()
    monkeypatch.setattr(coarse, "_KERNEL_DTYPES", ())
    expected, expected_grads, _ = run()
    assert not means.query.requires_grad
    assert torch.equal(alone.query, means.query)
    assert torch.equal(alone.key, means.key)
    for got, wanted, x in zip((means.query, means.key), (expected.query, expected.key), tensors, strict=False):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(got, tile_mean(x[:, : layouts.grid.num_tokens], layouts.grid), rtol=1e-6, atol=1e-5)
    # Sums in another order may round to the neighbour.
    rounding = torch.finfo(dtype).eps
    for got, wanted in zip(means.low, expected.low, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got, wanted, rtol=rounding, atol=1e-5)
    for got, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("in_kernels", [True, False])
@pytest.mark.parametrize(("num_text", "dtype"), TEXT_AND_DTYPE)
@pytest.mark.parametrize(("grid_tyx", "tile_tyx"), CASES)
def test_gradients_of_means_are_added_to_those_of_tokens(grid_tyx, tile_tyx, num_text, dtype, in_kernels, monkeypatch) -> None:
    if not in_kernels:
        monkeypatch.setattr(coarse, "_KERNEL_DTYPES", ())
    layouts = geometry.video_geometry(TileGrid(grid_tyx, tile_tyx), "cpu", num_text)
    torch.manual_seed(0)
    rows, tiles = layouts.grid.num_tokens + num_text, layouts.grid.num_tiles
    leaves = [torch.randn(2, rows, heads, 40).to(dtype).requires_grad_() for heads in (6, 2, 2)]
    means = coarse.tile_means(*leaves, layouts, -0.3)
    assert all(torch.equal(x, leaf) for x, leaf in zip(means.tokens, leaves, strict=True))
    dlow = [torch.randn(2, tiles, heads, 40).to(dtype) for heads in (6, 2, 2)]
    dtokens = [torch.randn_like(x) for x in leaves]
    alone = torch.autograd.grad(means.low, leaves, dlow, retain_graph=True)
    given = [x.clone() for x in dtokens]
    summed = torch.autograd.grad((*means.low, *means.tokens), leaves, (*dlow, *given), retain_graph=True)
    for got, x, y in zip(summed, alone, dtokens, strict=True):
        assert got.dtype == dtype
        assert_within_budget(got, x.double() + y.double(), x + y)
        assert torch.equal(got[:, layouts.grid.num_tokens :], y[:, layouts.grid.num_tokens :])
    # Not all of them, or not so that they can be written to.
    some = torch.autograd.grad((*means.low, means.tokens[1]), leaves, (*dlow, dtokens[1]), retain_graph=True)
    assert torch.equal(some[0], alone[0])
    assert_within_budget(some[1], alone[1].double() + dtokens[1].double(), alone[1] + dtokens[1])
    strided = [x.clone().transpose(1, 2).contiguous().transpose(1, 2) for x in dtokens]
    for got, x, y in zip(
        torch.autograd.grad((*means.low, *means.tokens), leaves, (*dlow, *strided), retain_graph=True),
        alone,
        dtokens,
        strict=True,
    ):
        assert_within_budget(got, x.double() + y.double(), x + y)
    for got, y in zip(torch.autograd.grad(means.tokens, leaves, dtokens), dtokens, strict=True):
        assert torch.equal(got, y)


def test_one_tensor_as_query_key_and_value() -> None:
    torch.manual_seed(0)
    x, gate, dout = (torch.randn(1, 16, 2, 16) for _ in range(3))
    attend = partial(video_sparse_attention, grid_tyx=(4, 2, 2), tile_tyx=(2, 2, 2), sparsity=0.5, gate=gate)
    leaves = [x.clone().requires_grad_() for _ in range(3)]
    expected = sum(torch.autograd.grad(attend(*leaves), leaves, dout))
    same = x.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(attend(same, same, same), same, dout)[0], expected)


def gate_inputs(grid: TileGrid, dtype: torch.dtype, head_size: int = 40) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    shape = (2, grid.num_tokens, 3, head_size)
    fine, dout, gate = (torch.randn(shape).to(dtype) for _ in range(3))
    return fine, surrounded(dout), torch.randn(2, grid.num_tiles, 3, head_size), surrounded(gate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("grid_tyx", "tile_tyx"), CASES)
def test_gate(grid_tyx, tile_tyx, dtype) -> None:
    layouts = geometry.video_geometry(TileGrid(grid_tyx, tile_tyx), "cpu")
    fine, dout, coarse, gate = gate_inputs(layouts.grid, dtype)
    of_token = coarse[:, layouts.tile_of_token]
    out = _add_gated(fine, coarse, gate, torch.full_like(fine, NAN), layouts)
    products = of_token.double() * gate.double()
    assert_within_budget(out, fine.double() + products, fine + of_token.to(dtype) * gate)
    again, dcoarse, dgate = _differentiate_gated(out, dout, coarse, gate, layouts)
    assert_within_budget(again, out.double() - products, out - of_token.to(dtype) * gate)
    assert_within_budget(dgate, dout.double() * of_token.double(), dout * of_token.to(dtype))
    expected = torch.zeros_like(coarse, dtype=torch.float64)
    expected.index_add_(1, layouts.tile_of_token, dout.double() * gate.double())
    torch.testing.assert_close(dcoarse.double(), expected, rtol=1e-5, atol=1e-5)
    dlse, *same = _differentiate_added(dout, coarse, gate, layouts)
    assert all(torch.equal(x, y) for x, y in zip(same, (dcoarse, dgate), strict=True))
    torch.testing.assert_close(dlse.double(), (dout.double() * products).sum(-1), rtol=1e-5, atol=1e-5)
    in_place = fine.clone()
    assert _add_gated(in_place, coarse, gate, in_place, layouts) is in_place
    assert torch.equal(in_place, out)


@pytest.mark.parametrize("head_size", [1, 16, 64, 128, 200])
def test_gradient_of_the_gate_in_heads_of_any_size(head_size: int) -> None:
    layouts = geometry.video_geometry(TileGrid((3, 3, 5), (2, 2, 2)), "cpu")
    fine, dout, coarse, gate = gate_inputs(layouts.grid, torch.float32, head_size)
    of_token = coarse[:, layouts.tile_of_token]
    again, dcoarse, dgate = _differentiate_gated(fine, dout, coarse, gate, layouts)
    dlse, *same = _differentiate_added(dout, coarse, gate, layouts)
    torch.testing.assert_close(again, fine - of_token * gate)
    torch.testing.assert_close(dlse, (dout * of_token * gate).sum(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dgate, dout * of_token)
    expected = torch.zeros_like(coarse).index_add_(1, layouts.tile_of_token, dout * gate)
    torch.testing.assert_close(dcoarse, expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(x, y) for x, y in zip(same, (dcoarse, dgate), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_whole_operation(dtype: torch.dtype) -> None:
    grid_tyx, tile_tyx, num_text = (3, 4, 2), (2, 2, 2), 5
    randn = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    num_tokens = math.prod(grid_tyx)
    inputs = {
        "query": 3 * randn(1, num_tokens + num_text, 2, 16),
        "key": 3 * randn(1, num_tokens + num_text, 1, 16),
        "value": randn(1, num_tokens + num_text, 1, 16),
        "gate": randn(1, num_tokens, 2, 16),
    }
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    means = [pool_tiles(inputs[name], grid_tyx, tile_tyx=tile_tyx, num_replicated=num_text) for name in ("query", "key")]
    bound = {"grid_tyx": grid_tyx, "tile_tyx": tile_tyx, "num_replicated": num_text, "sparsity": 0.6}
    lists = selection.select_tiles(*means, 2)
    assert_op_within_budget(
        partial(video_sparse_attention, impl="triton", **bound),
        partial(video_sparse_attention_reference, indices=lists, **bound),
        inputs,
    )
