"""Rows, plans and queues of the Hopper kernels, on a CPU in Triton's interpreter; `test_hopper.py` runs this file."""

from __future__ import annotations

import itertools
import pickle
import types
from dataclasses import replace
from types import FunctionType, SimpleNamespace

import pytest
import torch

from fastvideo.block_sparse import BlockPattern, TileLayout, video_geometry
from fastvideo.block_sparse.impl.hopper import dquery_kernel, packing, plan, queues
from fastvideo.video import TileGrid

from . import hopper_rings

# Query tile sizes, key tile sizes, batch, heads.
SHAPES = {
    "even_64": ([64] * 3, [64] * 5, 1, 2),
    "even_60": ([60] * 3, [60] * 4, 1, 1),
    "even_128": ([128] * 2, [128] * 2, 1, 1),
    "even_120": ([120] * 2, [120] * 3, 1, 1),
    "even_16": ([16] * 6, [16] * 9, 1, 1),
    "uneven_pieces": ([65, 65], [65] * 3, 1, 1),
    "edges": ([64, 16, 64, 4, 16, 16, 3, 30, 64, 1, 20], [64, 16, 64, 4, 64, 50, 16, 33, 16, 64, 1, 7, 48], 2, 1),
    "large_and_small": ([100, 3, 128, 17], [128, 77, 5, 64, 90], 1, 2),
    "one_token": ([1], [1], 1, 1),
}


def make_pattern(shape: str, *, ordered: bool, shared: bool = False) -> BlockPattern:
    query_sizes, key_sizes, batch, heads = SHAPES[shape]
    generator = torch.Generator().manual_seed(2)
    layouts = [
        TileLayout.from_sizes(sizes, order=torch.randperm(sum(sizes), generator=generator) if ordered else None)
        for sizes in (query_sizes, key_sizes)
    ]
    extent = (1, 1) if shared else (batch, heads)
    mask = torch.rand(*extent, len(query_sizes), len(key_sizes), generator=generator) < 0.6
    if len(query_sizes) > 1:
        mask[0, 0, 1] = False
    mask[..., -1, -1] = True
    return BlockPattern.from_mask(mask, *layouts)


def walks_of(
    pattern: BlockPattern,
    own: packing.PackedLayout,
    walked: packing.PackedLayout,
    heads: tuple[int, int, int],
    *,
    by_key: bool = False,
) -> plan.Plan:
    return plan.planner_of(pattern, own, walked, heads, by_key=by_key)(pattern, own, walked, 0)


def tokens_of(packed: packing.PackedLayout) -> torch.Tensor:
    if packed.row_token is None:
        return torch.arange(packed.max_rows)
    return packed.row_token


def partners(block: int, counts: torch.Tensor) -> tuple[int, ...]:
    """Both blocks of a block's pair, or the one that is there."""
    joint, end = counts.tolist()
    first, end = (0, joint) if block < joint else (joint, end)
    i = first + (block - first) // 2 * 2
    return tuple(range(i, min(i + 2, end)))


# The kernels' own rule, for numbers.
place_in_turn = FunctionType(
    dquery_kernel.place_in_turn.fn.__code__,
    {"gl": SimpleNamespace(where=lambda is_so, one, other: one if is_so else other)},
)


def walk(
    walks: plan.Plan, head: int, block: int, counts: torch.Tensor, is_back: bool = False
) -> list[tuple[int, torch.Tensor]]:
    """Half steps of one block: the 64 packed rows that are loaded, and the mask as bytes (-1 where there is none)."""
    g = head if walks.rows.shape[0] > 1 else 0
    o_rows, o_masks, clean, boxes, steps, halves, shared, in_rows = walks.meta[g, block].tolist()
    assert halves <= 2 * steps
    assert in_rows == steps - shared // 2
    assert shared % 2 == 0
    pair = partners(block, counts)
    assert len(pair) == 2 or shared == 0
    found = []
    for half in range(halves):
        if half < 2 * shared:
            ring = walks.meta[g, pair[half // 2 % 2]].tolist()
            place = place_in_turn(half // 4 * 2 + half % 2, shared, 2 * ring[2] - shared, is_back)
            rows = walks.rows[g, ring[0] + place] + torch.arange(64)
        elif half < 2 * boxes:
            place = place_in_turn(half - shared, shared, 2 * clean - shared, is_back)
            rows = walks.rows[g, o_rows + place] + torch.arange(64)
        else:
            first = o_rows + 2 * boxes - shared + 4 * (half - 2 * boxes)
            rows = (walks.rows[g, first : first + 4, None] + torch.arange(16)).flatten()
        mask = torch.full((4,), -1)
        if half >= 2 * clean:
            word = int(walks.masks[g, o_masks + half - 2 * clean])
            mask = torch.tensor([word >> 8 * j & 255 for j in range(4)])
        found.append((rows, mask))
    return found


def seen_by_rows(mask: torch.Tensor, box_tokens: int) -> torch.Tensor:
    """What 64 rows see of 64 loaded rows, bool `[64, 64]`."""
    granule, inside = torch.arange(64) // 16, torch.arange(64) % 16
    if mask[0] < 0:
        return (torch.arange(64) < box_tokens).expand(64, 64)
    byte = mask[granule]
    return ((byte[None] >> granule[:, None]) & 1 == 1) & (inside + (byte >> 4) <= 15)[None]


def check_walks(
    walks: plan.Plan, pattern: BlockPattern, own: packing.PackedLayout, walked: packing.PackedLayout, by_key: bool = False
) -> None:
    """Blocks meet every listed pair of tokens once, and no other."""
    expected = pattern.token_mask().flatten(0, 1)
    own_token, token = tokens_of(own), tokens_of(walked)
    for head, mask in enumerate(expected):
        met = torch.zeros(own.layout.num_tokens, walked.layout.num_tokens, dtype=torch.int32)
        for block in range(int(own.counts[1])):
            mine = own_token[block * 64 : block * 64 + 64]
            for rows, half_mask in walk(walks, head, block, own.counts):
                seen = seen_by_rows(half_mask, 64 if by_key else walked.box_tokens)
                if by_key:
                    # Probabilities of packed query rows that are pads are 0.
                    seen = seen & (token[rows] >= 0)
                assert (token[rows] >= 0)[None].expand(64, 64)[seen & (mine >= 0)[:, None]].all()
                real = (mine >= 0)[:, None] & seen
                i, j = real.nonzero(as_tuple=True)
                met.index_put_((mine[i].long(), token[rows][j].long()), torch.ones(len(i), dtype=torch.int32), accumulate=True)
        assert torch.equal(met, (mask.T if by_key else mask).int())


@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize(
    ("shape", "ordered", "chunk"),
    [
        *((shape, ordered, 2048) for shape in SHAPES for ordered in (True, False)),
        *((shape, True, 8) for shape in ("edges", "even_120")),
    ],
)
def test_walks_meet_what_the_pattern_lists(
    shape: str, ordered: bool, chunk: int, by_key: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_MARK_CHUNK", chunk)
    monkeypatch.setattr(plan, "_CHUNK", min(chunk, 256))
    pattern = make_pattern(shape, ordered=ordered)
    batch, heads = SHAPES[shape][2:]
    layouts = [packing.pack_layout(x) for x in (pattern.query_tiles, pattern.key_tiles)]
    own, walked = layouts[::-1] if by_key else layouts
    walks = walks_of(pattern, own, walked, (0, batch * heads, batch * heads), by_key=by_key)
    check_walks(walks, pattern, own, walked, by_key)


def overlapping_pattern(kind: str, overlap: float) -> BlockPattern:
    """Lists of which each tile shares about so much with the next; the third is empty, and the lengths of some differ."""
    sizes = {
        "even": ([64] * 7, [64] * 60),
        "two_blocks": ([128] * 4, [128] * 24),
        "sixty": ([60] * 6, [60] * 50),
        "small": ([16] * 27, [64] * 40 + [16] * 9),
        "mixed": ([64, 16, 64, 4, 16, 64, 30, 16, 64, 1, 20, 64, 100, 64, 9, 70, 16, 16], [64, 16, 64, 64, 50] * 9),
    }[kind]
    generator = torch.Generator().manual_seed(7)
    num_queries, num_keys = len(sizes[0]), len(sizes[1])
    scores = torch.rand(1, 2, num_queries, num_keys, generator=generator)
    common = torch.rand(1, 2, 1, num_keys, generator=generator) < 0.5
    mask = torch.where(torch.rand(scores.shape, generator=generator) < overlap, common, scores < 0.5)
    mask[..., 2, :] = False
    mask[..., 3, : num_keys // 2] = False
    layouts = [TileLayout.uniform(sum(x), x[0]) if len(set(x)) == 1 else TileLayout.from_sizes(x) for x in sizes]
    return BlockPattern.from_mask(mask, *layouts)


def pairs_of(
    walks: plan.Plan, g: int, counts: torch.Tensor, unit: int
) -> tuple[list[hopper_rings.Pair], list[list[list[int]]]]:
    """Pairs of blocks for the model of rings, in steps (`unit` 1) or half steps, and what each partner's blocks must read."""
    pairs, expected = [], [[], []]
    for first in [block for block in range(int(counts[1])) if partners(block, counts)[0] == block]:
        found, shared = [None, None], int(walks.meta[g, first, 6])
        for wg, block in enumerate(partners(first, counts)):
            o_rows, _, _, boxes, steps, halves, _, in_rows = walks.meta[g, block].tolist()
            assert int(walks.meta[g, block, 6]) == shared
            row = walks.rows[g]
            own = [tuple(row[o_rows + i : o_rows + i + 1].tolist()) for i in range(2 * boxes - shared)]
            o_granules = o_rows + 2 * boxes - shared
            own += [tuple(row[o_granules + 4 * i : o_granules + 4 * i + 4].tolist()) for i in range(2 * (steps - boxes))]
            if unit == 1:
                own = [own[i] + own[i + 1] for i in range(0, len(own), 2)]
                assert len(own) == in_rows
            else:
                own = own[: halves - shared]
            found[wg] = hopper_rings.Walk(own, steps if unit == 1 else halves)
            read = [
                tuple(rows[:: 64 if i < 2 * boxes else 16].tolist())
                for i, (rows, _) in enumerate(walk(walks, g, block, counts))
            ]
            expected[wg].append(list(itertools.chain(*read)))
        pairs.append(hopper_rings.Pair(tuple(found), shared))
    return pairs, expected


@pytest.mark.parametrize(("overlap", "chunk", "least"), [(0.0, 256, 0.0), (0.5, 16, 0.0), (1.0, 256, 1 / 8)])
@pytest.mark.parametrize("kind", ["even", "two_blocks", "sixty", "small", "mixed"])
def test_partners_share_what_both_list(
    kind: str, overlap: float, chunk: int, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks read each of their rows once, through two rings whose stages both partners let go of, whoever is late."""
    pattern = overlapping_pattern(kind, overlap)
    own, walked = (packing.pack_layout(x) for x in (pattern.query_tiles, pattern.key_tiles))
    monkeypatch.setattr(plan, "_MARK_CHUNK", chunk)
    monkeypatch.setattr(plan, "_CHUNK", chunk)
    monkeypatch.setattr(plan, "_LEAST_SHARED", least)
    walks = walks_of(pattern, own, walked, (0, 2, 2))
    check_walks(walks, pattern, own, walked)
    if overlap == 1.0 or kind == "two_blocks":
        assert int(walks.meta[:, : int(own.counts[1]), 6].sum()) > 0
    for g, stages in ((0, (1, 2)), (1, (2, 2))):
        pairs, expected = pairs_of(walks, g, own.counts, 1)
        found = hopper_rings.simulate_forward(pairs, *stages, seed=g)
        for steps, read in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
            rows = list(itertools.chain(*steps))
            assert rows[: len(read)] == read
            # What fills up the last step.
            assert len(rows) - len(read) < 5
        pairs, expected = pairs_of(walks, g, own.counts, 2)
        found = hopper_rings.simulate_dq(pairs, 3, seed=g)
        assert [[list(itertools.chain(*halves)) for halves in found[wg]] for wg in (0, 1)] == expected


def test_the_model_of_rings_finds_a_standstill_and_a_wrong_phase() -> None:
    entries = [(i,) for i in range(40)]
    unequal = (hopper_rings.Walk(entries[:2], 3), hopper_rings.Walk(entries[2:4], 1))
    with pytest.raises(RuntimeError, match="nobody can go on"):
        hopper_rings.simulate_forward([hopper_rings.Pair(unequal, 2)], 1, 2, 0)
    # The second has nothing of its own to wait for before it shares again, while the first ring has long to go.
    first = hopper_rings.Pair((hopper_rings.Walk(entries[:9], 9), hopper_rings.Walk([], 0)), 0)
    second = hopper_rings.Pair((hopper_rings.Walk(entries[10:11], 2), hopper_rings.Walk(entries[20:21], 2)), 2)
    pairs = [*[first] * 4, second, first, second]
    for seed in range(9):
        assert hopper_rings.simulate_forward(pairs, 1, 2, seed)[1][4::2] == [[(10,), (20,)]] * 2

    def is_wrong(seed: int) -> bool:
        try:
            found = hopper_rings.simulate_forward(pairs, 1, 2, seed, awaits_partner=False)
        except (AssertionError, RuntimeError):
            return True
        return found[1][4::2] != [[(10,), (20,)]] * 2

    assert any(is_wrong(seed) for seed in range(9))


@pytest.mark.parametrize("shape", ["even_60", "edges", "large_and_small"])
def test_every_token_has_one_packed_row(shape: str) -> None:
    for layout in (make_pattern(shape, ordered=True).query_tiles, make_pattern(shape, ordered=False).key_tiles):
        packed = packing.pack_layout(layout)
        token = tokens_of(packed)
        assert torch.equal(token[token >= 0].sort().values.long(), torch.arange(layout.num_tokens))
        assert int(packed.counts[1]) <= packed.max_blocks
        assert (token[int(packed.counts[1]) * 64 :] == -1).all()


@pytest.mark.parametrize("num_text", [0, 7])
def test_layouts_of_a_video_are_packed_once(num_text: int) -> None:
    geometry = video_geometry(TileGrid((5, 3, 3), (4, 2, 2)), "cpu", num_text)
    assert geometry is video_geometry(TileGrid((5, 3, 3), (4, 2, 2)), "cpu", num_text)
    for layout in filter(None, (geometry.video_tiles, geometry.key_tiles, geometry.text_tiles)):
        packed = packing.pack_layout(layout)
        assert packing.pack_layout(layout) is packed
        assert pickle.loads(pickle.dumps(layout)).derived == {}
        alone = packing.pack_layout(replace(layout, derived=None))
        assert alone is not packed
        for name in ("piece_row", "counts", "row_token"):
            assert torch.equal(getattr(packed, name), getattr(alone, name))


def test_small_tiles_share_a_block() -> None:
    packed = packing.pack_layout(TileLayout.from_sizes([64, 16, 4, 16, 30, 64, 1, 16, 32, 20]))
    # Five tiles of one granule fill two blocks, three of two granules two more, and two of four granules one each.
    assert packed.counts.tolist() == [4, 6]
    assert packed.block_tiles[:6].tolist() == [[1, 2, 3, 6], [7, -1, -1, -1], [4, 4, 8, 8], [9, 9, -1, -1], [0] * 4, [5] * 4]
    assert packed.piece_row.tolist() == [256, 0, 16, 32, 128, 320, 48, 64, 160, 192]


def test_half_steps_follow_real_tokens() -> None:
    """16 tiles of 16 tokens and one of 64 make two half steps of 128 rows... and one box joins the granules."""
    queries, keys = TileLayout.uniform(64, 64), TileLayout.from_sizes([64] + [16] * 8)
    pattern = BlockPattern.from_mask(torch.ones(1, 9, dtype=torch.bool), queries, keys)
    own, walked = packing.pack_layout(queries), packing.pack_layout(keys)
    walks = walks_of(pattern, own, walked, (0, 1, 1))
    assert walks.meta[0, 0, 2:].tolist() == [0, 0, 2, 3, 0, 2]


@pytest.mark.parametrize("by_key", [True, False])
@pytest.mark.parametrize("sizes", [[128] * 24, [120, 116] * 12])
def test_walks_of_tiles_of_two_blocks_have_room(sizes: list[int], by_key: bool) -> None:
    """Each block of a tile walks the tile's whole list."""
    layout = TileLayout.from_sizes(sizes) if len(set(sizes)) > 1 else TileLayout.uniform(sum(sizes), sizes[0])
    pattern = BlockPattern.from_mask(torch.ones(24, 24, dtype=torch.bool), layout, layout)
    packed = packing.pack_layout(layout)
    walks = walks_of(pattern, packed, packed, (0, 1, 1), by_key=by_key)
    row, mask, clean_steps, box_steps, _, halves, shared, _ = walks.meta[0, : int(packed.counts[1])].unbind(-1)
    assert (halves >= 48).all()
    assert int((row + 2 * box_steps - shared + 4 * (halves - 2 * box_steps)).max()) <= walks.rows.shape[1]
    assert int((mask + halves - 2 * clean_steps).max()) <= walks.masks.shape[1]


def test_packed_rows_and_statistics() -> None:
    pattern = make_pattern("edges", ordered=True)
    batch, heads, head_size = 2, 2, 16
    packed = packing.pack_layout(pattern.query_tiles)
    token = tokens_of(packed)[: int(packed.counts[1]) * 64]
    num_tokens = packed.layout.num_tokens
    q, do, out = torch.randn(3, batch, num_tokens, heads, head_size).unbind(0)
    lse, dlse = torch.randn(batch, num_tokens, heads), torch.randn(batch, num_tokens, heads)
    lse[0, 0] = -torch.inf
    rows = [torch.full((3, packed.max_rows, head_size), torch.nan) for _ in range(2)]
    stats = torch.full((3, packed.max_rows, 2), torch.nan)
    strides = (*q.stride()[:3], *do.stride()[:3], *dlse.stride())
    packing.pack_queries_kernel[(3 * packed.max_blocks,)](
        q, do, out, lse, dlse, *rows, stats, packed.row_token, packed.counts, *strides, 1, packed.max_blocks, heads, num_tokens,
        D=head_size, PACK=True,
    )  # fmt: skip
    real = token >= 0
    for place in range(3):
        b, h = divmod(place + 1, heads)
        for got, x in zip(rows, (q, do), strict=True):
            assert torch.equal(got[place, : len(token)][real], x[b, token[real].long(), h])
            assert not got[place, : len(token)][~real].any()
        seen = lse[b, token[real].long(), h] != -torch.inf
        delta = (out * do).sum(-1) - dlse
        got = stats[place, : len(token)]
        torch.testing.assert_close(
            got[real][seen], torch.stack([lse / 0.6931471805599453, delta], -1)[b, token[real].long(), h][seen]
        )
        assert (got[~real] == torch.tensor([torch.inf, 0.0])).all()
        assert (got[real][~seen] == torch.tensor([torch.inf, 0.0])).all()


@pytest.mark.parametrize("sign", [1, 0, -1])
def test_packed_keys_carry_the_sign_of_the_scale(sign: int) -> None:
    layout = make_pattern("edges", ordered=True).key_tiles
    packed = packing.pack_layout(layout)
    token = tokens_of(packed)[: int(packed.counts[1]) * 64]
    key, value = torch.randn(2, 2, layout.num_tokens, 3, 16).unbind(0)
    rows = [torch.full((2, packed.max_rows, 16), torch.nan) for _ in range(2)]
    strides = (*key.stride()[:3], *value.stride()[:3])
    packing.pack_keys_kernel[(2 * packed.max_blocks,)](
        key, value, *rows, packed.row_token, packed.counts, *strides, 2, packed.max_blocks, 3, D=16, SIGN=sign
    )
    for place in range(2):
        b, h = divmod(place + 2, 3)
        for got, x in zip(rows, (key * sign, value), strict=True):
            assert torch.equal(got[place, : len(token)][token >= 0], x[b, token[token >= 0].long(), h])
            assert not got[place, : len(token)][token < 0].any()


def test_shared_lists_are_planned_once() -> None:
    pattern = make_pattern("edges", ordered=False, shared=True)
    own, walked = (packing.pack_layout(x) for x in (pattern.query_tiles, pattern.key_tiles))
    assert walks_of(pattern, own, walked, (3, 2, 8)).rows.shape[0] == 1


def queues_of(lengths: torch.Tensor, num_blocks: int, num_queues: int) -> list[list[int]]:
    """The places of each queue, for walks of such half steps of two query heads together."""
    heads, max_blocks = lengths.shape
    meta = torch.full((2 * heads, max_blocks, 8), -1, dtype=torch.int32)
    meta[::2, :, 5], meta[1::2, :, 5] = lengths // 3, lengths - lengths // 3
    own = types.SimpleNamespace(max_blocks=max_blocks, counts=torch.tensor([0, num_blocks], dtype=torch.int32))
    fill = queues.QueueFiller(own, heads, 2, num_queues, max_blocks)
    places, ends, found = fill(plan.Plan(meta, meta, meta), own)
    assert torch.equal(found[:, :num_blocks], lengths[:, :num_blocks].int())
    assert (ends % num_queues).tolist() == list(range(num_queues))
    return [places[: end // num_queues, i].tolist() for i, end in enumerate(ends.tolist())]


@pytest.mark.parametrize("num_queues", [6, 264])
@pytest.mark.parametrize("kind", ["even", "none", "one_long", "some_long", "heads_differ"])
def test_every_block_is_worked_on_once(kind: str, num_queues: int) -> None:
    lengths = torch.randint(3, 9, (5, 70), generator=torch.Generator().manual_seed(0))
    if kind in ("even", "none"):
        lengths[:] = 7 if kind == "even" else 0
    elif kind == "one_long":
        lengths[3, 5] = 10**6
    else:
        lengths[:, : 20 if kind == "some_long" else 60] *= 1 if kind == "heads_differ" else 12
        lengths[0] *= 50 if kind == "heads_differ" else 1
    for num_blocks in (1, 64):
        # Garbage stands behind the last block.
        found = queues_of(lengths.masked_fill(torch.arange(70) >= num_blocks, 10**6), num_blocks, num_queues)
        assert sorted(itertools.chain(*found)) == [70 * head + block for head in range(5) for block in range(num_blocks)]


def test_queues_are_even_and_go_head_by_head() -> None:
    """As by key at 21 x 45 x 80 in tiles of 4 x 4 x 4 where tile means are random: 85 blocks of several tiles are long."""
    generator = torch.Generator().manual_seed(0)
    heads, num_long, num_blocks, num_queues = 8, 85, 1185, 264
    lengths = torch.cat(
        [
            torch.randint(600, 900, (heads, num_long), generator=generator),
            torch.randint(40, 110, (heads, num_blocks - num_long), generator=generator),
        ],
        1,
    )
    found = queues_of(lengths, num_blocks, num_queues)
    work = [float(lengths.flatten()[queue].sum()) for queue in found]
    assert max(work) < 1.03 * sum(work) / num_queues
    # Dealt one after the other they are far apart.
    dealt = torch.zeros(-(-lengths.numel() // num_queues) * num_queues)
    dealt[: lengths.numel()] = lengths.sort(1, descending=True).values.flatten()
    assert dealt.view(-1, num_queues).sum(0).max() > 1.2 * sum(work) / num_queues
    starts: list[list[float]] = [[] for _ in range(heads)]
    for queue in found:
        is_long = [place % num_blocks < num_long for place in queue]
        assert is_long == sorted(is_long, reverse=True)
        begin = lengths.flatten()[queue].cumsum(0) - lengths.flatten()[queue]
        for place, start in list(zip(queue, begin.tolist(), strict=True))[sum(is_long) :]:
            starts[place // num_blocks].append(start)
    # The last block of a head begins no later than a few blocks after the first of the next head.
    assert all(max(starts[head]) < min(starts[head + 1]) + 4 * 110 for head in range(heads - 1))
