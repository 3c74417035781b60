"""Time the Hopper kernels one by one, in variants of how they are launched, with their errors; for tuning.

`fastvideo bench` times the operator beside others. This looks inside: milliseconds of each kernel while all of them run over
and over (so at the clock that the power limit leaves), and what a variant changes. A variant is a list such as
`step=0,scratch=256`; its names are `step` (bytes of a head in MiB from which programs walk in step), `looks` (of programs in
step for each other), `scratch` (MiB), `in_place` (0: always pack), and the stages of the rings, `K`, `V`, `DQ` and `DKDV`.

Example:
    python benchmarks/hopper_kernels.py fine-49k-tile64 --variants "" step=0 in_place=0 --json result.json
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastvideo.benchmark.accuracy import Attended, compare
from fastvideo.benchmark.inputs import make_inputs, make_lists
from fastvideo.benchmark.measure import describe_run, kernel_ms, median_ms, sm_clock_mhz
from fastvideo.benchmark.shapes import SHAPES, BenchmarkShape, shape_named
from fastvideo.block_sparse import BlockPattern, TileLayout, num_kept_tiles
from fastvideo.block_sparse.impl.hopper import launch
from fastvideo.video import TileGrid

DEVICE = torch.device("cuda")
KINDS = ("random", "video-like", "skewed")


def make_pattern(shape: BenchmarkShape, kind: str, tile_tyx: tuple[int, int, int]) -> BlockPattern:
    """Lists of a fine stage alone, or random ones over a video's tiles with tokens in raster order."""
    if shape.fine_tile_tyx is not None:
        grid = TileGrid(shape.grid_tyx, shape.fine_tile_tyx)
        layout = TileLayout.uniform(shape.num_tokens, grid.max_size, device=DEVICE)
        return BlockPattern(layout, layout, make_lists(shape, kind, num_kept_tiles(grid.num_tiles, shape.sparsity), DEVICE))
    grid = TileGrid(shape.grid_tyx, tile_tyx)
    layout = TileLayout.from_sizes(grid.sizes, order=grid.tensors(DEVICE).order, device=DEVICE)
    noise = torch.rand(shape.batch, shape.num_heads, grid.num_tiles, grid.num_tiles, device=DEVICE)
    kept = num_kept_tiles(grid.num_tiles, shape.sparsity)
    return BlockPattern(layout, layout, noise.topk(kept).indices.sort(dim=-1).values.int())


def set_variant(variant: str, shipped: dict[str, Any]) -> None:
    """Launch as `variant` says, and otherwise as shipped."""
    for name, value in shipped.items():
        setattr(launch, name, {size: dict(row) for size, row in value.items()} if isinstance(value, dict) else value)
    for name, text in (part.split("=") for part in variant.split(",") if part):
        value = int(text)
        if name == "in_place":
            launch.in_place = shipped["in_place"] if value else (lambda *_: None)
        elif name in ("step", "scratch"):
            setattr(launch, {"step": "_IN_STEP_BYTES", "scratch": "_SCRATCH_BYTES"}[name], value << 20)
        elif name == "looks":
            launch._LOOKS = value
        else:
            table, key = {
                "K": (launch.FWD, "K_STAGES"),
                "V": (launch.FWD, "V_STAGES"),
                "DQ": (launch.DQ, "STAGES"),
                "DKDV": (launch.DKDV, "STAGES"),
            }[name]
            for row in table.values():
                row[key] = value


def measure(shape: BenchmarkShape, kind: str, pattern: BlockPattern, arguments: argparse.Namespace) -> dict[str, Any]:
    """Times, rates, errors and kernels of one variant."""
    inputs = make_inputs(shape, kind, torch.bfloat16, DEVICE)
    leaves = [inputs.query, inputs.key, inputs.value]
    scale = shape.head_size**-0.5
    forward = partial(launch.forward, *leaves, pattern, scale)
    out, lse = forward()
    backward = partial(launch.backward, inputs.dout, None, *leaves, out, lse, pattern, scale)
    sizes = pattern.key_tiles.sizes.double()
    pairs = {
        "real": float(sum((sizes[lists.long()].sum(-1) * sizes).sum() for lists in pattern.indices.flatten(0, 1))),
        "padded": float(pattern.indices.numel()) * pattern.key_tiles.max_size**2,
    }
    row: dict[str, Any] = {}
    for direction, call, factor in (("forward", forward, 4), ("backward", backward, 10)):
        time = median_ms(call, DEVICE, arguments.rep)
        rates = {f"{direction}_{name}_tflops": factor * shape.head_size * n / time / 1e9 for name, n in pairs.items()}
        row |= {f"{direction}_ms": time, **rates, f"{direction}_kernel_ms": kernel_ms(call)}
        row[f"{direction}_clock_mhz_and_watts"] = sm_clock_mhz(call, DEVICE)
    if not arguments.no_errors:
        results = dict(zip(("out", "dquery", "dkey", "dvalue"), (out, *backward()), strict=True))
        found = compare(Attended(pattern.indices, None, pattern.key_tiles), leaves, inputs.dout, results)
        row |= {"errors": found.errors, "over_budget": found.over_budget}
    return row


def report(name: str, row: dict[str, Any]) -> None:
    """Print a row."""
    for direction in ("forward", "backward"):
        rates = [f"{row[f'{direction}_{kind}_tflops']:.0f} {kind}" for kind in ("padded", "real")]
        print(f"{name} {direction} {row[f'{direction}_ms']:.3f} ms, TFLOP/s {', '.join(rates)}", flush=True)
        print("   ", ", ".join(f"{kernel[:36]} {ms:.3f}" for kernel, ms in row[f"{direction}_kernel_ms"].items()))
    if "errors" in row:
        state = f"OVER BUDGET: {row['over_budget']}" if row["over_budget"] else "within budget"
        print("   ", ", ".join(f"{key} {value:.1e}" for key, value in row["errors"].items()), state, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="+", choices=SHAPES)
    parser.add_argument("--inputs", nargs="+", choices=KINDS, default=["random"], help="of a fine stage alone")
    parser.add_argument("--tile", nargs=3, type=int, default=[4, 4, 4], help="of a whole layer's grid")
    parser.add_argument("--variants", nargs="+", default=[""])
    parser.add_argument("--rep", type=int, default=100, help="milliseconds of repetitions")
    parser.add_argument("--no-errors", action="store_true")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    names = ("_IN_STEP_BYTES", "_LOOKS", "_SCRATCH_BYTES", "in_place", "FWD", "DQ", "DKDV")
    shipped = {name: getattr(launch, name) for name in names}
    shipped = {name: {k: dict(v) for k, v in x.items()} if isinstance(x, dict) else x for name, x in shipped.items()}
    rows = []
    for shape in arguments.shapes:
        for kind in arguments.inputs:
            torch.manual_seed(0)
            pattern = make_pattern(shape_named(shape), kind, tuple(arguments.tile))
            for variant in arguments.variants:
                set_variant(variant, shipped)
                row = measure(shape_named(shape), kind, pattern, arguments)
                report(f"{shape} {kind} {variant or 'as shipped'}:", row)
                rows.append({"shape": shape, "inputs": kind, "tile": arguments.tile, "variant": variant, **row})
                if arguments.json:
                    about = describe_run(DEVICE)
                    arguments.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
