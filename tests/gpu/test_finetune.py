"""Fine-tuning on CUDA: a resumed run and, on two devices, shared sequences and batches have the losses of one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastvideo.models.wan import WanConfig, WanTransformer3DModel
from fastvideo.training.finetune.data import write_shard

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SETTINGS = {"max_steps": 6, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 2, "sparsity": 0.5, "log_interval": 1}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("finetune")
    torch.manual_seed(0)
    config = WanConfig(num_attention_heads=4, attention_head_dim=64, text_dim=32, ffn_dim=256, num_layers=2)
    model = WanTransformer3DModel(config)
    torch.nn.init.normal_(model.proj_out.weight, std=0.02)
    model.save(root / "model")
    write_shard(root / "data" / "0.safetensors", torch.randn(8, 16, 8, 16, 32), torch.randn(8, 16, 32))
    return root


def train(folders: Path, out: Path, *extra: str, devices: int = 1, **changes) -> list[float]:
    options = {**SETTINGS, "checkpoint_interval": 3, "device": "cuda", **changes}
    flags = [word for name, value in options.items() for word in ("--" + name.replace("_", "-"), str(value))]
    # By number: a machine may not know its own name.
    local = ["--standalone", "--local-addr", "127.0.0.1"]
    command = [sys.executable, "-m", "torch.distributed.run", *local, "--nproc-per-node", str(devices)]
    arguments = ["train", "finetune", "--model", f"{folders}/model", "--data", f"{folders}/data", "--out", str(out), *flags]
    result = subprocess.run([*command, "-m", "fastvideo", *arguments, *extra], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.fixture(scope="module")
def one(folders: Path, tmp_path_factory) -> tuple[Path, list[float]]:
    out = tmp_path_factory.mktemp("one")
    return out, train(folders, out, precision="float32")


def test_losses_fall_and_a_resumed_run_has_the_same(folders: Path, one: tuple[Path, list[float]], tmp_path: Path) -> None:
    out, losses = one
    assert losses[-1] < losses[0]
    shutil.copytree(out, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    assert train(folders, tmp_path / "run", "--resume", precision="float32") == pytest.approx(losses, rel=1e-3)


def test_bfloat16_compiled(folders: Path, one: tuple[Path, list[float]], tmp_path: Path) -> None:
    assert train(folders, tmp_path, "--compile") == pytest.approx(one[1], rel=0.03)


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 CUDA devices")
@pytest.mark.parametrize("sequence_parallel", [1, 2])
def test_two_devices_equal_one(folders: Path, one: tuple[Path, list[float]], tmp_path: Path, sequence_parallel: int) -> None:
    losses = train(folders, tmp_path, devices=2, precision="float32", sequence_parallel=sequence_parallel)
    assert losses == pytest.approx(one[1], rel=1e-3)
