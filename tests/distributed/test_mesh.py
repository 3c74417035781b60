"""`init_sequence_parallel` and meshes of the caller, on four ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from fastvideo.testing import meeting_point

SCRIPT = Path(__file__).with_name("mesh_cases.py")


def test_meshes_of_four_ranks() -> None:
    with meeting_point() as shared:
        ranks = [
            subprocess.Popen(
                [sys.executable, str(SCRIPT)],
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "4"},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(4)
        ]
        try:
            errors = [rank.communicate(timeout=150)[1] for rank in ranks]
        finally:
            [rank.kill() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * 4, "\n".join(errors)[-3000:]
