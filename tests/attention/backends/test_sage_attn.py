"""`SAGE_ATTN` without a GPU: its reasons, and its call against a stand-in that rounds to 8 bits as the package does.

The stand-in has the signature of `sageattention` 1.0.6 and its habit that bites: it smooths the caller's keys in place.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastvideo.attention import attention, explain
from fastvideo.attention.backends.sage_attn import SageAttentionBackend, SageAttentionImpl, _sage_attention
from fastvideo.attention.request import AttentionRequest
from fastvideo.attention.selector import BackendUnavailable
from fastvideo.benchmark.accuracy import Attended, compare
from fastvideo.platforms import describe_system
from fastvideo.testing import reference_attention

BLOCK = 64


def make_request(system: str = "H200, sageattention==1.0.6", **changes: Any) -> AttentionRequest:
    fields: dict[str, Any] = {
        "num_heads": 8,
        "num_kv_heads": 2,
        "head_size": 128,
        "query_len": 4096,
        "key_len": 4096,
        "dtype": torch.bfloat16,
        "device": "cuda",
        "system": describe_system(system),
    }
    return AttentionRequest(**(fields | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head_size": 64, "dtype": torch.float16, "is_causal": True},
        {"head_size": 96},
        {"key_len": 512, "scale": -0.5},
        {"system": "RTX4090"},
        {"layout": "ulysses", "num_replicated": 7, "batch": 3},
    ],
    ids=str,
)
def test_what_it_accepts(changes: dict[str, Any]) -> None:
    assert SageAttentionBackend.rejections(make_request(**changes)) == ()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"system": "H200, no sageattention"}, 'not installed; pip install "fastvideo-attention[sage]"'),
        ({"system": "H200, sageattention==1.0.2"}, "1.0.2 is too old"),
        ({"system": "MI300X"}, "no NVIDIA GPU"),
        ({"device": "cpu", "system": "CPU"}, "device 'cpu' is not supported"),
        ({"dtype": torch.float32}, "dtype torch.float32 is not supported"),
        ({"head_size": 80}, "head size 80 is not supported"),
        ({"head_size": 96, "system": "H200, sageattention==2.2.0"}, "head size 96 is not supported"),
        ({"scale": 0.0}, "scale 0 is not supported"),
        ({"needs_grad": True}, "a gradient is not supported"),
        ({"needs_lse": True}, "log-sum-exp is not supported"),
        ({"mask": "key_padding"}, "a key padding mask is not supported"),
        ({"mask": "bool"}, "a full bool mask is not supported"),
        ({"mask": "additive"}, "a full additive mask is not supported"),
        ({"dropout_p": 0.1}, "dropout (dropout_p=0.1) is not supported"),
        ({"is_causal": True, "key_len": 5}, "is_causal needs equal lengths"),
        ({"has_gate": True}, "gate_compress"),
        ({"has_out": True}, "output buffer"),
    ],
    ids=str,
)
def test_every_rejection_names_its_reason(changes: dict[str, Any], word: str) -> None:
    reasons = SageAttentionBackend.rejections(make_request(**changes))
    assert any(word in reason for reason in reasons), reasons
    assert len(set(reasons)) == len(reasons)


def test_it_is_never_chosen_automatically() -> None:
    report = explain(heads=8, head_size=128, seq=4096, system="H200, sageattention==1.0.6")
    assert report.chosen != "SAGE_ATTN"
    named = explain(heads=8, head_size=128, seq=4096, system="H200, sageattention==1.0.6", backend="sage_attn")
    assert named.chosen == "SAGE_ATTN"


def sageattn(
    q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND", is_causal=False, sm_scale: float | None = None,
    smooth_k: bool = True, **kwargs: Any,
) -> Tensor:  # fmt: skip
    """8-bit scores: rows in blocks of 64, each with one scale; values in fp16."""
    assert not kwargs
    assert tensor_layout == "NHD"
    assert q.shape[-1] in (64, 96, 128)
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    if smooth_k:
        k -= k.mean(dim=1, keepdim=True)
    q8, k8 = eight_bits(q.float() * (q.shape[-1] ** -0.5 if sm_scale is None else sm_scale)), eight_bits(k.float())
    out = reference_attention(q8, k8, v.half().float(), scale=1.0, is_causal=is_causal)
    return out.to(q.dtype)


def eight_bits(x: Tensor) -> Tensor:
    blocks = x.split(BLOCK, dim=1)
    scales = [block.abs().amax(dim=(1, 3), keepdim=True) / 127 for block in blocks]
    assert all((scale > 0).all() for scale in scales), "division by 0"
    return torch.cat([(block / scale).round() * scale for block, scale in zip(blocks, scales, strict=True)], dim=1)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("sageattention")
    module.sageattn = sageattn
    monkeypatch.setitem(sys.modules, "sageattention", module)


def make_inputs(kv_heads: int = 4, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 200, heads, 64, generator=generator) for heads in (4, kv_heads, kv_heads))
    # A common offset of all keys, which 8 bits couldn't hold beside what differs.
    return query.to(dtype), (key + 30.0).to(dtype), value.to(dtype)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("scale", [64**-0.5, 0.3, -0.2])
def test_values(package: None, scale: float, kv_heads: int, is_causal: bool) -> None:
    query, key, value = make_inputs(kv_heads)
    before = key.clone()
    out = SageAttentionImpl(4, 64, scale, is_causal, kv_heads).forward(query, key, value, None)
    assert torch.equal(key, before)
    expected = reference_attention(query.double(), key.double(), value.double(), scale=scale, is_causal=is_causal)
    error = (out.double() - expected).abs()
    # Scores are rounded to one part in 127 of the largest, so they are off by some hundredths.
    assert 1e-4 < float(error.mean()) < 0.02
    assert float(error.max()) < 0.25


def test_the_benchmark_sees_its_error(package: None) -> None:
    inputs = make_inputs()
    errors = [
        compare(Attended(), inputs, None, {"out": out}).errors["out"]
        for out in (SageAttentionImpl(4, 64, 64**-0.5).forward(*inputs, None), attention(*inputs, backend="TORCH_SDPA"))
    ]
    assert 5e-3 < errors[0] < 0.1
    assert errors[0] > 2 * errors[1]
    wrong = SageAttentionImpl(4, 64, 1.2 * 64**-0.5).forward(*inputs, None)
    assert compare(Attended(), inputs, None, {"out": wrong}).over_budget is not None


def test_strided_inputs_and_the_door(package: None, monkeypatch) -> None:
    monkeypatch.setattr(SageAttentionBackend, "rejections", classmethod(lambda cls, request: ()))
    query, key, value = make_inputs()
    packed = torch.stack([query, key, value], dim=-1)
    strided = packed.unbind(-1)
    assert strided[0].stride(-1) == 3
    expected = SageAttentionImpl(4, 64, 0.2).forward(query, key, value, None)
    assert torch.equal(attention(*strided, scale=0.2, backend="SAGE_ATTN"), expected)


def test_a_gradient_is_an_error_and_not_zero(package: None) -> None:
    query, key, value = make_inputs()
    impl = SageAttentionImpl(4, 64, 0.2)
    with pytest.raises(NotImplementedError, match="no gradient"):
        impl.forward(query.requires_grad_(), key, value, None)
    with torch.no_grad():
        assert impl.forward(query, key, value, None).isfinite().all()
    with pytest.raises(ValueError, match="scale of 0"):
        SageAttentionImpl(4, 64, 0.0).forward(query, key, value, None)
    with pytest.raises(BackendUnavailable, match="a gradient is not supported: 8-bit attention"):
        attention(query, key, value, backend="SAGE_ATTN")


def test_a_forward_mode_tangent_is_refused(package: None) -> None:
    query, key, value = make_inputs()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=r"tangent .*, got key with one"):
        SageAttentionImpl(4, 64, 0.2).forward(query, forward_ad.make_dual(key, torch.ones_like(key)), value, None)


def test_op(package: None) -> None:
    inputs = make_inputs(dtype=torch.float16)
    torch.library.opcheck(_sage_attention, (*inputs, 0.2, False))
    compiled = torch.compile(SageAttentionImpl(4, 64, 0.2).forward, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs, None), SageAttentionImpl(4, 64, 0.2).forward(*inputs, None))


def test_the_stand_in_has_the_signature_of_the_installed_package() -> None:
    try:
        real = importlib.import_module("sageattention").sageattn
    except ImportError as error:
        pytest.skip(f"sageattention is not installed: {error}")
    names = list(inspect.signature(real).parameters)
    assert {"q", "k", "v", "tensor_layout", "is_causal", "sm_scale"} <= set(names)
    assert names[:3] == list(inspect.signature(sageattn).parameters)[:3]
