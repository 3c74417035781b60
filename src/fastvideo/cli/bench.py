"""`fastvideo bench`: time, memory and error of attention on named shapes, dense and sparse side by side."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import torch

from fastvideo.attention.registry import backend_name, registered_backends
from fastvideo.benchmark.cases import AUTOMATIC, DEFAULT_TILE, STA, VSA, make_cases
from fastvideo.benchmark.inputs import KINDS, make_inputs
from fastvideo.benchmark.measure import describe_run
from fastvideo.benchmark.report import format_rows, plot_results
from fastvideo.benchmark.run import PASSES, Row, run_cases
from fastvideo.benchmark.shapes import SHAPES, shape_named
from fastvideo.block_sparse.impl import IMPLEMENTATIONS
from fastvideo.cli import bench_parallel

__all__ = ["add_arguments", "run"]

_DTYPES = ("bfloat16", "float16", "float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"of {', '.join(SHAPES)}; cpu-16k where there is no GPU")
    parser.add_argument("--backends", nargs="+", default=["TORCH_SDPA", "FLASH_ATTN", "VIDEO_SPARSE_ATTN"], metavar="NAME")
    parser.add_argument(
        "--impls",
        nargs="+",
        metavar="NAME",
        help=f"implementations of {VSA}: {AUTOMATIC} (by default), all, {', '.join(IMPLEMENTATIONS)}",
    )
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--sparsities", nargs="+", type=float, metavar="S", help=f"of {VSA}, in [0, 1); else the shape's own")
    parser.add_argument(
        "--tiles",
        nargs="+",
        metavar="TxYxX",
        help=f"of {VSA}: {DEFAULT_TILE} (by default), auto, of at most 64 tokens, or auto128; a fine stage alone has its own",
    )
    parser.add_argument("--window", nargs=3, type=int, metavar=("T", "Y", "X"), help=f"of {STA}, in tiles; by default 3 3 3")
    parser.add_argument("--inputs", nargs="+", choices=KINDS, default=["random"])
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16")
    parser.add_argument("--device", help="cpu or cuda; by default cuda where there is one")
    parser.add_argument("--rounds", type=int, default=3, help="how many times each case is timed")
    parser.add_argument(
        "--rest", type=float, default=0.0, metavar="S", help="seconds of rest before each timing, by default none"
    )
    parser.add_argument("--no-errors", action="store_true", help="compare nothing with float64")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the rows, the device, versions and commit to this file")
    parser.add_argument("--plot", type=Path, help="draw time against sparsity to this PNG")
    bench_parallel.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print tables and write files; return 0, or 1 if a row is over budget, none ran or there is nothing to draw."""
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    _check(args, device)
    if args.parallel:
        return bench_parallel.run(args, device.type)
    about = describe_run(device)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    results: list[tuple[str, str, list[Row]]] = []
    for name in args.shapes or [next(iter(SHAPES)) if device.type == "cuda" else "cpu-16k"]:
        for kind in args.inputs:
            rows = _measure(name, kind, args, device)
            print(f"\n{name}: {shape_named(name)}, {args.dtype}, {kind} inputs\n{format_rows(rows)}", flush=True)
            results.append((name, kind, rows))
            # What was measured stays if a later shape fails.
            _write(args, about, results)
    if args.plot is not None and not _has_ranked_rows(results):
        print(f"fastvideo bench: no row is ranked, so {args.plot} was not drawn", file=sys.stderr)
        return 1
    if all(row.refused is not None for _, _, rows in results for row in rows):
        print("fastvideo bench: nothing was measured: no case could run", file=sys.stderr)
        return 1
    return 1 if any(row.over_budget for _, _, rows in results for row in rows) else 0


def _check(args: argparse.Namespace, device: torch.device) -> None:
    """Refuse what would fail only after the first measurement.

    Raises:
        ValueError: An option is out of range or for the other kind of run, or the device isn't there.
    """
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"expected --device as cpu or cuda, got {args.device}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"torch sees no CUDA device here, got --device {args.device}; leave it out to measure the CPU")
    bench_parallel.check_meant(args)
    if args.rounds < 1:
        raise ValueError(f"expected --rounds of at least 1, got {args.rounds}")
    if not 0 <= args.rest < math.inf:
        raise ValueError(f"expected --rest as seconds of at least 0, got {args.rest}")
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"expected --seed in [0, 2^63), got {args.seed}")
    for name in args.shapes:
        shape_named(name)
    for sparsity in args.sparsities or ():
        if not 0 <= sparsity < 1:
            raise ValueError(f"expected --sparsities in [0, 1), got {sparsity}")
    if args.plot is not None and args.plot.suffix != ".png":
        raise ValueError(f"expected --plot to end in .png, got {args.plot}")
    if "all" in (args.impls or ()):
        args.impls = [name for name in IMPLEMENTATIONS if name != "reference"]
    if "all" in args.backends:
        args.backends = list(registered_backends())
    _check_used(args)
    for path in (args.json, args.plot):
        if path is not None and path.is_dir():
            raise ValueError(f"expected the name of a file, got the folder {path}")
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)


def _check_used(args: argparse.Namespace) -> None:
    """Refuse options that no case would read.

    Raises:
        ValueError: An option of a backend that isn't measured, or a tile for a fine stage.
    """
    backends = {backend_name(name) for name in args.backends}
    # Several devices refuse options that are for one, whatever the backend.
    options = (
        {"tiles": VSA, "sparsities": VSA} if args.parallel else {"tiles": VSA, "sparsities": VSA, "impls": VSA, "window": STA}
    )
    for option, backend in options.items():
        if getattr(args, option) is not None and backend not in backends:
            raise ValueError(f"--{option} is of {backend}, which is not among --backends {' '.join(args.backends)}")
    fine = [name for name in args.shapes if shape_named(name).fine_tile_tyx is not None]
    if args.tiles is not None and fine:
        raise ValueError(f"{', '.join(fine)}: a fine stage alone has a tile of its own; leave out --tiles or name whole layers")


def _measure(name: str, kind: str, args: argparse.Namespace, device: torch.device) -> list[Row]:
    shape = shape_named(name)
    inputs = make_inputs(shape, kind, getattr(torch, args.dtype), device, args.seed)
    cases = make_cases(
        shape,
        inputs,
        kind,
        backends=args.backends,
        impls=args.impls or [AUTOMATIC],
        sparsities=args.sparsities or [shape.sparsity],
        tiles=args.tiles or [DEFAULT_TILE],
        window_tyx=tuple(args.window or (3, 3, 3)),
    )

    def tell(text: str) -> None:
        print(f"{name}, {kind}: {text}", file=sys.stderr, flush=True)

    return run_cases(
        cases, inputs, passes=args.passes, rounds=args.rounds, rest=args.rest, checks_errors=not args.no_errors, report=tell
    )


def _write(args: argparse.Namespace, about: dict[str, str], results: list[tuple[str, str, list[Row]]]) -> None:
    if args.json is not None:
        tables = [
            {"shape": name, "is": str(shape_named(name)), "inputs": kind, "rows": [row.as_dict() for row in rows]}
            for name, kind, rows in results
        ]
        data = {"about": about, "dtype": args.dtype, "rounds": args.rounds, "rest_s": args.rest, "results": tables}
        args.json.write_text(json.dumps(data, indent=1) + "\n")
    if args.plot is not None and _has_ranked_rows(results):
        plot_results([(f"{name}, {kind} inputs", rows) for name, kind, rows in results], args.plot)


def _has_ranked_rows(results: list[tuple[str, str, list[Row]]]) -> bool:
    return any(row.is_ranked for _, _, rows in results for row in rows)
