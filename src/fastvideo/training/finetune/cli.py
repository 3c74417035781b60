r"""`fastvideo train finetune`: fine-tunes a Wan checkpoint on a folder of latents, on one device or, under `torchrun`, on many.

    fastvideo train finetune --model Wan2.1-T2V-1.3B/transformer --data latents --out runs/vsa
    torchrun --nproc-per-node 8 -m fastvideo train finetune --model ... --data ... --out ... --sequence-parallel 2

A run that was killed, or that `--max-seconds` cut off, goes on with the same command and `--resume`. The bundled model has a
name, and a recipe that writes shards for it:

    fastvideo train shards --out clips --clips 64
    fastvideo train finetune --model bundled --data clips --out runs/bundled --max-steps 20 --batch-size 4
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from fastvideo.models.sprites.pipeline import NUM_COORDINATES, SpriteVideoModel
from fastvideo.training.curves import figure_class, plot_run
from fastvideo.training.finetune.benchmark import SHAPES, benchmark
from fastvideo.training.finetune.config import FinetuneConfig
from fastvideo.training.finetune.data import LatentFolder
from fastvideo.training.finetune.origin import BUNDLED, Origin
from fastvideo.training.finetune.parallel import devices, load_sharded
from fastvideo.training.finetune.sprites import write_sprite_shards
from fastvideo.training.finetune.trainer import Finetuner, RunOptions
from fastvideo.training.metrics import ProgressBar

__all__ = ["add_recipes", "run", "run_shards"]

_CHOICES = {"attention": ("vsa", "dense"), "precision": ("bfloat16", "float32")}


def add_recipes(parser: argparse.ArgumentParser) -> None:
    """Add `finetune` below `fastvideo train`."""
    # The parser above reads the recipe's options too, and would take them for abbreviations of its own.
    parser.allow_abbrev = False
    recipes = parser.add_subparsers(metavar="RECIPE", help="by default the bundled model is trained")
    finetune = recipes.add_parser("finetune", help="fine-tune a Wan checkpoint on latents, on one device or many")
    add_arguments(finetune)
    finetune.set_defaults(run=run)
    shards = recipes.add_parser("shards", help="write shards of rendered sprite clips, for the bundled kind of model")
    shards.add_argument("--out", type=Path, help="folder of the shards")
    shards.add_argument("--model", default=BUNDLED, help="whose text encoder embeds the prompts; by default the bundled model")
    shards.add_argument("--clips", type=int, default=256)
    shards.add_argument("--split", choices=("train", "held_out"), default="train")
    shards.add_argument("--num-frames", type=int, help="by default the model's")
    shards.add_argument("--frame-size", type=int, help="rows and columns, 64, 32, 16 or 8; by default the model's")
    shards.add_argument("--seed", type=int, default=0)
    shards.set_defaults(run=run_shards)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the recipe's options: every field of `FinetuneConfig`, and those of a run."""
    where = parser.add_argument_group("run")
    where.add_argument(
        "--model", help="folder of the transformer: config.json and safetensors files; or bundled, for that model"
    )
    where.add_argument("--data", type=Path, help="folder of shards *.safetensors of latents and text embeddings")
    where.add_argument("--held-out", type=Path, help="such a folder to evaluate on")
    where.add_argument("--out", type=Path, help="folder of the run: metrics.jsonl, loss.png, checkpoints/, model/")
    where.add_argument("--device", help="cpu or cuda; by default cuda where there is one")
    where.add_argument("--sequence-parallel", type=int, default=1, metavar="N", help="devices that share an example's tokens")
    where.add_argument("--accumulation", type=int, default=1, metavar="N", help="parts of a device's share of a batch")
    where.add_argument("--no-checkpointing", action="store_true", help="keep activations instead of recomputing blocks")
    where.add_argument("--compile", action="store_true", help="compile each block whole; equal blocks share a graph")
    where.add_argument("--log-interval", type=int, default=10, metavar="STEPS")
    where.add_argument("--eval-interval", type=int, default=250, metavar="STEPS")
    where.add_argument("--eval-batches", type=int, default=4)
    where.add_argument("--checkpoint-interval", type=int, default=250, metavar="STEPS")
    where.add_argument("--max-seconds", type=float, help="save a checkpoint and stop after so long")
    where.add_argument("--resume", action="store_true", help="continue from the folder's last checkpoint")
    speed = parser.add_argument_group("speed of a random model, without files")
    speed.add_argument("--benchmark", type=int, metavar="STEPS", help="time so many steps, VSA against dense, and print")
    speed.add_argument("--shape", choices=sorted(SHAPES), default="1.3b", help="size of the model")
    speed.add_argument("--latent", type=int, nargs=3, default=[21, 60, 104], metavar=("T", "Y", "X"))
    speed.add_argument("--peak-tflops", type=float, help="of one device, to print shares of; known for some GPUs")
    speed.add_argument("--json", action="store_true", help="print the benchmark as JSON")
    settings = parser.add_argument_group("settings (see fastvideo.training.finetune.config.FinetuneConfig)")
    for field in dataclasses.fields(FinetuneConfig):
        options: dict[str, Any] = {"default": field.default}
        if field.name in _CHOICES:
            options["choices"] = _CHOICES[field.name]
        else:
            options["type"] = type(field.default)
        settings.add_argument("--" + field.name.replace("_", "-"), **options)


def run(args: argparse.Namespace) -> int:
    """Run the recipe; return the exit status: 0, or 3 where the time limit came before the last step.

    Raises:
        ValueError: A setting is out of range, or needed options are missing.
        OSError: A folder is missing.
    """
    config = FinetuneConfig(**{field.name: getattr(args, field.name) for field in dataclasses.fields(FinetuneConfig)})
    for name in ("accumulation", "log_interval", "eval_interval", "eval_batches", "checkpoint_interval"):
        if getattr(args, name) < 1:
            raise ValueError(f"expected --{name.replace('_', '-')} of at least 1, got {getattr(args, name)}")
    compiler = "inductor" if args.compile else None
    if args.benchmark is not None:
        return _run_benchmark(args, config, compiler)
    for name in ("model", "data", "out"):
        if getattr(args, name) is None:
            raise ValueError(f"train finetune needs --{name} FOLDER (or --benchmark STEPS)")
    figure_class()  # what the run ends with is asked for before it begins
    origin = Origin.open(args.model)
    num_appended = NUM_COORDINATES if origin.is_sprites else 0
    examples = LatentFolder(args.data, origin.config, num_appended)
    held_out = None if args.held_out is None else LatentFolder(args.held_out, origin.config, num_appended)
    with devices(args.device, args.sequence_parallel) as on, ProgressBar(config.max_steps, shown=on.rank == 0) as bar:
        options = RunOptions(
            folder=args.out,
            accumulation=args.accumulation,
            checkpointing=not args.no_checkpointing,
            compiled=args.compile,
            log_interval=args.log_interval,
            eval_interval=args.eval_interval,
            eval_batches=args.eval_batches,
            checkpoint_interval=args.checkpoint_interval,
            max_seconds=args.max_seconds,
            resume=args.resume,
            sources={"model": str(origin.folder.resolve()), "data": str(args.data.resolve())},
            on_step=bar.advance,
        )
        model = load_sharded(origin, config.attention, on, config.precision, compiler)
        finetuner = Finetuner(config, options, model, on, examples, held_out, origin).run()
        if on.rank == 0:
            plot_run(args.out, args.out / "loss.png")
    return 0 if finetuner.finished_steps == config.max_steps else 3


def run_shards(args: argparse.Namespace) -> int:
    """Write shards of sprite clips; return 0.

    Raises:
        ValueError: A number is out of range, the folder isn't named, or the model is of another kind.
        OSError: A folder is missing, or holds shards already.
    """
    if args.out is None:
        raise ValueError("train shards needs --out FOLDER")
    origin = Origin.open(args.model)
    if not origin.is_sprites:
        raise ValueError(f"{origin.folder} has no text encoder of sprites' prompts; give a model like the bundled one")
    paths = write_sprite_shards(
        args.out,
        SpriteVideoModel.load(origin.folder),
        args.clips,
        split=args.split,
        num_frames=args.num_frames,
        frame_size=args.frame_size,
        seed=args.seed,
    )
    sys.stdout.write(f"wrote {args.clips} clips in {len(paths)} shards, and the null text, to {args.out}\n")
    return 0


def _run_benchmark(args: argparse.Namespace, config: FinetuneConfig, compiler: str | None) -> int:
    num_frames, num_rows, num_columns = args.latent
    with devices(args.device, args.sequence_parallel) as on:
        report = benchmark(
            config,
            on,
            shape=args.shape,
            latent_tyx=(num_frames, num_rows, num_columns),
            num_steps=args.benchmark,
            accumulation=args.accumulation,
            checkpointing=not args.no_checkpointing,
            compiler=compiler,
            peak_tflops=args.peak_tflops,
        )
        if on.rank == 0:
            sys.stdout.write((json.dumps(report.as_dict(), indent=2) if args.json else str(report)) + "\n")
    return 0
