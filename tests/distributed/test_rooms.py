"""Groups of heads whose outputs and gradients arrive side by side, with threads for ranks."""

from __future__ import annotations

import pytest
import torch

from fastvideo.attention import parallel
from fastvideo.attention.backends.torch_sdpa import TorchSDPAImpl
from fastvideo.attention.dispatch import Selected
from fastvideo.attention.parallel import Chosen
from fastvideo.attention.shared_call import SharedCall
from fastvideo.distributed import collectives
from fastvideo.distributed.direct import DirectExchange
from fastvideo.distributed.layouts import resolve_layout
from fastvideo.distributed.mesh import SequenceGroup
from fastvideo.distributed.rooms import Room, cut, join
from fastvideo.testing import reference_attention

from .thread_ranks import run_ranks, shards


def test_pieces_that_lie_elsewhere_are_joined() -> None:
    whole = torch.arange(24.0).view(2, 3, 4)
    for moved in (None, 0, 1):
        room = Room((1, 3), -1)
        pieces = [room.place(i, whole, piece.shape).copy_(piece) for i, piece in enumerate(whole.split([1, 3], -1))]
        memory = pieces[0].untyped_storage().data_ptr()
        if moved is not None:
            pieces[moved] = pieces[moved].clone()
        joined = join(pieces, room)
        assert torch.equal(joined, whole)
        assert (joined.data_ptr() == memory) == (moved is None)
        assert room.place(0, whole, (2, 3, 1)).data_ptr() != joined.data_ptr(), "what was handed out is not written again"


def test_gradients_of_pieces_that_arrived_elsewhere() -> None:
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 5, dtype=torch.float64)
    room = Room((2, 3), 1)
    first, second = cut(x, room)
    total = join([2 * first, 3 * second], Room((2, 3), 1))
    (got,) = torch.autograd.grad(total, x, grad)
    torch.testing.assert_close(got, torch.cat([2 * grad[:, :2], 3 * grad[:, 2:]], 1))


@pytest.mark.parametrize("way", ["cut", "join"])
def test_second_derivatives_are_refused(way: str) -> None:
    """Gradients that lie side by side in a room have no graph of their own."""
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    pieces = cut(x, Room((2, 3), 1)) if way == "cut" else x.split((2, 3), 1)
    total = join(pieces, Room((2, 3), 1)) if way == "join" else torch.cat(pieces, 1)
    (grad,) = torch.autograd.grad(total.pow(3).sum(), x, create_graph=True)
    torch.testing.assert_close(grad, 3 * x**2)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        torch.autograd.grad(grad.sum() + x.sum(), x)


@pytest.mark.parametrize("frozen", [None, "key"])
@pytest.mark.parametrize(("lengths", "kv_heads"), [((4, 4), 6), ((5, 0, 4), 9), ((3, 2), 12)])
def test_groups_of_heads_arrive_where_they_belong(
    lengths: tuple[int, ...], kv_heads: int, frozen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs and gradients are one device's, twice over the same graph, and none of them was joined by a copy."""
    exchanges: dict[str, DirectExchange] = {}
    monkeypatch.setattr(collectives, "direct_exchange", lambda _, name: exchanges[name])
    monkeypatch.setattr(collectives, "finish_direct", lambda x, name: exchanges[name].finish(x))
    copied: list[torch.Tensor] = []
    whole_of = Room.whole

    def watched(room: Room, pieces: list[torch.Tensor]) -> torch.Tensor:
        memory = room._memory
        result = whole_of(room, pieces)
        copied.extend([] if result is memory else [result])
        return result

    monkeypatch.setattr(Room, "whole", watched)
    size, names = len(lengths), ("query", "key", "value", "grad")
    num_heads = {"query": 2 * kv_heads, "key": kv_heads, "value": kv_heads, "grad": 2 * kv_heads}
    whole = {name: torch.randn(2, sum(lengths), num_heads[name], 8, dtype=torch.float64) for name in names}
    trained = [name for name in names[:3] if name != frozen]
    leaves = {name: whole[name].clone().requires_grad_(name in trained) for name in names[:3]}
    output = reference_attention(*leaves.values(), scale=0.3)
    expected = [output, *torch.autograd.grad(output, [leaves[name] for name in trained], whole["grad"])]

    def work(rank: int, exchange: DirectExchange) -> None:
        exchanges[f"of {rank}"] = exchange
        group = SequenceGroup(f"of {rank}", tuple(range(size)), rank)
        impl = TorchSDPAImpl(2 * kv_heads // size // 3, 8, 0.3, num_kv_heads=kv_heads // size // 3)
        selected = Selected("TORCH_SDPA", impl, frozenset(), object, False, False, False)
        own = {name: shards(x, 1, lengths)[rank].clone().requires_grad_(name in trained) for name, x in whole.items()}
        call = SharedCall(
            *[own[name] for name in names[:3]], None, None, None, lengths, lengths, False, 0.3, False, head_groups=3
        )  # fmt: skip
        output, _ = parallel._attend_shared(call, group, resolve_layout("ulysses", group), Chosen(selected, selected))
        inputs, first = [own[name] for name in trained], None
        for _ in range(2):
            grads = torch.autograd.grad(output, inputs, own["grad"], retain_graph=True)
            for got, right in zip((output, *grads, *(first or ())), (*expected, *(expected[1:] if first else ())), strict=True):
                torch.testing.assert_close(got, shards(right, 1, lengths)[rank])
            first = grads

    run_ranks(size, 1 << 16, work, landing=True)
    assert copied == []
