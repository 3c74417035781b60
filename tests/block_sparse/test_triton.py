"""The Triton implementation without a GPU: numbers in the interpreter, kernels compiled for sm_90a, reasons against a call."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvideo.block_sparse import BlockPattern, TileLayout
from fastvideo.block_sparse.impl import choose_implementation
from fastvideo.block_sparse.impl import triton as implementation

from .hopper_compiler import compile_triton

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
INTERPRETED = Path(__file__).with_name("triton_interpreted.py")
# Bytes of spills that each kernel may have in its default blocks.
SPILL_BUDGET = 0


@needs_triton
def test_numbers_in_the_interpreter() -> None:
    # The interpreter has to be on before the kernels are defined, hence a process of its own.
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", str(INTERPRETED)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=INTERPRETED.parents[2], check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
    assert re.search(r"[1-9]\d passed", result.stdout), result.stdout[-500:]


def small_call(head_size: int = 16, tile: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    layout = TileLayout.uniform(2 * tile, tile)
    tensor = torch.zeros(1, 2 * tile, 1, head_size, dtype=dtype)
    return tensor, tensor, tensor, BlockPattern.from_mask(torch.ones(2, 2, dtype=torch.bool), layout, layout)


def test_every_reason_against_a_call() -> None:
    reasons = implementation.rejections(*small_call(head_size=300, tile=257, dtype=torch.float64))
    assert [reason for reason in reasons if "triton is not installed" not in reason] == [
        "needs tensors on a GPU (device type 'cuda'), got cpu",
        "needs float16, bfloat16 or float32, got torch.float64",
        "needs a head size up to 256, got 300",
        "needs query tiles up to 256 tokens, got 257",
        "needs key tiles up to 256 tokens, got 257",
    ]


def test_absent_triton_is_a_reason_and_no_error() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from fastvideo.block_sparse import BlockPattern, TileLayout, block_sparse_attention\n"
        "layout = TileLayout.uniform(8, 4)\n"
        "pattern = BlockPattern.from_mask(torch.ones(2, 2, dtype=torch.bool), layout, layout)\n"
        "x = torch.randn(1, 8, 1, 16)\n"
        "block_sparse_attention(x, x, x, pattern)\n"
        "try:\n"
        "    block_sparse_attention(x, x, x, pattern, impl='triton')\n"
        "except NotImplementedError as error:\n"
        "    print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 'triton is not installed: pip install "fastvideo-attention[triton]"' in result.stdout


def test_import_leaves_triton_alone() -> None:
    code = "import sys, fastvideo.block_sparse.impl.triton; print('triton' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_listed_before_the_portable_one() -> None:
    _, trace = choose_implementation(*small_call())
    # Before it stands what only some GPUs run.
    assert list(trace).index("triton") < list(trace).index("portable")


TYPES = {
    **dict.fromkeys(("query", "key", "value", "out", "dout", "dquery", "dkey", "dvalue", "gate", "coarse"), "*bf16"),
    **dict.fromkeys(("indices", "counts", "q_offsets", "k_offsets", "q_order", "k_order", "list_offsets", "lists"), "*i32"),
    "tile_order": "*i32",
    **dict.fromkeys(("lse", "dlse", "lse_log2", "delta"), "*fp32"),
    **dict.fromkeys(("scale", "scale_log2"), "fp32"),
    "offsets": "*i32",
    "marks": "*u8",
}
PRODUCTS = ("fwd", "fwd without a gate", "bwd_dq", "bwd_dkdv")
# Kernels without a product: constants, as the launch gives them.
OTHERS = {
    "bwd_rows": {"HEAD_SIZE": 128, "D": 128, "M": 64},
    "bwd_rows of head size 80 without a gradient of the log-sum-exp": {"HEAD_SIZE": 80, "D": 128, "M": 64, "dlse": None},
    "mark": {"BLOCK": 128},
    "mark without counts": {"BLOCK": 128, "counts": None},
    "compress": {"BLOCK": 1024},
    "compress of few tiles": {"BLOCK": 128},
}
COMPILED = {
    f"fastvideo.block_sparse.impl.triton.kernels.block_sparse_{case.split()[0]}_kernel" for case in (*PRODUCTS, *OTHERS)
}


@needs_triton
@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("kernel", PRODUCTS)
def test_compiles_for_hopper(kernel: str, head_size: int, tmp_path: Path) -> None:
    from fastvideo.block_sparse.impl.triton import kernels, launch

    absent = ("correction",) if kernel == "fwd" else ("correction", "gate", "coarse")
    kernel = kernel.split()[0]
    blocks = launch.choose_blocks(kernel.removeprefix("bwd_"), head_size, torch.bfloat16, 64, 64)
    constants = {
        "HEAD_SIZE": head_size,
        "D": head_size,
        "M": blocks.m,
        "N": blocks.n,
        "PRECISION": "ieee",
        "SCALE_IS_POSITIVE": True,
        **dict.fromkeys(absent),
        **{f"{side}_{name}": value for side in "QK" for name, value in (("TILE", 64), ("UNIFORM", True), ("MASKED", False))},
        "Q_SLOT": min(64, blocks.m),
        "K_SLOT": min(64, blocks.n),
    }
    if kernel == "bwd_dkdv":
        constants["GROUP"] = 1
    options = {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}
    function = getattr(kernels, f"block_sparse_{kernel}_kernel")
    result = compile_triton(function, constants, TYPES, tmp_path, strides="s_[qkvdg]", **options)
    assert result.spilled <= SPILL_BUDGET
    assert not result.warnings
    assert "wgmma.mma_async" in result.ptx
    # Rows of the walked tensors arrive by asynchronous copies of 16 bytes.
    assert re.search(r"cp\.async\.cg\.shared\.global \[[^\]]*\], \[[^\]]*\], 0x10", result.ptx)


@needs_triton
@pytest.mark.parametrize("case", OTHERS)
def test_kernels_without_products_compile_for_hopper(case: str, tmp_path: Path) -> None:
    from fastvideo.block_sparse.impl.triton import kernels

    kernel = getattr(kernels, f"block_sparse_{case.split()[0]}_kernel")
    result = compile_triton(kernel, OTHERS[case], TYPES, tmp_path, strides="s_[d]", num_warps=4)
    assert result.spilled <= SPILL_BUDGET
    assert not result.warnings
    if case.startswith("bwd_rows"):
        # Rows are read 16 bytes at a time.
        assert "ld.global.v4.b32" in result.ptx
