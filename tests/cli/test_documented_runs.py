"""The documents' commands run on a CPU, what is large in them made small; those that can't are listed with the reason.

Folders that a reader has (checkpoints, latents) are tiny ones under the names that the pages give them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from fastvideo.cli import main
from fastvideo.models.wan import WanConfig, WanTransformer3DModel
from fastvideo.training.finetune.data import write_null_text, write_shard

from .test_documented_commands import ROOT, Shown, commands

TINY_RUN = {"--max-steps": "2", "--batch-size": "4", "--precision": "float32", "--log-interval": "1", "--device": "cpu"}
# Inductor takes a minute on a CPU; test_finetune.py compiles a run.
FINETUNE = {**TINY_RUN, "--learning-rate": "1e-3", "--warmup-steps": "1", "--compile": None}

RUN: dict[tuple[str, str], Mapping[str, str | None]] = {
    ("README.md", "generate --prompt"): {"--steps": "1"},
    ("README.md", "generate --compare"): {"--steps": "1"},
    ("README.md", "generate --words"): {},
    ("README.md", "plan"): {},
    ("generate.md", "generate --model"): {"--size": "128x32", "--frames": "9", "--steps": "11"},
    ("train-with-vsa.md", "train shards"): {"--clips": "4", "--frame-size": "16"},
    ("train-with-vsa.md", "--out runs/one"): {"--max-steps": "2"},
    ("train-with-vsa.md", "--out runs/two"): {"--max-steps": "2"},
    ("train-with-vsa.md", "--out runs/vsa --compile --sequence-parallel"): {**FINETUNE, "--accumulation": "2"},
    ("train-with-vsa.md", "--out runs/vsa --compile"): FINETUNE,
}
"""By page and part of the command: which options are changed, or left out."""

NOT_RUN = {
    ("README.md", "bench wan2.1-14b-720p"): "times kernels for Hopper cards; test_bench.py runs the verb",
    ("README.md", "bench --parallel"): "times two cards; test_parallel_bench.py runs the verb",
    ("parallel.md", "bench --parallel"): "times two cards; test_parallel_bench.py runs the verb",
    ("README.md", "generate"): "16 steps on two processes; test_generate.py runs a tiny model on two",
    ("train-with-vsa.md", "--benchmark"): "a model of 1.3B; test_finetune.py runs the tiny shape",
    ("README.md", "train --out"): "minutes of an H200; test_trainer.py runs the verb",
}


def part_of(shown: Shown, table: Mapping[tuple[str, str], object]) -> tuple[str, str] | None:
    """Return the first entry of a table that a command fits."""
    line = " ".join(shown.words)
    return next((key for key in table if key[0] == shown.page and key[1] in line), None)


def changed(words: list[str], changes: Mapping[str, str | None]) -> list[str]:
    """Return a command's words with other values for some options, or without them."""
    kept: list[str] = []
    option = ""
    for word in words:
        option = word if word.startswith("--") else option
        if option not in changes:
            kept.append(word)
    return kept + [word for option, value in changes.items() if value is not None for word in (option, value)]


def command(page: str, part: str) -> tuple[list[str], int]:
    """Return a command made small, and the number of its processes, two at most."""
    (shown,) = (shown for shown in commands() if part_of(shown, RUN) == (page, part))
    return changed(shown.words, RUN[page, part]), min(shown.num_processes, 2)


def run(page: str, part: str) -> None:
    words, num_processes = command(page, part)
    if num_processes == 1:
        assert main(words) == 0
        return
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    # Absolute, because the commands run in another folder.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    subprocess.run([*torchrun, "-m", "fastvideo", *words], env=environment, check=True, timeout=200)


def losses(out: Path) -> list[float]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "train"]


def test_every_command_runs_or_says_why_not() -> None:
    for shown in commands():
        found = [part_of(shown, table) for table in (RUN, NOT_RUN)]
        assert any(found), f"{shown} is in neither table"
    for key in (*RUN, *NOT_RUN):
        assert any(key in (part_of(shown, RUN), part_of(shown, NOT_RUN)) for shown in commands()), f"{key} is shown no more"


def test_the_bundled_model_generates(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    run("README.md", "generate --prompt")
    assert (tmp_path / "star.mp4").stat().st_size > 0
    run("README.md", "generate --compare")
    assert "difference on a scale of 0 to 1" in capsys.readouterr().out
    run("README.md", "generate --words")
    assert "heart" in capsys.readouterr().out
    run("README.md", "plan")
    assert "ulysses" in capsys.readouterr().out


def test_a_local_pipeline_generates(tmp_path: Path, monkeypatch, capsys) -> None:
    from diffusers import WanPipeline

    from .tiny_pipelines import components

    monkeypatch.chdir(tmp_path)
    WanPipeline(**components()).save_pretrained("Wan2.1-T2V-1.3B-Diffusers")
    policy = re.search(r"--policy '(\{.*\})'$", (ROOT / "docs" / "cookbook" / "generate.md").read_text(), re.MULTILINE)[1]
    words, _ = command("generate.md", "generate --model")
    assert main([*words, "--policy", policy]) == 0
    assert (tmp_path / "fox.mp4").stat().st_size > 0
    assert (tmp_path / "fox.png").stat().st_size > 0
    assert re.search(r"self +0-1 +10- +VIDEO_SPARSE_ATTN \(sparsity=0.8\)", capsys.readouterr().out)


def test_the_bundled_model_is_fine_tuned_on_one_process_and_on_two(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for part in ("train shards", "--out runs/one"):
        run("train-with-vsa.md", part)
    assert "2/2" in capsys.readouterr().err  # the progress bar
    assert Path("runs/one/loss.png").read_bytes().startswith(b"\x89PNG")
    run("train-with-vsa.md", "--out runs/two")
    found = losses(Path("runs/one"))
    assert len(found) == 2
    assert losses(Path("runs/two")) == pytest.approx(found, rel=1e-4)
    assert main(["generate", "--model", "runs/one/model", "--steps", "1"]) == 0


def test_a_wan_checkpoint_is_fine_tuned_on_one_process_and_on_two(tmp_path: Path, monkeypatch) -> None:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1, "text_dim": 8, "freq_dim": 8, "ffn_dim": 32}
    model = WanTransformer3DModel(WanConfig(**sizes, in_channels=4, out_channels=4))
    torch.nn.init.normal_(model.proj_out.weight, std=0.1)
    found = {}
    for part in ("--out runs/vsa --compile", "--out runs/vsa --compile --sequence-parallel"):
        folder = tmp_path / str(len(found))
        folder.mkdir()
        monkeypatch.chdir(folder)
        model.save(folder / "Wan2.1-T2V-1.3B" / "transformer")
        torch.manual_seed(0)
        write_shard(folder / "latents" / "00000.safetensors", torch.randn(4, 4, 4, 16, 16), torch.randn(4, 6, 8))
        write_null_text(folder / "latents", torch.zeros(6, 8))
        run("train-with-vsa.md", part)
        found[part] = losses(folder / "runs" / "vsa")
        assert WanTransformer3DModel.load(folder / "runs" / "vsa" / "model").config.has_gate
    one, two = found.values()
    assert len(one) == 2
    assert two == pytest.approx(one, rel=1e-4)
