"""Commands run in fresh processes, as `torchrun` would start them, and what their runs leave. Run as a program by itself."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

from fastvideo.cli import main
from fastvideo.testing import meeting_point
from fastvideo.training.metrics import Metrics

KILLED_AT = 3


def run_program(runs: list[tuple[str, list[str]]], size: int) -> list[int]:
    """Run commands one after another in each of `size` fresh processes; `"kill"` ends one by its third step's line."""
    environment = {**os.environ, "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    with contextlib.ExitStack() as stack:
        places = [stack.enter_context(meeting_point()) for _ in runs]
        command = [sys.executable, __file__, json.dumps([(place, *run) for place, run in zip(places, runs, strict=True)])]
        ranks = [
            subprocess.Popen(command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(size)
        ]
        try:
            return [rank.wait(timeout=240) for rank in ranks]
        finally:
            [rank.kill() for rank in ranks]


def read(out: Path, kind: str = "train") -> list[dict]:
    """Return a run's lines of metrics of one kind."""
    return [line for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if line["kind"] == kind]


def losses(out: Path) -> list[float]:
    """Return a run's training losses, of every step."""
    lines = read(out)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def write_and_die(metrics: Metrics, line: dict) -> None:
    """Stand in for `Metrics.write`."""
    with metrics.path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    if line.get("step") == KILLED_AT:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for place, what, command in json.loads(sys.argv[1]):
        os.environ |= place
        if what == "kill":
            Metrics.write = write_and_die
        if main(command) != 0:
            sys.exit(1)
