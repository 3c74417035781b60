"""Activation checkpointing of sparse attention: recomputation uses the lists that the forward pass has chosen."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from fastvideo.block_sparse import keep_tile_lists, selection, video_sparse_attention
from fastvideo.forward_context import checkpoint, checkpoint_context_fn

from .test_video_sparse import make_inputs, settings_of


@pytest.fixture
def num_selections(monkeypatch) -> Iterator[list[int]]:
    """How many times tiles were chosen, in a list of one."""
    count, original = [0], selection.top_k_ascending

    def counting(scores, k):
        count[0] += 1
        return original(scores, k)

    torch._dynamo.reset()
    monkeypatch.setattr(selection, "top_k_ascending", counting)
    yield count
    torch._dynamo.reset()


def attend_twice(query, key, value, gate):
    """Two layers that choose other tiles."""
    out = video_sparse_attention(query, key, value, gate=gate, **settings_of("primes_text"))
    return video_sparse_attention(out, key.flip(1), value, gate=gate, **settings_of("primes_text"))


CHECKPOINTED = {
    "as it is": (attend_twice, 2),
    "torch's": (lambda *x: torch_checkpoint(attend_twice, *x, use_reentrant=False), 4),
    "torch's with our context": (
        lambda *x: torch_checkpoint(attend_twice, *x, use_reentrant=False, context_fn=checkpoint_context_fn),
        2,
    ),
    "torch's with lists kept": (
        lambda *x: torch_checkpoint(attend_twice, *x, use_reentrant=False, context_fn=keep_tile_lists),
        2,
    ),
    "ours": (lambda *x: checkpoint(attend_twice, *x), 2),
    "ours in another": (lambda *x: checkpoint(lambda *y: checkpoint(attend_twice, *y), *x), 2),
}


@pytest.mark.parametrize("way", CHECKPOINTED)
def test_checkpointing_chooses_tiles_once(way, num_selections) -> None:
    leaves = [x.requires_grad_() for x in make_inputs("primes_text", torch.float32).values()]
    expected = torch.autograd.grad(attend_twice(*leaves).sin().sum(), leaves)
    attend, expected_number = CHECKPOINTED[way]
    num_selections[0] = 0
    results = torch.autograd.grad(attend(*leaves).sin().sum(), leaves)
    assert num_selections[0] == expected_number
    for one, other in zip(results, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("is_inside", [True, False])
def test_compiled_checkpointing_chooses_tiles_once(is_inside, num_selections) -> None:
    """Checkpointing in compiled code, and compiled code under checkpointing."""
    leaves = [x.requires_grad_() for x in make_inputs("primes_text", torch.float32).values()]
    expected = torch.autograd.grad(attend_twice(*leaves).sin().sum(), leaves)

    def compiled(function):
        return torch.compile(function, backend="aot_eager", fullgraph=True)

    inner = compiled(attend_twice)
    attend = compiled(lambda *x: checkpoint(attend_twice, *x)) if is_inside else lambda *x: checkpoint(inner, *x)
    for _ in range(2):
        num_selections[0] = 0
        results = torch.autograd.grad(attend(*leaves).sin().sum(), leaves)
        assert num_selections[0] == 2
        for one, other in zip(results, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_a_checkpoint_serves_two_backward_passes(num_selections) -> None:
    leaves = [x.requires_grad_() for x in make_inputs("primes_text", torch.float32).values()]
    loss = checkpoint(attend_twice, *leaves).sin().sum()
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    for one, other in zip(once, torch.autograd.grad(loss, leaves), strict=True):
        assert torch.equal(one, other)
    assert num_selections[0] == 2
