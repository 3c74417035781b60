"""Does a clip show what its prompt says? Sprites found by normalised cross-correlation, and the way they moved.

Every sprite is a template: its picture over the named background, inside a mask that reaches one pixel beyond the
sprite so that its outline counts. In each frame a sprite's score is the best normalised cross-correlation over all
positions,

    ncc(y, x) = sum_m w (I - mean I)(P - mean P) / sqrt(sum_m w (I - mean I)^2  sum_m w (P - mean P)^2)

with means per colour channel under the mask `w` and sums over pixels and channels; a clip's score is the mean over
its frames.

A prompt passes when each named sprite scores higher than every sprite that is not named, scores at least `MIN_SCORE`,
and moves from the first to the last frame by at least `MIN_TRAVEL_PIXELS` in a direction within 45 degrees of the
named one.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastvideo.models.sprites.atlas import CELL_SIZE, load_atlas
from fastvideo.models.sprites.prompts import BACKGROUNDS, DIRECTIONS, SPRITES, ScenePrompt, parse_prompt
from fastvideo.models.sprites.scenes import background_colours

MIN_SCORE = 0.5
MIN_TRAVEL_PIXELS = 8.0
MAX_ANGLE = 45.0
_BORDER = 4
_FLAT = 1e-4


@dataclass(frozen=True)
class SpriteFinding:
    """What was found of one named sprite.

    Attributes:
        sprite: name of the sprite.
        score: its mean peak correlation over the frames, in [-1, 1].
        is_best_match: no sprite that the prompt doesn't name scores as high.
        displacement: `(dy, dx)` from first to last frame, in pixels.
        angle_error: degrees between the displacement and the named direction, in [0, 180].
        passed: whether it meets every condition of the module's docstring.
    """

    sprite: str
    score: float
    is_best_match: bool
    displacement: tuple[float, float]
    angle_error: float
    passed: bool


@dataclass(frozen=True)
class QualityReport:
    """Outcome for one clip: `passed` when every named sprite did; `rival` is the best match that is not named."""

    prompt: str
    passed: bool
    findings: tuple[SpriteFinding, ...]
    rival: str
    rival_score: float


def _templates(background: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks `[S, 1, h, w]` of sum 1 and masked templates `[S, 3, h, w]` of mean 0 and norm 1 under the mask."""
    atlas = load_atlas(device)
    colour = background_colours(device)[list(BACKGROUNDS).index(background)]
    picture = atlas[:, :3] + (1 - atlas[:, 3:]) * colour[:, None, None]
    mask = F.max_pool2d(atlas[:, 3:], kernel_size=3, stride=1, padding=1)
    mask = mask / mask.sum(dim=(2, 3), keepdim=True)
    centred = picture - (mask * picture).sum(dim=(2, 3), keepdim=True)
    norm = (mask * centred.square()).sum(dim=(1, 2, 3), keepdim=True).sqrt()
    return mask, mask * centred / norm


@functools.lru_cache(maxsize=16)
def _template_spectra(background: str, device: torch.device, image_size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Conjugate spectra of masks `[S, Y, X/2+1]` and templates `[S, 3, Y, X/2+1]` for images of a size."""
    mask, template = _templates(background, device)
    return torch.fft.rfft2(mask[:, 0], s=image_size).conj(), torch.fft.rfft2(template, s=image_size).conj()


def correlate(frames: torch.Tensor, background: str) -> torch.Tensor:
    """Normalised cross-correlation of every sprite at every position.

    Args:
        frames: `[N, 3, Y, X]` float in [0, 1].
        background: name of the background that templates are laid over.

    Returns:
        `[N, num_sprites, Y', X']` float32 in [-1, 1]; `(0, 0)` has the cell's corner `_BORDER` pixels outside the
        frame.
    """
    padded = F.pad(frames.float(), [_BORDER] * 4, mode="replicate")
    height, width = padded.shape[2:]
    mask, template = _template_spectra(background, frames.device, (height, width))
    image = torch.fft.rfft2(padded)[:, None]
    energy = torch.fft.rfft2(padded.square().sum(dim=1))[:, None]
    # Circular correlation equals the linear one wherever the template lies inside the image.
    rows, columns = height - CELL_SIZE + 1, width - CELL_SIZE + 1
    product, mean, mean_square = (
        torch.fft.irfft2(spectrum, s=(height, width))[..., :rows, :columns]
        for spectrum in ((image * template).sum(dim=2), image * mask[:, None], energy * mask)
    )
    variance = (mean_square - mean.square().sum(dim=2)).clamp(min=_FLAT)
    scores: torch.Tensor = product / variance.sqrt()
    return scores


def sprite_tracks(frames: torch.Tensor, background: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores `[N, num_sprites]` and positions `(y, x)` `[N, num_sprites, 2]` of each sprite's best match in each frame.

    Example:
        >>> from fastvideo.models.sprites.scenes import sample_prompts, scenes_of_prompts, render
        >>> [scene] = sample_prompts(1, "train", seed=0, num_sprites=1)
        >>> clip = render(scenes_of_prompts([scene], torch.Generator().manual_seed(0)), load_atlas())
        >>> scores, _ = sprite_tracks((clip[0, :, :1].transpose(0, 1) + 1) / 2, scene.background)
        >>> int(scores[0].argmax()) == scene.sprites[0].sprite
        True
    """
    maps = correlate(frames, background)
    scores, place = maps.flatten(2).max(dim=-1)
    width = maps.shape[-1]
    corner = torch.stack([place.div(width, rounding_mode="floor"), place % width], dim=-1)
    return scores, corner.float() - _BORDER


def check_clip(clip: torch.Tensor, prompt: str | ScenePrompt) -> QualityReport:
    """Decides whether a clip shows its prompt.

    Args:
        clip: `[3, T, Y, X]` float in [-1, 1], two frames or more, each side at least `CELL_SIZE` pixels.
        prompt: the prompt that it was made from.

    Raises:
        ValueError: wrong shape or dtype, or a prompt outside the vocabulary.

    Example:
        >>> report = check_clip(torch.ones(3, 2, 64, 64), "red heart moving left")
        >>> report.passed, report.findings[0].sprite
        (False, 'red heart')
    """
    scene = parse_prompt(prompt) if isinstance(prompt, str) else prompt
    if clip.ndim != 4 or clip.shape[0] != 3 or clip.shape[1] < 2 or min(clip.shape[2:]) < CELL_SIZE:
        raise ValueError(f"expected a clip [3, T >= 2, Y >= {CELL_SIZE}, X >= {CELL_SIZE}], got {tuple(clip.shape)}")
    if not clip.is_floating_point():
        raise ValueError(f"expected a floating-point clip in [-1, 1], got {clip.dtype}")
    frames = ((clip.float() + 1) / 2).clamp(0, 1).transpose(0, 1)
    scores, corners = sprite_tracks(frames, scene.background)
    mean_scores = scores.mean(dim=0).cpu()
    travel = (corners[-1] - corners[0]).cpu()
    named = [clause.sprite for clause in scene.sprites]
    others = mean_scores.clone()
    others[named] = -1
    rival = int(others.argmax())
    findings = tuple(
        _judge(
            clause.sprite,
            clause.direction,
            float(mean_scores[clause.sprite]),
            float(others[rival]),
            travel[clause.sprite],
        )
        for clause in scene.sprites
    )
    passed = all(finding.passed for finding in findings)
    return QualityReport(str(scene), passed, findings, SPRITES[rival], float(others[rival]))


def _judge(sprite: int, direction: str, score: float, rival_score: float, travel: torch.Tensor) -> SpriteFinding:
    dy, dx = travel.tolist()
    length = math.hypot(dy, dx)
    cosine = (dy * DIRECTIONS[direction][0] + dx * DIRECTIONS[direction][1]) / length if length > 0 else -1.0
    angle = math.degrees(math.acos(max(-1.0, min(1.0, cosine))))
    is_best = score > rival_score
    passed = is_best and score >= MIN_SCORE and length >= MIN_TRAVEL_PIXELS and angle <= MAX_ANGLE
    return SpriteFinding(SPRITES[sprite], score, is_best, (dy, dx), angle, passed)
