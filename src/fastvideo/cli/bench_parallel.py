"""`fastvideo bench --parallel`: one attention shared over the ranks that `torchrun` starts, in every layout."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fastvideo.benchmark.cases import DEFAULT_TILE
from fastvideo.benchmark.measure import describe_run
from fastvideo.benchmark.parallel_cases import make_parallel_cases
from fastvideo.benchmark.parallel_peers import make_peer_cases
from fastvideo.benchmark.parallel_problem import make_problem
from fastvideo.benchmark.parallel_ranks import Ranks
from fastvideo.benchmark.parallel_row import ONE_CARD, ParallelRow
from fastvideo.benchmark.parallel_run import run_parallel
from fastvideo.benchmark.report import format_parallel_rows
from fastvideo.benchmark.shapes import shape_named
from fastvideo.distributed import init_sequence_parallel
from fastvideo.settings import Settings

__all__ = ["add_arguments", "check_meant", "run"]

_TIMEOUT = timedelta(minutes=3)
_START = "torchrun --nproc-per-node 2 -m fastvideo bench --parallel SHAPE"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `--parallel`."""
    group = parser.add_argument_group("several devices", f"measure one attention shared over ranks, started by: {_START}")
    group.add_argument("--parallel", action="store_true", help="share each shape over all ranks, in every layout")
    group.add_argument("--layouts", nargs="+", metavar="NAME", help="of those that `fastvideo plan` lists; by default all")
    group.add_argument(
        "--head-groups", nargs="+", default=["auto"], metavar="N", help="groups of heads that overlap: auto, or numbers"
    )
    group.add_argument("--fp8", action="store_true", help="also send in float8 where a layout can; its error is printed")
    group.add_argument("--peers", action="store_true", help="also measure yunchang's and diffusers' where they are installed")
    group.add_argument("--model", action="store_true", help="print what the model on paper says beside each time")
    group.add_argument("--round-ms", type=float, default=150.0, metavar="MS", help="how long a case is timed for in a round")


def check_meant(args: argparse.Namespace) -> None:
    """Refuse options of `--parallel` without it.

    Raises:
        ValueError: Such an option is given.
    """
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    given = [name for name, default in vars(parser.parse_args([])).items() if getattr(args, name) != default]
    if given and not args.parallel:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"{options}: for --parallel alone; add it, or leave that out")


def run(args: argparse.Namespace, device_type: str) -> int:
    """Measure on all ranks; rank 0 prints tables and writes the file.

    Returns:
        0, or on rank 0 1 if a row of ours is over budget or no case ran on several ranks.

    Raises:
        RuntimeError: There is one rank alone.
        ValueError: An option is out of range.
    """
    head_groups = _check(args)
    init_sequence_parallel(device_type=device_type, timeout=_TIMEOUT)
    try:
        status = _measure_all(args, device_type, head_groups)
    finally:
        dist.destroy_process_group()
    return status


def _check(args: argparse.Namespace) -> list[int | None]:
    """Refuse what can't be measured before ranks meet; return the groups of heads."""
    if Settings.from_environment().local_rank is None:
        raise RuntimeError(f"--parallel measures several ranks, and this process was started alone; start it with: {_START}")
    if not args.shapes:
        raise ValueError(f"expected the names of shapes; start it with: {_START}")
    if args.plot is not None:
        raise ValueError("--plot draws time against sparsity on one device, and --parallel measures no such thing")
    if args.sparsities is not None and len(args.sparsities) > 1:
        raise ValueError(f"expected one of --sparsities with --parallel, got {args.sparsities}")
    if (args.tiles is not None and len(args.tiles) > 1) or args.inputs != ["random"]:
        raise ValueError(f"expected one of --tiles and random --inputs with --parallel, got {args.tiles} and {args.inputs}")
    if args.impls is not None or args.window is not None:
        raise ValueError("--impls and --window are for one device; leave them out with --parallel")
    if args.rest:
        raise ValueError("--rest is for one device, where cases are timed one by one; leave it out with --parallel")
    if not args.round_ms > 0:
        raise ValueError(f"expected --round-ms above 0, got {args.round_ms}")
    groups: list[int | None] = []
    for text in args.head_groups:
        if text != "auto" and not (text.isdecimal() and int(text) > 0):
            raise ValueError(f"expected --head-groups as auto or positive numbers, got {text!r}")
        groups.append(None if text == "auto" else int(text))
    return groups


def _measure_all(args: argparse.Namespace, device_type: str, head_groups: list[int | None]) -> int:
    size = dist.get_world_size()
    if size == 1:
        raise RuntimeError(f"--parallel measures several ranks, and torchrun started one; start it with: {_START}")
    device = torch.device("cuda", torch.cuda.current_device()) if device_type == "cuda" else torch.device("cpu")
    ranks = Ranks(device)
    about = {**describe_run(device), "ranks": str(size), "transport": str(dist.get_backend())}
    _print(ranks, ", ".join(f"{name} {value}" for name, value in about.items()))
    results: list[dict[str, Any]] = []
    is_over_budget, has_run = False, False
    for name in args.shapes:
        results.append({"shape": name, "is": str(shape_named(name)), "ranks": size, "rows": []})
        save = _saver(args, ranks, about, results)
        rows = _measure(name, args, ranks, head_groups, save)
        save(rows)  # rows of which none ran say why
        _print(ranks, f"\n{name}: {shape_named(name)}, {args.dtype}, {size} ranks")
        _print(ranks, format_parallel_rows(rows, with_model=args.model))
        is_over_budget |= any(row.over_budget and row.library == "fastvideo" for row in rows)
        has_run |= any(row.refused is None and row.library != ONE_CARD for row in rows)
    ranks.tell(None)  # nobody leaves while another still talks
    if not has_run and ranks.rank == 0:
        print("fastvideo bench: nothing was measured: no case could run on several ranks", file=sys.stderr)
    return 1 if (is_over_budget or not has_run) and ranks.rank == 0 else 0


def _measure(
    name: str,
    args: argparse.Namespace,
    ranks: Ranks,
    head_groups: list[int | None],
    save: Callable[[list[ParallelRow]], None],
) -> list[ParallelRow]:
    problem = make_problem(
        shape_named(name),
        getattr(torch, args.dtype),
        ranks.device,
        sparsity=args.sparsities[0] if args.sparsities else None,
        tile=args.tiles[0] if args.tiles else DEFAULT_TILE,
        seed=args.seed,
    )
    cases = make_parallel_cases(
        problem, backends=args.backends, layouts=args.layouts, head_groups=head_groups, with_float8=args.fp8
    )
    if args.peers:
        cases += make_peer_cases(problem, args.layouts)

    def tell(text: str) -> None:
        if ranks.rank == 0:
            print(f"{name}: {text}", file=sys.stderr, flush=True)

    return run_parallel(
        problem,
        cases,
        ranks,
        passes=args.passes,
        rounds=args.rounds,
        round_ms=args.round_ms,
        checks_errors=not args.no_errors,
        report=tell,
        save=save,
    )


def _saver(
    args: argparse.Namespace, ranks: Ranks, about: dict[str, str], results: list[dict[str, Any]]
) -> Callable[[list[ParallelRow]], None]:
    """Return what keeps the rows of the last result in the file."""

    def save(rows: list[ParallelRow]) -> None:
        if args.json is not None and ranks.rank == 0:
            results[-1]["rows"] = [row.as_dict() for row in rows]
            data = {"about": about, "dtype": args.dtype, "rounds": args.rounds, "results": results}
            args.json.write_text(json.dumps(data, indent=1) + "\n")

    return save


def _print(ranks: Ranks, text: str) -> None:
    if ranks.rank == 0:
        print(text, flush=True)
