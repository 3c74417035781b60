"""`VIDEO_SPARSE_ATTN`: metadata, builder, rejections, and that `forward` is the operation it names."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import re

import pytest
import torch
import torch._dynamo.testing

from fastvideo.attention import DistributedAttention_VSA
from fastvideo.attention.backends.abstract import AttentionMetadata
from fastvideo.attention.backends.video_sparse_attn import (
    VideoSparseAttentionBackend,
    VideoSparseAttentionImpl,
    VideoSparseAttentionMetadata,
    VideoSparseAttentionMetadataBuilder,
)
from fastvideo.attention.request import AttentionRequest
from fastvideo.block_sparse import video_sparse_attention
from fastvideo.block_sparse.video_sparse_reference import video_sparse_attention_reference
from fastvideo.forward_context import set_forward_context
from fastvideo.video.choose_tile import choose_tile


def build(**changes) -> VideoSparseAttentionMetadata:
    arguments = {
        "current_timestep": 7,
        "raw_latent_shape": (5, 8, 12),
        "patch_size": (1, 2, 2),
        "VSA_sparsity": 0.5,
        "device": "cpu",
        "tile_tyx": (2, 2, 2),
    }
    return VideoSparseAttentionMetadataBuilder().build(**{**arguments, **changes})


def qkvg(num_tokens: int, *, heads: int = 4, kv_heads: int = 2, dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, num_tokens, h, 8, generator=generator, dtype=dtype) for h in (heads, kv_heads, kv_heads, heads)]


def test_metadata_of_one_step() -> None:
    metadata = build()
    assert metadata.current_timestep == 7
    assert metadata.grid_tyx == (5, 4, 6)
    assert metadata.tile_tyx == (2, 2, 2)
    assert metadata.sparsity == 0.5
    assert metadata.num_kept_tiles == 9  # of 3 * 2 * 3
    assert metadata.geometry.tile_of_token.shape == (120,)
    assert metadata.asdict_zerocopy({"current_timestep"})["geometry"] is metadata.geometry
    assert VideoSparseAttentionMetadataBuilder().build(
        current_timestep=0, raw_latent_shape=[4, 4, 4], patch_size=[1, 1, 1], VSA_sparsity=0, device=torch.device("cpu")
    ).tile_tyx == (4, 4, 4)


def test_steps_share_their_tensors() -> None:
    builder = VideoSparseAttentionMetadataBuilder()
    builder.prepare()
    first, later = build(), build(current_timestep=8, VSA_sparsity=0.9)
    assert first.geometry is later.geometry
    assert first.num_kept_tiles == 9
    assert later.num_kept_tiles == 2


def test_tiles_kept_follow_the_sparsity() -> None:
    metadata = build()
    for name in ("sparsity", "num_kept_tiles", "grid_tyx", "geometry", "current_timestep"):
        with pytest.raises(AttributeError, match=f"{name} of VideoSparseAttentionMetadata can't change"):
            setattr(metadata, name, 0)
    for name in ("num_kept_tiles", "grid_tyx", "tile_tyx"):
        with pytest.raises(ValueError, match=name):
            dataclasses.replace(metadata, **{name: 1})
    dense = dataclasses.replace(metadata, sparsity=0.0)
    assert (dense.num_kept_tiles, metadata.num_kept_tiles) == (18, 9)
    fields = "current_timestep=7, sparsity=0.5, grid_tyx=(5, 4, 6), tile_tyx=(2, 2, 2), num_kept_tiles=9"
    assert repr(metadata) == f"VideoSparseAttentionMetadata({fields})"


@pytest.mark.parametrize("sparsity", [1.0, -0.5, math.nan, math.inf])
def test_sparsity_outside_its_range(sparsity) -> None:
    with pytest.raises(ValueError, match=r"sparsity in \[0, 1\)"):
        build(VSA_sparsity=sparsity)


@pytest.mark.parametrize("sparsity", ["0.5", None, True, [0.5]])
def test_sparsity_that_is_no_number(sparsity) -> None:
    with pytest.raises(TypeError, match=re.escape(f"expected VSA_sparsity as a number in [0, 1), got {sparsity!r}")):
        build(VSA_sparsity=sparsity)


@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="this torch has CUDA")
def test_a_device_that_torch_lacks() -> None:
    with pytest.raises(AssertionError, match="not compiled with CUDA"):
        build(device="cuda")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"raw_latent_shape": (5, 8)}, "raw_latent_shape"),
        ({"patch_size": 2}, r"patch_size to be three integers \(t, y, x\), got 2"),
        ({"raw_latent_shape": (5, 8, 13)}, r"divide.*\(5, 8, 13\).*\(1, 2, 2\)"),
        ({"patch_size": (1, 2)}, "patch_size"),
        ({"patch_size": (1, 0, 2)}, "patch_size"),
        ({"tile_tyx": (4, 4, 0)}, "tile_tyx"),
    ],
)
def test_geometry_that_does_not_fit(changes, text) -> None:
    with pytest.raises(ValueError, match=text):
        build(**changes)


def test_settings_of_others_are_named() -> None:
    assert build(STA_window=(3, 3, 3)).num_kept_tiles == build().num_kept_tiles
    assert build(tile_tyx="auto").tile_tyx == choose_tile((5, 4, 6)).tile_tyx
    with pytest.raises(TypeError, match=r"VSA_sparisty.*it takes current_timestep"):
        build(VSA_sparisty=0.9)


@pytest.mark.parametrize("num_replicated", [0, 5])
@pytest.mark.parametrize("has_gate", [True, False])
def test_forward_is_the_operation(num_replicated, has_gate) -> None:
    metadata = build()
    query, key, value, gate = qkvg(120 + num_replicated)
    gate = gate[:, :120] if has_gate else None
    impl = VideoSparseAttentionImpl(4, 8, -0.3, num_kv_heads=2)
    out = impl.forward(query, key, value, metadata, gate_compress=gate, num_replicated=num_replicated)
    settings = {"sparsity": 0.5, "tile_tyx": (2, 2, 2), "num_replicated": num_replicated, "scale": -0.3, "gate": gate}
    assert torch.equal(out, video_sparse_attention(query, key, value, (5, 4, 6), **settings))
    torch.testing.assert_close(out, video_sparse_attention_reference(query, key, value, (5, 4, 6), **settings))


def test_forward_without_metadata_says_how_to_set_it() -> None:
    impl = VideoSparseAttentionImpl(4, 8, 0.3, num_kv_heads=2)
    query, key, value, _ = qkvg(120)
    for metadata in (None, AttentionMetadata(0)):
        with pytest.raises(ValueError, match=r"VideoSparseAttentionMetadataBuilder.*set_forward_context"):
            impl.forward(query, key, value, metadata)


def test_grid_that_is_not_that_of_the_sequence() -> None:
    impl = VideoSparseAttentionImpl(4, 8, 0.3, num_kv_heads=2)
    query, key, value, _ = qkvg(121)
    with pytest.raises(ValueError, match=r"\(5, 4, 6\) has 120 tokens, the sequence has 121"):
        impl.forward(query, key, value, build())
    with pytest.raises(ValueError, match="the sequence has 119"):
        impl.forward(query, key, value, build(), num_replicated=2)


def test_arguments_of_the_implementation() -> None:
    with pytest.raises(TypeError, match="sparsity"):
        VideoSparseAttentionImpl(4, 8, 0.3, sparsity=0.5)
    with pytest.raises(NotImplementedError, match="causal"):
        VideoSparseAttentionImpl(4, 8, 0.3, causal=True)
    with pytest.raises(ValueError, match="finite softmax_scale"):
        VideoSparseAttentionImpl(4, 8, math.nan)


def request(**changes) -> AttentionRequest:
    arguments = {
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_size": 8,
        "query_len": 125,
        "key_len": 125,
        "dtype": torch.bfloat16,
        "device": "cpu",
        "num_replicated": 5,
        "needs_grad": True,
        "has_gate": True,
        "scale": -0.3,
    }
    return AttentionRequest(**{**arguments, **changes})


def test_what_is_accepted() -> None:
    assert VideoSparseAttentionBackend.rejections(request()) == ()
    assert VideoSparseAttentionBackend.rejections(request(device="cuda", layout="ulysses", dtype=torch.float16)) == ()
    # Automatic selection takes exact backends only.
    assert not VideoSparseAttentionBackend.exact
    assert VideoSparseAttentionBackend.requires_metadata()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mask": "key_padding"}, ["key padding mask"]),
        ({"mask": "bool"}, ["bool mask"]),
        ({"mask": "additive"}, ["additive mask"]),
        ({"is_causal": True}, ["causal"]),
        ({"dropout_p": 0.1}, ["dropout_p=0.1"]),
        ({"needs_lse": True}, ["log-sum-exp"]),
        ({"key_len": 77}, ["cross attention (125 queries, 77 keys)"]),
        ({"has_out": True}, ["output buffer"]),
        ({"num_replicated": 125}, ["no video tokens"]),
        ({"dtype": torch.float8_e4m3fn}, ["torch.float8_e4m3fn"]),
        ({"device": "mps", "dtype": torch.float64}, ["mps"]),
        ({"mask": "bool", "is_causal": True, "needs_lse": True}, ["bool mask", "causal", "log-sum-exp"]),
    ],
)
def test_what_is_refused(changes, words) -> None:
    reasons = VideoSparseAttentionBackend.rejections(request(**changes))
    for word in words:
        assert sum(word in reason for reason in reasons) >= 1, (word, reasons)


def test_metadata_survives_copies() -> None:
    metadata = build()
    query, key, value, _ = qkvg(120)
    impl = VideoSparseAttentionImpl(4, 8, 0.3, num_kv_heads=2)
    expected = impl.forward(query, key, value, metadata)
    for copied in (copy.deepcopy(metadata), pickle.loads(pickle.dumps(metadata))):
        assert torch.equal(impl.forward(query, key, value, copied), expected)


def test_thirty_steps_compile_at_most_two_graphs() -> None:
    query, key, value, gate = qkvg(120, kv_heads=4, dtype=torch.float32)
    layer = DistributedAttention_VSA(4, 8)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for step in range(30):
        metadata = build(current_timestep=step, VSA_sparsity=0.5)
        with set_forward_context(step, metadata):
            out, _ = compiled(query, key, value, gate_compress=gate)
    with set_forward_context(0, build()):
        expected, _ = layer(query, key, value, gate_compress=gate)
    torch.testing.assert_close(out, expected)
    assert counter.frame_count <= 2


def test_compiled_layer_follows_a_change_of_sparsity_and_text() -> None:
    query, key, value, gate = qkvg(120, kv_heads=4, dtype=torch.float32)
    text = [torch.randn(2, 9, 4, 8) for _ in range(3)]
    layer = DistributedAttention_VSA(4, 8)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for sparsity in (0.0, 0.5, 0.9, 0.5):
        for replicated in ((None,) * 3, text):
            with set_forward_context(0, build(VSA_sparsity=sparsity)):
                results = [f(query, key, value, *replicated, gate_compress=gate) for f in (compiled, layer)]
            torch.testing.assert_close(*results)


def test_metadata_made_while_sampling_serves_training() -> None:
    settings = {"current_timestep": 0, "patch_size": (1, 1, 1), "VSA_sparsity": 0.5, "device": "cpu"}
    with torch.inference_mode():
        metadata = VideoSparseAttentionMetadataBuilder().build(raw_latent_shape=(3, 7, 11), **settings)
    inputs = [torch.randn(1, 236, 2, 8, requires_grad=True) for _ in range(3)]
    impl = VideoSparseAttentionImpl(2, 8, 0.3)
    impl.forward(*inputs, metadata, num_replicated=5).sum().backward()
    assert all(x.grad.abs().max() > 0 for x in inputs)
