"""Rectified flow: formulas by hand, exact samplers on an analytic field, guidance, and bad input."""

import contextlib
import math

import pytest
import torch

from fastvideo.models.flow import (
    add_noise,
    draw_noise,
    flow_matching_loss,
    guided_velocity,
    noise_schedule,
    sample_flow,
    sample_noise_levels,
    shift_noise_levels,
)

MEAN, STD = 1.5, 0.4


def gaussian_velocity(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """The exact velocity where the data are normal with MEAN and STD: E[noise - clean | x]."""
    s = (timestep / 1000).view(-1, *[1] * (x.ndim - 1)).to(x.dtype)
    variance = (1 - s) ** 2 * STD**2 + s**2
    return -MEAN + (s - (1 - s) * STD**2) / variance * (x - (1 - s) * MEAN)


def sampling_error(solver: str, num_steps: int, shift: float = 1.0) -> float:
    noise = torch.tensor([[-2.0, -0.3, 0.0, 1.1, 2.5]], dtype=torch.float64)
    out = sample_flow(gaussian_velocity, noise, num_steps, solver=solver, shift=shift)
    return (out - (MEAN + STD * noise)).abs().max().item()


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("ab2", 2)])
def test_samplers_converge_at_their_order(solver, order, shift):
    coarse, fine = (sampling_error(solver, num_steps, shift) for num_steps in (300, 600))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)
    assert fine < (1e-2 if order == 1 else 1e-4)


@pytest.mark.parametrize("solver", ["euler", "heun", "ab2"])
def test_samplers_are_exact_for_one_data_point(solver):
    point = torch.tensor([[3.0, -1.0]], dtype=torch.float64)

    def velocity(x, timestep):
        sigma = timestep[:, None] / 1000
        # All paths to one point are straight; the limit at s = 0 is taken along the path.
        return torch.where(sigma > 0, (x - point) / sigma.clamp_min(1e-9), noise - point)

    noise = draw_noise((1, 2), seed=3, dtype=torch.float64)
    out = sample_flow(velocity, noise, 5, solver=solver, shift=2.0)
    torch.testing.assert_close(out, point, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("solver", "calls_per_step"), [("euler", 1), ("heun", 2), ("ab2", 1)])
def test_number_of_evaluations_and_their_timesteps(solver, calls_per_step):
    seen = []

    def model(x, timestep):
        seen.append(timestep.tolist())
        return torch.zeros_like(x)

    sample_flow(model, torch.zeros(2, 1), 4, solver=solver, shift=3.0)
    assert len(seen) == 4 * calls_per_step
    expected = [1000 * 3 * s / (1 + 2 * s) for s in (1, 0.75, 0.5, 0.25)]
    for value, timesteps in zip(expected, seen[::calls_per_step], strict=True):
        assert timesteps == pytest.approx([value, value], rel=1e-6)


def test_shift_and_schedule():
    sigmas = torch.linspace(0, 1, 9, dtype=torch.float64)
    assert torch.equal(shift_noise_levels(sigmas, 1.0), sigmas)
    torch.testing.assert_close(shift_noise_levels(shift_noise_levels(sigmas, 4.0), 0.25), sigmas)
    schedule = noise_schedule(7, shift=5.0)
    assert schedule[0] == 1
    assert schedule[-1] == 0
    assert (schedule.diff() < 0).all()


@pytest.mark.parametrize(("distribution", "shift", "median"), [("uniform", 1.0, 0.5), ("logit_normal", 3.0, 0.75)])
def test_noise_levels_follow_their_distribution(distribution, shift, median):
    def draw():
        generator = torch.Generator().manual_seed(11)
        return sample_noise_levels(20000, distribution=distribution, shift=shift, generator=generator)

    sigmas = draw()
    assert torch.equal(sigmas, draw())
    assert sigmas.median().item() == pytest.approx(median, abs=0.01)
    below = shift_noise_levels(torch.tensor(0.25), shift)
    share = 0.25 if distribution == "uniform" else 0.5 * (1 + math.erf(math.log(1 / 3) / math.sqrt(2)))
    assert (sigmas < below).float().mean().item() == pytest.approx(share, abs=0.015)


def test_add_noise_and_loss_by_hand():
    clean = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    noise = torch.tensor([[5.0, -2.0], [0.0, 8.0]])
    sigmas = torch.tensor([0.25, 0.5])
    assert add_noise(clean, noise, sigmas).tolist() == [[2.0, 1.0], [1.5, 6.0]]
    seen = {}

    def model(x, timestep, text):
        seen.update(x=x, timestep=timestep, text=text)
        return torch.tensor([[4.0, -4.0], [0.0, 0.0]])

    loss = flow_matching_loss(model, clean, noise, sigmas, {"text": "hello"})
    assert loss.tolist() == [0.0, 12.5]
    assert seen["x"].tolist() == [[2.0, 1.0], [1.5, 6.0]]
    assert seen["timestep"].tolist() == [250.0, 500.0]
    assert seen["text"] == "hello"


def test_the_exact_velocity_minimises_the_loss():
    generator = torch.Generator().manual_seed(2)
    clean = MEAN + STD * torch.randn(4000, 1, generator=generator)
    noise = torch.randn(4000, 1, generator=generator)
    sigmas = sample_noise_levels(4000, generator=generator)
    best = flow_matching_loss(gaussian_velocity, clean, noise, sigmas).mean()
    for factor, offset in ((1.1, 0.0), (0.9, 0.0), (1.0, 0.1), (1.0, -0.1)):

        def worse(x, timestep, factor=factor, offset=offset):
            return factor * gaussian_velocity(x, timestep) + offset

        assert flow_matching_loss(worse, clean, noise, sigmas).mean() > best


def test_loss_of_half_precision_is_float32_and_reaches_the_model():
    weight = torch.tensor(2.0, dtype=torch.bfloat16, requires_grad=True)
    clean = torch.ones(2, 3, dtype=torch.bfloat16)
    loss = flow_matching_loss(lambda x, t: weight * x, clean, torch.zeros_like(clean), torch.zeros(2))
    assert loss.dtype == torch.float32
    assert loss.tolist() == [9.0, 9.0]
    loss.mean().backward()
    assert weight.grad.item() == 6.0


@pytest.mark.parametrize("one_batch", [True, False])
def test_guidance_formula(one_batch):
    calls = []

    def model(x, timestep, text, mask):
        calls.append(len(x))
        assert mask is None
        return x * text.sum(dim=1, keepdim=True) + timestep[:, None]

    x, timestep = torch.tensor([[1.0], [2.0]]), torch.tensor([10.0, 20.0])
    conditioning = {"text": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "mask": None}
    negative = {"text": torch.zeros(2, 2), "mask": None}
    out = guided_velocity(model, x, timestep, conditioning, negative, 2.5, one_batch=one_batch)
    # u + 2.5 (c - u), where u is the timestep and c adds x times the text's sum.
    assert out.tolist() == [[10.0 + 2.5 * 3.0], [20.0 + 2.5 * 14.0]]
    assert calls == ([4] if one_batch else [2, 2])


def test_sampling_with_guidance_and_without():
    def model(x, timestep, target):
        return target.expand_as(x)

    noise = torch.zeros(1, 2)
    one, zero = {"target": torch.ones(1, 1)}, {"target": torch.zeros(1, 1)}
    assert sample_flow(model, noise, 3, conditioning=one).tolist() == [[-1.0, -1.0]]
    guided = sample_flow(model, noise, 4, conditioning=one, negative=zero, guidance_scale=5.0)
    assert guided.tolist() == [[-5.0, -5.0]]


def test_step_context_and_progress_surround_every_evaluation():
    events = []

    @contextlib.contextmanager
    def step_context(index):
        events.append(f"enter {index}")
        yield
        events.append(f"leave {index}")

    def model(x, timestep):
        events.append("model")
        return x

    sample_flow(model, torch.zeros(1, 1), 2, solver="heun", step_context=step_context, on_step=events.append)
    one_step = ["enter {}", "model", "model", "leave {}"]
    assert events == [e.format(0) for e in one_step] + [1] + [e.format(1) for e in one_step] + [2]


def test_sampling_is_deterministic_keeps_dtype_and_takes_no_gradient():
    weight = torch.tensor(0.5, requires_grad=True)
    seen = set()

    def model(x, timestep):
        seen.add((x.dtype, timestep.dtype))
        return x * weight.to(x.dtype)

    first, second = (sample_flow(model, draw_noise((2, 3), 5, dtype=torch.bfloat16), 6) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, sample_flow(model, draw_noise((2, 3), 6, dtype=torch.bfloat16), 6))
    assert first.dtype == torch.bfloat16
    assert not first.requires_grad
    assert seen == {(torch.bfloat16, torch.float32)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: noise_schedule(0), "num_steps must be at least 1, got 0"),
        (lambda: noise_schedule(3, shift=0.0), "shift must be positive, got 0.0"),
        (lambda: shift_noise_levels(torch.zeros(1), math.nan), "shift must be positive, got nan"),
        (lambda: sample_noise_levels(1, distribution="normal"), "got 'normal'"),
        (lambda: add_noise(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(1)), r"sigmas must be \[B\]"),
        (lambda: sample_flow(gaussian_velocity, torch.zeros(1, 1), 1, solver="rk4"), "got 'rk4'"),
        (lambda: sample_flow(gaussian_velocity, torch.zeros(1, 1), 1, guidance_scale=2.0), "needs `negative`"),
        (
            lambda: flow_matching_loss(lambda x, t: x[:, :1], torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1)),
            r"must return \(1, 2\), got \(1, 1\)",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("conditioning", "negative", "message"),
    [
        ({"a": torch.zeros(1)}, {"b": torch.zeros(1)}, "same names"),
        ({"a": torch.zeros(1, 2)}, {"a": torch.zeros(1, 3)}, "pad it"),
        ({"a": torch.zeros(1)}, {"a": None}, "one_batch=False"),
        ({"a": 1}, {"a": 2}, "one_batch=False"),
    ],
)
def test_guidance_that_does_not_join(conditioning, negative, message):
    with pytest.raises(ValueError, match=message):
        guided_velocity(lambda x, t, a: x, torch.zeros(1, 1), torch.zeros(1), conditioning, negative, 2.0)
