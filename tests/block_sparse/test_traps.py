"""What block-sparse kernels get wrong, one test a trap, for every implementation that runs where the tests do.

On a CPU these are the implementations in plain torch, and Triton's in its interpreter, for which `test_video_kernels.py` runs
this file again in a process of its own; on a CUDA device all of them, and one that refuses a call is skipped with its reasons.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastvideo.block_sparse import BlockPattern, TileLayout, block_sparse_attention
from fastvideo.block_sparse.impl import IMPLEMENTATIONS, load_implementation
from fastvideo.platforms.triton_support import runs_triton
from fastvideo.testing import assert_op_within_budget, reference_attention

SOURCE = Path(__file__).parents[2] / "src" / "fastvideo"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IS_INTERPRETED = DEVICE == "cpu" and runs_triton(torch.device("cpu"))
NAMES = list(IMPLEMENTATIONS) if DEVICE == "cuda" else ["triton"] if IS_INTERPRETED else ["reference", "portable"]
# Triton's interpreter does not multiply bfloat16.
DTYPE = torch.float16 if IS_INTERPRETED else torch.bfloat16
HEAD_SIZE = 128 if DEVICE == "cuda" else 16

# Those that fix no order of sums, and say so: equal inputs give equal results within rounding only.
ROUNDED = {"cudnn", "flash", "flex"} | ({"portable"} if DEVICE == "cuda" else set())

each = pytest.mark.parametrize("name", NAMES)


def make_layout(sizes: list[int], *, ordered: bool = True) -> TileLayout:
    order = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(len(sizes))) if ordered else None
    return TileLayout.from_sizes(sizes, order=None if order is None else order.to(DEVICE), device=DEVICE)


def make_inputs(
    num_queries: int, num_keys: int, *, batch: int = 1, heads: int = 2, dtype: torch.dtype = DTYPE, size: float = 2.0
) -> dict[str, Tensor]:
    randn = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    inputs = {
        "query": size * randn(batch, num_queries, heads, HEAD_SIZE),
        "key": size * randn(batch, num_keys, heads, HEAD_SIZE),
        "value": randn(batch, num_keys, heads, HEAD_SIZE),
    }
    return {key: x.to(DEVICE, dtype) for key, x in inputs.items()}


def refusals(name: str, inputs: dict[str, Tensor], pattern: BlockPattern, *, needs_grad: bool) -> tuple[str, ...]:
    leaves = [x.detach().requires_grad_(needs_grad) for x in inputs.values()]
    return load_implementation(name).rejections(*leaves, pattern)


def skip_if_refused(name: str, inputs: dict[str, Tensor], pattern: BlockPattern, *, needs_grad: bool = False) -> None:
    if reasons := refusals(name, inputs, pattern, needs_grad=needs_grad):
        pytest.skip(f"{name}: {'; '.join(reasons)}")


def check(name: str, inputs: dict[str, Tensor], pattern: BlockPattern, scale: float | None = None) -> None:
    skip_if_refused(name, inputs, pattern)
    assert_op_within_budget(
        lambda query, key, value: block_sparse_attention(query, key, value, pattern, scale=scale, return_lse=True, impl=name),
        lambda query, key, value: reference_attention(
            query, key, value, attn_mask=pattern.token_mask(), scale=scale, return_lse=True
        ),
        inputs,
        # FlexAttention has a backward on some devices for some tiles; all others always have one.
        gradients=name != "flex" or not refusals(name, inputs, pattern, needs_grad=True),
    )


def assert_repeated(name: str, one: Tensor, other: Tensor) -> None:
    """Bitwise equal, or within rounding where the implementation fixes no order of sums."""
    eps = torch.finfo(one.dtype).eps if name in ROUNDED else 0.0
    torch.testing.assert_close(one, other, rtol=2 * eps, atol=eps * float(other.abs().max()))


@each
def test_the_scale_is_not_rounded_into_queries_or_keys(name: str) -> None:
    """The log-sum-exp is fp32: a scale folded into 16-bit inputs would put it off by a part in 256 to 2048."""
    layout = make_layout([16] * 4)
    pattern = BlockPattern.from_mask(torch.ones(4, 4, dtype=torch.bool, device=DEVICE), layout, layout)
    inputs = make_inputs(64, 64, size=6.0)
    skip_if_refused(name, inputs, pattern)
    scale = 0.3173
    _, lse = block_sparse_attention(**inputs, pattern=pattern, scale=scale, return_lse=True, impl=name)
    exact = {key: x.double() for key, x in inputs.items()}
    expected = reference_attention(**exact, scale=scale, return_lse=True)[1]
    assert float(expected.abs().max()) > 20
    torch.testing.assert_close(lse.double(), expected, rtol=1e-5, atol=1e-4)


@each
@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_a_scale_that_is_not_positive(name: str, scale: float) -> None:
    layout = make_layout([16, 5, 16])
    pattern = BlockPattern.from_mask(torch.rand(1, 2, 3, 3, device=DEVICE) < 0.9, layout, layout)
    check(name, make_inputs(37, 37, size=5.0), pattern, scale)


@each
def test_small_neighbours_whose_lists_begin_elsewhere(name: str) -> None:
    """Kernels put small query tiles side by side; then the first keys of one are masked for the others."""
    queries, keys = make_layout([4] * 8, ordered=False), make_layout([16] * 8, ordered=False)
    eye = torch.eye(8, dtype=torch.bool, device=DEVICE)
    check(name, make_inputs(32, 128), BlockPattern.from_mask(eye, queries, keys))
    check(name, make_inputs(32, 128), BlockPattern.from_mask(eye.flip(0), queries, keys))


@each
def test_nobody_sees_anything(name: str) -> None:
    queries, keys = make_layout([16, 3, 16]), make_layout([16, 16])
    pattern = BlockPattern.from_mask(torch.zeros(3, 2, dtype=torch.bool, device=DEVICE), queries, keys)
    inputs = make_inputs(35, 32)
    skip_if_refused(name, inputs, pattern, needs_grad=True)
    leaves = [x.requires_grad_() for x in inputs.values()]
    out, lse = block_sparse_attention(*leaves, pattern, return_lse=True, impl=name)
    assert not out.any()
    assert (lse == -torch.inf).all()
    for grad in torch.autograd.grad(out.sum(), leaves):
        assert not grad.any()


@each
def test_samples_do_not_read_each_other(name: str) -> None:
    """NaN in one sample stays there, at lengths that fill no block, so that a box could reach into the next sample."""
    queries, keys = make_layout([16, 16, 9], ordered=False), make_layout([16, 16, 16, 3], ordered=False)
    pattern = BlockPattern.from_mask(torch.ones(3, 4, dtype=torch.bool, device=DEVICE), queries, keys)
    clean = make_inputs(41, 51, batch=3)
    skip_if_refused(name, clean, pattern, needs_grad=True)
    dirty = {key: x.clone() for key, x in clean.items()}
    for x in dirty.values():
        x[1] = torch.nan
    results = []
    for inputs in (clean, dirty):
        leaves = [x.detach().requires_grad_() for x in inputs.values()]
        out = block_sparse_attention(*leaves, pattern, impl=name)
        results.append((out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)))
    for one, other in zip(*results, strict=True):
        assert_repeated(name, other[[0, 2]], one[[0, 2]])
        assert other[1].isnan().all()


@each
@pytest.mark.parametrize("num_tokens", [1, 130, 257])
def test_lengths_that_fill_no_block(name: str, num_tokens: int) -> None:
    layout = TileLayout.uniform(num_tokens, 64, device=DEVICE)
    mask = torch.rand(1, 2, layout.num_tiles, layout.num_tiles, device=DEVICE) < 0.7
    mask[..., 0] = True
    inputs = make_inputs(num_tokens, num_tokens)
    if num_tokens == 1:
        # Over a single key the scores' gradient is 0, as a difference of equal sums.
        skip_if_refused(name, inputs, BlockPattern.from_mask(mask, layout, layout))
        out = block_sparse_attention(**inputs, pattern=BlockPattern.from_mask(mask, layout, layout), impl=name)
        assert torch.equal(out, inputs["value"])
        return
    check(name, inputs, BlockPattern.from_mask(mask, layout, layout))


@each
@pytest.mark.parametrize("kept", [1, 4])
def test_one_tile_and_all_tiles(name: str, kept: int) -> None:
    layout = make_layout([16] * 4)
    lists = torch.rand(1, 2, 4, 4, device=DEVICE).topk(kept).indices.sort(-1).values.int()
    check(name, make_inputs(64, 64), BlockPattern(layout, layout, lists))


@each
def test_more_than_4096_tiles(name: str) -> None:
    num_keys = 4100
    queries, keys = make_layout([2, 2], ordered=False), make_layout([1] * num_keys, ordered=False)
    lists = torch.tensor([[0, 4095, 4096, 4099], [1, 2, 4097, 4098]], dtype=torch.int32, device=DEVICE)
    pattern = BlockPattern(queries, keys, lists[None, None])
    inputs = make_inputs(4, num_keys, heads=1)
    skip_if_refused(name, inputs, pattern, needs_grad=True)
    leaves = [x.requires_grad_() for x in inputs.values()]
    out = block_sparse_attention(*leaves, pattern, impl=name)
    for tile, listed in enumerate(lists.tolist()):
        part = [
            x.detach()[:, rows].double()
            for x, rows in zip(leaves, (slice(2 * tile, 2 * tile + 2), listed, listed), strict=True)
        ]
        torch.testing.assert_close(out[:, 2 * tile : 2 * tile + 2].double(), reference_attention(*part), rtol=0.02, atol=0.02)
    if IS_INTERPRETED:
        return  # a program for each of 4,100 key tiles takes a minute
    dvalue = torch.autograd.grad(out.float().sum(), leaves)[2]
    assert torch.equal(dvalue[0, :, 0].any(-1).nonzero().flatten().cpu(), lists.flatten().sort().values.long().cpu())


@each
def test_shapes_that_change_in_one_process(name: str) -> None:
    for sizes in ([16] * 3, [7, 16], [16, 16, 16, 2], [16] * 3):
        layout = make_layout(sizes)
        mask = torch.ones(len(sizes), len(sizes), dtype=torch.bool, device=DEVICE).tril()
        check(name, make_inputs(sum(sizes), sum(sizes)), BlockPattern.from_mask(mask, layout, layout))


@each
def test_fp16(name: str) -> None:
    """Scores in the thousands, far beyond what an fp16 sum or an unshifted exponential holds."""
    layout = make_layout([16, 16, 5])
    pattern = BlockPattern.from_mask(torch.ones(3, 3, dtype=torch.bool, device=DEVICE), layout, layout)
    inputs = make_inputs(37, 37, dtype=torch.float16, size=12.0)
    scores = torch.einsum("bqhd,bkhd->bhqk", inputs["query"].float(), inputs["key"].float())
    assert float(scores.abs().max()) > 1000
    check(name, inputs, pattern, scale=1.0)


@each
def test_equal_inputs_give_equal_bits(name: str) -> None:
    """Where the implementation says that its sums have a fixed order."""
    if name in ROUNDED:
        pytest.skip(f"{name} fixes no order of sums here, and says so")
    layout = make_layout([16, 3, 16, 16])
    pattern = BlockPattern.from_mask(torch.rand(1, 2, 4, 4, device=DEVICE) < 0.8, layout, layout)
    inputs = make_inputs(51, 51)
    skip_if_refused(name, inputs, pattern, needs_grad=True)
    runs = []
    for _ in range(3):
        leaves = [x.detach().requires_grad_() for x in inputs.values()]
        out = block_sparse_attention(*leaves, pattern, impl=name)
        runs.append((out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_inverted_lists_ascend() -> None:
    layout = make_layout([1] * 50, ordered=False)
    pattern = BlockPattern.from_mask(torch.rand(1, 3, 50, 50, device=DEVICE) < 0.4, layout, layout)
    inverted, mask = pattern.invert(), pattern.tile_mask()
    for head in range(3):
        ends = inverted.offsets[0, head].tolist()
        for key in range(50):
            found = inverted.query_tiles[0, head, ends[key] : ends[key + 1]].tolist()
            assert found == mask[0, head, :, key].nonzero().flatten().tolist()


def test_no_kernel_is_autotuned() -> None:
    """Trials would add into an output more than once, and a choice that changes between runs changes bits."""
    users = [
        path.name for path in SOURCE.rglob("*.py") if re.search(r"@triton\.autotune|@triton\.heuristics", path.read_text())
    ]
    assert users == []
