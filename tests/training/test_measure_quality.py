"""The program that measures quality: its rates for a model that is perfect and for one that knows nothing."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from fastvideo.models.sprites.atlas import load_atlas
from fastvideo.models.sprites.pipeline import SamplingSettings, SpriteVideoModel
from fastvideo.models.sprites.scenes import render, sample_prompts, scenes_of_prompts
from fastvideo.models.text import WordEncoder
from fastvideo.models.wan import WanTransformer3DModel
from fastvideo.training.config import TrainConfig


@pytest.fixture(scope="module")
def program():
    path = Path(__file__).parents[2] / "scripts" / "measure_quality.py"
    spec = importlib.util.spec_from_file_location("measure_quality", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class PerfectModel:
    """Renders what is asked for, but at sparsity 0.75 only the first sprite."""

    def sample(self, prompts, seeds, *, settings):
        assert len(prompts) == len(seeds)
        batch = scenes_of_prompts(prompts, torch.Generator().manual_seed(seeds[0]))
        if settings.sparsity == 0.75:
            codes = batch.codes.clone()
            codes[:, 2:4] = -1
            batch = dataclasses.replace(batch, codes=codes)
        return render(batch, load_atlas(), num_frames=4)


def test_rates_of_a_perfect_model(program):
    scenes = sample_prompts(20, "held_out", seed=0)
    reports = program.judge_prompts(PerfectModel(), scenes, SamplingSettings(), 8, 0)
    summary = program.summarize(scenes, reports)
    assert summary["all"] == {"rate": 1.0, "standard_error": 0.0, "prompts": 20}
    assert summary["1 sprite"]["prompts"] == summary["2 sprites"]["prompts"] == 10
    assert summary["failures"] == []


def test_rates_by_condition_show_what_is_missing(program):
    scenes = sample_prompts(20, "held_out", seed=0)
    reports = program.judge_prompts(PerfectModel(), scenes, SamplingSettings(sparsity=0.75), 8, 0)
    summary = program.summarize(scenes, reports)
    assert summary["1 sprite"]["rate"] == 1.0
    assert summary["2 sprites"]["rate"] == 0.0
    assert summary["all"]["rate"] == 0.5
    assert summary["all"]["standard_error"] == pytest.approx((0.25 / 20) ** 0.5)
    assert len(summary["failures"]) == 10


def test_an_untrained_model_fails_and_so_does_the_program(program, tmp_path, capsys):
    config = TrainConfig(attention="vsa", dim=16, head_size=16, num_layers=1, text_dim=16, num_frames=4)
    torch.manual_seed(0)
    model = SpriteVideoModel(
        WanTransformer3DModel(config.transformer_config()), WordEncoder(config.text_config()), config.video_tyx
    )
    model.save(tmp_path)
    words = [str(tmp_path), "--prompts=2", "--steps=1", "--device=cpu", f"--out={tmp_path / 'quality.json'}"]
    assert program.main([*words, "--min-rate=0.5"]) == 1
    written = json.loads((tmp_path / "quality.json").read_text())
    assert written["settings"]["sampling"]["num_steps"] == 1
    assert written["sparsity 0"]["all"]["rate"] == written["sparsity 0.75"]["all"]["rate"] == 0.0
    assert "0.0% ± 0.0% of 2" in capsys.readouterr().out
