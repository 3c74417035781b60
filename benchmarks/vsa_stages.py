"""Where the time of a whole Video Sparse Attention layer goes on a GPU: its stages, and its kernels one by one.

The coarse stage is everything before the fine part: means of query, key and value, coarse scores and choice of tiles, coarse
attention, called as the layer calls them where no gradient is needed, inside its one custom op. Each stage is timed by itself
(`do_bench`, median), the kernels in calls of the whole layer, one after the other. The host's time is that of launching a call
of the layer while the GPU still works on those before.

Example:
    python benchmarks/vsa_stages.py wan2.1-1.3b-480p wan2.1-14b-720p --json result.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastvideo.benchmark.inputs import make_inputs
from fastvideo.benchmark.measure import describe_run, host_ms, kernel_ms, median_ms, sm_clock_mhz
from fastvideo.benchmark.shapes import SHAPES, BenchmarkShape, shape_named
from fastvideo.block_sparse import num_kept_tiles, video_sparse_attention
from fastvideo.block_sparse.coarse import coarse_attention, make_means
from fastvideo.block_sparse.selection import choose_tiles
from fastvideo.video import TileGrid
from fastvideo.video.choose_tile import resolve_tile

DEVICE = torch.device("cuda")


def stages(shape: BenchmarkShape, tile_tyx: tuple[int, int, int], impl: str | None) -> dict[str, Callable[[], object]]:
    """The stages of a layer by name, on random inputs."""
    inputs = make_inputs(shape, "random", torch.bfloat16, DEVICE)
    grid = TileGrid(shape.grid_tyx, tile_tyx)
    num_kept, scale = num_kept_tiles(grid.num_tiles, shape.sparsity), shape.head_size**-0.5
    query, key, value, gate = inputs.leaves(has_gate=True, needs_grad=False)
    leaves = inputs.leaves(has_gate=True, needs_grad=True)
    layer = partial(video_sparse_attention, grid_tyx=shape.grid_tyx, sparsity=shape.sparsity, tile_tyx=tile_tyx, impl=impl)
    out = layer(*leaves[:3], gate=leaves[3])
    make = partial(make_means, query, key, value, shape.grid_tyx, tile_tyx, scale)
    mean_query, mean_key, *low = make()
    mean_leaves = [x.detach().requires_grad_() for x in low]
    coarse = coarse_attention(mean_leaves)
    dcoarse = torch.randn_like(coarse)

    def coarse_stage() -> None:
        mean_query, mean_key, *low = make()
        choose_tiles(mean_query, mean_key, num_kept, scale)
        coarse_attention(low)

    return {
        "layer forward": torch.no_grad()(partial(layer, query, key, value, gate=gate)),
        "layer backward": partial(torch.autograd.grad, out, leaves, inputs.dout, retain_graph=True),
        "coarse stage": coarse_stage,
        "  means": make,
        "  scores and choice": partial(choose_tiles, mean_query, mean_key, num_kept, scale),
        "  coarse attention": partial(coarse_attention, low),
        "  its backward": partial(torch.autograd.grad, coarse, mean_leaves, dcoarse, retain_graph=True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="+", choices=SHAPES)
    parser.add_argument("--tile", default="4x4x4", help="TxYxX, auto or auto128")
    parser.add_argument("--impl", help="of block-sparse attention; by default the fastest that accepts")
    parser.add_argument("--kernels", type=int, default=12, help="how many kernels of the layer to name")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    about, rows = describe_run(DEVICE), []
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    for name in arguments.shapes:
        shape = shape_named(name)
        tile = arguments.tile
        tile_tyx = resolve_tile(tile if tile.startswith("auto") else [int(x) for x in tile.split("x")], shape.grid_tyx)
        print(f"\n{name}: {shape}, tile {tile_tyx}, sparsity {shape.sparsity}")
        row: dict[str, Any] = {"shape": name, "tile": tile_tyx, "sparsity": shape.sparsity}
        row |= {"ms": {}, "host_ms": {}, "kernels_ms": {}}
        for stage, call in stages(shape, tile_tyx, arguments.impl).items():
            row["ms"][stage.strip()] = time = median_ms(call, DEVICE)
            clock = sm_clock_mhz(call, DEVICE)
            print(f"{stage:24} {time:9.3f} ms" + (f" at {clock[0]:.0f} MHz, {clock[1]:.0f} W" if clock else ""), flush=True)
            if stage.startswith("layer"):
                row["host_ms"][stage] = host = host_ms(call, DEVICE)
                print(f"{'  its launches':24} {host:9.3f} ms of the host", flush=True)
                row["kernels_ms"][stage] = found = kernel_ms(call, arguments.kernels)
                print("".join(f"    {ms:8.3f}  {kernel}\n" for kernel, ms in found.items()), end="", flush=True)
        rows.append(row)
        if arguments.json:
            arguments.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
