"""Ranks that make different calls are told so, everywhere, with names; the cases stand in agreement_cases.py."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastvideo.distributed.agreement.records import describe_difference
from fastvideo.settings import Settings

SCRIPT = Path(__file__).with_name("agreement_cases.py")
Report = dict[str, str | float]


def start_ranks(size: int, folder: Path, names: str, port: int, host: str = "launcher") -> list[subprocess.Popen]:
    arguments = [str(size), str(folder), names, str(port), host]
    return [subprocess.Popen([sys.executable, str(SCRIPT), str(rank), *arguments]) for rank in range(size)]


def exit_codes(ranks: list[subprocess.Popen], seconds: float) -> list[int]:
    """Wait for every rank; none may be left running."""
    try:
        return [rank.wait(timeout=seconds) for rank in ranks]
    finally:
        [rank.kill() for rank in ranks]


def read(folder: Path, name: str, rank: int) -> Report:
    return json.loads((folder / f"{name}.{rank}.json").read_text())


@pytest.fixture(scope="module")
def server() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


DIFFERENCES = {
    "constant_mismatch": "call 1 of their shared attention: rank 1 has query=(1, 5) where rank 0 has query=(1, 4)",
    "lone_new_shape": "call 4 of their shared attention: rank 1 has query=(1, 5) where rank 0 has query=(1, 4)",
    "other_order": "call 5 of their shared attention: rank 1 has query=(1, 9) where rank 0 has query=(1, 4)",
    "other_layers": "call 2 of their shared attention: rank 1 has layer=blocks.2 where rank 0 has layer=blocks.1",
    "other_masks": "call 1 of their shared attention: rank 1 has mask=('additive', 2, 1) "
    "where rank 0 has mask=('additive', 1, 1)",
    "new_lone_shape": "call 4 of their shared attention: rank 1 has query=(1, 5) where rank 0 has query=(1, 4)",
    "new_other_order": "call 8 of their shared attention: rank 1 has query=(1, 9) where rank 0 has query=(1, 4) [entered 0]",
    "new_behind": "call 3 of their shared attention: rank 1 has query=(1, 9) where rank 0 has query=(1, 4)",
    "compiled": "call 4 of their shared attention: rank 1 has query=(9,) where rank 0 has query=(4,)",
    "no_backward": "call 6 of their shared attention (layer blocks.0): rank 1 has pass=forward where rank 0 has pass=backward",
    "no_gradient": "call 1 of their shared attention (layer blocks.0): rank 1 has pass=inference, gradients= "
    "where rank 0 has pass=forward, gradients=query+key+value",
    "other_gradients": "call 1 of their shared attention: rank 1 has gradients=query+key "
    "where rank 0 has gradients=query+key+value",
    "other_order_of_backward": "call 3 of their shared attention: rank 1 has of_call=1 where rank 0 has of_call=2",
    "other_order_of_layers": "call 3 of their shared attention: rank 1 has layer=blocks.0, of_call=1 "
    "where rank 0 has layer=blocks.1, of_call=2",
    "compiled_no_backward": "call 6 of their shared attention: rank 1 has pass=forward where rank 0 has pass=backward",
    "gather_other_lengths": "call 1 of their shared attention: rank 1 has lengths=(5, 5) where rank 0 has lengths=(4, 4)",
    "gather_other_dtype": "call 1 of their shared attention: rank 1 has dtype=torch.float64 "
    "where rank 0 has dtype=torch.float32",
    "gather_other_dims": "call 1 of their shared attention: rank 1 has other_dims=(1, 4) where rank 0 has other_dims=(1, 3)",
    "gather_no_gradient": "call 1 of their shared attention: rank 1 has pass=inference where rank 0 has pass=forward",
    "gather_no_backward": "call 4 of their shared attention: rank 1 has pass=forward where rank 0 has pass=backward",
    "shard_other_lengths": "call 1 of their shared attention: rank 1 has lengths=(3, 3) where rank 0 has lengths=(2, 2)",
    "shard_no_backward": "call 4 of their shared attention: rank 1 has pass=inference, operation=gather_sequence "
    "where rank 0 has pass=backward, operation=shard_sequence",
    "compiled_shards": "call 13 of their shared attention: rank 1 has dtype=torch.float64 where rank 0 has dtype=torch.float32",
    "threads_fail_together": "call 2 of their shared attention: rank 1 has query=(1, 5) where rank 0 has query=(1, 4)",
    "new_no_backward": "call 22 of their shared attention: rank 1 has pass=forward where rank 0 has pass=backward",
}


def test_two_ranks(server, tmp_path: Path) -> None:
    """Everything that leaves the ranks alive, in one pair of processes: starting them is what takes the time."""
    assert exit_codes(start_ranks(2, tmp_path, "together", server.port), 150) == [0, 0]
    for name, difference in DIFFERENCES.items():
        check_that_every_rank_names(difference, name, tmp_path)
    told = {
        path.stem.split(".")[0]: [read(tmp_path, path.stem.split(".")[0], rank) for rank in range(2)]
        for path in tmp_path.iterdir()
    }
    assert [report["told"] for report in told["late"]] == ["3.0", "3.0"], "a late rank is waited for"
    assert [report["told"] for report in told["again_after_error"]] == ["same: True"] * 2, "a broken group stays broken"
    assert [report["told"] for report in told["compiled_blocks"]] == ["[12.0, 12.0] 1 graph 12 calls"] * 2
    assert [report["told"] for report in told["gradient"]] == ["12.0"] * 2
    assert [report["told"] for report in told["opcheck"]] == ["SUCCESS"] * 2
    for report in told["known_calls_are_silent"]:
        assert re.fullmatch(r"[\d.]+ µs", str(report["told"])), report["told"]
        assert float(str(report["told"]).split()[0]) < 100, "a dictionary lookup, on a busy machine"
    assert [report["told"] for report in told["checkpointed"]] == ["True True 16 calls"] * 2, "4 + 2 × (2 + 2 + 2)"
    for report in told["known_training_steps_are_silent"]:
        assert re.fullmatch(r"[\d.]+ µs", str(report["told"])), report["told"]
    assert [report["told"] for report in told["threads_take_turns"]] == ["True 100 calls"] * 2
    assert [report["told"] for report in told["threads_have_backward_passes_of_their_own"]] == ["5.0 4 calls"] * 2
    assert [report["told"] for report in told["verdict_during_a_known_call"]] == ["a verdict came"] * 2
    absent = {str(report["told"]) for report in told["absent"]}
    assert len(absent) == 1
    assert absent.pop().startswith("rank 1 did not come to call 2 of the shared attention within 0.8 s, where rank 0 asks for")
    assert 0.7 < float(told["absent"][0]["seconds"]) < 10


def check_that_every_rank_names(difference: str, name: str, folder: Path) -> None:
    for rank in range(2):
        report = read(folder, name, rank)
        assert report["told"] == f"ranks disagree on {difference}", f"{name} on rank {rank}"
        if not name.startswith("compiled"):  # which takes longer than that to compile
            assert report["seconds"] < 30, "the difference is known long before the timeout"


@pytest.mark.parametrize(
    ("name", "size", "text", "within"),
    [
        ("killed", 3, "rank 1 did not come to call 2 of the shared attention within 1.5 s", 20.0),
        ("killed_in_the_exchange", 2, "rank 1 ended in the exchange of call 2 of the shared attention: ", 20.0),
        ("killed_while_others_are_inside", 2, "rank 1 has shown no sign of life for", 20.0),
    ],
)
def test_a_killed_rank_ends_the_others(name: str, size: int, text: str, within: float, server, tmp_path: Path) -> None:
    codes = exit_codes(start_ranks(size, tmp_path, name, server.port), 60)
    assert codes == [0, -9, 0][:size]
    for rank in range(0, size, 2):
        report = read(tmp_path, name, rank)
        assert str(report["told"]).startswith(text), report["told"]
        assert report["seconds"] < within


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 CUDA devices")
def test_nccl_is_left_when_a_peer_stops_before_it(server, tmp_path: Path) -> None:
    assert exit_codes(start_ranks(2, tmp_path, "nccl_lone_new_shape", server.port), 120) == [0, 0]
    for rank in range(2):
        report = read(tmp_path, "nccl_lone_new_shape", rank)
        assert report["told"] == (
            "ranks disagree on call 6 of their shared attention: rank 1 has query=(1, 5) where rank 0 has query=(1, 4)"
        )


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 CUDA devices")
def test_nccl_is_left_when_a_peer_is_killed(server, tmp_path: Path) -> None:
    assert exit_codes(start_ranks(2, tmp_path, "nccl_killed", server.port), 120) == [0, -9]
    assert str(read(tmp_path, "nccl_killed", 0)["told"]).startswith("rank 1 has shown no sign of life for")


@pytest.mark.parametrize(
    ("name", "code", "text"),
    [
        (
            "failed",
            3,
            "rank 1 ended after call 1 of the shared attention, where rank 0 makes call 2 (query=(1, 4), device=cpu)",
        ),
        (
            "failed_while_others_are_inside",
            1,
            "rank 1 ended by Planted: on purpose after call 4 of the shared attention, where rank 0 made call 4",
        ),
    ],
)
def test_a_rank_that_ends_is_named_at_once(name: str, code: int, text: str, server, tmp_path: Path) -> None:
    assert exit_codes(start_ranks(2, tmp_path, name, server.port), 60) == [0, code]
    report = read(tmp_path, name, 0)
    assert report["told"] == text
    assert report["seconds"] < 30


@pytest.mark.parametrize(("name", "when"), [("host_killed", "at call 2"), ("host_killed_first", "before its first call")])
def test_a_lost_store_is_an_error(name: str, when: str, tmp_path: Path) -> None:
    assert exit_codes(start_ranks(2, tmp_path, name, port=0, host="0"), 60) == [-9, 0]
    report = read(tmp_path, name, 1)
    assert str(report["told"]).startswith(f"rank 1 lost the store of the process group {when}")
    assert report["seconds"] < 20, "no connection is tried again and again"


def test_what_most_ranks_ask_for_is_meant() -> None:
    calls = dict.fromkeys(range(8), (("query", "(1, 4)"), ("dtype", "bfloat16")))
    assert describe_difference(2, calls) is None
    calls[0] = (("query", "(1, 4)"), ("dtype", "float32"))
    assert describe_difference(2, calls) == (
        "ranks disagree on call 2 of their shared attention: rank 0 has dtype=float32 where rank 1 has dtype=bfloat16"
    )
    calls |= {rank: (("query", f"(1, {rank})"), ("dtype", "bfloat16")) for rank in range(9, 20)}
    text = str(describe_difference(2, calls))
    assert "rank 11 has query=(1, 11) where rank 1 has" in text
    assert text.endswith("and 8 more ranks deviate")


def test_a_layer_without_a_name_fits_every_name() -> None:
    assert describe_difference(1, {0: (("layer", ""),), 1: (("layer", "blocks.0"),)}) is None
    assert "layer=blocks.1" in str(describe_difference(1, {0: (("layer", "blocks.1"),), 1: (("layer", "blocks.0"),)}))


def test_settings() -> None:
    settings = Settings.from_environment({"FASTVIDEO_AGREEMENT": "EVERY", "FASTVIDEO_AGREEMENT_TIMEOUT": "2.5"})
    assert (settings.agreement, settings.agreement_timeout) == ("every", 2.5)
    with pytest.raises(ValueError, match="expected FASTVIDEO_AGREEMENT among auto, new, every, off, got 'sometimes'"):
        Settings.from_environment({"FASTVIDEO_AGREEMENT": "sometimes"})
    for text in ("0", "-1", "soon", "inf"):
        with pytest.raises(ValueError, match="positive number of seconds"):
            Settings.from_environment({"FASTVIDEO_AGREEMENT_TIMEOUT": text})
