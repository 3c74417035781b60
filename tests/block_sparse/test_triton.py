"""The Triton implementation without a GPU: numbers in the interpreter, kernels compiled for sm_90a, reasons against a call."""

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
import torch

from fastvideo.block_sparse import BlockPattern, TileLayout
from fastvideo.block_sparse.impl import choose_implementation
from fastvideo.block_sparse.impl import triton as implementation

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


def compiled(kernel: str, head_size: int, folder: Path) -> tuple[int, list[str], str]:
    """Compile a kernel for sm_90a in its default blocks; bytes of spills, warnings of ptxas and the PTX."""
    from triton import compile as compile_kernel
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastvideo.block_sparse.impl.triton import kernels, launch

    blocks = launch.choose_blocks(kernel, head_size, torch.bfloat16, 64, 64)
    function = getattr(kernels, f"block_sparse_{kernel if kernel == 'fwd' else f'bwd_{kernel}'}_kernel")
    constants = {
        "HEAD_SIZE": head_size,
        "D": head_size,
        "M": blocks.m,
        "N": blocks.n,
        "PRECISION": "ieee",
        "SCALE_IS_POSITIVE": True,
        "correction": None,
        **{f"{side}_{name}": value for side in "QK" for name, value in (("TILE", 64), ("SLOT", 64), ("UNIFORM", True))},
        "Q_SLOT": min(64, blocks.m),
        "K_SLOT": min(64, blocks.n),
        "Q_MASKED": False,
        "K_MASKED": False,
    }
    if kernel == "dkdv":
        constants["GROUP"] = 1
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    integers = ("indices", "counts", "q_offsets", "k_offsets", "q_order", "k_order", "list_offsets", "lists")
    signature = {}
    for name in function.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in integers:
            signature[name] = "*i32"
        elif name in ("lse", "lse_log2", "delta"):
            signature[name] = "*fp32"
        elif name.startswith("scale"):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if name.startswith("s_") or name.isupper() else "*bf16"
    aligned = [i for i, name in enumerate(function.arg_names) if signature[name].startswith("*") or re.match("s_[qkvd]", name)]
    source = ASTSource(function, signature, constexprs=constants, attrs={(i,): [["tt.divisibility", 16]] for i in aligned})
    options = {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages, "enable_fp_fusion": True}
    log = io.StringIO()
    with knobs.nvidia.scope(), knobs.cache.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        knobs.cache.dir = str(folder)
        knobs.compilation.always_compile = True
        result = compile_kernel(source, target=GPUTarget("cuda", 90, 32), options=options)
    stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log.getvalue()).groups()
    warnings = [line for line in log.getvalue().splitlines() if re.search(r"C75\d\d|will be ignored", line)]
    return int(stores) + int(loads), warnings, result.asm["ptx"]


@needs_triton
@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("kernel", ["fwd", "dq", "dkdv"])
def test_compiles_for_hopper(kernel: str, head_size: int, tmp_path: Path) -> None:
    spills, warnings, ptx = compiled(kernel, head_size, tmp_path)
    assert spills <= SPILL_BUDGET
    assert not warnings
    assert "wgmma.mma_async" in ptx
    # Rows of the walked tensors arrive by asynchronous copies of 16 bytes.
    assert re.search(r"cp\.async\.cg\.shared\.global \[[^\]]*\], \[[^\]]*\], 0x10", ptx)
