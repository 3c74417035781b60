"""Dense backends on a CUDA device, against float64: every kernel that they may pick, at activations of real size."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from fastvideo.attention.backends import torch_sdpa
from fastvideo.attention.backends.abstract import AttentionBackend
from fastvideo.attention.backends.flash_attn import FlashAttentionBackend, choose_generation
from fastvideo.attention.backends.torch_sdpa import TorchSDPABackend
from fastvideo.attention.request import AttentionRequest
from fastvideo.platforms import current_platform
from fastvideo.testing import assert_op_within_budget, assert_within_budget, reference_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, torch sees none"),
]

BACKENDS = [TorchSDPABackend, FlashAttentionBackend]
HALF_DTYPES = [torch.bfloat16, torch.float16]
# Query tokens, key tokens, query heads, key heads, head size.
SHAPES = {
    "self": (512, 512, 4, 4, 128),
    "primes": (331, 331, 3, 3, 64),
    "cross": (383, 211, 4, 4, 128),
    "gqa": (256, 384, 6, 2, 128),
    "few": (7, 5, 2, 1, 64),
    "odd_head": (193, 193, 2, 2, 36),
    "big_head": (160, 160, 2, 2, 256),
}


def make_inputs(dtype: torch.dtype, shape: str, mask: str | None = None, size: float = 3.0) -> dict[str, torch.Tensor]:
    """Return tensors on the device; the masks have empty rows, key padding a whole empty sample."""
    query_len, key_len, heads, kv_heads, head_size = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    randn = partial(torch.randn, generator=generator)
    inputs = {
        "query": size * randn(2, query_len, heads, head_size),
        "key": randn(2, key_len, kv_heads, head_size),
        "value": randn(2, key_len, kv_heads, head_size),
    }
    keep = torch.rand(2, heads, query_len, key_len, generator=generator) > 0.4
    keep[:, :, 3] = False
    if mask == "key_padding":
        inputs["attn_mask"] = keep[:, 0, 0]
        inputs["attn_mask"][0] = False
    elif mask == "bool":
        inputs["attn_mask"] = keep
    elif mask == "additive":
        inputs["attn_mask"] = randn(keep.shape).masked_fill(~keep, -torch.inf)
    return {name: (x.to(dtype) if x.is_floating_point() else x).cuda() for name, x in inputs.items()}


def run(
    backend: type[AttentionBackend],
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
    impl = backend.get_impl_cls()(query.shape[2], query.shape[3], scale, is_causal, key.shape[2])
    return impl.forward(query, key, value, None, attn_mask=attn_mask, **options)


def skip_if_refused(backend: type[AttentionBackend], inputs: dict[str, torch.Tensor], **fields: Any) -> None:
    query, key, mask = inputs["query"], inputs["key"], inputs.get("attn_mask")
    kind = None
    if mask is not None:
        kind = "additive" if mask.is_floating_point() else "key_padding" if mask.dim() == 2 else "bool"
    request = AttentionRequest(
        num_heads=query.shape[2],
        num_kv_heads=key.shape[2],
        head_size=query.shape[3],
        query_len=query.shape[1],
        key_len=key.shape[1],
        dtype=query.dtype,
        device="cuda",
        mask=kind,
        system=current_platform("cuda"),
        **fields,
    )
    if reasons := backend.rejections(request):
        pytest.skip(f"{backend.get_name()} refuses: {'; '.join(reasons)}")


def check(backend: type[AttentionBackend], inputs: dict[str, torch.Tensor], **options: Any) -> None:
    """Compare output, log-sum-exp and all gradients, or what of them the backend accepts."""
    is_causal = options.get("is_causal", False)
    for return_lse in (False, True):
        fields = {"is_causal": is_causal, "needs_lse": return_lse}
        wants_grad = not return_lse or backend is TorchSDPABackend
        if backend is FlashAttentionBackend:
            request = AttentionRequest(1, 1, inputs["query"].shape[3], 1, 1, inputs["query"].dtype, "cuda", needs_grad=True)
            generation, _ = choose_generation(request, current_platform("cuda"))
            wants_grad = generation is not None and (not return_lse or generation.package == "flash-attn-4")
        skip_if_refused(backend, inputs, needs_grad=wants_grad, **fields)
        assert_op_within_budget(
            partial(run, backend, return_lse=return_lse, **options),
            partial(reference_attention, return_lse=return_lse, **options),
            inputs,
            gradients=wants_grad,
        )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dense(backend: type[AttentionBackend], dtype: torch.dtype, shape: str) -> None:
    check(backend, make_inputs(dtype, shape))


@pytest.mark.parametrize("mask", ["key_padding", "bool", "additive"])
@pytest.mark.parametrize("shape", ["self", "cross", "gqa", "few", "odd_head"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_masks(backend: type[AttentionBackend], shape: str, mask: str) -> None:
    check(backend, make_inputs(torch.bfloat16, shape, mask))


@pytest.mark.parametrize("mask", [None, "key_padding", "bool", "additive"])
@pytest.mark.parametrize("shape", ["self", "primes"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_causal(backend: type[AttentionBackend], shape: str, mask: str | None) -> None:
    check(backend, make_inputs(torch.bfloat16, shape, mask), is_causal=True)


@pytest.mark.parametrize("mask", [None, "key_padding", "additive"])
@pytest.mark.parametrize("shape", ["cross", "gqa", "odd_head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wide_dtypes(dtype: torch.dtype, shape: str, mask: str | None) -> None:
    # TF32 is off by default, so float32 products are exact to float32.
    check(TorchSDPABackend, make_inputs(dtype, shape, mask))


@pytest.mark.parametrize("scale", [-0.07, 0.0, 0.5])
@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_scale(backend: type[AttentionBackend], is_causal: bool, scale: float) -> None:
    check(backend, make_inputs(torch.bfloat16, "self"), scale=scale, is_causal=is_causal)


@pytest.mark.parametrize("mask", [None, "key_padding"])
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_large_activations(backend: type[AttentionBackend], dtype: torch.dtype, mask: str | None) -> None:
    inputs = make_inputs(dtype, "self", mask, size=11.0)
    assert inputs["query"].abs().max() > 45
    check(backend, inputs)


@pytest.mark.parametrize("mask", ["key_padding", "bool", "additive"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_with_nothing_to_attend_to(backend: type[AttentionBackend], dtype: torch.dtype, mask: str) -> None:
    inputs = make_inputs(dtype, "self", mask)
    skip_if_refused(backend, inputs, needs_lse=True)
    output, lse = run(backend, **inputs, return_lse=True)
    rows = (0,) if mask == "key_padding" else (slice(None), 3)
    assert torch.equal(output[rows], torch.zeros_like(output[rows]))
    assert (lse[rows] == -torch.inf).all()
    assert not output.isnan().any()
    assert not lse.isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_inputs(backend: type[AttentionBackend]) -> None:
    inputs = make_inputs(torch.bfloat16, "self")
    skip_if_refused(backend, inputs)
    fused = torch.stack(list(inputs.values()), dim=2).transpose(0, 1).contiguous().transpose(0, 1)
    strided = dict(zip(inputs, fused.unbind(2), strict=True))
    transposed = strided | {"query": inputs["query"].mT.contiguous().mT}
    expected = run(backend, **inputs)
    assert torch.equal(run(backend, **strided), expected)
    assert torch.equal(run(backend, **transposed), expected)


@pytest.mark.parametrize("mask", [None, "key_padding"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_as_one_graph(backend: type[AttentionBackend], mask: str | None) -> None:
    torch.compiler.reset()
    inputs = make_inputs(torch.bfloat16, "self", mask)
    skip_if_refused(backend, inputs, needs_grad=True)
    leaves = [x.requires_grad_() for x in inputs.values() if x.is_floating_point()]
    call = partial(run, backend)
    compiled = torch.compile(call, fullgraph=True)
    results = []
    for function in (call, compiled):
        output = function(**inputs)
        results.append((output, *torch.autograd.grad(output.float().square().sum(), leaves)))
    reference_inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    assert_within_budget(results[1][0], reference_attention(**reference_inputs), results[0][0])
    # The backward adds up in any order, so two runs agree to rounding.
    torch.testing.assert_close(results[1], results[0], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_waits_for_the_device(backend: type[AttentionBackend]) -> None:
    for mask in (None, "key_padding"):
        inputs = make_inputs(torch.bfloat16, "self", mask)
        skip_if_refused(backend, inputs, needs_lse=True)
        run(backend, **inputs, return_lse=True)
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(backend, **inputs, return_lse=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_dropout_keeps_the_mean() -> None:
    inputs = make_inputs(torch.bfloat16, "self", size=0.1)
    inputs["value"] = torch.ones_like(inputs["value"])
    output = run(TorchSDPABackend, **inputs, dropout_p=0.5).float()
    assert abs(float(output.mean()) - 1.0) < 0.02
    assert 0.01 < float(output.std()) < 0.2


def test_cudnn_is_called_where_it_is_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch_sdpa._cudnn_capability(0) not in ((9, 0), (10, 0)):
        pytest.skip("cuDNN's kernel is called directly on capability 9.0 and 10.0 only")
    calls = []
    cudnn = torch_sdpa._cudnn
    monkeypatch.setattr(torch_sdpa, "_cudnn", lambda *args, **options: calls.append(1) or cudnn(*args, **options))
    run(TorchSDPABackend, **make_inputs(torch.bfloat16, "self"))
    assert len(calls) == 1
    for shape, mask in (("big_head", None), ("self", "key_padding"), ("few", None)):
        run(TorchSDPABackend, **make_inputs(torch.bfloat16, shape, mask))
    assert len(calls) == 1


def test_key_padding_keeps_no_scores() -> None:
    heads, tokens = 8, 8192
    query = torch.randn(1, tokens, heads, 64, device="cuda", dtype=torch.bfloat16)
    mask = torch.arange(tokens, device="cuda")[None] < 5000
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(TorchSDPABackend, query, query, query, mask, return_lse=True)
    grown = torch.cuda.max_memory_allocated() - before
    assert grown < heads * tokens * tokens // 4, f"{grown} bytes at the peak; one byte per score would be {heads * tokens**2}"
