"""Measures how often clips of a sprite model show their held-out prompts, at several sparsities.

    python scripts/measure_quality.py MODEL_FOLDER --prompts 240 --sparsity 0 0.75 --out quality.json

Each prompt has its own seed, so that all sparsities start from the same noise. The criterion is that of
`fastvideo.models.sprites.quality`. The rates are printed as a table and written as JSON; `--min-rate` makes the exit
status 1 where one falls below it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastvideo.models.sprites.pipeline import SamplingSettings, SpriteVideoModel
from fastvideo.models.sprites.prompts import ScenePrompt
from fastvideo.models.sprites.quality import QualityReport, check_clip
from fastvideo.models.sprites.scenes import sample_prompts


def judge_prompts(
    model: SpriteVideoModel,
    scenes: Sequence[ScenePrompt],
    settings: SamplingSettings,
    batch_size: int,
    first_seed: int,
) -> list[QualityReport]:
    """Makes a clip of each scene and checks it."""
    reports: list[QualityReport] = []
    for start in range(0, len(scenes), batch_size):
        batch = scenes[start : start + batch_size]
        seeds = range(first_seed + start, first_seed + start + len(batch))
        clips = model.sample(batch, seeds, settings=settings)
        reports += [check_clip(clip, scene) for clip, scene in zip(clips, batch, strict=True)]
        sys.stderr.write(f"\rsparsity {settings.sparsity:g}: {len(reports)} of {len(scenes)} clips")
    sys.stderr.write("\n")
    return reports


def rate(passed: Sequence[bool]) -> dict[str, float]:
    """Share of passes, its standard error and the number of trials."""
    share = sum(passed) / len(passed) if passed else float("nan")
    error = math.sqrt(share * (1 - share) / len(passed)) if passed else float("nan")
    return {"rate": share, "standard_error": error, "prompts": len(passed)}


def summarize(scenes: Sequence[ScenePrompt], reports: Sequence[QualityReport]) -> dict[str, Any]:
    """Rates over all prompts, by number of sprites, and of each condition over all named sprites."""
    findings = [finding for report in reports for finding in report.findings]
    by_number = {
        f"{number} sprite" + "s" * (number > 1): rate(
            [report.passed for scene, report in zip(scenes, reports, strict=True) if len(scene.sprites) == number]
        )
        for number in (1, 2)
    }
    return {
        "all": rate([report.passed for report in reports]),
        **by_number,
        "sprite is the best match": rate([finding.is_best_match for finding in findings]),
        "direction within 45 degrees": rate([finding.angle_error <= 45 for finding in findings]),
        "mean correlation": sum(finding.score for finding in findings) / len(findings),
        "failures": [dataclasses.asdict(report) for report in reports if not report.passed],
    }


def parse_args(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path, help="folder that `fastvideo train` wrote: config.json, model.safetensors")
    parser.add_argument("--prompts", type=int, default=240, help="held-out prompts, half of them with two sprites")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.0, 0.75])
    parser.add_argument("--steps", type=int, default=None, help="sampling steps; by default the model's own")
    parser.add_argument("--guidance", type=float, default=None, help="guidance scale; by default the model's own")
    parser.add_argument("--shift", type=float, default=None, help="shift of the noise schedule; default: the model's")
    parser.add_argument("--solver", choices=("euler", "heun", "ab2"), default=None, help="default: the model's own")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0, help="chooses prompts; prompt i is made from seed + i")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    parser.add_argument("--min-rate", type=float, default=None, help="fail where the rate over all prompts is lower")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Measures, prints and writes; returns the exit status."""
    args = parse_args(words)
    model = SpriteVideoModel.load(args.model, device=args.device, dtype=getattr(torch, args.dtype))
    given = {"num_steps": args.steps, "guidance_scale": args.guidance, "shift": args.shift, "solver": args.solver}
    settings = dataclasses.replace(model.sampling, **{name: v for name, v in given.items() if v is not None})
    scenes = sample_prompts(args.prompts, "held_out", args.seed)
    results: dict[str, Any] = {}
    for sparsity in args.sparsity:
        began = time.monotonic()
        reports = judge_prompts(model, scenes, dataclasses.replace(settings, sparsity=sparsity), args.batch_size, args.seed)
        results[f"sparsity {sparsity:g}"] = {
            **summarize(scenes, reports),
            "seconds": time.monotonic() - began,
        }
    for name, result in results.items():
        print(name)
        for key, value in result.items():
            if isinstance(value, dict):
                print(f"  {key:28} {value['rate']:7.1%} ± {value['standard_error']:.1%} of {value['prompts']}")
            elif isinstance(value, float):
                print(f"  {key:28} {value:7.3f}")
    if args.out is not None:
        facts = {
            "prompts": args.prompts,
            "seed": args.seed,
            "sampling": {name: v for name, v in dataclasses.asdict(settings).items() if name != "sparsity"},
            "dtype": args.dtype,
            "device": torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else args.device,
            "torch": torch.__version__,
        }
        args.out.write_text(json.dumps({"settings": facts, **results}, indent=2) + "\n", encoding="utf-8")
    rates = [result["all"]["rate"] for result in results.values()]
    return int(args.min_rate is not None and min(rates) < args.min_rate)


if __name__ == "__main__":
    sys.exit(main())
