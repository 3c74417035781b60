"""Bad input is refused with a clear error before any kernel runs."""

from __future__ import annotations

import math

import pytest
import torch

from fastvideo.attention import (
    BackendUnavailable,
    DistributedAttention,
    DistributedAttention_VSA,
    LocalAttention,
    UnknownBackend,
    attention,
)
from fastvideo.attention.backends.abstract import AttentionMetadata
from fastvideo.attention.backends.torch_sdpa import TorchSDPAImpl
from fastvideo.attention.backends.video_sparse_attn import VideoSparseAttentionImpl, VideoSparseAttentionMetadataBuilder
from fastvideo.forward_context import set_forward_context

GRID = (4, 4, 8)


def build(**changes):
    arguments = {
        "current_timestep": 0,
        "raw_latent_shape": GRID,
        "patch_size": (1, 1, 1),
        "VSA_sparsity": 0.5,
        "device": "cpu",
    }
    return VideoSparseAttentionMetadataBuilder().build(**{**arguments, **changes})


@pytest.fixture(autouse=True)
def no_kernel_runs(monkeypatch):
    """Fail loudly where an implementation is reached in spite of bad input."""

    def reached(*arguments, **keywords):
        raise AssertionError("an implementation was reached")

    monkeypatch.setattr(TorchSDPAImpl, "forward", reached)


def qkv(*shape: int, dtype=torch.float32):
    shape = shape or (2, 128, 4, 16)
    return [torch.ones(shape, dtype=dtype) for _ in range(3)]


def doors(q, k, v):
    """Call every public door with the same tensors."""
    yield lambda: attention(q, k, v)
    yield lambda: LocalAttention(4, 16)(q, k, v)
    yield lambda: DistributedAttention(4, 16)(q, k, v)
    yield lambda: DistributedAttention_VSA(4, 16)(q, k, v, attn_metadata=build())


def refuses(error, text: str, *tensors) -> None:
    for door in doors(*tensors):
        with pytest.raises(error, match=text):
            door()


def test_wrong_rank() -> None:
    q, k, v = qkv()
    refuses(ValueError, r"query as \[batch, seq, heads, head_size\], got shape \(128, 4, 16\)", q[0], k, v)


def test_no_tensor() -> None:
    q, k, _ = qkv()
    refuses(TypeError, "value as a tensor", q, k, [1.0])


def test_mismatched_heads() -> None:
    q, k, v = qkv()
    refuses(ValueError, "multiple of key heads, got 4 and 3", q, k[:, :, :3], v[:, :, :3])
    with pytest.raises(ValueError, match="enable_gqa=True"):
        attention(q, k[:, :, :2], v[:, :, :2])
    with pytest.raises(ValueError, match="this layer has 4 query and 4 key heads of size 16"):
        LocalAttention(4, 16)(q, k[:, :, :2], v[:, :, :2])


def test_mismatched_lengths() -> None:
    q, k, v = qkv()
    refuses(ValueError, "key and value of one shape", q, k, v[:, :100])


def test_mismatched_batches_and_head_sizes() -> None:
    q, k, v = qkv()
    refuses(ValueError, "one batch size", q, k[:1], v[:1])
    refuses(ValueError, "one head size", q, k[..., :8], v[..., :8])


def test_mismatched_devices() -> None:
    q, k, v = qkv()
    refuses(ValueError, r"one device, got query.device=device\(type='meta'\)", q.to("meta"), k, v)


def test_mismatched_dtypes() -> None:
    q, k, v = qkv()
    refuses(TypeError, "one dtype, got query.dtype=torch.float16", q.half(), k, v)


def test_integer_dtype() -> None:
    refuses(TypeError, "query in float16, bfloat16, float32 or float64, got torch.int64", *qkv(dtype=torch.int64))


def test_empty_sequence() -> None:
    refuses(ValueError, r"without empty dims, got shape \(2, 0, 4, 16\)", *qkv(2, 0, 4, 16))


def test_head_size_that_no_backend_takes() -> None:
    q = torch.ones(1, 8, 1, 1024, dtype=torch.bfloat16)
    with pytest.raises(BackendUnavailable, match="head size"):
        attention(q, q, q, backend="FLASH_ATTN")


@pytest.mark.parametrize(
    ("mask", "error", "text"),
    [
        (torch.ones(2, 100, dtype=torch.bool), ValueError, r"\[2, 128\], got \(2, 100\)"),
        (torch.ones(2, 128), TypeError, "key padding mask in torch.bool"),
        (torch.ones(128, 128, 128, dtype=torch.bool), ValueError, r"key padding \[2, 128\] or as"),
        (torch.ones(2, 3, 128, 128, dtype=torch.bool), ValueError, r"\[2\|1, 4\|1, 128, 128\]"),
        (torch.ones(2, 1, 1, 128, dtype=torch.bool), ValueError, "128, 128"),
        (torch.ones(1, 1, 128, 128, dtype=torch.float64), TypeError, "query's dtype"),
        (torch.ones(1, 1, 128, 128, dtype=torch.int32), TypeError, "query's dtype"),
        ("causal", TypeError, "attn_mask as a tensor"),
        (torch.ones(2, 128, dtype=torch.bool, device="meta"), ValueError, "attn_mask on cpu, got meta"),
    ],
)
def test_wrong_mask(mask, error, text) -> None:
    q, k, v = qkv()
    for door in (attention, LocalAttention(4, 16), DistributedAttention(4, 16)):
        with pytest.raises(error, match=text):
            door(q, k, v, attn_mask=mask)


def test_vsa_refuses_a_mask() -> None:
    q, k, v = qkv()
    with pytest.raises(BackendUnavailable, match="mask"):
        DistributedAttention_VSA(4, 16)(q, k, v, attn_mask=torch.ones(2, 128, dtype=torch.bool), attn_metadata=build())


@pytest.fixture
def no_vsa_kernel_runs(monkeypatch):
    import fastvideo.attention.backends.video_sparse_attn as module

    def reached(*arguments, **keywords):
        raise AssertionError("a kernel was reached")

    monkeypatch.setattr(module, "video_sparse_attention", reached)


def test_needed_metadata_missing_or_of_another_class(no_vsa_kernel_runs) -> None:
    q, k, v = qkv()
    layer = DistributedAttention_VSA(4, 16)
    with pytest.raises(ValueError, match=r"needs metadata of class VideoSparseAttentionMetadata.*set_forward_context"):
        layer(q, k, v)
    with pytest.raises(TypeError, match="takes attn_metadata of class VideoSparseAttentionMetadata"):
        layer(q, k, v, attn_metadata=AttentionMetadata(0))
    with pytest.raises(ValueError, match=r"metadata.*set_forward_context"):
        VideoSparseAttentionImpl(4, 16, 0.25).forward(q, k, v, None)


def test_grid_that_does_not_match_the_sequence(no_vsa_kernel_runs) -> None:
    q, k, v = qkv(2, 127, 4, 16)
    with set_forward_context(0, build()), pytest.raises(ValueError, match=r"128.*127"):
        DistributedAttention_VSA(4, 16)(q, k, v)


@pytest.mark.parametrize("sparsity", [1.0, -0.1, 1.5, math.nan, math.inf])
def test_sparsity_outside_its_range(sparsity) -> None:
    with pytest.raises(ValueError, match="sparsity"):
        build(VSA_sparsity=sparsity)


@pytest.mark.parametrize(
    "changes",
    [{"raw_latent_shape": (4, 4)}, {"patch_size": (3, 1, 1)}, {"raw_latent_shape": (0, 4, 8)}, {"patch_size": (0, 1, 1)}],
)
def test_geometry_that_does_not_fit(changes) -> None:
    with pytest.raises(ValueError, match=r"raw_latent_shape|patch_size|grid"):
        build(**changes)


def test_unknown_arguments_of_build() -> None:
    with pytest.raises(TypeError, match="VSA_sparisty"):
        build(VSA_sparisty=0.5)


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_scale_that_is_no_number(scale) -> None:
    q, k, v = qkv()
    with pytest.raises(ValueError, match="finite softmax scale"):
        attention(q, k, v, scale=scale)
    for layer_cls in (LocalAttention, DistributedAttention, DistributedAttention_VSA):
        with pytest.raises(ValueError, match="finite softmax scale"):
            layer_cls(4, 16, softmax_scale=scale)
    with pytest.raises(TypeError, match="as a float"):
        attention(q, k, v, scale="0.5")


def test_unknown_backend_names_close_matches() -> None:
    with pytest.raises(UnknownBackend, match="did you mean TORCH_SDPA"):
        attention(*qkv(), backend="TORCH_SPDA")
    with pytest.raises(TypeError, match="named by a string"):
        attention(*qkv(), backend=3)


def test_named_backend_that_cannot_run_names_all_reasons() -> None:
    with pytest.raises(BackendUnavailable) as caught:
        attention(*qkv(), backend="FLASH_ATTN", attn_mask=torch.ones(1, 1, 128, 128, dtype=torch.bool))
    text = str(caught.value)
    assert all(word in text for word in ("pip install", "float32", "mask"))


def test_causal_with_unequal_lengths() -> None:
    q, k, v = qkv()
    for call in (
        lambda: attention(q, k[:, :100], v[:, :100], is_causal=True),
        lambda: LocalAttention(4, 16, causal=True)(q, k[:, :100], v[:, :100]),
        lambda: DistributedAttention(4, 16, causal=True)(q, k[:, :100], v[:, :100]),
    ):
        with pytest.raises(NotImplementedError, match="128 queries and 100 keys"):
            call()


@pytest.mark.parametrize("layer_cls", [LocalAttention, DistributedAttention, DistributedAttention_VSA])
def test_unknown_extra_arguments(layer_cls) -> None:
    layer = layer_cls(4, 16, dropout_rate=0, windw_size=3)
    keywords = {} if layer_cls is not DistributedAttention_VSA else {"attn_metadata": build()}
    with pytest.raises(TypeError, match=r"\['windw_size'\]"):
        layer(*qkv(), **keywords)
    with pytest.raises(NotImplementedError, match=r"dropout_rate='0\.1'"):
        layer_cls(4, 16, dropout_rate="0.1")


@pytest.mark.parametrize("sizes", [(0, 16), (4, 0), (4, 16, 3), (-1, 16)])
def test_sizes_out_of_range(sizes) -> None:
    with pytest.raises(ValueError, match=r"num_heads|head_size"):
        LocalAttention(*sizes)
    for wrong in (4.0, True, "4", torch.ones(1), [4]):
        with pytest.raises(TypeError, match="integer num_heads"):
            LocalAttention(wrong, 16)
        with pytest.raises(TypeError, match="integer head_groups"):
            DistributedAttention(4, 16, head_groups=wrong)


def test_sizes_of_other_integer_types_are_sizes() -> None:
    numpy = pytest.importorskip("numpy")
    layer = DistributedAttention(numpy.int64(4), torch.tensor(16), numpy.int32(2), head_groups=numpy.int8(2))
    sizes = (layer.num_heads, layer.head_size, layer.num_kv_heads, layer.head_groups)
    assert sizes == (4, 16, 2, 2)
    assert {type(size) for size in sizes} == {int}


def test_replicated_tokens_that_do_not_fit() -> None:
    q, k, v = qkv()
    text = torch.ones(2, 5, 4, 16)
    layer = DistributedAttention(4, 16)
    with pytest.raises(ValueError, match="got only replicated_q, replicated_v"):
        layer(q, k, v, text, None, text)
    with pytest.raises(ValueError, match="replicated tokens"):
        layer(q, k, v, text[:, :3], text, text)
    with pytest.raises(TypeError, match="replicated tokens"):
        layer(q, k, v, text.double(), text.double(), text.double())
    with pytest.raises(NotImplementedError, match="causal attention needs as many keys as queries"):
        DistributedAttention(4, 16, causal=True)(q, k[:, 1:], v[:, 1:], text, text, text)


def test_gate_that_does_not_fit() -> None:
    q, k, v = qkv()
    with pytest.raises(ValueError, match="gate_compress like q"):
        DistributedAttention_VSA(4, 16)(q, k, v, gate_compress=q[:, :100], attn_metadata=build())


def test_rotary_tables_that_do_not_fit() -> None:
    q, k, v = qkv()
    with pytest.raises(ValueError, match=r"cosines \[S, D/2\] = \(128, 8\)"):
        LocalAttention(4, 16)(q, k, v, freqs_cis=(torch.ones(100, 8), torch.ones(100, 8)))
    table = torch.ones(128, 8, dtype=torch.complex64)
    for wrong, kinds in (
        (table, "torch.complex64"),
        ((table, table), "torch.complex64, torch.complex64"),
        ((1, 2), "int, int"),
    ):
        with pytest.raises(TypeError, match=rf"pair of tensors \(cosines, sines\), got {kinds}; .* pass \(real, imag\)"):
            LocalAttention(4, 16)(q, k, v, freqs_cis=wrong)


def test_dropout_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"dropout_p in \[0, 1\)"):
        attention(*qkv(), dropout_p=1.0)


def test_output_buffer_that_does_not_fit() -> None:
    q, k, v = qkv()
    with pytest.raises(ValueError, match="out like query"):
        attention(q, k, v, out=torch.empty(2, 64, 4, 16))


def test_metadata_of_a_sparse_backend_handed_to_a_dense_one() -> None:
    q, k, v = qkv()
    for call in (
        lambda: attention(q, k, v, attn_metadata=build()),
        lambda: LocalAttention(4, 16, backend="TORCH_SDPA")(q, k, v, attn_metadata=build()),
    ):
        with pytest.raises(TypeError, match="TORCH_SDPA takes attn_metadata of class AttentionMetadata, got Video"):
            call()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda q: attention(q, q, q, out=3), "out as a tensor"),
        (lambda q: attention(q, q, q, dropout_p="0.1"), "dropout_p as a float"),
        (lambda q: attention(q, q, q, is_causal=torch.tensor(True)), "causal as a bool"),
        (lambda q: attention(q, q, q, enable_gqa="yes"), "enable_gqa as a bool, got 'yes'"),
        (lambda q: attention(q, q, q, return_lse="yes"), "return_lse as a bool, got 'yes'"),
        (lambda q: LocalAttention(4, 16, causal="False"), "causal as a bool"),
        (lambda q: DistributedAttention_VSA(4, 16)(q, q, q, gate_compress=1.0, attn_metadata=build()), "gate_compress as a"),
    ],
)
def test_values_of_a_wrong_type(call, text) -> None:
    with pytest.raises(TypeError, match=text):
        call(qkv()[0])
