"""The Triton kernels on a CPU, in Triton's interpreter; `test_triton.py` runs this file in a process of its own.

The interpreter has to be switched on before the kernels are defined: `TRITON_INTERPRET=1 python -m pytest <this file>`.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from fastvideo.block_sparse import BlockPattern, TileLayout
from fastvideo.block_sparse.impl import GatedTiles, choose_implementation
from fastvideo.block_sparse.impl.triton import launch
from fastvideo.testing import assert_within_budget

from .engine_cases import EngineCases

SHAPES = {
    "one_token": ([1], [1], 1, 1, 1, 1),
    "uniform": ([16] * 4, [16] * 5, 1, 2, 2, 16),
    "uniform_64": ([64] * 2, [64] * 3, 1, 1, 1, 64),
    "ragged": ([5, 16, 1, 16], [16, 7, 3, 16, 2], 2, 4, 2, 24),
    "sixty": ([60, 60], [60, 60, 60], 1, 2, 1, 32),
    "text": ([16, 16, 16, 11], [64, 64, 7], 1, 2, 2, 16),
    "pieces": ([20, 70], [100, 9, 3], 1, 1, 1, 16),
    "even_pieces": ([128, 128], [128, 128], 1, 1, 1, 16),
    "big_head": ([16, 13], [16, 16], 1, 1, 1, 200),
}
DTYPES = (torch.float32, torch.float16)


CASES = EngineCases("triton", "cpu", SHAPES, density=0.6)
make_pattern, make_inputs, check = CASES.make_pattern, CASES.make_inputs, CASES.check


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_output_log_sum_exp_and_gradients(shape: str, dtype: torch.dtype) -> None:
    check(make_inputs(shape, dtype), make_pattern(shape))


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1.7])
def test_any_scale(scale: float) -> None:
    check(make_inputs("ragged", torch.float32), make_pattern("ragged"), scale)


def test_shared_lists_without_order() -> None:
    check(make_inputs("ragged", torch.float32), make_pattern("ragged", ordered=False, shared=True))


@pytest.mark.parametrize("shape", ["uniform", "ragged", "pieces"])
def test_lists_without_counts(shape: str) -> None:
    layouts = make_pattern(shape)
    indices = torch.tensor([[0, 2], [1, 2], [0, 1], [0, 2]], dtype=torch.int32)[: layouts.query_tiles.num_tiles]
    pattern = BlockPattern(layouts.query_tiles, layouts.key_tiles, indices[None, None])
    check(make_inputs(shape, torch.float32), pattern)


def test_real_activations() -> None:
    inputs = make_inputs("uniform_64", torch.float16, size=12.0)
    assert float(inputs["query"].abs().max()) > 40
    check(inputs, make_pattern("uniform_64"))


def test_equal_scores_and_strided_inputs() -> None:
    inputs = make_inputs("sixty", torch.float32)
    inputs["query"] = torch.zeros_like(inputs["query"])
    inputs["key"] = inputs["key"].transpose(1, 3).contiguous().transpose(1, 3)
    inputs["value"] = inputs["value"].transpose(1, 2).contiguous().transpose(1, 2)
    check(inputs, make_pattern("sixty"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ["one_token", "uniform", "ragged", "text", "pieces", "big_head"])
def test_gate_in_the_forward(shape: str, dtype: torch.dtype) -> None:
    """Into rows among others, from a gate among other columns that are NaN; rows that see nothing get gate times coarse."""
    query_sizes, _, batch, heads, _, head_size = SHAPES[shape]
    pattern, inputs = make_pattern(shape), make_inputs(shape, dtype)
    num_queries = sum(query_sizes)
    randn = partial(torch.randn, generator=torch.Generator().manual_seed(2))
    gate = randn(batch, num_queries, heads, head_size + 3).to(dtype)
    gate[..., head_size:] = torch.nan
    gate, coarse = gate[..., :head_size], randn(batch, len(query_sizes), heads, head_size).to(dtype)
    out = torch.full((batch, num_queries + 5, heads, head_size), torch.nan, dtype=dtype)
    lse = torch.full(out.shape[:3], torch.nan)
    own = slice(2, num_queries + 2)
    fine, fine_lse = launch.forward(*inputs.values(), pattern, 0.3)
    launch.forward_into(*inputs.values(), pattern, 0.3, out[:, own], lse[:, own], GatedTiles(gate, coarse))
    tile_of_token = torch.empty(num_queries, dtype=torch.long)
    tile_of_token[pattern.query_tiles.order] = torch.arange(len(query_sizes)).repeat_interleave(torch.tensor(query_sizes))
    product = gate.float() * coarse[:, tile_of_token].float()
    assert_within_budget(out[:, own], fine.double() + product.double(), fine + product.to(dtype))
    seen = fine_lse != -torch.inf
    assert torch.equal(out[:, own][~seen], product[~seen].to(dtype))
    assert len(query_sizes) == 1 or not seen.all()
    assert torch.equal(lse[:, own], fine_lse)
    assert all(x[:, :2].isnan().all() and x[:, num_queries + 2 :].isnan().all() for x in (out, lse))


@pytest.mark.parametrize("ordered", [False, True])
def test_nothing_but_listed_tokens_is_read(ordered: bool) -> None:
    """Keys of a tile that nobody lists, and all memory around the tensors, are NaN."""
    shape = "ragged"
    pattern, inputs = make_pattern(shape, ordered=ordered), make_inputs(shape, torch.float32)
    tile = 1
    mask = pattern.tile_mask()
    mask[..., tile] = False
    pattern = BlockPattern.from_mask(mask, pattern.query_tiles, pattern.key_tiles)
    hidden = pattern.key_tiles.tile_of_token() == tile
    poisoned = {}
    for name, x in inputs.items():
        room = x.new_full((x.shape[0], x.shape[1] + 40, x.shape[2], x.shape[3] + 8), torch.nan)
        poisoned[name] = room[:, 20:-20, :, : x.shape[3]]
        poisoned[name].copy_(x)
        if name != "query":
            poisoned[name][:, hidden] = torch.nan
            x[:, hidden] = 0.0
    got, expected = CASES.gradients(poisoned, pattern), CASES.gradients(inputs, pattern)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)
    assert not got[3][:, hidden].any()
    check(inputs, pattern)


@pytest.mark.parametrize("has_counts", [False, True])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (5, 7), (1030, 2)])
def test_inverted_lists_are_those_of_the_pattern(num_queries: int, num_keys: int, has_counts: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    layouts = TileLayout.uniform(num_queries, 1), TileLayout.uniform(num_keys, 1)
    batch, heads = (2, 3) if num_queries < 100 else (1, 1)
    noise = torch.rand(batch, heads, num_queries, num_keys, generator=generator)
    if has_counts:
        pattern = BlockPattern.from_mask(noise < 0.5, *layouts)
    else:
        pattern = BlockPattern.from_indices(noise.topk((num_keys + 1) // 2).indices.sort(-1).values, *layouts)
    expected, got = pattern.invert(), launch.inverted_lists(pattern)
    assert torch.equal(got.offsets, expected.offsets)
    for row in range(batch * heads):
        length = int(expected.offsets.flatten(0, 1)[row, -1])
        lists = [x.query_tiles.flatten(0, 1)[row, :length] for x in (got, expected)]
        assert torch.equal(*lists)


def test_key_tiles_of_the_longest_lists_come_first() -> None:
    lengths = torch.tensor([[[1, 3, 0, 3], [0, 1, 4, 1], [5, 0, 0, 5], [2, 2, 2, 2]]])
    offsets = torch.cat([torch.zeros(1, 4, 1, dtype=torch.int64), lengths.cumsum(-1)], dim=-1).to(torch.int32)
    assert launch.heavy_first(offsets, 4).tolist() == [[[1, 3, 0, 2], [2, 1, 3, 0], [0, 3, 1, 2], [0, 1, 2, 3]]]
    # Sums over the two query heads of a key head: 1, 4, 4, 4 and 7, 2, 2, 7.
    assert launch.heavy_first(offsets, 2).tolist() == [[[1, 2, 3, 0], [0, 3, 1, 2]]]
    assert launch.heavy_first(offsets[:, :1], 2).tolist() == [[[1, 3, 0, 2]]]


@pytest.mark.parametrize("shape", ["ragged", "pieces"])
def test_every_order_of_key_tiles_gives_the_same_bits(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, pattern, orders = make_inputs(shape, torch.float32), make_pattern(shape), []

    def light_first(offsets, kv_heads):
        orders.append(original(offsets, kv_heads))
        return orders[-1].flip(-1)

    expected, original = CASES.gradients(inputs, pattern), launch.heavy_first
    monkeypatch.setattr(launch, "heavy_first", light_first)
    for one, other in zip(CASES.gradients(inputs, pattern), expected, strict=True):
        assert torch.equal(one, other)
    assert len(orders) == 1
    # The kernel goes by the order: where it names one tile alone, the others' gradients are never written.
    tile = pattern.key_tiles.tile_of_token()
    monkeypatch.setattr(torch, "empty_like", torch.zeros_like)
    monkeypatch.setattr(launch, "heavy_first", lambda *given: torch.full_like(original(*given), 1))
    dvalue = CASES.gradients(inputs, pattern)[4]
    assert torch.equal(dvalue[:, tile == 1], expected[4][:, tile == 1])
    assert not dvalue[:, tile != 1].any()
    assert expected[4][:, tile != 1].any()


def test_chosen_automatically() -> None:
    inputs = make_inputs("uniform", torch.float32)
    assert choose_implementation(*inputs.values(), make_pattern("uniform"))[0] == "triton"
    inputs = make_inputs("uniform", torch.bfloat16)
    name, trace = choose_implementation(*inputs.values(), make_pattern("uniform"))
    assert name != "triton"
    assert trace["triton"] == ("Triton's interpreter does not multiply bfloat16",)
