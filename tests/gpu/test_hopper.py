"""The Hopper kernels on a Hopper GPU, against float64: outputs, all gradients, repeatability, what must not be read."""

from __future__ import annotations

import importlib.util
from functools import partial

import pytest
import torch

from fastvideo.block_sparse import BlockPattern, TileLayout
from fastvideo.block_sparse.impl import choose_implementation

from ..block_sparse.engine_cases import EngineCases

if importlib.util.find_spec("triton") is not None:
    from fastvideo.block_sparse.impl.hopper import launch, packing, plan

is_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not is_hopper, reason="needs an NVIDIA Hopper GPU (compute capability 9.0), torch sees none"),
]

SHAPES = {
    "even_64": ([64] * 12, [64] * 13, 2, 4, 4, 128),
    "head_64": ([64] * 12, [64] * 12, 1, 4, 4, 64),
    "one_token": ([1], [1], 1, 1, 1, 64),
    "edges": ([64, 16, 64, 4, 1, 37, 64, 16, 16, 5, 30], [13, 64, 64, 1, 16, 64, 4, 64, 50, 16, 33], 2, 4, 2, 128),
    "edges_64": ([64, 16, 64, 4, 1, 37, 64, 16, 16, 5, 30], [13, 64, 64, 1, 16, 64, 4, 64, 50, 16, 33], 2, 4, 2, 64),
    "sixty": ([60] * 9, [60] * 9, 1, 3, 3, 128),
    "sixteen": ([16] * 21, [16] * 37, 1, 2, 1, 128),
    "text": ([64] * 6 + [77], [64] * 6 + [77], 1, 4, 1, 128),
    "even_128": ([128] * 5, [128] * 5, 1, 2, 2, 128),
    "up_to_128": ([128, 100, 3, 120], [128, 90, 128, 3, 65], 2, 2, 2, 128),
    "unequal_tiles": ([128] * 4, [16] * 31, 1, 2, 2, 64),
    "many": ([64] * 150, [64] * 150, 1, 3, 3, 128),
    "many_128": ([128] * 60, [128] * 60, 1, 2, 2, 128),
    "many_120": ([120, 116] * 30, [120, 116] * 30, 1, 2, 2, 128),
}
DTYPES = (torch.bfloat16, torch.float16)


CASES = EngineCases("hopper", "cuda", SHAPES, densities={"many": 0.1})
make_pattern, make_inputs, attend, check = CASES.make_pattern, CASES.make_inputs, CASES.attend, CASES.check
gradients = CASES.gradients


@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "in_place"])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_log_sum_exp_and_gradients(shape: str, ordered: bool) -> None:
    check(make_inputs(shape, torch.bfloat16), make_pattern(shape, ordered=ordered))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ["even_64", "edges", "edges_64", "sixty"])
def test_real_activations(shape: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(shape, dtype, size=11.0)
    assert 40 < float(inputs["query"].abs().max()) < 65
    check(inputs, make_pattern(shape))


@pytest.mark.parametrize("scale", [-0.05, 0.0, 0.3])
@pytest.mark.parametrize("shape", ["even_64", "edges", "edges_64"])
def test_any_scale(shape: str, scale: float) -> None:
    check(make_inputs(shape, torch.bfloat16), make_pattern(shape, ordered=shape != "even_64"), scale)


@pytest.mark.parametrize("keep", [1, 7, 8, 12])
def test_shared_lists_without_counts(keep: int) -> None:
    layout = TileLayout.uniform(12 * 64, 64, device="cuda")
    generator = torch.Generator().manual_seed(3)
    lists = torch.rand(12, 12, generator=generator).topk(keep).indices.sort(-1).values.to("cuda", torch.int32)
    inputs = {name: x[:, : 12 * 64] for name, x in make_inputs("even_64", torch.bfloat16).items()}
    check(inputs, BlockPattern(layout, layout, lists[None, None]))


def test_strided_inputs() -> None:
    inputs = make_inputs("head_64", torch.bfloat16)
    packed = torch.stack(list(inputs.values()), dim=2)
    for ordered in (True, False):
        check(dict(zip(inputs, packed.unbind(2), strict=True)), make_pattern("head_64", ordered=ordered))


@pytest.mark.parametrize("shape", ["even_64", "edges", "edges_64", "text"])
def test_nothing_but_listed_tokens_is_read(shape: str) -> None:
    """Keys of a tile that nobody lists, and all memory around the tensors, are NaN."""
    pattern, inputs = make_pattern(shape, ordered=shape != "even_64"), make_inputs(shape, torch.bfloat16)
    mask = pattern.tile_mask()
    mask[..., 1] = False
    pattern = BlockPattern.from_mask(mask, pattern.query_tiles, pattern.key_tiles)
    hidden = pattern.key_tiles.tile_of_token() == 1
    poisoned = {}
    for name, x in inputs.items():
        room = x.new_full((x.shape[0], x.shape[1] + 256, x.shape[2], x.shape[3] + 8), torch.nan)
        poisoned[name] = room[:, 128:-128, :, : x.shape[3]]
        poisoned[name].copy_(x)
        if name != "query":
            poisoned[name][:, hidden] = torch.nan
            x[:, hidden] = 0.0
    # Fresh memory, of scratch too, is full of NaN.
    torch.full((1 << 26,), torch.nan, device="cuda")
    got, expected = gradients(poisoned, pattern), gradients(inputs, pattern)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)
    assert not got[3][:, hidden].any()
    check(inputs, pattern)


@pytest.mark.parametrize("shape", ["even_64", "edges", "edges_64", "many"])
def test_same_bits_every_time(shape: str) -> None:
    inputs, pattern = make_inputs(shape, torch.bfloat16), make_pattern(shape)
    first = gradients(inputs, pattern)
    for _ in range(3):
        for one, other in zip(gradients(inputs, pattern), first, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("shape", ["even_64", "edges", "many_120"])
def test_a_reusable_pattern_gives_the_same_bits(shape: str) -> None:
    """At the first call and later, on another stream and in a graph; lists that were changed are read anew."""
    inputs, pattern = make_inputs(shape, torch.bfloat16), make_pattern(shape)
    reusable = pattern.reusable()
    expected = gradients(inputs, pattern)
    for _ in range(2):
        assert all(map(torch.equal, gradients(inputs, reusable), expected))
    assert sum(key[0] == "hopper plan" for key in reusable.derived if isinstance(key, tuple)) >= 2, "by query and by key"
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        other = make_pattern(shape).reusable()
        first = attend(**inputs, pattern=other)
    assert all(map(torch.equal, attend(**inputs, pattern=other), expected[:2])), "no stream has to wait for its plan"
    graph = torch.cuda.CUDAGraph()
    captured = make_pattern(shape).reusable()
    with torch.cuda.graph(graph):
        out, _ = attend(**inputs, pattern=captured)
    assert not any(isinstance(key, tuple) for key in captured.derived), "what a graph makes belongs to the graph"
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected[0])
    assert torch.equal(first[0], expected[0])
    fewer = pattern.counts.clamp(max=1)
    reusable.counts.copy_(fewer)
    changed = attend(**inputs, pattern=BlockPattern(pattern.query_tiles, pattern.key_tiles, pattern.indices.clone(), fewer))
    assert all(map(torch.equal, attend(**inputs, pattern=reusable), changed))
    assert not torch.equal(changed[0], expected[0])


def test_heads_in_several_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, pattern = make_inputs("edges", torch.bfloat16), make_pattern("edges")
    expected = gradients(inputs, pattern)
    monkeypatch.setattr(launch, "_SCRATCH_BYTES", 1)
    found = gradients(inputs, pattern)
    for one, other in zip(found[:3], expected[:3], strict=True):
        assert torch.equal(one, other)
    # Where a walk for dkey and dvalue stands in its queue, and so its direction, depends on the heads of a launch.
    for one, other in zip(found[3:], expected[3:], strict=True):
        torch.testing.assert_close(one, other, atol=0.01 * float(other.abs().max()), rtol=0.01)


@pytest.mark.parametrize("shape", ["even_64", "edges", "up_to_128", "many"])
def test_plans_in_chunks(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, pattern = make_inputs(shape, torch.bfloat16), make_pattern(shape)
    expected = gradients(inputs, pattern)
    monkeypatch.setattr(plan, "_MARK_CHUNK", 4)
    monkeypatch.setattr(plan, "_CHUNK", 4)
    for one, other in zip(gradients(inputs, pattern), expected, strict=True):
        assert torch.equal(one, other)


def test_uneven_walks_by_key() -> None:
    """Every query lists the first tiles, few the others, so that some walks of the backward are fifty times as long."""
    pattern, inputs = make_pattern("many"), make_inputs("many", torch.bfloat16)
    mask = torch.rand(1, 3, 150, 150, generator=torch.Generator().manual_seed(5)) < 0.02
    mask[..., :20] = True
    pattern = BlockPattern.from_mask(mask.cuda(), pattern.query_tiles, pattern.key_tiles)
    check(inputs, pattern)
    first = gradients(inputs, pattern)
    for one, other in zip(gradients(inputs, pattern), first, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("num_programs", [1, 7, 132])
@pytest.mark.parametrize("least_shared", [0.0, 2.0], ids=["sharing", "alone"])
def test_walking_in_step(least_shared: float, num_programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other wave of dquery walks backwards: shared steps, other steps without masks, and not the last, odd box."""
    monkeypatch.setattr(launch, "_IN_STEP_BYTES", 0)
    monkeypatch.setattr(launch, "_num_programs", lambda device: num_programs)
    monkeypatch.setattr(plan, "_LEAST_SHARED", least_shared)
    layout = make_pattern("many").query_tiles
    lists = torch.rand(1, 3, 150, 150).topk(45).indices.sort(-1).values.to("cuda", torch.int32)
    pattern, inputs = BlockPattern(layout, layout, lists), make_inputs("many", torch.bfloat16)
    check(inputs, pattern)
    first = gradients(inputs, pattern)
    for one, other in zip(gradients(inputs, pattern), first, strict=True):
        assert torch.equal(one, other)


NEIGHBOURS = EngineCases(
    "hopper",
    "cuda",
    {
        "even": ([64] * 37, [64] * 60, 2, 4, 2, 128),
        "even_64": ([64] * 37, [64] * 60, 1, 4, 4, 64),
        "sixty": ([60] * 18, [60] * 50, 1, 3, 3, 128),
        "two_blocks": ([128] * 11, [128] * 30, 1, 2, 1, 128),
        "small": ([16] * 60, [64] * 40 + [16] * 9, 1, 4, 4, 128),
        "mixed": ([64, 16, 64, 4, 16, 64, 30, 16, 64, 1, 20, 64, 100, 64, 9, 70] * 3, [64, 16, 64, 64, 50] * 9, 1, 2, 2, 128),
        "mixed_64": ([64, 16, 64, 4, 16, 64, 30, 16, 64, 1, 20, 64, 64, 9] * 3, [64, 16, 64, 64, 50] * 9, 1, 2, 2, 64),
    },
)


def neighbours(shape: str, overlap: float) -> BlockPattern:
    """Lists that share about so much; some tiles see nothing, half of the keys, or all of them. The last key tile is unseen."""
    mask = NEIGHBOURS.make_pattern(shape, ordered=False).tile_mask().cpu()
    generator = torch.Generator().manual_seed(3)
    common = torch.rand(*mask.shape[:2], 1, mask.shape[3], generator=generator) < 0.5
    mask = torch.where(torch.rand(mask.shape, generator=generator) < overlap, common, mask)
    mask[:, :, 4::7] = False
    mask[:, :, 9::14, mask.shape[3] // 2 :] = False
    mask[:, :, 5::14] = True
    mask[..., -1] = False
    layouts = [TileLayout.from_sizes(sizes, device="cuda") for sizes in NEIGHBOURS.shapes[shape][:2]]
    return BlockPattern.from_mask(mask.cuda(), *layouts)


@pytest.mark.parametrize("num_programs", [1, 7, 132])
@pytest.mark.parametrize("overlap", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("shape", NEIGHBOURS.shapes)
def test_neighbours_share_loads(shape: str, overlap: float, num_programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs work on many pairs each, so that phases of barriers go on from pair to pair; the unseen keys are NaN."""
    monkeypatch.setattr(launch, "_num_programs", lambda device: num_programs)
    monkeypatch.setattr(plan, "_LEAST_SHARED", 0.0)
    pattern, inputs = neighbours(shape, overlap), NEIGHBOURS.make_inputs(shape, torch.bfloat16)
    own, walked = (packing.pack_layout(x) for x in (pattern.query_tiles, pattern.key_tiles))
    total = pattern.indices.shape[:2].numel()
    walks = plan.planner_of(pattern, own, walked, (0, total, total))(pattern, own, walked, 0)
    shared = walks.meta[:, : int(own.counts[1]), 6]
    assert int(shared.sum()) > 0
    if num_programs == 132:
        NEIGHBOURS.check(inputs, pattern)
    is_seen = pattern.key_tiles.tile_of_token() != pattern.key_tiles.num_tiles - 1

    def results() -> tuple[torch.Tensor, ...]:
        out, lse, dq, dk, dv = NEIGHBOURS.gradients(inputs, pattern)
        return out, lse, dq, dk[:, is_seen], dv[:, is_seen]

    expected = results()
    for name in ("key", "value"):
        inputs[name][:, ~is_seen] = torch.nan
    for _ in range(2):
        for one, other in zip(results(), expected, strict=True):
            assert torch.equal(one, other)
    # Nothing but the order of sums depends on what is shared.
    monkeypatch.setattr(plan, "_LEAST_SHARED", 2.0)
    for one, other in zip(results(), expected, strict=True):
        torch.testing.assert_close(one, other, atol=0.02 * float(other[other.isfinite()].abs().max()), rtol=0.02)


def test_chosen_automatically() -> None:
    inputs = make_inputs("even_64", torch.bfloat16)
    assert choose_implementation(*inputs.values(), make_pattern("even_64"))[0] == "hopper"


def test_compiled_call_equals_eager_one() -> None:
    inputs, pattern = make_inputs("edges", torch.bfloat16), make_pattern("edges")
    compiled = torch.compile(partial(attend, pattern=pattern), fullgraph=True)
    for one, other in zip(compiled(**inputs), attend(**inputs, pattern=pattern), strict=True):
        assert torch.equal(one, other)


def test_more_than_two_to_the_31_elements() -> None:
    """The last tokens of a strided query, key and value lie behind 2^31 elements; the lists name the last tiles."""
    tokens, head_size = 64 * 256, 128
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB of free device memory")
    room = torch.empty(1, tokens, 1100 * head_size, dtype=torch.bfloat16, device="cuda")
    assert room.numel() > 2**31
    inputs = {}
    for i, name in enumerate(("query", "key", "value")):
        inputs[name] = room[:, :, (1090 + i) * head_size : (1091 + i) * head_size].unsqueeze(2)
        inputs[name].copy_(torch.randn(1, tokens, 1, head_size, device="cuda"))
    layout = TileLayout.uniform(tokens, 64, device="cuda")
    lists = torch.arange(252, 256, dtype=torch.int32, device="cuda").expand(1, 1, 256, 4)
    got = gradients(inputs, BlockPattern(layout, layout, lists))
    expected = gradients({name: x.contiguous() for name, x in inputs.items()}, BlockPattern(layout, layout, lists))
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)
    small = {name: x[:, -256:].contiguous() for name, x in inputs.items()}
    last = TileLayout.uniform(256, 64, device="cuda")
    everything = torch.arange(4, dtype=torch.int32, device="cuda").expand(1, 1, 4, 4)
    assert torch.equal(attend(**small, pattern=BlockPattern(last, last, everything))[0], got[0][:, -256:])


def test_lists_longer_than_a_planner_holds() -> None:
    """Lists of 492 of 16,384 tiles, more than one chunk of a planner and 246 steps of a walk, against float64 on some tiles."""
    num_tiles, keep, heads = 16_384, 492, 2
    layout = TileLayout.uniform(num_tiles * 64, 64, device="cuda")
    generator = torch.Generator("cuda").manual_seed(5)
    lists = torch.empty(1, heads, num_tiles, keep, dtype=torch.int32, device="cuda")
    for rows in lists.view(-1, keep).split(2048):
        ranks = torch.rand(len(rows), num_tiles, generator=generator, device="cuda")
        rows.copy_(ranks.topk(keep).indices.sort(-1).values)
    query, key, value = (
        torch.randn(1, num_tiles * 64, heads, 128, dtype=torch.bfloat16, device="cuda", generator=generator) for _ in range(3)
    )
    out, lse = launch.forward(query, key, value, BlockPattern(layout, layout, lists), 128**-0.5)
    inside = torch.arange(64, device="cuda")
    for head in range(heads):
        for tile in (*range(0, num_tiles, 683), num_tiles - 1):
            rows, listed = tile * 64 + inside, (lists[0, head, tile, :, None] * 64 + inside).flatten()
            scores = (query[0, rows, head].double() @ key[0, listed, head].double().T) * 128**-0.5
            expected = scores.softmax(-1) @ value[0, listed, head].double()
            # One tile of 492 makes a difference of some 2e-3, rounding one of 3e-4.
            assert (out[0, rows, head].double() - expected).abs().max() < 8e-4, (head, tile)
            assert (lse[0, rows, head].double() - scores.logsumexp(-1)).abs().max() < 1e-4, (head, tile)
