"""`scripts/measure_gpu.sh` with a stand-in for Python: what it runs, and that a failure is its own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from fastvideo.benchmark.shapes import SHAPES
from fastvideo.cli import bench, main

ROOT = Path(__file__).parents[2]


def run_script(folder: Path, *, parts: str | None = None, fails: str = "nothing") -> tuple[int, list[list[str]]]:
    """Exit status and the commands of Python; commands that begin with `fails` exit with 4."""
    stand_in, record = folder / "python", folder / "commands"
    stand_in.write_text(f'#!/bin/sh\necho "$@" >> {record}\ncase "$*" in "{fails}"*) exit 4 ;; esac\n')
    stand_in.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(stand_in)} | ({} if parts is None else {"PARTS": parts})
    script = ["bash", "scripts/measure_gpu.sh", str(folder / "results")]
    status = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, timeout=60, check=False).returncode
    return status, [line.split() for line in record.read_text().splitlines()]


def test_every_named_shape_and_all_tests(tmp_path: Path, monkeypatch) -> None:
    status, commands = run_script(tmp_path)
    assert status == 0
    tests = next(words for words in commands if words[:2] == ["-m", "pytest"])
    assert {"tests/gpu", "tests/block_sparse/test_traps.py"} <= set(tests)
    assert tests[tests.index("-n") + 1] == "8"
    benchmarks = [words[3:] for words in commands if words[:3] == ["-m", "fastvideo", "bench"]]
    assert {words[0] for words in benchmarks} == set(SHAPES)
    # Options that nothing would read, and shapes that don't exist, are refused before anything is measured.
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    taken = []
    monkeypatch.setattr(bench, "run", lambda args: bench._check(args, bench.torch.device("cuda")) or taken.append(args) or 0)
    assert [main(["bench", *words]) for words in benchmarks] == [0] * len(benchmarks)
    assert len(taken) == len(benchmarks)


@pytest.mark.parametrize(
    ("parts", "fails"), [("test", "-m pytest"), ("small", "-m fastvideo bench sprites"), ("sum", "nothing")]
)
def test_a_failure_is_the_exit_status(parts: str, fails: str, tmp_path: Path) -> None:
    (tmp_path / "commands").touch()
    assert run_script(tmp_path, parts=parts, fails=fails)[0] == (2 if parts == "sum" else 1)
