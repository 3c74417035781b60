"""Every backend honours or rejects every field of a request: nothing is dropped in silence.

For each field there is an unusual value. A backend that rejects it has to name it; one that accepts it has to give the
reference's numbers, which is computed here for the backend that runs on a CPU.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from fastvideo.attention.backends.abstract import AttentionBackend, AttentionMetadata
from fastvideo.attention.backends.flash_attn import FlashAttentionBackend
from fastvideo.attention.backends.sliding_tile_attn import SlidingTileAttentionBackend
from fastvideo.attention.backends.torch_sdpa import TorchSDPABackend
from fastvideo.attention.request import AttentionRequest
from fastvideo.platforms import describe_system
from fastvideo.testing import assert_within_budget, reference_attention


@dataclasses.dataclass
class OtherMetadata(AttentionMetadata):
    """Metadata of some sparse backend."""

    tiles: int = 0


# Field, unusual values of it together with what they need, and a word by which a rejection has to name it.
UNUSUAL: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("num_heads", {"num_heads": 6}, "heads"),
    ("num_kv_heads", {"num_kv_heads": 1}, "heads"),
    ("head_size", {"head_size": 3}, "head size 3"),
    ("head_size", {"head_size": 520}, "head size 520"),
    ("query_len", {"query_len": 1}, "queries"),
    ("key_len", {"key_len": 131}, "keys"),
    ("dtype", {"dtype": torch.float64}, "torch.float64"),
    ("dtype", {"dtype": torch.float32}, "torch.float32"),
    ("dtype", {"dtype": torch.float16}, "torch.float16"),
    ("dtype", {"dtype": torch.float8_e4m3fn}, "torch.float8_e4m3fn"),
    ("dtype", {"dtype": torch.int32}, "torch.int32"),
    ("device", {"device": "xpu", "system": None}, "'xpu'"),
    ("device", {"device": "meta", "system": None}, "'meta'"),
    ("batch", {"batch": 5}, "batch"),
    ("scale", {"scale": -0.6}, "scale"),
    ("scale", {"scale": 0.0}, "scale"),
    ("is_causal", {"is_causal": True}, "causal"),
    ("is_causal", {"is_causal": True, "mask": "key_padding"}, "causal"),
    ("is_causal", {"is_causal": True, "mask": "additive"}, "mask"),
    ("is_causal", {"is_causal": True, "key_len": 9}, "causal"),
    ("mask", {"mask": "key_padding"}, "key padding"),
    ("mask", {"mask": "bool"}, "bool mask"),
    ("mask", {"mask": "additive"}, "additive mask"),
    ("mask_needs_grad", {"mask": "additive", "mask_needs_grad": True, "needs_grad": True}, "additive mask"),
    (
        "mask_needs_grad",
        {"mask": "additive", "mask_needs_grad": True, "needs_grad": True, "needs_lse": True},
        "additive mask",
    ),
    ("dropout_p", {"dropout_p": 0.25}, "dropout_p=0.25"),
    ("needs_grad", {"needs_grad": True}, "gradient"),
    ("needs_lse", {"needs_lse": True}, "log-sum-exp"),
    ("needs_lse", {"needs_lse": True, "needs_grad": True}, "log-sum-exp"),
    ("has_gate", {"has_gate": True}, "gate_compress"),
    ("has_out", {"has_out": True}, "output buffer"),
    ("num_replicated", {"num_replicated": 3}, "replicated"),
    ("metadata_cls", {"metadata_cls": OtherMetadata}, "OtherMetadata"),
    ("layout", {"layout": "ulysses"}, "ulysses"),
    ("layout", {"layout": "ulysses", "dropout_p": 0.25}, "dropout_p=0.25"),
)

# What the packages of FLASH_ATTN can't do together on an H200; the rest of UNUSUAL has to be accepted there.
FLASH_REFUSES = (
    {"head_size": 520},
    {"dtype": torch.float64},
    {"dtype": torch.float32},
    {"dtype": torch.float8_e4m3fn},
    {"dtype": torch.int32},
    {"device": "xpu", "system": None},
    {"device": "meta", "system": None},
    {"is_causal": True, "mask": "key_padding"},
    {"is_causal": True, "mask": "additive"},
    {"is_causal": True, "key_len": 9},
    {"mask": "bool"},
    {"mask": "additive"},
    {"mask": "additive", "mask_needs_grad": True, "needs_grad": True},
    {"mask": "additive", "mask_needs_grad": True, "needs_grad": True, "needs_lse": True},
    {"has_gate": True},
    {"has_out": True},
    {"layout": "ulysses", "dropout_p": 0.25},
)
SDPA_REFUSES = (
    {"dtype": torch.float8_e4m3fn},
    {"dtype": torch.int32},
    {"device": "xpu", "system": None},
    {"device": "meta", "system": None},
    {"is_causal": True, "key_len": 9},
    {"has_gate": True},
    {"has_out": True},
    {"layout": "ulysses", "dropout_p": 0.25},
)
STA_REFUSES = (
    {"query_len": 1},
    {"key_len": 131},
    {"dtype": torch.float8_e4m3fn},
    {"dtype": torch.int32},
    {"is_causal": True},
    {"is_causal": True, "mask": "key_padding"},
    {"is_causal": True, "mask": "additive"},
    {"is_causal": True, "key_len": 9},
    {"mask": "key_padding"},
    {"mask": "bool"},
    {"mask": "additive"},
    {"mask": "additive", "mask_needs_grad": True, "needs_grad": True},
    {"mask": "additive", "mask_needs_grad": True, "needs_grad": True, "needs_lse": True},
    {"dropout_p": 0.25},
    {"needs_lse": True},
    {"needs_lse": True, "needs_grad": True},
    {"has_gate": True},
    {"has_out": True},
    {"metadata_cls": OtherMetadata},
    {"layout": "ulysses", "dropout_p": 0.25},
)


def make_request(device: str, system: str, /, **changes: Any) -> AttentionRequest:
    fields: dict[str, Any] = {
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_size": 16,
        "query_len": 12,
        "key_len": 12,
        "dtype": torch.bfloat16,
        "device": device,
        "batch": 2,
        "system": describe_system(system),
    }
    return AttentionRequest(**(fields | changes))


def name_of(case: tuple[str, dict[str, Any], str]) -> str:
    return ",".join(f"{field}={value}" for field, value in case[1].items())


def test_every_field_has_an_unusual_value() -> None:
    fields = {field.name for field in dataclasses.fields(AttentionRequest)}
    assert {case[0] for case in UNUSUAL} == fields - {"system"}  # described systems: test_flash_attn.py


@pytest.mark.parametrize("case", UNUSUAL, ids=name_of)
@pytest.mark.parametrize(
    ("backend", "device", "system", "refused"),
    [
        (TorchSDPABackend, "cpu", "CPU", SDPA_REFUSES),
        (FlashAttentionBackend, "cuda", "H200", FLASH_REFUSES),
        (SlidingTileAttentionBackend, "cpu", "CPU", STA_REFUSES),
    ],
    ids=["TORCH_SDPA", "FLASH_ATTN", "SLIDING_TILE_ATTN"],
)
def test_a_rejection_names_the_field(
    backend: type[AttentionBackend],
    device: str,
    system: str,
    refused: tuple[dict[str, Any], ...],
    case: tuple[str, dict[str, Any], str],
) -> None:
    _, changes, word = case
    reasons = backend.rejections(make_request(device, system, **changes))
    assert bool(reasons) == (changes in refused), reasons
    if reasons:
        assert any(word in reason for reason in reasons), reasons
    assert len(set(reasons)) == len(reasons)


@pytest.mark.parametrize("backend", [TorchSDPABackend, FlashAttentionBackend])
def test_an_output_buffer_is_refused_with_a_gradient(backend: type[AttentionBackend]) -> None:
    request = make_request("cpu", "CPU", has_out=True, needs_grad=True)
    assert any("gradient" in reason for reason in backend.rejections(request))


@pytest.mark.parametrize("case", [case for case in UNUSUAL if case[1] not in SDPA_REFUSES], ids=name_of)
def test_what_torch_sdpa_accepts_it_honours(case: tuple[str, dict[str, Any], str]) -> None:
    request = make_request("cpu", "CPU", **case[1])
    tensors = make_tensors(request)
    found = [run(TorchSDPABackend, request, tensors)]
    if request.dropout_p > 0:
        keep = 1 - request.dropout_p
        values = tensors | {"value": torch.ones_like(tensors["value"])}
        torch.manual_seed(0)
        drawn = torch.stack([run(TorchSDPABackend, request, values)["output"].float() for _ in range(100)])
        # Each of 12 nearly equal weights survives with probability `keep`, divided by it.
        assert abs(float(drawn.mean()) - 1.0) < 0.02
        assert float(drawn.std()) == pytest.approx((request.dropout_p / keep / 12) ** 0.5, rel=0.5)
        return
    promoted = {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}
    eager, expected = run(None, request, tensors), run(None, request, promoted)
    assert found[0].keys() == expected.keys()
    for name, value in found[0].items():
        assert_within_budget(value, expected[name], eager[name], name=name)


def make_tensors(request: AttentionRequest) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    batch, query_len, key_len = request.batch, request.query_len, request.key_len

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(request.dtype)

    kv_shape = (batch, key_len, request.num_kv_heads, request.head_size)
    size = 0.1 if request.dropout_p > 0 else 1.0
    tensors = {
        "query": size * randn(batch, query_len, request.num_heads, request.head_size),
        "key": randn(*kv_shape),
        "value": randn(*kv_shape),
    }
    keep = torch.rand(batch, 1, query_len, key_len, generator=generator) > 0.3
    if request.mask == "key_padding":
        tensors["attn_mask"] = keep[:, 0, 0]
    elif request.mask == "bool":
        tensors["attn_mask"] = keep
    elif request.mask == "additive":
        tensors["attn_mask"] = randn(*keep.shape).masked_fill(~keep, -torch.inf)
    return tensors


def run(
    backend: type[AttentionBackend] | None, request: AttentionRequest, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return output, log-sum-exp and gradients as `request` asks; by the reference where `backend` is `None`."""
    tensors = {name: x.detach().clone() for name, x in tensors.items()}
    for name, x in tensors.items():
        wanted = request.mask_needs_grad if name == "attn_mask" else request.needs_grad
        x.requires_grad_(wanted)
    query, key, value, mask = (tensors.get(name) for name in ("query", "key", "value", "attn_mask"))
    if backend is None:
        options: dict[str, Any] = {"scale": request.softmax_scale, "is_causal": request.is_causal}
        result = reference_attention(query, key, value, attn_mask=mask, return_lse=request.needs_lse, **options)
    else:
        impl = backend.get_impl_cls()(
            request.num_heads,
            request.head_size,
            request.softmax_scale,
            request.is_causal,
            request.num_kv_heads,
            prefix="blocks.0.attn",
        )
        metadata = request.metadata_cls and request.metadata_cls(current_timestep=0)
        result = impl.forward(
            query, key, value, metadata, attn_mask=mask, dropout_p=request.dropout_p, return_lse=request.needs_lse
        )
    outputs = result if isinstance(result, tuple) else (result,)
    found = dict(zip(("output", "log-sum-exp"), outputs, strict=False))
    leaves = {name: x for name, x in tensors.items() if x.requires_grad}
    if leaves:
        generator = torch.Generator().manual_seed(3)
        cotangents = [torch.randn(x.shape, generator=generator).bfloat16().to(x.dtype) for x in outputs]
        grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
        found |= {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {name: x.detach() for name, x in found.items()}
