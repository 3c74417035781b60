"""Layouts and patterns: masks, inverted lists, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvideo.block_sparse import BlockPattern, TileLayout


def layouts(query_sizes=(3, 1, 4), key_sizes=(2, 5, 1, 3)) -> tuple[TileLayout, TileLayout]:
    generator = torch.Generator().manual_seed(0)
    query, key = (
        TileLayout.from_sizes(sizes, order=torch.randperm(sum(sizes), generator=generator))
        for sizes in (query_sizes, key_sizes)
    )
    return query, key


def test_layout_from_sizes() -> None:
    layout = TileLayout.from_sizes([3, 1, 4], order=torch.tensor([7, 0, 1, 2, 3, 4, 5, 6]))
    assert layout.offsets.tolist() == [0, 3, 4, 8]
    assert (layout.num_tokens, layout.num_tiles, layout.max_size, layout.is_uniform) == (8, 3, 4, False)
    assert layout.tile_of_token().tolist() == [0, 0, 1, 2, 2, 2, 2, 0]
    assert TileLayout.uniform(8, 4).is_uniform


@pytest.mark.parametrize("sizes", [[], [2, 0], [-1]])
def test_layout_refuses_empty_tiles(sizes) -> None:
    with pytest.raises(ValueError, match="at least 1 token"):
        TileLayout.from_sizes(sizes)


def test_layout_refuses_an_order_of_another_length() -> None:
    with pytest.raises(ValueError, match=r"\(5,\).*\(4,\)"):
        TileLayout.from_sizes([2, 3], order=torch.arange(4))
    with pytest.raises(ValueError, match="tile_size=0"):
        TileLayout.uniform(5, 0)


def test_token_mask_follows_both_orders() -> None:
    query, key = layouts()
    mask = torch.rand(2, 3, 3, 4) < 0.5
    dense = BlockPattern.from_mask(mask, query, key).token_mask()
    assert dense.shape == (2, 3, 8, 11)
    for row in range(8):
        for column in range(11):
            tiles = int(query.tile_of_token()[row]), int(key.tile_of_token()[column])
            assert torch.equal(dense[:, :, row, column], mask[:, :, tiles[0], tiles[1]])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.floats(0, 1))
def test_mask_survives_lists_and_inverted_lists(seed: int, density: float) -> None:
    query, key = layouts()
    mask = torch.rand(2, 3, 3, 4, generator=torch.Generator().manual_seed(seed)) < density
    pattern = BlockPattern.from_mask(mask, query, key)
    pattern.validate()
    assert torch.equal(pattern.tile_mask(), mask)
    offsets, queries = pattern.invert()
    assert offsets.dtype == queries.dtype == torch.int32
    for batch in range(2):
        for head in range(3):
            for tile in range(4):
                seen_by = queries[batch, head, int(offsets[batch, head, tile]) : int(offsets[batch, head, tile + 1])]
                assert seen_by.tolist() == mask[batch, head, :, tile].nonzero().flatten().tolist()


def test_from_indices_without_counts() -> None:
    query, key = layouts()
    pattern = BlockPattern.from_indices(torch.tensor([[0, 3], [1, 2], [2, 3]]), query, key)
    assert pattern.tile_mask()[0, 0].int().tolist() == [[1, 0, 0, 1], [0, 1, 1, 0], [0, 0, 1, 1]]


@pytest.mark.parametrize(
    ("indices", "counts", "text"),
    [
        ([[0, 4], [1, 2], [2, 3]], None, r"\[0, 4\), got 4"),
        ([[-1, 1], [1, 2], [2, 3]], None, r"\[0, 4\), got -1"),
        ([[1, 0], [1, 2], [2, 3]], None, "ascending"),
        ([[1, 1], [1, 2], [2, 3]], None, "ascending"),
        ([[0, 1], [1, 2], [2, 3]], [2, 3, 0], r"\[0, 2\], got 0 to 3"),
        ([[0, 1], [1, 2]], None, "Nq=3"),
        ([[0, 1], [1, 2], [2, 3]], [1, 2], "counts of shape"),
    ],
)
def test_values_that_are_refused(indices, counts, text) -> None:
    counts = None if counts is None else torch.tensor(counts)
    with pytest.raises(ValueError, match=text):
        BlockPattern.from_indices(torch.tensor(indices), *layouts(), counts=counts)


def test_what_lies_behind_a_count_does_not_matter() -> None:
    pattern = BlockPattern.from_indices(torch.tensor([[1, 99], [0, 2], [-5, -5]]), *layouts(), counts=torch.tensor([1, 2, 0]))
    assert pattern.tile_mask()[0, 0].int().tolist() == [[0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]


def test_types_and_devices_that_are_refused() -> None:
    query, key = layouts()
    with pytest.raises(TypeError, match="int32 indices"):
        BlockPattern(query, key, torch.zeros(1, 1, 3, 1, dtype=torch.int64))
    with pytest.raises(TypeError, match="bool tile mask"):
        BlockPattern.from_mask(torch.ones(3, 4), query, key)
    with pytest.raises(ValueError, match=r"ending in \(3, 4\)"):
        BlockPattern.from_mask(torch.ones(4, 4, dtype=torch.bool), query, key)
    with pytest.raises(ValueError, match="one device, got"):
        BlockPattern(query, key, torch.zeros(1, 1, 3, 1, dtype=torch.int32, device="meta"))
