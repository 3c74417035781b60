"""`fastvideo plan` prints the layouts as a table or as data."""

from __future__ import annotations

import json

from fastvideo.cli import main

WAN = ["plan", "--heads", "40", "--seq", "75600", "--world-size", "8"]


def test_table(capsys) -> None:
    assert main([*WAN]) == 0
    whole = capsys.readouterr().out.splitlines()
    assert whole[0].startswith("8 × H200, 8 a node; forward; one device: 209 ms")
    assert whole[-1] == "best: ulysses (ring=1, ulysses=8)"
    assert main([*WAN, "--head-groups", "5"]) == 0
    groups = capsys.readouterr().out.splitlines()
    assert groups[0] == whole[0]
    assert groups[3] != whole[3]  # the row of Ulysses, whose heads now travel one by one


def test_json(capsys) -> None:
    assert main([*WAN, "--json", "--grad", "--kv-heads", "8", "--ranks-per-node", "4"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["call"]["kv_heads"], data["needs_grad"], data["links"]["ranks_per_node"]) == (8, True, 4)
    assert len(data["layouts"]) == 7


def test_no_legal_layout_makes_the_status_one(capsys) -> None:
    assert main([*WAN, "--causal", "--cross-seq", "512"]) == 1
    assert "no layout can be" in capsys.readouterr().out
    assert main([*WAN, "--sparsity", "0.9"]) == 0
    assert main([*WAN, "--sparsity", "0.9", "--causal"]) == 1
    assert "sparse attention can't be causal" in capsys.readouterr().out
    assert main([*WAN, "--sparsity", "0.9", "--cross-seq", "512"]) == 1
    assert "sparse attention needs queries and keys to be the same tokens, got 75600 and 512" in capsys.readouterr().out


def test_nonsense_makes_the_status_two(capsys) -> None:
    assert main([*WAN, "--kv-heads", "3"]) == 2
    assert "expected kv_heads to divide heads, got 40 and 3" in capsys.readouterr().err
    assert main([*WAN, "--ranks-per-node", "0"]) == 2
    for wrong, text in ((["--dtype", "int32"], "got 'int32'"), (["--gate"], "a gate belongs to sparse attention")):
        capsys.readouterr()
        assert main([*WAN, *wrong]) == 2
        assert text in capsys.readouterr().err
