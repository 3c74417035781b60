"""The Triton block-sparse kernels on a CUDA device, against float64: outputs, all gradients, repeatability, large offsets."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from fastvideo.block_sparse import BlockPattern, TileLayout
from fastvideo.block_sparse.impl import choose_implementation
from fastvideo.block_sparse.impl.hopper import _TRITON_VERSIONS
from fastvideo.testing import assert_within_budget, reference_attention

from ..block_sparse.engine_cases import EngineCases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, torch sees none"),
]

SHAPES = {
    "uniform": ([64] * 12, [64] * 12, 2, 4, 4, 64),
    "one_token": ([1], [1], 1, 1, 1, 64),
    "ragged": ([64, 16, 64, 4, 1, 37, 64], [13, 64, 64, 1, 16, 64, 4, 64], 2, 4, 2, 64),
    "sixty": ([60] * 9, [60] * 9, 1, 3, 3, 128),
    "text": ([64] * 6 + [77], [64] * 6 + [77], 1, 4, 1, 128),
    "big_tiles": ([256, 128, 100], [256, 200, 256, 3], 2, 2, 2, 128),
    "unequal_tiles": ([128] * 4, [16] * 31, 1, 2, 2, 64),
    "small_tiles": ([16] * 20, [256] * 2, 1, 2, 1, 80),
    "head_256": ([64, 64, 11], [64, 64, 64], 1, 2, 2, 256),
    "head_32": ([32] * 5, [32] * 5, 1, 2, 2, 32),
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# What runs on Hopper with a Triton that its kernels are checked with; elsewhere it is always these tests' subject.
AUTOMATIC = [
    ("uniform", torch.bfloat16, "hopper"),
    ("text", torch.float16, "hopper"),
    ("uniform", torch.float32, "triton"),
    ("head_256", torch.bfloat16, "triton"),
    ("big_tiles", torch.bfloat16, "triton"),
]

CASES = EngineCases("triton", "cuda", SHAPES)
make_pattern, make_inputs, attend, gradients = CASES.make_pattern, CASES.make_inputs, CASES.attend, CASES.gradients


def check(inputs: dict[str, torch.Tensor], pattern: BlockPattern, scale: float | None = None) -> None:
    # Over a single key the scores' gradient is the difference of two equal sums, which eager softmax makes exactly zero.
    is_single = inputs["key"].shape[1] == 1 and inputs["key"].dtype == torch.float32
    CASES.check(inputs, pattern, scale, floor_ulps=32 if is_single else None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_output_log_sum_exp_and_gradients(shape: str, dtype: torch.dtype) -> None:
    check(make_inputs(shape, dtype), make_pattern(shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ["uniform", "sixty"])
def test_real_activations(shape: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(shape, dtype, size=11.0)
    assert 45 < float(inputs["query"].abs().max()) < 65
    check(inputs, make_pattern(shape))


@pytest.mark.parametrize("scale", [-0.05, 0.0, 0.3])
def test_any_scale(scale: float) -> None:
    check(make_inputs("ragged", torch.bfloat16), make_pattern("ragged"), scale)


def test_shared_lists_without_order_or_counts() -> None:
    layout = TileLayout.uniform(8 * 64, 64, device="cuda")
    lists = torch.tensor([[0, 3, 5, 7], [1, 2, 3, 4]] * 4, dtype=torch.int32, device="cuda")
    pattern = BlockPattern(layout, layout, lists[None, None])
    inputs = {name: x[:, : 8 * 64] for name, x in make_inputs("uniform", torch.bfloat16).items()}
    check(inputs, pattern)


def test_strided_inputs() -> None:
    inputs = make_inputs("uniform", torch.bfloat16)
    packed = torch.stack(list(inputs.values()), dim=2)
    check(dict(zip(inputs, packed.unbind(2), strict=True)), make_pattern("uniform"))
    inputs["key"] = inputs["key"].transpose(1, 2).contiguous().transpose(1, 2)
    inputs["value"] = inputs["value"].transpose(2, 3).contiguous().transpose(2, 3)
    check(inputs, make_pattern("uniform"))


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("shape", ["uniform", "ragged", "text"])
def test_nothing_but_listed_tokens_is_read(shape: str, ordered: bool) -> None:
    """Keys of a tile that nobody lists, and all memory around the tensors, are NaN."""
    pattern, inputs = make_pattern(shape, ordered=ordered), make_inputs(shape, torch.bfloat16)
    mask = pattern.tile_mask()
    mask[..., 1] = False
    pattern = BlockPattern.from_mask(mask, pattern.query_tiles, pattern.key_tiles)
    hidden = pattern.key_tiles.tile_of_token() == 1
    poisoned = {}
    for name, x in inputs.items():
        room = x.new_full((x.shape[0], x.shape[1] + 256, x.shape[2], x.shape[3] + 8), torch.nan)
        poisoned[name] = room[:, 128:-128, :, : x.shape[3]]
        poisoned[name].copy_(x)
        if name != "query":
            poisoned[name][:, hidden] = torch.nan
            x[:, hidden] = 0.0
    got, expected = gradients(poisoned, pattern), gradients(inputs, pattern)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)
    assert not got[3][:, hidden].any()
    check(inputs, pattern)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ["uniform", "ragged"])
def test_same_bits_every_time(shape: str, dtype: torch.dtype) -> None:
    inputs, pattern = make_inputs(shape, dtype), make_pattern(shape)
    first = gradients(inputs, pattern)
    for _ in range(3):
        for one, other in zip(gradients(inputs, pattern), first, strict=True):
            assert torch.equal(one, other)


def test_autocast_casts_as_dense_attention_does() -> None:
    inputs, pattern = make_inputs("uniform", torch.float32), make_pattern("uniform")
    with torch.autocast("cuda", torch.bfloat16):
        out, _ = attend(**inputs, pattern=pattern)
    expected, _ = attend(**{name: x.bfloat16() for name, x in inputs.items()}, pattern=pattern)
    assert torch.equal(out, expected)


def test_compiled_call_equals_eager_one() -> None:
    inputs, pattern = make_inputs("ragged", torch.bfloat16), make_pattern("ragged")
    compiled = torch.compile(partial(attend, pattern=pattern), fullgraph=True)
    for one, other in zip(compiled(**inputs), attend(**inputs, pattern=pattern), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("shape", "dtype", "on_hopper"), AUTOMATIC)
def test_chosen_automatically(shape: str, dtype: torch.dtype, on_hopper: str) -> None:
    import triton

    inputs = make_inputs(shape, dtype)
    is_checked = triton.__version__.startswith(tuple(f"{version}." for version in _TRITON_VERSIONS))
    is_hopper = torch.cuda.get_device_capability() == (9, 0) and is_checked
    assert choose_implementation(*inputs.values(), make_pattern(shape))[0] == (on_hopper if is_hopper else "triton")


def test_more_than_two_to_the_31_elements() -> None:
    """The last tokens of the last sample lie behind 2^31 elements of a strided query, key and value."""
    batch, tokens, heads, head_size = 3, 64 * 128, 1, 64
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB of free device memory")
    room = torch.empty(batch, tokens, 2048 * head_size, dtype=torch.bfloat16, device="cuda")
    assert room.numel() > 2**31
    query, key, value = (room[:, :, i * head_size : (i + 1) * head_size].unsqueeze(2) for i in range(2045, 2048))
    generator = torch.Generator("cuda").manual_seed(0)
    for x in (query, key, value):
        x.copy_(torch.randn(batch, tokens, heads, head_size, generator=generator, device="cuda"))
    layout = TileLayout.uniform(tokens, 64, device="cuda")
    lists = torch.arange(124, 128, dtype=torch.int32, device="cuda").expand(1, 1, 128, 4)
    pattern = BlockPattern(layout, layout, lists)
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    out, _ = attend(*leaves, pattern=pattern)
    dq, dk, dv = torch.autograd.grad(out.float().square().sum(), leaves)
    small = [x[-1:].double().requires_grad_() for x in (query, key, value)]
    seen = (torch.arange(tokens, device="cuda") >= 124 * 64).expand(1, tokens)
    results = {}
    for dtype in (torch.float64, torch.bfloat16):
        ones = [x.detach().to(dtype).requires_grad_() for x in small]
        result = reference_attention(*ones, attn_mask=seen)
        cotangent = (2 * out[-1:].detach()).to(dtype)
        results[dtype] = (result.detach(), *torch.autograd.grad(result, ones, cotangent))
    for got, expected, eager in zip((out, dq, dk, dv), results[torch.float64], results[torch.bfloat16], strict=True):
        assert_within_budget(got[-1:], expected, eager)
