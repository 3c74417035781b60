"""Direct exchanges, with threads for ranks and ordinary memory for what devices share: regions, places and words."""

from __future__ import annotations

import concurrent.futures
import random
import threading
import time

import pytest
import torch

from fastvideo.distributed import direct
from fastvideo.distributed.direct import DirectExchange, direct_exchange, exchange_kind
from fastvideo.distributed.regions import Regions
from fastvideo.distributed.ring import regroup_route, ring_steps
from fastvideo.distributed.routes import gather_route
from fastvideo.distributed.rows import copy_wide, rows_of, rows_of_both
from fastvideo.distributed.ulysses import head_route, share_heads, token_route
from fastvideo.settings import Settings

from .thread_ranks import join, joined, run_ranks, shards


@pytest.mark.parametrize("lengths", [(4, 4, 4), (5, 0, 2)])
@pytest.mark.parametrize("num_heads", [6, 4, 2])
@pytest.mark.parametrize("batch", [1, 2])
def test_heads_go_and_come_back(lengths: tuple[int, ...], num_heads: int, batch: int) -> None:
    whole = torch.randn(batch, sum(lengths), num_heads, 3)
    heads = share_heads(num_heads, num_heads, len(lengths)).query

    def work(rank: int, exchange: DirectExchange) -> None:
        x = shards(whole, 1, lengths)[rank]
        for _ in range(5):
            here = join(exchange, x, head_route(x.shape, heads, lengths, rank))
            torch.testing.assert_close(here, whole[:, :, slice(*heads[rank])], rtol=0, atol=0)
            back = join(exchange, here, token_route(here.shape, heads, lengths, rank))
            torch.testing.assert_close(back, x, rtol=0, atol=0)

    memories = run_ranks(len(lengths), 8192, work)
    assert all(memory.num_grown == 0 for memory in memories)


@pytest.mark.parametrize("is_hidden", [False, True])
def test_many_on_their_way_share_a_small_memory(is_hidden: bool) -> None:
    """Regions are used again and again, more exchanges being under way than there is room for."""
    lengths, num_heads = (8, 8), 4
    wholes = [torch.randn(1, 16, num_heads, 16) for _ in range(40)]
    heads = share_heads(num_heads, num_heads, 2).query

    def work(rank: int, exchange: DirectExchange) -> None:
        shard = [shards(whole, 1, lengths)[rank] for whole in wholes]
        routes = [head_route(x.shape, heads, lengths, rank) for x in shard]
        for first in range(0, 40, 8):
            started = [exchange.start([shard[i]], [routes[i]], is_hidden=is_hidden)[0] for i in range(first, first + 8)]
            for i, received in zip(range(first, first + 8), started, strict=True):
                here = joined(exchange, received, routes[i])
                torch.testing.assert_close(here, wholes[i][:, :, slice(*heads[rank])], rtol=0, atol=0)

    # A part is 8 tokens of 2 heads of 16 floats, 1,024 bytes: three fit.
    memories = run_ranks(2, 3 * 1024, work)
    assert all(memory.waited for memory in memories)
    assert all(memory.num_grown == 0 for memory in memories)


def test_several_at_once_and_into_a_part_of_a_tensor() -> None:
    lengths, num_heads = (3, 4), 4
    wholes = [torch.randn(2, 7, num_heads, 5), torch.randn(2, 7, num_heads, 3).double(), torch.randint(9, (2, 7, num_heads, 1))]
    heads = share_heads(num_heads, num_heads, 2).query

    def work(rank: int, exchange: DirectExchange) -> None:
        own = [shards(whole, 1, lengths)[rank] for whole in wholes]
        routes = [head_route(x.shape, heads, lengths, rank) for x in own]
        here = [joined(exchange, *pair) for pair in zip(exchange.start(own, routes), routes, strict=True)]
        for x, whole in zip(here, wholes, strict=True):
            torch.testing.assert_close(x, whole[:, :, slice(*heads[rank])], rtol=0, atol=0)
        room = torch.full((2, lengths[rank], 2, 3, 5), torch.nan)
        for head in range(2):
            # One group of a head from each rank: ranks before heads.
            group = here[0][:, :, head : head + 1].contiguous()
            route = token_route(group.shape, ((0, 1), (1, 2)), lengths, rank, is_group=True)
            target = room[:, :, :, head : head + 1]
            assert joined(exchange, exchange.start([group], [route], target)[0], route) is target
        torch.testing.assert_close(room[:, :, :, :2].flatten(2, 3), own[0], rtol=0, atol=0)
        assert room[:, :, :, 2].isnan().all()

    run_ranks(2, 8192, work)


@pytest.mark.parametrize("seed", range(5))
def test_no_region_is_given_twice_before_it_was_read(seed: int) -> None:
    regions, draw, grown = Regions(), random.Random(seed), []
    unread: dict[int, tuple[int, int]] = {}
    for _ in range(300):
        length = 512 * draw.randint(0, 8)
        number, start, waits = regions.claim(length, (1,), 4096, lambda *_: grown.append(1))
        assert start + length <= 4096
        last = max((waited for _, waited in waits), default=0)
        unread = {of: room for of, room in unread.items() if of > last}
        assert all(stop <= start or start + length <= first for first, stop in unread.values())
        unread[number] = (start, start + length)
    assert not grown


def test_memory_grows_rather_than_wait_for_what_is_lent() -> None:
    regions, grown = Regions(), []
    claim = lambda length, lent: regions.claim(length, (1,), 4096, lambda *asked: grown.append(asked), lent)  # noqa: E731
    assert claim(1024, 0) == (1, 0, ())
    assert claim(3072, 1) == (2, 1024, ())
    assert claim(1024, 1) == (3, 0, ((1, 1),)), "the first was given back, and is waited for"
    assert claim(2048, 2) == (4, 0, ()), "the second is still lent"
    assert grown == [(64 << 20, ((1, 3),))]
    assert claim(512, 0) == (5, 0, ((1, 4),)), "nothing is lent"


@pytest.mark.parametrize(
    ("lengths", "expected"), [((10,), 10), ((5, 5), 10), ((2, 6, 2), 8), ((3, 14, 3), 17), ((1, 4, 4, 1), 9)]
)
def test_memory_holds_two_groups_once_they_have_been_sent(
    lengths: tuple[int, ...], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastvideo.distributed.regions.LEAST_CAPACITY", 0)
    regions, capacities = Regions(), [0]
    for call in range(6):
        num_grown = len(capacities)
        for number, length in enumerate(lengths):
            # The one before is lent: it is computed with meanwhile.
            regions.claim(length, (1,), capacities[-1], lambda wanted, _: capacities.append(wanted), min(number, 1))
        assert call == 0 or len(capacities) == num_grown
    assert capacities[-1] == expected


@pytest.mark.parametrize("lengths", [(4, 4, 4), (5, 0, 2)])
@pytest.mark.parametrize("num_heads", [6, 4, 2])
@pytest.mark.parametrize("batch", [1, 2])
def test_heads_are_sent_and_given_back(lengths: tuple[int, ...], num_heads: int, batch: int) -> None:
    """Tensors of several dtypes and strides, in memory that grows meanwhile and holds few exchanges at once."""
    wholes = [torch.randn(batch, sum(lengths), num_heads, 3), torch.randint(9, (batch, sum(lengths), num_heads, 2))]
    heads = share_heads(num_heads, num_heads, len(lengths)).query

    def work(rank: int, exchange: DirectExchange) -> None:
        shard = [shards(whole, 1, lengths)[rank] for whole in wholes]
        shard[1] = shard[1].transpose(1, 2).contiguous().transpose(1, 2)
        routes = [head_route(x.shape, heads, lengths, rank) for x in shard]
        for number in range(1, 12):
            sent = exchange.send([number * x for x in shard], routes)
            for x, whole in zip(sent.received, wholes, strict=True):
                assert exchange.finish(x) == (x.numel() > 0)
                torch.testing.assert_close(x, number * whole[:, :, slice(*heads[rank])], rtol=0, atol=0)
            exchange.give_back(sent.number)
            assert not exchange.finish(sent.received[0])

    memories = run_ranks(len(lengths), 2048, work, landing=True)
    assert len({memory.num_grown for memory in memories}) == 1


@pytest.mark.parametrize("size", [2, 4])
def test_what_is_lent_stays_until_it_is_given_back(size: int) -> None:
    """Each rank holds what it received for another while, and two exchanges are under way ahead of it."""
    lengths, num_heads = (4,) * size, 2 * size
    wholes = [torch.randn(1, 4 * size, num_heads, 16) for _ in range(24)]
    heads = share_heads(num_heads, num_heads, size).query

    def work(rank: int, exchange: DirectExchange) -> None:
        shard = [shards(whole, 1, lengths)[rank] for whole in wholes]
        routes = [head_route(x.shape, heads, lengths, rank) for x in shard]
        sent = [exchange.send([shard[i]], [routes[i]]) for i in range(2)]
        for i, whole in enumerate(wholes):
            received, number = sent[i]
            assert exchange.finish(received[0])
            threading.Event().wait(random.Random(100 * rank + i).random() * 0.004)
            torch.testing.assert_close(received[0], whole[:, :, slice(*heads[rank])], rtol=0, atol=0)
            exchange.give_back(number)
            if i + 2 < len(wholes):
                sent.append(exchange.send([shard[i + 2]], [routes[i + 2]]))

    # A rank receives 4 * size tokens of 2 heads of 16 floats.
    memories = run_ranks(size, 3 * 512 * size, work, landing=True)
    assert all(memory.waited for memory in memories)
    assert all(memory.num_grown == 0 for memory in memories)


def test_groups_of_heads_and_everyones_keys_are_sent() -> None:
    lengths = (3, 5)
    whole = torch.randn(2, 8, 2, 3, 4)

    def work(rank: int, exchange: DirectExchange) -> None:
        x = shards(whole, 1, lengths)[rank]
        groups = [x[:, :, :, :1], x[:, :, :, 1:]]
        heads = [((0, 1), (1, 2)), ((0, 2), (2, 4))]
        routes = [head_route(group.shape, own, lengths, rank) for group, own in zip(groups, heads, strict=True)]
        every = gather_route(x.flatten(2, 3).shape, 1, lengths)
        # The second is larger than the memory, which grows while the first is lent.
        sent = [exchange.send([groups[0]], [routes[0]]), exchange.send([groups[1]], [routes[1]])]
        sent.append(exchange.send([x.flatten(2, 3)], [every]))
        expected = [whole[:, :, rank, :1], whole[:, :, rank, 1:], whole.flatten(2, 3)]
        for (received, number), wanted in zip(sent, expected, strict=True):
            assert exchange.finish(received[0])
            torch.testing.assert_close(received[0], wanted, rtol=0, atol=0)
            exchange.give_back(number)

    memories = run_ranks(2, 512, work, landing=True)
    assert [memory.num_grown for memory in memories] == [1, 1]


def test_what_is_alike_on_one_rank_may_differ_on_another() -> None:
    """The first rank gets a head of each tensor; the second as many, or three of the first."""
    wholes, lengths = [torch.randn(1, 20, heads, 16) for heads in (4, 2, 2)], (11, 9)
    heads = [((0, 1), (1, 4)), ((0, 1), (1, 2)), ((0, 1), (1, 2))]

    def work(rank: int, exchange: DirectExchange) -> None:
        own = [shards(whole, 1, lengths)[rank] for whole in wholes]
        for used in ((0, 1, 2), (1, 2), (2,)):
            routes = [head_route(own[i].shape, heads[i], lengths, rank) for i in used]
            sent = exchange.send([own[i] for i in used], routes)
            for x, i in zip(sent.received, used, strict=True):
                assert exchange.finish(x)
                torch.testing.assert_close(x, wholes[i][:, :, slice(*heads[i][rank])], rtol=0, atol=0)
            exchange.give_back(sent.number)

    run_ranks(2, 32768, work)


@pytest.mark.parametrize("in_one_queue", [False, True])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_groups_go_and_come_back_as_layers_send_them(size: int, in_one_queue: bool) -> None:
    """Inputs are sent, a group ahead, and outputs fetched, call after call; no wait stands before what ends it elsewhere."""
    lengths, num_groups, num_heads = tuple(range(2, size + 2)), 3, 3
    wholes = [torch.randn(1, sum(lengths), size, num_heads, 4) for _ in range(4)]
    heads = [tuple((rank, rank + 1) for rank in range(size))] * num_groups

    def work(rank: int, exchange: DirectExchange) -> None:
        for call in range(8):
            whole = wholes[call % 4]
            x = shards(whole, 1, lengths)[rank]
            groups = x.split(1, dim=3)
            routes = [head_route(group.shape, own, lengths, rank) for group, own in zip(groups, heads, strict=True)]
            sent = [exchange.send([groups[i]], [routes[i]]) for i in range(2)]
            room, leaving = torch.full_like(x, torch.nan), []
            for i in range(num_groups):
                if i == 1:
                    sent.append(exchange.send([groups[2]], [routes[2]]))
                (here,), number = sent[i]
                assert exchange.finish(here)
                torch.testing.assert_close(here, whole[:, :, rank, i : i + 1], rtol=0, atol=0)
                output = 2 * here
                route = token_route(output.shape, heads[i], lengths, rank, is_group=True)
                leaving += exchange.start([output], [route], room[:, :, :, i : i + 1], is_hidden=i < 2)
                exchange.give_back(number)
            for here in leaving:
                assert exchange.finish(here)
            torch.testing.assert_close(room, 2 * x, rtol=0, atol=0)

    run_ranks(size, 2048, work, in_one_queue=in_one_queue)


def test_only_what_is_joined_in_the_order_of_ranks_is_sent() -> None:
    def work(rank: int, exchange: DirectExchange) -> None:
        x = torch.zeros(1, 8, 2, 3)
        with pytest.raises(ValueError, match="joined along dim 1, got Cut"):
            exchange.send([x], [token_route(x.shape, ((0, 2), (2, 4)), (4, 4), rank)])

    run_ranks(2, 512, work)


def test_memory_grows_where_an_exchange_is_larger() -> None:
    def work(rank: int, exchange: DirectExchange) -> None:
        for length in (3, 700, 5, 900):
            lengths = (length, length + 1)
            whole = torch.arange((2 * length + 1) * 8, dtype=torch.float64).reshape(1, -1, 2, 4)
            x = shards(whole, 1, lengths)[rank]
            heads = share_heads(2, 2, 2).query
            here = join(exchange, x, head_route(x.shape, heads, lengths, rank))
            torch.testing.assert_close(here, whole[:, :, slice(*heads[rank])], rtol=0, atol=0)

    memories = run_ranks(2, 1024, work)
    assert [memory.num_grown for memory in memories] == [1, 1]


@pytest.mark.parametrize("lengths", [(3, 3, 3, 3), (5, 1, 0, 4)])
def test_gather_and_its_gradient(lengths: tuple[int, ...]) -> None:
    whole = torch.randn(2, sum(lengths), 2, 3)
    parts = [torch.randn(2, sum(lengths), 2, 3) for _ in lengths]

    def work(rank: int, exchange: DirectExchange) -> None:
        x = shards(whole, 1, lengths)[rank]
        route = gather_route(x.shape, 1, lengths)
        torch.testing.assert_close(join(exchange, x, route), whole, rtol=0, atol=0)
        total = join(exchange, parts[rank], route.back())
        torch.testing.assert_close(total, shards(sum(parts), 1, lengths)[rank], rtol=1e-6, atol=1e-6)  # type: ignore[arg-type]

    run_ranks(len(lengths), 4096, work)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", [(4, 4, 4), (7, 2, 5)])
def test_ring_fetches_from_one_and_sends_home(lengths: tuple[int, ...], is_causal: bool) -> None:
    """A step's keys come from their owner; nobody but who takes part is waited for."""
    size = len(lengths)
    whole = torch.randn(1, sum(lengths), 2, 3)

    def work(rank: int, exchange: DirectExchange) -> None:
        x, own = shards(whole, 1, lengths)[rank], lengths
        if is_causal:
            x = join(exchange, x, regroup_route(x.shape, 1, lengths, rank))
        both = (x, -x)
        for step in ring_steps(rank, x.shape[1], own, x.shape, is_causal=is_causal)[1:]:
            assert step.fetch is not None
            routes, back = [step.fetch] * 2, [step.fetch.back()] * 2
            keys = [joined(exchange, *pair) for pair in zip(exchange.start(both, routes, is_hidden=True), routes, strict=True)]
            seen = torch.cat([whole[:, first:last] for first, last in step.columns], dim=1)
            torch.testing.assert_close(keys, [seen, -seen], rtol=0, atol=0)
            home = [joined(exchange, *pair) for pair in zip(exchange.start(keys, back), back, strict=True)]
            count = next(last for part in step.fetch.send.parts for _, last in part) if any(step.fetch.send.parts) else 0
            for sent, kept in zip(home, both, strict=True):
                torch.testing.assert_close(sent[:, :count], kept[:, :count], rtol=0, atol=0)

    memories = run_ranks(size, 8192, work)
    assert all(peer != memory.rank for memory in memories for peer, _ in memory.waited)


def test_routes_of_all_ranks_agree_on_what_is_sent() -> None:
    lengths, heads = (5, 0, 2), share_heads(4, 2, 3)
    for of_rank in (
        lambda rank: head_route((2, lengths[rank], 4, 8), heads.query, lengths, rank),
        lambda rank: token_route((2, sum(lengths), heads.query[rank][1] - heads.query[rank][0], 8), heads.query, lengths, rank),
        lambda rank: gather_route((2, lengths[rank], 4, 8), 1, lengths),
        lambda rank: regroup_route((2, lengths[rank], 4, 8), 1, lengths, rank),
    ):
        routes = [of_rank(rank) for rank in range(3)]
        assert len({route.counts for route in routes}) == 1
        for rank, route in enumerate(routes):
            received = torch.Size(route.shape).numel()
            assert sum(row[rank] for row in route.counts) == received
            assert route.back().counts[rank] == tuple(row[rank] for row in route.counts)


def test_tensors_as_rows_of_bytes() -> None:
    whole = torch.empty(2, 3, 8, 4, dtype=torch.float32)
    assert rows_of(whole) == (1, 768, 768)
    assert rows_of(whole[:, :, 2:4]) == (6, 32, 128)
    assert rows_of(whole[:, 1:2, 2:4]) == (2, 32, 384)
    assert rows_of(whole[:, :2, 2:4]) is None, "samples are further apart than tokens"
    assert rows_of(whole.movedim(3, 0)) is None
    assert rows_of(torch.empty(1, 1)) == (1, 4, 4)
    staging = torch.empty(6 * 8)
    assert rows_of_both(staging.view(2, 3, 2, 4), whole[:, :, 2:4]) == ((6, 32, 32), (6, 32, 128))
    wide = torch.empty(6, 2, 16)[:, :, :4]
    assert rows_of_both(wide.view(2, 3, 2, 4), whole[:, :, 2:4]) is None, "shorter rows than the other's, which have gaps"


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("head_size", [8, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8, torch.float64, torch.complex64])
def test_copies_of_16_bytes_are_copies(dtype: torch.dtype, head_size: int, first: int) -> None:
    source = torch.randint(0, 200, (2, 3, 6, head_size)).to(dtype)[:, :, first:4]
    target = torch.zeros(2, 3, 6, head_size, dtype=dtype)
    copy_wide(target[:, :, 2 : 6 - first], source)
    assert torch.equal(target[:, :, 2 : 6 - first], source)
    assert not target[:, :, :2].any()


def test_the_environment_says_how_tensors_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert exchange_kind(cpu) == "collective"
    assert Settings.from_environment({"FASTVIDEO_EXCHANGE": " Direct "}).exchange == "direct"
    assert Settings.from_environment({}).exchange == "auto"
    with pytest.raises(ValueError, match="FASTVIDEO_EXCHANGE among auto, direct, collective, got 'nvlink'"):
        Settings.from_environment({"FASTVIDEO_EXCHANGE": "nvlink"})
    monkeypatch.setattr(Settings, "current", classmethod(lambda cls: cls(exchange="direct")))
    with pytest.raises(RuntimeError, match="tensors on cpu have no copy engines"):
        direct_exchange(torch.ones(2), "any")


def test_threads_open_a_group_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening is a collective call, of which every rank makes one, however many of its threads ask."""

    class Group:
        """A process group."""

    groups, opened, ready = [Group(), Group()], [], threading.Barrier(4)

    def slowly(_device: torch.device, asked: Group) -> object:
        opened.append(asked)
        time.sleep(0.05)
        return object()

    def ask(name: str) -> object:
        ready.wait(20)
        return direct_exchange(torch.ones(1), name)

    monkeypatch.setattr(direct, "exchange_kind", lambda _: "direct")
    monkeypatch.setattr(direct, "_exchanges", {})
    monkeypatch.setattr(direct, "_open", slowly)
    for group in groups:  # the later one bears the same name
        monkeypatch.setattr(torch._C._distributed_c10d, "_resolve_process_group", lambda _, group=group: group)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            assert len(set(pool.map(ask, ["name"] * 4))) == 1
    assert opened == groups
