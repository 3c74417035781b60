"""The Hopper implementation without a GPU: plans and launches in the interpreter, and reasons against a call."""

from __future__ import annotations

import importlib.metadata
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
from fastvideo.block_sparse.impl import IMPLEMENTATIONS, choose_implementation, hopper

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
HERE = Path(__file__).parent


@needs_triton
@pytest.mark.parametrize("name", ["hopper_interpreted.py", "hopper_launches_interpreted.py"])
def test_plans_and_launches_in_the_interpreter(name: str) -> None:
    # The interpreter has to be on before the kernels are defined, hence a process of its own.
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", str(HERE / name)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parents[2], check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
    assert re.search(r"[1-9]\d passed", result.stdout), result.stdout[-500:]


def small_call(head_size: int = 128, tile: int = 4, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, ...]:
    layout = TileLayout.uniform(2 * tile, tile)
    tensor = torch.zeros(1, 2 * tile, 1, head_size, dtype=dtype)
    return tensor, tensor, tensor, BlockPattern.from_mask(torch.ones(2, 2, dtype=torch.bool), layout, layout)


@needs_triton
def test_every_reason_against_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.9.1")
    hopper._triton_rejection.cache_clear()
    hopper._reasons_here.cache_clear()
    try:
        assert hopper.rejections(*small_call(head_size=80, tile=129, dtype=torch.float32)) == (
            "is checked with triton 3.6 (torch 2.11 brings it), got 3.9.1",
            "needs tensors on a GPU (device type 'cuda'), got cpu",
            "needs float16 or bfloat16, got torch.float32",
            "needs a head size of 64 or 128, got 80",
            "needs query tiles up to 128 tokens, got 129",
            "needs key tiles up to 128 tokens, got 129",
        )
    finally:
        hopper._triton_rejection.cache_clear()
        hopper._reasons_here.cache_clear()


@needs_triton
@pytest.mark.parametrize(("capability", "is_refused"), [((9, 0), False), ((8, 0), True), ((10, 0), True)])
def test_runs_on_hopper_alone(capability: tuple[int, int], is_refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    reason = hopper._device_rejection(torch.device("cuda"))
    assert (reason is not None) == is_refused
    if is_refused:
        assert reason == "needs an NVIDIA Hopper GPU (compute capability 9.0), got some GPU"


def test_listed_first() -> None:
    assert next(iter(IMPLEMENTATIONS)) == "hopper"
    _, trace = choose_implementation(*small_call())
    assert trace["hopper"]


def test_import_leaves_triton_alone() -> None:
    code = "import sys, fastvideo.block_sparse.impl.hopper; print('triton' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


@needs_triton
def test_descriptors_of_other_tensors_are_those_that_gluon_makes() -> None:
    from triton.experimental.gluon import language as gl

    from fastvideo.block_sparse.impl.hopper.gluon_names import TensorDescriptor, moved

    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    one, other = (torch.zeros(64, 256, dtype=torch.bfloat16)[:, :128] for _ in range(2))
    described = TensorDescriptor.from_tensor(one, [16, 64], layout)
    made, expected = moved(described, other), TensorDescriptor.from_tensor(other, [16, 64], layout)
    assert made.base is other
    assert described.base is one
    assert {**vars(made), "base": None} == {**vars(expected), "base": None}
