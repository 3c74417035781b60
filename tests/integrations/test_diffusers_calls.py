"""Told steps, recomputation, compilation, several models and threads: each call runs by its own plan, and leaves nothing."""

from __future__ import annotations

import copy
import shutil
import threading

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounter

from fastvideo.attention import register_attn_backend, use_attn_backend
from fastvideo.attention.backends.video_sparse_attn import (
    VideoSparseAttentionBackend,
    VideoSparseAttentionMetadataBuilder,
)
from fastvideo.block_sparse import selection
from fastvideo.forward_context import get_forward_context, set_forward_context
from fastvideo.integrations.diffusers import (
    AttentionPolicy,
    Family,
    Place,
    Processor,
    Rule,
    Site,
    apply,
    denoising_step,
    known_models,
    plan_of,
    register_family,
    remove,
)
from fastvideo.integrations.diffusers.state import current_state

from .tiny_models import CASES, call, make

diffusers.utils.logging.set_verbosity_error()

SPARSE_LATER = AttentionPolicy(rules=[Rule(role="self", steps=slice(2, None), backend="VIDEO_SPARSE_ATTN", sparsity=0.5)])
SPARSE = AttentionPolicy(rules=[Rule(role="self", backend="VIDEO_SPARSE_ATTN", sparsity=0.5)])


def test_a_bare_model_is_told_its_step(phases: list[int]) -> None:
    model, inputs = make("wan")
    dense = call(model, inputs)
    apply(model, SPARSE)
    sparse = call(model, inputs)
    apply(model, SPARSE_LATER)
    with pytest.raises(ValueError, match=r"nobody says which step .*denoising_step"):
        call(model, inputs)
    with denoising_step(1):
        assert torch.equal(call(model, inputs), dense)
        with denoising_step(2):
            assert torch.equal(call(model, inputs), sparse)
        assert torch.equal(call(model, inputs), dense)
    with pytest.raises(ValueError, match="nobody says"):
        call(model, inputs)
    with pytest.raises(ValueError, match="step >= 0"), denoising_step(-1):
        pass
    with pytest.raises(TypeError, match="step"), denoising_step(1.0):
        pass


def test_a_grid_can_be_told() -> None:
    model, inputs = make("ltx")
    apply(model, SPARSE)
    expected = call(model, inputs)
    coordinates = torch.rand(2, 3, 120)
    packed = {**inputs, "num_frames": None, "height": None, "width": None, "video_coords": coordinates}
    with pytest.raises(ValueError, match="grid_tyx="):
        call(model, packed)
    with denoising_step(0, grid_tyx=(5, 4, 6)):
        told = call(model, packed)
        assert torch.equal(call(model, inputs), expected)
    assert torch.equal(told, call(model, {**inputs, "video_coords": coordinates}))
    with denoising_step(0, grid_tyx=(5, 4, 5)), pytest.raises(ValueError, match="120"):
        call(model, packed)


@pytest.mark.parametrize("name", ["wan", "hunyuan"])
def test_recomputation_runs_by_the_plan_of_its_own_forward_call(name: str, monkeypatch) -> None:
    model, inputs = make(name)
    choices, choose = [0], selection.top_k_ascending

    def counting(scores, k):
        choices[0] += 1
        return choose(scores, k)

    monkeypatch.setattr(selection, "top_k_ascending", counting)
    apply(model, SPARSE_LATER)

    def two_steps() -> dict[str, torch.Tensor]:
        model.zero_grad()
        with denoising_step(0):
            dense = call(model, inputs)
        with denoising_step(2):
            sparse = call(model, inputs)
        (dense.square().mean() + sparse.square().sum()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = two_steps()
    num_choices, choices[0] = choices[0], 0
    assert num_choices > 0
    model.train()
    model.enable_gradient_checkpointing()
    function = model._gradient_checkpointing_func
    found = two_steps()
    assert found.keys() == expected.keys()
    for key, grad in found.items():
        assert torch.allclose(grad, expected[key], atol=1e-5, rtol=1e-4), key
    assert choices[0] == num_choices  # the forward pass's tiles are kept
    remove(model)
    assert model._gradient_checkpointing_func is function


def test_models_side_by_side_keep_their_own_plans() -> None:
    first, inputs = make("wan")
    second, other = make("hunyuan")
    alone = call(first, inputs), call(second, other)
    apply(first, SPARSE)
    changed = call(first, inputs)
    assert torch.equal(call(second, other), alone[1])
    apply(second, AttentionPolicy("TORCH_SDPA"))
    assert torch.equal(call(first, inputs), changed)
    assert not torch.allclose(changed, alone[0], atol=1e-3)
    # One inside the other: the inner call doesn't disturb the outer.
    handle = first.blocks[0].register_forward_pre_hook(lambda module, args: (call(second, other), None)[1])
    assert torch.equal(call(first, inputs), changed)
    handle.remove()


def test_a_failed_call_leaves_nothing() -> None:
    model, inputs = make("wan")
    apply(model, SPARSE)
    expected = call(model, inputs)
    for bad in (
        {**inputs, "encoder_hidden_states": torch.randn(2, 7, 3)},
        {**inputs, "hidden_states": torch.randn(2, 4, 5, 9, 12)},
    ):
        with pytest.raises((RuntimeError, ValueError)):
            call(model, bad)
        assert current_state() is None
    with set_forward_context(5, None, forward_batch="mine"):
        assert torch.equal(call(model, inputs), expected)
        assert get_forward_context().forward_batch == "mine"


def test_threads_run_by_their_own_steps() -> None:
    model, inputs = make("wan")
    apply(model, SPARSE_LATER)
    with torch.no_grad():
        expected = []
        for step in (0, 2):
            with denoising_step(step):
                expected.append(call(model, inputs))
    wrong: list[str] = []
    start = threading.Barrier(2)

    def work(step: int, result: torch.Tensor) -> None:
        start.wait()
        with torch.no_grad(), denoising_step(step):
            for _ in range(8):
                if not torch.equal(call(model, inputs), result):
                    wrong.append(f"step {step}")

    threads = [threading.Thread(target=work, args=pair) for pair in zip((0, 2), expected, strict=True)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert wrong == []


def test_auto_follows_a_scope_and_cross_attention_does_not_follow_a_sparse_one() -> None:
    model, inputs = make("wan")
    original = call(model, inputs)
    apply(model)
    with use_attn_backend("TORCH_SDPA"):
        assert torch.equal(call(model, inputs), original)
    with use_attn_backend("VIDEO_SPARSE_ATTN"), pytest.raises(ValueError, match="VideoSparseAttentionMetadata"):
        call(model, inputs)
    assert {layer.decision.chosen for layer in model.blocks[0].attn2.processor.attend.layers} == {"TORCH_SDPA"}


def test_compiled_blocks_follow_phases_and_not_steps() -> None:
    model, inputs = make("wan")
    apply(model, SPARSE_LATER)

    def both_phases() -> list[torch.Tensor]:
        outputs = []
        for step in (0, 1, 2, 3, 7):
            with denoising_step(step):
                outputs.append(call(model, inputs))
        return outputs

    with torch.no_grad():
        expected = both_phases()
        torch._dynamo.reset()
        counter = CompileCounter()
        model.compile_repeated_blocks(backend=counter, fullgraph=True)
        for found, wanted in zip(both_phases(), expected, strict=True):
            assert torch.allclose(found, wanted, atol=1e-6)
    # Two blocks of one class share their graphs: one per phase.
    assert counter.frame_count == 2


@pytest.mark.parametrize(("policy", "num_graphs"), [(SPARSE, 1), (SPARSE_LATER, 3)])
def test_a_call_inside_a_compiled_function_follows_the_step(policy: AttentionPolicy, num_graphs: int) -> None:
    model, inputs = make("wan")
    apply(model, policy)
    counter = CompileCounter()
    torch._dynamo.reset()
    function = torch.compile(lambda inputs: call(model, inputs), backend=counter, fullgraph=True)
    with torch.no_grad():
        for step in (0, 1, 2, 0):
            with denoising_step(step):
                assert torch.allclose(function(inputs), call(model, inputs), atol=1e-6), step
    assert counter.frame_count == num_graphs


def test_a_model_that_is_compiled_already_takes_it_on_and_off() -> None:
    model, inputs = make("wan")
    apply(model, SPARSE)
    with torch.no_grad():
        sparse = call(model, inputs)
        remove(model)
        original = call(model, inputs)
        model.compile_repeated_blocks(backend="eager", fullgraph=True)
        assert torch.allclose(call(model, inputs), original, atol=1e-6)
        apply(model, SPARSE)
        assert torch.allclose(call(model, inputs), sparse, atol=1e-6)
        remove(model)
        assert torch.allclose(call(model, inputs), original, atol=1e-6)


class TableBuilder(VideoSparseAttentionMetadataBuilder):
    def build(self, *, table, **kwargs):
        return super().build(VSA_sparsity=float(table[len(table) // 2]), **kwargs)


class TableBackend(VideoSparseAttentionBackend):
    get_name = staticmethod(lambda: "TABLE_BACKEND")
    get_builder_cls = staticmethod(lambda: TableBuilder)


def test_options_that_look_alike_are_told_apart() -> None:
    """The text of a large tensor leaves its middle out; models that differ there alone don't get each other's metadata."""
    register_attn_backend("TABLE_BACKEND", TableBackend)
    model, inputs = make("wan")
    outputs = []
    for sparsity in (0.0, 0.7):
        table = torch.zeros(5001)
        table[2500] = sparsity
        rule = Rule(role="self", backend="TABLE_BACKEND", options={"table": table})
        apply(model, AttentionPolicy(rules=[rule]))
        outputs.append(call(model, inputs))
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)
    apply(model, AttentionPolicy(rules=[Rule(role="self", backend="VIDEO_SPARSE_ATTN", sparsity=0.7)]))
    assert torch.equal(call(model, inputs), outputs[1])


def test_gates_that_diffusers_dropped_are_an_error(tmp_path, monkeypatch) -> None:
    model, inputs = make("wan")
    monkeypatch.setattr(type(model), "_keep_in_fp32_modules", None)  # diffusers needs accelerate to load them
    model.save_pretrained(tmp_path / "transformer")
    apply(type(model).from_pretrained(tmp_path, subfolder="transformer"))
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    gates = {f"blocks.{block}.to_gate_compress.weight": torch.zeros(24, 24) for block in range(2)}
    save_file({**load_file(file), **gates}, file, metadata={"format": "pt"})
    for loaded in (
        type(model).from_pretrained(tmp_path / "transformer"),
        type(model).from_pretrained(tmp_path, subfolder="transformer"),
    ):
        with pytest.raises(ValueError, match=r"transformer holds gates .*blocks.0.to_gate_compress.weight .*WanInPipeline"):
            apply(loaded)
        assert plan_of(loaded) is None
    # From the Hub, diffusers notes the repository's name alone.
    repository = tmp_path / "models--a--wan"
    shutil.copytree(tmp_path / "transformer", repository / "snapshots" / "0" / "transformer")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    loaded.register_to_config(_name_or_path="a/wan")
    with pytest.raises(ValueError, match=r"snapshots/0/transformer holds gates"):
        apply(loaded)
    for elsewhere in ("a/other", "/a/folder/that/is/gone"):
        loaded.register_to_config(_name_or_path=elsewhere)
        apply(loaded)
    apply(model)
    assert torch.isfinite(call(model, inputs)).all()


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got Linear; known are WanTransformer3DModel.*register_family"):
        apply(nn.Linear(1, 1))
    with pytest.raises(TypeError, match="pipeline or model"):
        apply("model")
    with pytest.raises(TypeError, match="DeviceMesh"):
        apply(make("wan")[0], parallel=2)

    class NotOurs:
        def __call__(self, attn, hidden_states, *args):
            return hidden_states

    model, _ = make("wan")
    model.blocks[1].attn2.processor = NotOurs()
    with pytest.raises(ValueError, match=r"blocks.1.attn2 .* has a processor NotOurs"):
        apply(model)
    model, _ = make("wan")
    model.blocks[0].extra = copy.deepcopy(model.blocks[0].attn1)
    with pytest.raises(ValueError, match=r"doesn't know: blocks.0.extra"):
        apply(model)
    model, _ = make("wan")
    apply(model)
    with pytest.raises(ValueError, match="parallel=mesh"):
        model.blocks[0].attn1.processor._parallel_config = object()
    with pytest.raises(ValueError, match="name a backend there"):
        model.set_attention_backend("native")
    model.reset_attention_backend()
    model.blocks[0].attn1.processor = diffusers.models.transformers.transformer_wan.WanAttnProcessor()
    with pytest.raises(RuntimeError, match=r"blocks.0.attn1 .* another processor, WanAttnProcessor, after apply"):
        call(model, CASES["wan"].inputs())
    apply(model)
    model.blocks[0].attn1.processor = foreign = NotOurs()
    with pytest.raises(ValueError, match="has a processor NotOurs"):
        apply(model)
    remove(model)
    assert model.blocks[0].attn1.processor is foreign
    model.blocks[0].attn1.processor = model.blocks[1].attn1.processor
    apply(model)
    # A refused policy changes nothing.
    with pytest.raises(ValueError, match="layers"):
        apply(model, AttentionPolicy(rules=[Rule(layers=9, backend="TORCH_SDPA")]))
    assert plan_of(model).policy == AttentionPolicy()


@pytest.mark.parametrize(
    "name",
    [
        "LTX2VideoTransformer3DModel", "Cosmos3OmniTransformer", "WanAnimate2Transformer3DModel", "AllegroTransformer3DModel",
        "EasyAnimateTransformer3DModel", "Kandinsky5Transformer3DModel", "SanaVideoTransformer3DModel",
        "HeliosTransformer3DModel", "AnyFlowTransformer3DModel",
    ],
)  # fmt: skip
def test_classes_that_the_cookbook_calls_unknown_are(name: str) -> None:
    classes = {cls.__name__ for cls in getattr(diffusers, name).__mro__}
    assert classes.isdisjoint(known_models())


def test_a_pipeline_with_an_unknown_transformer_is_refused() -> None:
    class Pipeline:
        def __init__(self, **components: nn.Module) -> None:
            self.components = components

    with pytest.raises(ValueError, match="got Linear"):
        apply(Pipeline(transformer=nn.Linear(1, 1), vae=nn.Linear(1, 1)))
    with pytest.raises(ValueError, match="Pipeline has no model of a known class"):
        apply(Pipeline(vae=nn.Linear(1, 1)))


class PlainAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.inner_dim = 2, 16
        self.to_qkv = nn.Linear(16, 48)
        self.processor = self.attend

    @staticmethod
    def attend(attn, x):
        q, k, v = (part.unflatten(2, (2, 8)).transpose(1, 2) for part in attn.to_qkv(x).chunk(3, -1))
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, x):
        return x + self.processor(self, x)


class PlainModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PlainAttention() for _ in range(2))

    def forward(self, video):
        grid = video.shape[2:]
        x = video.flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return x.transpose(1, 2).unflatten(2, grid)


class PlainProcessor(Processor):
    def __call__(self, attn, x):
        query, key, value = (part.unflatten(2, (2, 8)) for part in attn.to_qkv(x).chunk(3, -1))
        return self.attend(query, key, value)[0].flatten(2)


class PlainFamily(Family):
    name, model_classes = "Plain", ("PlainModel",)

    def sites(self, model):
        return [Site(Place(f"layers.{i}", "self", i), PlainProcessor, ("function",)) for i in range(len(model.layers))]

    def video_shape(self, model, inputs):
        return tuple(inputs["video"].shape[2:]), (1, 1, 1)


def test_a_new_family_can_be_added() -> None:
    model, video = PlainModel(), torch.randn(1, 16, 5, 4, 6)
    expected = model(video)
    with pytest.raises(ValueError, match="got PlainModel"):
        apply(model)
    register_family(PlainFamily())
    register_family(PlainFamily())
    assert "PlainModel" in known_models()
    for policy in ("auto", AttentionPolicy(rules=[Rule(backend="VIDEO_SPARSE_ATTN", sparsity=0.0)])):
        apply(model, policy)
        assert torch.allclose(model(video), expected, atol=1e-6)
    apply(model, AttentionPolicy(rules=[Rule(backend="VIDEO_SPARSE_ATTN", sparsity=0.8)]))
    assert not torch.allclose(model(video), expected, atol=1e-4)
    remove(model)
    assert torch.equal(model(video), expected)
    with pytest.raises(TypeError, match="subclass of Family"):
        register_family(PlainFamily)

    class Other(PlainFamily):
        model_classes = ("WanTransformer3DModel",)

    with pytest.raises(ValueError, match="belongs to the family 'Wan' already"):
        register_family(Other())
    Other.model_classes = "PlainModel"
    with pytest.raises(TypeError, match="model_classes, a tuple of names, got 'PlainModel'"):
        register_family(Other())


def test_fused_projections_and_dropped_streams_keep_working() -> None:
    for name in ("wan", "wan i2v", "cogvideox", "flux", "ltx"):
        model, inputs = make(name)
        original = call(model, inputs)
        model.fuse_qkv_projections()
        apply(model)
        assert torch.allclose(call(model, inputs), original, atol=1e-5), name
        remove(model)
        model.unfuse_qkv_projections()
        assert torch.allclose(call(model, inputs), original, atol=1e-5), name


def test_autocast_runs_as_the_models_own_attention_does() -> None:
    for name in ("wan", "hunyuan", "flux"):
        model, inputs = make(name)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            original = call(model, inputs)
            apply(model)
            assert torch.allclose(call(model, inputs), original, atol=0.05), name


def test_masks_reach_joint_attention_in_its_order_of_tokens() -> None:
    model, inputs = make("cogvideox")
    mask = torch.rand(2, 1, 127) < 0.7
    mask[..., 0] = True
    bias = torch.zeros(2, 1, 127).masked_fill(~mask, float("-inf"))
    inputs = {**inputs, "attention_kwargs": {"attention_mask": bias}}
    original = call(model, inputs)
    apply(model)
    assert torch.allclose(call(model, inputs), original, atol=1e-5)
    model, inputs = make("flux")
    full = torch.rand(2, 1, 67, 67) < 0.7
    full[..., 0] = True
    inputs = {**inputs, "joint_attention_kwargs": {"attention_mask": full}}
    original = call(model, inputs)
    apply(model)
    assert torch.allclose(call(model, inputs), original, atol=1e-5)
    apply(model, SPARSE)
    with pytest.raises(RuntimeError, match="mask"):
        call(model, inputs)
