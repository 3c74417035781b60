"""Two ranks that share a model's tokens equal one, outputs and gradients, on gloo; the cases stand in parallel_cases.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .tiny_models import SHARED

SCRIPT = Path(__file__).with_name("parallel_cases.py")
CHECKS = (*SHARED, "recomputed and compiled", "uneven shards", "other layouts", "refusals")


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("ranks")
    ranks = [subprocess.Popen([sys.executable, str(SCRIPT), str(rank), str(folder)]) for rank in range(2)]
    try:
        codes = [rank.wait(timeout=240) for rank in ranks]
    finally:
        [rank.kill() for rank in ranks]
    assert codes == [0, 0]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks_equal_one(reports: list[dict[str, str]], name: str) -> None:
    for rank, report in enumerate(reports):
        assert report[name] == "equal", f"rank {rank}: {report[name]}"
