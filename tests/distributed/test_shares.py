"""Who gets which heads and keys: properties that hold for any numbers, without any process group."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvideo.attention import shared_call
from fastvideo.attention.shared_call import SharedCall, num_head_groups
from fastvideo.distributed import split_lengths
from fastvideo.distributed.collectives import Launched, give_back, kept, pack, unpack
from fastvideo.distributed.layouts import ranked_layouts, resolve_layout
from fastvideo.distributed.mesh import LOCAL, SequenceGroup
from fastvideo.distributed.precision import from_float8, to_float8
from fastvideo.distributed.ring import balanced_pieces, causal_steps, regroup_route, ring_steps, way_home
from fastvideo.distributed.routes import Route, consecutive, gather_route
from fastvideo.distributed.shards import resolve_lengths, shard_sequence
from fastvideo.distributed.ulysses import cut_heads, group_lengths, head_route, join_heads, share_heads, token_route

LENGTHS = st.lists(st.integers(0, 7), min_size=1, max_size=5).filter(sum)
FAST = settings(max_examples=60, deadline=None)


def send(tensors: list[torch.Tensor], routes: list[Route]) -> list[torch.Tensor]:
    """Do what a process group does: cut every rank's tensor, and join what comes for each."""
    flats = [pack(x, route.send) for x, route in zip(tensors, routes, strict=True)]
    sizes = []
    for route in routes:
        row = torch.Size(route.source).numel() // max(1, route.source[route.send.dim])
        sizes.append([row * sum(last - first for first, last in part) for part in route.send.parts])
    parts = [flat.split(size) for flat, size in zip(flats, sizes, strict=True)]
    ranks = range(len(tensors))
    return [unpack(torch.cat([parts[r][rank] for r in ranks]), routes[rank].receive, routes[rank].shape) for rank in ranks]


def shards(x: torch.Tensor, dim: int, lengths: list[int]) -> list[torch.Tensor]:
    return list(x.split(list(lengths), dim))


@FAST
@given(st.integers(1, 14), st.integers(1, 5), st.integers(1, 6), st.integers(1, 3))
def test_every_head_has_one_owner_who_holds_what_it_reads(kv_heads: int, readers: int, size: int, num_pieces: int) -> None:
    heads = kv_heads * readers
    owned = []
    for piece in range(num_pieces):
        shares = share_heads(heads, kv_heads, size, piece, num_pieces)
        for rank in range(size):
            (start, stop), (first, last) = shares.query[rank], shares.key[rank]
            owned += range(start, stop)
            index = shares.key_index(rank, heads, kv_heads)
            assert (stop - start) % max(1, len(index)) == 0
            read = [first + index[i * len(index) // (stop - start)] for i in range(stop - start)]
            assert read == [head // readers for head in range(start, stop)]
            assert set(read) == set(range(first, last))
    assert sorted(owned) == list(range(heads))


@FAST
@given(LENGTHS, st.integers(1, 9), st.booleans())
def test_heads_go_for_tokens_and_come_back(lengths: list[int], heads: int, is_cut: bool) -> None:
    size, shares = len(lengths), tuple(lengths)
    is_cut = is_cut and size > 1
    heads = heads * 3 * size if is_cut else heads
    x = torch.arange(2 * sum(lengths) * heads * 3.0).view(2, sum(lengths), heads, 3)
    num_groups = 3 if is_cut else 1
    cut = [cut_heads(shard, size, group_lengths(heads // size, num_groups)) for shard in shards(x, 1, lengths)]
    back: list[list[torch.Tensor]] = [[] for _ in lengths]
    for number in range(num_groups):
        owners = share_heads(heads, heads, size, number, num_groups).query
        there = [head_route(cut[rank][number].shape, owners, shares, rank) for rank in range(size)]
        arrived = send([pieces[number] for pieces in cut], there)
        for rank, (start, stop) in enumerate(owners):
            assert torch.equal(arrived[rank], x[:, :, start:stop])
        home = [token_route(arrived[rank].shape, owners, shares, rank, is_group=is_cut) for rank in range(size)]
        for rank, piece in enumerate(send(arrived, home)):
            back[rank].append(piece)
    for rank, shard in enumerate(shards(x, 1, lengths)):
        assert torch.equal(join_heads(back[rank], size), shard)


@pytest.mark.parametrize("lengths", [(4, 4), (5, 3), (8,)])
@pytest.mark.parametrize("batch", [1, 2])
def test_what_is_sent_is_contiguous(lengths: tuple[int, ...], batch: int) -> None:
    """The gradient of a sum is one number, expanded."""
    flat = pack(torch.ones(()).expand(batch, 8, 2), consecutive(1, lengths))
    assert flat.is_contiguous()
    assert torch.equal(flat, torch.ones(batch * 16))


@FAST
@given(LENGTHS, st.integers(0, 2))
def test_a_gradient_takes_the_route_backwards(lengths: list[int], dim: int) -> None:
    """What was sent to many comes back as a sum: the exchange backwards is its transpose."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = [draw(*[length if i == dim else 2 for i in range(3)]) for length in lengths]
    routes = [gather_route(x.shape, dim, tuple(lengths)) for x in inputs]
    outputs = send(inputs, routes)
    assert all(torch.equal(output, torch.cat(inputs, dim)) for output in outputs)
    cotangents = [draw(*output.shape) for output in outputs]
    grads = send(cotangents, [route.back() for route in routes])
    there = sum((output * other).sum() for output, other in zip(outputs, cotangents, strict=True))
    back = sum((x * grad).sum() for x, grad in zip(inputs, grads, strict=True))
    torch.testing.assert_close(there, back)


@FAST
@given(LENGTHS)
def test_regrouped_shards_are_the_balanced_pieces_and_come_back(lengths: list[int]) -> None:
    x = torch.arange(2.0 * sum(lengths)).view(2, -1)
    own = shards(x, 1, lengths)
    routes = [regroup_route(shard.shape, 1, lengths, rank) for rank, shard in enumerate(own)]
    there = send(own, routes)
    for regrouped, pieces in zip(there, balanced_pieces(sum(lengths), len(lengths)), strict=True):
        assert torch.equal(regrouped, torch.cat([x[:, first:last] for first, last in pieces], 1))
    back = send(there, [route.back() for route in routes])
    assert all(torch.equal(shard, home) for shard, home in zip(own, back, strict=True))


def positions(pieces: tuple[tuple[int, int], ...]) -> list[int]:
    return [token for first, last in pieces for token in range(first, last)]


@FAST
@given(LENGTHS, st.booleans())
def test_a_ring_meets_every_pair_once_with_the_keys_that_were_sent(lengths: list[int], is_causal: bool) -> None:
    size, total = len(lengths), sum(lengths)
    held = balanced_pieces(total, size) if is_causal else list(consecutive(0, lengths).parts)
    keys = [torch.tensor(positions(pieces)).view(1, -1, 1, 1) for pieces in held]
    steps = [ring_steps(rank, keys[rank].shape[1], lengths, keys[rank].shape, is_causal=is_causal) for rank in range(size)]
    met = torch.zeros(total, total, dtype=torch.int64)
    for number in range(size):
        arrived = keys if number == 0 else send(keys, [steps[rank][number].fetch for rank in range(size)])
        for rank in range(size):
            step = steps[rank][number]
            seen = arrived[rank][0, slice(*step.keys), 0, 0].tolist()
            assert seen == positions(step.columns)
            for i, row in enumerate(positions(held[rank])[slice(*step.rows)]):
                met[row, seen[: i + 1] if step.is_causal else seen] += 1
        if number > 0:
            home = send(arrived, [way_home(steps[rank][number].fetch) for rank in range(size)])
            assert all(torch.equal(back, own[:, : back.shape[1]]) for back, own in zip(home, keys, strict=True))
            assert sum(back.shape[1] for back in home) == sum(x.shape[1] for x in arrived)
    expected = torch.ones(total, total, dtype=torch.int64)
    assert torch.equal(met, expected.tril() if is_causal else expected)


@FAST
@given(st.integers(1, 40), st.integers(1, 6))
def test_causal_work_is_balanced_and_whole(total: int, size: int) -> None:
    met, work = torch.zeros(total, total, dtype=torch.int64), []
    for rank in range(size):
        rows, done = positions(balanced_pieces(total, size)[rank]), 0
        for step in causal_steps(rank, size, total):
            seen = positions(step.columns)
            assert step.keys == step.columns[0]
            for i, row in enumerate(rows[slice(*step.rows)]):
                met[row, seen[: i + 1] if step.is_causal else seen] += 1
                done += i + 1 if step.is_causal else len(seen)
        work.append(done)
    assert torch.equal(met, torch.ones_like(met).tril())
    assert max(work) - min(work) <= 2 * total  # rows of one piece more, at most


def group(size: int, ring: int | None = None) -> SequenceGroup:
    ranks = tuple(range(size))
    if ring is None:
        return SequenceGroup("all", ranks, 0)
    parts = [SequenceGroup(name, ranks[:n], 0) if n > 1 else LOCAL for name, n in (("r", ring), ("u", size // ring))]
    return SequenceGroup("" if 1 < ring < size else "all", ranks, 0, *parts)


CALL = {"heads": 40, "kv_heads": 40, "seq": 75600, "head_size": 128}


@pytest.mark.parametrize(
    ("wish", "where", "call", "names"),
    [
        ("auto", LOCAL, {}, ["local"]),
        ("auto", group(8), {}, ["ulysses"]),
        ("auto", group(4), {"heads": 1, "kv_heads": 1}, ["ring", "gather"]),
        ("auto", group(4, ring=2), {}, ["ulysses+ring", "ulysses+gather"]),
        ("auto", group(4, ring=4), {}, ["ring", "gather"]),
        ("auto", group(4, ring=1), {}, ["ulysses"]),
        ("auto", group(4), {"heads": 1, "kv_heads": 1, "needs_whole_sequence": True}, ["ulysses"]),
        ("auto", group(4, ring=2), {"needs_whole_sequence": True}, ["ulysses"]),
        ("ulysses", group(4, ring=2), {}, ["ulysses"]),
        ("gather", group(4, ring=2), {}, ["ulysses+gather"]),
        ("ring", group(4), {}, ["ring"]),
        ("ulysses", group(4, ring=1), {}, ["ulysses"]),
    ],
)
def test_the_layout_that_a_wish_means(wish, where, call, names) -> None:
    best = ranked_layouts(wish, where, **{**CALL, **call})[0]
    assert resolve_layout(best, where).name in names


def test_auto_ranks_every_layout_of_the_ranks() -> None:
    assert sorted(ranked_layouts("auto", group(4), **CALL)) == ["gather", "ring", "ulysses"]
    assert sorted(ranked_layouts("auto", group(4, ring=2), **CALL)) == ["gather", "ring", "ulysses"]


@pytest.mark.parametrize("wish", ["ring", "gather"])
def test_a_wish_that_contradicts_the_mesh(wish) -> None:
    with pytest.raises(ValueError, match="nobody to share"):
        resolve_layout(wish, group(4, ring=1))


def test_ulysses_uses_every_dim_of_a_mesh() -> None:
    both = resolve_layout("ulysses", group(4, ring=2))
    assert (both.ring.size, both.ulysses.size, both.swaps_all) == (2, 2, True)
    flat = resolve_layout("ulysses", group(4, ring=4))
    assert (flat.ring.size, flat.ulysses.size, flat.swaps_all) == (1, 4, False)


def test_lengths() -> None:
    for length, size in itertools.product(range(9), range(1, 5)):
        lengths = split_lengths(length, size)
        assert (sum(lengths), len(lengths)) == (length, size)
        assert max(lengths) - min(lengths) <= 1
    assert resolve_lengths(3, group(2)) == (3, 3)
    assert resolve_lengths(3, group(2), [3, 0]) == (3, 0)
    for given_lengths, error, text in (
        ((3,), ValueError, "of the 2 ranks"),
        ((4, 3), ValueError, "give rank 0 4 tokens, and its tensor has 3"),
        ((3, -1), ValueError, "shard_lengths >= 0"),
        ((3, 1.5), TypeError, "a tuple of integers"),
        (6, TypeError, "a tuple of integers"),
    ):
        with pytest.raises(error, match=text):
            resolve_lengths(3, group(2), given_lengths)
    with pytest.raises(ValueError, match=r"add up to 5 tokens, got \(4,\)"):
        shard_sequence(torch.ones(5), 0, LOCAL, shard_lengths=(4,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_float8_keeps_each_value_to_a_sixteenth(dtype) -> None:
    x = torch.randn(3, 5, 2, 13, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    x[0, 0, 0] = 0
    x[0, 1] *= 1e4  # an outlier costs its own token alone
    sent = to_float8(x)
    assert (sent.dtype, sent.shape) == (torch.uint8, (3, 5, 2, 17))
    found = from_float8(sent, dtype)
    assert found.dtype == dtype
    smallest = x.abs().amax(-1, keepdim=True) / 448 * 2**-9
    assert ((found - x).abs() <= x.abs() / 15 + smallest).all()
    assert (found[0, 0, 0] == 0).all()


@pytest.mark.parametrize(
    ("layout", "wanted", "expected"),
    [("ulysses", None, 1), ("ulysses", 4, 4), ("ulysses", 5, 4), ("gather", None, 1), ("gather", 5, 5), ("ring", 4, 1)],
)
def test_heads_travel_at_once_unless_groups_are_asked_for(layout: str, wanted: int | None, expected: int) -> None:
    call, group = call_of(8), SequenceGroup("", (0, 1), 0)
    assert num_head_groups(call, resolve_layout(layout, group), wanted, is_sparse=False) == expected
    assert num_head_groups(call_of(7), resolve_layout("ulysses", group), 4, is_sparse=False) == 1, "7 heads don't divide"


def call_of(num_heads: int) -> SharedCall:
    shard = torch.empty(1, 1 << 15, num_heads, 128, device="meta")
    return SharedCall(shard, shard, shard, None, None, None, (1 << 15,) * 2, (1 << 15,) * 2, False, 1.0, reduces=True)


@pytest.mark.parametrize("num_heads", [1, 2, 5, 8, 20, 40])
@pytest.mark.parametrize("num_groups", [1, 2, 3, 4, 7])
def test_groups_hold_all_heads_and_begin_and_end_small(num_heads: int, num_groups: int) -> None:
    lengths = group_lengths(num_heads, num_groups)
    assert (sum(lengths), len(lengths)) == (num_heads, num_groups)
    if num_groups > 2 and num_heads >= num_groups:
        assert lengths[0] == lengths[-1] == min(lengths) > 0


@pytest.mark.parametrize(
    ("num_tokens", "size", "needs_grad", "is_sparse", "kind", "expected"),
    [
        (75_600, 4, False, True, "direct", 3),
        (75_600, 4, True, True, "direct", 3),
        (75_600, 2, False, True, "direct", 3),
        (75_600, 2, True, True, "direct", 3),
        (75_600, 8, False, True, "direct", 1),
        (32_760, 2, False, True, "direct", 1),
        (75_600, 4, False, False, "direct", 3),
        (75_600, 4, True, False, "direct", 1),
        (75_600, 2, False, False, "direct", 1),
        (75_600, 4, False, True, "collective", 1),
        (75_600, 4, False, False, "collective", 1),
    ],
)
def test_an_exchange_is_hidden_where_it_pays(
    num_tokens: int, size: int, needs_grad: bool, is_sparse: bool, kind: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_call, "exchange_kind", lambda _: kind)
    x = torch.empty(1, num_tokens // size, 40, 128, dtype=torch.bfloat16, device="meta", requires_grad=needs_grad)
    lengths = (num_tokens // size,) * size
    call = SharedCall(x, x, x, None, None, None, lengths, lengths, False, 1.0, False)
    layout = resolve_layout("ulysses", SequenceGroup("", tuple(range(size)), 0))
    assert num_head_groups(call, layout, None, is_sparse=is_sparse) == expected
    assert num_head_groups(call, layout, 7, is_sparse=is_sparse) == min(7, 40 // size)
    if not is_sparse:
        mesh = layout._replace(ring=SequenceGroup("", (0, 1), 0))
        assert num_head_groups(call, mesh, None, is_sparse=False) == 1, "keys travel along the ring too"
        gather = layout._replace(ring=layout.ulysses, ulysses=LOCAL, gathers=True)
        assert num_head_groups(call, gather, None, is_sparse=False) == 1


def test_what_a_backend_returns_of_lent_memory_is_copied() -> None:
    route = gather_route((1, 2, 1, 2), 1, (1, 1))
    memory = torch.arange(8.0)
    lent, owned = (Launched(memory[:4].view(1, 2, 1, 2), None, route, None, giver) for giver in (memory.zero_, None))
    view, other = memory[2:6], torch.ones(2)
    copy = kept(view, lent)
    give_back(lent)
    assert copy.tolist() == [2.0, 3.0, 4.0, 5.0]
    assert kept(other, lent) is other
    assert kept(view, owned) is view
    give_back(owned)
