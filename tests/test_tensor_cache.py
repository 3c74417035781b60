"""Tensors that are built once: who may read them."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fastvideo.block_sparse import video_sparse_attention
from fastvideo.tensor_cache import cache_tensors


def test_tensors_are_built_once_and_serve_training() -> None:
    ones = cache_tensors(torch.ones)
    with torch.inference_mode():
        first = ones(3)
    assert ones(3) is first
    x = torch.full((3,), 2.0, requires_grad=True)
    (x * first).sum().backward()
    assert x.grad.tolist() == [1.0, 1.0, 1.0]


def test_fake_tensors_serve_their_own_mode_alone() -> None:
    ones = cache_tensors(torch.ones)
    with FakeTensorMode():
        assert isinstance(ones(3), FakeTensor)
    real = ones(3)
    assert type(real) is torch.Tensor
    assert real.tolist() == [1.0, 1.0, 1.0]
    with FakeTensorMode():
        assert isinstance(ones(3), FakeTensor)
    assert ones(3) is real


def test_sparse_attention_on_fake_tensors_leaves_later_calls_alone() -> None:
    """A memory estimate comes before the run: the layouts of the grid and of its text, made for it, hold no numbers."""

    def attend() -> torch.Tensor:
        q, k, v, gate = (torch.randn(1, 3 * 7 * 5 + 2, 1, 8) for _ in range(4))
        return video_sparse_attention(q, k, v, (3, 7, 5), sparsity=0.5, gate=gate, tile_tyx=(2, 2, 2), num_replicated=2)

    with FakeTensorMode():
        assert isinstance(attend(), FakeTensor)
    torch.manual_seed(0)
    assert attend().isfinite().all()
