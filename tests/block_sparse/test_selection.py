"""Exact selection of tiles: counts, ties, NaN, infinities, signed zeros."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvideo.block_sparse import num_kept_tiles, selection, top_k_ascending
from fastvideo.block_sparse.video_sparse_reference import reference_top_k

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("num_tiles", "sparsity", "kept"),
    [
        (10, 0.9, 1),
        (10, 0.7, 3),
        (30, 0.9, 3),
        (30, 0.1 * 3, 21),
        (1440, 0.9, 144),
        (64, 0.75, 16),
        (7, 0.5, 4),
        (3, 0.999, 1),
        (1, 0.0, 1),
        (5, 0.0, 5),
        (100_000, 0.99999, 1),
    ],
)
def test_number_of_kept_tiles(num_tiles, sparsity, kept) -> None:
    assert num_kept_tiles(num_tiles, sparsity) == kept


def test_every_hundredth_keeps_its_exact_share() -> None:
    for percent in range(100):
        for num_tiles in (1, 10, 30, 64, 100, 1440):
            exact = max(1, -(-(100 - percent) * num_tiles // 100))
            assert num_kept_tiles(num_tiles, percent / 100) == exact
            assert num_kept_tiles(num_tiles, 1 - (100 - percent) / 100) == exact


@pytest.mark.parametrize("sparsity", [1.0, -0.1, NAN, INF])
def test_sparsity_outside_its_range(sparsity) -> None:
    with pytest.raises(ValueError, match="sparsity"):
        num_kept_tiles(10, sparsity)


SCORES = st.sampled_from([NAN, INF, -INF, 0.0, -0.0, 1.0, 1.0, -1.0, 2.5, 1e-40])


@settings(max_examples=200, deadline=None)
@given(st.lists(SCORES, min_size=1, max_size=12), st.data())
def test_selection_equals_the_sorted_reference(row, data) -> None:
    k = data.draw(st.integers(1, len(row)))
    for dtype in (torch.float32, torch.float64):
        chosen = top_k_ascending(torch.tensor([row, row[::-1]], dtype=dtype), k)
        assert chosen.dtype == torch.int32
        assert chosen.tolist() == [reference_top_k(row, k), reference_top_k(row[::-1], k)]


@pytest.mark.parametrize("value", [0.0, NAN, INF, -INF])
def test_equal_scores_keep_the_lowest_indices(value) -> None:
    for num_tiles in (1, 17, 1000):
        scores = torch.full((2, 3, num_tiles), value)
        k = min(5, num_tiles)
        assert torch.equal(top_k_ascending(scores, k), torch.arange(k, dtype=torch.int32).expand(2, 3, k))


def test_numbers_beat_nan() -> None:
    assert top_k_ascending(torch.tensor([NAN, -INF, NAN, -INF]), 3).tolist() == [0, 1, 3]


@pytest.mark.parametrize("k", [0, 5])
def test_wrong_k(k) -> None:
    with pytest.raises(ValueError, match=r"\[1, 4\]"):
        top_k_ascending(torch.zeros(4), k)


def test_groups_of_heads_change_nothing(monkeypatch) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 2, 9, 5, 4).unbind(0)
    together = selection.select_tiles(query, key, 3)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key)
    assert torch.equal(together, scores.topk(3, dim=-1).indices.sort(dim=-1).values.int())
    monkeypatch.setattr(selection, "_SCRATCH_BYTES", 2 * 81 * 20 * 2)
    assert torch.equal(selection.select_tiles(query, key, 3), together)
