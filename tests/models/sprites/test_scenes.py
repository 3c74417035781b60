"""The held-out split, the placement of sprites and the renderer."""

import itertools

import pytest
import torch

from fastvideo.models.sprites.atlas import CELL_SIZE, load_atlas
from fastvideo.models.sprites.prompts import BACKGROUNDS, DIRECTIONS, SPRITES, MovingSprite, ScenePrompt, tokenize
from fastvideo.models.sprites.scenes import (
    FRAME_SIZE,
    MAX_TRAVEL,
    MIN_TRAVEL,
    SceneBatch,
    ScenePool,
    is_held_out,
    render,
    sample_prompts,
    scenes_of_prompts,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def single(sprite=0, background=0, start=(10.0, 12.0), travel=(0.0, 30.0)):
    return SceneBatch(
        torch.tensor([[sprite, 0, -1, -1, background]]),
        torch.tensor([[start, (0.0, 0.0)]]),
        torch.tensor([[travel, (0.0, 0.0)]]),
    )


def test_a_tenth_of_single_scenes_is_held_out_and_every_part_is_seen_in_training():
    combinations = list(itertools.product(range(len(SPRITES)), DIRECTIONS, BACKGROUNDS))
    held_out = [is_held_out(ScenePrompt((MovingSprite(s, d),), b)) for s, d, b in combinations]
    assert 0.07 < sum(held_out) / len(held_out) < 0.13
    seen = [combination for combination, out in zip(combinations, held_out, strict=True) if not out]
    assert {s for s, _, _ in seen} == set(range(len(SPRITES)))
    assert {(d, b) for _, d, b in seen} == set(itertools.product(DIRECTIONS, BACKGROUNDS))


@pytest.mark.parametrize("num_sprites", [1, 2])
def test_the_splits_are_disjoint_and_agree_with_is_held_out(num_sprites):
    train = sample_prompts(200, "train", 0, num_sprites=num_sprites)
    held_out = sample_prompts(80, "held_out", 0, num_sprites=num_sprites)
    assert not any(map(is_held_out, train))
    assert all(map(is_held_out, held_out))
    assert len(set(train)) == 200
    assert all(len(scene.sprites) == num_sprites for scene in train + held_out)


def test_the_order_of_two_sprites_does_not_leak_a_held_out_scene():
    for scene in sample_prompts(50, "held_out", 1, num_sprites=2):
        assert is_held_out(ScenePrompt(scene.sprites[::-1], scene.background))


def test_too_many_prompts_are_refused():
    with pytest.raises(ValueError, match="were asked for"):
        sample_prompts(10_000, "held_out", 0, num_sprites=1)


def test_pools_keep_to_their_split_and_repeat_by_seed():
    pool = ScenePool("train")
    batch, again = pool.sample(300, seeded()), pool.sample(300, seeded())
    assert torch.equal(batch.codes, again.codes)
    assert torch.equal(batch.start, again.start)
    assert not any(map(is_held_out, batch.prompts()))
    assert 0.35 < (batch.codes[:, 2] >= 0).float().mean() < 0.65


def test_a_pool_of_few_sprites_draws_only_these():
    codes = ScenePool("train", num_sprites=4).sample(100, seeded()).codes
    assert set(codes[:, [0, 2]].flatten().tolist()) == {-1, 0, 1, 2, 3}


def test_token_ids_equal_those_of_the_prompts():
    batch = ScenePool("held_out").sample(64, seeded())
    assert torch.equal(batch.token_ids(), tokenize(batch.prompts()))


def test_sprites_stay_in_the_frame_travel_as_named_and_seldom_touch():
    batch = ScenePool("train", two_sprite_share=1.0).sample(500, seeded())
    headings = torch.tensor(list(DIRECTIONS.values()))[batch.codes[:, [1, 3]]]
    length = batch.travel.norm(dim=-1)
    torch.testing.assert_close(batch.travel / length[..., None], headings)
    assert MIN_TRAVEL - 1e-3 <= length.min() < length.max() <= MAX_TRAVEL + 1e-3
    for corner in (batch.start, batch.start + batch.travel):
        assert corner.min() >= -1e-3
        assert corner.max() <= FRAME_SIZE - CELL_SIZE + 1e-3
    for corner in (batch.start, batch.start + batch.travel):
        apart = (corner[:, 0] - corner[:, 1]).abs().amax(dim=-1)
        assert (apart > 11).float().mean() > 0.98


def test_a_sprite_at_whole_pixels_is_pasted_exactly():
    atlas = load_atlas()
    clip = render(single(sprite=3, background=2, travel=(0.0, 30.0)), atlas, num_frames=16)[0]
    colour = torch.tensor(BACKGROUNDS["navy"]) / 255
    expected = colour[:, None, None].expand(3, FRAME_SIZE, FRAME_SIZE).clone()
    expected[:, 10:34, 42:66] = (atlas[3, :3] + (1 - atlas[3, 3:]) * colour[:, None, None])[..., : FRAME_SIZE - 42]
    torch.testing.assert_close((clip[:, -1] + 1) / 2, expected, atol=1e-5, rtol=0)


def test_half_a_pixel_is_the_mean_of_its_neighbours():
    atlas = load_atlas()
    half, low, high = (render(single(start=(10.0, x)), atlas, num_frames=1) for x in (12.5, 12.0, 13.0))
    torch.testing.assert_close(half, (low + high) / 2, atol=1e-5, rtol=0)


def test_the_first_named_sprite_is_in_front():
    atlas = torch.zeros(len(SPRITES), 4, CELL_SIZE, CELL_SIZE)
    atlas[0, [0, 3]] = 1
    atlas[1, [1, 3]] = 1
    batch = SceneBatch(torch.tensor([[0, 0, 1, 0, 1]]), torch.full((1, 2, 2), 20.0), torch.zeros(1, 2, 2))
    clip = render(batch, atlas, num_frames=1)
    assert clip[0, :, 0, 30, 30].tolist() == [1.0, -1.0, -1.0]


def test_a_smaller_frame_shows_the_same_scene():
    batch = single(start=(12.0, 16.0), travel=(0.0, 0.0))
    large, small = (render(batch, load_atlas(), num_frames=1, frame_size=size) for size in (64, 32))
    pooled = torch.nn.functional.avg_pool2d(large[:, :, 0], 2)
    torch.testing.assert_close(small[:, :, 0], pooled, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="frame_size=40"):
        render(batch, load_atlas(), frame_size=40)


def test_ground_truth_clips_of_prompts_show_their_scenes():
    prompts = sample_prompts(20, "held_out", 5)
    assert scenes_of_prompts(prompts, seeded()).prompts() == prompts
