"""`fastvideo explain` prints the trace as a table or as data."""

from __future__ import annotations

import json

import pytest

from fastvideo.cli import main

WAN = ["explain", "--heads", "40", "--head-size", "128", "--seq", "75600", "--dtype", "bfloat16"]


def test_table(capsys) -> None:
    assert main([*WAN, "--system", "H200, no flash-attn"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("machine: H200 (capability 9.0)")
    assert any(line.startswith("TORCH_SDPA") and "chosen" in line for line in lines)
    assert main([*WAN, "--device", "cpu"]) == 0
    (chosen,) = [line for line in capsys.readouterr().out.splitlines() if "chosen" in line]
    assert chosen.split() == ["TORCH_SDPA", "chosen", "0.1", "TFLOP/s"]


def test_json(capsys) -> None:
    assert main([*WAN, "--device", "cuda", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["request"]["num_heads"] == 40
    assert main([*WAN[:-1], "bf16", "--device", "cuda", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["request"] == data["request"]
    assert data["chosen"] in ("TORCH_SDPA", "FLASH_ATTN")
    rejected = [row for row in data["backends"] if not row["accepts"]]
    assert all(row["reasons"] for row in rejected)


@pytest.mark.parametrize(
    ("tile", "num_tiles", "share"), [("auto", 1260, "13.8"), ("4x4x4", 1440, "22.3"), (None, 1260, "13.8")]
)
def test_what_padding_costs(tile, num_tiles, share, capsys) -> None:
    grid = [*WAN, "--system", "H200", "--grid", "21", "45", "80", *([] if tile is None else ["--tile", tile])]
    assert main(grid) == 0
    (note,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: tile ")]
    assert f"on grid 21x45x80: {num_tiles} tiles, padding adds {share} % work: {64 * num_tiles} query rows" in note
    assert main([*grid, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["tile"]["num_tiles"] == num_tiles
    assert round(100 * (data["tile"]["padding"] - 1), 1) == float(share)
    assert note.removeprefix("note: ") in data["notes"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--tile", "auto"], "expected grid_tyx beside tile_tyx='auto'"),
        (["--grid", "21", "45", "81"], "at most seq=75600 tokens, got (21, 45, 81): 76545"),
        (["--grid", "21", "45", "80", "--tile", "4x4"], "tile_tyx"),
        (["--grid", "21", "45", "80", "--tile", "auto9"], "'auto128', got 'auto9'"),
        (["--grid", "0", "45", "80"], "grid_tyx"),
    ],
)
def test_grids_and_tiles_that_are_refused(arguments, text, capsys) -> None:
    assert main([*WAN, "--system", "H200", *arguments]) == 2
    assert text in capsys.readouterr().err


def test_a_backend_that_cannot_run_makes_the_status_one(capsys) -> None:
    assert main([*WAN, "--system", "cpu", "--backend", "FLASH_ATTN"]) == 1
    assert "FLASH_ATTN" in capsys.readouterr().out


def test_nonsense_makes_the_status_two(capsys) -> None:
    assert main([*WAN, "--system", "Abacus"]) == 2
    assert "unknown device 'Abacus'" in capsys.readouterr().err
    assert main([*WAN, "--system", ""]) == 2
    assert "unknown device ''" in capsys.readouterr().err
    assert main([*WAN, "--device", "meta"]) == 2
    assert "torch sees no device of type 'meta' here" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["explain", "--heads", "40"])
