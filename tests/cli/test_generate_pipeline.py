"""`fastvideo generate --model DIR` on a tiny whole pipeline: videos, policies, gates, ranks, and broken folders."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file

from fastvideo.cli import main
from fastvideo.cli.media import contact_sheet
from fastvideo.cli.pipeline import _few_step_scheduler, parse_policy
from fastvideo.cli.pipeline_folder import load_pipeline, read_pipeline_folder
from fastvideo.models.wan import WanTransformer3DModel
from fastvideo.testing import meeting_point

from .tiny_pipelines import WEIGHTS, components, ltx, sheet

PROMPT = "a fox runs over the snow"
SIZE = ["--size", "128x32", "--frames", "9"]  # latents of 3 × 4 × 16, a token grid of 3 × 2 × 8 in two tiles


def read_mp4(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(int)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A whole pipeline with random weights and a tokenizer of a few words."""
    path = tmp_path_factory.mktemp("pipeline") / "tiny-wan"
    WanPipeline(**components()).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def gated(folder: Path, tmp_path_factory) -> Path:
    """The same as a checkpoint of the FastWan kind: gates among the weights, and diffusers' configuration."""
    path = tmp_path_factory.mktemp("gated") / "tiny-fastwan"
    shutil.copytree(folder, path)
    weights = load_file(path / "transformer" / WEIGHTS)
    for block in range(2):
        weights[f"blocks.{block}.to_gate_compress.weight"] = torch.randn(24, 24)
        weights[f"blocks.{block}.to_gate_compress.bias"] = torch.randn(24)
    save_file(weights, path / "transformer" / WEIGHTS, metadata={"format": "pt"})
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps({**index, "_class_name": "WanDMDPipeline"}))
    return path


def generate(model: Path, out: Path, *arguments: str, steps: bool = True) -> int:
    command = ["generate", "--device", "cpu", "--model", str(model), "--out", str(out), "--prompt", PROMPT, *SIZE]
    return main([*command, *(["--steps", "3"] if steps else []), *arguments])


def diffusers_sheet(path: Path, **arguments) -> torch.Tensor:
    """The contact sheet of what diffusers alone makes of a folder."""
    pipe = WanPipeline.from_pretrained(path, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    settings = {"height": 32, "width": 128, "num_frames": 9, "num_inference_steps": 3, "output_type": "np"}
    generator = torch.Generator().manual_seed(arguments.pop("seed", 0))
    video = torch.from_numpy(pipe(PROMPT, **{**settings, **arguments}, generator=generator).frames[0])
    return contact_sheet((video * 255).round().to(torch.uint8)).int()


def test_the_video_is_that_of_diffusers(folder: Path, tmp_path: Path, capsys) -> None:
    assert generate(folder, tmp_path / "a.mp4", "--seed", "3") == 0
    printed = capsys.readouterr()
    assert "3/3" in printed.err  # the progress bar
    assert "this system's attention: " in printed.out
    assert re.search(r"self +0-1 +all +auto", printed.out)
    assert (tmp_path / "a.png").is_file()
    assert read_mp4(tmp_path / "a.mp4").shape == (9, 32, 128, 3)
    found, expected, other = sheet(tmp_path / "a.mp4"), diffusers_sheet(folder, seed=3), diffusers_sheet(folder, seed=4)
    assert (found - expected).abs().max() <= 1
    assert (found - other).abs().max() > 20


def test_compare_policies_and_options(folder: Path, tmp_path: Path, capsys) -> None:
    assert generate(folder, tmp_path / "same.mp4", "--compare") == 0
    assert read_mp4(tmp_path / "same.mp4").shape == (9, 32, 256, 3)
    assert float(re.search(r"mean ([0-9.]+)", capsys.readouterr().out)[1]) == 0
    policy = {
        "rules": [{"role": "self", "steps": "1-", "backend": "VIDEO_SPARSE_ATTN", "sparsity": 0.5, "tile_tyx": [1, 2, 2]}]
    }
    (tmp_path / "policy.json").write_text(json.dumps(policy))
    for text in (json.dumps(policy), str(tmp_path / "policy.json")):
        extra = ["--negative-prompt", "a cat", "--guidance", "2", "--fps", "8"]
        assert generate(folder, tmp_path / "sparse.mp4", "--compare", "--policy", text, *extra) == 0
        printed = capsys.readouterr().out
        assert re.search(r"self +0-1 +1- +VIDEO_SPARSE_ATTN \(sparsity=0.5", printed)
        assert float(re.search(r"mean ([0-9.]+)", printed)[1]) > 0
    assert generate(folder, tmp_path / "vsa.mp4", "--sparsity", "0.5") == 0
    assert "VIDEO_SPARSE_ATTN (sparsity=0.5)" in capsys.readouterr().out


def test_another_familys_pipeline(tmp_path: Path, capsys) -> None:
    ltx().save_pretrained(tmp_path / "ltx")
    assert generate(tmp_path / "ltx", tmp_path / "same.mp4", "--compare") == 0
    assert float(re.search(r"mean ([0-9.]+)", capsys.readouterr().out)[1]) == 0
    size = ["--size", "128x64", "--sparsity", "0.5"]
    assert generate(tmp_path / "ltx", tmp_path / "sparse.mp4", "--compare", *size) == 0
    assert float(re.search(r"mean ([0-9.]+)", capsys.readouterr().out)[1]) > 0


def test_gates_are_kept(folder: Path, gated: Path, tmp_path: Path, capsys) -> None:
    """Gates run; diffusers alone drops them and makes another video."""
    expected = diffusers_sheet(folder)
    assert generate(gated, tmp_path / "a.mp4", "--compare", "--sparsity", "0.5") == 0
    printed = capsys.readouterr().out
    assert "VIDEO_SPARSE_ATTN with gates, sparsity 0.5" in printed
    assert "sparsity 0: " in printed
    assert float(re.search(r"mean ([0-9.]+)", printed)[1]) > 0
    assert generate(gated, tmp_path / "all.mp4", "--sparsity", "0") == 0
    assert (sheet(tmp_path / "all.mp4") - expected).abs().max() > 20
    # With gates of zero, sparsity 0 is dense attention again.
    weights = load_file(gated / "transformer" / WEIGHTS)
    weights = {name: x * (0 if "gate" in name else 1) for name, x in weights.items()}
    shutil.copytree(gated, tmp_path / "zero")
    save_file(weights, tmp_path / "zero" / "transformer" / WEIGHTS, metadata={"format": "pt"})
    assert generate(tmp_path / "zero", tmp_path / "b.mp4", "--sparsity", "0") == 0
    assert (sheet(tmp_path / "b.mp4") - expected).abs().max() <= 1
    assert generate(gated, tmp_path / "c.mp4", "--timesteps", "1000", "757", "522", "--guidance", "1", steps=False) == 0
    assert "sparsity 0.8: " in capsys.readouterr().out
    config = json.loads((tmp_path / "zero" / "transformer" / "config.json").read_text())
    (tmp_path / "zero" / "transformer" / "config.json").write_text(json.dumps({**config, "_sparsity": 0.25}))
    assert generate(tmp_path / "zero", tmp_path / "d.mp4") == 0
    assert "sparsity 0.25: " in capsys.readouterr().out
    assert generate(gated, tmp_path / "d.mp4", "--backend", "TORCH_SDPA") == 2
    assert "leave out --backend" in capsys.readouterr().err


def test_gated_checkpoints_load(gated: Path) -> None:
    model = WanTransformer3DModel.load(gated / "transformer")
    assert model.config.has_gate
    stored = load_file(gated / "transformer" / WEIGHTS)
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="gates of Video Sparse Attention, which a dense model has no place for"):
        WanTransformer3DModel.load(gated / "transformer", attention="dense")


def test_few_steps_predict_and_add_noise_again() -> None:
    """The steps of a distilled model, against the formula."""
    levels = [1.0, 0.757, 0.522, 0.0]
    scheduler = _few_step_scheduler([1000.0, 757.0, 522.0])
    scheduler.set_timesteps(3, device="cpu")
    scheduler.set_begin_index(0)
    assert scheduler.timesteps.tolist() == pytest.approx([1000, 757, 522])
    found = expected = torch.randn(1, 4, 5)
    for step, velocity in enumerate(torch.randn(3, 1, 4, 5)):
        torch.manual_seed(step)
        found = scheduler.step(velocity, scheduler.timesteps[step], found, return_dict=False)[0]
        torch.manual_seed(step)
        clean = expected - levels[step] * velocity
        expected = (1 - levels[step + 1]) * clean + levels[step + 1] * torch.randn(1, 4, 5)
        torch.testing.assert_close(found, expected)


BREAKAGES = {
    "no folder": (lambda path: shutil.rmtree(path), "is no folder|is missing"),
    "no index": (lambda path: (path / "model_index.json").unlink(), "model_index.json is missing"),
    "broken index": (lambda path: (path / "model_index.json").write_text("{"), "model_index.json is no JSON"),
    "no class": (lambda path: (path / "model_index.json").write_text("{}"), "has no _class_name"),
    "no vae": (lambda path: shutil.rmtree(path / "vae"), r"vae/ \(AutoencoderKLWan\) is missing"),
    "no weights": (lambda path: (path / "vae" / WEIGHTS).unlink(), "vae/ .* holds no safetensors file"),
    "no config": (lambda path: (path / "transformer" / "config.json").unlink(), "transformer/config.json is missing"),
    "no tokenizer": (lambda path: (path / "tokenizer" / "tokenizer.json").unlink(), "holds none of tokenizer.json"),
    "no scheduler's config": (
        lambda path: (path / "scheduler" / "scheduler_config.json").unlink(),
        "scheduler/scheduler_config.json is missing",
    ),
    "no tokenizer's config": (
        lambda path: (path / "tokenizer" / "tokenizer_config.json").unlink(),
        "tokenizer/tokenizer_config.json is missing",
    ),
    "broken tokenizer": (
        lambda path: (path / "tokenizer" / "tokenizer.json").write_text("{"),
        "tokenizer.json is no JSON",
    ),
    "no list for an object": (
        lambda path: (path / "scheduler" / "scheduler_config.json").write_text("[]"),
        "scheduler_config.json must hold a JSON object",
    ),
    "a component that is null": (
        lambda path: reindex(path, {"transformer": [None, None]}),
        "model_index.json names no transformer or transformer_2",
    ),
    "a class that isn't there": (
        lambda path: reindex(path, {"vae": ["diffusers", "AutoencoderOfNobody"]}),
        "can't be loaded as a WanPipeline .*AutoencoderOfNobody",
    ),
    "a folder for a file": (
        lambda path: [(path / "vae" / WEIGHTS).unlink(), (path / "vae" / WEIGHTS).mkdir()],
        "is no whole safetensors file",
    ),
    "numbers for shards": (
        lambda path: (path / "transformer" / f"{WEIGHTS}.index.json").write_text('{"weight_map": {"x": 3}}'),
        "has no weight_map from weights to files",
    ),
    "another model's text encoder": (
        lambda path: shutil.copy(path / "vae" / WEIGHTS, path / "text_encoder" / "model.safetensors"),
        r"weights of UMT5EncoderModel are missing: encoder\.",
    ),
    "a text encoder with a weight too many": (
        lambda path: add_weight(path / "text_encoder" / "model.safetensors", "encoder.block.7.extra.weight"),
        r"weights of UMT5EncoderModel would be dropped.*encoder\.block\.7\.extra\.weight",
    ),
    "a VAE with a weight too many": (
        lambda path: rewrite(path, lambda weights: {**weights, "decoder.extra": torch.zeros(2)}, "vae"),
        r"weights of AutoencoderKLWan would be dropped.*decoder\.extra",
    ),
    "half a file": (
        lambda path: (path / "transformer" / WEIGHTS).write_bytes((path / "transformer" / WEIGHTS).read_bytes()[:-100]),
        "is no whole safetensors file",
    ),
    "a shard missing": (
        lambda path: (path / "transformer" / f"{WEIGHTS}.index.json").write_text('{"weight_map": {"x": "1-of-2.safetensors"}}'),
        "lacks 1-of-2.safetensors",
    ),
    "weights too many": (
        lambda path: rewrite(path, lambda weights: {**weights, "blocks.0.extra.weight": torch.zeros(2)}),
        r"weights of WanTransformer3DModel would be dropped.*blocks\.0\.extra\.weight",
    ),
    "weights too few": (
        lambda path: rewrite(path, lambda weights: {n: x for n, x in weights.items() if n != "proj_out.bias"}),
        r"weights of WanTransformer3DModel are missing: proj_out\.bias",
    ),
}


def reindex(path: Path, changes: dict) -> None:
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps({**index, **changes}))


def add_weight(file: Path, name: str) -> None:
    save_file({**load_file(file), name: torch.zeros(2)}, file, metadata={"format": "pt"})


def rewrite(path: Path, change, component: str = "transformer") -> None:
    file = path / component / WEIGHTS
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def test_weights_that_a_class_says_it_does_not_need_are_named(tmp_path: Path) -> None:
    ltx().save_pretrained(tmp_path / "ltx")
    add_weight(tmp_path / "ltx" / "text_encoder" / "model.safetensors", "decoder.block.0.weight")
    folder = read_pipeline_folder(tmp_path / "ltx")
    with pytest.warns(
        UserWarning, match=r"text_encoder: T5EncoderModel is loaded without weights .*: decoder\.block\.0\.weight"
    ):
        load_pipeline(folder, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("name", BREAKAGES)
def test_broken_folders_are_named(folder: Path, tmp_path: Path, capsys, name: str) -> None:
    breakage, text = BREAKAGES[name]
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    breakage(copy)
    assert generate(copy, tmp_path / "x.mp4") == 2
    assert re.search(text, capsys.readouterr().err)
    assert not (tmp_path / "x.mp4").exists()


def test_everything_that_is_missing_is_said_at_once(folder: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("vae", "scheduler"))
    assert generate(tmp_path / "copy", tmp_path / "x.mp4") == 2
    error = capsys.readouterr().err
    assert "vae/" in error
    assert "scheduler/" in error


REFUSALS = {
    "size": (["--size", "64"], "expected --size WIDTHxHEIGHT"),
    "width": (["--size", "100x32"], "a width that is a multiple of 16, got 100; take 96 or 112"),
    "frames between": (["--frames", "11"], "take 9 or 13"),
    "frames": (["--frames", "0"], "--frames of at least 1"),
    "two wishes": (["--backend", "TORCH_SDPA", "--sparsity", "0.5"], "--backend and --sparsity all say"),
    "scale": (["--scale", "2"], "--scale is for the bundled model"),
    "policy": (["--policy", "{"], "--policy is no JSON object"),
    "policy file": (["--policy", "nowhere.json"], "nowhere.json is no file"),
    "policy field": (["--policy", '{"rule": []}'], "a policy has no field 'rule'; it has default, rules"),
    "rule field": (["--policy", '{"rules": [{"backed": "TORCH_SDPA"}]}'], "a rule has no field 'backed'"),
    "rule without backend": (["--policy", '{"rules": [{"role": "self"}]}'], "a rule needs 'backend'"),
    "rule beyond the run": (
        [
            "--compare",
            "--policy",
            '{"rules": [{"role": "self", "steps": "3-", "backend": "VIDEO_SPARSE_ATTN", "sparsity": 0.5}]}',
        ],
        "the run has 3 steps, and rule 0, Rule(role='self', steps='3-'",
    ),
    "backend": (["--policy", "TORCH_SPDA"], "did you mean TORCH_SDPA"),
    "backend that can't": (["--backend", "FLASH_ATTN"], "device 'cpu' is not supported"),
    "timesteps": (["--timesteps", "500", "900"], "--timesteps that fall"),
    "steps twice": (["--timesteps", "900"], "leave out --steps"),
    "frames per second": (["--fps", "0"], "--fps of at least 1"),
    "sparsity": (["--sparsity", "1"], "--sparsity in [0, 1), got 1.0"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(folder: Path, tmp_path: Path, capsys, name: str) -> None:
    arguments, text = REFUSALS[name]
    assert generate(folder, tmp_path / "x.mp4", *arguments) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "x.mp4").exists()


def test_a_pipelines_options_are_refused_for_the_bundled_model(capsys) -> None:
    assert main(["generate", "--frames", "9"]) == 2
    assert "--frames is for diffusers pipelines" in capsys.readouterr().err


def test_policies_are_read() -> None:
    policy = parse_policy("flash_attn")
    assert (policy.default, policy.rules) == ("FLASH_ATTN", ())
    policy = parse_policy('{"default": "TORCH_SDPA", "rules": [{"layers": "0-3", "backend": "FLASH_ATTN"}]}')
    assert policy.default == "TORCH_SDPA"
    assert policy.rules[0].layer_intervals == ((0, 4),)


@pytest.fixture
def meeting_points() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def test_two_ranks_make_the_same_video(folder: Path, gated: Path, tmp_path: Path, meeting_points) -> None:
    """Both kinds of transformers share their tokens; each command joins and leaves its group."""
    runs = {"dense": (folder, ()), "sparse": (gated, ("--sparsity", "0.5"))}
    code = ["import os", "from fastvideo.cli import main"]
    for name, (model, extra) in runs.items():
        assert generate(model, tmp_path / f"{name}.mp4", *extra) == 0
        place = meeting_points.enter_context(meeting_point())
        command = ["generate", "--device", "cpu", "--model", str(model), "--out", str(tmp_path / f"{name}-2.mp4")]
        arguments = [*command, "--prompt", PROMPT, *SIZE, "--steps", "3", *extra]
        code += [f"os.environ |= {place}", f"assert main({arguments!r}) == 0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", "\n".join(code)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        printed = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        [rank.kill() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert [text.count("wrote") for text in printed] == [2, 0]
    for name in runs:
        assert (sheet(tmp_path / f"{name}.mp4") - sheet(tmp_path / f"{name}-2.mp4")).abs().max() <= 1
