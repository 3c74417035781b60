"""`SLIDING_TILE_ATTN`: numbers against dense masked attention, metadata, rejections and bad input.

The mask of the oracle is written from the paper's definition, token by token, and shares no code with the windows under test.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle

import pytest
import torch
import torch._dynamo.testing

from fastvideo.attention import DistributedAttention, LocalAttention
from fastvideo.attention.backends.abstract import AttentionMetadata
from fastvideo.attention.backends.sliding_tile_attn import (
    SlidingTileAttentionBackend,
    SlidingTileAttentionImpl,
    SlidingTileAttentionMetadata,
    SlidingTileAttentionMetadataBuilder,
)
from fastvideo.attention.request import AttentionRequest
from fastvideo.forward_context import set_forward_context
from fastvideo.testing import assert_op_within_budget, reference_attention
from fastvideo.video.choose_tile import choose_tile

GRID = (5, 4, 6)
NUM_TOKENS = 120


def build(**changes) -> SlidingTileAttentionMetadata:
    arguments = {
        "current_timestep": 7,
        "raw_latent_shape": (5, 8, 12),
        "patch_size": (1, 2, 2),
        "STA_window": (1, 3, 1),
        "device": "cpu",
        "tile_tyx": (2, 1, 3),
    }
    return SlidingTileAttentionMetadataBuilder().build(**{**arguments, **changes})


def oracle_mask(grid_tyx, tile_tyx, window_tyx, num_replicated: int = 0) -> torch.Tensor:
    """Bool `[S + R, S + R]`: who sees whom, from each pair's coordinates."""
    axes = torch.meshgrid(*(torch.arange(extent) for extent in grid_tyx), indexing="ij")
    mask = torch.ones(1, dtype=torch.bool)
    for place, extent, tile, window in zip(axes, grid_tyx, tile_tyx, window_tyx, strict=True):
        num_tiles, half = math.ceil(extent / tile), window // 2
        tiles = place.flatten() // tile
        if window < num_tiles:
            centers = torch.minimum(tiles.clamp(min=half), torch.tensor(num_tiles - 1 - half))
            mask = mask & ((tiles[None, :] - centers[:, None]).abs() <= half)
    num_tokens = math.prod(grid_tyx)
    full = torch.ones(num_tokens + num_replicated, num_tokens + num_replicated, dtype=torch.bool)
    full[:num_tokens, :num_tokens] = mask
    return full


def qkv(num_tokens: int, *, heads: int = 4, kv_heads: int = 2, dtype=torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"query": heads, "key": kv_heads, "value": kv_heads}
    return {
        name: torch.randn(2, num_tokens, h, 8, generator=generator, dtype=torch.float64).to(dtype) for name, h in shapes.items()
    }


CASES = {
    "divides": {"grid": (4, 4, 6), "tile": (2, 2, 2), "windows": (1, 3, 1)},
    "ragged": {"grid": GRID, "tile": (2, 3, 4), "windows": (3, 1, 1)},
    "ragged, text": {"grid": GRID, "tile": (2, 3, 4), "windows": (1, 1, 1), "text": 5},
    "text longer than a tile": {"grid": (3, 4, 5), "tile": (1, 2, 2), "windows": (1, 3, 1), "text": 11},
    "windows per head": {"grid": GRID, "tile": (2, 1, 3), "windows": [(1, 1, 1), (3, 3, 1), (1, 5, 3), (9, 3, 1)]},
    "windows per head, text": {
        "grid": GRID,
        "tile": (2, 1, 3),
        "windows": [(1, 1, 1), (3, 3, 1), (1, 5, 3), (9, 3, 1)],
        "text": 7,
    },
    "windows per head of one size, text": {
        "grid": (4, 4, 4),
        "tile": (1, 1, 1),
        "windows": [(1, 1, 3), (1, 3, 1), (3, 1, 1), (1, 1, 3)],
        "text": 1,
    },
    "tiles of one token": {"grid": (1, 7, 5), "tile": (1, 1, 1), "windows": (1, 3, 3)},
    "one frame": {"grid": (1, 8, 9), "tile": (4, 4, 4), "windows": (3, 1, 1), "text": 2},
    "one tile": {"grid": (2, 3, 2), "tile": (6, 8, 8), "windows": (3, 3, 3)},
    "tiles in parts": {"grid": (7, 9, 17), "tile": (6, 8, 8), "windows": (1, 1, 1), "text": 3},
    "tiles in parts, windows per head": {
        "grid": (7, 9, 17),
        "tile": (6, 8, 8),
        "windows": [(1, 1, 1), (1, 1, 3), (3, 1, 1), (1, 3, 1)],
    },
}


def case(grid, tile, windows, text=0):
    """Metadata, and the oracle's mask `[1, H|1, S + R, S + R]`."""
    metadata = build(raw_latent_shape=grid, patch_size=(1, 1, 1), tile_tyx=tile, STA_window=windows)
    per_head = windows if isinstance(windows, list) else [windows]
    return metadata, torch.stack([oracle_mask(grid, tile, window, text) for window in per_head])[None]


@pytest.mark.parametrize("name", CASES)
def test_equals_dense_masked_attention(name) -> None:
    metadata, mask = case(**CASES[name])
    text = CASES[name].get("text", 0)
    impl = SlidingTileAttentionImpl(4, 8, -0.3, num_kv_heads=2)

    def attend(**tensors):
        return impl.forward(*tensors.values(), metadata, num_replicated=text)

    def oracle(**tensors):
        return reference_attention(**tensors, attn_mask=mask, scale=-0.3)

    tensors = qkv(math.prod(CASES[name]["grid"]) + text)
    assert_op_within_budget(attend, oracle, tensors)
    assert 0 < float(mask.double().mean()) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_budget_of_each_dtype(dtype) -> None:
    metadata, mask = case(**CASES["windows per head, text"])
    impl = SlidingTileAttentionImpl(4, 8, 0.4, num_kv_heads=2)

    def attend(query, key, value):
        return impl.forward(query, key, value, metadata, num_replicated=7)

    def oracle(query, key, value):
        return reference_attention(query, key, value, attn_mask=mask, scale=0.4)

    assert_op_within_budget(attend, oracle, qkv(NUM_TOKENS + 7, dtype=dtype))


@pytest.mark.parametrize("window", [(3, 5, 3), (99, 99, 99)])
@pytest.mark.parametrize("text", [0, 5])
def test_full_window_is_dense_attention(window, text) -> None:
    tensors = qkv(NUM_TOKENS + text)
    impl = SlidingTileAttentionImpl(4, 8, 0.3, num_kv_heads=2)
    metadata = build(STA_window=window)
    assert metadata.pattern.counts is None
    out = impl.forward(*tensors.values(), metadata, num_replicated=text)
    torch.testing.assert_close(out, reference_attention(**tensors, scale=0.3))


def test_what_lies_outside_the_window_is_not_read() -> None:
    metadata = build()
    impl = SlidingTileAttentionImpl(4, 8, 0.3, num_kv_heads=2)
    tensors = qkv(NUM_TOKENS)
    is_hidden = ~oracle_mask(GRID, (2, 1, 3), (1, 3, 1))[0]
    expected = impl.forward(*tensors.values(), metadata)[:, 0]
    poisoned = {name: x.clone() for name, x in tensors.items()}
    poisoned["key"][:, is_hidden] = math.nan
    poisoned["value"][:, is_hidden] = math.nan
    assert torch.equal(impl.forward(*poisoned.values(), metadata)[:, 0], expected)


def test_tiles_fit_every_implementation_of_the_engine() -> None:
    metadata = build(raw_latent_shape=(30, 48, 80), patch_size=(1, 1, 1), tile_tyx=(6, 8, 8), STA_window=(3, 3, 3))
    assert metadata.geometry.grid.tile_tyx == (2, 8, 8)
    # 27 tiles of three parts each, and every part sees all of them.
    assert tuple(metadata.pattern.indices.shape) == (1, 1, 900, 81)
    assert metadata.pattern.counts is None


def test_metadata_of_one_step() -> None:
    metadata = build()
    assert metadata.current_timestep == 7
    assert (metadata.grid_tyx, metadata.tile_tyx, metadata.windows) == (GRID, (2, 1, 3), ((1, 3, 1),))
    assert tuple(metadata.pattern.indices.shape) == (1, 1, 24, 3)
    assert metadata.pattern.indices[0, 0, 0].tolist() == [0, 2, 4]
    metadata.pattern.validate()
    per_head = build(STA_window=[[1, 1, 1], [1, 3, 1]])
    assert per_head.windows == ((1, 1, 1), (1, 3, 1))
    assert per_head.pattern.counts.unique(dim=-1).tolist() == [[[1], [3]]]
    per_head.pattern.validate()
    # Heads of one window share its lists.
    assert build(STA_window=[(1, 3, 1)] * 4).pattern.indices.shape[1] == 1


def test_steps_share_their_tensors() -> None:
    builder = SlidingTileAttentionMetadataBuilder()
    builder.prepare()
    first, later, other = (
        build(),
        build(current_timestep=8, STA_window=[1, 3, 1], VSA_sparsity=0.9),
        build(STA_window=(1, 1, 1)),
    )
    assert first.pattern is later.pattern
    assert first.geometry is later.geometry
    assert first.pattern is not other.pattern
    assert first.pattern.derived is not None, "and what kernels make of it"
    per_head = build(STA_window=[(1, 3, 1), (1, 1, 1)])
    assert per_head.pattern.derived is None, "lists of many heads are large"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"raw_latent_shape": (5, 8)}, "raw_latent_shape"),
        ({"raw_latent_shape": (5, 8, 13)}, r"divide.*\(5, 8, 13\).*\(1, 2, 2\)"),
        ({"patch_size": (1, 0, 2)}, "patch_size"),
        ({"tile_tyx": (4, 4, 0)}, "tile_tyx"),
        ({"tile_tyx": "small"}, "tile_tyx"),
        ({"STA_window": (1, 2, 3)}, r"odd windows in STA_window.*\(1, 2, 3\): replace 2 by 1 or 3"),
        ({"STA_window": [(1, 1, 1), (1, 1, 4)]}, r"odd windows in STA_window\[1\].*\(1, 1, 4\)"),
        ({"STA_window": (1, 3)}, "STA_window to be three integers"),
        ({"STA_window": (1, 3, 1, 1)}, "STA_window to be three integers"),
        ({"STA_window": [(1, 3, 1), (1, 3)]}, r"STA_window\[1\] to be three integers"),
        ({"STA_window": [(1, 3, 1), 3]}, "STA_window to be three odd integers"),
        ({"STA_window": ()}, "got none"),
        ({"STA_window": (1, -3, 1)}, "at least 1"),
        ({"STA_window": (1, 3.0, 1)}, "STA_window to be three integers"),
    ],
)
def test_metadata_that_does_not_fit(changes, text) -> None:
    with pytest.raises(ValueError, match=text):
        build(**changes)


def test_settings_of_others_are_named() -> None:
    assert build(VSA_sparsity=0.9).windows == build().windows
    assert build(tile_tyx="auto").tile_tyx == choose_tile(GRID).tile_tyx
    with pytest.raises(TypeError, match=r"STA_windows.*it takes current_timestep"):
        build(STA_windows=(1, 1, 1))
    with pytest.raises(TypeError, match="STA_window"):
        build(STA_window=3)


def test_forward_without_metadata_says_how_to_set_it() -> None:
    impl = SlidingTileAttentionImpl(4, 8, 0.3, num_kv_heads=2)
    for metadata in (None, AttentionMetadata(0)):
        with pytest.raises(ValueError, match=r"SlidingTileAttentionMetadataBuilder.*set_forward_context"):
            impl.forward(*qkv(NUM_TOKENS).values(), metadata)


def test_sequence_or_heads_that_are_not_those_of_the_metadata() -> None:
    impl = SlidingTileAttentionImpl(4, 8, 0.3, num_kv_heads=2)
    tensors = qkv(121).values()
    with pytest.raises(ValueError, match=r"\(5, 4, 6\) has 120 tokens, the sequence has 121"):
        impl.forward(*tensors, build())
    with pytest.raises(ValueError, match="the sequence has 119"):
        impl.forward(*tensors, build(), num_replicated=2)
    with pytest.raises(ValueError, match="for 8 heads, this call has 4"):
        impl.forward(*tensors, build(STA_window=[(1, 1, 1)] * 8), num_replicated=1)
    with pytest.raises(ValueError, match=r"built for meta, query is on cpu"):
        impl.forward(*tensors, build(device="meta"), num_replicated=1)


def test_windows_of_heads_that_are_cut() -> None:
    per_head = build(STA_window=[(1, 1, 1), (1, 3, 1)])
    per_head.check_heads(2, are_cut=False)
    build().check_heads(4, are_cut=True)
    with pytest.raises(ValueError, match=r"a window for each of 2 heads; .*\(Ulysses\).*one window for all heads"):
        per_head.check_heads(2, are_cut=True)
    q = qkv(NUM_TOKENS)["query"]
    with pytest.raises(ValueError, match="for 2 heads, this call has 4"):
        DistributedAttention(4, 8, backend="SLIDING_TILE_ATTN")(q, q, q, attn_metadata=per_head)


def test_fields_follow_from_each_other() -> None:
    metadata = build()
    for name in ("windows", "grid_tyx", "pattern", "current_timestep"):
        with pytest.raises(AttributeError, match=f"{name} of SlidingTileAttentionMetadata can't change"):
            setattr(metadata, name, ((1, 1, 1),))
    for name in ("windows", "grid_tyx", "pattern"):
        with pytest.raises(ValueError, match=name):
            dataclasses.replace(metadata, **{name: ((1, 1, 1),)})
    later = dataclasses.replace(metadata, current_timestep=8)
    assert (later.current_timestep, later.windows) == (8, ((1, 3, 1),))
    assert later.pattern is metadata.pattern
    assert repr(metadata) == (
        "SlidingTileAttentionMetadata(current_timestep=7, grid_tyx=(5, 4, 6), tile_tyx=(2, 1, 3), windows=((1, 3, 1),))"
    )


def test_arguments_of_the_implementation() -> None:
    with pytest.raises(TypeError, match="window"):
        SlidingTileAttentionImpl(4, 8, 0.3, window=(1, 1, 1))
    with pytest.raises(NotImplementedError, match="causal"):
        SlidingTileAttentionImpl(4, 8, 0.3, causal=True)
    with pytest.raises(ValueError, match="finite softmax_scale"):
        SlidingTileAttentionImpl(4, 8, math.nan)


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
        "scale": -0.3,
    }
    return AttentionRequest(**{**arguments, **changes})


def test_what_is_accepted() -> None:
    assert SlidingTileAttentionBackend.rejections(request()) == ()
    assert SlidingTileAttentionBackend.rejections(request(metadata_cls=SlidingTileAttentionMetadata)) == ()
    assert SlidingTileAttentionBackend.rejections(request(device="cuda", layout="ulysses", dtype=torch.float16)) == ()
    # Automatic selection takes exact backends only.
    assert not SlidingTileAttentionBackend.exact
    assert SlidingTileAttentionBackend.requires_metadata()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"key_len": 77}, ["cross attention (125 queries, 77 keys)"]),
        ({"num_replicated": 125}, ["no video tokens"]),
        ({"has_gate": True}, ["gate"]),
        ({"device": "mps", "dtype": torch.float64}, ["mps"]),
        ({"mask": "bool", "is_causal": True, "needs_lse": True}, ["bool mask", "causal", "log-sum-exp"]),
    ],
)
def test_what_is_refused(changes, words) -> None:  # the rest: test_rejections.py
    reasons = SlidingTileAttentionBackend.rejections(request(**changes))
    for word in words:
        assert sum(word in reason for reason in reasons) >= 1, (word, reasons)


def test_layers_run_it_by_name() -> None:
    video, text = qkv(NUM_TOKENS, kv_heads=4).values(), qkv(5, kv_heads=4).values()
    mask = oracle_mask(GRID, (2, 1, 3), (1, 3, 1), 5)
    with set_forward_context(0, build()):
        local = LocalAttention(4, 8, backend="SLIDING_TILE_ATTN")(*video)
        out, text_out = DistributedAttention(4, 8, backend="sliding_tile_attn")(*video, *text)
    torch.testing.assert_close(local, reference_attention(*video, attn_mask=mask[None, None, :NUM_TOKENS, :NUM_TOKENS]))
    joined = [torch.cat(pair, dim=1) for pair in zip(video, text, strict=True)]
    torch.testing.assert_close(torch.cat([out, text_out], dim=1), reference_attention(*joined, attn_mask=mask[None, None]))


def test_metadata_survives_copies() -> None:
    metadata = build()
    impl = SlidingTileAttentionImpl(4, 8, 0.3, num_kv_heads=2)
    tensors = qkv(NUM_TOKENS + 3).values()
    expected = impl.forward(*tensors, metadata, num_replicated=3)
    for copied in (copy.deepcopy(metadata), pickle.loads(pickle.dumps(metadata))):
        assert torch.equal(impl.forward(*tensors, copied, num_replicated=3), expected)


def test_thirty_steps_compile_at_most_two_graphs() -> None:
    tensors = qkv(NUM_TOKENS, kv_heads=4, dtype=torch.float32).values()
    layer = DistributedAttention(4, 8, backend="SLIDING_TILE_ATTN")
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for step in range(30):
        with set_forward_context(step, build(current_timestep=step)):
            out, _ = compiled(*tensors)
    with set_forward_context(0, build()):
        expected, _ = layer(*tensors)
    torch.testing.assert_close(out, expected)
    assert counter.frame_count <= 2


def test_compiled_layer_follows_a_change_of_windows_and_text() -> None:
    tensors = [x.requires_grad_() for x in qkv(NUM_TOKENS, kv_heads=4, dtype=torch.float32).values()]
    text = [torch.randn(2, 9, 4, 8) for _ in range(3)]
    layer = DistributedAttention(4, 8, backend="SLIDING_TILE_ATTN")
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    per_head = [(1, 1, 1), (3, 3, 1), (1, 5, 3), (9, 3, 1)]
    for windows in ((1, 3, 1), (3, 1, 1), per_head, (1, 3, 1)):
        for replicated in ((), text):
            with set_forward_context(0, build(STA_window=windows)):
                results = [f(*tensors, *replicated) for f in (compiled, layer)]
            torch.testing.assert_close(*results)
            grads = [torch.autograd.grad(out.sum(), tensors) for out, _ in results]
            torch.testing.assert_close(*grads)
