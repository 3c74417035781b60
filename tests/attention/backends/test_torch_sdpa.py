"""`TORCH_SDPA` against float64: every mask, every scale, log-sum-exp, empty rows, outputs and all gradients."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from fastvideo.attention.backends import torch_sdpa
from fastvideo.attention.backends.abstract import AttentionMetadata
from fastvideo.attention.backends.torch_sdpa import TorchSDPABackend, TorchSDPAImpl, cudnn_refusals
from fastvideo.testing import assert_op_within_budget, reference_attention

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MASKS = ("none", "key_padding", "bool", "bool_broadcast", "additive", "additive_shared")


def make_inputs(
    dtype: torch.dtype,
    *,
    batch: int = 2,
    query_len: int = 7,
    key_len: int = 11,
    heads: int = 4,
    kv_heads: int = 2,
    head_size: int = 8,
    mask: str = "none",
    size: float = 3.0,
    device: str = "cpu",
) -> dict[str, torch.Tensor]:
    """Return query, key, value and a mask in which some rows are empty, whole samples with key padding."""
    generator = torch.Generator().manual_seed(1)
    randn = partial(torch.randn, generator=generator)
    inputs = {
        "query": size * randn(batch, query_len, heads, head_size),
        "key": randn(batch, key_len, kv_heads, head_size),
        "value": randn(batch, key_len, kv_heads, head_size),
    }
    keep = torch.rand(batch, heads, query_len, key_len, generator=generator) > 0.4
    keep[0, heads // 2, query_len // 2] = False
    keep[:, :, -1] = False
    if mask == "key_padding":
        inputs["attn_mask"] = keep[:, 0, 0]
        inputs["attn_mask"][0] = False
    elif mask == "bool":
        inputs["attn_mask"] = keep
    elif mask == "bool_broadcast":
        inputs["attn_mask"] = keep[:1, :1]
    elif mask == "additive":
        inputs["attn_mask"] = randn(keep.shape).masked_fill(~keep, -torch.inf)
    elif mask == "additive_shared":
        inputs["attn_mask"] = randn(1, heads, query_len, key_len).masked_fill(~keep[:1], -torch.inf)
    return {name: (x.to(dtype) if x.is_floating_point() else x).to(device) for name, x in inputs.items()}


def run(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    **options: Any,
) -> Any:
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    impl = TorchSDPAImpl(query.shape[2], query.shape[3], scale, is_causal, key.shape[2])
    return impl.forward(query, key, value, None, attn_mask=attn_mask, **options)


@pytest.mark.parametrize("return_lse", [False, True], ids=["", "lse"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_outputs_and_gradients(dtype: torch.dtype, mask: str, is_causal: bool, return_lse: bool) -> None:
    inputs = make_inputs(dtype, key_len=7 if is_causal else 11, mask=mask)
    options = {"is_causal": is_causal, "return_lse": return_lse}
    assert_op_within_budget(partial(run, **options), partial(reference_attention, **options), inputs)


@pytest.mark.parametrize("scale", [-0.7, 0.0, 1e-3, 2.0])
@pytest.mark.parametrize("mask", ["none", "bool", "additive"])
def test_any_scale(scale: float, mask: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make_inputs(dtype, mask=mask)
        options = {"scale": scale, "return_lse": True}
        assert_op_within_budget(partial(run, **options), partial(reference_attention, **options), inputs)


@pytest.mark.parametrize(
    ("query_len", "key_len", "heads", "kv_heads", "head_size"),
    [(1, 1, 1, 1, 1), (1, 37, 3, 1, 16), (37, 1, 2, 2, 20), (67, 129, 6, 2, 3), (130, 61, 2, 1, 80)],
)
def test_shapes_that_bite(query_len: int, key_len: int, heads: int, kv_heads: int, head_size: int) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        inputs = make_inputs(dtype, query_len=query_len, key_len=key_len, heads=heads, kv_heads=kv_heads, head_size=head_size)
        options = {"return_lse": True}
        assert_op_within_budget(partial(run, **options), partial(reference_attention, **options), inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_large_activations(dtype: torch.dtype) -> None:
    inputs = make_inputs(dtype, query_len=64, key_len=96, head_size=64, size=15.0)
    assert inputs["query"].abs().max() > 50
    options = {"return_lse": True}
    assert_op_within_budget(partial(run, **options), partial(reference_attention, **options), inputs)


@pytest.mark.parametrize("mask", ["key_padding", "bool", "additive"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_rows_with_nothing_to_attend_to(dtype: torch.dtype, mask: str) -> None:
    inputs = make_inputs(dtype, mask=mask)
    inputs = {name: x.requires_grad_(x.is_floating_point()) for name, x in inputs.items()}
    output, lse = run(**inputs, return_lse=True)
    rows = (0,) if mask == "key_padding" else (slice(None), -1)
    assert torch.equal(output[rows], torch.zeros_like(output[rows]))
    assert (lse[rows] == -torch.inf).all()
    output[rows].sum().backward(retain_graph=True)
    lse[rows].sum().backward()
    for name, x in inputs.items():
        if x.is_floating_point():
            assert torch.equal(x.grad, torch.zeros_like(x)), name


def test_non_contiguous_inputs() -> None:
    inputs = make_inputs(torch.float32)
    strided = {
        "query": inputs["query"].permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0),
        "key": inputs["key"].repeat_interleave(2, 1)[:, ::2],
        "value": inputs["value"].transpose(1, 2).contiguous().transpose(1, 2),
    }
    assert strided["query"].stride(-1) != 1
    for return_lse in (False, True):
        expected, actual = run(**inputs, return_lse=return_lse), run(**strided, return_lse=return_lse)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_gradients_by_finite_differences() -> None:
    inputs = make_inputs(torch.float64, batch=1, query_len=3, key_len=4, head_size=2, mask="additive", size=1.0)
    mask = inputs["attn_mask"].masked_fill(inputs["attn_mask"] == -torch.inf, -3.0)
    leaves = [inputs[name].requires_grad_() for name in ("query", "key", "value")] + [mask.requires_grad_()]
    for tensors in (leaves, leaves[:3]):
        assert torch.autograd.gradcheck(lambda *x: run(*x, scale=0.4, return_lse=True), tensors)


def test_log_sum_exp_alone_has_gradients_without_those_of_value() -> None:
    inputs = make_inputs(torch.float64)
    query, key = inputs["query"].requires_grad_(), inputs["key"].requires_grad_()
    grads, expected = (
        torch.autograd.grad(function(query, key, inputs["value"], return_lse=True)[1].square().sum(), (query, key))
        for function in (run, reference_attention)
    )
    torch.testing.assert_close(grads, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("of", [0, 1], ids=["query", "key"])
def test_second_derivatives_of_the_log_sum_exp_raise(of: int) -> None:
    inputs = {name: x.requires_grad_() for name, x in make_inputs(torch.float64).items()}
    leaves = (inputs["query"], inputs["key"])
    grads = torch.autograd.grad(run(**inputs, return_lse=True)[1].sum(), leaves, create_graph=True)
    for leaf in leaves:
        with pytest.raises(RuntimeError, match="got a second one"):
            torch.autograd.grad(grads[of].square().sum(), leaf, retain_graph=True, allow_unused=True)


def test_dropout_drops_weights_and_keeps_the_mean() -> None:
    inputs = make_inputs(torch.float32, batch=1, query_len=4, key_len=64, heads=2, kv_heads=2, size=0.1)
    inputs["value"] = torch.ones_like(inputs["value"])
    torch.manual_seed(0)
    output, lse = run(**inputs, dropout_p=0.5, return_lse=True)
    torch.testing.assert_close(lse, run(**inputs, return_lse=True)[1])
    # Weights are near 1/64 and each survives, doubled, with probability 1/2: sums of 64 have a deviation near 1/8.
    assert output.std() > 0.02
    mean = torch.stack([run(**inputs, dropout_p=0.5) for _ in range(200)]).mean()
    assert abs(float(mean) - 1.0) < 0.02


def test_dropout_is_reproduced_by_its_seed_and_has_gradients() -> None:
    inputs = {name: x.requires_grad_() for name, x in make_inputs(torch.float32).items()}
    outputs, grads = [], []
    for _ in range(2):
        torch.manual_seed(3)
        outputs.append(run(**inputs, dropout_p=0.3))
        grads.append(torch.autograd.grad(outputs[-1].square().sum(), list(inputs.values())))
    assert torch.equal(*outputs)
    for first, second in zip(*grads, strict=True):
        assert torch.equal(first, second)
        assert first.abs().sum() > 0


@pytest.mark.parametrize("mask", ["none", "key_padding", "bool", "additive"])
def test_compiles_as_one_graph(mask: str) -> None:
    inputs = {name: x.requires_grad_(x.is_floating_point()) for name, x in make_inputs(torch.float32, mask=mask).items()}
    wanted = [x for x in inputs.values() if x.requires_grad]

    def step(**inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output, lse = run(**inputs, return_lse=True)
        return output, lse.masked_fill(lse == -torch.inf, 0.0)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (step, compiled):
        outputs = function(**inputs)
        results.append((*outputs, *torch.autograd.grad(outputs[0].sum() + outputs[1].square().sum(), wanted)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_chunked_log_sum_exp_equals_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_sdpa, "_MAX_CHUNK_ELEMENTS", 200)
    for mask, is_causal in (("none", False), ("none", True), ("key_padding", False), ("additive", False)):
        inputs = make_inputs(torch.float64, key_len=7, mask=mask)
        expected = reference_attention(**inputs, is_causal=is_causal, return_lse=True)[1].transpose(1, 2)
        bias = inputs.get("attn_mask")
        bias = bias[:, None, None] if mask == "key_padding" else bias
        query, key = inputs["query"].transpose(1, 2), inputs["key"].transpose(1, 2)
        lse = torch_sdpa._chunked_lse(query, key, bias, is_causal, 8**-0.5)
        torch.testing.assert_close(lse, expected)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"capability": (10, 0)}, None),
        ({"head_size": 36}, None),
        ({"capability": (8, 0)}, "compute capability"),
        ({"capability": None}, "compute capability"),
        ({"dtype": torch.float32}, "dtype"),
        ({"head_size": 256}, "head size 256"),
        ({"key_len": 77}, "77 keys"),
        ({"has_mask": True}, "mask"),
        ({"dropout_p": 0.1}, "dropout_p is 0.1"),
    ],
)
def test_cudnn_refusals(change: dict[str, Any], reason: str | None) -> None:
    fits: dict[str, Any] = {
        "capability": (9, 0),
        "dtype": torch.bfloat16,
        "head_size": 128,
        "query_len": 4096,
        "key_len": 512,
        "has_mask": False,
        "dropout_p": 0.0,
    }
    refusals = cudnn_refusals(**(fits | change))
    assert refusals == () if reason is None else len(refusals) == 1 and reason in refusals[0]


def test_builder_ignores_only_what_others_know() -> None:
    builder = TorchSDPABackend.get_builder_cls()()
    builder.prepare()
    metadata = builder.build(current_timestep=7, raw_latent_shape=(1, 2, 3), patch_size=(1, 2, 2), VSA_sparsity=0.5)
    assert metadata == AttentionMetadata(current_timestep=7)
    with pytest.raises(TypeError, match=r"\['sparsity'\]"):
        builder.build(current_timestep=7, sparsity=0.5)


@pytest.mark.parametrize("is_additive", [False, True])
def test_grouped_heads_with_a_mask_per_head_and_a_single_query(is_additive) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 4, 24, generator=generator), torch.randn(2, 3, 2, 24, generator=generator)
    keep = torch.tensor([True, False, True, False]).view(1, 4, 1, 1).expand(1, 4, 1, 3)
    mask = torch.zeros(1, 4, 1, 3).masked_fill(~keep, -torch.inf) if is_additive else keep
    impl = TorchSDPAImpl(4, 24, 24**-0.5, False, 2)
    found, lse = impl.forward(query, key, key, None, attn_mask=mask, return_lse=True)
    expected, expected_lse = reference_attention(query, key, key, attn_mask=mask, return_lse=True)
    torch.testing.assert_close((found, lse), (expected, expected_lse))


def test_log_sum_exp_stays_wide_under_autocast() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (4 * torch.randn(1, 32, 2, 64, generator=generator) for _ in range(2))
    mask = torch.randn(1, 2, 32, 32, generator=generator).requires_grad_()
    impl = TorchSDPAImpl(2, 64, 0.125, False, 2)
    query, key, half_mask = query.bfloat16(), key.bfloat16(), mask.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        _, lse = impl.forward(query, key, key, None, attn_mask=half_mask, return_lse=True)
    _, expected = reference_attention(query.double(), key.double(), key.double(), attn_mask=half_mask.double(), return_lse=True)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse, expected.float(), rtol=1e-4, atol=1e-3)
