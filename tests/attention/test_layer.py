"""The three layers on one device."""

from __future__ import annotations

import copy
import functools
import io
import pickle

import pytest
import torch
from torch._dynamo.utils import counters
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastvideo.attention import (
    AttentionImpl,
    DistributedAttention,
    DistributedAttention_VSA,
    LocalAttention,
    attention,
    dispatch,
    functional,
    register_attn_backend,
)
from fastvideo.attention.backends.torch_sdpa import TorchSDPABackend
from fastvideo.attention.backends.video_sparse_attn import VideoSparseAttentionMetadataBuilder
from fastvideo.attention.rope import apply_rope
from fastvideo.forward_context import set_forward_context
from fastvideo.testing import reference_attention

LAYERS = (LocalAttention, DistributedAttention, DistributedAttention_VSA)
GRID = (4, 8, 8)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def metadata(sparsity: float = 0.0):
    return VideoSparseAttentionMetadataBuilder().build(
        current_timestep=0, raw_latent_shape=GRID, patch_size=(1, 1, 1), VSA_sparsity=sparsity, device="cpu"
    )


def call(layer, *tensors, **keywords):
    with set_forward_context(0, metadata()):
        out = layer(*tensors, **keywords)
    return out if isinstance(layer, LocalAttention) else out[0]


@pytest.mark.parametrize("layer_cls", LAYERS)
@pytest.mark.parametrize("scale", [None, 0.3, -0.2, 0.0])
@pytest.mark.parametrize("num_kv_heads", [None, 2, 1])
def test_layers_compute_attention(layer_cls, scale, num_kv_heads) -> None:
    q = draw(2, 256, 4, 16)
    k, v = draw(2, 256, num_kv_heads or 4, 16, seed=1), draw(2, 256, num_kv_heads or 4, 16, seed=2)
    layer = layer_cls(4, 16, num_kv_heads=num_kv_heads, softmax_scale=scale)
    torch.testing.assert_close(call(layer, q, k, v), reference_attention(q, k, v, scale=scale))


@pytest.mark.parametrize("layer_cls", LAYERS[:2])
def test_masks_causal_and_cross_attention(layer_cls) -> None:
    q, k, v = draw(2, 7, 4, 16), draw(2, 11, 4, 16, seed=1), draw(2, 11, 4, 16, seed=2)
    padding = torch.arange(11) < torch.tensor([[11], [4]])
    additive = draw(2, 4, 7, 11, seed=3)
    layer = layer_cls(4, 16)
    for mask in (padding, additive > 0, additive, additive[:1, :1]):
        expected = reference_attention(q, k, v, attn_mask=mask)
        torch.testing.assert_close(call(layer, q, k, v, attn_mask=mask), expected)
    causal = layer_cls(4, 16, causal=True)
    torch.testing.assert_close(call(causal, q, q, q), reference_attention(q, q, q, is_causal=True))


@pytest.mark.parametrize("layer_cls", LAYERS[1:])
def test_replicated_tokens_join_at_the_end(layer_cls) -> None:
    q, k, v = (draw(2, 256, 4, 16, seed=seed) for seed in range(3))
    texts = [draw(2, 5, 4, 16, seed=seed) for seed in range(3, 6)]
    with set_forward_context(0, metadata()):
        out, text_out = layer_cls(4, 16)(q, k, v, *texts)
    joined = [torch.cat(pair, dim=1) for pair in zip((q, k, v), texts, strict=True)]
    torch.testing.assert_close(torch.cat([out, text_out], dim=1), reference_attention(*joined))


def test_a_mask_covers_replicated_tokens_too() -> None:
    q, k, v = (draw(2, 9, 4, 16, seed=seed) for seed in range(3))
    texts = [draw(2, 5, 4, 16, seed=seed) for seed in range(3, 6)]
    padding = torch.arange(14) < torch.tensor([[14], [11]])
    out, text_out = DistributedAttention(4, 16)(q, k, v, *texts, attn_mask=padding)
    joined = [torch.cat(pair, dim=1) for pair in zip((q, k, v), texts, strict=True)]
    expected = reference_attention(*joined, attn_mask=padding)
    torch.testing.assert_close(torch.cat([out, text_out], dim=1), expected)


@pytest.mark.parametrize("layer_cls", LAYERS)
def test_rotary_embedding(layer_cls) -> None:
    q, k, v = (draw(1, 256, 2, 16, seed=seed) for seed in range(3))
    angles = draw(256, 8, seed=9)
    freqs = (angles.cos(), angles.sin())
    rotated = torch.view_as_complex(q.unflatten(-1, (8, 2))) * torch.polar(torch.ones_like(angles), angles)[None, :, None]
    torch.testing.assert_close(apply_rope(q, freqs), torch.view_as_real(rotated).flatten(-2))
    expected = reference_attention(apply_rope(q, freqs), apply_rope(k, freqs), v)
    torch.testing.assert_close(call(layer_cls(2, 16), q, k, v, freqs_cis=freqs), expected)


def test_gate_adds_the_coarse_part() -> None:
    q, k, v, gate = (draw(1, 256, 2, 16, seed=seed) for seed in range(4))
    layer = DistributedAttention_VSA(2, 16)
    plain = call(layer, q, k, v)
    torch.testing.assert_close(call(layer, q, k, v, gate_compress=torch.zeros_like(gate)), plain)
    once = call(layer, q, k, v, gate_compress=gate) - plain
    twice = call(layer, q, k, v, gate_compress=2 * gate) - plain
    assert once.abs().max() > 1e-3
    torch.testing.assert_close(twice, 2 * once)


@pytest.mark.parametrize("layer_cls", LAYERS)
def test_layers_add_nothing_to_the_state_dict_and_survive_copies(layer_cls) -> None:
    q = draw(1, 256, 2, 16)
    layer = layer_cls(2, 16, prefix="blocks.3.attn1")
    expected = call(layer, q, q, q)
    assert layer.state_dict() == {}
    assert list(layer.parameters()) == []
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    copies = [
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(saved, weights_only=False),
        AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.9)).module,
    ]
    for twin in copies:
        assert twin._dispatcher.last is None
        assert twin.prefix == "blocks.3.attn1"
        torch.testing.assert_close(call(twin, q, q, q), expected, rtol=0, atol=0)
        assert twin._dispatcher is not layer._dispatcher
        assert twin.decision == layer.decision


@pytest.mark.parametrize("layer_cls", LAYERS)
def test_gradients_reach_every_input(layer_cls) -> None:
    tensors = [draw(1, 256, 2, 16, seed=seed).requires_grad_() for seed in range(3)]
    twins = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    weight = draw(1, 256, 2, 16, seed=8)
    (call(layer_cls(2, 16), *tensors) * weight).sum().backward()
    (reference_attention(*twins) * weight).sum().backward()
    for tensor, twin in zip(tensors, twins, strict=True):
        torch.testing.assert_close(tensor.grad, twin.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_behaves_as_sdpa_does(dtype) -> None:
    q = draw(1, 256, 2, 16).float()
    for layer_cls in LAYERS:
        with torch.autocast("cpu", dtype=dtype):
            out = call(layer_cls(2, 16), q, q, q)
            sdpa = torch.nn.functional.scaled_dot_product_attention(*[q.transpose(1, 2)] * 3)
        assert out.dtype == sdpa.dtype == dtype
        torch.testing.assert_close(out, sdpa.transpose(1, 2), rtol=2e-2, atol=2e-2)
        wide = q.double()
        with torch.autocast("cpu", dtype=dtype):
            assert call(layer_cls(2, 16), wide, wide, wide).dtype == torch.float64


def test_non_contiguous_inputs() -> None:
    q, k, v = (draw(2, 4, 256, 16, seed=seed).transpose(1, 2) for seed in range(3))
    for layer_cls in LAYERS:
        torch.testing.assert_close(call(layer_cls(4, 16), q, k, v), reference_attention(q, k, v))


class Block(torch.nn.Module):
    """Self attention of one kind with rotary embedding and text, then cross attention."""

    def __init__(self, layer_cls) -> None:
        super().__init__()
        self.project = torch.nn.Linear(16, 16)
        self.attention = layer_cls(2, 16)
        self.cross = LocalAttention(2, 16)

    def forward(self, x, text, freqs, padding):
        x = self.project(x)
        if isinstance(self.attention, LocalAttention):
            x = self.attention(x, x, x, freqs_cis=freqs)
        else:
            gate = {"gate_compress": x} if isinstance(self.attention, DistributedAttention_VSA) else {}
            x, text = self.attention(x, x, x, text, text, text, freqs_cis=freqs, **gate)
        return self.cross(x, text, text, attn_mask=padding)


@pytest.mark.parametrize(("layer_cls", "compiler"), zip(LAYERS, ("aot_eager", "aot_eager", "inductor"), strict=True))
def test_fullgraph_compile_forward_and_backward(layer_cls, compiler) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = Block(layer_cls)
    x, text = torch.randn(1, 256, 2, 16), torch.randn(1, 6, 2, 16)
    angles, padding = torch.randn(256, 8), torch.tensor([[True] * 4 + [False] * 2])
    results = []
    for run in (block, torch.compile(block, fullgraph=True, backend=compiler)):
        block.zero_grad()
        leaf = x.clone().requires_grad_()
        with set_forward_context(0, metadata(0.5)):
            out = run(leaf, text, (angles.cos(), angles.sin()), padding)
            out.square().sum().backward()
        results.append((out.detach(), leaf.grad, block.project.weight.grad.clone()))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)


class OwnImpl(AttentionImpl):
    """Keeps something of its layer: its name."""

    def forward(self, query, key, value, attn_metadata):
        return value * self.softmax_scale + len(self.prefix)


class OwnBackend(TorchSDPABackend):
    layer_independent = False

    @staticmethod
    def get_name():
        return "OWN"

    @staticmethod
    def get_impl_cls():
        return OwnImpl


class Stack(torch.nn.Module):
    """Equal blocks, each compiled for itself, as large models are."""

    def __init__(self, layer_cls, count: int, **arguments) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(layer_cls(2, 16, prefix="x" * i, **arguments) for i in range(count))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x, x, x) if isinstance(layer, LocalAttention) else layer(x, x, x)[0]
        return x


@pytest.mark.parametrize("layer_cls", LAYERS)
def test_equal_blocks_share_one_compiled_graph(layer_cls) -> None:
    torch._dynamo.reset()
    counters.clear()
    model, x = Stack(layer_cls, 12), draw(1, 256, 2, 16)
    with set_forward_context(0, metadata(0.5)):
        expected = model(x)
        for layer in model.layers:
            layer.compile(fullgraph=True, backend="eager")
        torch.testing.assert_close(model(x), expected)
    assert counters["stats"]["unique_graphs"] == 1


def test_compiled_layers_follow_changing_lengths_and_scales() -> None:
    torch._dynamo.reset()
    layer = LocalAttention(2, 16)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    both = torch.compile(lambda q, k, s: attention(q, k, k, scale=s), fullgraph=True, backend="eager")
    for length in (8, 13, 21, 5):
        q, k = draw(2, length, 2, 16), draw(2, 2 * length, 2, 16, seed=1)
        torch.testing.assert_close(compiled(q, k, k), layer(q, k, k))
        torch.testing.assert_close(both(q, k, length / 7), attention(q, k, k, scale=length / 7))


def test_layers_of_unlike_configuration_are_told_apart_when_compiled() -> None:
    torch._dynamo.reset()
    register_attn_backend("OWN", OwnBackend)
    x = draw(1, 8, 2, 16)
    layers = [
        LocalAttention(2, 16),
        LocalAttention(2, 16, softmax_scale=0.1),
        LocalAttention(2, 16, causal=True),
        *(LocalAttention(2, 16, backend="OWN", prefix="x" * length) for length in (1, 5)),
    ]
    for layer in layers:
        expected = layer(x, x, x)
        twin = copy.deepcopy(layer)
        twin.compile(fullgraph=True, backend="eager")
        torch.testing.assert_close(twin(x, x, x), expected)
    assert layers[-1]._dispatcher.own.keys() == layers[-2]._dispatcher.own.keys() != set()


@pytest.mark.parametrize("backend", ["TORCH_SDPA", "OWN"])
def test_a_scale_that_is_set_later_counts(backend: str) -> None:
    torch._dynamo.reset()
    register_attn_backend("OWN", OwnBackend)
    layer, q = LocalAttention(2, 16, softmax_scale=0.25, backend=backend), draw(1, 8, 2, 16)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    results = []
    for scale in (0.25, 2.0, 0.25):
        layer.softmax_scale = scale
        expected = LocalAttention(2, 16, softmax_scale=scale, backend=backend)(q, q, q)
        for function in (layer, compiled):
            torch.testing.assert_close(function(q, q, q), expected)
        results.append(expected)
    assert not torch.allclose(*results[:2])


@pytest.mark.parametrize("backend", ["TORCH_SDPA", "OWN"])
def test_ever_new_scales_fill_no_memory(backend: str, monkeypatch) -> None:
    torch._dynamo.reset()
    register_attn_backend("OWN", OwnBackend)
    monkeypatch.setattr(dispatch, "_MAX_KEPT", 4)
    monkeypatch.setattr(dispatch, "_shared", {})
    monkeypatch.setattr(functional._DISPATCHER, "own", {})
    q = draw(1, 8, 2, 16)
    compiled = torch.compile(functools.partial(attention, scale=0.5, backend=backend), fullgraph=True, backend="eager")
    expected = compiled(q, q, q)
    for number in range(10):
        attention(q, q, q, scale=1.0 + number, backend=backend)
    assert len(dispatch._shared) + len(functional._DISPATCHER.own) == 4
    torch.testing.assert_close(compiled(q, q, q), expected, rtol=0, atol=0)


def test_decision_shows_the_last_choice() -> None:
    layer, q = LocalAttention(2, 16, supported_attention_backends=("TORCH_SDPA", "FLASH_ATTN")), draw(1, 8, 2, 16)
    assert layer.decision is None
    layer(q, q, q)
    assert layer.decision.chosen == "TORCH_SDPA"
    assert layer.decision.request.query_len == 8
