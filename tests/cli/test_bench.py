"""`fastvideo bench` on a CPU: tables, the JSON and the picture, and what is refused."""

from __future__ import annotations

import json

import pytest

from fastvideo.cli import main

FAST = ["--rounds", "1", "--dtype", "float32", "--device", "cpu"]


def test_table_json_and_picture(tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    data_path, picture = tmp_path / "made" / "rows.json", tmp_path / "rows.png"
    files = ["--json", str(data_path), "--plot", str(picture)]
    backends = ["--backends", "torch_sdpa", "FLASH_ATTN", "VIDEO_SPARSE_ATTN"]
    assert main(["bench", "tiny", *FAST, *files, *backends, "--sparsities", "0.25", "0.75"]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[0].startswith("device CPU, torch ")
    assert "tiny: 240 tokens (5x6x8), 2 heads x 32, float32, random inputs" in text
    assert "FLASH_ATTN: can't run: " in text
    data = json.loads(data_path.read_text())
    assert {"device", "torch", "commit", "python"} <= data["about"].keys()
    assert [(table["shape"], table["inputs"]) for table in data["results"]] == [("tiny", "random")]
    rows = data["results"][0]["rows"]
    assert {row["pass_name"] for row in rows} == {"forward", "backward"}
    assert [row["sparsity"] for row in rows if row["ms"] and row["pass_name"] == "forward"] == [0.0, 0.25, 0.75]
    for row in rows:
        assert (row["ms"] is None) == (row["refused"] is not None)
        assert row["over_budget"] is None
        if row["ms"]:
            assert 0 < max(row["errors"].values()) < 1e-4
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_whole_lines_of_other_tables(capsys) -> None:
    backends = ["--backends", "SLIDING_TILE_ATTN", "VIDEO_SPARSE_ATTN", "--window", "1", "1", "1"]
    assert main(["bench", "tiny-fine", "tiny", *FAST, *backends, "--impls", "portable", "--passes", "forward"]) == 0
    text = capsys.readouterr().out
    assert "backward" not in text
    assert "block_sparse[portable] 4x4x4" in text
    assert "SLIDING_TILE_ATTN 6x8x8 window 1x1x1" in text
    assert "VIDEO_SPARSE_ATTN[portable] 4x4x4" in text


def test_a_picture_of_nothing_is_an_error(tmp_path, capsys) -> None:
    picture = tmp_path / "rows.png"
    # FlashAttention runs on no CPU, so that no row is ranked.
    assert main(["bench", "tiny", *FAST, "--backends", "FLASH_ATTN", "--plot", str(picture)]) == 1
    captured = capsys.readouterr()
    assert "FLASH_ATTN: can't run" in captured.out
    assert f"no row is ranked, so {picture} was not drawn" in captured.err
    assert not picture.exists()


def test_nothing_that_can_run_is_an_error(tmp_path, capsys) -> None:
    path = tmp_path / "rows.json"
    assert main(["bench", "tiny", *FAST, "--backends", "FLASH_ATTN", "--json", str(path)]) == 1
    captured = capsys.readouterr()
    assert "FLASH_ATTN: can't run" in captured.out
    assert "nothing was measured" in captured.err
    rows = json.loads(path.read_text())["results"][0]["rows"]
    assert len(rows) == 2
    assert all(row["refused"] for row in rows)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["huge"], "no shape is called 'huge'"),
        (["tiny", "--device", "cuda"], "no CUDA device"),
        (["tiny", "--rounds", "0"], "--rounds of at least 1"),
        (["tiny", "--rest", "-1"], "--rest as seconds of at least 0"),
        (["tiny", "--rest", "nan"], "--rest as seconds of at least 0"),
        (["tiny", "--sparsities", "1.0"], "--sparsities in [0, 1)"),
        (["tiny", "--plot", "rows.jpg"], "--plot to end in .png"),
        (["tiny", "--impls", "warp"], "unknown implementation 'warp'"),
        (["tiny", "--tiles", "4x4"], "a tile like 4x4x4"),
        (["tiny", "--backends", "FLASHY"], "no attention backend is called 'FLASHY'"),
        (["tiny", "--device", "mps"], "--device as cpu or cuda"),
        (["tiny", "--seed", str(2**63)], "--seed in"),
        (["tiny", "--json", "."], "the name of a file, got the folder ."),
        (["tiny-fine", "tiny", "--tiles", "2x4x4"], "tiny-fine: a fine stage alone has a tile of its own"),
        (["tiny", "--backends", "TORCH_SDPA", "--tiles", "2x4x4"], "--tiles is of VIDEO_SPARSE_ATTN, which is not among"),
        (["tiny", "--backends", "torch_sdpa", "--impls", "all"], "--impls is of VIDEO_SPARSE_ATTN"),
        (["tiny", "--backends", "SLIDING_TILE_ATTN", "--sparsities", "0.5"], "--sparsities is of VIDEO_SPARSE_ATTN"),
        (["tiny", "--window", "1", "1", "1"], "--window is of SLIDING_TILE_ATTN, which is not among --backends TORCH_SDPA"),
        (["tiny", "--layouts", "ring", "--peers", "--round-ms", "5"], "--layouts, --peers, --round-ms: for --parallel alone"),
    ],
)
def test_what_is_refused(arguments, text, capsys, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["bench", *arguments]) == 2
    assert text in capsys.readouterr().err
