"""The override of torch's attention function: the same meaning of every argument, on one thread, for as long as it is open."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F

from fastvideo.attention import BackendUnavailable, UnknownBackend, use_attn_backend
from fastvideo.attention.backends import torch_sdpa
from fastvideo.integrations import override_sdpa
from fastvideo.testing import assert_op_within_budget


def additive(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def keep(*shape: int) -> torch.Tensor:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.6
    mask[..., 0] = True
    return mask


CASES = {
    "plain": ((2, 3, 5, 8), (2, 3, 7, 8), {}),
    "causal": ((2, 3, 5, 8), (2, 3, 5, 8), {"is_causal": True}),
    "causal, more keys": ((2, 3, 5, 8), (2, 3, 7, 8), {"is_causal": True}),
    "causal, fewer keys": ((2, 3, 7, 8), (2, 3, 5, 8), {"is_causal": True}),
    "scale": ((2, 3, 5, 8), (2, 3, 7, 8), {"scale": -0.3}),
    "GQA": ((2, 4, 5, 8), (2, 2, 7, 8), {"enable_gqa": True}),
    "mask of keys": ((2, 3, 5, 8), (2, 3, 7, 8), {"attn_mask": keep(2, 1, 1, 7)}),
    "mask of rows": ((2, 3, 5, 8), (2, 3, 7, 8), {"attn_mask": keep(5, 7)}),
    "mask per head": ((2, 3, 5, 8), (2, 3, 7, 8), {"attn_mask": keep(3, 5, 7)}),
    "mask in full": ((2, 3, 5, 8), (2, 3, 7, 8), {"attn_mask": keep(2, 3, 5, 7)}),
    "no batch": ((3, 5, 8), (3, 7, 8), {"attn_mask": keep(5, 7)}),
    "no heads": ((5, 8), (7, 8), {}),
    "two batch dims": ((2, 2, 3, 5, 8), (2, 2, 3, 7, 8), {"attn_mask": keep(2, 1, 1, 5, 7)}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_arguments_keep_their_meaning(name: str, dtype: torch.dtype) -> None:
    query_shape, key_shape, extra = CASES[name]
    generator = torch.Generator().manual_seed(0)
    inputs = {
        part: torch.randn(shape, generator=generator).to(dtype)
        for part, shape in (("query", query_shape), ("key", key_shape), ("value", key_shape))
    }

    def ours(**tensors: torch.Tensor) -> torch.Tensor:
        with override_sdpa("TORCH_SDPA"):
            return F.scaled_dot_product_attention(**tensors, **extra)

    def torchs(**tensors: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(**tensors, **extra)

    assert_op_within_budget(ours, torchs, inputs)


def test_additive_masks_and_positional_arguments() -> None:
    q, k, v = torch.randn(3, 2, 3, 5, 8)
    bias = additive((2, 1, 5, 5), torch.float32)
    expected = F.scaled_dot_product_attention(q, k, v, bias, 0.0, False)
    with override_sdpa():
        assert torch.allclose(F.scaled_dot_product_attention(q, k, v, bias, 0.0, False), expected, atol=1e-6)
        assert torch.allclose(torch.nn.functional.scaled_dot_product_attention(q, k, v, bias), expected, atol=1e-6)


@pytest.fixture
def runs(monkeypatch) -> list[int]:
    """One entry for each call that our backend runs, naming its thread."""
    seen: list[int] = []
    forward = torch_sdpa.TorchSDPAImpl.forward

    def spy(self, *args, **kwargs):
        seen.append(threading.get_ident())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(torch_sdpa.TorchSDPAImpl, "forward", spy)
    return seen


def test_it_ends_with_its_context_and_with_an_error(runs: list[int]) -> None:
    q = torch.randn(1, 2, 4, 8)
    original = F.scaled_dot_product_attention
    with override_sdpa():
        F.scaled_dot_product_attention(q, q, q)
        assert torch.nn.functional.scaled_dot_product_attention is original
    assert len(runs) == 1
    with pytest.raises(ZeroDivisionError), override_sdpa():
        raise ZeroDivisionError
    F.scaled_dot_product_attention(q, q, q)
    assert len(runs) == 1
    # It doesn't see the calls that our own backend makes, and nests.
    with override_sdpa(), override_sdpa("TORCH_SDPA"):
        F.scaled_dot_product_attention(q, q, q)
    assert len(runs) == 2


def test_other_threads_do_not_see_it(runs: list[int]) -> None:
    q = torch.randn(1, 2, 4, 8)
    with override_sdpa():
        thread = threading.Thread(target=F.scaled_dot_product_attention, args=(q, q, q))
        thread.start()
        thread.join()
        assert runs == []
        F.scaled_dot_product_attention(q, q, q)
    assert runs == [threading.get_ident()]


def test_it_runs_as_asked_or_raises() -> None:
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(UnknownBackend):
        override_sdpa("TORCH_SPDA_9")
    with override_sdpa("FLASH_ATTN"), pytest.raises(BackendUnavailable, match="FLASH_ATTN"):
        F.scaled_dot_product_attention(q, q, q)
    with override_sdpa(), use_attn_backend("FLASH_ATTN"), pytest.raises(BackendUnavailable, match="asked for by scope"):
        F.scaled_dot_product_attention(q, q, q)
    with override_sdpa(), pytest.raises(ValueError, match="either attn_mask or is_causal"):
        F.scaled_dot_product_attention(q, q, q, torch.ones(4, 4, dtype=torch.bool), is_causal=True)
    for query, key in ((q[:, :, :0], q), (q, q[:, :, :0]), (q[:0], q[:0])):
        with override_sdpa(), pytest.raises(ValueError, match="without empty dims"):
            F.scaled_dot_product_attention(query, key, key)
    with override_sdpa(), pytest.raises(ValueError, match=r"as \[..., seq, head_size\], got \(8,\)"):
        F.scaled_dot_product_attention(*[torch.randn(8)] * 3)
    with override_sdpa(), pytest.raises(ValueError, match="as many key heads"):
        F.scaled_dot_product_attention(q, q[:, :1], q[:, :1])


def test_queries_that_see_nothing_get_zero() -> None:
    q = torch.randn(1, 2, 4, 8)
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[1] = False
    with override_sdpa():
        output = F.scaled_dot_product_attention(q, q, q, mask)
    assert output[:, :, 1].abs().max() == 0
    assert output[:, :, 0].abs().min() > 0


def test_what_no_mode_can_see_is_refused() -> None:
    layer, x = torch.nn.MultiheadAttention(16, 2), torch.randn(2, 5, 16)
    expected, _ = layer(x, x, x)
    with override_sdpa():
        with pytest.raises(NotImplementedError, match="need_weights"):
            layer(x, x, x, need_weights=False)
        assert torch.allclose(layer(x, x, x)[0], expected, atol=1e-6)


def test_compiled_code_follows_it() -> None:
    q = torch.randn(1, 2, 4, 8)
    torch._dynamo.reset()
    function = torch.compile(lambda q: F.scaled_dot_product_attention(q, q, q) * 2, backend="eager", fullgraph=True)
    plain = function(q)
    with override_sdpa("TORCH_SDPA"):
        assert torch.allclose(function(q), plain, atol=1e-6)
    with override_sdpa("FLASH_ATTN"), pytest.raises(RuntimeError, match="FLASH_ATTN"):
        function(q)
    assert torch.equal(function(q), plain)
