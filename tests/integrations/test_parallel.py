"""Two ranks that share a model's tokens equal one, outputs and gradients, on gloo; the cases stand in parallel_cases.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from .tiny_models import NAMES

SCRIPT = Path(__file__).with_name("parallel_cases.py")
CHECKS = (*NAMES, "recomputed and compiled", "uneven shards", "other layouts", "masks", "refusals")


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    """All cases in one test: two workers of pytest-xdist would start the ranks twice."""
    ranks = [subprocess.Popen([sys.executable, str(SCRIPT), str(rank), str(tmp_path)]) for rank in range(2)]
    try:
        codes = [rank.wait(timeout=300) for rank in ranks]
    finally:
        [rank.kill() for rank in ranks]
    assert codes == [0, 0]
    for rank in range(2):
        report = json.loads((tmp_path / f"{rank}.json").read_text())
        assert set(report) == set(CHECKS)
        wrong = [f"rank {rank}, {name}: {text}" for name, text in report.items() if text != "equal"]
        assert not wrong, "\n".join(wrong)
