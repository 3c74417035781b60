"""`fastvideo generate`: a video from a prompt, on one device or, under `torchrun`, on several."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from fastvideo.attention.backends.abstract import forward_keywords
from fastvideo.attention.registry import backend_name, load_backend
from fastvideo.attention.selector import use_attn_backend
from fastvideo.cli.media import contact_sheet, enlarge, to_pixels, write_mp4, write_png
from fastvideo.models.sprites.pipeline import SamplingSettings, SpriteVideoModel, bundled_model
from fastvideo.models.sprites.prompts import describe_vocabulary, parse_prompt
from fastvideo.settings import Settings

__all__ = ["add_arguments", "run"]

DEFAULT_PROMPT = "red heart moving left, green tree moving up on a navy background"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("--prompt", help=f"by default, for the bundled model: {DEFAULT_PROMPT!r}")
    parser.add_argument("--out", type=Path, default=Path("sample.mp4"), help="the video; its contact sheet lies beside it")
    parser.add_argument("--model", type=Path, help="folder of a diffusers pipeline, or of a trained model like the bundled one")
    parser.add_argument("--backend", help="attention backend, by name; it runs or the command fails and says why")
    parser.add_argument("--sparsity", type=float, help="share of key tiles to skip, in [0, 1); by default the model's own")
    parser.add_argument("--steps", type=int, help="denoising steps; by default the model's own")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance, 1 turns it off; by default the model's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", action="store_true", help="render with dense attention too, side by side, and print times")
    parser.add_argument("--device", help="cpu or cuda; by default cuda where there is one")
    bundled = parser.add_argument_group("bundled model")
    bundled.add_argument("--scale", type=int, help="how many pixels wide each pixel of the model is drawn, by default 4")
    bundled.add_argument("--words", action="store_true", help="list the words of prompts and stop")
    pipelines = parser.add_argument_group("diffusers pipelines; what isn't given is the pipeline's own default")
    pipelines.add_argument("--negative-prompt")
    pipelines.add_argument("--image", type=Path, help="the first frame, for pipelines of image to video")
    pipelines.add_argument("--size", metavar="WIDTHxHEIGHT", help="of the video, in pixels")
    pipelines.add_argument("--frames", type=int, help="of the video")
    pipelines.add_argument("--fps", type=int, help="frames per second of the file, by default 16")
    pipelines.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="by default bfloat16 on a GPU")
    pipelines.add_argument("--policy", help="which attention runs where and when: a backend's name, JSON, or a file *.json")
    pipelines.add_argument(
        "--timesteps", type=float, nargs="+", help="of a model distilled to a few steps: 1000 757 522 for FastWan"
    )


def run(args: argparse.Namespace) -> int:
    """Generate and write the files; return 0."""
    if args.words:
        print(describe_vocabulary())
        return 0
    if args.model is not None and not args.model.is_dir():
        what = "is a file" if args.model.exists() else "is missing"
        raise FileNotFoundError(f"{args.model} {what}: give the folder of a diffusers pipeline, or of a trained model")
    if args.model is not None and _is_pipeline(args.model):
        from fastvideo.cli.pipeline import generate_with_pipeline

        _check(args)
        if args.scale is not None:
            raise ValueError("--scale is for the bundled model; give a pipeline --size WIDTHxHEIGHT")
        with _ranks(args.device) as (rank, device):
            generate_with_pipeline(args, rank, device)
        return 0
    _fill_in(args)
    _check(args)
    with _ranks(args.device) as (rank, device):
        model = SpriteVideoModel.load(args.model or bundled_model(), device=device)
        if args.backend and model.transformer.config.has_gate:
            _check_takes_gate(args.backend)
        changes = {"sparsity": args.sparsity, "num_steps": args.steps, "guidance_scale": args.guidance}
        settings = dataclasses.replace(model.sampling, **{name: x for name, x in changes.items() if x is not None})
        with use_attn_backend(args.backend) if args.backend else contextlib.nullcontext():
            clips = [_sample(model, args, settings, rank)]
            if args.compare:
                clips.insert(0, _sample(model, args, dataclasses.replace(settings, sparsity=0.0), rank))
        if rank == 0:
            _report(clips, settings, args)
    return 0


def _is_pipeline(folder: Path) -> bool:
    """Whether a folder is meant as a diffusers pipeline, whole or not."""
    return any((folder / name).exists() for name in ("model_index.json", "transformer", "vae", "scheduler"))


def _fill_in(args: argparse.Namespace) -> None:
    """Fill in the bundled model's defaults.

    Raises:
        ValueError: An option is for pipelines only, or the prompt is outside the grammar.
    """
    for name in ("negative_prompt", "image", "size", "frames", "fps", "dtype", "policy", "timesteps"):
        if getattr(args, name) is not None:
            raise ValueError(
                f"--{name.replace('_', '-')} is for diffusers pipelines, and "
                f"{args.model or 'the bundled model'} isn't one (no model_index.json)"
            )
    args.prompt = DEFAULT_PROMPT if args.prompt is None else args.prompt
    args.scale = 4 if args.scale is None else args.scale
    parse_prompt(args.prompt)


def _check(args: argparse.Namespace) -> None:
    """Refuse what would fail only after the video is made.

    Raises:
        ValueError: An option is out of range.
        OSError: The folder of the output can't be written.
    """
    if args.out.suffix != ".mp4":
        raise ValueError(f"expected --out to end in .mp4 (its contact sheet ends in .png), got {args.out}")
    for path in (args.out, args.out.with_suffix(".png")):
        if path.is_dir():
            raise ValueError(f"expected --out to name a file, and {path} is a folder")
    if args.fps is not None and args.fps < 1:
        raise ValueError(f"expected --fps of at least 1, got {args.fps}")
    if args.scale is not None and args.scale < 1:
        raise ValueError(f"expected --scale of at least 1, got {args.scale}")
    if args.steps is not None and args.steps < 1:
        raise ValueError(f"expected --steps of at least 1, got {args.steps}")
    if args.sparsity is not None and not 0 <= args.sparsity < 1:
        raise ValueError(f"expected --sparsity in [0, 1), got {args.sparsity}")
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"expected --seed in [0, 2^63), got {args.seed}")
    if args.guidance is not None and not math.isfinite(args.guidance):
        raise ValueError(f"expected a finite --guidance, got {args.guidance}")
    if args.device is not None and torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"torch sees no CUDA device here, got --device {args.device}; leave it out to run on the CPU")
    args.out.parent.mkdir(parents=True, exist_ok=True)


def _check_takes_gate(backend: str) -> None:
    """Refuse a backend that can't run a gated model.

    Raises:
        ValueError: Its implementation takes no gate.
        UnknownBackend: No backend has that name.
    """
    if "gate_compress" not in forward_keywords(load_backend(backend_name(backend)).get_impl_cls()):
        raise ValueError(
            f"--backend {backend} takes no gate, and the model's self attention has one; leave out --backend, and give "
            "--sparsity 0 for dense attention"
        )


def _sample(
    model: SpriteVideoModel, args: argparse.Namespace, settings: SamplingSettings, rank: int
) -> tuple[torch.Tensor, float]:
    """Return a clip `[3, T, Y, X]` and the seconds it took."""
    from tqdm import tqdm

    begin = time.perf_counter()
    label = f"sparsity {settings.sparsity:g}"
    with tqdm(total=settings.num_steps, desc=label, unit="step", disable=rank != 0, file=sys.stderr) as bar:
        clip = model.sample([args.prompt], [args.seed], settings=settings, on_step=lambda _: bar.update())[0].cpu()
    return clip, time.perf_counter() - begin


def _report(clips: list[tuple[torch.Tensor, float]], settings: SamplingSettings, args: argparse.Namespace) -> None:
    frames = enlarge(torch.cat([to_pixels(clip) for clip, _ in clips], dim=2), args.scale)
    sheet_path = args.out.with_suffix(".png")
    write_mp4(frames, args.out)
    write_png(contact_sheet(frames, num_columns=4 if len(clips) == 1 else 2), sheet_path)
    for (_, seconds), sparsity in zip(reversed(clips), (settings.sparsity, 0.0), strict=False):
        print(f"sparsity {sparsity:g}: {settings.num_steps} steps in {seconds:.1f} s")
    if args.compare:
        difference = (clips[0][0] - clips[1][0]).abs() / 2
        print(f"difference on a scale of 0 to 1: mean {difference.mean().item():.4f}, largest {difference.max().item():.4f}")
    print(f"wrote {args.out} and {sheet_path}: {args.prompt!r}, seed {args.seed}")


@contextlib.contextmanager
def _ranks(device: str | None) -> Iterator[tuple[int, torch.device]]:
    """Join the process group that `torchrun` describes, if it does; yield this process's rank and device."""
    kind = torch.device(device).type if device else "cuda" if torch.cuda.is_available() else "cpu"
    local_rank = Settings.from_environment().local_rank
    if local_rank is None:
        yield 0, torch.device(device or kind)
        return
    place = torch.device(kind, int(local_rank)) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", device_id=place if kind == "cuda" else None)
    try:
        yield dist.get_rank(), place
    finally:
        dist.destroy_process_group()
