"""The kernels around the engine without a GPU: numbers in the interpreter, compiled for sm_90a within a budget of spills."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastvideo.video import TileGrid

from .hopper_compiler import compile_triton

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


@needs_triton
@pytest.mark.parametrize("columns", [64, 624, 1440, 2048, 5000, 16_384])
def test_top_k_compiles_for_hopper(columns: int, tmp_path: Path) -> None:
    from fastvideo.block_sparse import selection_kernels

    types = {"scores": "*fp32", "indices": "*i32", "quantile": "fp32", "density": "fp32"}
    options = selection_kernels.top_k_options(columns)
    num_warps = options.pop("num_warps")
    kernel = selection_kernels.top_k_kernel
    result = compile_triton(kernel, options, types, tmp_path, strides="s_", num_warps=num_warps)
    assert result.spilled <= SPILL_BUDGET
    assert not result.warnings


@needs_triton
@pytest.mark.parametrize("head_size", [64, 128])
def test_scores_compile_for_hopper(head_size: int, tmp_path: Path) -> None:
    from fastvideo.block_sparse import selection_kernels

    constants = {"HEAD_SIZE": head_size, "PRECISION": "tf32x3"}
    constants |= {name: getattr(selection_kernels, f"_{name}") for name in ("BLOCK", "BLOCK_KEYS", "BLOCK_D")}
    options = {"num_warps": selection_kernels._WARPS, "num_stages": selection_kernels._STAGES}
    types = {"scale": "fp32", **dict.fromkeys(("query", "key", "scores"), "*fp32")}
    kernel = selection_kernels.coarse_scores_kernel
    result = compile_triton(kernel, constants, types, tmp_path, strides="s_", **options)
    assert result.spilled <= SPILL_BUDGET
    assert not result.warnings


# Kernels that read and write tokens, and how many of their accesses are of 16 bits.
TILE_KERNELS = {
    "block_sparse.gate_kernels.gated_tiles_fwd_kernel": 1,
    "block_sparse.gate_kernels.gated_tiles_bwd_kernel": 2,
    "block_sparse.gate_kernels.gated_tiles_bwd_kernel without dlse": 2,
    "video.pooling_kernels.tile_sum_kernel": 0,
    "block_sparse.coarse_kernels.tile_means_kernel": 3,
    "block_sparse.coarse_kernels.tile_means_bwd_kernel": 3,
}
COMPILED = {
    "fastvideo.block_sparse.selection_kernels.top_k_kernel",
    "fastvideo.block_sparse.selection_kernels.coarse_scores_kernel",
    *(f"fastvideo.{name.split()[0]}" for name in TILE_KERNELS),
}


@needs_triton
@pytest.mark.parametrize("place", TILE_KERNELS)
def test_tile_kernels_compile_for_hopper(place: str, tmp_path: Path) -> None:
    from fastvideo.video.pooling_kernels import pool_arguments

    module_name, _, name = f"fastvideo.{place.split()[0]}".rpartition(".")
    module = importlib.import_module(module_name)
    kernel, num_warps = getattr(module, name), 4
    if "TILE_T" in kernel.arg_names:
        _, constants = pool_arguments(TileGrid((21, 45, 80), (4, 4, 4)), 120, 2)
        num_warps = constants.pop("num_warps")
        constants = {x: constants[x] for x in constants if x not in ("T", "Y", "X", "RUN")} | {"IS_SUM": True}
    else:
        constants = {"TILE": 64, "ROWS": module._ROWS, "COLUMNS": module._COLUMNS, "D": 128}
    constants["HEAD_SIZE"] = 128
    if "gated_tiles_bwd" in place:
        num_warps = module._COLUMNS // module._COLUMNS_A_WARP
    if place.endswith("without dlse"):
        constants["dlse"] = None
    types = {"scale": "fp32", "order": "*i32", "offsets": "*i32", "sums": "*fp32", "mean_query": "*fp32", "mean_key": "*fp32"}
    tensors = ("query", "key", "value")
    types |= dict.fromkeys(("x", "fine", "gate", "out", "dout", "dgate", "coarse", "dcoarse"), "*bf16")
    types["dlse"] = "*fp32"
    types |= {f"{part}{x}": "*bf16" for part in ("", "low_", "d", "dlow_") for x in tensors}
    result = compile_triton(kernel, constants, types, tmp_path, strides="s_", num_warps=num_warps, num_stages=2)
    assert result.spilled <= SPILL_BUDGET
    assert not result.warnings
    # Tokens are read and written 16 bytes at a time: narrower loads cost these kernels, which do little else, a multiple of
    # their time. What exists once a tile, one row for a program, is narrow.
    assert re.search(r"(st|ld)\.global\S*\.v4\.b32|cp\.async\.cg\S* \[.*\], \[.*\], 0x10, ", result.ptx)
    assert len(re.findall(r"(?:ld|st)\.global\S*\.[bu]16", result.ptx)) <= TILE_KERNELS[place]
