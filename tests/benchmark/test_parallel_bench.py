"""The benchmark of several ranks: its numbers on two gloo ranks, what it refuses, and what it marks."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastvideo.benchmark.parallel_cases import ParallelCase, make_parallel_cases
from fastvideo.benchmark.parallel_peers import make_peer_cases
from fastvideo.benchmark.parallel_problem import Problem, local_call, make_problem, one_card
from fastvideo.benchmark.parallel_ranks import Ranks
from fastvideo.benchmark.parallel_row import ParallelRow
from fastvideo.benchmark.parallel_run import run_parallel
from fastvideo.benchmark.report import format_parallel_rows
from fastvideo.benchmark.shapes import BenchmarkShape, shape_named
from fastvideo.cli import main
from fastvideo.testing.ranks import meeting_point

CPU = torch.device("cpu")
OPTIONS = [
    "--backends",
    "TORCH_SDPA",
    "FLASH_ATTN",
    "VIDEO_SPARSE_ATTN",
    "--dtype",
    "float32",
    "--rounds",
    "3",
    "--round-ms",
    "5",
]


def start_ranks(size: int, *arguments: str, status: int = 0) -> list[str]:
    """Run `fastvideo bench --parallel` on gloo ranks, of which the first ends with `status`; return what each printed."""
    command = [sys.executable, "-m", "fastvideo", "bench", "--parallel", "tiny", "--device", "cpu", *OPTIONS, *arguments]
    with meeting_point() as variables:
        ranks = [
            subprocess.Popen(
                command,
                env={**os.environ, **variables, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]
        try:
            said = [rank.communicate(timeout=120) for rank in ranks]
        finally:
            [rank.kill() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [status, *[0] * (size - 1)], said
    return [out for out, _ in said]


def test_nothing_that_can_run_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    start_ranks(2, "--backends", "FLASH_ATTN", "--passes", "forward", "--json", str(path), status=1)
    rows = json.loads(path.read_text())["results"][0]["rows"]
    assert rows
    assert all(row["refused"] for row in rows)


def test_two_ranks_measure_every_layout_beside_one_card(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    printed = start_ranks(2, "--fp8", "--model", "--peers", "--head-groups", "auto", "2", "--json", str(path))
    assert printed[1] == ""
    data = json.loads(path.read_text())
    assert {"device", "torch", "commit", "ranks", "transport"} <= data["about"].keys()
    assert (data["about"]["ranks"], data["about"]["transport"]) == ("2", "gloo")
    (result,) = data["results"]
    assert (result["shape"], result["ranks"]) == ("tiny", 2)
    rows = {(row["case"], row["pass_name"]): row for row in result["rows"]}
    assert len(rows) == len(result["rows"])
    check_one_card(rows)
    check_shared(rows)
    refused = {case: row["refused"] for (case, pass_name), row in rows.items() if row["refused"] and pass_name == "forward"}
    assert {"one card FLASH_ATTN", "ring VIDEO_SPARSE_ATTN", "gather VIDEO_SPARSE_ATTN"} <= refused.keys()
    assert "cuda" in refused["one card FLASH_ATTN"]
    assert "use ulysses" in refused["ring VIDEO_SPARSE_ATTN"]
    assert not any("FLASH_ATTN" in case for case, _ in rows if not case.startswith("one card"))
    table = printed[0].splitlines()
    assert "forward, sparse" in table
    assert sum(line.strip().startswith("1  ") for line in table) == 4, "one first rank a table"


def check_one_card(rows: dict[tuple[str, str], dict]) -> None:
    for backend in ("TORCH_SDPA", "VIDEO_SPARSE_ATTN"):
        for pass_name in ("forward", "backward"):
            alone = rows[f"one card {backend}", pass_name]
            assert alone["ms"] == statistics.median(alone["rounds_ms"]) > 0
            assert (alone["layout"], alone["ring"], alone["ulysses"]) == ("local", 1, 1)


def check_shared(rows: dict[tuple[str, str], dict]) -> None:
    expected = {
        "ulysses TORCH_SDPA": (1, 2, 1),
        "ring TORCH_SDPA": (2, 1, 1),
        "gather TORCH_SDPA": (2, 1, 1),
        "gather TORCH_SDPA in 2 groups": (2, 1, 2),
        "ulysses VIDEO_SPARSE_ATTN": (1, 2, 1),
    }
    for case, sizes in expected.items():
        for pass_name in ("forward", "backward"):
            row = rows[case, pass_name]
            assert (row["ring"], row["ulysses"], row["head_groups"]) == sizes
            assert len(row["rounds_ms"]) == 3
            assert row["ms"] == statistics.median(row["rounds_ms"])
            assert row["one_card_ms"] == rows[f"one card {row['backend']}", pass_name]["ms"]
            assert row["efficiency"] == pytest.approx(row["one_card_ms"] / (2 * row["ms"]))
            assert row["exposed_share"] == pytest.approx(1 - row["local_ms"] / row["ms"])
            assert row["model_ms"] > 0
            assert (row["refused"], row["over_budget"]) == (None, None)
            gate = ["dgate"] if row["is_sparse"] else []
            gradients = ["dquery", "dkey", "dvalue", *gate] if pass_name == "backward" else []
            assert list(row["errors"]) == ["out", *gradients]
            assert max(row["errors"].values()) < 1e-5
    for case in ("ulysses TORCH_SDPA, float8", "gather TORCH_SDPA, float8"):
        eighth = rows[case, "forward"]
        assert 0.005 < eighth["errors"]["out rms"] < 0.1
        assert eighth["over_budget"] is None
        assert (case, "backward") not in rows
    peers = [row for row in rows.values() if row["library"] in ("diffusers", "yunchang")]
    assert {row["layout"] for row in peers} == {"ulysses", "ring"}
    for row in peers:
        assert row["refused"] or max(row["errors"].values()) < 1e-5
        assert row["local_ms"] is row["model_ms"] is None


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Ranks(CPU)
    dist.destroy_process_group()


def tiny_problem() -> Problem:
    return make_problem(shape_named("tiny"), torch.float32, CPU, sparsity=None, tile="4x4x4", seed=0)


def test_wrong_rows_are_marked_and_refusals_are_rows(ranks: Ranks) -> None:
    problem, saved = tiny_problem(), []
    right = ParallelCase("right", "fastvideo", "TORCH_SDPA", "local", 1, 1, lambda _: one_card(problem, "TORCH_SDPA"))
    wrong = dataclasses.replace(right, name="wrong", build=lambda _: lambda *x: 1.01 * one_card(problem, "TORCH_SDPA")(*x))

    def refuse(*_: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("too hot")

    absent = dataclasses.replace(right, name="absent", build=lambda _: refuse)
    rows = run_parallel(
        problem, [right, wrong, absent], ranks, rounds=2, round_ms=1.0, save=lambda rows: saved.append(len(rows))
    )
    found = {(row.case, row.pass_name): row for row in rows}
    assert set(saved) == {len(rows)} == {8}
    for pass_name in ("forward", "backward"):
        assert found["right", pass_name].is_ranked
        assert found["right", pass_name].errors["out"] == 0
        assert not found["one card TORCH_SDPA", pass_name].is_ranked
        row = found["wrong", pass_name]
        assert not row.is_ranked
        assert row.over_budget is not None
        assert row.over_budget.startswith("out: max error")
        assert row.errors["out"] == pytest.approx(0.01, rel=1e-3)
        assert found["absent", pass_name].refused == "too hot"
    table = format_parallel_rows(rows).splitlines()
    assert any("OVER BUDGET, not ranked: out" in line for line in table)
    assert "   -  absent: can't run: too hot" in table


def test_peers_that_are_missing_or_do_not_fit_are_rows(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = tiny_problem()
    ours = ParallelCase("ours", "fastvideo", "TORCH_SDPA", "local", 1, 1, lambda _: one_card(problem, "TORCH_SDPA"))
    monkeypatch.setitem(sys.modules, "yunchang", None)
    monkeypatch.setitem(sys.modules, "diffusers.models", None)
    rows = run_parallel(problem, [ours, *make_peer_cases(problem, ["ring"])], ranks, passes=["forward"], rounds=1, round_ms=1.0)
    reasons = {row.library: row.refused for row in rows if row.library in ("yunchang", "diffusers")}
    assert "yunchang" in reasons["yunchang"]
    assert "diffusers.models" in reasons["diffusers"]
    uneven = dataclasses.replace(problem, lengths=(100, 140))
    for case in make_peer_cases(uneven, ["ulysses"]):
        with pytest.raises(ValueError, match=r"equal shards and heads that divide, got shards of \(100, 140\) tokens"):
            case.build("")


def test_local_parts_are_the_work_of_a_rank(ranks: Ranks) -> None:
    """Together the parts of all ranks have every query of every head once, and all keys of their heads."""
    whole = tiny_problem()
    for ring, ulysses in ((2, 1), (1, 2), (2, 2), (4, 1)):
        size = ring * ulysses
        lengths = (240 // size,) * (size - 1) + (240 - 240 // size * (size - 1),)
        out = torch.zeros_like(whole.inputs.query)
        for rank in range(size):
            part = dataclasses.replace(whole, lengths=lengths, rank=rank).local_part(ulysses)
            row, column = divmod(rank, ulysses)
            rows, heads = 240 // ring, 2 // ulysses
            assert part.key.shape == (1, 240, heads, 32)
            out[:, row * rows : (row + 1) * rows, column * heads : (column + 1) * heads] += part.query
        assert torch.equal(out, whole.inputs.query)
    # Of three ranks one has none of two heads, and nothing to do.
    idle = dataclasses.replace(whole, lengths=(80, 80, 80), rank=2).local_part(3)
    leaves = idle.leaves(has_gate=True, needs_grad=True)
    assert leaves[0].numel() == 0
    grads = torch.autograd.grad(local_call(whole, "VIDEO_SPARSE_ATTN", 0)(*leaves), leaves, idle.dout)
    assert [x.shape for x in grads] == [x.shape for x in leaves]


def test_cases_are_the_layouts_of_the_plan(ranks: Ranks) -> None:
    problem = dataclasses.replace(tiny_problem(), lengths=(120, 120))
    wanted = {"backends": ["TORCH_SDPA"], "head_groups": [None], "with_float8": False}
    found = make_parallel_cases(problem, layouts=["ring", "ulysses"], **wanted)
    assert {(case.layout, case.ring, case.ulysses) for case in found} == {("ring", 2, 1), ("ulysses", 1, 2)}
    with pytest.raises(ValueError, match="2 ranks have no layout torus; there are"):
        make_parallel_cases(problem, layouts=["torus"], **wanted)
    fine = BenchmarkShape((4, 4, 4), 1, 8, fine_tile_tyx=(4, 4, 4))
    with pytest.raises(ValueError, match="a fine stage alone"):
        make_problem(fine, torch.float32, CPU, sparsity=None, tile="4x4x4", seed=0)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["tiny"], "was started alone; start it with: torchrun --nproc-per-node 2 -m fastvideo bench --parallel SHAPE"),
        ([], "was started alone"),
    ],
)
def test_one_process_is_told_how_to_start_several(arguments, text, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert main(["bench", "--parallel", *arguments, "--device", "cpu"]) == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "expected the names of shapes"),
        (["tiny", "--plot", "x.png"], "--plot draws"),
        (["tiny", "--sparsities", "0.5", "0.6"], "expected one of --sparsities"),
        (["tiny", "--tiles", "4x4x4", "auto"], "expected one of --tiles"),
        (["tiny", "--head-groups", "0"], "expected --head-groups as auto or positive numbers, got '0'"),
        (["tiny", "--rest", "1"], "--rest is for one device"),
        (["tiny", "--round-ms", "0"], "expected --round-ms above 0"),
        (["tiny", "--impls", "portable"], "--impls and --window are for one device"),
        (["tiny", "--window", "1", "1", "1"], "--impls and --window are for one device"),
    ],
)
def test_options_are_checked_before_ranks_meet(arguments, text, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main(["bench", "--parallel", *arguments, "--device", "cpu"]) == 2
    assert text in capsys.readouterr().err
    assert not dist.is_initialized()


def test_tables_are_sorted_by_time() -> None:
    def row(case: str, ms: float, **more) -> ParallelRow:
        return ParallelRow(
            case, "forward", "fastvideo", "TORCH_SDPA", "ring", 2, 1, ms=ms, efficiency=0.5, model_ms=1.25, **more
        )

    alone = dataclasses.replace(row("one card", 4.0), library="one card", efficiency=None)
    rows = [row("slow", 3.0), alone, row("eighth", 0.5, is_float8=True), row("fast", 1.0), row("sparse", 2.0, is_sparse=True)]
    dense, sparse = format_parallel_rows(rows, with_model=True).split("forward, sparse\n")
    assert [line.split()[:2] for line in dense.splitlines()[2:]] == [
        ["-", "eighth"],
        ["1", "fast"],
        ["2", "slow"],
        ["-", "one"],
    ]
    assert "1  sparse" in sparse
    assert "model ms" in dense
    assert "50.0%" in dense
    assert "model ms" not in format_parallel_rows(rows)
