"""Training batches: reproducible, from their split, with the prompts' tokens and the promised noise levels."""

import dataclasses

import pytest
import torch

from fastvideo.models.sprites.prompts import NULL_ID, PAD_ID
from fastvideo.training.config import TrainConfig
from fastvideo.training.data import ExampleSource, stratified_noise_levels

CONFIG = TrainConfig(batch_size=64, num_frames=2, frame_size=16)


def test_a_step_has_one_batch_and_another_step_another():
    source = ExampleSource(CONFIG, "cpu")
    first, other = source.batch(3), source.batch(4)
    again = ExampleSource(CONFIG, "cpu").batch(3)
    reseeded = ExampleSource(dataclasses.replace(CONFIG, seed=1), "cpu").batch(3)
    for name in ("clean", "noise", "sigmas", "token_ids"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))
        assert not torch.equal(getattr(first, name), getattr(reseeded, name))


def test_a_tenth_of_the_prompts_is_dropped():
    source = ExampleSource(CONFIG, "cpu")
    dropped = torch.cat([source.batch(step).token_ids[:, 0] == NULL_ID for step in range(20)])
    assert 0.07 < dropped.float().mean() < 0.13
    assert not (source.batch(0, text_dropout=0.0).token_ids[:, 0] == NULL_ID).any()


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0, 0), (0.5, 0.42, 0.58), (0.75, 0.68, 0.82), (1.0, 1, 1)])
def test_scenes_of_two_sprites_have_their_share_in_training_alone(share, low, high):
    config = dataclasses.replace(CONFIG, two_sprite_share=share, text_dropout=0.0)
    source = ExampleSource(config, "cpu")
    # The second clause's first token; a scene of one sprite has padding there.
    has_two = torch.cat([source.batch(step).token_ids[:, 3] != PAD_ID for step in range(10)])
    assert low <= has_two.float().mean() <= high
    held_out, usual = (ExampleSource(settings, "cpu", "held_out").batch(0, text_dropout=0.0) for settings in (config, CONFIG))
    assert torch.equal(held_out.token_ids, usual.token_ids)
    assert torch.equal(held_out.clean, usual.clean)


def test_clips_and_noise_have_their_ranges():
    batch = ExampleSource(CONFIG, "cpu").batch(0)
    assert batch.clean.shape == (64, 3, 2, 16, 16)
    assert batch.clean.min() >= -1
    assert batch.clean.max() <= 1
    assert abs(batch.noise.mean()) < 0.01
    assert abs(batch.noise.std() - 1) < 0.01


def test_noise_levels_follow_their_distribution():
    uniform = torch.rand(4096, generator=torch.Generator().manual_seed(0))
    levels = stratified_noise_levels(uniform, shift=6.0, uniform_share=0.25)
    expected = torch.cat([torch.linspace(0, 1, 1024), 1 / (1 + torch.exp(-torch.randn(3072) - torch.log(torch.tensor(6.0))))])
    quantiles = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    torch.testing.assert_close(levels.quantile(quantiles), expected.quantile(quantiles), atol=0.02, rtol=0)
    assert torch.equal(stratified_noise_levels(uniform, 6.0, 1.0), (torch.arange(4096) + uniform) / 4096)
    assert (stratified_noise_levels(uniform, 6.0, 0.0).median() - 6 / 7).abs() < 0.01
