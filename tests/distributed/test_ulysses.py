"""Two and four ranks equal one rank, outputs and all gradients, on gloo and NCCL; the cases stand in ulysses_cases.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("ulysses_cases.py")
NAMES = [line.split('Case("')[1].split('"')[0] for line in SCRIPT.read_text().splitlines() if line.startswith('    Case("')]
RANKS = [
    *(pytest.param((size, "cpu"), id=f"{size} on gloo") for size in (2, 4)),
    *(
        pytest.param(
            (size, "cuda"),
            id=f"{size} on NCCL",
            marks=[
                pytest.mark.multi_gpu,
                pytest.mark.skipif(torch.cuda.device_count() < size, reason=f"needs {size} CUDA devices"),
            ],
        )
        for size in (2, 4)
    ),
]


@pytest.fixture(scope="module", params=RANKS)
def reports(request, tmp_path_factory) -> list[dict[str, str]]:
    (size, device), folder = request.param, tmp_path_factory.mktemp("ranks")
    arguments = [str(size), str(folder), device]
    ranks = [subprocess.Popen([sys.executable, str(SCRIPT), str(rank), *arguments]) for rank in range(size)]
    try:
        codes = [rank.wait(timeout=300) for rank in ranks]
    finally:
        [rank.kill() for rank in ranks]
    assert codes == [0] * size
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


@pytest.mark.parametrize("name", [*NAMES, "shards", "refusals"])
def test_ranks_equal_one(reports: list[dict[str, str]], name: str) -> None:
    for rank, report in enumerate(reports):
        assert report[name] == "equal", f"rank {rank}: {report[name]}"
