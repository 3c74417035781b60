"""`fastvideo generate --model DIR` for a folder of a diffusers pipeline: its own sampler, with attention by this system."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastvideo.cli.media import contact_sheet, write_mp4, write_png
from fastvideo.cli.pipeline_folder import IMAGE_TO_VIDEO, PipelineFolder, load_pipeline, read_pipeline_folder
from fastvideo.cli.pipeline_image import image_arguments, multiples, read_image
from fastvideo.integrations import AttentionPolicy, Rule
from fastvideo.models.wan.checkpoint import CONFIG_NAME, SPARSITY_NOTE, read_json

__all__ = ["generate_with_pipeline", "parse_policy"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_GATED_SPARSITY = 0.8
"""What FastWan's checkpoints, which don't say it, were trained for."""


@dataclass(frozen=True)
class _Clip:
    frames: torch.Tensor  # 8-bit, [T, Y, X, 3]
    seconds: float
    what: str


def parse_policy(text: str) -> AttentionPolicy:
    """Read a policy: the name of a backend, a JSON object, or the name of a file that holds one.

    The object has the fields of `AttentionPolicy`, `default` and `rules`, each rule those of `Rule`.

    Raises:
        TypeError: A value is of a wrong type.
        ValueError: It is neither, or names unknown fields.
        UnknownBackend: No backend has that name.

    Example:
        >>> print(parse_policy('{"rules": [{"role": "self", "backend": "video_sparse_attn", "sparsity": 0.8}]}'))
        rule     role  layers  steps  backend
        0        self  all     all    VIDEO_SPARSE_ATTN (sparsity=0.8)
        default  all   all     all    auto
    """
    if not text.lstrip().startswith("{") and not text.endswith(".json"):
        return AttentionPolicy(default=text)
    if text.lstrip().startswith("{"):
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"--policy is no JSON object: {error}") from error
    else:
        if not Path(text).is_file():
            raise ValueError(f"--policy {text} is no file")
        fields = read_json(Path(text))
    _check_fields(fields, AttentionPolicy, "a policy")
    rules = fields.get("rules", [])
    if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
        raise ValueError(f"expected the policy's rules as a list of objects, got {rules!r}")
    for rule in rules:
        _check_fields(rule, Rule, "a rule")
    return AttentionPolicy(**{**fields, "rules": [Rule(**rule) for rule in rules]})


def _check_fields(fields: Mapping[str, Any], cls: type, what: str) -> None:
    known = inspect.signature(cls).parameters
    required = [name for name, parameter in known.items() if parameter.default is inspect.Parameter.empty]
    if unknown := sorted(set(fields) - set(known)):
        raise ValueError(f"{what} has no field {', '.join(map(repr, unknown))}; it has {', '.join(known)}")
    if missing := sorted(set(required) - set(fields)):
        raise ValueError(f"{what} needs {', '.join(map(repr, missing))}, got {dict(fields)}")


def generate_with_pipeline(args: argparse.Namespace, rank: int, device: torch.device) -> None:
    """Load the pipeline of `args.model`, make the video, and on process 0 write the files and print what was done.

    Raises:
        FileNotFoundError: The folder isn't whole.
        ImportError: A package is missing.
        NotImplementedError: The pipeline is of a kind that this command doesn't run.
        ValueError: An option is out of range or doesn't fit the pipeline.
    """
    wanted = _wanted_arguments(args)
    folder = read_pipeline_folder(args.model)
    if args.image is None and folder.takes_image:
        raise ValueError(f"a {folder.class_name} makes videos from an image; give --image FILE, the first frame")
    if args.image is not None and folder.takes_image is False:
        raise ValueError(f"--image is for a {IMAGE_TO_VIDEO}, and {folder.path} is a {folder.class_name}; leave it out")
    image = None if args.image is None else read_image(args.image)
    folder = folder if image is None else folder.for_image()
    policy = _policy(args, folder)
    dtype = _DTYPES[args.dtype] if args.dtype else torch.bfloat16 if device.type == "cuda" else torch.float32
    pipe = load_pipeline(folder, device, dtype)
    if args.timesteps:
        pipe.scheduler = _few_step_scheduler(args.timesteps)
    if image is not None:
        wanted |= image_arguments(pipe, image, wanted.get("height"), wanted.get("width"))
    arguments = _accepted_arguments(pipe, wanted)
    plans = _set_attention(pipe, folder, policy, args.sparsity, num_steps=_num_steps(pipe, arguments))
    clips = []
    if args.compare:
        _set_attention(pipe, folder, None)
        clips.append(_run(pipe, arguments, args, rank, "sparsity 0" if folder.gated else "diffusers' attention"))
        plans = _set_attention(pipe, folder, policy, args.sparsity)
    what = f"sparsity {_sparsity_of(pipe, folder):g}" if folder.gated else "this system's attention"
    clips.append(_run(pipe, arguments, args, rank, what))
    if rank == 0:
        _report(clips, plans, args)


def _policy(args: argparse.Namespace, folder: PipelineFolder) -> AttentionPolicy:
    given = [name for name in ("policy", "backend", "sparsity") if getattr(args, name) is not None]
    if len(given) > 1:
        raise ValueError(f"--{' and --'.join(given)} all say which attention runs; give one, a --policy says the most")
    if folder.gated and given not in ([], ["sparsity"]):
        raise ValueError(
            f"{folder.path} has gates of Video Sparse Attention in {', '.join(folder.gated)}, so that is what runs: "
            f"leave out --{given[0]}, or give --sparsity"
        )
    if args.policy is not None:
        return parse_policy(args.policy)
    if args.backend is not None:
        return AttentionPolicy(default=args.backend)
    if args.sparsity is not None and not folder.gated:
        return AttentionPolicy(rules=[Rule(role="self", backend="VIDEO_SPARSE_ATTN", sparsity=args.sparsity)])
    return AttentionPolicy()


def _num_steps(pipe: Any, arguments: Mapping[str, Any]) -> int | None:
    """Return how many steps the run will have; `None` for schedulers that call the model more often than once a step."""
    default = inspect.signature(pipe.__call__).parameters["num_inference_steps"].default
    return arguments.get("num_inference_steps", default) if getattr(pipe.scheduler, "order", 1) == 1 else None


def _set_attention(
    pipe: Any,
    folder: PipelineFolder,
    policy: AttentionPolicy | None,
    sparsity: float | None = None,
    *,
    num_steps: int | None = None,
) -> str:
    """Put this system's attention on the pipeline, or take it off for `None`; return the plan for people.

    Raises:
        ValueError: The policy doesn't fit the pipeline, or has a rule that decides nothing within `num_steps`.
    """
    if folder.gated:
        trained_for = read_json(folder.path / folder.gated[0] / CONFIG_NAME).get(SPARSITY_NOTE, _GATED_SPARSITY)
        value = 0.0 if policy is None else float(trained_for) if sparsity is None else sparsity
        for name in folder.gated:
            getattr(pipe, name).set_sparsity(value)
        return f"self attention by VIDEO_SPARSE_ATTN with gates, sparsity {value:g}"
    from fastvideo.integrations.diffusers import apply, remove

    if policy is None:
        remove(pipe)
        return ""
    group = dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None
    plans = apply(pipe, attention=policy, parallel=group)
    idle = next(iter(plans.values())).idle_rules(num_steps) if num_steps is not None else ""
    if idle:
        raise ValueError(f"the run has {num_steps} steps, and {idle} in none of them; change --steps or the --policy")
    return str(plans)


def _sparsity_of(pipe: Any, folder: PipelineFolder) -> float:
    return float(getattr(pipe, folder.gated[0]).sparsity)


def _wanted_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the user gave, under the names of pipelines' arguments."""
    if args.prompt is None:
        raise ValueError("generate --model needs --prompt for a pipeline")
    if args.timesteps and (
        any(not 0 < t <= 1000 for t in args.timesteps) or sorted(set(args.timesteps), reverse=True) != args.timesteps
    ):
        raise ValueError(f"expected --timesteps that fall within (0, 1000], got {args.timesteps}")
    if args.timesteps and args.steps is not None:
        raise ValueError("--steps and --timesteps both say how many steps there are; leave out --steps")
    height, width = (None, None) if args.size is None else _parse_size(args.size)
    wanted = {
        "prompt": args.prompt,
        "negative_prompt": args.negative_prompt,
        "height": height,
        "width": width,
        "num_frames": args.frames,
        "num_inference_steps": len(args.timesteps) if args.timesteps else args.steps,
        "guidance_scale": args.guidance,
    }
    if args.frames is not None and args.frames < 1:
        raise ValueError(f"expected --frames of at least 1, got {args.frames}")
    return {name: value for name, value in wanted.items() if value is not None}


def _accepted_arguments(pipe: Any, wanted: dict[str, Any]) -> dict[str, Any]:
    """Return what is wanted, checked against what the pipeline takes."""
    parameters = inspect.signature(pipe.__call__).parameters
    needs = [name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty]
    name = type(pipe).__name__
    if "num_frames" not in parameters or set(needs) - set(wanted):
        lacking = sorted(set(needs) - set(wanted))
        reason = f"it needs {', '.join(lacking)}" if lacking else "it takes no num_frames"
        raise NotImplementedError(
            f"{name} isn't a text-to-video pipeline, nor {IMAGE_TO_VIDEO}: {reason}; call it from Python, after "
            "fastvideo.integrations.diffusers.apply(pipe)"
        )
    if unknown := sorted(set(wanted) - set(parameters)):
        raise ValueError(f"{name} takes no {', '.join(unknown)}; leave the option out")
    if name in ("WanPipeline", IMAGE_TO_VIDEO):
        _check_wan_size(pipe, wanted)
    return wanted


def _check_wan_size(pipe: Any, wanted: dict[str, Any]) -> None:
    """Refuse a size that the pipeline would round, with a warning at most."""
    for name, multiple in zip(("height", "width"), multiples(pipe), strict=True):
        if wanted.get(name, 0) % multiple:
            below = wanted[name] // multiple * multiple
            nearest = f"{below} or {below + multiple}" if below else str(multiple)
            raise ValueError(f"expected a {name} that is a multiple of {multiple}, got {wanted[name]}; take {nearest}")
    between, frames = pipe.vae_scale_factor_temporal, wanted.get("num_frames", 1)
    if (frames - 1) % between:
        below = (frames - 1) // between * between + 1
        raise ValueError(
            f"expected --frames that is a multiple of {between} and one more, got {frames}; take {below} or {below + between}"
        )


def _parse_size(text: str) -> tuple[int, int]:
    """Return height and width of `WIDTHxHEIGHT`."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None or "0" in match.groups():
        raise ValueError(f"expected --size WIDTHxHEIGHT, such as 832x480, got {text!r}")
    return int(match[2]), int(match[1])


def _few_step_scheduler(timesteps: list[float]) -> Any:
    """Return a scheduler for models distilled to a few steps: predict the clean video, add fresh noise of the next level."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler_cls: Any = FlowMatchEulerDiscreteScheduler
    scheduler = scheduler_cls(stochastic_sampling=True)
    of_levels = scheduler.set_timesteps

    def set_timesteps(num_inference_steps: int | None = None, device: Any = None) -> None:  # noqa: ARG001  # a pipeline's call
        of_levels(sigmas=[t / 1000 for t in timesteps], device=device)

    scheduler.set_timesteps = set_timesteps
    return scheduler


def _run(pipe: Any, arguments: dict[str, Any], args: argparse.Namespace, rank: int, what: str) -> _Clip:
    pipe.set_progress_bar_config(desc=what, unit="step", disable=rank != 0, file=sys.stderr)
    # Schedulers that add noise draw it from the global generator.
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    begin = time.perf_counter()
    video = torch.from_numpy(pipe(**arguments, generator=generator, output_type="np").frames[0])
    seconds = time.perf_counter() - begin
    if not torch.isfinite(video).all():
        raise RuntimeError(f"the video made with {what} holds NaN; try --dtype float32")
    return _Clip((video * 255).round().clamp(0, 255).to(torch.uint8), seconds, what)


def _report(clips: list[_Clip], plans: str, args: argparse.Namespace) -> None:
    frames = torch.cat([clip.frames for clip in clips], dim=2)
    sheet_path = args.out.with_suffix(".png")
    write_mp4(frames, args.out, args.fps or 16)
    write_png(contact_sheet(frames, num_columns=4 if len(clips) == 1 else 2), sheet_path)
    print(plans)
    for clip in reversed(clips):
        print(f"{clip.what}: {clip.seconds:.1f} s")
    if args.compare:
        difference = (clips[0].frames.float() - clips[1].frames.float()).abs() / 255
        print(f"difference on a scale of 0 to 1: mean {difference.mean().item():.4f}, largest {difference.max().item():.4f}")
    print(f"wrote {args.out} and {sheet_path}: {args.prompt!r}, seed {args.seed}")
