"""Scenes of moving sprites: which ones are held out from training, where sprites start, and rendering in batches.

A clip shows one or two sprites that move at constant velocity over a plain background, `[B, 3, T, Y, X]` in [-1, 1].
Everything after the pool of scenes is built is vectorised torch on the device of the pool, so that clips cost a few
milliseconds a batch. Positions are in pixels, `(y, x)` of a cell's upper left corner, fractional; a picture moves by
less than a pixel through bilinear interpolation of premultiplied alpha.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F

from fastvideo.models.sprites.atlas import CELL_SIZE, SPRITE_SIZE
from fastvideo.models.sprites.prompts import (
    BACKGROUNDS,
    DIRECTIONS,
    MAX_TOKENS,
    PAD_ID,
    SPRITES,
    MovingSprite,
    ScenePrompt,
    scene_token_ids,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

NUM_FRAMES = 16
FRAME_SIZE = 64
MIN_TRAVEL, MAX_TRAVEL = 22.0, 28.0
Split = Literal["train", "held_out"]

_DIRECTION_NAMES = tuple(DIRECTIONS)
_BACKGROUND_NAMES = tuple(BACKGROUNDS)
_NUM_PLACEMENTS = 24
_FREE_OVERLAP = 0.05
_HELD_OUT_SHARE = 0.1


def _is_hashed_out(*names: str) -> bool:
    digest = hashlib.blake2b("/".join(names).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") < _HELD_OUT_SHARE * 2**32


@functools.lru_cache(maxsize=1)
def _held_out_tables() -> tuple[torch.Tensor, torch.Tensor]:
    singles = [
        [[_is_hashed_out(sprite, direction, place) for place in BACKGROUNDS] for direction in DIRECTIONS] for sprite in SPRITES
    ]
    pairs = [[_is_hashed_out(*sorted((first, second))) for second in SPRITES] for first in SPRITES]
    return torch.tensor(singles), torch.tensor(pairs)


def is_held_out(scene: ScenePrompt) -> bool:
    """Whether training never shows this scene.

    About a tenth of all (sprite, direction, background) combinations and of all pairs of sprites are held out, by a
    hash of their names; a scene is held out when it contains a combination that is.

    Example:
        >>> from fastvideo.models.sprites.prompts import parse_prompt
        >>> scenes = [parse_prompt(f"red heart moving {direction}") for direction in DIRECTIONS]
        >>> [is_held_out(scene) for scene in scenes].count(True) < 4
        True
    """
    singles, pairs = _held_out_tables()
    place = _BACKGROUND_NAMES.index(scene.background)
    clauses = [(clause.sprite, _DIRECTION_NAMES.index(clause.direction), place) for clause in scene.sprites]
    if any(bool(singles[combination]) for combination in clauses):
        return True
    return len(clauses) == 2 and bool(pairs[clauses[0][0], clauses[1][0]])


@functools.lru_cache(maxsize=4)
def _scene_codes(split: Split, num_sprites: int) -> torch.Tensor:
    """All scenes of a split as rows `(sprite, direction, sprite or -1, direction or -1, background)`, int64."""
    singles, pairs = _held_out_tables()
    wanted = split == "held_out"
    if num_sprites == 1:
        rows = (singles == wanted).nonzero()
        absent = torch.full_like(rows[:, :2], -1)
        return torch.cat([rows[:, :2], absent, rows[:, 2:]], dim=1)
    held_out = singles[:, :, None, None, :] | singles[None, None, :, :, :] | pairs[:, None, :, None, None]
    distinct = ~torch.eye(len(SPRITES), dtype=torch.bool)[:, None, :, None, None]
    return ((held_out == wanted) & distinct).nonzero()


def _scene_of_code(code: Sequence[int]) -> ScenePrompt:
    clauses = [MovingSprite(code[i], _DIRECTION_NAMES[code[i + 1]]) for i in (0, 2) if code[i] >= 0]
    return ScenePrompt(tuple(clauses), _BACKGROUND_NAMES[code[4]])


def _code_of_scene(scene: ScenePrompt) -> list[int]:
    clauses = [(clause.sprite, _DIRECTION_NAMES.index(clause.direction)) for clause in scene.sprites]
    first, second = clauses[0], clauses[1] if len(clauses) == 2 else (-1, -1)
    return [*first, *second, _BACKGROUND_NAMES.index(scene.background)]


def sample_prompts(num_prompts: int, split: Split, seed: int, *, num_sprites: int | None = None) -> list[ScenePrompt]:
    """Scenes of a split, drawn without repetition.

    Half of them show one sprite (or as many as the split holds) and the rest two, unless `num_sprites` says.

    Raises:
        ValueError: more prompts are asked for than the split holds.

    Example:
        >>> [is_held_out(scene) for scene in sample_prompts(3, "held_out", seed=0)]
        [True, True, True]
    """
    if num_sprites is None:
        num_singles = min(num_prompts // 2, len(_scene_codes(split, 1)))
        counts = {1: num_singles, 2: num_prompts - num_singles}
    else:
        counts = {num_sprites: num_prompts}
    generator = torch.Generator().manual_seed(seed)
    scenes: list[ScenePrompt] = []
    for sprites, count in counts.items():
        codes = _scene_codes(split, sprites)
        if count > len(codes):
            raise ValueError(f"the split {split!r} holds {len(codes)} scenes of {sprites} sprites, {count} were asked for")
        chosen = torch.randperm(len(codes), generator=generator)[:count]
        scenes += [_scene_of_code(code) for code in codes[chosen].tolist()]
    return scenes


@dataclass(frozen=True)
class SceneBatch:
    """A batch of scenes as tensors on one device.

    Attributes:
        codes: `[B, 5]` int64, rows `(sprite, direction, sprite, direction, background)`, -1 for no second sprite.
        start: `[B, 2, 2]` float32, positions `(y, x)` in the first frame, in pixels.
        travel: `[B, 2, 2]` float32, displacements `(dy, dx)` from first to last frame, in pixels.
    """

    codes: torch.Tensor
    start: torch.Tensor
    travel: torch.Tensor

    def token_ids(self) -> torch.Tensor:
        """Token ids `[B, MAX_TOKENS]` of the scenes, int64, the same as `prompts.tokenize` gives."""
        sprite_tokens, direction_tokens, background_tokens = _token_tables(self.codes.device)
        sprite, direction = self.codes[:, [0, 2]], self.codes[:, [1, 3]]
        absent = (sprite < 0)[..., None]
        clause = torch.cat([sprite_tokens[sprite], direction_tokens[direction, None]], dim=-1)
        clauses = clause.masked_fill(absent, PAD_ID).flatten(1)
        return torch.cat([clauses, background_tokens[self.codes[:, 4], None]], dim=1)

    def prompts(self) -> list[ScenePrompt]:
        """The scenes as prompts, on the host."""
        return [_scene_of_code(code) for code in self.codes.tolist()]


@functools.lru_cache(maxsize=8)
def _token_tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    def ids(sprite: int, direction: int, background: int) -> list[int]:
        return scene_token_ids(_scene_of_code([sprite, direction, -1, -1, background]))

    sprites = [ids(sprite, 0, 0)[:2] for sprite in range(len(SPRITES))]
    directions = [ids(0, direction, 0)[2] for direction in range(len(DIRECTIONS))]
    backgrounds = [ids(0, 0, place)[MAX_TOKENS - 1] for place in range(len(BACKGROUNDS))]
    return (
        torch.tensor(sprites, device=device),
        torch.tensor(directions, device=device),
        torch.tensor(backgrounds, device=device),
    )


# Tables are kept per device: building one waits for the device, which a training loop must not.
@functools.lru_cache(maxsize=8)
def _headings(device: torch.device) -> torch.Tensor:
    return torch.tensor(list(DIRECTIONS.values()), device=device)


@functools.lru_cache(maxsize=8)
def _colours(device: torch.device) -> torch.Tensor:
    return torch.tensor(list(BACKGROUNDS.values()), device=device, dtype=torch.float32) / 255


def place_sprites(codes: torch.Tensor, generator: torch.Generator) -> SceneBatch:
    """Draws travel and start positions at which sprites stay in the frame and hide each other as little as possible.

    Args:
        codes: `[B, 5]` scenes as in `SceneBatch`.
        generator: on the device of `codes`.
    """
    device, num_scenes = codes.device, len(codes)
    heading = _headings(device)[codes[:, [1, 3]]]
    pace = torch.rand(num_scenes, 2, 1, generator=generator, device=device)
    travel = heading * (MIN_TRAVEL + (MAX_TRAVEL - MIN_TRAVEL) * pace)
    lowest = (-travel).clamp(min=0)
    room = FRAME_SIZE - CELL_SIZE - travel.abs()
    where = torch.rand(_NUM_PLACEMENTS, num_scenes, 2, 2, generator=generator, device=device)
    candidates = lowest + where * room
    # The first placement whose pictures hardly touch is taken, so that positions stay close to uniform.
    hidden = _overlap(candidates, travel)
    order = torch.arange(_NUM_PLACEMENTS, device=device)[:, None] * 1e-6
    best = torch.where(hidden <= _FREE_OVERLAP, order, 1 + hidden).argmin(dim=0)
    start = candidates.gather(0, best.view(1, -1, 1, 1).expand(1, -1, 2, 2))[0]
    return SceneBatch(codes, start, travel)


def _overlap(start: torch.Tensor, travel: torch.Tensor) -> torch.Tensor:
    """Share of a sprite's box that the other covers: the larger of the means over all and over the end frames."""
    share = torch.linspace(0, 1, NUM_FRAMES, device=start.device)
    gap = (start[:, :, 0] - start[:, :, 1])[..., None, :] + share[:, None] * (travel[:, 0] - travel[:, 1])[:, None, :]
    covered = (1 - gap.abs() / SPRITE_SIZE).clamp(min=0).prod(dim=-1)
    return torch.maximum(covered.mean(dim=-1), covered[..., [0, -1]].mean(dim=-1))


class ScenePool:
    """All scenes of a split on a device, to draw batches from without touching the host.

    Args:
        split: "train" or "held_out".
        device: where the batches live.
        two_sprite_share: probability of a scene with two sprites.
        num_sprites: restricts scenes to the first sprites of the atlas, for small trials; None means all.

    Example:
        >>> batch = ScenePool("train").sample(4, torch.Generator().manual_seed(0))
        >>> [is_held_out(scene) for scene in batch.prompts()]
        [False, False, False, False]
    """

    def __init__(
        self,
        split: Split,
        device: torch.device | str = "cpu",
        *,
        two_sprite_share: float = 0.5,
        num_sprites: int | None = None,
    ) -> None:
        self.two_sprite_share = two_sprite_share
        limit = len(SPRITES) if num_sprites is None else num_sprites
        kept = [codes[(codes[:, 0] < limit) & (codes[:, 2] < limit)] for codes in map(_scene_codes, [split] * 2, (1, 2))]
        if not all(map(len, kept)):
            raise ValueError(f"the split {split!r} has no scenes of the first {num_sprites=} sprites; take more sprites")
        self._one, self._two = (codes.to(device) for codes in kept)

    def sample(self, num_scenes: int, generator: torch.Generator) -> SceneBatch:
        """Draws scenes with replacement; `generator` lives on the pool's device."""
        device = self._one.device
        one, two = (
            codes[(torch.rand(num_scenes, generator=generator, device=device) * len(codes)).long().clamp(max=len(codes) - 1)]
            for codes in (self._one, self._two)
        )
        is_two = torch.rand(num_scenes, 1, generator=generator, device=device) < self.two_sprite_share
        return place_sprites(torch.where(is_two, two, one), generator)


def scenes_of_prompts(prompts: Sequence[ScenePrompt], generator: torch.Generator) -> SceneBatch:
    """Places the sprites of given prompts, for ground-truth clips; the batch lives on the generator's device."""
    codes = torch.tensor([_code_of_scene(scene) for scene in prompts], device=generator.device)
    return place_sprites(codes, generator)


def background_colours(device: torch.device | str = "cpu") -> torch.Tensor:
    """Colours of the backgrounds in their order, `[num_backgrounds, 3]` float32 in [0, 1]."""
    return _colours(torch.device(device)).clone()


def _interpolation(offset: torch.Tensor, frame_size: int, picture_size: int) -> torch.Tensor:
    """Bilinear weights `[..., frame_size, picture_size]` that put a picture's pixels at `offset + index`."""
    pixels = torch.arange(frame_size, device=offset.device, dtype=offset.dtype)
    sources = torch.arange(picture_size, device=offset.device, dtype=offset.dtype)
    return (1 - (pixels[:, None] - sources - offset[..., None, None]).abs()).clamp(min=0)


def render(
    batch: SceneBatch, atlas: torch.Tensor, *, num_frames: int = NUM_FRAMES, frame_size: int = FRAME_SIZE
) -> torch.Tensor:
    """Renders clips: `[B, 3, num_frames, frame_size, frame_size]` float32 in [-1, 1].

    Args:
        batch: scenes with positions for frames of `FRAME_SIZE` pixels.
        atlas: `load_atlas(device)`.
        num_frames: frames over which the sprites travel; one frame shows the start.
        frame_size: height and width in pixels, a divisor of `FRAME_SIZE`: the same scenes in a lower resolution.

    Raises:
        ValueError: `frame_size` doesn't divide `FRAME_SIZE`.

    Example:
        >>> from fastvideo.models.sprites.atlas import load_atlas
        >>> batch = ScenePool("train").sample(2, torch.Generator().manual_seed(0))
        >>> clips = render(batch, load_atlas())
        >>> tuple(clips.shape), bool(clips.abs().max() <= 1)
        ((2, 3, 16, 64, 64), True)
    """
    if frame_size < 1 or FRAME_SIZE % frame_size or CELL_SIZE % (FRAME_SIZE // frame_size):
        raise ValueError(f"expected a frame size that divides {FRAME_SIZE} (64, 32, 16 or 8), got {frame_size=}")
    device, shrink = batch.codes.device, FRAME_SIZE // frame_size
    pictures = F.avg_pool2d(atlas, shrink)
    share = torch.linspace(0, 1, num_frames, device=device)
    offset = (batch.start[:, :, None] + share[:, None] * batch.travel[:, :, None]) / shrink
    colour = _colours(device)[batch.codes[:, 4]]
    frames = colour[:, :, None, None, None].expand(-1, 3, num_frames, frame_size, frame_size)
    # The first-named sprite is drawn last, in front.
    for layer in (1, 0):
        sprite = batch.codes[:, 2 * layer]
        picture = pictures[sprite.clamp(min=0)] * (sprite >= 0)[:, None, None, None]
        rows = _interpolation(offset[:, layer, :, 0], frame_size, picture.shape[-1])
        columns = _interpolation(offset[:, layer, :, 1], frame_size, picture.shape[-1])
        moved = torch.einsum("btyi,bcij,btxj->bctyx", rows, picture, columns)
        frames = moved[:, :3] + (1 - moved[:, 3:]) * frames
    return frames.clamp(0, 1) * 2 - 1
