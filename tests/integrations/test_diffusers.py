"""Every family's model gives the same numbers on this system; it is compiled, trained, copied, saved, and restored."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from fastvideo.attention import register_attn_backend
from fastvideo.attention.backends.torch_sdpa import TorchSDPABackend, TorchSDPAImpl
from fastvideo.attention.backends.video_sparse_attn import (
    VideoSparseAttentionBackend,
    VideoSparseAttentionImpl,
)
from fastvideo.integrations.diffusers import AttentionPolicy, Rule, apply, plan_of, remove
from fastvideo.testing import assert_within_budget

from .tiny_models import CASES, NAMES, ONE_OF_EACH, call, call_with_gradients, convert, make

diffusers.utils.logging.set_verbosity_error()


def sparse(sparsity: float, **extra: Any) -> AttentionPolicy:
    return AttentionPolicy(rules=[Rule(role="self", backend="VIDEO_SPARSE_ATTN", sparsity=sparsity, **extra)])


def in_float64(model: nn.Module) -> nn.Module:
    wide = copy.deepcopy(model).double()
    if getattr(wide, "learnable_pos_embed", None) is not None:
        wide.learnable_pos_embed.float()  # diffusers computes its norm in float32 and takes nothing wider
    return wide


def assert_same_numbers(
    found: dict[str, torch.Tensor], original: dict[str, torch.Tensor], reference: dict[str, torch.Tensor], name: str
) -> None:
    assert found.keys() == original.keys() == reference.keys()
    for key, tensor in found.items():
        assert_within_budget(tensor, reference[key], original[key], name=f"{name}: {key}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_dense_attention_and_vsa_that_keeps_all_change_nothing(name: str, dtype: torch.dtype) -> None:
    model, inputs = make(name, dtype)
    original = call_with_gradients(model, inputs)
    exact = call_with_gradients(in_float64(model), convert(inputs, torch.float64))
    apply(model)
    assert_same_numbers(call_with_gradients(model, inputs), original, exact, "dense")
    apply(model, sparse(0.0))
    assert_same_numbers(call_with_gradients(model, inputs), original, exact, "VSA at sparsity 0")
    apply(model, sparse(0.7))
    assert not torch.allclose(call(model, inputs), original["output"], atol=1e-3)
    remove(model)
    assert torch.equal(call(model, inputs), original["output"])


ran: list[str] = []


class RecordingDenseImpl(TorchSDPAImpl):
    def forward(self, query, key, value, attn_metadata, *, attn_mask=None):
        ran.append(self.prefix.removesuffix(".impl"))
        return super().forward(query, key, value, attn_metadata, attn_mask=attn_mask)


class RecordingDense(TorchSDPABackend):
    layer_independent = False  # its implementations name their layer
    get_name = staticmethod(lambda: "RECORDING_DENSE")
    get_impl_cls = staticmethod(lambda: RecordingDenseImpl)


@pytest.mark.parametrize("name", NAMES)
def test_rules_reach_the_places_that_they_name_and_no_others(name: str) -> None:
    register_attn_backend("RECORDING_DENSE", RecordingDense)
    model, inputs = make(name)
    original = call(model, inputs)
    case = CASES[name]
    roles = ["self"] + ["cross"] * case.has_cross + ["text"] * case.has_text
    rules = [Rule(role=role, backend="recording_dense") for role in roles]
    rules += [Rule(layers=1, backend="recording_dense"), Rule(role="self", layers=[0], backend="recording_dense")]
    for rule in rules:
        apply(model, AttentionPolicy(rules=[rule]))
        ran.clear()
        assert torch.allclose(call(model, inputs), original, atol=1e-5)
        wanted = [place.path for place in plan_of(model).places if rule.addresses(place.role, place.layer)]
        assert list(dict.fromkeys(ran)) == wanted  # attention to text and image of one place counts once
        assert 0 < len(wanted) < len(plan_of(model).places) or len(roles) == 1
    for role in {"cross", "text"}.difference(roles):
        with pytest.raises(ValueError, match=f"names role '{role}'"):
            apply(model, AttentionPolicy(rules=[Rule(role=role, backend="auto")]))


seen: list[tuple[Any, ...]] = []


class RecordingImpl(VideoSparseAttentionImpl):
    def forward(self, query, key, value, attn_metadata, *, gate_compress=None, num_replicated=0):
        seen.append((attn_metadata.grid_tyx, attn_metadata.current_timestep, num_replicated, query.shape[0]))
        return super().forward(query, key, value, attn_metadata, gate_compress=gate_compress, num_replicated=num_replicated)


class RecordingVSA(VideoSparseAttentionBackend):
    get_name = staticmethod(lambda: "RECORDING_VSA")
    get_impl_cls = staticmethod(lambda: RecordingImpl)


@pytest.mark.parametrize("name", NAMES)
def test_the_backend_learns_the_videos_grid_and_which_tokens_are_text(name: str) -> None:
    register_attn_backend("RECORDING_VSA", RecordingVSA)
    model, inputs = make(name)
    apply(model, AttentionPolicy(rules=[Rule(role="self", backend="RECORDING_VSA", sparsity=0.5)]))
    seen.clear()
    call(model, inputs)
    case = CASES[name]
    num_layers = 1 + max(place.layer for place in plan_of(model).places if place.layer is not None)
    if not case.text_joined:
        expected = [(case.grid_tyx, 0, 0, 2)] * num_layers
    elif "encoder_attention_mask" not in inputs:
        expected = [(case.grid_tyx, 0, 7, 2)] * num_layers
    else:  # samples with 5 and 3 real text tokens run one by one
        expected = [(case.grid_tyx, 0, 5, 1), (case.grid_tyx, 0, 3, 1)] * num_layers
    assert seen == expected


# HunyuanVideo divides by the number of real text tokens, so it takes no sample without any.
@pytest.mark.parametrize(("name", "lengths"), [("hunyuan", (4, 4)), ("hunyuan", (1, 7)), ("mochi", (4, 4)), ("mochi", (0, 7))])
def test_padded_text_is_seen_by_nobody(name: str, lengths: tuple[int, int]) -> None:
    model, inputs = make(name)
    dtype = inputs["encoder_attention_mask"].dtype
    mask = torch.tensor([[i < length for i in range(7)] for length in lengths]).to(dtype)
    inputs = {**inputs, "encoder_attention_mask": mask}
    original = call(model, inputs)
    exact = call(in_float64(model), convert(inputs, torch.float64))
    for policy in (AttentionPolicy(), sparse(0.0)):
        apply(model, policy)
        assert_within_budget(call(model, inputs), exact, original)
    other = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"] + 9 * (mask == 0)[:, :, None]}
    if name == "hunyuan":  # Mochi pools text before its blocks, padding and all
        apply(model, sparse(0.5))
        assert torch.allclose(call(model, inputs), call(model, other), atol=1e-6)
    early = torch.tensor([[False, True, True, True, True, True, True]] * 2).to(dtype)
    apply(model, sparse(0.5))
    with pytest.raises(NotImplementedError, match="padded text at the end"):
        call(model, {**inputs, "encoder_attention_mask": early})


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_compiled_whole(name: str) -> None:
    model, inputs = make(name)
    apply(model, sparse(0.5))
    with torch.no_grad():
        eager = call(model, inputs)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.allclose(call(compiled, inputs), eager, atol=1e-6)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_saved_and_loaded_again(name: str, tmp_path, monkeypatch) -> None:
    model, inputs = make(name)
    monkeypatch.setattr(type(model), "_keep_in_fp32_modules", None)  # diffusers needs accelerate to load them
    with torch.no_grad():
        original, keys = call(model, inputs), list(model.state_dict())
        apply(model, sparse(0.5))
        changed = call(model, inputs)
        assert list(model.state_dict()) == keys
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        assert plan_of(loaded) is None
        assert torch.equal(call(loaded, inputs), original)
        apply(loaded, sparse(0.5))
        assert torch.equal(call(loaded, inputs), changed)
        remove(loaded)
        loaded.save_pretrained(tmp_path)
        assert torch.equal(call(type(model).from_pretrained(tmp_path), inputs), original)


@pytest.mark.parametrize("name", ["wan", "hunyuan"])
def test_copies_stand_alone(name: str) -> None:
    model, inputs = make(name)
    with torch.no_grad():
        original = call(model, inputs)
        apply(model, sparse(0.5))
        changed = call(model, inputs)
        other = copy.deepcopy(model)
        remove(model)
        assert torch.equal(call(other, inputs), changed)
        assert torch.equal(call(model, inputs), original)
        apply(model, sparse(0.5))
        remove(other)
        assert torch.equal(call(other, inputs), original)
        assert torch.equal(call(model, inputs), changed)
        assert "processor" not in other.state_dict()


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_remove_leaves_nothing(name: str) -> None:
    model, _ = make(name)
    before = {path: module.processor for path, module in model.named_modules() if hasattr(module, "processor")}
    apply(model, sparse(0.5))
    apply(model)  # replaces the first
    changed = {path: module.processor for path, module in model.named_modules() if hasattr(module, "processor")}
    assert before.keys() == changed.keys() == {place.path for place in plan_of(model).places}
    assert all(changed[path] is not processor for path, processor in before.items())
    remove(model)
    remove(model)
    for path, module in model.named_modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
        assert path not in before or module.processor is before[path]
    assert plan_of(model) is None
    assert not [name for name in vars(model) if "fastvideo" in name]
