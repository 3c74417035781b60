"""Rings whose keys and gradients are sent straight into memory that is lent, with threads for ranks."""

from __future__ import annotations

import math

import pytest
import torch

from fastvideo.attention.backends.torch_sdpa import TorchSDPAImpl
from fastvideo.attention.dispatch import Selected
from fastvideo.attention.parts import BackendParts
from fastvideo.distributed import collectives
from fastvideo.distributed.direct import DirectExchange
from fastvideo.distributed.mesh import SequenceGroup
from fastvideo.distributed.ring import attend_in_parts, balanced_pieces, regroup_route, ring_steps, way_home
from fastvideo.testing import reference_attention

from .thread_ranks import join, run_ranks, shards


@pytest.mark.parametrize("in_one_queue", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", [(4, 4), (4, 4, 4, 4), (7, 2, 5), (3, 0, 5)])
def test_a_ring_is_sent_and_its_gradients_are_sent_home(lengths: tuple[int, ...], is_causal: bool, in_one_queue: bool) -> None:
    """As the backward pass does: keys come a step ahead, gradients go a step behind, call after call."""
    size = len(lengths)
    whole = torch.randint(1, 9, (2, sum(lengths), 2, 3)).float()

    def work(rank: int, exchange: DirectExchange) -> None:
        x = shards(whole, 1, lengths)[rank]
        if is_causal:
            x = join(exchange, x, regroup_route(x.shape, 1, lengths, rank))
        steps = ring_steps(rank, x.shape[1], lengths, x.shape, is_causal=is_causal)[1:]
        for call in range(4):
            both = ((call + 1) * x, -x)
            coming, home, going = exchange.send(both, [steps[0].fetch] * 2), torch.zeros_like(x), None
            for number, step in enumerate(steps):
                here = coming
                for received in here.received:
                    exchange.finish(received)
                if number + 1 < len(steps):
                    coming = exchange.send(both, [steps[number + 1].fetch] * 2)
                seen = torch.cat([whole[:, first:last] for first, last in step.columns], dim=1)
                torch.testing.assert_close(here.received, ((call + 1) * seen, -seen), rtol=0, atol=0)
                grads = [10 * received for received in here.received]
                exchange.give_back(here.number)
                sent = exchange.send(grads, [way_home(step.fetch)] * 2)
                for arriving in (going, sent if number + 1 == len(steps) else None):
                    if arriving is not None:
                        for received, factor in zip(arriving.received, (call + 1, -1), strict=True):
                            exchange.finish(received)
                            count = received.shape[1]
                            torch.testing.assert_close(received, 10 * factor * x[:, :count], rtol=0, atol=0)
                            home[:, :count] += received / factor
                        exchange.give_back(arriving.number)
                going = sent
            if not is_causal:
                assert torch.equal(home, 2 * 10 * (size - 1) * x), "by as many readers, keys and values"

    memories = run_ranks(size, 1024, work, landing=True, in_one_queue=in_one_queue)
    assert len({memory.num_grown for memory in memories}) == 1


@pytest.fixture
def exchanges(monkeypatch: pytest.MonkeyPatch) -> dict[str, DirectExchange]:
    """Exchanges by name of the group, which are used as if the tensors of this process were on devices."""
    known: dict[str, DirectExchange] = {}
    monkeypatch.setattr(collectives, "direct_exchange", lambda _, name: known[name])
    monkeypatch.setattr(collectives, "finish_direct", lambda x, name: known[name].finish(x))
    return known


def join_ring(exchanges: dict[str, DirectExchange], rank: int, exchange: DirectExchange, size: int) -> SequenceGroup:
    """Return the group of a rank, which has a name of its own because all ranks are one process.

    What is given back is filled with NaN, so that reading it later shows.
    """
    give_back = exchange.give_back

    def spoil_and_give_back(number: int) -> None:
        for coming in exchange._lent:
            if coming.lent <= number:
                for x in coming.received:
                    x.fill_(math.nan)
        give_back(number)

    exchange.give_back = spoil_and_give_back
    exchanges[f"ring of {rank}"] = exchange
    return SequenceGroup(f"ring of {rank}", tuple(range(size)), rank)


def held(whole: torch.Tensor, lengths: tuple[int, ...], rank: int, is_causal: bool) -> torch.Tensor:
    """Return the tokens that a rank works on."""
    if not is_causal:
        return shards(whole, 1, lengths)[rank]
    return torch.cat([whole[:, first:last] for first, last in balanced_pieces(whole.shape[1], len(lengths))[rank]], dim=1)


class ViewOfValues(TorchSDPAImpl):
    """Attention to a single key, whose output is a view of its value."""

    def forward(self, query, key, value, _metadata, *, return_lse):
        assert return_lse
        assert key.shape[1] == 1
        return value.expand(query.shape), (query * key).sum(-1) * self.softmax_scale


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", [(6, 6), (5, 0, 4), (3, 4, 3, 4)])
def test_attention_in_lent_memory(lengths: tuple[int, ...], is_causal: bool, exchanges: dict[str, DirectExchange]) -> None:
    """Outputs and gradients, one call after another: what comes for the next overwrites what was given back."""
    names = ("query", "key", "value", "grad")
    wholes = [{name: torch.randn(2, sum(lengths), 2, 8, dtype=torch.float64) for name in names} for _ in range(4)]
    expected = []
    for whole in wholes:
        leaves = [whole[name].clone().requires_grad_() for name in names[:3]]
        output = reference_attention(*leaves, is_causal=is_causal, scale=0.3)
        expected.append([output, *torch.autograd.grad(output, leaves, whole["grad"])])

    def work(rank: int, exchange: DirectExchange) -> None:
        group = join_ring(exchanges, rank, exchange, len(lengths))
        impls = [TorchSDPAImpl(2, 8, 0.3, causal=causal) for causal in (False, True)]
        for whole, wanted in zip(wholes, expected, strict=True):
            leaves = [held(whole[name], lengths, rank, is_causal).clone().requires_grad_() for name in names[:3]]
            steps = ring_steps(rank, leaves[0].shape[1], lengths, leaves[1].shape, is_causal=is_causal)
            output = attend_in_parts(kernels_of(*impls), steps, *leaves, group)
            grads = torch.autograd.grad(output, leaves, held(whole["grad"], lengths, rank, is_causal))
            for got, right in zip((output, *grads), wanted, strict=True):
                torch.testing.assert_close(got, held(right, lengths, rank, is_causal))

    memories = run_ranks(len(lengths), 512, work, landing=True)
    assert all(memory.num_grown > 0 for memory in memories)


def test_a_view_of_lent_values_is_kept(exchanges: dict[str, DirectExchange]) -> None:
    wholes = [torch.randn(1, 3, 1, 4, dtype=torch.float64) for _ in range(6)]

    def work(rank: int, exchange: DirectExchange) -> None:
        group = join_ring(exchanges, rank, exchange, 3)
        kernels = kernels_of(ViewOfValues(1, 4, 0.3), ViewOfValues(1, 4, 0.3))
        for whole in wholes:
            x = whole[:, rank : rank + 1]
            steps = ring_steps(rank, 1, (1, 1, 1), x.shape, is_causal=False)
            with torch.no_grad():
                output = attend_in_parts(kernels, steps, x, x, x, group)
            torch.testing.assert_close(output, reference_attention(x, whole, whole, scale=0.3))

    run_ranks(3, 1024, work, landing=True)


def kernels_of(plain: TorchSDPAImpl, causal: TorchSDPAImpl) -> BackendParts:
    plain, causal = (Selected("TORCH_SDPA", impl, frozenset(), object, False, False, False) for impl in (plain, causal))
    return BackendParts(plain, causal, 0.3)
