"""Time and memory of Video Sparse Attention on a CPU against dense attention, in one run.

The whole operation is measured, gate included: means, choice of tiles, coarse part, fine part. Dense and sparse calls are
interleaved and the best of several counts. Peak resident growth is measured in a fresh process for each case. Exits with
status 1 when a target is missed: time ratio 3 in fp32 and 2 in bf16, forward and backward each, and in fp32 less than 4
times the bytes of query, key, value and output together. Run it on a machine that does nothing else.

Example:
    python benchmarks/vsa_cpu.py
    python benchmarks/vsa_cpu.py --grid 16 16 16 --keep 4 --json result.json
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from fastvideo.block_sparse import num_kept_tiles, video_sparse_attention
from fastvideo.video import TileGrid

TARGET_RATIO = {"float32": 3.0, "bfloat16": 2.0}
TARGET_MEMORY = {"float32": 4.0}


def make_inputs(arguments: argparse.Namespace, dtype: str) -> list[torch.Tensor]:
    """Query, key, value, gate and the output's gradient, `[1, S, H, D]`."""
    torch.manual_seed(0)
    num_tokens = arguments.grid[0] * arguments.grid[1] * arguments.grid[2]
    shape = (1, num_tokens, arguments.heads, arguments.head_size)
    return [torch.randn(shape, dtype=getattr(torch, dtype)) for _ in range(5)]


def sparse(arguments: argparse.Namespace, q, k, v, gate) -> torch.Tensor:
    return video_sparse_attention(q, k, v, tuple(arguments.grid), sparsity=1 - 1 / arguments.keep, gate=gate)


def dense(_, q, k, v, gate) -> torch.Tensor:  # noqa: ARG001  # called like `sparse`
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def time_once(operation, arguments, inputs) -> tuple[float, float]:
    """Seconds of one inference call and of one backward."""
    *inputs, dout = inputs
    start = time.perf_counter()
    with torch.no_grad():
        operation(arguments, *inputs)
    forward = time.perf_counter() - start
    inputs = [x.requires_grad_() for x in inputs]
    out = operation(arguments, *inputs)
    start = time.perf_counter()
    torch.autograd.grad(out, inputs, dout, allow_unused=True)
    return forward, time.perf_counter() - start


def measure_time(arguments: argparse.Namespace, dtype: str) -> dict[str, float]:
    inputs = make_inputs(arguments, dtype)
    seconds: dict[str, list[tuple[float, float]]] = {"dense": [], "sparse": []}
    for _ in range(arguments.repeats):
        for name, operation in (("dense", dense), ("sparse", sparse)):
            seconds[name].append(time_once(operation, arguments, inputs))
    best = {name: [min(column) for column in zip(*rows, strict=True)] for name, rows in seconds.items()}
    return {
        "dense_forward_s": best["dense"][0],
        "sparse_forward_s": best["sparse"][0],
        "dense_backward_s": best["dense"][1],
        "sparse_backward_s": best["sparse"][1],
        "forward_ratio": best["dense"][0] / best["sparse"][0],
        "backward_ratio": best["dense"][1] / best["sparse"][1],
    }


def measure_growth(arguments: argparse.Namespace, dtype: str, case: str) -> float:
    """Peak resident growth over one call in this process, in units of the bytes of q, k, v and o."""
    small = argparse.Namespace(**{**vars(arguments), "grid": [4, 8, 8]})
    inputs = make_inputs(small, dtype)
    time_once(sparse, small, inputs)  # loads libraries and starts threads
    *inputs, dout = make_inputs(arguments, dtype)
    unit = 4 * inputs[0].nbytes
    inputs = [x.requires_grad_(case != "inference") for x in inputs]
    out = sparse(arguments, *inputs) if case == "backward" else None
    before = status_kib("VmRSS")
    # Peaks so far don't count. (`ru_maxrss` can't be set back, and starts at the parent's.)
    Path("/proc/self/clear_refs").write_text("5")
    if case != "backward":
        out = sparse(arguments, *inputs)
    if case != "inference":
        torch.autograd.grad(out, inputs, dout)
    return (status_kib("VmHWM") - before) * 1024 / unit


def status_kib(field: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])


def growth_in_fresh_process(dtype: str, case: str) -> float:
    command = [sys.executable, __file__, *sys.argv[1:], "--growth-of", dtype, case]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def describe_run(arguments: argparse.Namespace) -> dict[str, str]:
    grid = TileGrid(tuple(arguments.grid), (4, 4, 4))
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    kept = num_kept_tiles(grid.num_tiles, 1 - 1 / arguments.keep)
    threads, capability = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    return {
        "shape": f"{grid.num_tokens} tokens {grid.grid_tyx}, {arguments.heads} heads x {arguments.head_size}, "
        f"keep {kept}/{grid.num_tiles}, with gate",
        "machine": f"{platform.machine()}, {threads} threads, {capability}",
        "versions": f"torch {torch.__version__}, python {platform.python_version()}, commit {git.stdout.strip() or 'unknown'}",
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grid", type=int, nargs=3, default=[16, 32, 32], help="tokens along time, height, width")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--keep", type=int, default=8, help="keep one tile in so many")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=sorted(TARGET_RATIO), nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--growth-of", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    if arguments.growth_of:
        print(measure_growth(arguments, *arguments.growth_of))
        return 0
    report: dict[str, object] = dict(describe_run(arguments))
    print(*report.values(), sep="\n")
    missed = []
    for dtype in arguments.dtype:
        numbers = measure_time(arguments, dtype)
        for part in ("forward", "backward"):
            ratio = numbers[f"{part}_ratio"]
            print(
                f"{dtype:9} {part:9} dense {numbers[f'dense_{part}_s']:6.3f} s, sparse {numbers[f'sparse_{part}_s']:6.3f} s, "
                f"{ratio:.2f} times as fast (target {TARGET_RATIO[dtype]})"
            )
            if ratio < TARGET_RATIO[dtype]:
                missed.append(f"{dtype} {part} {ratio:.2f}")
        for case in ("inference", "forward+backward", "backward"):
            growth = numbers[f"growth_{case}"] = growth_in_fresh_process(dtype, case)
            target = TARGET_MEMORY.get(dtype, math.inf)
            aim = "no target" if math.isinf(target) else f"target < {target}"
            print(f"{dtype:9} {case:16} peak resident growth {growth:.2f} times q, k, v and o ({aim})")
            if growth >= target:
                missed.append(f"{dtype} {case} growth {growth:.2f}")
        report[dtype] = numbers
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    print(f"MISSED: {', '.join(missed)}" if missed else "all targets met")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
