"""The benchmark's own parts: shapes, inputs, errors and budgets, ranking, memory that a graph keeps."""

from __future__ import annotations

import dataclasses
import types

import pytest
import torch

from fastvideo.benchmark.accuracy import Attended, compare
from fastvideo.benchmark.cases import make_cases, parse_tile
from fastvideo.benchmark.inputs import Inputs, list_overlap, make_inputs, make_lists
from fastvideo.benchmark.measure import host_ms
from fastvideo.benchmark.report import format_rows
from fastvideo.benchmark.run import run_cases
from fastvideo.benchmark.shapes import SHAPES, BenchmarkShape, shape_named
from fastvideo.block_sparse import BlockPattern, TileLayout, block_sparse_attention, num_kept_tiles, pool_tiles
from fastvideo.block_sparse.selection import select_tiles
from fastvideo.testing import reference_attention
from fastvideo.video import TileGrid

CPU = torch.device("cpu")
SMALL = BenchmarkShape((8, 16, 16), 2, 16, sparsity=0.75)
DEFAULTS = {"backends": ["TORCH_SDPA"], "impls": ["auto"], "sparsities": [0.5], "tiles": ["4x4x4"], "window_tyx": (1, 1, 1)}


def test_shapes_are_those_of_the_models() -> None:
    assert shape_named("wan2.1-14b-720p").num_tokens == 75_600
    assert shape_named("wan2.1-1.3b-480p").num_tokens == 32_760
    assert shape_named("hunyuan-720p").num_tokens == 118_800
    assert shape_named("million-tokens").num_tokens == 1 << 20
    kept = {}
    for name, shape in SHAPES.items():
        if shape.fine_tile_tyx is not None:
            grid = TileGrid(shape.grid_tyx, shape.fine_tile_tyx)
            assert grid.is_uniform
            kept[name] = (num_kept_tiles(grid.num_tiles, shape.sparsity), grid.num_tiles)
    assert kept["fine-49k-tile64"] == (77, 768)
    assert kept["fine-92k-tile64"] == (144, 1440)
    assert kept["fine-49k-tile128"] == (39, 384)


def test_tiles_by_name() -> None:
    assert parse_tile("auto", (21, 45, 80)) == (3, 5, 4)
    assert parse_tile("auto128", (21, 45, 80)) != (3, 5, 4)
    assert parse_tile("2x3x4", (21, 45, 80)) == (2, 3, 4)


def overlap_of(inputs: Inputs, shape: BenchmarkShape) -> float:
    means = [pool_tiles(x, shape.grid_tyx) for x in (inputs.query, inputs.key)]
    return list_overlap(select_tiles(*means, num_kept_tiles(means[0].shape[1], shape.sparsity)))


def test_inputs_are_what_they_are_called() -> None:
    overlaps = {}
    for kind in ("random", "video-like"):
        inputs = make_inputs(SMALL, kind, torch.float32, CPU)
        assert 0.9 < float(inputs.query.std()) < 1.1
        overlaps[kind] = overlap_of(inputs, SMALL)
    assert overlaps["random"] == pytest.approx(0.25, abs=0.12)
    assert overlaps["video-like"] == pytest.approx(0.6, abs=0.2)
    inputs = make_inputs(SMALL, "skewed", torch.float32, CPU)
    means = [pool_tiles(x, SMALL.grid_tyx) for x in (inputs.query, inputs.key)]
    lists = select_tiles(*means, 8)
    # Each query tile of each head lists the two popular tiles of 32.
    assert (torch.bincount(lists.flatten()) == 2 * 32).sum() == 2
    again = make_inputs(SMALL, "random", torch.float32, CPU)
    assert torch.equal(again.query, make_inputs(SMALL, "random", torch.float32, CPU).query)
    with pytest.raises(ValueError, match="'smooth'; there are random"):
        make_inputs(SMALL, "smooth", torch.float32, CPU)


def test_lists_of_a_fine_stage() -> None:
    shape = dataclasses.replace(shape_named("fine-49k-tile64"), num_heads=1)
    overlaps = {kind: list_overlap(make_lists(shape, kind, 77, CPU)) for kind in ("random", "video-like")}
    assert overlaps["random"] == pytest.approx(0.1, abs=0.02)
    assert overlaps["video-like"] == pytest.approx(0.6, abs=0.05)
    shape = BenchmarkShape((16, 16, 32), 2, 8, fine_tile_tyx=(4, 4, 4))
    lists = make_lists(shape, "skewed", 13, CPU)
    assert (torch.bincount(lists.flatten(), minlength=128) == 2 * 128).sum() == 6
    assert (lists.diff(dim=-1) > 0).all()
    with pytest.raises(ValueError, match="a whole layer"):
        make_lists(SMALL, "random", 3, CPU)


@pytest.mark.parametrize("max_pairs", [8e9, 100])
def test_errors_of_right_and_wrong_results(max_pairs, monkeypatch) -> None:
    monkeypatch.setattr("fastvideo.benchmark.accuracy.MAX_PAIRS", max_pairs)
    monkeypatch.setattr("fastvideo.benchmark.accuracy._NUM_SAMPLED_BLOCKS", 2)
    torch.manual_seed(0)
    leaves = [torch.randn(2, 30, 2, 8).requires_grad_() for _ in range(3)]
    layout = TileLayout.from_sizes([7, 8, 8, 7], order=torch.randperm(30))
    pattern = BlockPattern.from_mask(torch.rand(2, 2, 4, 4) < 0.8, layout, layout)
    dout = torch.randn(2, 30, 2, 8)
    out = block_sparse_attention(*leaves, pattern)
    grads = torch.autograd.grad(out, leaves, dout)
    results = {"out": out.detach(), **dict(zip(("dquery", "dkey", "dvalue"), grads, strict=True))}
    attended = Attended(pattern.indices, pattern.counts, layout)
    plain = [x.detach() for x in leaves]
    right = compare(attended, plain, dout, results)
    assert right.over_budget is None
    assert max(right.errors.values()) < 1e-5
    assert list(right.errors) == ["out", "dquery"] if max_pairs == 100 else ["out", "dquery", "dkey", "dvalue"]
    for name in right.errors:
        wrong = compare(attended, plain, dout, {**results, name: 1.001 * results[name]})
        assert wrong.over_budget is not None
        assert wrong.over_budget.startswith(name)
        assert wrong.errors[name] == pytest.approx(1e-3, rel=0.05)
    dense = compare(Attended(), plain, None, {"out": reference_attention(*plain)})
    assert dense.over_budget is None
    assert list(dense.errors) == ["out"]


def test_wrong_rows_are_marked_and_not_ranked() -> None:
    inputs = make_inputs(shape_named("tiny"), "random", torch.float32, CPU)
    (case,) = make_cases(shape_named("tiny"), inputs, "random", **DEFAULTS)
    wrong = dataclasses.replace(case, name="WRONG", call=lambda *leaves: 1.01 * case.call(*leaves))

    def refuse(*_: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("too hot")

    absent = dataclasses.replace(case, name="ABSENT", call=refuse)
    rows = run_cases([case, wrong, absent], inputs, rounds=2)
    assert [(row.case, row.is_ranked) for row in rows if row.pass_name == "backward"] == [
        ("TORCH_SDPA", True),
        ("WRONG", False),
        ("ABSENT", False),
    ]
    assert all(len(row.rounds_ms) == (0 if row.case == "ABSENT" else 2) for row in rows)
    lines = format_rows(rows).splitlines()
    assert any(line.startswith("   1  TORCH_SDPA") for line in lines)
    assert any(line.startswith("   -  WRONG") for line in lines)
    assert any("OVER BUDGET, not ranked: out: max error" in line for line in lines)
    assert "   -  ABSENT: can't run: too hot" in lines


def test_a_rest_comes_before_every_timing_and_nothing_else(monkeypatch) -> None:
    inputs = make_inputs(shape_named("tiny"), "random", torch.float32, CPU)
    happened: list[str] = []
    monkeypatch.setattr("fastvideo.benchmark.run.time.sleep", lambda seconds: happened.append(f"{seconds} s"))
    monkeypatch.setattr("fastvideo.benchmark.run.median_ms", lambda *_: happened.append("timed") or 1.0)
    monkeypatch.setattr("fastvideo.benchmark.run.sm_clock_mhz", lambda *_: happened.append("clock") or (1500.0, 690.0))
    cases = make_cases(shape_named("tiny"), inputs, "random", **DEFAULTS)
    rows = run_cases(cases, inputs, rounds=2, rest=0.5, checks_errors=False)
    assert happened == ["0.5 s", "timed"] * 4 + ["clock"] * 2, "clocks are read when nothing is timed any more"
    assert [(row.clock_mhz, row.power_w) for row in rows] == [(1500.0, 690.0)] * 2
    happened.clear()
    run_cases(cases, inputs, rounds=2, checks_errors=False)
    assert happened == ["timed"] * 4 + ["clock"] * 2


def test_the_host_is_timed_without_the_device(monkeypatch) -> None:
    waits: list[int] = []
    calls: list[int] = []
    # Each call takes 2 ms, and each wait for the device a second.
    clock = types.SimpleNamespace(perf_counter=lambda: 0.002 * len(calls) + len(waits))
    monkeypatch.setattr("fastvideo.benchmark.measure.time", clock)
    monkeypatch.setattr("fastvideo.benchmark.measure.synchronize", lambda _: waits.append(len(calls)))
    assert host_ms(lambda: calls.append(1), CPU, num_calls=5, repeats=3) == pytest.approx(2)
    assert waits == [0, 5, 10, 15], "between runs, never between calls"


def test_backends_that_make_their_own_lists_say_so_beside_a_fine_stage() -> None:
    shape = shape_named("tiny-fine")
    inputs = make_inputs(shape, "random", torch.float32, CPU)
    cases = make_cases(shape, inputs, "random", **{**DEFAULTS, "backends": ["SLIDING_TILE_ATTN", "TORCH_SDPA"]})
    rows = run_cases(cases, inputs, passes=["forward"], rounds=1)
    assert [(row.case, row.ms is None) for row in rows] == [("SLIDING_TILE_ATTN", True), ("TORCH_SDPA", False)]
    assert rows[0].refused is not None
    assert rows[0].refused.startswith("a fine stage alone is handed its lists, and SLIDING_TILE_ATTN makes its own")


def test_what_is_asked_for_twice_is_measured_once() -> None:
    shape = shape_named("tiny")
    inputs = make_inputs(shape, "random", torch.float32, CPU)
    twice = {"backends": ["VIDEO_SPARSE_ATTN"] * 2, "impls": ["portable"] * 2, "sparsities": [0.5, 0.25, 0.5]}
    cases = make_cases(shape, inputs, "random", **{**DEFAULTS, **twice, "tiles": ["4x4x4", "2x2x2", "4x4x4"]})
    assert len({(case.name, case.sparsity) for case in cases}) == len(cases) == 4


def test_counts_of_operations() -> None:
    shape = shape_named("tiny")
    inputs = make_inputs(shape, "random", torch.float32, CPU)
    settings = {**DEFAULTS, "backends": ["VIDEO_SPARSE_ATTN", "TORCH_SDPA"], "sparsities": [0.0]}
    sparse, dense = make_cases(shape, inputs, "random", **settings)
    # All tiles are kept, so real pairs are those of dense attention; padded ones are those of 8 tiles of 64 slots.
    assert sparse.real_pairs() == dense.real_pairs() == dense.padded_pairs == 2 * 240**2
    assert sparse.padded_pairs == 2 * (8 * 64) ** 2
    rows = run_cases([sparse], inputs, passes=["forward"], rounds=1)
    assert rows[0].tflops_real == pytest.approx(4 * 32 * 2 * 240**2 / rows[0].ms / 1e9)


def test_what_a_layer_keeps_for_its_backward() -> None:
    """Beside inputs and output: lists, log-sum-exp, means, and what attention of the means keeps. No tensor of S tokens."""
    shape = BenchmarkShape((8, 16, 16), 2, 64, sparsity=0.75)
    inputs = make_inputs(shape, "random", torch.float32, CPU)
    (case,) = make_cases(shape, inputs, "random", **{**DEFAULTS, "backends": ["VIDEO_SPARSE_ATTN"]})
    (row,) = run_cases([case], inputs, passes=["backward"], rounds=1)
    means, lists, lse = 4 * 32 * 2 * 64, 4 * 2 * 32 * 16, 4 * 2048 * 2
    assert row.saved_gib is not None
    assert lists + lse <= row.saved_gib * 2**30 <= 6 * means + lists + 2 * lse
    assert row.saved_gib * 2**30 < inputs.query.nbytes / 4
