"""One to four ranks equal one device, outputs and all gradients, on gloo and NCCL.

The cases stand in parallel_cases.py (combinations) and named_cases.py; parallel_ranks.py runs them, once per rank.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("parallel_ranks.py")


def run_ranks(size: int, device: str, folder: Path) -> list[dict[str, str]]:
    """Return each rank's report: a case's name, and "equal" or what went wrong."""
    command = [sys.executable, str(SCRIPT)]
    ranks = [subprocess.Popen([*command, str(rank), str(size), str(folder), device]) for rank in range(size)]
    try:
        for rank in ranks:
            rank.wait(timeout=400)
    finally:
        [rank.kill() for rank in ranks]
    paths = [folder / f"{rank}.json" for rank in range(size)]
    return [json.loads(path.read_text()) if path.exists() else {"report": "none was written"} for path in paths]


@pytest.mark.parametrize(
    ("size", "device"),
    [
        *(pytest.param(size, "cpu", id=f"{size} on gloo") for size in (1, 2, 3, 4)),
        *(
            pytest.param(
                size,
                "cuda",
                id=f"{size} on NCCL",
                marks=[
                    pytest.mark.multi_gpu,
                    pytest.mark.skipif(torch.cuda.device_count() < size, reason=f"needs {size} CUDA devices"),
                ],
            )
            for size in (2, 4)
        ),
    ],
)
def test_ranks_equal_one_device(size: int, device: str, tmp_path: Path) -> None:
    reports = run_ranks(size, device, tmp_path)
    wrong = [
        f"rank {rank}, {name}: {text}"
        for rank, report in enumerate(reports)
        for name, text in report.items()
        if text != "equal"
    ]
    assert not wrong, "\n".join([f"{len(wrong)} wrong", *wrong[:10]])
    assert len(reports) == size
    assert all(len(report) > 80 for report in reports)
