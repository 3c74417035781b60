"""The Hopper implementation without a GPU: plans and launches in the interpreter, and reasons against a call."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
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
from fastvideo.block_sparse.impl.hopper.queues import fill_queues

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
INTERPRETED = Path(__file__).with_name("hopper_interpreted.py")


@needs_triton
def test_plans_and_launches_in_the_interpreter() -> None:
    # The interpreter has to be on before the kernels are defined, hence a process of its own.
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", str(INTERPRETED)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=INTERPRETED.parents[3], check=False)
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


@needs_triton
@pytest.mark.parametrize(("capability", "is_refused"), [((9, 0), False), ((8, 0), True), ((10, 0), True)])
def test_runs_on_hopper_alone(capability: tuple[int, int], is_refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    reason = hopper._device_rejection(torch.device("cuda"))
    assert (reason is not None) == is_refused
    if is_refused:
        assert reason == "needs an NVIDIA Hopper GPU (compute capability 9.0), got some GPU"


def queues_of(lengths: torch.Tensor, num_blocks: int, num_queues: int) -> list[list[int]]:
    queues, ends = fill_queues(lengths, torch.tensor(num_blocks, dtype=torch.int32), num_queues)
    assert (ends % num_queues).tolist() == list(range(num_queues))
    return [queues[: end // num_queues, i].tolist() for i, end in enumerate(ends.tolist())]


@pytest.mark.parametrize("num_queues", [2, 6, 264])
@pytest.mark.parametrize("kind", ["even", "none", "one_long", "some_long", "heads_differ"])
def test_every_block_is_worked_on_once(kind: str, num_queues: int) -> None:
    lengths = torch.randint(3, 9, (5, 70), generator=torch.Generator().manual_seed(0))
    if kind in ("even", "none"):
        lengths[:] = 7 if kind == "even" else 0
    elif kind == "one_long":
        lengths[3, 5] = 10**6
    else:
        lengths[:, : 20 if kind == "some_long" else 60] *= 1 if kind == "heads_differ" else 12
        lengths[0] *= 50 if kind == "heads_differ" else 1
    for num_blocks in (1, 64, 70):
        # Garbage stands behind the last block.
        found = queues_of(lengths.masked_fill(torch.arange(70) >= num_blocks, 10**6), num_blocks, num_queues)
        assert sorted(itertools.chain(*found)) == [70 * head + block for head in range(5) for block in range(num_blocks)]


def test_queues_are_even_and_go_head_by_head() -> None:
    """As by key at 21 x 45 x 80 in tiles of 4 x 4 x 4 where tile means are random: 85 blocks of several tiles are long."""
    generator = torch.Generator().manual_seed(0)
    heads, num_long, num_blocks, num_queues = 8, 85, 1185, 264
    lengths = torch.cat(
        [
            torch.randint(600, 900, (heads, num_long), generator=generator),
            torch.randint(40, 110, (heads, num_blocks - num_long), generator=generator),
        ],
        1,
    )
    found = queues_of(lengths, num_blocks, num_queues)
    work = [float(lengths.flatten()[queue].sum()) for queue in found]
    assert max(work) < 1.03 * sum(work) / num_queues
    # Dealt one after the other they are far apart.
    dealt = torch.zeros(-(-lengths.numel() // num_queues) * num_queues)
    dealt[: lengths.numel()] = lengths.sort(1, descending=True).values.flatten()
    assert dealt.view(-1, num_queues).sum(0).max() > 1.2 * sum(work) / num_queues
    starts: list[list[float]] = [[] for _ in range(heads)]
    for queue in found:
        is_long = [place % num_blocks < num_long for place in queue]
        assert is_long == sorted(is_long, reverse=True)
        begin = lengths.flatten()[queue].cumsum(0) - lengths.flatten()[queue]
        for place, start in list(zip(queue, begin.tolist(), strict=True))[sum(is_long) :]:
            starts[place // num_blocks].append(start)
    # The last block of a head begins no later than a few blocks after the first of the next head.
    assert all(max(starts[head]) < min(starts[head + 1]) + 4 * 110 for head in range(heads - 1))


def test_listed_first() -> None:
    assert next(iter(IMPLEMENTATIONS)) == "hopper"
    _, trace = choose_implementation(*small_call())
    assert trace["hopper"]


def test_import_leaves_triton_alone() -> None:
    code = "import sys, fastvideo.block_sparse.impl.hopper; print('triton' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
