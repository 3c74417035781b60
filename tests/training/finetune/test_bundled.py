"""Fine-tuning the bundled model: shards of sprites, its coordinates, one process and two, a kill, and what is written."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path

import pytest
import torch

from fastvideo.cli import main
from fastvideo.forward_context import set_forward_context
from fastvideo.models.flow import flow_matching_loss
from fastvideo.models.sprites.atlas import load_atlas
from fastvideo.models.sprites.pipeline import SamplingSettings, SpriteVideoModel, bundled_model
from fastvideo.models.sprites.prompts import tokenize
from fastvideo.models.sprites.scenes import render, sample_prompts, scenes_of_prompts
from fastvideo.models.text import WordEncoder
from fastvideo.models.wan import WanConfig, WanTransformer3DModel
from fastvideo.training.config import TrainConfig
from fastvideo.training.finetune.batches import BatchSource
from fastvideo.training.finetune.config import FinetuneConfig
from fastvideo.training.finetune.data import LatentFolder, write_shard
from fastvideo.training.finetune.origin import Origin
from fastvideo.training.finetune.parallel import devices, load_sharded
from fastvideo.training.finetune.sprites import write_sprite_shards
from fastvideo.training.finetune.trainer import Finetuner, RunOptions

from .runs import losses, run_program

SETTINGS = {
    "max_steps": 3,
    "batch_size": 2,
    "learning_rate": 1e-3,
    "warmup_steps": 1,
    "ema_decay": 0.5,
    "sparsity": 0.5,
    "sparsity_increment": 0.5,
    "sparsity_ramp": 0.3,
    "text_dropout": 0.3,
    "precision": "float32",
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Clips of 8 × 16 × 16, which are two tiles of tokens."""
    folder = tmp_path_factory.mktemp("sprites") / "clips"
    command = ["train", "shards", "--out", str(folder), "--clips", "6", "--num-frames", "8", "--frame-size", "16"]
    assert main(command) == 0
    return folder


def arguments(clips: Path, out: Path, **changes) -> list[str]:
    options = {**SETTINGS, "log_interval": 1, "checkpoint_interval": 2, "device": "cpu", **changes}
    flags = [word for name, value in options.items() for word in ("--" + name.replace("_", "-"), str(value))]
    return ["train", "finetune", "--model", "bundled", "--data", str(clips), "--out", str(out), *flags]


@pytest.fixture(scope="module")
def one(clips: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("one")
    assert main(arguments(clips, out)) == 0
    return out


def test_shards_hold_clips_and_the_models_own_embeddings(clips: Path, tmp_path: Path, capsys) -> None:
    model = SpriteVideoModel.load(bundled_model())
    folder = LatentFolder(clips, model.transformer.config, num_appended=3)
    assert folder.shapes == [((3, 8, 16, 16), (7, 128))] * 6
    assert torch.equal(folder.null_text, model.embed([None])[0])
    write_sprite_shards(tmp_path / "held", model, 5, split="held_out", num_frames=1, frame_size=8, shard_size=2)
    held = LatentFolder(tmp_path / "held", model.transformer.config, num_appended=3)
    texts = [held.read(index).text for index in range(len(held))]
    assert len(texts) == 5
    assert not any(torch.equal(texts[0], text) for text in texts[1:])
    assert main(["train", "shards", "--out", str(clips)]) == 2
    assert "holds shards already" in capsys.readouterr().err
    assert main(["train", "shards", "--out", str(tmp_path / "none"), "--clips", "0"]) == 2
    assert "at least one clip" in capsys.readouterr().err
    assert main(["train", "shards"]) == 2
    assert "needs --out FOLDER" in capsys.readouterr().err


def test_a_shards_text_and_clip_belong_together(tmp_path: Path, monkeypatch) -> None:
    """With known scenes, rows are those scenes' clips and embeddings."""
    model = SpriteVideoModel.load(bundled_model())
    prompts = sample_prompts(4, "held_out", seed=3)
    scenes = scenes_of_prompts(prompts, torch.Generator().manual_seed(0))
    monkeypatch.setattr("fastvideo.training.finetune.sprites.ScenePool.sample", lambda *_: scenes)
    write_sprite_shards(tmp_path, model, 4, num_frames=2, frame_size=16)
    folder = LatentFolder(tmp_path, model.transformer.config, num_appended=3)
    with torch.no_grad():
        text = model.text_encoder(tokenize(prompts))
    for index, clip in enumerate(render(scenes, load_atlas(), num_frames=2, frame_size=16)):
        assert torch.equal(folder.read(index).latent, clip)
        torch.testing.assert_close(folder.read(index).text, text[index])


def test_the_first_loss_is_the_bundled_models_own(clips: Path, one: Path) -> None:
    """Written out with the model's own velocity, which appends coordinates; without them it is another."""
    model = SpriteVideoModel.load(bundled_model())
    config = FinetuneConfig(**SETTINGS)
    with devices("cpu") as on:
        batch = BatchSource(LatentFolder(clips, model.transformer.config, 3), config, on).part(0)
    metadata = model.transformer.attention_metadata((8, 16, 16), 0, 0.0)
    text = {"encoder_hidden_states": batch.text}

    def without(x, timestep, **conditioning):
        return model.transformer(torch.cat([x, torch.zeros_like(x)], dim=1), timestep, **conditioning)

    with torch.no_grad(), set_forward_context(0, metadata):
        expected = flow_matching_loss(model.velocity, batch.clean, batch.noise, batch.sigmas, text).mean().item()
        other = flow_matching_loss(without, batch.clean, batch.noise, batch.sigmas, text).mean().item()
    assert losses(one)[0] == pytest.approx(expected, rel=1e-5)
    assert abs(other / expected - 1) > 1e-3


def test_the_result_is_a_model_of_the_bundled_kind(one: Path) -> None:
    before, after = SpriteVideoModel.load(bundled_model()), SpriteVideoModel.load(one / "model")
    assert after.sampling == dataclasses.replace(before.sampling, sparsity=0.5)
    assert after.notes["finetuning"]["max_steps"] == 3
    assert after.notes["steps"] == before.notes["steps"]
    for name, weight in before.text_encoder.state_dict().items():
        assert torch.equal(after.text_encoder.state_dict()[name], weight), name
    moved = {name: after.transformer.get_parameter(name) - weight for name, weight in before.transformer.named_parameters()}
    assert all(0 < difference.abs().max() < 0.01 for difference in moved.values())
    clip = dataclasses.replace(after, video_tyx=(8, 16, 16)).sample(
        ["red heart moving left"], [0], settings=dataclasses.replace(after.sampling, num_steps=1)
    )
    assert torch.isfinite(clip).all()
    assert json.loads((one / "run.json").read_text())["model"] == str(bundled_model().resolve())


def test_two_processes_equal_one_and_a_killed_run_goes_on(clips: Path, one: Path, tmp_path: Path) -> None:
    """Sharing batches, sharing sequences, and exactly the same losses after a kill."""
    assert run_program([("kill", arguments(clips, tmp_path / "killed"))], 1) == [-signal.SIGKILL]
    assert sorted(path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()) == ["step-00000002"]
    assert main([*arguments(clips, tmp_path / "killed"), "--resume"]) == 0
    assert losses(tmp_path / "killed") == losses(one)
    runs = [
        ("run", arguments(clips, tmp_path / "batches")),
        ("run", arguments(clips, tmp_path / "sequences", sequence_parallel=2)),
    ]
    assert run_program(runs, 2) == [0, 0]
    expected = SpriteVideoModel.load(one / "model").transformer.state_dict()
    for name in ("killed", "batches", "sequences"):
        assert losses(tmp_path / name) == pytest.approx(losses(one), rel=1e-4), name
        found = SpriteVideoModel.load(tmp_path / name / "model").transformer.state_dict()
        for key, value in expected.items():
            tolerance = 0 if name == "killed" else 0.02 * value.norm() + 1e-4
            assert (found[key] - value).norm() <= tolerance, f"{name}: {key}"


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """An untrained dense model of the bundled kind."""
    torch.manual_seed(0)
    config = TrainConfig(attention="dense", dim=32, head_size=16, num_layers=1, text_dim=16, num_frames=2, frame_size=16)
    model = SpriteVideoModel(WanTransformer3DModel(config.transformer_config()), WordEncoder(config.text_config()))
    torch.nn.init.normal_(model.transformer.proj_out.weight, std=0.1)
    folder = tmp_path_factory.mktemp("dense")
    dataclasses.replace(model, video_tyx=(2, 16, 16), sampling=SamplingSettings(num_steps=2)).save(folder, torch.float32)
    return folder


def test_a_dense_model_gets_gates_of_zero_and_gates_are_not_dropped(dense: Path, tmp_path: Path, capsys) -> None:
    origin = Origin.open(dense)
    sparse, before = origin.load("vsa"), SpriteVideoModel.load(dense).transformer.state_dict()
    assert sparse.config.has_gate
    for name, weight in sparse.state_dict().items():
        assert torch.equal(weight, before.get(name, torch.zeros_like(weight))), name
    data, out = tmp_path / "data", tmp_path / "run"
    assert main(["train", "shards", "--model", str(dense), "--out", str(data), "--clips", "2"]) == 0
    command = arguments(data, out, max_steps=1, precision="bfloat16", attention="vsa")
    assert main([*command, "--model", str(dense)]) == 0
    result = SpriteVideoModel.load(out / "model")
    assert result.transformer.config.has_gate
    assert result.sampling.sparsity == 0.5
    capsys.readouterr()
    assert main(arguments(data, tmp_path / "other", attention="dense")) == 2
    assert "text [N, L, 128], got [2, 7, 16]" in capsys.readouterr().err
    with pytest.raises(ValueError, match="which a dense model has no place for"):
        Origin.open("bundled").load("dense")


def test_shards_are_for_models_with_a_text_encoder(tmp_path: Path, capsys) -> None:
    small = WanConfig(num_attention_heads=1, attention_head_dim=6, text_dim=4, freq_dim=4, ffn_dim=4, num_layers=1)
    WanTransformer3DModel(small).save(tmp_path / "wan")
    assert main(["train", "shards", "--model", str(tmp_path / "wan"), "--out", str(tmp_path / "x")]) == 2
    assert "has no text encoder of sprites' prompts" in capsys.readouterr().err


def test_a_condition_stands_behind_the_noisy_latents(tmp_path: Path) -> None:
    """A model of image to video: its loss is that of a plain call with the channels joined."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 8, "freq_dim": 8, "ffn_dim": 32, "num_layers": 1}
    model = WanTransformer3DModel(WanConfig(in_channels=9, out_channels=4, **sizes))
    torch.nn.init.normal_(model.proj_out.weight, std=0.2)
    model.save(tmp_path / "model")
    write_shard(
        tmp_path / "data" / "0.safetensors", torch.randn(2, 4, 2, 4, 4), torch.randn(2, 5, 8), torch.randn(2, 5, 2, 4, 4)
    )
    origin = Origin.open(tmp_path / "model")
    config = FinetuneConfig(attention="dense", max_steps=1, batch_size=2, precision="float32")
    data = LatentFolder(tmp_path / "data", origin.config)
    with devices("cpu") as on:
        batch = BatchSource(data, config, on).part(0)
        sharded = load_sharded(origin, "dense", on, "float32")
        Finetuner(config, RunOptions(tmp_path / "run", log_interval=1), sharded, on, data, origin=origin).run()

    def joined(x, timestep, **conditioning):
        return model(torch.cat([x, batch.condition], dim=1), timestep, **conditioning)

    with torch.no_grad():
        text = {"encoder_hidden_states": batch.text}
        expected = flow_matching_loss(joined, batch.clean, batch.noise, batch.sigmas, text).mean().item()
    assert losses(tmp_path / "run")[0] == pytest.approx(expected, rel=1e-5)
    assert WanTransformer3DModel.load(tmp_path / "run" / "model").config == origin.config
