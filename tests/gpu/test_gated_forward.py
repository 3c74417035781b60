"""The gate in the forward kernels of implementations that take it there: values, gradients, and what is read and written."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from fastvideo.block_sparse import geometry, pool_tiles, selection, video_sparse_attention
from fastvideo.block_sparse.fine_stage import _add_gated, attend_to_tiles
from fastvideo.block_sparse.impl import IMPLEMENTATIONS, GatedTiles, load_implementation
from fastvideo.block_sparse.pattern import BlockPattern, TileLayout
from fastvideo.block_sparse.video_sparse_reference import video_sparse_attention_reference
from fastvideo.testing import assert_op_within_budget, assert_within_budget
from fastvideo.video import TileGrid

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, torch sees none"),
]
NAMES = [name for name in IMPLEMENTATIONS if name in ("hopper", "triton")]
# Grid, tile, text tokens, batch, query heads, key heads, head size, dtype, size of the gate.
CASES = {
    "partial_tiles": ((5, 10, 14), (4, 4, 4), 0, 2, 4, 4, 128, torch.bfloat16, 1.0),
    "partial_tiles_fp16": ((5, 10, 14), (4, 4, 4), 0, 2, 2, 2, 64, torch.float16, 1.0),
    "tiny_tiles": ((5, 9, 11), (4, 4, 4), 0, 1, 2, 2, 64, torch.bfloat16, 1.0),
    "tiles_of_60": ((6, 10, 16), (3, 5, 4), 0, 2, 2, 2, 128, torch.bfloat16, 1.0),
    "tiles_of_128": ((8, 8, 24), (4, 4, 8), 0, 2, 2, 2, 128, torch.bfloat16, 1.0),
    "partial_tiles_of_128": ((7, 6, 20), (4, 4, 8), 0, 1, 2, 2, 64, torch.bfloat16, 1.0),
    "text": ((5, 10, 14), (4, 4, 4), 77, 2, 4, 4, 128, torch.bfloat16, 1.0),
    "grouped": ((5, 10, 14), (4, 4, 4), 13, 2, 4, 2, 64, torch.bfloat16, 1.0),
    "large_gate": ((5, 10, 14), (4, 4, 4), 0, 2, 4, 4, 128, torch.bfloat16, 60.0),
}


def make_case(case: str) -> tuple[dict[str, torch.Tensor], dict[str, object], torch.Tensor]:
    """Inputs, what else the operation is called with, and the lists of kept tiles."""
    grid_tyx, tile_tyx, num_text, batch, heads, kv_heads, head_size, dtype, gate_size = CASES[case]
    randn = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    num_tokens = math.prod(grid_tyx)
    inputs = {
        "query": 3 * randn(batch, num_tokens + num_text, heads, head_size),
        "key": 3 * randn(batch, num_tokens + num_text, kv_heads, head_size),
        "value": randn(batch, num_tokens + num_text, kv_heads, head_size),
        "gate": gate_size * randn(batch, num_tokens, heads, head_size),
    }
    inputs = {name: x.to("cuda", dtype) for name, x in inputs.items()}
    bound = {"grid_tyx": grid_tyx, "tile_tyx": tile_tyx, "num_replicated": num_text}
    means = [pool_tiles(inputs[x], grid_tyx, tile_tyx=tile_tyx, num_replicated=num_text) for x in ("query", "key")]
    num_kept = max(1, TileGrid(grid_tyx, tile_tyx).num_tiles // 3)
    return inputs, bound, selection.select_tiles(means[0] * head_size**-0.5, means[1], num_kept)


def skip_unless_runs(name: str, *inputs: torch.Tensor, layout: TileLayout) -> None:
    lists = torch.zeros(1, 1, layout.num_tiles, 1, dtype=torch.int32, device="cuda")
    own = tuple(x[:, : layout.num_tokens] for x in inputs)
    if reasons := load_implementation(name).rejections(*own, BlockPattern(layout, layout, lists)):
        pytest.skip(f"{name}: {'; '.join(reasons)}")


def skip_case_unless_runs(name: str, case: str, inputs: dict[str, torch.Tensor]) -> None:
    layout = geometry.video_geometry(TileGrid(*CASES[case][:2]), "cuda").video_tiles
    skip_unless_runs(name, inputs["query"], inputs["key"], inputs["value"], layout=layout)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_output_and_gradients(name: str, case: str) -> None:
    inputs, bound, lists = make_case(case)
    skip_case_unless_runs(name, case, inputs)
    assert load_implementation(name).forward_into is not None
    assert_op_within_budget(
        partial(video_sparse_attention, num_kept=lists.shape[-1], impl=name, **bound),
        partial(video_sparse_attention_reference, sparsity=0.5, indices=lists, **bound),
        inputs,
        # The backward takes a large gate off a rounded output.
        gradients=case != "large_gate",
    )


@pytest.mark.parametrize("case", ["partial_tiles", "text", "tiles_of_128", "grouped"])
@pytest.mark.parametrize("name", NAMES)
def test_same_bits_with_and_without_gradients(name: str, case: str) -> None:
    inputs, bound, lists = make_case(case)
    skip_case_unless_runs(name, case, inputs)
    attend = partial(video_sparse_attention, num_kept=lists.shape[-1], impl=name, **bound)
    leaves = {key: x.requires_grad_() for key, x in inputs.items()}
    out = attend(**leaves)
    with torch.no_grad():
        assert torch.equal(attend(**leaves), out)
    assert torch.equal(attend(**leaves), out)


@pytest.mark.parametrize("name", NAMES)
def test_gates_of_any_strides(name: str) -> None:
    inputs, bound, lists = make_case("text")
    skip_case_unless_runs(name, "text", inputs)
    attend = partial(video_sparse_attention, num_kept=lists.shape[-1], impl=name, **bound)
    gate = inputs.pop("gate")
    expected = attend(**inputs, gate=gate)
    rows = torch.full_like(inputs["query"], math.nan)
    rows[:, : gate.shape[1]] = gate
    wide = torch.full((*gate.shape[:3], 136), math.nan, dtype=gate.dtype, device="cuda")
    wide[..., 8:] = gate
    heads_first = gate.transpose(1, 2).contiguous().transpose(1, 2)
    columns_first = gate.transpose(1, 3).contiguous().transpose(1, 3)
    for other in (rows, wide[..., 8:], heads_first, columns_first):
        assert torch.equal(attend(**inputs, gate=other), expected)
    shared = gate[:1].expand_as(gate)
    assert torch.equal(attend(**inputs, gate=shared), attend(**inputs, gate=shared.contiguous()))


@pytest.mark.parametrize("sizes", [[64] * 4, [60] * 4, [128, 128], [64, 16, 64, 4, 16, 3, 30, 64, 1, 20], [100, 3, 128, 17]])
@pytest.mark.parametrize("name", NAMES)
def test_rows_among_others(name: str, sizes: list[int]) -> None:
    """Rows around those of the call stay; queries that see nothing get the coarse part; what nobody lists is NaN."""
    total, batch, heads, head_size = sum(sizes), 2, 3, 64
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0)).cuda()
    layout = TileLayout.from_sizes(sizes, order=order, device="cuda")
    torch.manual_seed(0)
    query, key, value, gate = (torch.randn(batch, total, heads, head_size, device="cuda").bfloat16() for _ in range(4))
    skip_unless_runs(name, query, key, value, layout=layout)
    coarse = torch.randn(batch, len(sizes), heads, head_size, device="cuda").bfloat16()
    tile_of_token = torch.empty(total, dtype=torch.long, device="cuda")
    tile_of_token[order] = torch.arange(len(sizes), device="cuda").repeat_interleave(torch.tensor(sizes, device="cuda"))
    mask = torch.rand(batch, heads, len(sizes), len(sizes), device="cuda") < 0.5
    mask[..., 0, :] = False
    mask[..., -1, 0] = True
    mask[..., 1] = False
    unlisted = tile_of_token == 1
    key[:, unlisted], value[:, unlisted] = math.nan, math.nan
    pattern = BlockPattern.from_mask(mask, layout, layout)
    out = torch.full((batch, total + 5, heads, head_size), 7.0, dtype=torch.bfloat16, device="cuda")
    lse = torch.full((batch, total + 5, heads), 7.0, device="cuda")
    implementation = load_implementation(name)
    write = partial(implementation.forward_into, query, key, value, pattern, 0.2)
    write(out[:, 2 : total + 2], lse[:, 2 : total + 2], GatedTiles(gate, coarse))
    assert all((x[:, :2] == 7).all() and (x[:, total + 2 :] == 7).all() for x in (out, lse))
    fine, fine_lse = implementation.forward(query, key, value, pattern, 0.2)
    assert torch.equal(lse[:, 2 : total + 2], fine_lse)
    product = gate.double() * coarse[:, tile_of_token].double()
    seen = mask.any(-1).transpose(1, 2)[:, tile_of_token]
    assert torch.equal(seen, fine_lse != -math.inf)
    got = out[:, 2 : total + 2]
    assert torch.equal(got[~seen], product[~seen].float().bfloat16())
    # One rounding of the sum beside that of the fine output here.
    unit = 2.0**-8
    allowed = unit * (got.double().abs() + fine.double().abs()) + 1e-6
    assert ((got.double() - fine.double() - product).abs() <= allowed).all()
    plain, plain_lse = torch.empty_like(out), torch.empty_like(lse)
    write(plain[:, 2 : total + 2], plain_lse[:, 2 : total + 2], None)
    assert torch.equal(plain[:, 2 : total + 2], fine)
    assert torch.equal(plain_lse[:, 2 : total + 2], fine_lse)


@pytest.mark.parametrize("name", NAMES)
def test_one_rounding(name: str) -> None:
    """Fine output and product in fp32 give errors that a sum of rounded ones does not reach."""
    inputs, bound, lists = make_case("partial_tiles")
    skip_case_unless_runs(name, "partial_tiles", inputs)
    layouts = geometry.video_geometry(TileGrid(bound["grid_tyx"], bound["tile_tyx"]), "cuda")
    coarse = torch.randn(2, layouts.video_tiles.num_tiles, 4, 128, device="cuda").bfloat16()
    tensors, gate = [inputs[x] for x in ("query", "key", "value")], inputs["gate"]
    got = attend_to_tiles(*tensors, coarse, gate, lists, layouts, 128**-0.5, name)
    fine = attend_to_tiles(*tensors, None, None, lists, layouts, 128**-0.5, name)
    exact = attend_to_tiles(
        *(x.double() for x in tensors), coarse.double(), gate.double(), lists, layouts, 128**-0.5, "reference"
    )
    twice = _add_gated(fine, coarse, gate, torch.empty_like(fine), layouts)
    assert_within_budget(got, exact, twice, 1.0)
    assert (got - exact).abs().mean() < (twice - exact).abs().mean()


def test_no_room_for_the_fine_output() -> None:
    """Beside what the kernels pack the output alone is held, also where text follows the video."""
    grid_tyx, num_text = (16, 32, 32), 64
    randn = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    shape = (1, math.prod(grid_tyx) + num_text, 4, 128)
    query, key, value, gate = randn(shape), randn(shape), randn(shape), randn(shape)
    layouts = geometry.with_replicated(geometry.video_geometry(TileGrid(grid_tyx, (4, 4, 4)), "cuda"), num_text)
    skip_unless_runs("triton", query, key, value, layout=layouts.video_tiles)
    num_tiles = layouts.video_tiles.num_tiles
    coarse = randn(1, num_tiles, 4, 128)
    lists = torch.arange(16, dtype=torch.int32, device="cuda").expand(1, 4, num_tiles, 16).contiguous()
    attend = partial(attend_to_tiles, query, key, value, coarse, gate[:, :-num_text], lists, layouts, 128**-0.5, "triton")
    attend()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = attend()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 1.1 * query.nbytes
    assert out.isfinite().all()
