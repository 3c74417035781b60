r"""`fastvideo train`: trains the bundled sprite model, resumes a run, or draws the loss curves of finished runs.

The bundled model and its dense counterpart come from one GPU and

    fastvideo train --out runs/vsa --attention vsa --compile blocks
    fastvideo train --out runs/dense --attention dense --compile blocks
    fastvideo train --plot loss.png --runs vsa=runs/vsa dense=runs/dense

A run that `--max-seconds` cut off goes on with the same command and `--resume`. A finished model is trained further, with
the settings of a new run, by `--init bundled` or `--init FOLDER`. A trial on a CPU:

    fastvideo train --out runs/trial --attention dense --dim 64 --head-size 32 --num-layers 2 --text-dim 64 \
        --num-frames 4 --frame-size 32 --num-sprites 8 --batch-size 8 --max-steps 200 --precision float32
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from pathlib import Path

import torch

from fastvideo.training.config import TrainConfig
from fastvideo.training.curves import plot_runs
from fastvideo.training.finetune.cli import add_recipes
from fastvideo.training.metrics import ProgressBar
from fastvideo.training.trainer import RunOptions, Trainer

logger = logging.getLogger(__name__)

_CHOICES = {
    "attention": ("vsa", "dense"),
    "optimizer": ("muon", "adamw"),
    "precision": ("bfloat16", "float32"),
    "compile": ("none", "blocks", "model"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options: every field of `TrainConfig`, and those of a run."""
    add_recipes(parser)
    run = parser.add_argument_group("run")
    run.add_argument("--out", type=Path, help="folder of the run: metrics.jsonl, checkpoint.pt, model/")
    run.add_argument("--device", default=None, help="cuda, cuda:1, cpu; by default cuda where there is one")
    run.add_argument("--max-seconds", type=float, default=None, help="save a checkpoint and stop after so long")
    run.add_argument("--resume", action="store_true", help="continue from the folder's checkpoint")
    run.add_argument("--init", metavar="FOLDER", help="start from the weights of this model; bundled for that of this package")
    run.add_argument("--log-interval", type=int, default=25, metavar="STEPS")
    run.add_argument("--eval-interval", type=int, default=250, metavar="STEPS")
    run.add_argument("--eval-clips", type=int, default=128)
    run.add_argument("--checkpoint-interval", type=int, default=1000, metavar="STEPS")
    run.add_argument("--plot", type=Path, metavar="PNG", help="train nothing, draw the loss curves of --runs")
    run.add_argument("--runs", nargs="+", default=[], metavar="NAME=FOLDER", help="runs to draw")
    settings = parser.add_argument_group("settings (see fastvideo.training.config.TrainConfig)")
    for field in dataclasses.fields(TrainConfig):
        flag = "--" + field.name.replace("_", "-")
        if field.name in _CHOICES:
            settings.add_argument(flag, choices=_CHOICES[field.name], default=field.default)
        elif isinstance(field.default, tuple):
            settings.add_argument(flag, type=float, nargs="+", default=list(field.default))
        else:
            kind = float if isinstance(field.default, float) else int
            settings.add_argument(flag, type=kind, default=field.default)


def run(args: argparse.Namespace) -> int:
    """Run the verb; return the exit status: 0, or 3 where the time limit came before the last step.

    Raises:
        ValueError: A setting is out of range, or needed options are missing.
    """
    if args.plot is not None:
        plot_runs(_named_folders(args.runs), args.plot)
        return 0
    if args.out is None:
        raise ValueError("train needs --out FOLDER, where the run keeps its files")
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    config = TrainConfig(**{name: getattr(args, name) for name in names})
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    bar = ProgressBar(config.max_steps)
    options = RunOptions(
        folder=args.out,
        device=device,
        max_seconds=args.max_seconds,
        log_interval=args.log_interval,
        eval_interval=args.eval_interval,
        eval_clips=args.eval_clips,
        checkpoint_interval=args.checkpoint_interval,
        resume=args.resume,
        initial_weights=args.init,
        on_step=bar.advance,
    )
    trainer = Trainer(config, options)
    logger.info("training %d parameters on %s", trainer.num_parameters, device)
    with bar:
        trainer.run()
    return 0 if trainer.finished_steps == config.max_steps else 3


def _named_folders(runs: list[str]) -> dict[str, Path]:
    pairs = [text.partition("=") for text in runs]
    if not pairs or not all(name and equals and folder for name, equals, folder in pairs):
        raise ValueError(f"--plot needs --runs NAME=FOLDER [NAME=FOLDER ...], got {runs}")
    return {name: Path(folder) for name, _, folder in pairs}
