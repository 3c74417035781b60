"""Chunk after chunk through the cache equals one block-causal pass, in fixed memory and without compiling anew."""

from __future__ import annotations

import copy
import inspect
import json
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend

from fastvideo.attention import (
    AttentionBackend,
    AttentionImpl,
    AttentionLayer,
    AttentionMetadata,
    BackendUnavailable,
    KVCache,
    StreamingAttention,
    block_causal_mask,
    register_attn_backend,
)
from fastvideo.attention.backends.dense import DenseMetadataBuilder
from fastvideo.distributed import RanksDisagree, sequence_parallel
from fastvideo.forward_context import set_forward_context
from fastvideo.testing.budget import assert_within_budget
from fastvideo.testing.reference import reference_attention

TOKENS = 5  # of a frame
HEADS, HEAD_SIZE = 4, 16


def draw_clip(num_frames: int, batch: int = 1, kv_heads: int = HEADS, dtype=torch.float32, size: float = 2.0):
    generator = torch.Generator().manual_seed(num_frames)
    heads = (HEADS, kv_heads, kv_heads)
    return [(torch.randn(batch, num_frames * TOKENS, h, HEAD_SIZE, generator=generator) * size).to(dtype) for h in heads]


def expected_mask(num_frames: int, window: int | None, sink: int, block: int) -> torch.Tensor:
    """The rule of the documents, frame by frame and token by token."""
    mask = torch.zeros(num_frames * TOKENS, num_frames * TOKENS, dtype=torch.bool)
    for t in range(num_frames):
        end = (t // block + 1) * block
        for f in range(num_frames):
            in_window = window is None or f >= end - window
            if f < end and (f < sink or in_window):
                mask[t * TOKENS : (t + 1) * TOKENS, f * TOKENS : (f + 1) * TOKENS] = True
    return mask[None, None]


def stream(layer, cache: KVCache, clip, chunks) -> torch.Tensor:
    """The outputs of a clip's chunks, joined."""
    outputs, first = [], cache.num_frames
    with torch.no_grad():
        for count in chunks:
            part = slice(first * TOKENS, (first + count) * TOKENS)
            outputs.append(layer(*(x[:, part] for x in clip), cache[0], cache.plan(count)))
            cache.advance()
            first += count
    return torch.cat(outputs, dim=1)


CASES = {
    "whole past": ({"max_frames": 9}, [1] * 9),
    "whole past, long first chunk": ({"max_frames": 10, "max_chunk_frames": 6}, [6, 1, 3]),
    "window": ({"window_frames": 3}, [1] * 11),
    "window of one frame": ({"window_frames": 1}, [1] * 4),
    "window and sinks": ({"window_frames": 3, "sink_frames": 2}, [1] * 13),
    "chunks of several frames": ({"window_frames": 2, "sink_frames": 1, "max_chunk_frames": 4}, [4, 1, 3, 4, 2, 4]),
    "sinks end inside a chunk": ({"window_frames": 3, "sink_frames": 3, "max_chunk_frames": 2}, [2] * 7),
    "blocks": ({"window_frames": 6, "sink_frames": 3, "block_frames": 3}, [3] * 6),
    "blocks in longer chunks": ({"window_frames": 4, "sink_frames": 2, "block_frames": 2, "max_chunk_frames": 6}, [6, 2, 4, 6]),
    "window not a multiple of blocks": ({"window_frames": 5, "sink_frames": 1, "block_frames": 2}, [2] * 8),
    "blocks over the whole past": ({"max_frames": 6, "block_frames": 2}, [2] * 3),
}


def rule(options: dict) -> dict:
    return {
        "window": options.get("window_frames"),
        "sink": options.get("sink_frames", 0),
        "block": options.get("block_frames", 1),
    }


@pytest.mark.parametrize("masking", ["static", "until_full", "sliced"])
@pytest.mark.parametrize("name", CASES)
def test_chunks_equal_one_pass(name: str, masking: str) -> None:
    options, chunks = CASES[name]
    clip = draw_clip(sum(chunks), batch=2, kv_heads=2)
    mask = expected_mask(sum(chunks), **rule(options))
    cache = KVCache(2, 2, HEAD_SIZE, tokens_per_frame=TOKENS, masking=masking, **options)
    actual = stream(StreamingAttention(HEADS, HEAD_SIZE, num_kv_heads=2), cache, clip, chunks)
    reference = reference_attention(*(x.double() for x in clip), attn_mask=mask)
    assert_within_budget(actual, reference, reference_attention(*clip, attn_mask=mask))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [None, -0.3])
def test_dtypes_and_scales(dtype: torch.dtype, scale: float | None) -> None:
    clip, options = draw_clip(8, dtype=dtype, size=5.0), {"window_frames": 2, "sink_frames": 1, "max_chunk_frames": 2}
    mask = expected_mask(8, window=2, sink=1, block=1)
    cache = KVCache(1, HEADS, HEAD_SIZE, tokens_per_frame=TOKENS, dtype=dtype, **options)
    actual = stream(StreamingAttention(HEADS, HEAD_SIZE, softmax_scale=scale), cache, clip, [2, 1, 2, 1, 2])
    reference = reference_attention(*(x.double() for x in clip), attn_mask=mask, scale=scale)
    assert_within_budget(actual, reference, reference_attention(*clip, attn_mask=mask, scale=scale))


@pytest.mark.parametrize("name", CASES)
def test_whole_mask_follows_the_rule(name: str) -> None:
    options, chunks = CASES[name]
    options = {key: value for key, value in options.items() if not key.startswith("max_")}
    assert torch.equal(block_causal_mask(sum(chunks), TOKENS, **options), expected_mask(sum(chunks), **rule(options)))


def test_a_chunk_run_again_counts_once() -> None:
    """A sampler runs a chunk at every noise level; only the last run's keys and values stay."""
    options, chunks = CASES["chunks of several frames"]
    clip, noise = draw_clip(sum(chunks)), torch.randn(sum(chunks) * TOKENS, HEADS, HEAD_SIZE)
    layer, first = StreamingAttention(HEADS, HEAD_SIZE), 0
    once, again = (KVCache(1, HEADS, HEAD_SIZE, tokens_per_frame=TOKENS, **options) for _ in range(2))
    expected, found = stream(layer, once, clip, chunks), []
    with torch.no_grad():
        for count in chunks:
            step, part = again.plan(count), slice(first * TOKENS, (first + count) * TOKENS)
            query, key, value = (x[:, part] for x in clip)
            layer(query, key + noise[part], value - noise[part], again[0], step)
            assert torch.equal(again.plan(count).slots, step.slots)
            found.append(layer(query, key, value, again[0], step))
            again.advance()
            first += count
    assert torch.equal(torch.cat(found, dim=1), expected)


def test_memory_is_fixed() -> None:
    layer, clip = StreamingAttention(HEADS, HEAD_SIZE), draw_clip(30)
    cache = KVCache(1, HEADS, HEAD_SIZE, tokens_per_frame=TOKENS, num_layers=3, window_frames=4, sink_frames=2)
    assert (len(cache), cache.capacity) == (3, 6)
    assert cache.nbytes == 3 * 2 * 6 * TOKENS * HEADS * HEAD_SIZE * 4
    places = [buffer.data_ptr() for buffer in cache]
    stream(layer, cache, clip, [1] * 30)
    assert [buffer.data_ptr() for buffer in cache] == places
    assert cache.num_frames == 30
    step = cache.plan()
    assert step.attn_mask is None
    assert step.frames.tolist() == [30]
    # Sinks keep slots 0 and 1; frame 30 is the 28th of the ring of four slots.
    assert step.slots.tolist() == [2 * TOKENS + i for i in range(TOKENS)]


def test_reset_starts_anew_in_the_same_memory() -> None:
    layer, clip, spoilt = StreamingAttention(HEADS, HEAD_SIZE), draw_clip(6), draw_clip(6)
    spoilt[2][:] = torch.nan
    cache = KVCache(1, HEADS, HEAD_SIZE, tokens_per_frame=TOKENS, window_frames=3, masking="static")
    expected, place = stream(layer, cache, clip, [1] * 6), cache[0].data_ptr()
    cache.reset()
    assert stream(layer, cache, spoilt, [1] * 5).isnan().all()
    cache.plan()
    cache.reset()
    assert cache.num_frames == 0
    with pytest.raises(RuntimeError, match="no chunk is planned"):
        cache.advance()
    assert torch.equal(stream(layer, cache, clip, [1] * 6), expected)
    assert cache[0].data_ptr() == place


@pytest.mark.parametrize(("masking", "chunk", "graphs"), [("static", 1, 1), ("until_full", 1, 2), ("until_full", 2, 1)])
def test_a_growing_clip_compiles_nothing_anew(masking: str, chunk: int, graphs: int) -> None:
    torch._dynamo.reset()
    layers = torch.nn.ModuleList(StreamingAttention(HEADS, HEAD_SIZE) for _ in range(2))
    options = {"num_layers": 2, "window_frames": 3, "sink_frames": 1, "max_chunk_frames": chunk, "masking": masking}
    caches = [KVCache(1, HEADS, HEAD_SIZE, tokens_per_frame=TOKENS, **options) for _ in range(2)]

    def model(query, key, value, first, second, step):
        x = query
        for layer, cache in zip(layers, (first, second), strict=True):
            x = x + layer(x, key, value, cache, step)
        return x

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    clip = draw_clip(16)
    with torch.no_grad():
        for frame in zip(*(x.split(chunk * TOKENS, dim=1) for x in clip), strict=True):
            found, expected = (run(*frame, *cache, cache.plan()) for run, cache in zip((compiled, model), caches, strict=True))
            torch.testing.assert_close(found, expected)
            [cache.advance() for cache in caches]
    for mine, theirs in zip(*caches, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert counter.frame_count == graphs


class NoMaskImpl(AttentionImpl):
    def forward(self, query, key, value, attn_metadata):
        return reference_attention(query, key, value, scale=self.softmax_scale)


class NoMaskBackend(AttentionBackend):
    get_name = staticmethod(lambda: "NO_MASK")
    get_impl_cls = staticmethod(lambda: NoMaskImpl)
    get_metadata_cls = staticmethod(lambda: AttentionMetadata)
    get_builder_cls = staticmethod(lambda: DenseMetadataBuilder)


def test_any_backend_that_accepts() -> None:
    register_attn_backend("NO_MASK", NoMaskBackend)
    layer, clip = StreamingAttention(HEADS, HEAD_SIZE, backend="NO_MASK"), draw_clip(8)
    options = {"tokens_per_frame": TOKENS, "window_frames": 3, "sink_frames": 1}
    found = stream(layer, KVCache(1, HEADS, HEAD_SIZE, masking="sliced", **options), clip, [1] * 8)
    torch.testing.assert_close(found, reference_attention(*clip, attn_mask=expected_mask(8, window=3, sink=1, block=1)))
    assert layer.decision.chosen == "NO_MASK"
    masked = KVCache(1, HEADS, HEAD_SIZE, masking="static", **options)
    with pytest.raises(BackendUnavailable, match="key padding mask is not supported"):
        stream(layer, masked, clip, [1])
    assert not masked[0].any()  # refused before anything is written
    with pytest.raises(BackendUnavailable, match="VIDEO_SPARSE_ATTN"):
        stream(StreamingAttention(HEADS, HEAD_SIZE, backend="VIDEO_SPARSE_ATTN"), masked, clip, [1])


def test_it_is_a_layer_of_the_contract() -> None:
    mine, contract = (inspect.signature(cls.forward) for cls in (StreamingAttention, AttentionLayer))
    assert mine == contract
    layer = StreamingAttention(HEADS, HEAD_SIZE, prefix="blocks.0")
    assert not layer.state_dict()
    twin, clip = copy.deepcopy(layer), draw_clip(2)
    caches = [KVCache(1, HEADS, HEAD_SIZE, tokens_per_frame=TOKENS, max_frames=2) for _ in range(2)]
    assert torch.equal(stream(layer, caches[0], clip, [1, 1]), stream(twin, caches[1], clip, [1, 1]))


def test_autocast_and_inference_mode() -> None:
    layer, clip = StreamingAttention(HEADS, HEAD_SIZE), draw_clip(3)
    with torch.inference_mode():
        cache = KVCache(1, HEADS, HEAD_SIZE, tokens_per_frame=TOKENS, window_frames=2, dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            found = stream(layer, cache, clip, [1])
    rest = stream(layer, cache, [x.bfloat16() for x in clip], [1, 1])
    narrow, mask = [x.bfloat16() for x in clip], expected_mask(3, window=2, sink=0, block=1)
    reference = reference_attention(*(x.double() for x in narrow), attn_mask=mask)
    assert_within_budget(torch.cat([found, rest], 1), reference, reference_attention(*narrow, attn_mask=mask))


def test_no_gradient_is_lost_in_silence() -> None:
    layer, clip = StreamingAttention(HEADS, HEAD_SIZE), draw_clip(1)
    cache = KVCache(1, HEADS, HEAD_SIZE, tokens_per_frame=TOKENS, max_frames=4)
    for index in range(3):
        inputs = [x.clone().requires_grad_(place == index) for place, x in enumerate(clip)]
        with pytest.raises(NotImplementedError, match=r"torch.no_grad.*block_causal_mask"):
            layer(*inputs, cache[0], cache.plan())
    assert not cache[0].any()
    layer(*clip, cache[0], cache.plan())  # nothing here needs a gradient
    assert cache[0][:, :, :TOKENS].any()


BAD_CACHES = {
    "neither length nor window": ({}, ValueError, "give max_frames"),
    "both": ({"max_frames": 4, "window_frames": 2}, ValueError, "give max_frames or window_frames"),
    "sinks without a window": ({"max_frames": 4, "sink_frames": 1}, ValueError, "needs window_frames"),
    "window below a block": ({"window_frames": 2, "block_frames": 3}, ValueError, "at least block_frames=3"),
    "chunk of half a block": ({"window_frames": 4, "block_frames": 2, "max_chunk_frames": 3}, ValueError, "whole blocks"),
    "clip of half a block": (
        {"max_frames": 7, "block_frames": 2},
        ValueError,
        "expected max_frames in whole blocks of block_frames=2, got 7",
    ),
    "no frames": ({"window_frames": 0}, ValueError, "window_frames >= 1"),
    "a float": ({"window_frames": 2.0}, TypeError, "window_frames as an integer"),
    "negative sinks": ({"window_frames": 2, "sink_frames": -1}, ValueError, "sink_frames >= 0"),
    "integer dtype": ({"window_frames": 2, "dtype": torch.int8}, TypeError, "torch.int8"),
    "unknown masking": ({"window_frames": 2, "masking": "never"}, ValueError, "static, until_full, sliced"),
    "no layers": ({"window_frames": 2, "num_layers": 0}, ValueError, "num_layers >= 1"),
}


@pytest.mark.parametrize("name", BAD_CACHES)
def test_bad_caches_are_refused(name: str) -> None:
    options, error, text = BAD_CACHES[name]
    with pytest.raises(error, match=re.escape(text)):
        KVCache(1, HEADS, HEAD_SIZE, tokens_per_frame=TOKENS, **options)


def test_bad_plans_are_refused() -> None:
    cache = KVCache(1, HEADS, HEAD_SIZE, tokens_per_frame=TOKENS, max_frames=3, max_chunk_frames=2)
    with pytest.raises(ValueError, match="at most max_chunk_frames=2 frames, got 3"):
        cache.plan(3)
    with pytest.raises(ValueError, match="num_frames >= 1, got 0"):
        cache.plan(0)
    cache.plan(2), cache.advance()
    with pytest.raises(ValueError, match="would have 4 frames, and this cache holds max_frames=3"):
        cache.plan(2)
    with pytest.raises(RuntimeError, match="call plan"):
        cache.advance()


BAD_CALLS = {
    "no metadata": (lambda q, c, s: (q, q, q, c[0], None), TypeError, "KVCache.plan() returns"),
    "metadata of others": (lambda q, c, s: (q, q, q, c[0], AttentionMetadata(0)), TypeError, "got AttentionMetadata"),
    "the cache itself": (lambda q, c, s: (q, q, q, c, s), TypeError, "one layer's of a KVCache (cache[0]), got KVCache"),
    "chunk of another length": (lambda q, c, s: (q[:, :3], q[:, :3], q[:, :3], c[0], s), ValueError, "5 tokens, got 3 tokens"),
    "another batch": (lambda q, c, s: (*[q.repeat(2, 1, 1, 1)] * 3, c[0], s), ValueError, "[2, 2, C, 4, 16]"),
    "another dtype": (lambda q, c, s: (*[q.double()] * 3, c[0], s), TypeError, "keys' dtype torch.float64, got torch.float32"),
    "fewer keys": (lambda q, c, s: (q, q[:, :3], q[:, :3], c[0], s), ValueError, "5 tokens of the chunk, got 3"),
    "another layer's heads": (lambda q, c, s: (*[q[:, :, :2]] * 3, c[0], s), ValueError, "this layer has 4 query"),
    "too small a cache": (lambda q, c, s: (q, q, q, c[0][:, :, :7], s), ValueError, "reads 15 slots and kv_cache has 7"),
    "another device": (lambda q, c, s: (q, q, q, c[0].to("meta"), s), ValueError, "on cpu, got meta"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_are_refused(name: str) -> None:
    make, error, text = BAD_CALLS[name]
    cache = KVCache(1, HEADS, HEAD_SIZE, tokens_per_frame=TOKENS, window_frames=3)
    query = draw_clip(1)[0]
    with pytest.raises(error, match=re.escape(text)):
        StreamingAttention(HEADS, HEAD_SIZE)(*make(query, cache, cache.plan()))
    assert not cache[0].any()


def test_causal_is_the_caches_to_say() -> None:
    with pytest.raises(TypeError, match="takes no causal: its KVCache says"):
        StreamingAttention(HEADS, HEAD_SIZE, causal=True)


def run_rank(rank: int, folder: str) -> None:
    """One of two ranks: its shard of every chunk, against the whole clip on one."""
    torch.set_num_threads(1)
    address = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    differences = {}
    # A chunk is two frames of five tokens each.
    for name, compiled, lengths in (
        ("eager", False, None),
        ("uneven", False, (7, 3)),
        ("empty shard", False, (0, 10)),
        ("compiled", True, None),
        ("compiled, uneven", True, (7, 3)),
    ):
        options = {"tokens_per_frame": TOKENS, "window_frames": 2, "sink_frames": 1, "max_chunk_frames": 2}
        clip, layer = draw_clip(8, kv_heads=2), StreamingAttention(HEADS, HEAD_SIZE, num_kv_heads=2)
        with sequence_parallel(None):
            expected = stream(layer, KVCache(1, 2, HEAD_SIZE, **options), clip, [2] * 4)
        with sequence_parallel(None):  # what the layer's own mesh says counts more
            cache = KVCache(1, 2, HEAD_SIZE, mesh=dist.group.WORLD, **options)
        run, worst = torch.compile(layer, fullgraph=True, backend="eager") if compiled else layer, 0.0
        own = lengths or (TOKENS, TOKENS)
        for chunk in range(4):
            first = 2 * chunk * TOKENS + sum(own[:rank])
            with torch.no_grad(), set_forward_context(chunk, None, shard_lengths=lengths):
                found = run(*(x[:, first : first + own[rank]] for x in clip), cache[0], cache.plan(2))
            cache.advance()
            off = (found - expected[:, first : first + own[rank]]).abs()
            assert off.shape[1] == own[rank]
            worst = max(worst, off.sum().item())
        differences[name] = worst
    differences["heads"] = cache[0].shape[3]
    try:
        with sequence_parallel(None):
            whole = KVCache(1, 2, HEAD_SIZE, **options)
        layer(*(x[:, :TOKENS] for x in clip), whole[0], whole.plan(2))
    except ValueError as error:
        differences["refusal"] = str(error)
    other = (7, 3) if rank == 0 else (6, 4)
    cache = KVCache(1, 2, HEAD_SIZE, mesh=dist.group.WORLD, **options)
    try:
        with set_forward_context(0, None, shard_lengths=other):
            layer(*(x[:, : other[rank]] for x in clip), cache[0], cache.plan(2))
    except RanksDisagree as error:
        differences["disagreement"] = str(error)
    Path(folder, f"{rank}.json").write_text(json.dumps(differences))
    dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    ranks = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in range(2)]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    finally:
        [rank.kill() for rank in ranks]
    for rank in range(2):
        report = json.loads((tmp_path / f"{rank}.json").read_text())
        assert report["heads"] == 1
        for name in ("eager", "uneven", "empty shard", "compiled", "compiled, uneven"):
            assert report[name] < 1e-4, name
        assert "rank 1 has lengths=(6, 4) where rank 0 has lengths=(7, 3)" in report["disagreement"]
        assert "inside the sequence_parallel scope" in report["refusal"]


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), sys.argv[2])
