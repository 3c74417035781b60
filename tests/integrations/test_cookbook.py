"""The cookbook's pages on diffusers and on several GPUs run as they are written: from top to bottom, and on two ranks.

Their examples are fenced as `py`, because they can't stand alone as those fenced as `python` do (tests/test_documents.py).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastvideo.integrations.diffusers import plan_of
from fastvideo.testing import meeting_point

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "cookbook"


def examples(page: str) -> list[str]:
    return re.findall(r"^```py\n(.*?)^```", (PAGES / page).read_text(), re.MULTILINE | re.DOTALL)


def test_the_example_on_the_first_page_runs() -> None:
    """README's pipeline is that of the page on diffusers."""
    namespace = {"__name__": "example"}
    exec(compile(examples("diffusers.md")[0], "pipeline", "exec"), namespace)
    (example,) = examples(str(ROOT / "README.md"))
    exec(compile(example, "README", "exec"), namespace)
    assert plan_of(namespace["transformer"]).boundaries == (5,)


def test_the_page_on_diffusers_runs_from_top_to_bottom(capsys) -> None:
    torch._dynamo.reset()
    namespace = {"__name__": "example"}
    shown = ""
    for number, code in enumerate(examples("diffusers.md")):
        if "from transformers import" in code:
            pytest.importorskip("transformers", reason='needs transformers: pip install "transformers>=5"')
        exec(compile(code, f"example {number}", "exec"), namespace)
        shown += capsys.readouterr().out
    printed = re.findall(
        r"^prints[^\n]*\n\n```text\n(.*?)\n```", (PAGES / "diffusers.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert len(printed) == 2
    for text in printed:
        assert text in shown


def test_the_page_on_several_gpus_runs_on_two_ranks(tmp_path) -> None:
    generate, train = examples("several-gpus.md")
    script = tmp_path / "generate.py"
    with meeting_point() as first, meeting_point() as second:
        # One program after the other in one process, because importing diffusers takes longer than both.
        script.write_text(f"{generate}\nimport os\nos.environ |= {second}\n{train}")
        shared = {**os.environ, **first, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen(
                [sys.executable, str(script)], env={**shared, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True
            )
            for rank in range(2)
        ]
        try:
            outputs = [rank.communicate(timeout=180)[0] for rank in ranks]
        finally:
            [rank.kill() for rank in ranks]
    for rank, output in enumerate(outputs):
        assert output.count(f"rank {rank} of 2: equal") == 2
