"""Rectified flow: noising, the training loss, and samplers that integrate a learned velocity field.

With noise level s in [0, 1], clean data x0 and standard normal noise e, the path is `x_s = (1 - s) x0 + s e` and the
model predicts its velocity `dx/ds = e - x0` (arXiv 2209.03003, 2210.02747). Sampling integrates from s = 1 (noise) to
s = 0 (data). A model is told the timestep `1000 s`. Everything is deterministic given its tensors and generator.

Shape legend: `B` batch; data are `[B, ...]` of any rank, noise levels `[B]`.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000.0

NoiseLevelDistribution = Literal["uniform", "logit_normal"]
Solver = Literal["euler", "heun", "ab2"]
Conditioning = Mapping[str, Any]


class VelocityModel(Protocol):
    """What the loss and the samplers call: `model(x [B, ...], timestep [B], **conditioning)` gives `[B, ...]`."""

    def __call__(self, x: Tensor, timestep: Tensor, /, **conditioning: Any) -> Tensor:
        """Return the velocity."""


def shift_noise_levels(sigmas: Tensor, shift: float) -> Tensor:
    """Move noise levels towards 1 by `s' = shift s / (1 + (shift - 1) s)` (arXiv 2403.03206, section 5.3.2).

    Args:
        sigmas: Noise levels in [0, 1], any shape.
        shift: Positive; 1 changes nothing, larger values spend more of the schedule at high noise.

    Raises:
        ValueError: `shift` is not positive.

    Example:
        >>> shift_noise_levels(torch.tensor([0.0, 0.5, 1.0]), 3.0)
        tensor([0.0000, 0.7500, 1.0000])
    """
    if not shift > 0:
        raise ValueError(f"shift must be positive, got {shift}.")
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def sample_noise_levels(
    batch_size: int,
    *,
    distribution: NoiseLevelDistribution = "logit_normal",
    shift: float = 1.0,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw noise levels for training.

    Args:
        batch_size: How many, B.
        distribution: "uniform" on [0, 1), or "logit_normal": the sigmoid of a standard normal (arXiv 2403.03206).
        shift: See `shift_noise_levels`; applied to what was drawn.
        generator: Source of randomness, on `device`.
        device: Where to draw.

    Returns:
        `[B]`, float32.

    Raises:
        ValueError: `distribution` is unknown.

    Example:
        >>> sigmas = sample_noise_levels(4, generator=torch.Generator().manual_seed(0))
        >>> bool(((sigmas > 0) & (sigmas < 1)).all())
        True
    """
    if distribution == "uniform":
        sigmas = torch.rand(batch_size, generator=generator, device=device)
    elif distribution == "logit_normal":
        sigmas = torch.randn(batch_size, generator=generator, device=device).sigmoid()
    else:
        raise ValueError(f'distribution must be "uniform" or "logit_normal", got {distribution!r}.')
    return shift_noise_levels(sigmas, shift)


def add_noise(clean: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """Return `(1 - s) clean + s noise`.

    Args:
        clean: `[B, ...]`.
        noise: `[B, ...]`, standard normal.
        sigmas: Noise levels `[B]`.

    Returns:
        `[B, ...]` in the dtype of `clean`.

    Raises:
        ValueError: The shapes don't fit each other.

    Example:
        >>> add_noise(torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([0.25]))
        tensor([[0.2500, 0.2500]])
    """
    if clean.shape != noise.shape or sigmas.shape != clean.shape[:1]:
        raise ValueError(
            f"clean and noise must share a shape [B, ...] and sigmas must be [B], got {tuple(clean.shape)}, "
            f"{tuple(noise.shape)} and {tuple(sigmas.shape)}."
        )
    levels = sigmas.view(-1, *[1] * (clean.ndim - 1))
    return ((1 - levels) * clean + levels * noise).to(clean.dtype)


def flow_matching_loss(
    model: VelocityModel,
    clean: Tensor,
    noise: Tensor,
    sigmas: Tensor,
    conditioning: Conditioning | None = None,
) -> Tensor:
    """Return each sample's mean squared error of the predicted velocity.

    Args:
        model: Called as `model(x, timestep, **conditioning)`.
        clean: `[B, ...]`.
        noise: `[B, ...]`, standard normal.
        sigmas: Noise levels `[B]`, see `sample_noise_levels`.
        conditioning: Keyword arguments of the model.

    Returns:
        `[B]` in at least float32; take its mean to train.

    Raises:
        ValueError: The shapes don't fit each other.

    Example:
        >>> clean, noise = torch.zeros(2, 3), torch.ones(2, 3)
        >>> flow_matching_loss(lambda x, timestep: torch.zeros_like(x), clean, noise, torch.tensor([0.2, 0.8]))
        tensor([1., 1.])
    """
    velocity = model(add_noise(clean, noise, sigmas), sigmas * NUM_TRAIN_TIMESTEPS, **(conditioning or {}))
    if velocity.shape != clean.shape:
        raise ValueError(f"The model must return {tuple(clean.shape)}, got {tuple(velocity.shape)}.")
    wide = torch.promote_types(velocity.dtype, torch.float32)
    return (velocity.to(wide) - (noise.to(wide) - clean.to(wide))).square().flatten(1).mean(dim=1)


def noise_schedule(num_steps: int, shift: float = 1.0) -> Tensor:
    """Return the noise levels between which a sampler steps: `num_steps + 1` of them, from 1 down to 0.

    Args:
        num_steps: At least 1.
        shift: See `shift_noise_levels`.

    Returns:
        `[num_steps + 1]`, float64, on the CPU.

    Raises:
        ValueError: `num_steps` is below 1, or `shift` is not positive.

    Example:
        >>> noise_schedule(2, shift=3.0)
        tensor([1.0000, 0.7500, 0.0000], dtype=torch.float64)
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}.")
    return shift_noise_levels(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), shift)


def draw_noise(
    shape: tuple[int, ...],
    seed: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw standard normal noise that is the same on every device: float32 on the CPU, then moved.

    Example:
        >>> torch.equal(draw_noise((1, 2), seed=7), draw_noise((1, 2), seed=7))
        True
    """
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device=device, dtype=dtype)


def guided_velocity(
    model: VelocityModel,
    x: Tensor,
    timestep: Tensor,
    conditioning: Conditioning,
    negative: Conditioning,
    guidance_scale: float,
    *,
    one_batch: bool = True,
) -> Tensor:
    """Return the velocity under classifier-free guidance, `u + scale (c - u)` (arXiv 2207.12598).

    Args:
        model: Called as `model(x, timestep, **conditioning)`.
        x: `[B, ...]`.
        timestep: `[B]`.
        conditioning: Keyword arguments that give c. Tensors are `[B, ...]`.
        negative: Keyword arguments of the same names and shapes that give u, for example of an empty prompt.
        guidance_scale: 1 gives c, 0 gives u.
        one_batch: Whether one call evaluates both as a batch of 2 B (conditioned first), or two calls do.

    Returns:
        `[B, ...]` in at least float32.

    Raises:
        ValueError: The two sets of arguments can't be joined into one batch.

    Example:
        >>> model = lambda x, timestep, bias: x + bias
        >>> one, two = {"bias": torch.ones(1, 1)}, {"bias": torch.zeros(1, 1)}
        >>> guided_velocity(model, torch.zeros(1, 1), torch.zeros(1), one, two, guidance_scale=5.0)
        tensor([[5.]])
    """
    if one_batch:
        both = model(torch.cat((x, x)), torch.cat((timestep, timestep)), **_join(conditioning, negative))
        conditional, unconditional = both.chunk(2)
    else:
        conditional = model(x, timestep, **conditioning)
        unconditional = model(x, timestep, **negative)
    wide = torch.promote_types(conditional.dtype, torch.float32)
    conditional, unconditional = conditional.to(wide), unconditional.to(wide)
    return unconditional + guidance_scale * (conditional - unconditional)


def sample_flow(
    model: VelocityModel,
    noise: Tensor,
    num_steps: int,
    *,
    conditioning: Conditioning | None = None,
    negative: Conditioning | None = None,
    guidance_scale: float = 1.0,
    shift: float = 1.0,
    solver: Solver = "ab2",
    one_batch: bool = True,
    step_context: Callable[[int], contextlib.AbstractContextManager[Any]] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Turn noise into data by integrating the velocity from noise level 1 to 0.

    Args:
        model: Called as `model(x, timestep, **conditioning)`, without gradients.
        noise: Standard normal `[B, ...]`, see `draw_noise`; the model is given this dtype.
        num_steps: Steps of the schedule.
        conditioning: Keyword arguments of the model; tensors are `[B, ...]`.
        negative: The same for the unconditioned half of guidance; needed where `guidance_scale` is not 1.
        guidance_scale: Classifier-free guidance, see `guided_velocity`; 1 leaves it out.
        shift: See `shift_noise_levels`.
        solver: "euler" (order 1), "heun" (order 2, two evaluations per step), or "ab2" (Adams-Bashforth for uneven
            steps: order 2, one evaluation per step).
        one_batch: Whether guidance runs as one batch of 2 B or as two calls.
        step_context: Given the step's index, returns a context manager that is entered around the step, for example
            `lambda index: set_forward_context(index, metadata)`.
        on_step: Called with the number of finished steps after each, for example for a progress bar.

    Returns:
        Data `[B, ...]` in the dtype of `noise`; the sum is kept in at least float32.

    Raises:
        ValueError: `solver` is unknown, or guidance lacks `negative`.

    Example:
        >>> sample_flow(lambda x, timestep: torch.full_like(x, 2.0), torch.full((1, 1), 3.0), num_steps=4)
        tensor([[1.]])
    """
    if solver not in ("euler", "heun", "ab2"):
        raise ValueError(f'solver must be "euler", "heun" or "ab2", got {solver!r}.')
    if guidance_scale != 1 and negative is None:
        raise ValueError(f"{guidance_scale=} needs `negative`, the arguments of the unconditioned half.")

    def velocity(x: Tensor, sigma: float) -> Tensor:
        x = x.to(noise.dtype)
        # float32 holds fractional timesteps that a 16-bit dtype would round.
        timestep = torch.full(
            (len(x),), sigma * NUM_TRAIN_TIMESTEPS, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device
        )
        if guidance_scale == 1 or negative is None:
            return model(x, timestep, **(conditioning or {}))
        return guided_velocity(model, x, timestep, conditioning or {}, negative, guidance_scale, one_batch=one_batch)

    x = noise.to(torch.promote_types(noise.dtype, torch.float32))
    previous: tuple[Tensor, float] | None = None
    with torch.no_grad():
        for index, (sigma, next_sigma) in enumerate(itertools.pairwise(noise_schedule(num_steps, shift).tolist())):
            step = next_sigma - sigma
            with step_context(index) if step_context is not None else contextlib.nullcontext():
                slope = velocity(x, sigma).to(x.dtype)
                direction = slope
                if solver == "heun":
                    direction = (slope + velocity(x + step * slope, next_sigma).to(x.dtype)) / 2
                elif solver == "ab2" and previous is not None:
                    previous_slope, previous_step = previous
                    direction = slope + (step / (2 * previous_step)) * (slope - previous_slope)
            x, previous = x + step * direction, (slope, step)
            if on_step is not None:
                on_step(index + 1)
    return x.to(noise.dtype)


def _join(conditioning: Conditioning, negative: Conditioning) -> dict[str, Any]:
    """Join two sets of keyword arguments on the batch dim; what is no tensor must be equal in both."""
    if conditioning.keys() != negative.keys():
        raise ValueError(
            f"conditioning and negative must have the same names, got {sorted(conditioning)} and {sorted(negative)}."
        )
    joined: dict[str, Any] = {}
    for name, value in conditioning.items():
        other = negative[name]
        if isinstance(value, Tensor) and isinstance(other, Tensor):
            if value.shape != other.shape:
                raise ValueError(
                    f"{name} must have one shape in conditioning and negative, got {tuple(value.shape)} and "
                    f"{tuple(other.shape)}: pad it, or pass one_batch=False."
                )
            joined[name] = torch.cat((value, other))
        elif isinstance(value, Tensor) or isinstance(other, Tensor) or value != other:
            raise ValueError(f"{name} must be a tensor in conditioning and negative, or equal in both: pass one_batch=False.")
        else:
            joined[name] = value
    return joined
