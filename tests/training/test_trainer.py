"""The training program end to end on a tiny model: it learns, resumes exactly, stops in time, exports and draws."""

import argparse
import json

import pytest
import torch

from fastvideo.models.sprites.pipeline import SamplingSettings, SpriteVideoModel
from fastvideo.training.cli import add_arguments, run
from fastvideo.training.config import TrainConfig
from fastvideo.training.curves import held_out_losses, read_metrics
from fastvideo.training.trainer import RunOptions, Trainer, compile_blocks

TINY = {
    "attention": "dense",
    "dim": 32,
    "head_size": 16,
    "num_layers": 1,
    "text_dim": 16,
    "num_frames": 4,
    "frame_size": 16,
    "num_sprites": 8,
    "max_steps": 6,
    "batch_size": 4,
    "warmup_steps": 2,
    "precision": "float32",
}


def trainer(folder, **settings):
    run_names = ("max_seconds", "resume", "checkpoint_interval", "eval_interval")
    run_settings = {name: settings.pop(name) for name in run_names if name in settings}
    options = RunOptions(folder, torch.device("cpu"), log_interval=2, eval_clips=4, **run_settings)
    return Trainer(TrainConfig(**{**TINY, **settings}), options)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_loss_falls(tmp_path, optimizer):
    job = trainer(tmp_path, max_steps=60, batch_size=8, optimizer=optimizer, learning_rate=5e-3, ema_decay=0.5, warmup_steps=5)
    before = job.evaluate()["dense"]
    job.run()
    after = job.evaluate()["dense"]
    assert after < 0.75 * before


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole = trainer(tmp_path / "whole").run()
    first = trainer(tmp_path / "parts", checkpoint_interval=4)
    for step in range(4):
        first.train_step(step)
    first.finished_steps = 4
    first.save_checkpoint()
    second = trainer(tmp_path / "parts", resume=True)
    assert second.finished_steps == 4
    second.run()
    for name, expected, resumed in zip(whole.weights.names, whole.weights.masters, second.weights.masters, strict=True):
        assert torch.equal(expected, resumed), name
    for name, expected, resumed in zip(whole.weights.names, whole.weights.average, second.weights.average, strict=True):
        assert torch.equal(expected, resumed), name


def test_lines_of_steps_that_are_run_again_are_dropped(tmp_path):
    trainer(tmp_path, checkpoint_interval=4, max_seconds=None).run()
    lines = (tmp_path / "metrics.jsonl").read_text()
    job = trainer(tmp_path)
    for step in range(4):
        job.train_step(step)
    job.finished_steps = 4
    job.save_checkpoint()
    (tmp_path / "metrics.jsonl").write_text(lines + '{"kind": "train", "st')  # what a kill leaves behind
    trainer(tmp_path, resume=True).run()
    found, expected = read_metrics(tmp_path), [json.loads(line) for line in lines.splitlines()]
    assert [(line["kind"], line.get("step")) for line in found] == [(line["kind"], line.get("step")) for line in expected]
    assert found[-1]["loss"] == expected[-1]["loss"]


def test_a_run_with_other_settings_is_not_resumed(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no run to resume"):
        trainer(tmp_path, resume=True)
    trainer(tmp_path).save_checkpoint()
    with pytest.raises(ValueError, match=r"batch_size \(was 4, is 5\)"):
        trainer(tmp_path, resume=True, batch_size=5)


def test_the_time_limit_saves_and_stops(tmp_path):
    job = trainer(tmp_path, max_seconds=0.0, max_steps=1000).run()
    assert job.finished_steps == 1
    assert not (tmp_path / "model").exists()
    assert trainer(tmp_path, resume=True, max_steps=1000).finished_steps == 1


def test_a_run_writes_metrics_and_the_averaged_weights(tmp_path):
    job = trainer(tmp_path, eval_interval=3).run()
    metrics = read_metrics(tmp_path)
    assert [line["step"] for line in metrics if line["kind"] == "train"] == [2, 4, 6]
    assert [step for step, _ in held_out_losses(metrics)["dense"]] == [3, 6]
    assert held_out_losses(metrics)["dense"][-1][1] == pytest.approx(job.evaluate()["dense"], rel=1e-6)

    model = SpriteVideoModel.load(tmp_path / "model")
    assert model.notes["steps"] == 6
    names = job.weights.names
    stored = {f"transformer.{name}": value for name, value in model.transformer.state_dict().items()}
    stored |= {f"text_encoder.{name}": value for name, value in model.text_encoder.state_dict().items()}
    assert set(stored) == set(names)
    for name, average in zip(names, job.weights.average, strict=True):
        assert torch.equal(stored[name], average.half().float()), name


def test_bfloat16_weights_follow_their_masters(tmp_path):
    job = trainer(tmp_path, precision="bfloat16")
    job.train_step(0)
    assert job.transformer.proj_out.weight.dtype == torch.bfloat16
    assert job.transformer.scale_shift_table.dtype == torch.float32
    masters = dict(zip(job.weights.names, job.weights.masters, strict=True))
    moved = masters["transformer.proj_out.weight"]
    assert moved.abs().max() > 0
    assert torch.equal(job.transformer.proj_out.weight, moved.bfloat16())


def test_vsa_trains_through_all_its_sparsities(tmp_path):
    job = trainer(tmp_path, attention="vsa", num_frames=4, frame_size=32, max_steps=4, sparsity_ramp=0.75, dense_interval=0)
    assert [job.config.sparsity_at(step) for step in range(4)] == [0.0, 0.25, 0.5, 0.75]
    job.run()
    gates = [m for n, m in zip(job.weights.names, job.weights.masters, strict=True) if "to_gate_compress.weight" in n]
    assert all(gate.abs().max() > 0 for gate in gates)
    last = [line for line in read_metrics(tmp_path) if line["kind"] == "held_out"][-1]["loss"]
    assert set(last) == {"sparsity 0", "sparsity 0.75"}
    assert last["sparsity 0"] != last["sparsity 0.75"]
    assert SpriteVideoModel.load(tmp_path / "model").sampling.sparsity == 0.75


def test_compiled_blocks_share_their_graphs_and_change_no_number(tmp_path):
    settings = {"attention": "vsa", "frame_size": 32, "num_layers": 4, "max_steps": 4, "dense_interval": 0}
    plain = trainer(tmp_path / "plain", **settings)
    compiled = trainer(tmp_path / "compiled", **settings)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compile_blocks(compiled.transformer, backend="eager")
    counts = []
    for step in (0, 1, 3):
        assert compiled.config.sparsity_at(step) == (0.0, 0.25, 0.75, 0.75)[step]
        torch.testing.assert_close(compiled.train_step(step), plain.train_step(step), rtol=1e-5, atol=1e-6)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    # One graph for each sparsity, and one more for the first block, whose input needs no gradient.
    assert counts[-1] <= 4
    assert counts[2] - counts[1] <= 1


def test_samples_depend_on_seed_and_prompt_and_not_on_the_batch(tmp_path):
    job = trainer(tmp_path)
    for step in range(3):
        job.train_step(step)
    job.export(tmp_path / "model", torch.float32)
    model = SpriteVideoModel.load(tmp_path / "model", dtype=torch.float64)
    settings = SamplingSettings(num_steps=2, guidance_scale=2.0)
    prompts = ["red heart moving left", "green tree moving up on a black background"]
    both = model.sample(prompts, [5, 6], settings=settings)
    alone = model.sample(prompts[1:], [6], settings=settings)
    torch.testing.assert_close(both[1:], alone, atol=1e-6, rtol=0)
    assert not torch.equal(both[0], model.sample(prompts[:1], [7], settings=settings)[0])
    assert not torch.equal(both[0], model.sample(["red heart moving up"], [5], settings=settings)[0])
    with pytest.raises(ValueError, match="as many prompts as seeds"):
        model.sample(prompts, [1], settings=settings)


def test_a_folder_of_another_kind_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        SpriteVideoModel.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"format": "other"}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="got 'other'"):
        SpriteVideoModel.load(tmp_path)


def arguments(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(list(words))


def test_the_verb_trains_and_tells_when_it_ran_out_of_time(tmp_path, capsys):
    words = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    args = arguments(f"--out={tmp_path}", "--device=cpu", "--eval-clips=2", *words)
    assert run(args) == 0
    assert (tmp_path / "model" / "model.safetensors").is_file()
    args = arguments(f"--out={tmp_path / 'late'}", "--device=cpu", "--max-seconds=0", *words)
    assert run(args) == 3
    assert "step" in capsys.readouterr().err


def test_the_verb_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="needs --out"):
        run(arguments())
    with pytest.raises(ValueError, match="needs --runs NAME=FOLDER"):
        run(arguments("--plot=x.png", "--runs", "folder"))


def test_loss_curves_are_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="loss curves are drawn by matplotlib, of the extra [train]")
    trainer(tmp_path / "run").run()
    assert run(arguments(f"--plot={tmp_path / 'loss.png'}", "--runs", f"tiny={tmp_path / 'run'}")) == 0
    from PIL import Image

    with Image.open(tmp_path / "loss.png") as image:
        assert image.size == (1080, 540)
        assert len(image.convert("RGB").getcolors(1 << 20)) > 10
