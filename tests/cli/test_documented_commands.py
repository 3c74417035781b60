"""Every `fastvideo` command that the documents show is one that the parser takes; test_documented_runs.py runs them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest

from fastvideo.cli import bench, explain, generate, main, plan
from fastvideo.cli.pipeline import parse_policy
from fastvideo.training import cli as train
from fastvideo.training.finetune import cli as finetune

ROOT = Path(__file__).parents[2]


class Shown(NamedTuple):
    """A command on a page: its words after `fastvideo`, and how many processes the page starts it on."""

    page: str
    words: list[str]
    num_processes: int


def commands() -> list[Shown]:
    """Return the documents' commands, variables filled in."""
    found = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL):
            if language not in ("", "sh", "bash", "console"):
                continue
            text = block.replace("\\\n", " ")
            for name, value in re.findall(r'^(\w+)="(.*?)"$', text, re.MULTILINE | re.DOTALL):
                text = text.replace(f"${name}", value.replace("\n", " "))
            for line in text.splitlines():
                command = re.search(r"(?:^|-m )fastvideo (.*)", line.strip())
                if command is not None and "..." not in command[1]:
                    processes = re.search(r"torchrun --nproc-per-node (\d+) ", line)
                    words = shlex.split(command[1], comments=True)
                    found.append(Shown(path.name, words, int(processes[1]) if processes else 1))
    return found


@pytest.mark.parametrize(
    "words", [pytest.param(shown.words, id=f"{shown.page}: {' '.join(shown.words)[:60]}") for shown in commands()]
)
def test_the_parser_takes_it(words: list[str], monkeypatch) -> None:
    taken = []
    for module in (bench, explain, generate, plan, train, finetune):
        monkeypatch.setattr(module, "run", lambda args: taken.append(args) or 0)
    monkeypatch.setattr(finetune, "run_shards", finetune.run)
    assert main(words) == 0
    assert len(taken) == 1


def test_policies_in_the_documents_are_read() -> None:
    text = "".join(path.read_text() for path in (ROOT / "docs").rglob("*.md"))
    policies = re.findall(r"--policy '(\{.*?\})'$", text, re.MULTILINE)
    assert len(policies) == 1
    for policy in policies:
        assert parse_policy(policy).rules[0].step_intervals == ((10, None),)


def test_the_documents_show_commands() -> None:
    pages = {shown.page for shown in commands()}
    assert {"README.md", "generate.md", "train-with-vsa.md"} <= pages
    assert any("bundled" in shown.words and "--data" in shown.words for shown in commands())
