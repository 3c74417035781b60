"""Partial results merged by torch's operations, and by the kernel: in the interpreter and compiled for sm_90a."""

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
from .merge_cases import LAYOUTS, check_merging

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
INTERPRETED = Path(__file__).with_name("merge_interpreted.py")
COMPILED = {"fastvideo.distributed.merge_kernels.merge_fwd_kernel"}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_merging_by_torch(dtype: torch.dtype, layout: str) -> None:
    check_merging("cpu", dtype, layout)


@needs_cuda
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head_size", [128, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_merging_on_a_gpu(dtype: torch.dtype, head_size: int, layout: str) -> None:
    check_merging("cuda", dtype, layout, head_size=head_size)


@needs_triton
def test_numbers_in_the_interpreter() -> None:
    # The interpreter has to be on before the kernel is defined, hence a process of its own.
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", str(INTERPRETED)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=INTERPRETED.parents[2], check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
    assert re.search(r"[1-9]\d passed", result.stdout), result.stdout[-500:]


@needs_triton
@pytest.mark.parametrize(("dtype", "target"), [("*bf16", "*fp32"), ("*fp32", "*fp32"), ("*fp32", "*bf16"), ("*bf16", "*bf16")])
def test_compiles_for_hopper(dtype: str, target: str, tmp_path: Path) -> None:
    from fastvideo.distributed import merge_kernels

    constants = {"HEAD_SIZE": 128, "D": 128, "ROWS": merge_kernels._ROWS}
    types = {"out": dtype, "part": "*bf16", "target": target, **dict.fromkeys(("lse", "part_lse", "target_lse"), "*fp32")}
    kernel = merge_kernels.merge_fwd_kernel
    result = compile_triton(kernel, constants, types, tmp_path, strides="s_[op][bsh]", num_warps=merge_kernels._WARPS)
    assert result.spilled == 0
    assert not result.warnings
    # Outputs are read and written 16 bytes at a time.
    assert len(re.findall(r"(?:ld|st)\.global\S*\.v4\.b32", result.ptx)) >= 3
    assert not re.findall(r"(?:ld|st)\.global\S*\.[bu]16", result.ptx)
