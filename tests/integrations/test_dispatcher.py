"""Our names in diffusers' own dispatcher: any of its models runs by them, and what they can't do is refused."""

from __future__ import annotations

import functools

import diffusers
import pytest
import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    attention_backend,
    dispatch_attention_fn,
)

from fastvideo.attention import BackendUnavailable
from fastvideo.attention.backends.torch_sdpa import TorchSDPAImpl
from fastvideo.integrations import override_sdpa
from fastvideo.integrations.diffusers import dispatcher_names, register_dispatcher_names

from .tiny_models import NAMED, call, call_with_gradients, make

diffusers.utils.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def restored_dispatcher():
    active = _AttentionBackendRegistry._active_backend
    register_dispatcher_names()
    yield
    _AttentionBackendRegistry.set_active_backend(active)


def test_names_are_members_like_any_other() -> None:
    assert register_dispatcher_names() == dispatcher_names()
    assert dispatcher_names()[0] == "fastvideo"
    assert "fastvideo_video_sparse_attn" not in dispatcher_names()
    for name in dispatcher_names():
        member = AttentionBackendName(name)
        assert member is AttentionBackendName[name.upper()]
        assert member in list(AttentionBackendName)
        assert member in _AttentionBackendRegistry.list_backends()
    assert len({*AttentionBackendName}) == len(list(AttentionBackendName))


@pytest.mark.parametrize("name", ["wan", "hunyuan", "hunyuan 1.5", "ltx", "flux", "wan vace"])
def test_models_run_by_name(name: str) -> None:
    model, inputs = make(name)
    expected = call(model, inputs)
    model.set_attention_backend("fastvideo_torch_sdpa")
    assert torch.allclose(call(model, inputs), expected, atol=1e-5)
    model.set_attention_backend("fastvideo_flash_attn")
    with pytest.raises(BackendUnavailable, match="FLASH_ATTN"):
        call(model, inputs)
    model.reset_attention_backend()


def test_a_model_whose_processors_take_no_name_follows_the_active_one() -> None:
    model, inputs = make("cosmos")
    expected = call(model, inputs)
    with attention_backend("fastvideo_torch_sdpa"):
        assert torch.allclose(call(model, inputs), expected, atol=1e-5)
    with attention_backend("fastvideo_flash_attn"), pytest.raises(BackendUnavailable, match="FLASH_ATTN"):
        call(model, inputs)


def test_arguments_keep_their_meaning() -> None:
    q, k = torch.randn(2, 5, 4, 8), torch.randn(2, 7, 4, 8)
    padding = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    for extra in ({"attn_mask": padding}, {"scale": 0.1}, {"attn_mask": torch.randn(2, 4, 5, 7)}):
        expected = dispatch_attention_fn(q, k, k, **extra)
        with attention_backend("fastvideo"):
            assert torch.allclose(dispatch_attention_fn(q, k, k, **extra), expected, atol=1e-6)
        assert torch.allclose(
            dispatch_attention_fn(q, k, k, **extra, backend=AttentionBackendName("fastvideo")), expected, atol=1e-6
        )
    with pytest.raises(NotImplementedError, match="parallel=mesh"):
        dispatch_attention_fn(q, q, q, backend="fastvideo", parallel_config=object())


@pytest.mark.parametrize("name", NAMED)
def test_whole_models_run_under_an_override_of_torchs_function(name: str, monkeypatch) -> None:
    """Also those that don't use the dispatcher (CogVideoX, Mochi), forward and backward."""
    model, inputs = make(name)
    expected = call_with_gradients(model, inputs)
    runs, forward = [], TorchSDPAImpl.forward

    @functools.wraps(forward)  # its keywords say what it accepts
    def spy(self, *args, **kwargs):
        runs.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(TorchSDPAImpl, "forward", spy)
    with override_sdpa():
        found = call_with_gradients(model, inputs)
    assert len(runs) >= sum(hasattr(module, "processor") for module in model.modules())
    for key, tensor in found.items():
        assert torch.allclose(tensor, expected[key], atol=1e-5 * float(expected[key].abs().max()), rtol=1e-4), key
