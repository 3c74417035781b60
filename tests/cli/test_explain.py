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


def test_json(capsys) -> None:
    assert main([*WAN, "--device", "cuda", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["request"]["num_heads"] == 40
    assert data["chosen"] in ("TORCH_SDPA", "FLASH_ATTN")
    rejected = [row for row in data["backends"] if not row["accepts"]]
    assert all(row["reasons"] for row in rejected)


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
