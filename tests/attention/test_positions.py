"""Causal attention with replicated tokens on one device: which query sees which tokens, and what a backend is handed."""

from __future__ import annotations

import pytest
import torch

from fastvideo.attention import AttentionImpl, DistributedAttention, register_attn_backend
from fastvideo.attention.backends.torch_sdpa import TorchSDPABackend
from fastvideo.testing import reference_attention

VIDEO, TEXT = 4, 2
SEEN = {
    ("rear", True): ("v", "vv", "vvv", "vvvv", "vvvvt", "vvvvtt"),
    ("rear", False): ("v", "vv", "vvv", "vvvv"),
    ("front", True): ("ttv", "ttvv", "ttvvv", "ttvvvv", "t", "tt"),
    ("front", False): ("ttv", "ttvv", "ttvvv", "ttvvvv"),
}
"""What each query sees, first those of the video and then the replicated ones: video and text tokens from the first on."""


def draw(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, count, 2, 8, generator=generator, dtype=torch.float64).requires_grad_()


def joined(video: torch.Tensor, text: torch.Tensor, seen: str) -> torch.Tensor:
    return torch.cat([video[:, : seen.count("v")], text[:, : seen.count("t")]], dim=1)


@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize(("strategy", "has_queries"), SEEN)
def test_what_each_query_sees(strategy: str, has_queries: bool, has_mask: bool) -> None:
    layer = DistributedAttention(2, 8, causal=True, joint_strategy=strategy)
    video, text = [draw(VIDEO, seed) for seed in range(3)], [draw(TEXT, seed) for seed in range(3, 6)]
    # Key padding that hides the video's second token, in the order of the sequence.
    padding = torch.tensor([[False, True, False, False]]).logical_not()
    more = torch.ones(1, TEXT, dtype=torch.bool)
    mask = torch.cat([more, padding] if strategy == "front" else [padding, more], dim=1) if has_mask else None
    out, rest = layer(*video, text[0] if has_queries else None, *text[1:], attn_mask=mask)
    assert (rest is not None) == has_queries
    found = out if rest is None else torch.cat([out, rest], dim=1)
    queries = joined(video[0], text[0], "vvvv" + "tt" * has_queries)
    expected = torch.cat(
        [
            reference_attention(
                queries[:, row : row + 1],
                *(joined(video[i], text[i], seen) for i in (1, 2)),
                attn_mask=joined(padding, more, seen) if has_mask else None,
            )
            for row, seen in enumerate(SEEN[strategy, has_queries])
        ],
        dim=1,
    )
    torch.testing.assert_close(found, expected)
    weight, leaves = draw(found.shape[1], 9).detach(), [*video, *text[0 if has_queries else 1 :]]
    for mine, theirs in zip(
        torch.autograd.grad((found * weight).sum(), leaves),
        torch.autograd.grad((expected * weight).sum(), leaves, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


class HookedImpl(AttentionImpl):
    """Doubles what its hook is handed, which is never a replicated token, and tells how many of the last tokens are."""

    def preprocess_qkv(self, qkv, attn_metadata):
        return 2 * qkv

    def forward(self, query, key, value, attn_metadata, *, num_replicated=0):
        return reference_attention(query, key, value, is_causal=self.causal, scale=self.softmax_scale) + 1000 * num_replicated


class HookedBackend(TorchSDPABackend):
    @staticmethod
    def get_name():
        return "HOOKED"

    @staticmethod
    def get_impl_cls():
        return HookedImpl

    @classmethod
    def rejections(cls, request):
        return ()


def test_replicated_tokens_in_front_join_after_the_hook() -> None:
    register_attn_backend("HOOKED", HookedBackend)
    layer = DistributedAttention(2, 8, causal=True, joint_strategy="front", backend="HOOKED")
    with torch.no_grad():
        video, text = draw(VIDEO, 0), draw(TEXT, 1)
        out, rest = layer(video, video, video, text, text, text)
        x = torch.cat([text, 2 * video], dim=1)
        # In front they are no last tokens, so the backend isn't told of any.
        torch.testing.assert_close(torch.cat([rest, out], dim=1), reference_attention(x, x, x, is_causal=True))
