"""The reference against PyTorch's own attention and against a row computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fastvideo.testing import reference_attention


@pytest.mark.parametrize("mask", ["none", "causal", "key_padding", "bool", "additive"])
def test_equals_torch_in_float64(mask: str) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 9, 4, 8, generator=generator, dtype=torch.float64)
    key, value = key[:, :, :2], value[:, :, :2]
    keep = torch.rand(2, 4, 9, 9, generator=generator) > 0.3
    attn_mask, torch_mask = {
        "key_padding": (keep[:, 0, 0], keep[:, :1, :1]),
        "bool": (keep, keep),
        "additive": (keep.double() * 3, keep.double() * 3),
    }.get(mask, (None, None))
    is_causal = mask == "causal"
    output = reference_attention(query, key, value, attn_mask=attn_mask, is_causal=is_causal, scale=0.4)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=torch_mask, is_causal=is_causal, scale=0.4, enable_gqa=True)
    torch.testing.assert_close(output, expected.transpose(1, 2), rtol=1e-12, atol=1e-12)


def test_one_row_by_hand() -> None:
    query, key = torch.tensor([2.0]).view(1, 1, 1, 1), torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)
    value = torch.tensor([10.0, 20.0]).view(1, 2, 1, 1)
    output, lse = reference_attention(query, key, value, scale=0.5, return_lse=True)
    weight = math.e / (1 + math.e)
    assert float(output) == pytest.approx(10 * (1 - weight) + 20 * weight)
    assert float(lse) == pytest.approx(math.log(1 + math.e))


@pytest.mark.parametrize("additive", [False, True])
def test_an_empty_row_is_zero_with_zero_gradients(additive: bool) -> None:
    query, key, value = (x.requires_grad_() for x in torch.randn(3, 1, 3, 2, 4).unbind())
    mask: torch.Tensor = torch.tensor([True, False, True]).view(1, 1, 3, 1).expand(1, 1, 3, 3)
    if additive:
        mask = torch.zeros(1, 1, 3, 3).masked_fill(~mask, -torch.inf).requires_grad_()
    output, lse = reference_attention(query, key, value, attn_mask=mask, return_lse=True)
    assert output[:, 1].abs().max() == 0
    assert (lse[:, 1] == -torch.inf).all()
    assert lse[:, ::2].isfinite().all()
    leaves = [query, key, value, *([mask] if additive else [])]
    for grad in torch.autograd.grad((output[:, 1].sum(), lse[:, 1].sum()), leaves):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_gradients_by_finite_differences() -> None:
    leaves = [x.requires_grad_() for x in torch.randn(3, 1, 3, 2, 2, dtype=torch.float64).unbind()]
    assert torch.autograd.gradcheck(lambda *x: reference_attention(*x, is_causal=True, return_lse=True), leaves)


def test_bad_masks_are_refused() -> None:
    query = torch.zeros(1, 3, 1, 2)
    with pytest.raises(ValueError, match=r"expected a mask .* got \(3, 3, 3\)"):
        reference_attention(query, query, query, attn_mask=torch.ones(3, 3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="got 3 queries and 2 keys"):
        reference_attention(query, query[:, :2], query[:, :2], is_causal=True)
