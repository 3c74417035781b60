"""`FLASH_ATTN` without a GPU: which generation runs where and why not, and the calls, against stand-ins in plain torch.

The stand-ins have the packages' signatures and their habits that bite: lengths by `cu_seqlens`, a log-sum-exp with heads
before tokens, garbage in the gradients of keys past the last sample, and wrong results for a scale that isn't positive.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

from fastvideo.attention.backends import flash_attn
from fastvideo.attention.backends.flash_attn import FlashAttentionBackend, FlashAttentionImpl, choose_generation, kernels
from fastvideo.attention.request import AttentionRequest
from fastvideo.platforms import describe_system
from fastvideo.testing import assert_op_within_budget, assert_within_budget, reference_attention

Tensor = torch.Tensor
PACKAGES = ("flash-attn-4", "flash-attn-3", "fa3-fwd", "flash-attn")


def make_request(**changes: Any) -> AttentionRequest:
    system = changes.pop("system", "H200")
    fields: dict[str, Any] = {
        "num_heads": 8,
        "num_kv_heads": 8,
        "head_size": 128,
        "query_len": 4096,
        "key_len": 4096,
        "dtype": torch.bfloat16,
        "device": "cuda",
        "system": describe_system(system),
    }
    return AttentionRequest(**(fields | changes))


def chosen_package(**changes: Any) -> str | None:
    request = make_request(**changes)
    generation, reasons = choose_generation(request, request.system)
    assert (generation is None) == bool(reasons)
    return None if generation is None else generation.package


@pytest.mark.parametrize(
    ("system", "changes", "package"),
    [
        ("H200", {}, "flash-attn-3"),
        ("H200", {"needs_grad": True}, "flash-attn-4"),
        ("H200, no flash-attn-3", {}, "fa3-fwd"),
        ("H200, no flash-attn-3", {"dtype": torch.float16}, "flash-attn-4"),
        ("H200, no flash-attn-3, no flash-attn-4", {"needs_grad": True}, "flash-attn"),
        (
            "H200, torch only, with flash-attn-4, with nvidia-cutlass-dsl",
            {"needs_grad": True, "needs_lse": True},
            "flash-attn-4",
        ),
        ("H200, torch only, with fa3-fwd", {"needs_lse": True}, "fa3-fwd"),
        ("H200", {"dropout_p": 0.1}, "flash-attn"),
        ("H200", {"head_size": 36}, "flash-attn"),
        ("H200", {"mask": "key_padding"}, "flash-attn-3"),
        ("B200", {}, "flash-attn-4"),
        ("B200", {"head_size": 256}, "flash-attn-4"),
        ("B200", {"head_size": 192}, "flash-attn"),
        ("A100", {}, "flash-attn"),
        ("RTX4090", {"needs_grad": True}, "flash-attn"),
        ("RTX5090", {}, "flash-attn"),
        ("H200, flash-attn-4==4.0.0b20, no flash-attn-3, no fa3-fwd", {}, "flash-attn"),
        ("H200, flash-attn-4==4.0.0, no flash-attn-3, no fa3-fwd", {}, "flash-attn-4"),
    ],
)
def test_the_fastest_generation_that_fits_is_chosen(system: str, changes: dict[str, Any], package: str) -> None:
    # `with PACKAGE` names every generation for "flash-attn", so single ones are listed by what is missing.
    assert chosen_package(system=system, **changes) == package
    assert FlashAttentionBackend.rejections(make_request(system=system, **changes)) == ()


@pytest.mark.parametrize(
    ("system", "changes", "words"),
    [
        ("H200, torch only", {}, ['pip install "flash-attn-4[cu13]>=4.0.0b36"', 'pip install "fa3-fwd>=0.0.3"']),
        ("H200, torch only", {}, ["--no-build-isolation", "subdirectory=hopper"]),
        ("H200, torch only, with flash-attn-4", {}, ["nvidia-cutlass-dsl is missing; pip install"]),
        ("CPU", {"device": "cpu"}, ["device 'cpu' is not supported"]),
        ("MI300X", {}, ["not an NVIDIA GPU"]),
        ("H200", {"dtype": torch.float64}, ["dtype torch.float64"]),
        ("H200", {"dtype": torch.float32}, ["dtype torch.float32"]),
        ("H200", {"mask": "bool"}, ["a full bool mask"]),
        ("H200", {"mask": "additive"}, ["a full additive mask"]),
        ("H200", {"mask": "key_padding", "is_causal": True}, ["causal with key padding"]),
        ("H200", {"is_causal": True, "key_len": 5}, ["equal lengths, got 4096 queries and 5 keys"]),
        ("H200", {"head_size": 264}, ["head size 264", "multiple of 8 up to 256", "at most 256"]),
        ("H200, no flash-attn-4", {"needs_grad": True, "needs_lse": True}, ["gradient through the log-sum-exp"]),
        ("B200", {"head_size": 256, "needs_grad": True, "needs_lse": True}, ["log-sum-exp is not supported at head"]),
        ("H200", {"dropout_p": 0.1, "needs_lse": True}, ["log-sum-exp together with dropout", "dropout_p=0.1"]),
        ("A100, no flash-attn", {}, ["needs compute capability 9.x, 10.x, 11.x; A100 has 8.0"]),
        ("RTX4090", {"head_size": 256, "needs_grad": True, "dropout_p": 0.1}, ["needs an A100, H100 or B200"]),
        ("H200", {"has_gate": True}, ["gate_compress"]),
        ("H200", {"has_out": True}, ["output buffer"]),
        ("H200", {"dropout_p": 0.1, "layout": "ulysses"}, ["each device would draw"]),
    ],
)
def test_rejections_name_the_reason(system: str, changes: dict[str, Any], words: list[str]) -> None:
    reasons = "\n".join(FlashAttentionBackend.rejections(make_request(system=system, **changes)))
    for word in words:
        assert word in reasons


def test_every_generation_gives_its_reasons() -> None:
    reasons = FlashAttentionBackend.rejections(make_request(system="H200, torch only"))
    assert [package for package in PACKAGES if any(f"({package}): not installed" in reason for reason in reasons)] == list(
        PACKAGES
    )


def test_expected_speed_follows_the_choice() -> None:
    speeds = [
        FlashAttentionBackend.expected_speed(make_request(system=system))
        for system in ("H200", "H200, no flash-attn-3, no fa3-fwd, no flash-attn-4", "A100", "H200, torch only")
    ]
    assert speeds == [689.0, 350.0, 350.0, 0.0]
    assert FlashAttentionBackend.expected_speed(make_request(device="cpu", system="CPU")) == 0.0


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Return the output and the log-sum-exp `[B, H, S]` as a fused kernel does, for positive scales only."""
    if scale <= 0:
        raise AssertionError(f"a kernel that takes the maximum of unscaled scores was given {scale=}")
    out, lse = reference_attention(q, k, v, scale=scale, is_causal=causal, return_lse=True)
    return out, lse.transpose(1, 2)


def attend_packed(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, lengths: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    cu_q, cu_k = (lengths[name].tolist() for name in ("cu_seqlens_q", "cu_seqlens_k"))
    assert all(lengths[name].dtype == torch.int32 for name in ("cu_seqlens_q", "cu_seqlens_k"))
    samples = []
    for i in range(len(cu_q) - 1):
        assert 0 < cu_k[i + 1] - cu_k[i] <= lengths["max_seqlen_k"]
        assert cu_q[i + 1] - cu_q[i] == lengths["max_seqlen_q"]
        queries, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        samples.append(attend(q[None, queries], k[None, keys], v[None, keys], scale, causal))
    return torch.cat([out[0] for out, _ in samples]), torch.cat([lse[0] for _, lse in samples], dim=1)


def fa4_forward(
    q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, causal: bool, return_lse: bool, **lengths: Any
) -> tuple[Any, ...]:
    call = partial(attend_packed, lengths=lengths) if lengths else attend
    out, lse = call(q, k, v, softmax_scale, causal)
    return out.contiguous(), lse.contiguous(), None, None, None


def dense_backward(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dlse: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients by their formulas, since autograd doesn't record inside a custom op."""
    groups = q.shape[2] // k.shape[2]
    q32, dout32 = q.float().transpose(1, 2), dout.float().transpose(1, 2)
    k32, v32 = (x.float().transpose(1, 2).repeat_interleave(groups, 1) for x in (k, v))
    scores = scale * q32 @ k32.mT
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    weights = scores.softmax(-1)
    grad_weights = dout32 @ v32.mT
    shift = (grad_weights * weights).sum(-1, keepdim=True)
    if dlse is not None:
        shift = shift - dlse[..., None]
    grad_scores = scale * weights * (grad_weights - shift)
    grad_k, grad_v = ((x.mT @ y).unflatten(1, (-1, groups)).sum(2) for x, y in ((grad_scores, q32), (weights, dout32)))
    return tuple(grad.transpose(1, 2).to(q.dtype) for grad in (grad_scores @ k32, grad_k, grad_v))


def fa4_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor,
    *, softmax_scale: float, causal: bool, deterministic: bool, dlse: Tensor | None, **lengths: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    expected = fa4_forward(q, k, v, softmax_scale=softmax_scale, causal=causal, return_lse=True, **lengths)[:2]
    torch.testing.assert_close((out, lse), expected)
    if not lengths:
        return dense_backward(q, k, v, dout, dlse, softmax_scale, causal)
    cu_q, cu_k = (lengths[name].tolist() for name in ("cu_seqlens_q", "cu_seqlens_k"))
    grads = tuple(torch.full_like(x, torch.nan) for x in (q, k, v))
    for i in range(len(cu_q) - 1):
        rows = [slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1]), slice(cu_k[i], cu_k[i + 1])]
        sample = [x[None, part] for x, part in zip((q, k, v), rows, strict=True)]
        sample_dlse = None if dlse is None else dlse[None, :, rows[0]]
        found = dense_backward(*sample, dout[None, rows[0]], sample_dlse, softmax_scale, causal)
        for grad, part, value in zip(grads, rows, found, strict=True):
            grad[part] = value[0]
    return grads


def fa3_function(
    q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, causal: bool, return_attn_probs: bool, **lengths: Any
) -> tuple[Tensor, Tensor]:
    assert return_attn_probs
    call = partial(attend_packed, lengths=lengths) if lengths else attend
    return call(q, k, v, softmax_scale, causal)


def fa2_function(
    q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float, softmax_scale: float, causal: bool, deterministic: bool,
    return_attn_probs: bool, **lengths: Any,
) -> Any:  # fmt: skip
    out, lse = fa3_function(q, k, v, softmax_scale=softmax_scale, causal=causal, return_attn_probs=True, **lengths)
    out = out * (1 - dropout_p)  # a visible trace of the argument
    return (out, lse, None) if return_attn_probs else out


@pytest.fixture(params=PACKAGES)
def package(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Install stand-ins for all packages, and describe an H200 that has one of them; CPU tensors pass for its own."""
    cute = types.ModuleType("flash_attn.cute")
    cute.interface = types.ModuleType("flash_attn.cute.interface")
    cute.interface._flash_attn_fwd, cute.interface._flash_attn_bwd = fa4_forward, fa4_backward
    modules = {"flash_attn": types.ModuleType("flash_attn"), "flash_attn.cute": cute}
    modules |= {"flash_attn.cute.interface": cute.interface}
    modules |= {name: types.ModuleType(name) for name in ("flash_attn_interface", "fa3_fwd_interface")}
    for name, function in (
        ("flash_attn", fa2_function),
        ("flash_attn_interface", fa3_function),
        ("fa3_fwd_interface", fa3_function),
    ):
        modules[name].flash_attn_func = modules[name].flash_attn_varlen_func = function
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    missing = ", ".join(f"no {name}" for name in PACKAGES[:-1] if name != request.param)
    system = describe_system(f"H200, {missing}")
    if request.param != "flash-attn":
        packages = tuple(item for item in system.packages if item[0] != "flash-attn")
        system = type(system)(system.platform, system.device_name, system.capability, packages)
    monkeypatch.setattr(flash_attn, "current_platform", lambda device: system)
    choose = flash_attn._cached_generation
    choose.cache_clear()
    monkeypatch.setattr(
        flash_attn, "_cached_generation", lambda head_size, dtype, device, *rest: choose(head_size, dtype, "cuda", *rest)
    )
    yield request.param
    choose.cache_clear()


def make_inputs(key_padding: bool = False, **shape: int) -> dict[str, Tensor]:
    """Return bf16 tensors, and a mask with a full sample, an empty one, a prefix and holes."""
    batch, query_len, key_len = 4, shape.get("query_len", 5), shape.get("key_len", 9)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(batch, length, heads, 16, generator=generator).bfloat16()
        for length, heads in ((query_len, 4), (key_len, 2), (key_len, 2))
    )
    inputs = {"query": 3 * query, "key": key, "value": value}
    if key_padding:
        mask = torch.rand(batch, key_len, generator=generator) > 0.5
        mask[0], mask[1], mask[2] = True, False, torch.arange(key_len) < 3
        mask[3, 0], mask[3, 1] = False, True
        inputs["attn_mask"] = mask
        key[~mask] = 1e4
        value[~mask] = torch.nan
    return inputs


def run(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    *, is_causal: bool = False, scale: float | None = None, **options: Any,
) -> Any:  # fmt: skip
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    impl = FlashAttentionImpl(query.shape[2], query.shape[3], scale, is_causal, key.shape[2])
    return impl.forward(query, key, value, None, attn_mask=attn_mask, **options)


def reference(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Any:
    """Return the reference with padding zeroed, since 0 × NaN is NaN there."""
    if attn_mask is not None:
        key, value = (x.masked_fill(~attn_mask[:, :, None, None], 0) for x in (key, value))
    return reference_attention(query, key, value, attn_mask=attn_mask, **options)


@pytest.mark.parametrize("scale", [None, -0.3, 0.0])
@pytest.mark.parametrize("kind", ["", "causal", "key_padding"])
def test_calls_match_the_reference(package: str, kind: str, scale: float | None) -> None:
    inputs = make_inputs(kind == "key_padding", **({"query_len": 9} if kind == "causal" else {}))
    options: dict[str, Any] = {"is_causal": kind == "causal", "scale": scale}
    assert_op_within_budget(partial(run, **options), partial(reference, **options), inputs, gradients=package != "fa3-fwd")
    gradients = package == "flash-attn-4"
    options["return_lse"] = True
    assert_op_within_budget(partial(run, **options), partial(reference, **options), inputs, gradients=gradients)


def test_a_sample_without_keys_is_zero(package: str) -> None:
    output, lse = run(**make_inputs(key_padding=True), return_lse=True)
    assert torch.equal(output[1], torch.zeros_like(output[1]))
    assert (lse[1] == -torch.inf).all()
    assert output[[0, 2, 3]].isfinite().all()
    assert lse[[0, 2, 3]].isfinite().all()


def test_compiles_as_one_graph(package: str) -> None:
    for key_padding in (False, True):
        inputs = make_inputs(key_padding)
        with torch.no_grad():
            compiled = torch.compile(partial(run, return_lse=True), fullgraph=True, backend="aot_eager")
            if package in ("flash-attn-4", "fa3-fwd"):
                torch.testing.assert_close(compiled(**inputs), run(**inputs, return_lse=True), rtol=0, atol=0)
    if package == "flash-attn-4":
        leaves = [x.requires_grad_() for x in list(inputs.values())[:3]]
        expected = torch.autograd.grad(run(**inputs).float().square().sum(), leaves)
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        actual = torch.autograd.grad(compiled(**inputs).float().square().sum(), leaves)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_dropout_reaches_flash_attention_2_alone(package: str) -> None:
    inputs = make_inputs()
    if package != "flash-attn":
        with pytest.raises(NotImplementedError, match=r"dropout \(dropout_p=0.5\)"):
            run(**inputs, dropout_p=0.25)
        return
    assert_within_budget(run(**inputs, dropout_p=0.25), 0.75 * run(**inputs).double(), 0.75 * run(**inputs))


def test_a_missing_gradient_is_refused_before_the_call(package: str) -> None:
    inputs = make_inputs()
    inputs["query"].requires_grad_()
    if package == "fa3-fwd":
        with pytest.raises(NotImplementedError, match="the package has no backward"):
            run(**inputs)
    if package != "flash-attn-4":
        with pytest.raises(NotImplementedError, match="gradient through the log-sum-exp"):
            run(**inputs, return_lse=True)


@pytest.mark.parametrize("package", ["fa3-fwd", "flash-attn-4"], indirect=True)
def test_a_forward_mode_tangent_is_refused_where_our_op_would_drop_it(package: str) -> None:
    inputs = make_inputs()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=r"tangent .*, got value with one"):
        run(**{**inputs, "value": forward_ad.make_dual(inputs["value"], torch.ones_like(inputs["value"]))})


@pytest.mark.parametrize("package", ["flash-attn-4"], indirect=True)
@pytest.mark.parametrize("key_padding", [False, True], ids=["", "packed"])
def test_the_custom_op_is_sound(package: str, key_padding: bool) -> None:
    inputs = make_inputs(key_padding)
    query, key, value, lengths = inputs["query"], inputs["key"], inputs["value"], kernels.NOT_PACKED
    if key_padding:
        key, value, lengths = flash_attn._pack_keys(key, value, inputs["attn_mask"], query.shape[1])
        # A NaN gradient equals no other, so opcheck gets a last sample that ends with the keys.
        lengths[1][-1] = key.shape[0]
        lengths = (*lengths[:3], key.shape[0])
        query = query.flatten(0, 1)
    tensors = [x.detach().requires_grad_() for x in (query, key, value)]
    torch.library.opcheck(kernels._flash, (*tensors, *lengths, 0.25, False, "flash-attn-4"))


def test_packing_keeps_the_order_and_zeroes_the_rest() -> None:
    mask = torch.tensor([[False, True, True], [False, False, False], [True, False, True]])
    key = torch.arange(1.0, 10.0).view(3, 3, 1, 1)
    packed, _, (cu_query_lens, cu_key_lens, query_len, key_len) = flash_attn._pack_keys(key, key, mask, 7)
    assert packed.flatten().tolist() == [2.0, 3.0, 0.0, 7.0, 9.0, 0.0, 0.0, 0.0, 0.0]
    assert cu_key_lens.tolist() == [0, 2, 3, 5]
    assert cu_query_lens.tolist() == [0, 7, 14, 21]
    assert (query_len, key_len) == (7, 3)
