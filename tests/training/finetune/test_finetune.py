"""Fine-tuning: sharded runs equal a plain loop, two processes equal one, and a killed run goes on as if it hadn't been."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastvideo.cli import main
from fastvideo.forward_context import set_forward_context
from fastvideo.models.flow import flow_matching_loss
from fastvideo.models.wan import WanConfig, WanTransformer3DModel
from fastvideo.models.wan.checkpoint import read_json
from fastvideo.training.finetune.batches import BatchSource
from fastvideo.training.finetune.benchmark import model_flops
from fastvideo.training.finetune.config import FinetuneConfig
from fastvideo.training.finetune.data import LatentFolder, write_null_text, write_shard
from fastvideo.training.finetune.origin import Origin
from fastvideo.training.finetune.parallel import devices, load_sharded
from fastvideo.training.finetune.trainer import Finetuner, RunOptions

from .runs import losses, read, run_program

MODEL = WanConfig(
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    text_dim=8,
    freq_dim=8,
    ffn_dim=32,
    num_layers=2,
)
SETTINGS = {
    "max_steps": 4,
    "batch_size": 4,
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "ema_decay": 0.5,
    "max_grad_norm": 0.5,
    "text_dropout": 0.3,
    "sparsity": 0.5,
    "sparsity_increment": 0.25,
    "precision": "float32",
}
LATENTS = ((4, 4, 16, 16), (4, 4, 8, 16))  # four tiles, and two


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A dense checkpoint and data of two shapes, with a null text; held-out data beside."""
    root = tmp_path_factory.mktemp("finetune")
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = WanTransformer3DModel(MODEL)
    torch.nn.init.normal_(model.proj_out.weight, std=0.2)
    model.save(root / "model")
    for part, count in (("data", 6), ("held_out", 4)):
        for number, latent in enumerate(LATENTS):
            latents = torch.randn(count, *latent, generator=generator)
            write_shard(root / part / f"{number}.safetensors", latents, torch.randn(count, 5, 8, generator=generator))
    write_null_text(root / "data", torch.zeros(5, 8))
    return root


def arguments(folders: Path, out: Path, **changes) -> list[str]:
    options = {**SETTINGS, "log_interval": 1, "checkpoint_interval": 2, "device": "cpu", **changes}
    flags = [word for name, value in options.items() for word in ("--" + name.replace("_", "-"), str(value))]
    return ["train", "finetune", "--model", f"{folders}/model", "--data", f"{folders}/data", "--out", str(out), *flags]


@pytest.fixture(scope="module")
def one(folders: Path, tmp_path_factory) -> Path:
    """A run that nothing interrupts, on one process, with evaluations."""
    out = tmp_path_factory.mktemp("one")
    assert main([*arguments(folders, out), "--held-out", f"{folders}/held_out", "--eval-interval", "2"]) == 0
    return out


@pytest.fixture(scope="module")
def killed(folders: Path, tmp_path_factory) -> Path:
    """A run that was killed after its third step, one after a checkpoint."""
    out = tmp_path_factory.mktemp("killed")
    code = run_program([("kill", arguments(folders, out))], 1)[0]
    assert code == -signal.SIGKILL
    assert losses(out) != []
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-00000002"]
    return out


def test_a_run_equals_a_plain_loop(folders: Path, one: Path) -> None:
    """The same steps without FSDP, written out: losses, gradient norms and averaged weights."""
    config = FinetuneConfig(**SETTINGS)
    model = WanTransformer3DModel.load(folders / "model", attention="vsa")
    average = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    matrices = [p for name, p in model.named_parameters() if p.ndim >= 2 and "scale_shift_table" not in name]
    vectors = [p for name, p in model.named_parameters() if p.ndim < 2 or "scale_shift_table" in name]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups)
    lines = read(one)
    with devices("cpu") as on:
        source = BatchSource(LatentFolder(folders / "data", MODEL), config, on)
        for step in range(config.max_steps):
            batch, sparsity = source.part(step), (0.0, 0.25, 0.5, 0.5)[step]
            metadata = model.attention_metadata(tuple(batch.clean.shape[2:]), 0, sparsity)
            with set_forward_context(0, metadata):
                loss = flow_matching_loss(
                    model, batch.clean, batch.noise, batch.sigmas, {"encoder_hidden_states": batch.text}
                ).mean()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * (0.5 if step == 0 else 1.0)
            optimizer.step()
            optimizer.zero_grad()
            for name, parameter in model.named_parameters():
                average[name].lerp_(parameter.detach(), 0.5)
            assert lines[step]["loss"] == pytest.approx(loss.item(), rel=1e-5), step
            assert lines[step]["gradient_norm"] == pytest.approx(norm.item(), rel=1e-4), step
            assert lines[step]["sparsity"] == sparsity
    exported = WanTransformer3DModel.load(one / "model")
    assert exported.config.has_gate
    assert read_json(one / "model" / "config.json")["_sparsity"] == 0.5
    for name, parameter in exported.named_parameters():
        torch.testing.assert_close(parameter, average[name], rtol=1e-3, atol=1e-5)
    gates = [p for name, p in exported.named_parameters() if name.endswith("to_gate_compress.weight")]
    assert all(gate.abs().max() > 1e-4 for gate in gates)
    assert losses(one)[-1] < losses(one)[0]


def test_files_of_a_run(one: Path) -> None:
    assert (one / "loss.png").read_bytes().startswith(b"\x89PNG")
    held_out = read(one, "held_out")
    assert [line["step"] for line in held_out] == [2, 4]
    assert [set(line["loss"]) for line in held_out] == [{"sparsity 0", "sparsity 0.5"}] * 2
    assert held_out[1]["loss"]["sparsity 0.5"] < held_out[0]["loss"]["sparsity 0.5"]
    assert read(one, "config")[0]["num_devices"] == 1
    assert sorted(path.name for path in (one / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    rates = [line["tokens_per_second"] for line in read(one)]
    assert all(rate > 0 for rate in rates)


def test_a_killed_run_goes_on_with_the_same_losses(folders: Path, killed: Path, one: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "run"
    shutil.copytree(killed, out)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # what a kill can leave behind
    (out / "checkpoints" / "step-00000004.partial").mkdir()
    assert main(arguments(folders, out)) == 2
    assert "pass --resume" in capsys.readouterr().err
    assert main([*arguments(folders, out, learning_rate=1e-3), "--resume"]) == 2
    assert "learning_rate (was 0.01, is 0.001)" in capsys.readouterr().err
    assert main([*arguments(folders, out), "--resume"]) == 0
    assert losses(out) == losses(one)
    mine, theirs = (WanTransformer3DModel.load(path / "model").state_dict() for path in (out, one))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_line_that_a_kill_parts_is_the_same(folders: Path, one: Path, tmp_path: Path) -> None:
    """Three steps on one line, the checkpoint after the second of them."""
    changes = {"max_steps": 3, "log_interval": 3, "sparsity_ramp": 0.66}
    assert main(arguments(folders, tmp_path / "whole", **changes)) == 0
    assert run_program([("kill", arguments(folders, tmp_path / "parted", **changes))], 1) == [-signal.SIGKILL]
    assert main([*arguments(folders, tmp_path / "parted", **changes), "--resume"]) == 0
    whole, parted = (read(tmp_path / name) for name in ("whole", "parted"))
    assert [line["step"] for line in whole] == [3]
    assert whole[0]["loss"] == pytest.approx(sum(losses(one)[:3]) / 3, rel=1e-6)
    assert [line["loss"] for line in parted] == [whole[0]["loss"]]


def test_two_processes_equal_one(folders: Path, killed: Path, one: Path, tmp_path: Path) -> None:
    """Sharing sequences, sharing batches, and going on with what one process began."""
    resumed = tmp_path / "resumed"
    shutil.copytree(killed, resumed)
    evaluated = ["--held-out", f"{folders}/held_out", "--eval-interval", "4"]
    runs = [
        ("run", [*arguments(folders, tmp_path / "sequences", sequence_parallel=2, accumulation=2), *evaluated]),
        ("run", arguments(folders, tmp_path / "batches")),
        ("run", [*arguments(folders, resumed, sequence_parallel=2), "--resume"]),
    ]
    assert run_program(runs, 2) == [0, 0]
    mine, theirs = (read(path, "held_out")[-1]["loss"] for path in (tmp_path / "sequences", one))
    assert mine == pytest.approx(theirs, rel=2e-3)
    expected = WanTransformer3DModel.load(one / "model").state_dict()
    for name in ("sequences", "batches", "resumed"):
        assert losses(tmp_path / name) == pytest.approx(losses(one), rel=2e-4), name
        found = WanTransformer3DModel.load(tmp_path / name / "model").state_dict()
        for key, value in expected.items():
            # Where a gradient is nearly zero, Adam turns the order of a sum into a step of its own size.
            difference = (found[key] - value).norm() / (value.norm() + 1e-3)
            assert difference < 0.02, f"{name}: {key}"


def test_bfloat16_compiled_without_recomputation(folders: Path, one: Path, tmp_path: Path) -> None:
    """Another way of computing a step gives nearly the losses of float32."""
    torch._dynamo.reset()
    config = FinetuneConfig(**{**SETTINGS, "precision": "bfloat16", "max_steps": 2})
    with devices("cpu") as on:
        model = load_sharded(Origin.open(folders / "model"), "vsa", on, config.precision, compiler="eager")
        options = RunOptions(tmp_path, checkpointing=False, compiled=True, log_interval=1, eval_interval=1, eval_batches=1)
        data = LatentFolder(folders / "data", MODEL)
        # One graph a sparsity and shape would be one too many if no room were made.
        with torch._dynamo.config.patch(recompile_limit=1):
            Finetuner(config, options, model, on, data, held_out=data).run()
    assert losses(tmp_path) == pytest.approx(losses(one)[:2], rel=0.02)
    exported = WanTransformer3DModel.load(tmp_path / "model")
    assert exported.scale_shift_table.dtype == torch.float32
    assert exported.proj_out.weight.dtype == torch.bfloat16


def test_bfloat16_narrows_what_the_model_narrows(folders: Path) -> None:
    """Timesteps, rotary tables, the timestep embedder and the modulation tables stay wide, as in a model loaded in bfloat16."""
    video, text = torch.randn(2, *LATENTS[0]).bfloat16(), torch.randn(2, 5, 8).bfloat16()
    timestep = torch.tensor([993.7, 17.3])
    narrowed = WanTransformer3DModel.load(folders / "model", attention="vsa", dtype=torch.bfloat16)
    with torch.no_grad(), set_forward_context(0, narrowed.attention_metadata(LATENTS[0][1:], 0, 0.5)):
        expected = narrowed(video, timestep, text)
        with devices("cpu") as on:
            found = load_sharded(Origin.open(folders / "model"), "vsa", on, "bfloat16")(video, timestep, text)
    assert torch.equal(found, expected)


def test_a_dense_run_stops_in_time_and_resumes(folders: Path, tmp_path: Path) -> None:
    changes = {"attention": "dense", "max_steps": 3, "text_dropout": 0}
    assert main([*arguments(folders, tmp_path, **changes), "--max-seconds", "0"]) == 3
    assert losses(tmp_path) == [pytest.approx(losses(tmp_path)[0])]
    assert not (tmp_path / "model").exists()
    assert main([*arguments(folders, tmp_path, **changes), "--resume"]) == 0
    assert len(losses(tmp_path)) == 3
    assert WanTransformer3DModel.load(tmp_path / "model").config.attention == "dense"


REFUSALS = {
    "no data": (["--data", "nowhere"], "nowhere is no folder"),
    "no model": (["--model", "nowhere"], "config.json is missing"),
    "nothing to resume": (["--resume"], "there is no run to resume"),
    "batch": (["--batch-size", "7"], "needs so many examples of one shape; the data has at most 6"),
    "parts": (["--accumulation", "3"], "batch_size=4 can't be divided over 1 groups of devices in 3 parts"),
    "devices": (["--sequence-parallel", "2"], "1 processes can't be divided into groups of sequence_parallel=2"),
    "range": (["--sparsity", "1"], "sparsity must lie in [0, 1), got 1.0"),
    "infinite": (["--learning-rate", "inf"], "learning_rate must be positive and finite"),
    "interval": (["--log-interval", "0"], "--log-interval of at least 1"),
    "benchmark": (["--benchmark", "0"], "at least one step"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(folders: Path, tmp_path: Path, capsys, name: str) -> None:
    extra, text = REFUSALS[name]
    assert main([*arguments(folders, tmp_path / "run"), *extra]) == 2
    assert re.sub(r"\s+", " ", capsys.readouterr().err).find(text) >= 0
    assert not torch.distributed.is_initialized()


def test_a_whole_pipeline_is_told_from_its_model(folders: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(folders / "model", tmp_path / "pipeline" / "transformer")
    assert main([*arguments(folders, tmp_path / "run"), "--model", str(tmp_path / "pipeline")]) == 2
    assert f"give the model in it, {tmp_path / 'pipeline' / 'transformer'}" in capsys.readouterr().err


def test_text_dropout_needs_a_null_text(folders: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(folders / "data", tmp_path / "data", ignore=shutil.ignore_patterns("null*"))
    assert main([*arguments(folders, tmp_path / "run"), "--data", str(tmp_path / "data")]) == 2
    assert "write_null_text" in capsys.readouterr().err


def test_benchmark_prints_rates(capsys) -> None:
    command = ["train", "finetune", "--benchmark", "1", "--shape", "tiny", "--latent", "4", "16", "16", "--device", "cpu"]
    settings = ["--batch-size", "2", "--sparsity", "0.5", "--precision", "float32", "--peak-tflops", "2"]
    assert main([*command, *settings, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["num_tokens"] == 4 * 8 * 8
    assert [(row["attention"], row["sparsity"]) for row in report["rows"]] == [("dense", 0.0), ("vsa", 0.5)]
    for row in report["rows"]:
        assert row["tokens_per_second"] * row["seconds_per_step"] == pytest.approx(2 * 256)
        assert row["share_of_peak"] == pytest.approx(row["tflops"] / 2)
    assert main([*command, *settings]) == 0
    assert re.search(r"VSA is [\d.]+ times as fast", capsys.readouterr().out)


def test_model_flops_equal_those_that_torch_counts() -> None:
    model = WanTransformer3DModel(MODEL)
    video, text = torch.randn(1, 4, 4, 16, 16), torch.randn(1, 5, 8)
    # Fused kernels on a CPU aren't counted.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(video, torch.tensor([500.0]), text).sum().backward()
    # What the two count differently: the timestep's layers, and gradients that no parameter needs.
    assert counter.get_total_flops() == pytest.approx(model_flops(MODEL, 256, 5, 256), rel=0.02)
