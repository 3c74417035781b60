"""Every family's model gives the same numbers on this system; it is compiled, trained, copied, saved, and restored."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import torch

from fastvideo.attention import register_attn_backend
from fastvideo.attention.backends.torch_sdpa import TorchSDPABackend, TorchSDPAImpl
from fastvideo.attention.backends.video_sparse_attn import (
    VideoSparseAttentionBackend,
    VideoSparseAttentionImpl,
)
from fastvideo.integrations.diffusers import AttentionPolicy, Rule, apply, plan_of, remove
from fastvideo.testing import assert_within_budget

from .tiny_models import CASES, NAMES, ONE_OF_EACH, SPARSE, call, call_with_gradients, convert, in_float64, make, skyreels

diffusers.utils.logging.set_verbosity_error()


def sparse(sparsity: float, **extra: Any) -> AttentionPolicy:
    return AttentionPolicy(rules=[Rule(role="self", backend="VIDEO_SPARSE_ATTN", sparsity=sparsity, **extra)])


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
    if name in SPARSE:
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


@pytest.mark.parametrize("name", SPARSE)
def test_the_backend_learns_the_videos_grid_and_which_tokens_are_text(name: str) -> None:
    register_attn_backend("RECORDING_VSA", RecordingVSA)
    model, inputs = make(name)
    apply(model, AttentionPolicy(rules=[Rule(role="self", backend="RECORDING_VSA", sparsity=0.5)]))
    seen.clear()
    call(model, inputs)
    case = CASES[name]
    num_layers = 1 + max(place.layer for place in plan_of(model).places if place.layer is not None)
    if case.text_lengths is None:
        expected = [(case.grid_tyx, 0, case.num_joined, 2)] * num_layers
    else:  # samples with unlike numbers of real text tokens run one by one
        expected = [(case.grid_tyx, 0, length, 1) for length in case.text_lengths] * num_layers
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


class MasklessImpl(TorchSDPAImpl):
    def forward(self, query, key, value, attn_metadata):
        return super().forward(query, key, value, attn_metadata)


class Maskless(TorchSDPABackend):
    get_name = staticmethod(lambda: "MASKLESS")
    get_impl_cls = staticmethod(lambda: MasklessImpl)

    @classmethod
    def rejections(cls, request):
        return (*super().rejections(request), *(["no masks"] if request.mask is not None else []))


@pytest.mark.parametrize("name", ["hunyuan", "hunyuan 1.5", "hunyuan 1.5 i2v", "framepack"])
def test_a_dense_backend_without_masks_gets_real_text_alone(name: str) -> None:
    register_attn_backend("MASKLESS", Maskless)
    model, inputs = make(name)
    samples = [{key: x[i : i + 1] if x.shape[0] == 2 else x for key, x in inputs.items()} for i in range(2)]
    for case in (inputs, *samples):
        if name == "framepack":  # these count frames, not samples
            case |= {key: x for key, x in inputs.items() if key.startswith("indices")}
        remove(model)
        original = call(model, case)
        apply(model, AttentionPolicy(rules=[Rule(role="self", backend="MASKLESS")]))
        assert torch.allclose(call(model, case), original, atol=1e-5)


def test_frames_in_causal_blocks_take_a_dense_backend() -> None:
    torch.manual_seed(0)
    model, inputs = skyreels(num_frame_per_block=2).eval(), CASES["skyreels forcing"].inputs()
    inputs |= {"hidden_states": torch.randn(2, 4, 4, 8, 12), "timestep": torch.randint(0, 1000, (2, 4))}
    original = call_with_gradients(model, inputs)
    apply(model)
    for key, tensor in call_with_gradients(model, inputs).items():
        assert torch.allclose(tensor, original[key], atol=1e-5, rtol=1e-4), key
    later = {**inputs, "hidden_states": inputs["hidden_states"] + torch.tensor([0.0, 0, 0, 1])[:, None, None]}
    found = call(model, later)
    assert torch.allclose(found[:, :, :2], original["output"][:, :, :2], atol=1e-5)  # what comes later is not seen
    assert not torch.allclose(found[:, :, 2], original["output"][:, :, 2], atol=1e-3)
    apply(model, sparse(0.5))
    with pytest.raises(RuntimeError, match="mask"):
        call(model, inputs)


def test_what_a_family_cannot_do_is_refused_when_applied() -> None:
    model, _ = make("framepack")
    with pytest.raises(NotImplementedError, match="VIDEO_SPARSE_ATTN works on a video's grid, and Framepack joins"):
        apply(model, sparse(0.5))
    assert plan_of(model) is None


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
