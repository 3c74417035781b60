"""Time and error of the block-sparse engine on a GPU beside dense attention, forward and backward, in one run.

Each shape gets random independent lists. A sparse row times the public operator (custom op, autograd and the inversion
of the lists included); `TFLOP/s` counts the listed pairs of real tokens, 4 D operations each forward and 10 D backward.
Errors are the largest differences from float64 on sampled tiles, divided by the largest reference value there; a row
whose error exceeds 2 % is marked `WRONG`. Dense attention is torch's, by cuDNN where it accepts. With `--sweep` other
block sizes of the Triton kernels are timed as well.

Example:
    python benchmarks/block_sparse_gpu.py --json result.json
    python benchmarks/block_sparse_gpu.py --shapes sprites-keep16 d128-49k --sweep
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench

from fastvideo.block_sparse import BlockPattern, TileLayout, block_sparse_attention
from fastvideo.block_sparse.impl import IMPLEMENTATIONS
from fastvideo.block_sparse.impl.triton import launch
from fastvideo.video import TileGrid

MAX_ERROR = 0.02


@dataclasses.dataclass(frozen=True)
class Shape:
    """One call: a video grid in tiles, or consecutive tokens where `tile_tyx` covers the sequence."""

    batch: int
    heads: int
    head_size: int
    grid_tyx: tuple[int, int, int]
    tile_tyx: tuple[int, int, int]
    keep: int


SHAPES = {
    **{f"sprites-keep{keep}": Shape(64, 4, 64, (16, 16, 16), (4, 4, 4), keep) for keep in (16, 32, 48, 64)},
    "d128-49k": Shape(1, 16, 128, (1, 1, 49152), (1, 1, 64), 77),
    "wan-1.3b-480p": Shape(1, 12, 128, (21, 30, 52), (4, 4, 4), 63),
    "wan-1.3b-480p-tile354": Shape(1, 12, 128, (21, 30, 52), (3, 5, 4), 55),
    "d128-49k-tile128": Shape(1, 16, 128, (1, 1, 49152), (1, 1, 128), 39),
}


def make_pattern(shape: Shape, device: str = "cuda") -> BlockPattern:
    """Random lists of `keep` tiles, another one for each query tile, head and sample."""
    grid = TileGrid(shape.grid_tyx, shape.tile_tyx)
    order = None if grid.is_raster else grid.tensors(device).order
    layout = TileLayout.from_sizes(grid.sizes, order=order, device=device)
    noise = torch.rand(shape.batch, shape.heads, grid.num_tiles, grid.num_tiles, device=device)
    return BlockPattern(layout, layout, noise.topk(shape.keep).indices.sort(dim=-1).values.int())


def make_inputs(shape: Shape, pattern: BlockPattern) -> list[Tensor]:
    """Query, key, value and the output's gradient, `[B, S, H, D]` bf16."""
    size = (shape.batch, pattern.query_tiles.num_tokens, shape.heads, shape.head_size)
    return [torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(4)]


def median_ms(call: Callable[[], object]) -> float:
    return do_bench(call, warmup=50, rep=200, return_mode="median")


def sm_clock() -> str:
    """The SM clock and the power draw at this moment."""
    query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader", "-i", "0"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class Sampled:
    """float64 rows of one sample and head, computed tile by tile from the lists."""

    def __init__(self, inputs: list[Tensor], pattern: BlockPattern, batch: int, head: int) -> None:
        self.q, self.k, self.v, self.dout = (x[batch, :, head].double() for x in inputs)
        self.lists = pattern.indices[batch, head].long()
        self.layout = pattern.key_tiles
        self.scale = self.q.shape[-1] ** -0.5

    def tokens(self, tile: int) -> Tensor:
        first, last = self.layout.offsets[tile : tile + 2].tolist()
        if self.layout.order is None:
            return torch.arange(first, last, device="cuda")
        return self.layout.order[first:last].long()

    def query_tile(self, tile: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Query tokens, key tokens, probabilities, gradient of the scores and output of one query tile."""
        rows = self.tokens(tile)
        columns = torch.cat([self.tokens(j) for j in self.lists[tile].tolist()])
        p = (self.q[rows] @ self.k[columns].T * self.scale).softmax(-1)
        out = p @ self.v[columns]
        delta = (self.dout[rows] * out).sum(-1, keepdim=True)
        return rows, columns, p, p * (self.dout[rows] @ self.v[columns].T - delta) * self.scale, out


def errors(inputs: list[Tensor], pattern: BlockPattern, out: Tensor, grads: tuple[Tensor, ...]) -> dict[str, float]:
    """Relative error of output and gradients on a few tiles of the first and the last sample and head."""
    found = dict.fromkeys(("out", "dq", "dk", "dv"), 0.0)

    def note(name: str, got: Tensor, expected: Tensor) -> None:
        error = float((got.double() - expected).abs().max() / expected.abs().max())
        found[name] = max(found[name], error if error == error else float("inf"))

    num_tiles = pattern.key_tiles.num_tiles
    for batch, head in ((0, 0), (out.shape[0] - 1, out.shape[2] - 1)):
        sampled = Sampled(inputs, pattern, batch, head)
        got = [x[batch, :, head] for x in (out, *grads)]
        for tile in (0, num_tiles // 2, num_tiles - 1):
            rows, columns, _, ds, expected = sampled.query_tile(tile)
            note("out", got[0][rows], expected)
            note("dq", got[1][rows], ds @ sampled.k[columns])
        tile = num_tiles - 1
        own = sampled.tokens(tile)
        dk, dv = (torch.zeros(len(own), out.shape[-1], dtype=torch.float64, device="cuda") for _ in range(2))
        for i in (sampled.lists == tile).any(-1).nonzero().flatten().tolist():
            rows, columns, p, ds, _ = sampled.query_tile(i)
            place = (columns == own[0]).nonzero()[0, 0] + torch.arange(len(own), device="cuda")
            dk += ds[:, place].T @ sampled.q[rows]
            dv += p[:, place].T @ sampled.dout[rows]
        note("dk", got[2][own], dk)
        note("dv", got[3][own], dv)
    return found


def measure(
    attend: Callable[..., Tensor], inputs: list[Tensor], pairs: float, head_size: int
) -> tuple[dict[str, float], Tensor, tuple[Tensor, ...]]:
    """Times and rates of one operator; also its output and gradients."""
    *leaves, dout = inputs
    with torch.no_grad():
        forward = median_ms(lambda: attend(*leaves))
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = attend(*leaves)
    backward = median_ms(lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True))
    row = {
        "forward_ms": forward,
        "backward_ms": backward,
        "forward_tflops": 4 * head_size * pairs / forward / 1e9,
        "backward_tflops": 10 * head_size * pairs / backward / 1e9,
    }
    return row, out.detach(), torch.autograd.grad(out, leaves, dout)


def dense_attention(backend: SDPBackend) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    return attend


def measure_dense(inputs: list[Tensor], shape: Shape) -> dict[str, Any]:
    pairs = float(shape.batch * shape.heads) * inputs[0].shape[1] ** 2
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        try:
            row, _, _ = measure(dense_attention(backend), inputs, pairs, shape.head_size)
        except RuntimeError as error:
            print(f"  dense {backend.name} refused: {str(error).splitlines()[0][:100]}")
            continue
        return {"name": f"dense {backend.name.lower().removesuffix('_attention')}", **row}
    return {"name": "dense", "refused": True}


def listed_pairs(pattern: BlockPattern) -> float:
    sizes = pattern.key_tiles.sizes.double()
    return float((sizes[pattern.indices.long()].sum(-1) * sizes).sum())


def report(row: dict[str, Any]) -> None:
    if row.get("refused"):
        return
    text = f"  {row['name']:<34} fwd {row['forward_ms']:8.3f} ms {row['forward_tflops']:6.1f} TFLOP/s"
    text += f"   bwd {row['backward_ms']:8.3f} ms {row['backward_tflops']:6.1f} TFLOP/s"
    if "errors" in row:
        text += "   err " + " ".join(f"{name} {value:.1e}" for name, value in row["errors"].items())
        text += "" if row["is_right"] else "   WRONG"
    if "invert_ms" in row:
        text += f"   invert {row['invert_ms']:.3f} ms"
    print(f"{text}   [{row['clock']}]", flush=True)


def sweep_candidates(shape: Shape) -> Iterator[tuple[str, launch.Blocks]]:
    """Other blocks for each kernel; those that need too much shared memory are skipped at the launch."""
    owned = (64, 128) if max(TileGrid(shape.grid_tyx, shape.tile_tyx).sizes) > 64 else (64,)
    for own in owned:
        for walked, warps, stages in ((64, 4, 2), (64, 4, 3), (64, 4, 4), (64, 8, 3), (128, 4, 3), (128, 8, 3), (32, 4, 3)):
            yield "fwd", launch.Blocks(own, walked, warps, stages)
            if (walked, warps) != (128, 4):
                yield "dq", launch.Blocks(own, walked, warps, stages)
                yield "dkdv", launch.Blocks(walked, own, warps, stages)


def sweep(shape: Shape, pattern: BlockPattern, inputs: list[Tensor]) -> list[dict[str, Any]]:
    """Time each candidate with the other kernels at their defaults."""
    *leaves, dout = inputs
    scale = shape.head_size**-0.5
    out, lse = launch.forward(*leaves, pattern, scale)
    rows = []
    for kernel, blocks in sweep_candidates(shape):
        tables = (launch.BLOCKS_16_BIT, launch.BLOCKS_16_BIT_LARGE)
        defaults = [table[kernel] for table in tables]
        for table in tables:
            table[kernel] = ((256, blocks),)
        try:
            if kernel == "fwd":
                ms = median_ms(lambda: launch.forward(*leaves, pattern, scale))
            else:
                ms = median_ms(lambda: launch.backward(dout, None, *leaves, out, lse, pattern, scale))
        except triton.runtime.errors.OutOfResources:
            continue
        finally:
            for table, default in zip(tables, defaults, strict=True):
                table[kernel] = default
        rows.append({"kernel": kernel, **dataclasses.asdict(blocks), "ms": ms})
    for row in sorted(rows, key=lambda row: (row["kernel"], row["ms"])):
        print(f"    sweep {row}", flush=True)
    return rows


def run_shape(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    shape = SHAPES[name]
    torch.manual_seed(0)
    pattern = make_pattern(shape)
    inputs = make_inputs(shape, pattern)
    tiles = pattern.key_tiles
    print(f"{name}: {shape}, {tiles.num_tokens} tokens, {tiles.num_tiles} tiles", flush=True)
    rows = []
    for impl in arguments.impl:
        row, out, grads = measure(
            lambda q, k, v, impl=impl: block_sparse_attention(q, k, v, pattern, impl=impl),
            inputs,
            listed_pairs(pattern),
            shape.head_size,
        )
        wrong = errors(inputs, pattern, out, grads)
        row |= {"name": impl, "errors": wrong, "is_right": max(wrong.values()) < MAX_ERROR, "clock": sm_clock()}
        if impl == "triton":
            row["invert_ms"] = median_ms(lambda: launch.inverted_lists(pattern))
        rows.append(row)
        report(row)
    if not arguments.no_dense:
        rows.append({**measure_dense(inputs, shape), "clock": sm_clock()})
        report(rows[-1])
    result = {"shape": dataclasses.asdict(shape), "rows": rows}
    if arguments.sweep:
        result["sweep"] = sweep(shape, pattern, inputs)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--impl", nargs="+", choices=IMPLEMENTATIONS, default=["triton"])
    parser.add_argument("--no-dense", action="store_true", help="leave out dense attention")
    parser.add_argument("--sweep", action="store_true", help="time other block sizes of the Triton kernels too")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    versions = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }
    print(versions)
    results = {name: run_shape(name, arguments) for name in arguments.shapes}
    if arguments.json:
        arguments.json.write_text(json.dumps({"versions": versions, "results": results}, indent=1))


if __name__ == "__main__":
    main()
