"""Attention in parts on one device: whichever backend computes them, merged they are attention over all keys."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from fastvideo.attention.backends.torch_sdpa import TorchSDPAImpl
from fastvideo.attention.dispatch import Selected
from fastvideo.attention.parts import BackendParts
from fastvideo.distributed.mesh import LOCAL
from fastvideo.distributed.ring import Step, attend_in_parts, balanced_pieces, causal_steps
from fastvideo.testing import assert_op_within_budget, reference_attention

HEADS, KV_HEADS, HEAD_SIZE, TOKENS = 4, 2, 16, 23


class ReferenceImpl:
    """A backend with a differentiable log-sum-exp and no backward kernel that anyone here knows."""

    def __init__(self, causal: bool, scale: float) -> None:
        self.causal, self.scale = causal, scale

    def forward(self, query, key, value, _metadata, *, attn_mask=None, return_lse=False):
        return reference_attention(
            query, key, value, attn_mask=attn_mask, is_causal=self.causal, scale=self.scale, return_lse=return_lse
        )


def flash_backward(q, k, v, out, grad, lse, *, softmax_scale, causal, dlse, deterministic):
    """FlashAttention-4's backward in plain torch: `[B, S, H, D]`, the log-sum-exp with heads before tokens."""
    assert softmax_scale > 0
    assert dlse is None
    dtype, readers = q.dtype, q.shape[2] // k.shape[2]
    q, k, v, out, grad = (x.to(lse.dtype) for x in (q, k, v, out, grad))
    keys, values = (x.repeat_interleave(readers, 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) * softmax_scale
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    weights = (scores - lse[..., None]).exp()
    of_weights = torch.einsum("bqhd,bkhd->bhqk", grad, values)
    of_scores = weights * (of_weights - (grad * out).sum(-1).transpose(1, 2)[..., None]) * softmax_scale
    of_key = torch.einsum("bhqk,bqhd->bkhd", of_scores, q).unflatten(2, (-1, readers)).sum(3)
    of_value = torch.einsum("bhqk,bqhd->bkhd", weights, grad).unflatten(2, (-1, readers)).sum(3)
    return torch.einsum("bhqk,bkhd->bqhd", of_scores, keys).to(dtype), of_key.to(dtype), of_value.to(dtype)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch) -> None:
    interface = types.SimpleNamespace(_flash_attn_bwd=flash_backward)
    for name, module in (("flash_attn", types.ModuleType("flash_attn")), ("flash_attn.cute", types.ModuleType("cute"))):
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["flash_attn.cute"].interface = interface
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", interface)


def select(name: str, causal: bool, scale: float) -> Selected:
    if name == "TORCH_SDPA":
        impl = TorchSDPAImpl(HEADS, HEAD_SIZE, scale, causal=causal, num_kv_heads=KV_HEADS)
    else:
        impl = ReferenceImpl(causal, scale)
    return Selected(name, impl, frozenset(), object, False, False, False)


def draw(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def split(lengths: tuple[int, ...]) -> tuple[Step, ...]:
    stops = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return tuple(Step((0, TOKENS), (stop - n, stop), ((stop - n, stop),)) for n, stop in zip(lengths, stops, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.3, -0.3, 0.0])
@pytest.mark.parametrize("name", ["TORCH_SDPA", "FLASH_ATTN", "THIRD_PARTY"])
def test_parts_are_attention(name, scale, dtype) -> None:
    kernels = BackendParts(select(name, False, scale), None, scale)
    steps = split((9, 1, 0, 13))
    inputs = {
        "query": draw(2, TOKENS, HEADS, HEAD_SIZE, seed=0, dtype=dtype),
        "key": draw(2, TOKENS, KV_HEADS, HEAD_SIZE, seed=1, dtype=dtype),
        "value": draw(2, TOKENS, KV_HEADS, HEAD_SIZE, seed=2, dtype=dtype),
    }
    assert_op_within_budget(
        lambda query, key, value: attend_in_parts(kernels, steps, query, key, value, LOCAL),
        lambda query, key, value: reference_attention(query, key, value, scale=scale),
        inputs,
        floor_ulps=2 if dtype == torch.bfloat16 else None,
    )


@pytest.mark.parametrize("name", ["TORCH_SDPA", "FLASH_ATTN", "THIRD_PARTY"])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_causal_parts_of_regrouped_queries(name, rank) -> None:
    kernels = BackendParts(select(name, False, 0.3), select(name, True, 0.3), 0.3)
    rows = torch.cat([torch.arange(*piece) for piece in balanced_pieces(TOKENS, 3)[rank]])
    inputs = {
        "query": draw(1, TOKENS, HEADS, HEAD_SIZE, seed=0, dtype=torch.float64),
        "key": draw(1, TOKENS, KV_HEADS, HEAD_SIZE, seed=1, dtype=torch.float64),
        "value": draw(1, TOKENS, KV_HEADS, HEAD_SIZE, seed=2, dtype=torch.float64),
    }
    assert_op_within_budget(
        lambda query, key, value: attend_in_parts(kernels, causal_steps(rank, 3, TOKENS), query[:, rows], key, value, LOCAL),
        lambda query, key, value: reference_attention(query, key, value, is_causal=True, scale=0.3)[:, rows],
        inputs,
    )


@pytest.mark.parametrize("name", ["TORCH_SDPA", "FLASH_ATTN", "THIRD_PARTY"])
@pytest.mark.parametrize("kind", ["key padding", "bool", "additive"])
def test_masks_of_parts_and_rows_that_see_nothing(name, kind) -> None:
    kernels = BackendParts(select(name, False, 0.3), None, 0.3)
    mask = draw(1, 1, TOKENS, TOKENS, seed=5, dtype=torch.float64)
    mask = mask.masked_fill(mask > 0.5, -torch.inf)
    mask[:, :, 3] = -torch.inf
    if kind == "bool":
        mask = mask > -1
    elif kind == "key padding":
        mask = torch.arange(TOKENS) >= torch.tensor([[15], [TOKENS]])
    inputs = {
        "query": draw(2, TOKENS, HEADS, HEAD_SIZE, seed=0, dtype=torch.float64),
        "key": draw(2, TOKENS, KV_HEADS, HEAD_SIZE, seed=1, dtype=torch.float64),
        "value": draw(2, TOKENS, KV_HEADS, HEAD_SIZE, seed=2, dtype=torch.float64),
        "mask": mask,
    }
    assert_op_within_budget(
        lambda query, key, value, mask: attend_in_parts(kernels, split((9, 14)), query, key, value, LOCAL, mask=mask),
        lambda query, key, value, mask: reference_attention(query, key, value, attn_mask=mask, scale=0.3),
        inputs,
    )


def test_what_has_no_kernel_for_its_gradient_is_not_compiled() -> None:
    third = BackendParts(select("THIRD_PARTY", False, 0.3), None, 0.3)
    third.check_compilable(False, has_mask=True)
    with pytest.raises(NotImplementedError, match="backend THIRD_PARTY over parts of the keys can't be compiled"):
        third.check_compilable(True, has_mask=False)
    with pytest.raises(NotImplementedError, match="with a mask"):
        BackendParts(select("FLASH_ATTN", False, 0.3), None, 0.3).check_compilable(True, has_mask=True)
    BackendParts(select("TORCH_SDPA", False, 0.3), None, 0.3).check_compilable(True, has_mask=True)


@pytest.mark.parametrize("name", ["TORCH_SDPA", "THIRD_PARTY"])
def test_second_derivatives_raise(name) -> None:
    kernels, steps = BackendParts(select(name, False, 0.3), None, 0.3), split((9, 14))
    shapes = [(1, TOKENS, HEADS, HEAD_SIZE), *[(1, TOKENS, KV_HEADS, HEAD_SIZE)] * 2, (1, 1, TOKENS, TOKENS)]
    leaves = [draw(*shape, seed=i, dtype=torch.float64).requires_grad_() for i, shape in enumerate(shapes)]
    output = attend_in_parts(kernels, steps, *leaves[:3], LOCAL, mask=leaves[3])
    for grad in torch.autograd.grad(output.square().sum(), leaves, create_graph=True):
        for leaf in leaves:
            with pytest.raises(NotImplementedError, match="got a second one"):
                torch.autograd.grad(grad.square().sum(), leaf, retain_graph=True, allow_unused=True)
