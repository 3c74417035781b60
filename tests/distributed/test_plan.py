"""`plan`: its bytes are those that elements really travel, its order follows its costs, and it says why not."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastvideo.cli import main
from fastvideo.distributed.plan import DeviceModel, LinkModel, plan
from fastvideo.distributed.shards import split_lengths
from fastvideo.distributed.ulysses import share_heads


def owners(length: int, size: int) -> list[int]:
    """Return the rank of each token."""
    return [rank for rank, count in enumerate(split_lengths(length, size)) for _ in range(count)]


def count_received(heads: int, kv_heads: int, seq: int, ring: int, ulysses: int) -> int:
    """Return the most elements (of head size 1) that a rank of a forward pass gets from others, by following each one."""
    size, rank_of, shares = ring * ulysses, owners(seq, ring * ulysses), share_heads(heads, kv_heads, ulysses)
    received = [0] * size
    for rank in range(size):
        row, column = divmod(rank, ulysses)
        own_heads, own_kv_heads = range(*shares.query[column]), range(*shares.key[column])
        for owner in rank_of:
            in_row = owner // ulysses == row
            if in_row and owner != rank:
                received[rank] += len(own_heads)  # queries come in
            if owner != rank:
                # Keys and values come from the row's ranks, and of other rows from the rank of this column.
                received[rank] += 2 * len(own_kv_heads)
            if owner == rank:
                received[rank] += heads - len(own_heads)  # outputs come back
    return max(received)


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (12, 4), (3, 1), (5, 5), (1, 1)])
@pytest.mark.parametrize("seq", [24, 17, 5])
@pytest.mark.parametrize(("ring", "ulysses"), [(1, 4), (4, 1), (2, 2), (3, 2), (1, 3)])
def test_bytes_are_those_of_elements_followed_one_by_one(heads, kv_heads, seq, ring, ulysses) -> None:
    found = plan(heads, kv_heads, seq, ring * ulysses, head_size=1, dtype=torch.float16)
    layouts = [layout for layout in found.layouts if (layout.ring, layout.ulysses) == (ring, ulysses)]
    exact = 2 * count_received(heads, kv_heads, seq, ring, ulysses)
    assert [layout.forward.num_bytes for layout in layouts] == [exact] * len(layouts)


def test_backward_bytes() -> None:
    found = plan(8, None, 64, 4, needs_grad=True)
    ratios = {layout.name: layout.backward.num_bytes / layout.forward.num_bytes for layout in found.layouts}
    assert ratios["ulysses"] == 1.0, "gradients go back the way the tensors came"
    assert ratios["ring"] == 2.0, "keys come again, and their gradients go home"
    assert ratios["gather"] == 1.0, "keys are kept, and their gradients go home"


def test_every_factorisation_is_listed_once() -> None:
    found = plan(16, None, 4096, 12)
    listed = sorted((layout.name, layout.ring, layout.ulysses) for layout in found.layouts)
    pairs = [(12 // u, u) for u in (1, 2, 3, 4, 6, 12)]
    expected = [("ulysses", 1, 12), ("ring", 12, 1), ("gather", 12, 1)]
    expected += [(f"ulysses+{outer}", r, u) for r, u in pairs if 1 < u < 12 for outer in ("ring", "gather")]
    assert listed == sorted(expected)
    times = [found.time(layout) for layout in found.layouts]
    assert times == sorted(times)
    assert [layout.name for layout in plan(16, None, 4096, 1).layouts] == ["local"]


def test_work_of_the_busiest_rank() -> None:
    found = {layout.name: layout for layout in plan(40, None, 75_600, 8).layouts if 8 in (layout.ring, layout.ulysses)}
    ulysses = found["ulysses"]
    assert (ulysses.heads, ulysses.tokens, ulysses.padding) == (5, 75_600, 0.0)
    flop = 4 * 75_600**2 * 5 * 128
    packing = 2 * (9450 * 40 * 128 * 2) / 4.2e12
    assert ulysses.forward.compute == pytest.approx(flop / 560e12 + 10e-6 + packing)
    assert ulysses.backward.compute == pytest.approx(2.5 * flop / 528e12 + 10e-6 + 4 * packing), "all gradients"
    swap = (9450 * 7 * 15 + 9450 * 35) * 128 * 2
    assert ulysses.forward.num_bytes == swap
    assert ulysses.forward.exposed == pytest.approx(swap / 365e9 + 4 * (20e-6 + 7e-6))
    assert found["ring"].forward.num_bytes == 9450 * 7 * 80 * 128 * 2


@pytest.mark.parametrize(
    ("heads", "world_size", "padding"), [(40, 16, 3 * 16 / 40 - 1), (3, 4, 1 / 3), (1, 4, 3.0), (40, 8, 0.0)]
)
def test_heads_that_do_not_divide_are_padding(heads: int, world_size: int, padding: float) -> None:
    found = plan(heads, 1, 1 << 14, world_size)
    (ulysses,) = [layout for layout in found.layouts if layout.name == "ulysses"]
    assert ulysses.is_legal
    assert ulysses.padding == pytest.approx(padding)
    (ring,) = [layout for layout in found.layouts if layout.name == "ring"]
    assert ring.padding == 0.0
    (uneven,) = [layout for layout in plan(4, 4, 10, 4).layouts if layout.name == "ring"]
    assert uneven.padding == pytest.approx(3 * 4 / 10 - 1)


def test_reasons() -> None:
    sparse = plan(12, None, 32_760, 8, sparsity=0.9)
    assert sparse.best.name == "ulysses"
    refused = [layout for layout in sparse.layouts if not layout.is_legal]
    assert len(refused) == len(sparse.layouts) - 1
    assert all("use ulysses, a mesh of ring=1 × ulysses=8" in layout.reasons[0] for layout in refused)
    cross = plan(8, None, 64, 4, causal=True, cross_seq=32)
    assert cross.best is None
    assert "no layout can be" in str(cross)
    assert "causal attention needs as many queries as keys, got 64 and 32" in cross.layouts[0].reasons
    assert plan(8, None, 64, 4, causal=True, replicated=3).best is not None
    for changes, reason in (
        ({"causal": True}, "sparse attention can't be causal: tiles see each other in both directions"),
        ({"cross_seq": 512}, "sparse attention needs queries and keys to be the same tokens, got 32760 and 512"),
    ):
        neither = plan(12, None, 32_760, 8, sparsity=0.9, **changes)
        assert neither.best is None
        assert all(any(text.startswith(reason) for text in layout.reasons) for layout in neither.layouts)
        assert plan(12, None, 32_760, 1, sparsity=0.9, **changes).best is None, "nor on one device"
    assert plan(12, None, 32_760, 8, sparsity=0.9, cross_seq=32_760).best.name == "ulysses"
    meshed = plan(8, None, 4096, 8, mesh=(2, 4))
    assert plan(8, None, 4096, 8, mesh=[2, 4]) == meshed
    assert {(layout.ring, layout.ulysses) for layout in meshed.layouts if layout.is_legal} == {(2, 4)}
    small = plan(40, None, 75_600, 8, device=DeviceModel(memory=1e9))
    assert "keys and values take 1.55 GB at once, and the device has 1 GB" in [
        reason for layout in small.layouts if layout.name == "gather" for reason in layout.reasons
    ]


def test_slower_links_and_hidden_exchange() -> None:
    def times(**changes):
        found = plan(40, None, 75_600, 16, **changes)
        return {(layout.name, layout.ring): found.time(layout) for layout in found.layouts}

    usual, slow = times(), times(links=replace(LinkModel(), network_bandwidth=10e9))
    assert all(slow[name] >= usual[name] for name in usual)
    assert slow["ulysses", 1] > usual["ulysses", 1], "16 ranks are two nodes"
    one_node = times(links=LinkModel(ranks_per_node=16))
    # Hidden latency is taken for bytes, which weigh more per second where links are fast.
    assert all(one_node[name] <= 1.005 * usual[name] for name in usual)
    assert one_node["ring", 16] < 0.7 * usual["ring", 16]


def test_pieces_of_heads_travel_while_others_are_computed() -> None:
    def costs(**changes):
        return {layout.name: layout.forward for layout in plan(48, None, 75_600, 2, **changes).layouts}

    whole, pieces = costs(head_groups=1), costs(head_groups=4)
    free = costs(head_groups=4, links=LinkModel(contention=0.0))
    for name in ("ulysses", "gather"):
        # Of 24 heads on each rank, or 48, the first and the last group have an eighth.
        assert pieces[name].exposed == pytest.approx(pieces[name].communication / 8)
        hidden = pieces[name].communication * 7 / 8
        assert pieces[name].compute - whole[name].compute == pytest.approx(0.4 * hidden), "attention gives way to it"
        assert free[name].time < pieces[name].time < whole[name].time
        assert pieces[name].num_bytes == whole[name].num_bytes
    assert pieces["ring"] == whole["ring"]
    uneven = plan(40, None, 75_600, 16, head_groups=4)
    (ulysses,) = [layout for layout in uneven.layouts if layout.name == "ulysses"]
    assert ulysses.forward.exposed == ulysses.forward.communication, "40 heads don't divide by 16 ranks"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"ulysses": 3, "gather": 1, "ring": 1, "ulysses+ring": 1, "ulysses+gather": 1}),
        ({"needs_grad": True}, {"ulysses": 1}),
        ({"seq": 1024}, {"ulysses": 1}),
        ({"sparsity": 0.9, "needs_grad": True}, {"ulysses": 3}),
        ({"kv_heads": 8}, {"ulysses": 2}),
        ({"kv_heads": 10}, {"ulysses": 1}),
        ({"links": LinkModel(ranks_per_node=2)}, {"ulysses": 1}),
        ({"head_groups": 1}, {"ulysses": 1, "gather": 1}),
        ({"head_groups": 4}, {"ulysses": 4, "gather": 4, "ring": 1, "ulysses+ring": 4, "ulysses+gather": 4}),
        ({"head_groups": 4, "causal": True}, {"ulysses": 4, "gather": 1, "ulysses+gather": 4}),
    ],
)
def test_groups_of_heads_are_those_of_layers(changes, expected) -> None:
    found = plan(**{"heads": 40, "kv_heads": None, "seq": 75_600, "world_size": 4, **changes})
    counts = {layout.name: layout.head_groups for layout in found.layouts}
    assert {name: counts[name] for name in expected} == expected


def test_the_host_counts_where_it_is_slower_than_the_device() -> None:
    def forward(**changes):
        (ulysses,) = [x for x in plan(12, None, 32_760, 2, **changes).layouts if x.name == "ulysses"]
        return ulysses.forward

    dense = forward(head_groups=3)
    assert dense.host == pytest.approx(0.3e-3 + 3 * (0.1e-3 + 4 * 0.045e-3))
    assert dense.time == dense.compute + dense.exposed > dense.host
    for groups in (3, 6):
        sparse = forward(head_groups=groups, sparsity=0.9, has_gate=True)
        assert sparse.time == sparse.host == pytest.approx(0.3e-3 + groups * (0.6e-3 + 5 * 0.045e-3))
    more_ranks = {x.name: x for x in plan(12, None, 32_760, 4).layouts}["ulysses"]
    assert more_ranks.forward.host == pytest.approx(0.3e-3 + 0.1e-3 + 4 * (0.025e-3 + 3 * 0.02e-3)), "each tells three others"
    ring = {x.name: x for x in plan(12, None, 32_760, 4).layouts}["ring"]
    assert ring.forward.host == pytest.approx(0.3e-3 + 4 * 0.1e-3 + 6 * 0.045e-3), "four parts, and keys and values of three"
    assert ring.backward.host == pytest.approx(0.3e-3 + 4 * 0.1e-3 + 12 * 0.045e-3)


def test_a_ring_computes_while_keys_travel() -> None:
    ring = {layout.name: layout for layout in plan(40, None, 75_600, 8).layouts}["ring"]
    assert ring.forward.exposed < 0.05 * ring.forward.communication, "keys travel while others are computed with"


def test_replicated_tokens_cost_their_outputs_and_gradients() -> None:
    def bytes_of(**changes):
        (ulysses,) = [layout for layout in plan(8, None, 64, 4, **changes).layouts if layout.name == "ulysses"]
        return ulysses.forward.num_bytes, ulysses.backward.num_bytes

    (plain, plain_back), (more, more_back) = bytes_of(), bytes_of(replicated=6)
    assert more - plain == 6 * 6 * 128 * 2, "outputs of the six heads of others"
    assert more_back - plain_back == 3 * 6 * 24 * 128 * 2, "gradients of query, key and value of three others"


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"heads": 0}, ValueError, "expected heads of at least 1, got 0"),
        ({"seq": 2.5}, TypeError, "expected seq as an integer, got 2.5"),
        ({"kv_heads": 3}, ValueError, "expected kv_heads to divide heads, got 8 and 3"),
        ({"sparsity": 1.0}, ValueError, "expected a sparsity in"),
        ({"sparsity": float("nan")}, ValueError, "expected a sparsity in"),
        ({"mesh": (2, 3)}, ValueError, r"expected a mesh \(ring, ulysses\) of 4 ranks, got \(2, 3\)"),
        ({"mesh": (2, 1, 1)}, ValueError, r"expected mesh as two sizes \(ring, ulysses\), got \(2, 1, 1\)"),
        ({"mesh": (2, 2, 1)}, ValueError, r"expected mesh as two sizes \(ring, ulysses\), got \(2, 2, 1\)"),
        ({"mesh": 4}, ValueError, r"expected mesh as two sizes \(ring, ulysses\), got 4"),
        ({"mesh": (4.0, 1)}, TypeError, "expected the mesh's ring as an integer, got 4.0"),
        ({"mesh": (4, True)}, TypeError, "expected the mesh's ulysses as an integer, got True"),
        ({"mesh": (-2, -2)}, ValueError, "expected the mesh's ring of at least 1, got -2"),
        ({"dtype": "bf16"}, TypeError, "expected a torch dtype or its name among .*, got 'bf16'"),
        ({"dtype": "int32"}, TypeError, "among float16, bfloat16, float32, float64, got 'int32'"),
        ({"dtype": torch.bool}, TypeError, "among float16, bfloat16, float32, float64, got torch.bool"),
        ({"has_gate": True}, ValueError, "a gate belongs to sparse attention, and without a sparsity this is dense"),
        ({"replicated": -1}, ValueError, "expected replicated of at least 0"),
    ],
)
def test_nonsense(changes, error, text) -> None:
    with pytest.raises(error, match=text):
        plan(**{"heads": 8, "kv_heads": None, "seq": 64, "world_size": 4, **changes})


def test_it_prints_and_becomes_json() -> None:
    found = plan(40, 8, 75_600, 8, needs_grad=True, replicated=226)
    lines = str(found).splitlines()
    assert lines[0].startswith("8 × H200, 8 a node; forward and backward; one device: ")
    assert " ".join(lines[1].split()) == "layout ring ulysses heads groups tokens padding moved exposed time efficiency"
    assert len(lines) == 4 + len(found.layouts)
    assert lines[-1] == f"best: {found.best.name} (ring={found.best.ring}, ulysses={found.best.ulysses})"
    data = json.loads(json.dumps(found.as_dict()))
    assert data["layouts"][data["best"]]["name"] == found.best.name
    assert data["layouts"][0]["forward"]["num_bytes"] == found.layouts[0].forward.num_bytes


def test_more_ranks_take_no_longer_inside_a_node() -> None:
    times = [(found := plan(40, None, 75_600, size)).time(found.best) for size in (1, 2, 4, 8)]
    assert all(later < earlier for earlier, later in itertools.pairwise(times))


PAGE = (Path(__file__).parents[2] / "docs" / "parallel-model.md").read_text()


def test_the_page_shows_what_the_command_prints(capsys) -> None:
    ((command, shown),) = re.findall(r"^```console\n\$ fastvideo (.*?)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert main(command.split()) == 0
    assert capsys.readouterr().out == shown


def test_the_tables_of_the_page_are_those_of_the_model() -> None:
    calls = [{"seq": 75_600}, {"seq": 604_800}, {"seq": 75_600, "sparsity": 0.9, "has_gate": True}]
    sizes = [2**power for power in range(11)]
    expected = [model_row(size, **call) for call in calls for size in sizes]
    assert re.findall(r"^\| \d+ \|.*$", PAGE, re.MULTILINE) == expected


def test_the_model_stands_beside_measurements_as_it_is() -> None:
    rows = re.findall(r"^\| (\d+p, .*?) \|[^|]*\| ([\d.]+) \|[^|]*\| ([\d.]+) \|$", PAGE, re.MULTILINE)
    assert len(rows) == len(re.findall(r"^\| \d+p, ", PAGE, re.MULTILINE)) > 20
    assert rows == [(what, *model_times(what)) for what, _, _ in rows]


def model_times(what: str) -> list[str]:
    """Return the model's forward and backward, in ms, of a row such as "720p, two cards, VSA, 3 groups"."""
    resolution, cards, how, *more = what.split(", ")
    ring, ulysses = {
        "one card": (1, 1),
        "2 × 2 cards": (2, 2),
        **{f"{word} cards": (1, n) if how in ("Ulysses", "VSA") else (n, 1) for word, n in (("two", 2), ("four", 4))},
    }[cards]
    sparse = {"sparsity": 0.9, "has_gate": True} if how == "VSA" else {}
    groups = int(more[0].split()[0]) if more and more[0].endswith("groups") else 1
    heads, seq = {"720p": (40, 75_600), "480p": (12, 32_760)}[resolution]
    layouts = plan(heads, None, seq, ring * ulysses, needs_grad=True, head_groups=groups, **sparse).layouts
    (found,) = (
        layout
        for layout in layouts
        if (layout.ring, layout.ulysses) == (ring, ulysses) and layout.name.endswith("gather") == how.endswith("gather")
    )
    return [f"{cost.time * 1e3:.1f}" for cost in (found.forward, found.backward)]


def model_row(size: int, **call) -> str:
    found = plan(40, None, world_size=size, needs_grad=True, **call)
    best, time = found.best, found.time(found.best)
    moved = (best.forward.num_bytes + best.backward.num_bytes) / 1e6
    exposed = (best.forward.exposed + best.backward.exposed) / time
    cells = (
        size, best.name, f"{best.ring} × {best.ulysses}", f"{best.padding:.0%}",
        f"{moved:,.0f}", f"{exposed:.0%}", f"{time * 1e3:,.1f}", f"{found.efficiency(best):.0%}",
    )  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"
