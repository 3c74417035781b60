"""Streaming attention on CUDA: bfloat16 within the budget, memory fixed after warm-up, two graphs under inductor."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from fastvideo.attention import KVCache, StreamingAttention, block_causal_mask
from fastvideo.testing.budget import assert_within_budget
from fastvideo.testing.reference import reference_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOKENS, HEADS, HEAD_SIZE, FRAMES = 160, 4, 128, 14
RULE = {"window_frames": 4, "sink_frames": 2, "block_frames": 2}


def run(layer, cache: KVCache, clip: list[torch.Tensor]) -> tuple[torch.Tensor, list[int]]:
    """The outputs, joined, and the bytes in use after each chunk."""
    outputs, in_use = torch.empty_like(clip[0]), []
    with torch.no_grad():
        for first in range(0, FRAMES, 2):
            part = slice(first * TOKENS, (first + 2) * TOKENS)
            outputs[:, part] = layer(*(x[:, part] for x in clip), cache[0], cache.plan())
            cache.advance()
            in_use.append(torch.cuda.memory_allocated())
    return outputs, in_use


@pytest.mark.parametrize("masking", ["static", "until_full", "sliced"])
@pytest.mark.parametrize("compiled", [False, True])
def test_chunks_equal_one_pass_in_fixed_memory(masking: str, compiled: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    clip = [torch.randn(2, FRAMES * TOKENS, HEADS, HEAD_SIZE, device="cuda").mul_(3).bfloat16() for _ in range(3)]
    options = {"tokens_per_frame": TOKENS, "masking": masking, "dtype": torch.bfloat16, "device": "cuda", **RULE}
    layer, counter = StreamingAttention(HEADS, HEAD_SIZE), CompileCounterWithBackend("inductor")
    call = torch.compile(layer, fullgraph=True, backend=counter) if compiled else layer
    cache = KVCache(2, HEADS, HEAD_SIZE, **options)
    found, in_use = run(call, cache, clip)
    assert len(set(in_use[3:])) == 1
    if compiled and masking != "sliced":
        assert counter.frame_count == {"static": 1, "until_full": 2}[masking]
    mask = block_causal_mask(FRAMES, TOKENS, device="cuda", **RULE)
    reference = reference_attention(*(x.double() for x in clip), attn_mask=mask)
    assert_within_budget(found, reference, reference_attention(*clip, attn_mask=mask))
