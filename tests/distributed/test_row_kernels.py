"""Rows copied within a device by a kernel: in the interpreter, compiled for sm_90a, and on a GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ..block_sparse.hopper_compiler import compile_triton
from .rows_cases import ROWS, check_copying

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
INTERPRETED = Path(__file__).with_name("rows_interpreted.py")
COMPILED = {"fastvideo.distributed.row_kernels.copy_rows_kernel"}


@needs_triton
def test_numbers_in_the_interpreter() -> None:
    # The interpreter has to be on before the kernel is defined, hence a process of its own.
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(INTERPRETED)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=INTERPRETED.parents[2], check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
    assert re.search(r"[1-9]\d passed", result.stdout), result.stdout[-500:]


@needs_triton
@pytest.mark.parametrize("columns", [2, 32, 256])
def test_compiles_for_hopper(columns: int, tmp_path: Path) -> None:
    from fastvideo.distributed import row_kernels

    constants = {"ROWS": row_kernels._BLOCK // columns, "COLUMNS": columns}
    types = dict.fromkeys(row_kernels._ADDRESSES, "i64")
    result = compile_triton(row_kernels.copy_rows_kernel, constants, types, tmp_path, num_warps=row_kernels._WARPS)
    assert result.spilled == 0
    assert not result.warnings
    words = row_kernels._BLOCK // (32 * row_kernels._WARPS)
    for access in ("ld", "st"):
        assert len(re.findall(rf"{access}\.global\S*\.v2\.b64", result.ptx)) == words // 2, "16 bytes at a time"


@needs_cuda
@needs_triton
@pytest.mark.parametrize("rows", [*ROWS, (18_900, 3584, 3584, 10_240)])
@pytest.mark.parametrize("count", [1, 3, 4, 6])
def test_copying_on_a_gpu(count: int, rows: tuple[int, int, int, int]) -> None:
    check_copying("cuda", count, *rows, by_kernel=True)
