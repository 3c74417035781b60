"""In a pipeline the scheduler says which step a call belongs to, whatever the calls per step and the models that share them."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from typing import Any

import diffusers
import pytest
import torch

from fastvideo.integrations.diffusers import AttentionPolicy, Rule, apply, denoising_step, plan_of, remove

from .tiny_models import CASES, call, make

diffusers.utils.logging.set_verbosity_error()

SPARSE_LATER = AttentionPolicy(rules=[Rule(role="self", steps=slice(2, None), backend="VIDEO_SPARSE_ATTN", sparsity=0.5)])


def wan_pipeline(scheduler) -> Any:
    pipe = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=make("wan")[0],
        transformer_2=make("wan")[0], boundary_ratio=0.5,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, **extra: Any) -> torch.Tensor:
    inputs = {
        "prompt_embeds": torch.ones(1, 7, 16), "negative_prompt_embeds": torch.zeros(1, 7, 16), "height": 64, "width": 96,
        "num_frames": 17, "num_inference_steps": 4, "output_type": "latent", "guidance_scale": 3.0,
        "generator": torch.Generator().manual_seed(0),
    }  # fmt: skip
    return pipe(**{**inputs, **extra}).frames


def test_a_pipelines_scheduler_counts_the_steps_of_both_models(phases: list[int]) -> None:
    pipe = wan_pipeline(diffusers.FlowMatchEulerDiscreteScheduler())
    original = run(pipe)
    plans = apply(pipe, SPARSE_LATER)
    assert list(plans) == ["transformer", "transformer_2"]
    assert "VIDEO_SPARSE_ATTN (sparsity=0.5)" in str(plans)
    changed = run(pipe)
    assert phases == [0, 0, 0, 0, 1, 1, 1, 1]  # two calls per step; the last ones are of the second model
    assert not torch.allclose(changed, original, atol=1e-3)
    assert torch.equal(run(pipe), changed)
    phases.clear()
    run(pipe, guidance_scale=1.0)
    assert phases == [0, 0, 1, 1]
    # A scheduler that is put in later counts too.
    pipe.scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    phases.clear()
    run(pipe)
    assert phases == [0, 0, 0, 0, 1, 1, 1, 1]
    apply(pipe)
    assert torch.allclose(run(wan_pipeline(diffusers.FlowMatchEulerDiscreteScheduler())), original)
    remove(pipe)
    assert plan_of(pipe.transformer) is None
    assert plan_of(pipe.transformer_2) is None


def test_between_runs_nobody_knows_the_step(phases: list[int]) -> None:
    """Neither a call of the model alone nor another pipeline that shares it takes over where the last run ended."""
    pipe = wan_pipeline(diffusers.FlowMatchEulerDiscreteScheduler())
    other = wan_pipeline(diffusers.FlowMatchEulerDiscreteScheduler())
    other.register_modules(transformer=pipe.transformer, transformer_2=pipe.transformer_2)
    apply(pipe, SPARSE_LATER)
    for _ in range(2):
        for stray in (lambda: call(pipe.transformer, CASES["wan"].inputs()), lambda: run(other)):
            with pytest.raises(ValueError, match="nobody says which step this call belongs to"):
                stray()
        run(pipe)
    assert phases == [0, 0, 0, 0, 1, 1, 1, 1] * 2
    with denoising_step(0):
        call(pipe.transformer, CASES["wan"].inputs())
    assert phases[-1] == 0


def test_a_rule_beyond_a_runs_steps_is_named() -> None:
    pipe = wan_pipeline(diffusers.FlowMatchEulerDiscreteScheduler())
    late = Rule(role="self", steps="4-", backend="VIDEO_SPARSE_ATTN", sparsity=0.5)
    apply(pipe, AttentionPolicy(rules=[Rule(steps="0-1", backend="TORCH_SDPA"), late]))
    with pytest.warns(
        UserWarning, match=r"this run has 4 steps, and rule 1, Rule\(role='self', steps='4-', .* in none of them"
    ):
        run(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(pipe, num_inference_steps=5)
        apply(pipe, SPARSE_LATER)
        run(pipe)


def test_frames_with_steps_of_their_own_have_none_in_common(phases: list[int]) -> None:
    """Their pipelines step copies of the scheduler and leave the scheduler at its beginning."""
    pipe = wan_pipeline(diffusers.FlowMatchEulerDiscreteScheduler())
    pipe.register_modules(transformer=make("skyreels forcing")[0], transformer_2=None)
    apply(pipe, SPARSE_LATER)
    pipe.scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="nobody says which step"):
        call(pipe.transformer, CASES["skyreels forcing"].inputs())
    with denoising_step(2):
        call(pipe.transformer, CASES["skyreels forcing"].inputs())
    call(pipe.transformer, CASES["skyreels"].inputs())
    assert phases == [1, 0]


def test_pipelines_that_share_a_model_take_turns(phases: list[int]) -> None:
    """Each counts its own steps; while one is in the middle of its run, the other is refused instead of given its step."""
    pipe, other = (wan_pipeline(diffusers.FlowMatchEulerDiscreteScheduler()) for _ in range(2))
    other.register_modules(transformer=pipe.transformer, transformer_2=pipe.transformer_2)
    for each in (pipe, other, pipe):
        apply(each, SPARSE_LATER)
    run(other, guidance_scale=1.0)
    run(pipe, guidance_scale=1.0)
    run(other, guidance_scale=1.0, num_inference_steps=3)
    assert phases == [0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1]

    def interrupt(*_: Any) -> None:
        run(other)

    with pytest.raises(ValueError, match="2 pipelines that share this model are in the middle of a run"):
        run(pipe, callback_on_step_end=interrupt)
    remove(other)
    apply(other, SPARSE_LATER)
    phases.clear()
    run(other, guidance_scale=1.0)
    assert phases == [0, 0, 1, 1]


def test_steps_are_found_by_their_timestep_where_the_scheduler_does_not_count(phases: list[int]) -> None:
    scheduler = diffusers.CogVideoXDDIMScheduler()
    pipe = diffusers.CogVideoXPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=make("cogvideox")[0]
    )
    pipe.set_progress_bar_config(disable=True)
    apply(pipe, SPARSE_LATER)
    run(pipe)
    assert phases == [0, 0, 1, 1]
    with pytest.raises(ValueError, match=r"timestep 7.5 is none of the scheduler's"):
        pipe.transformer(**{**CASES["cogvideox"].inputs(), "timestep": torch.tensor([7.5, 7.5])})


def test_a_pipeline_that_starts_later_starts_at_its_own_step_0(phases: list[int]) -> None:
    pipe = wan_pipeline(diffusers.FlowMatchEulerDiscreteScheduler())
    apply(pipe, SPARSE_LATER)
    pipe.scheduler.set_timesteps(8)
    pipe.scheduler.set_begin_index(5)
    inputs = CASES["wan"].inputs()
    for timestep in pipe.scheduler.timesteps[5:]:
        noise = call(pipe.transformer, inputs)
        pipe.scheduler.step(noise, timestep, inputs["hidden_states"])
    assert phases == [0, 0, 1]


def text(channels: int, mask_dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        f"{prefix}{name}": value
        for prefix in ("", "negative_")
        for name, value in (
            ("prompt_embeds", torch.randn(1, 7, channels)),
            ("prompt_attention_mask", torch.ones(1, 7, dtype=mask_dtype)),
        )
    }


PIPELINES = {
    "hunyuan": (
        diffusers.HunyuanVideoPipeline,
        lambda: {
            **text(16, torch.long),
            "pooled_prompt_embeds": torch.randn(1, 8),
            "negative_pooled_prompt_embeds": torch.randn(1, 8),
            "true_cfg_scale": 2.0,
            "height": 64,
            "width": 96,
            "num_frames": 17,
        },
        [0, 0, 0, 0, 1, 1, 1, 1],
    ),
    "ltx": (
        diffusers.LTXPipeline,
        lambda: {**text(12, torch.float32), "height": 128, "width": 192, "num_frames": 33},
        [0, 0, 1, 1],
    ),
    "mochi": (
        diffusers.MochiPipeline,
        lambda: {**text(16, torch.bool), "height": 64, "width": 96, "num_frames": 25},
        [0, 0, 1, 1],
    ),
    "flux": (
        diffusers.FluxPipeline,
        lambda: {
            "prompt_embeds": torch.randn(1, 7, 16),
            "pooled_prompt_embeds": torch.randn(1, 8),
            "height": 96,
            "width": 160,
        },
        [0, 0, 1, 1],
    ),
    "flux 2": (
        diffusers.Flux2Pipeline,
        lambda: {"prompt_embeds": torch.randn(1, 7, 16), "height": 96, "width": 160},
        [0, 0, 1, 1],
    ),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_other_pipelines(name: str, phases: list[int]) -> None:
    cls, inputs, expected = PIPELINES[name]
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    known = {part: None for part in parts if part in cls.__init__.__annotations__}
    pipe = cls(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), transformer=make(name)[0], **known)
    pipe.set_progress_bar_config(disable=True)
    arguments = {**inputs(), "num_inference_steps": 4, "output_type": "latent"}

    def generate() -> torch.Tensor:
        return pipe(**arguments, generator=torch.Generator().manual_seed(0))[0]

    original = generate()
    apply(pipe)
    assert torch.allclose(generate(), original, atol=1e-4)
    phases.clear()
    apply(pipe, SPARSE_LATER)
    assert not torch.allclose(generate(), original, atol=1e-4)
    assert phases == expected


def test_pickled_and_alive_without_its_pipeline() -> None:
    pipe = wan_pipeline(diffusers.FlowMatchEulerDiscreteScheduler())
    apply(pipe, SPARSE_LATER)
    pipe.scheduler.set_timesteps(4)
    model, inputs = pipe.transformer, CASES["wan"].inputs()
    with torch.no_grad():
        expected = call(model, inputs)
        other = pickle.loads(pickle.dumps(model))
        del pipe
        gc.collect()
        for orphan in (model, other, copy.deepcopy(model)):
            with pytest.raises(ValueError, match="nobody says"):
                call(orphan, inputs)
            with denoising_step(0):
                assert torch.equal(call(orphan, inputs), expected)
