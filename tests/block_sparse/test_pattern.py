"""Layouts and patterns: masks, inverted lists, what is kept with them, and what is refused."""

from __future__ import annotations

import copy
import gc
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvideo.block_sparse import BlockPattern, TileLayout, block_sparse_attention
from fastvideo.block_sparse.pattern import reusable_pattern


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


@pytest.mark.parametrize("size", [2.7, 2.0, True, "2"])
def test_layout_refuses_sizes_that_are_no_integers(size) -> None:
    with pytest.raises(TypeError, match="integers as tile sizes"):
        TileLayout.from_sizes([3, size])


@pytest.mark.parametrize("sizes", [(8.0, 4), (8, 4.0), (True, 4), ("8", 4)])
def test_uniform_layout_refuses_what_is_no_integer(sizes) -> None:
    with pytest.raises(TypeError, match="integers as num_tokens and tile_size"):
        TileLayout.uniform(*sizes)


def test_layout_refuses_more_tokens_than_int32_counts() -> None:
    assert TileLayout.from_sizes([2**30, 2**30 - 1]).offsets.tolist() == [0, 2**30, 2**31 - 1]
    with pytest.raises(ValueError, match=f"at most {2**31 - 1} tokens.*got {2**31}"):
        TileLayout.from_sizes([2**30, 2**30])


def test_layout_takes_integers_of_any_kind() -> None:
    layout = TileLayout.from_sizes(torch.tensor([2, 3]), order=torch.tensor([4, 3, 2, 1, 0], dtype=torch.uint8))
    layout.validate()
    assert (layout.sizes.tolist(), layout.order.tolist(), layout.order.dtype) == ([2, 3], [4, 3, 2, 1, 0], torch.int32)


@pytest.mark.parametrize("order", [torch.arange(5.0), torch.ones(5, dtype=torch.bool)])
def test_layout_refuses_an_order_that_is_no_integers(order) -> None:
    with pytest.raises(TypeError, match=f"order of an integer type, got {order.dtype}"):
        TileLayout.from_sizes([2, 3], order=order)


@pytest.mark.parametrize(
    ("order", "text"),
    [
        ([0, 1, 2, 3, 3], "0 to 3, sorted 3 in place 4"),
        ([0, 1, 2, 3, 5], "values 0 to 5"),
        ([-1, 1, 2, 3, 4], "values -1 to 4"),
        ([2**32, 1, 2, 3, 4], "values 1 to 2147483647"),
    ],
)
def test_an_order_that_is_no_permutation_is_found(order, text) -> None:
    wrong, right = TileLayout.from_sizes([2, 3], order=torch.tensor(order)), TileLayout.uniform(4, 2)
    lists = torch.zeros(1, 1, 2, 1, dtype=torch.int32)
    for layouts_ in ((wrong, right), (right, wrong)):
        pattern = BlockPattern(*layouts_, lists)
        with pytest.raises(ValueError, match=f"permutation of 0 to 4, got .*{text}"):
            pattern.validate()
        with pytest.raises(ValueError, match="permutation"):
            BlockPattern.from_indices(lists, *layouts_)


@pytest.mark.parametrize(
    ("offsets", "num_tokens", "max_size", "is_uniform", "error", "text"),
    [
        ([0, 2, 5], 5, 3, False, None, None),
        ([0, 2, 6], 5, 4, False, ValueError, "num_tokens=5, got 0 to 6"),
        ([1, 2, 5], 5, 3, False, ValueError, "got 1 to 5"),
        ([0, 6, 5], 5, 6, False, ValueError, "tiles of -1 to 6"),
        ([0, 0, 5], 5, 5, False, ValueError, "tiles of 0 to 5"),
        ([0, 2, 5], 5, 2, False, ValueError, "max_size=3 and is_uniform=False.*got 2 and False"),
        ([0, 2, 5], 5, 3, True, ValueError, "got 3 and True"),
        ([0], 0, 0, True, ValueError, "one or more tiles"),
        ([0.0, 2.0, 5.0], 5, 3, False, TypeError, "int32 offsets and order, got torch.float32"),
    ],
)
def test_layouts_that_contradict_themselves_are_found(offsets, num_tokens, max_size, is_uniform, error, text) -> None:
    dtype = torch.int32 if isinstance(offsets[0], int) else torch.float32
    layout = TileLayout(torch.tensor(offsets, dtype=dtype), num_tokens, max_size, is_uniform)
    if error is None:
        layout.validate()
        return
    with pytest.raises(error, match=text):
        layout.validate()


def test_an_order_made_by_hand_is_checked_for_type_and_length() -> None:
    right = TileLayout.uniform(5, 3)
    for order, error in ((torch.arange(4, dtype=torch.int32), ValueError), (torch.arange(5), TypeError)):
        with pytest.raises(error, match="order"):
            TileLayout(right.offsets, 5, 3, False, order).validate()


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
        ([[0, 2**32 + 1], [1, 2], [2, 3]], None, r"\[0, 4\), got 4294967297"),
        ([[0, 1], [1, 2], [2, 3]], [2, 2**32 + 1, 0], r"\[0, 2\], got 0 to 4294967297"),
        ([[0, 1], [1, 2]], None, "Nq=3"),
        ([[0, 1], [1, 2], [2, 3]], [1, 2], "counts of shape"),
    ],
)
def test_values_that_are_refused(indices, counts, text) -> None:
    counts = None if counts is None else torch.tensor(counts)
    with pytest.raises(ValueError, match=text):
        BlockPattern.from_indices(torch.tensor(indices), *layouts(), counts=counts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64])
def test_lists_and_counts_that_are_no_integers_are_refused(dtype) -> None:
    indices, counts = torch.tensor([[0, 1], [1, 2], [2, 3]]), torch.tensor([1, 1, 1])
    with pytest.raises(TypeError, match=f"indices of an integer type, got {dtype}"):
        BlockPattern.from_indices(indices.to(dtype), *layouts())
    with pytest.raises(TypeError, match=f"counts of an integer type, got {dtype}"):
        BlockPattern.from_indices(indices, *layouts(), counts=counts.to(dtype))


def test_lists_of_small_integers_are_taken() -> None:
    pattern = BlockPattern.from_indices(torch.tensor([[0, 3], [1, 2], [2, 3]], dtype=torch.uint8), *layouts())
    assert (pattern.indices.dtype, pattern.indices[0, 0].tolist()) == (torch.int32, [[0, 3], [1, 2], [2, 3]])


def test_construction_reads_no_values() -> None:
    # A meta tensor holds none, as a CUDA tensor's are not read without waiting.
    layout = TileLayout.from_sizes([2, 3], order=torch.empty(5, dtype=torch.int64, device="meta"))
    assert BlockPattern(layout, layout, torch.empty(1, 1, 2, 1, dtype=torch.int32, device="meta")).counts is None


def test_what_lies_behind_a_count_does_not_matter() -> None:
    pattern = BlockPattern.from_indices(
        torch.tensor([[1, 2**40], [0, 2], [-5, -5]]), *layouts(), counts=torch.tensor([1, 2, 0])
    )
    assert pattern.tile_mask()[0, 0].int().tolist() == [[0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]


def test_lists_in_the_place_of_tensors_are_refused() -> None:
    query, key = layouts()
    lists = [[0, 1], [1, 2], [2, 3]]
    for name, make in (
        ("order", lambda: TileLayout.from_sizes([2, 1], order=[0, 1, 2])),
        ("indices", lambda: BlockPattern(query, key, lists)),
        ("indices", lambda: BlockPattern.from_indices(lists, query, key)),
        ("counts", lambda: BlockPattern.from_indices(torch.tensor(lists), query, key, counts=[2, 2, 2])),
        ("mask", lambda: BlockPattern.from_mask([[True] * 4] * 3, query, key)),
    ):
        with pytest.raises(TypeError, match=f"{name} as a tensor, got list"):
            make()


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


def find(pattern: BlockPattern) -> BlockPattern | None:
    """What a custom op finds by the tensors that it is handed."""
    return reusable_pattern(pattern.indices, pattern.counts, replace(pattern.query_tiles), replace(pattern.key_tiles))


def test_a_reusable_pattern_is_found_by_its_very_tensors() -> None:
    query, key = layouts()
    lists, counts = (
        torch.tensor([[[[0, 1], [1, 2], [2, 3]]]], dtype=torch.int32),
        torch.tensor([[[2, 2, 1]]], dtype=torch.int32),
    )
    plain = BlockPattern(query, key, lists, counts)
    assert plain.derived is None
    assert find(plain) is None
    pattern = plain.reusable()
    assert find(pattern) is pattern
    assert find(plain) is pattern, "they are the same tensors"
    assert pattern.query_tiles.derived == pattern.key_tiles.derived == {}
    assert query.derived is None, "the caller's own layout keeps nothing"
    equal = [lists.clone(), counts.clone()]
    for other in (
        BlockPattern(query, key, equal[0], counts),
        BlockPattern(query, key, lists, equal[1]),
        BlockPattern(query, key, lists),
        BlockPattern(replace(query, offsets=query.offsets.clone()), key, lists, counts),
        BlockPattern(query, replace(key, offsets=key.offsets.clone()), lists, counts),
        BlockPattern(replace(query, order=query.order.flip(0)), key, lists, counts),
        BlockPattern(query, replace(key, order=None), lists, counts),
    ):
        assert find(other) is None
    one = BlockPattern(query, query, lists[..., :1]).reusable()
    assert one.query_tiles is one.key_tiles
    assert one.query_tiles.derived == {}
    place = id(pattern.indices)
    del pattern
    gc.collect()
    assert find(plain) is None, "it goes with the last reference"
    assert id(plain.indices) == place


@pytest.mark.parametrize("compiles", [False, True], ids=["eager", "compiled"])
def test_both_passes_find_a_reusable_pattern(compiles, monkeypatch) -> None:
    found: list[BlockPattern | None] = []
    monkeypatch.setattr(
        "fastvideo.block_sparse.attention.reusable_pattern", lambda *x: found.append(reusable_pattern(*x)) or found[-1]
    )
    query, key = layouts()
    pattern = BlockPattern(query, key, torch.zeros(1, 1, 3, 1, dtype=torch.int32)).reusable()
    q, k, v = (torch.randn(1, n, 2, 8, requires_grad=True) for n in (8, 11, 11))
    attend = torch.compile(block_sparse_attention, fullgraph=True, backend="aot_eager") if compiles else block_sparse_attention
    with torch.no_grad():
        attend(q, k, v, pattern)
    attend(q, k, v, pattern).sum().backward()
    assert found == [pattern] * 3


@pytest.mark.parametrize("name", ["indices", "counts", "query offsets", "key order"])
def test_nothing_kept_is_used_after_a_change_in_place(name) -> None:
    query, key = layouts()
    lists, counts = (
        torch.tensor([[[[0, 1], [1, 2], [2, 3]]]], dtype=torch.int32),
        torch.tensor([[[2, 2, 1]]], dtype=torch.int32),
    )
    pattern = BlockPattern(query, key, lists, counts).reusable()
    tensors = {"indices": lists, "counts": counts, "query offsets": query.offsets, "key order": key.order}
    tensors[name].add_(0)
    assert find(pattern) is None
    q, k, v = (torch.randn(1, n, 2, 8) for n in (8, 11, 11))
    lists[0, 0, 2] = torch.tensor([0, 3], dtype=torch.int32)
    changed = block_sparse_attention(q, k, v, pattern)
    assert torch.equal(changed, block_sparse_attention(q, k, v, BlockPattern(query, key, lists.clone(), counts)))


def test_copies_of_a_reusable_pattern_keep_nothing() -> None:
    query, key = layouts()
    pattern = BlockPattern(query, key, torch.zeros(1, 1, 3, 1, dtype=torch.int32)).reusable()
    pattern.derived["plan"] = object()
    for other in (copy.deepcopy(pattern), copy.copy(pattern), pickle.loads(pickle.dumps(pattern)), replace(pattern)):
        assert other.derived is None
        assert torch.equal(other.indices, pattern.indices)
    assert pattern.reusable() is pattern


def test_tensors_whose_changes_nobody_counts_are_not_kept_with() -> None:
    query, key = layouts()
    with torch.inference_mode():
        pattern = BlockPattern(query, key, torch.zeros(1, 1, 3, 1, dtype=torch.int32))
        with pytest.raises(ValueError, match=r"made in torch\.inference_mode"):
            pattern.reusable()
    made_outside = BlockPattern(query, key, torch.zeros(1, 1, 3, 1, dtype=torch.int32))
    with torch.inference_mode():
        assert find(made_outside.reusable()) is not None
