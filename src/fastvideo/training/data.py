"""Training examples: rendered clips, noise, noise levels and tokens, each step from its own seed, all on one device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastvideo.models.flow import shift_noise_levels
from fastvideo.models.sprites.atlas import load_atlas
from fastvideo.models.sprites.prompts import MAX_TOKENS, tokenize
from fastvideo.models.sprites.scenes import ScenePool, Split, render
from fastvideo.training.config import TrainConfig


@dataclass(frozen=True)
class Examples:
    """One batch.

    Attributes:
        clean: `[B, 3, T, Y, X]`, float32 in [-1, 1].
        noise: Standard normal, as `clean`.
        sigmas: Noise levels `[B]`, float32.
        token_ids: `[B, L]`, int64.
    """

    clean: Tensor
    noise: Tensor
    sigmas: Tensor
    token_ids: Tensor


def stratified_noise_levels(uniform: Tensor, shift: float, uniform_share: float) -> Tensor:
    """Turn uniform numbers into noise levels, one from each of B equal strata, so that a batch covers all levels.

    Args:
        uniform: `[B]` in [0, 1).
        shift: See `fastvideo.models.flow.shift_noise_levels`; applied to the logit-normal part.
        uniform_share: Share of levels that are uniform instead of logit-normal.

    Returns:
        `[B]`, in [0, 1].

    Example:
        >>> stratified_noise_levels(torch.full((4,), 0.5), shift=1.0, uniform_share=1.0)
        tensor([0.1250, 0.3750, 0.6250, 0.8750])
    """
    batch_size = len(uniform)
    place = (torch.arange(batch_size, device=uniform.device) + uniform) / batch_size
    # The first share of the strata is spread over [0, 1] evenly, the rest by the logit-normal's quantiles.
    if uniform_share >= 1:
        return place
    quantile = ((place - uniform_share) / (1 - uniform_share)).clamp(1e-6, 1 - 1e-6)
    normal = shift_noise_levels(torch.special.ndtri(quantile).sigmoid(), shift)
    if uniform_share <= 0:
        return normal
    return torch.where(place < uniform_share, place / uniform_share, normal)


class ExampleSource:
    """Makes batches; the same split, seed and step give the same batch on one kind of device.

    Args:
        config: Sizes, shares and the seed.
        device: Where batches are made.
        split: "train" or "held_out".

    Example:
        >>> source = ExampleSource(TrainConfig(batch_size=2, num_frames=4, frame_size=32), "cpu")
        >>> torch.equal(source.batch(5).clean, source.batch(5).clean)
        True
    """

    def __init__(self, config: TrainConfig, device: torch.device | str, split: Split = "train") -> None:
        self.config = config
        # Held-out scenes are the same for every share, so that the losses of runs compare.
        share = config.two_sprite_share if split == "train" else TrainConfig.two_sprite_share
        self._pool = ScenePool(split, device, two_sprite_share=share, num_sprites=config.num_sprites)
        self._atlas = load_atlas(device)
        self._null = tokenize([None], device)
        self._generator = torch.Generator(device=device)

    def batch(self, step: int, *, batch_size: int | None = None, text_dropout: float | None = None) -> Examples:
        """Make the batch of a step.

        Args:
            step: Any number at least 0.
            batch_size: Replaces the configuration's.
            text_dropout: Replaces the configuration's.
        """
        config, generator = self.config, self._generator
        size = config.batch_size if batch_size is None else batch_size
        dropout = config.text_dropout if text_dropout is None else text_dropout
        # The CPU's generator reads no more than 32 bits of its seed.
        generator.manual_seed((config.seed * 0x9E3779B1 + step) % 2**32)
        device = generator.device
        scenes = self._pool.sample(size, generator)
        clean = render(scenes, self._atlas, num_frames=config.num_frames, frame_size=config.frame_size)
        noise = torch.randn(clean.shape, generator=generator, device=device)
        uniform = torch.rand(size, generator=generator, device=device)
        sigmas = stratified_noise_levels(uniform, config.noise_shift, config.uniform_share)
        drop = torch.rand(size, 1, generator=generator, device=device) < dropout
        token_ids = torch.where(drop, self._null.expand(size, MAX_TOKENS), scenes.token_ids())
        return Examples(clean, noise, sigmas, token_ids)
