"""Video Sparse Attention on a CUDA device: its kernels, and the whole operation by every implementation."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from fastvideo.attention import DistributedAttention_VSA
from fastvideo.attention.backends.video_sparse_attn import VideoSparseAttentionMetadataBuilder
from fastvideo.block_sparse import geometry, pool_tiles, selection, video_sparse_attention
from fastvideo.block_sparse.coarse import make_means
from fastvideo.block_sparse.fine_stage import _add_gated, _differentiate_added, _differentiate_gated
from fastvideo.block_sparse.impl import IMPLEMENTATIONS, load_implementation
from fastvideo.block_sparse.pattern import BlockPattern
from fastvideo.block_sparse.video_sparse_reference import video_sparse_attention_reference
from fastvideo.forward_context import set_forward_context
from fastvideo.testing import assert_op_within_budget, assert_within_budget
from fastvideo.video import TileGrid, tile_mean

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, torch sees none"),
]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NAMES = [name for name in IMPLEMENTATIONS if name != "reference"]


@pytest.mark.parametrize("kind", ["random", "ties", "nan", "all_nan", "zeros", "infinite", "tiny", "spread", "steps"])
@pytest.mark.parametrize(("num_columns", "k"), [(2, 1), (37, 5), (1440, 144), (5000, 99), (8192, 8191), (16_384, 492)])
def test_top_k_is_exact(num_columns: int, k: int, kind: str) -> None:
    scores = torch.randn(64, num_columns, generator=torch.Generator().manual_seed(0))
    if kind == "ties":
        scores = (3 * scores).round()
    elif kind == "nan":
        scores = scores.masked_fill(scores > 0.2, math.nan)
    elif kind == "zeros":
        scores = torch.where(scores > 0, 0.0, -0.0)
    elif kind == "infinite":
        scores = torch.where(scores > 1, math.inf, torch.where(scores < -0.5, -math.inf, scores))
    elif kind == "all_nan":
        scores.fill_(math.nan)
    elif kind == "tiny":
        scores = (3 * scores).round() * 1e-45
    elif kind == "spread":
        scores = scores.sign() * torch.exp2(60 * scores)
    elif kind == "steps":
        scores = torch.where(scores > 1.28, 1.0, 1.0 - 2.0**-24)
    ranked = torch.sort(0.0 - scores, dim=-1, stable=True).indices[:, :k].int().sort(dim=-1).values
    assert torch.equal(selection.top_k_ascending(scores.cuda(), k).cpu(), ranked)


@pytest.mark.parametrize("grid_tyx", [(21, 45, 80), (64, 128, 128)])
def test_a_layers_means_are_those_of_pool_tiles(grid_tyx: tuple[int, int, int]) -> None:
    """Else `pooled=` would choose other tiles where two are nearly equal."""
    generator = torch.Generator("cuda").manual_seed(4)
    query, key, value = (
        torch.randn(1, math.prod(grid_tyx), 2, 128, dtype=torch.bfloat16, device="cuda", generator=generator) for _ in range(3)
    )
    means = make_means(query, key, value, grid_tyx, (4, 4, 4), 128**-0.5)
    for mean, x in zip(means, (query, key), strict=False):
        assert torch.equal(mean, pool_tiles(x, grid_tyx))
    num_tiles = means[0].shape[1]
    lists = [selection.choose_tiles(*means[:2], num_tiles // 33, 128**-0.5) for _ in range(2)]
    assert torch.equal(*lists)


@pytest.mark.parametrize(("num_tiles", "head_size"), [(70, 64), (1440, 128), (300, 72)])
def test_scores_are_those_of_float32(num_tiles: int, head_size: int) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, num_tiles, 4, head_size), torch.randn(2, num_tiles, 2, head_size)
    k = num_tiles // 7
    lists = selection.select_tiles(query.cuda(), key.cuda(), k).long().cpu()
    scores = torch.einsum("bqhd,bkhd->bhqk", query.double(), key.double().repeat_interleave(2, dim=2))
    dropped = scores.scatter(-1, lists, -math.inf).amax(-1)
    assert (lists.diff(dim=-1) > 0).all()
    # A choice may differ from float64's by rounding only.
    assert (scores.gather(-1, lists).amin(-1) > dropped - 1e-4).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid_tyx", [(5, 7, 9), (8, 8, 8), (3, 45, 80)])
def test_means_and_gate(grid_tyx: tuple[int, int, int], dtype: torch.dtype) -> None:
    layouts = geometry.video_geometry(TileGrid(grid_tyx, (4, 4, 4)), "cuda")
    grid, of_token = layouts.grid, layouts.tile_of_token
    torch.manual_seed(0)
    fine, dout, gate = (torch.randn(2, grid.num_tokens, 3, 128, device="cuda").to(dtype) for _ in range(3))
    coarse = torch.randn(2, grid.num_tiles, 3, 128, device="cuda")
    sums = torch.zeros(coarse.shape, dtype=torch.float64, device="cuda").index_add_(1, of_token, fine.double())
    sizes = layouts.video_tiles.sizes[:, None, None]
    torch.testing.assert_close(tile_mean(fine, grid).double(), sums / sizes, rtol=1e-5, atol=1e-6)
    products = coarse[:, of_token].double() * gate.double()
    out = _add_gated(fine, coarse, gate, torch.empty_like(fine), layouts)
    assert_within_budget(out, fine.double() + products, fine + coarse[:, of_token].to(dtype) * gate)
    again, dcoarse, dgate = _differentiate_gated(out, dout, coarse, gate, layouts)
    assert_within_budget(again, out.double() - products, out - coarse[:, of_token].to(dtype) * gate)
    assert_within_budget(dgate, dout.double() * coarse[:, of_token].double(), dout * coarse[:, of_token].to(dtype))
    dlse, *same = _differentiate_added(dout, coarse, gate, layouts)
    assert all(torch.equal(x, y) for x, y in zip(same, (dcoarse, dgate), strict=True))
    torch.testing.assert_close(dlse.double(), (dout.double() * products).sum(-1), rtol=1e-4, atol=1e-4)
    expected = torch.zeros(coarse.shape, dtype=torch.float64, device="cuda")
    expected.index_add_(1, of_token, dout.double() * gate.double())
    torch.testing.assert_close(dcoarse.double(), expected, rtol=1e-4, atol=1e-4)


def test_means_beyond_two_to_the_31_elements() -> None:
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB of free device memory")
    grid = TileGrid((8, 64, 64), (4, 4, 4))
    room = torch.zeros(3, grid.num_tokens, 512, 64, dtype=torch.bfloat16, device="cuda")
    assert room.numel() > 2**31
    x = room[:, :, 509:]
    x.copy_(torch.randn(x.shape, device="cuda"))
    sums = torch.zeros(3, grid.num_tiles, 3, 64, dtype=torch.float64, device="cuda")
    sums.index_add_(1, grid.tensors("cuda").tile_of_token, x.double())
    torch.testing.assert_close(tile_mean(x, grid).double(), sums / 64, rtol=1e-5, atol=1e-6)


def make_inputs(
    grid_tyx: tuple[int, int, int], num_text: int, dtype: torch.dtype, size: float = 3.0
) -> dict[str, torch.Tensor]:
    randn = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    num_tokens = math.prod(grid_tyx)
    inputs = {
        "query": size * randn(1, num_tokens + num_text, 4, 128),
        "key": size * randn(1, num_tokens + num_text, 4, 128),
        "value": randn(1, num_tokens + num_text, 4, 128),
        "gate": randn(1, num_tokens, 4, 128),
    }
    return {name: x.to("cuda", dtype) for name, x in inputs.items()}


def refusals(name: str, inputs: dict[str, torch.Tensor], grid: TileGrid, *, needs_grad: bool = False) -> tuple[str, ...]:
    layout = geometry.video_geometry(grid, "cuda").video_tiles
    lists = torch.zeros(1, 1, grid.num_tiles, 1, dtype=torch.int32, device="cuda")
    tensors = [inputs[x][:, : grid.num_tokens].detach().requires_grad_(needs_grad) for x in ("query", "key", "value")]
    return load_implementation(name).rejections(*tensors, BlockPattern(layout, layout, lists))


@pytest.mark.parametrize(
    ("grid_tyx", "tile_tyx", "num_text"),
    [((5, 10, 14), (4, 4, 4), 0), ((6, 10, 16), (3, 5, 4), 77), ((8, 8, 16), (4, 4, 8), 0)],
)
@pytest.mark.parametrize("name", NAMES)
def test_whole_operation(name: str, grid_tyx, tile_tyx, num_text: int) -> None:
    grid = TileGrid(grid_tyx, tile_tyx)
    for size in (3.0, 11.0):
        inputs = make_inputs(grid_tyx, num_text, torch.bfloat16, size)
        if reasons := refusals(name, inputs, grid):
            pytest.skip(f"{name}: {'; '.join(reasons)}")
        means = [pool_tiles(inputs[x], grid_tyx, tile_tyx=tile_tyx, num_replicated=num_text) for x in ("query", "key")]
        lists = selection.select_tiles(means[0] * 128**-0.5, means[1], max(1, grid.num_tiles // 3))
        bound = {"grid_tyx": grid_tyx, "tile_tyx": tile_tyx, "num_replicated": num_text}
        assert_op_within_budget(
            partial(video_sparse_attention, num_kept=lists.shape[-1], impl=name, **bound),
            partial(video_sparse_attention_reference, sparsity=0.5, indices=lists, **bound),
            inputs,
            gradients=not refusals(name, inputs, grid, needs_grad=True),
        )


@pytest.mark.parametrize("num_text", [0, 77])
def test_nothing_waits_for_the_device(num_text: int) -> None:
    grid_tyx = (8, 12, 16)
    inputs = {name: x.requires_grad_() for name, x in make_inputs(grid_tyx, num_text, torch.bfloat16).items()}
    attend = partial(video_sparse_attention, grid_tyx=grid_tyx, sparsity=0.75, num_replicated=num_text)
    dout = torch.randn_like(inputs["query"])
    torch.autograd.grad(attend(**inputs), list(inputs.values()), dout)  # compiles, and builds layouts
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(attend(**inputs), list(inputs.values()), dout)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["hopper", "triton"])
@pytest.mark.parametrize("has_gate", [True, False])
@pytest.mark.parametrize(
    ("grid_tyx", "tile_tyx", "num_text"),
    [((5, 10, 14), (4, 4, 4), 0), ((6, 10, 16), (3, 5, 4), 77), ((8, 8, 16), (4, 4, 8), 0)],
)
def test_forward_in_a_cuda_graph(grid_tyx, tile_tyx, num_text: int, has_gate: bool, name: str) -> None:
    """A replay reads what its inputs hold then, and gives the bits of an eager call."""
    inputs = make_inputs(grid_tyx, num_text, torch.bfloat16)
    if reasons := refusals(name, inputs, TileGrid(grid_tyx, tile_tyx)):
        pytest.skip(f"{name}: {'; '.join(reasons)}")
    if not has_gate:
        del inputs["gate"]
    bound = {"grid_tyx": grid_tyx, "tile_tyx": tile_tyx, "num_replicated": num_text, "sparsity": 0.7, "impl": name}
    attend = torch.no_grad()(partial(video_sparse_attention, **bound))
    with torch.cuda.stream(torch.cuda.Stream()):
        attend(**inputs)  # compiles, and builds layouts
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(**inputs)
    for seed in (1, 2):
        generator = torch.Generator("cuda").manual_seed(seed)
        for x in inputs.values():
            x.normal_(generator=generator)
        out.fill_(math.nan)
        expected = attend(**inputs)
        graph.replay()
        assert expected.isfinite().all()
        assert torch.equal(out, expected)


def test_layers_in_a_cuda_graph() -> None:
    """The layer with its dispatch and metadata is captured too, and reads caches that other streams have filled."""
    grid_tyx = (5, 10, 14)
    inputs = make_inputs(grid_tyx, 0, torch.bfloat16)
    metadata = VideoSparseAttentionMetadataBuilder().build(
        current_timestep=0, raw_latent_shape=grid_tyx, patch_size=(1, 1, 1), VSA_sparsity=0.7, device="cuda"
    )
    layer = DistributedAttention_VSA(num_heads=4, head_size=128)

    def attend() -> torch.Tensor:
        with torch.no_grad(), set_forward_context(current_timestep=0, attn_metadata=metadata):
            return layer(*(inputs[x] for x in ("query", "key", "value")), gate_compress=inputs["gate"])[0]

    attend()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    for x in inputs.values():
        x.mul_(-0.7)
    expected = attend()
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_graph_does_not_build_what_is_kept() -> None:
    grid_tyx = (7, 6, 5)
    inputs = make_inputs(grid_tyx, 0, torch.bfloat16)
    with pytest.raises(RuntimeError, match="run the same call once before"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        video_sparse_attention(**inputs, grid_tyx=grid_tyx, sparsity=0.5)
    torch.cuda.synchronize()
    assert video_sparse_attention(**inputs, grid_tyx=grid_tyx, sparsity=0.5).isfinite().all()


def test_memory() -> None:
    """Forward: the output and little else. Kept for the backward: no tensor of the size of an input."""
    grid_tyx = (16, 32, 32)
    inputs = {name: x.requires_grad_() for name, x in make_inputs(grid_tyx, 0, torch.bfloat16).items()}
    attend = partial(video_sparse_attention, grid_tyx=grid_tyx, sparsity=0.9)
    unit = inputs["query"].nbytes
    attend(**inputs)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = attend(**inputs)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before < 1.4 * unit
    if load_implementation("hopper").rejections(*(inputs[x] for x in ("query", "key", "value")), _any_pattern(grid_tyx)):
        # Kernels that read tokens where they lie; others pack keys and values.
        assert torch.cuda.max_memory_allocated() - before < 2 * unit + selection._SCRATCH_BYTES
    assert out.isfinite().all()


def _any_pattern(grid_tyx: tuple[int, int, int]) -> BlockPattern:
    layout = geometry.video_geometry(TileGrid(grid_tyx, (4, 4, 4)), "cuda").video_tiles
    return BlockPattern(layout, layout, torch.zeros(1, 1, layout.num_tiles, 1, dtype=torch.int32, device="cuda"))
