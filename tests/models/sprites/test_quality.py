"""The quality measure: ground truth passes, and what shows something else does not."""

import dataclasses

import pytest
import torch

from fastvideo.models.sprites.atlas import load_atlas
from fastvideo.models.sprites.prompts import BACKGROUNDS, DIRECTIONS, SPRITES, MovingSprite, ScenePrompt
from fastvideo.models.sprites.quality import check_clip, correlate, sprite_tracks
from fastvideo.models.sprites.scenes import render, sample_prompts, scenes_of_prompts

NUM_CLIPS = 200


@pytest.fixture(scope="module")
def ground_truth():
    generator = torch.Generator().manual_seed(0)
    scenes = sample_prompts(NUM_CLIPS, "held_out", seed=0)
    clips = render(scenes_of_prompts(scenes, generator), load_atlas())
    # Five frames are enough for the measure and keep the test quick.
    clips = clips[:, :, [0, 4, 8, 12, 15]]
    return scenes, clips + 0.1 * torch.randn(clips.shape, generator=generator)


def turned(scene, steps):
    names = list(DIRECTIONS.values())
    around = sorted(range(8), key=lambda i: torch.atan2(*torch.tensor(names[i])).item())
    name = {around[i]: list(DIRECTIONS)[around[(i + steps) % 8]] for i in range(8)}
    clauses = [
        dataclasses.replace(clause, direction=name[list(DIRECTIONS).index(clause.direction)]) for clause in scene.sprites
    ]
    return ScenePrompt(tuple(clauses), scene.background)


def test_ground_truth_passes(ground_truth):
    scenes, clips = ground_truth
    passed = [check_clip(clip, scene).passed for clip, scene in zip(clips, scenes, strict=True)]
    assert sum(passed) >= 0.99 * NUM_CLIPS


def test_other_directions_fail(ground_truth):
    scenes, clips = ground_truth
    for steps in (2, 4, 6):
        chosen = range(steps, NUM_CLIPS, 8)
        assert not any(check_clip(clips[i], turned(scenes[i], steps)).passed for i in chosen)


def test_other_sprites_fail(ground_truth):
    scenes, clips = ground_truth
    for i in range(0, NUM_CLIPS, 4):
        shown = {clause.sprite for clause in scenes[i].sprites}
        absent = next(s for s in range(i, i + 9) if s % len(SPRITES) not in shown) % len(SPRITES)
        clauses = (dataclasses.replace(scenes[i].sprites[0], sprite=absent), *scenes[i].sprites[1:])
        assert not check_clip(clips[i], ScenePrompt(clauses, scenes[i].background)).passed


def test_a_missing_second_sprite_fails():
    scenes = sample_prompts(40, "train", seed=3, num_sprites=1)
    clips = render(scenes_of_prompts(scenes, torch.Generator().manual_seed(3)), load_atlas())[:, :, [0, 8, 15]]
    for clip, scene in zip(clips, scenes, strict=True):
        extra = MovingSprite((scene.sprites[0].sprite + 5) % len(SPRITES), scene.sprites[0].direction)
        assert not check_clip(clip, ScenePrompt((*scene.sprites, extra), scene.background)).passed


def test_still_blank_and_noisy_clips_fail(ground_truth):
    scenes, clips = ground_truth
    generator = torch.Generator().manual_seed(1)
    for i in range(0, NUM_CLIPS, 20):
        assert not check_clip(clips[i][:, :1].expand(-1, 3, -1, -1), scenes[i]).passed
        assert not check_clip(torch.zeros_like(clips[i]), scenes[i]).passed
        assert not check_clip(torch.randn(clips[i].shape, generator=generator), scenes[i]).passed


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_no_two_sprites_look_alike(background):
    generator = torch.Generator().manual_seed(2)
    scenes = [ScenePrompt((MovingSprite(sprite, "left"),), background) for sprite in range(len(SPRITES))]
    frames = render(scenes_of_prompts(scenes, generator), load_atlas(), num_frames=1)[:, :, 0]
    scores, _ = sprite_tracks((frames + 1) / 2, background)
    own = scores.diagonal()
    others = scores.masked_fill(torch.eye(len(SPRITES), dtype=torch.bool), -1)
    assert own.min() > 0.8
    assert others.max() < 0.75


def test_correlation_equals_its_formula_in_double_precision():
    generator = torch.Generator().manual_seed(4)
    frame = torch.rand(1, 3, 30, 30, generator=generator)
    atlas, colour = load_atlas().double(), torch.tensor(BACKGROUNDS["mint"]).double() / 255
    y, x, sprite = 2, 3, 7
    mask = torch.nn.functional.max_pool2d(atlas[sprite, 3:][None], 3, 1, 1)[0]
    picture = atlas[sprite, :3] + (1 - atlas[sprite, 3:]) * colour[:, None, None]
    patch = frame[0, :, y : y + 24, x : x + 24].double()
    centre = [image - (mask * image).sum((1, 2), keepdim=True) / mask.sum() for image in (patch, picture)]
    cross, power_a, power_b = ((mask * a * b).sum() for a, b in ((centre[0], centre[1]), (centre[0],) * 2, (centre[1],) * 2))
    measured = correlate(frame, "mint")[0, sprite, y + 4, x + 4]
    torch.testing.assert_close(measured.double(), cross / (power_a * power_b).sqrt(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("clip", "reason"),
    [
        (torch.zeros(3, 1, 64, 64), "expected a clip"),
        (torch.zeros(1, 4, 64, 64), "expected a clip"),
        (torch.zeros(3, 4, 16, 64), "expected a clip"),
        (torch.zeros(3, 4, 64, 64, dtype=torch.uint8), "floating-point"),
    ],
)
def test_wrong_clips_are_refused(clip, reason):
    with pytest.raises(ValueError, match=reason):
        check_clip(clip, "heart moving left")
