"""The kernels around the engine without a GPU: numbers in the interpreter, compiled for sm_90a within a budget of spills."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
HERE = Path(__file__).parent
SPILL_BUDGET = 0


@needs_triton
@pytest.mark.parametrize("name", ["video_kernels_interpreted.py", "test_traps.py"])
def test_numbers_in_the_interpreter(name: str) -> None:
    # The interpreter has to be on before the kernels are defined, hence a process of its own.
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", str(HERE / name)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parents[1], check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
    assert re.search(r"[1-9]\d passed", result.stdout), result.stdout[-500:]


def compiled(kernel: Any, constants: dict[str, Any], pointers: dict[str, str], num_warps: int, folder: Path) -> tuple[int, str]:
    """Compile a kernel for sm_90a; bytes of spill stores and loads, and its PTX."""
    from triton import compile as compile_kernel
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    numbers = {"scale": "fp32"}
    signature = {
        name: "constexpr" if name in constants else f"*{pointers[name]}" if name in pointers else numbers.get(name, "i32")
        for name in kernel.arg_names
    }
    aligned = [i for i, name in enumerate(kernel.arg_names) if name in pointers or name.startswith("s_")]
    source = ASTSource(kernel, signature, constexprs=constants, attrs={(i,): [["tt.divisibility", 16]] for i in aligned})
    log = io.StringIO()
    with knobs.nvidia.scope(), knobs.cache.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        knobs.cache.dir = str(folder)
        knobs.compilation.always_compile = True
        binary = compile_kernel(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps, "num_stages": 2})
    stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log.getvalue()).groups()
    return int(stores) + int(loads), binary.asm["ptx"]


@needs_triton
@pytest.mark.parametrize("columns", [64, 2048, 16_384])
def test_top_k_compiles_for_hopper(columns: int, tmp_path: Path) -> None:
    from fastvideo.block_sparse import selection_kernels

    pointers = {"scores": "fp32", "indices": "i32"}
    num_warps = selection_kernels.top_k_warps(columns)
    kernel = selection_kernels.top_k_kernel
    assert compiled(kernel, {"COLUMNS": columns}, pointers, num_warps, tmp_path)[0] <= SPILL_BUDGET


@needs_triton
@pytest.mark.parametrize("head_size", [64, 128])
def test_scores_compile_for_hopper(head_size: int, tmp_path: Path) -> None:
    from fastvideo.block_sparse import selection_kernels

    constants = {"HEAD_SIZE": head_size, "BLOCK": 64, "BLOCK_D": 64, "PRECISION": "tf32x3"}
    pointers = dict.fromkeys(("query", "key", "scores"), "fp32")
    assert compiled(selection_kernels.coarse_scores_kernel, constants, pointers, 4, tmp_path)[0] <= SPILL_BUDGET


@needs_triton
@pytest.mark.parametrize(
    ("name", "num_narrow"),
    [
        ("gated_tiles_fwd_kernel", 1),
        ("gated_tiles_bwd_kernel", 2),
        ("tile_sum_kernel", 0),
        ("tile_means_kernel", 3),
        ("tile_means_bwd_kernel", 3),
    ],
)
def test_tile_kernels_compile_for_hopper(name: str, num_narrow: int, tmp_path: Path) -> None:
    from fastvideo.block_sparse import coarse_kernels, gate_kernels
    from fastvideo.video import pooling_kernels

    module = next(module for module in (coarse_kernels, gate_kernels, pooling_kernels) if hasattr(module, name))
    constants = {"HEAD_SIZE": 128, "TILE": 64, "ROWS": module._ROWS, "COLUMNS": module._COLUMNS}
    pointers = {"order": "i32", "offsets": "i32", "sums": "fp32", "mean_query": "fp32", "mean_key": "fp32"}
    tensors = ("query", "key", "value")
    pointers |= dict.fromkeys(("x", "fine", "gate", "out", "dout", "dgate", "coarse", "dcoarse"), "bf16")
    pointers |= {f"{part}{x}": "bf16" for part in ("", "low_", "d", "dlow_") for x in tensors}
    spilled, ptx = compiled(getattr(module, name), constants, pointers, 4, tmp_path)
    assert spilled <= SPILL_BUDGET
    # Tokens are read and written 16 bytes at a time: narrower loads cost these kernels, which do little else, a multiple of
    # their time. What exists once a tile, one row for a program, is narrow.
    assert re.search(r"(st|ld)\.global\S*\.v4\.b32", ptx)
    assert len(re.findall(r"(?:ld|st)\.global\S*\.[bu]16", ptx)) <= num_narrow
