"""`check_parallel_parity` passes what is equal and names the first layer that isn't; the cases stand in parity_cases.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fastvideo.distributed.parity import ParityError, check_parallel_parity
from fastvideo.distributed.parity_compare import Place, find_divergences, fingerprint, in_order, measure, place_of
from fastvideo.distributed.parity_record import Label, Rounding

SCRIPT = Path(__file__).with_name("parity_cases.py")


EQUAL = {
    "wan_fp32": 206,
    "wan_bf16": 206,
    "wan_sparse": 214,
    "uneven_shards": 16,
    "partial_gradients": 16,
    "layer_mesh": 16,
    "own_loss": 9,
    "gradients_are_left_alone": 5,
}
FIRST = {
    "wan_fault": "blocks.1.attn1.attention: output[0], most on rank 1: max error 0.0015",
    "wan_fault_in_backward": "blocks.0.attn2.to_v: gradient of weight, most on rank",
    "wan_other_weight": "blocks.1.ffn.net.0.proj: output: already different on rank 1 when run alone",
    "wan_shape": "condition_embedder.text_embedder: output: the shapes of its parts on ranks 0, 1 don't make up the whole",
    "wan_only_attention": "blocks.1.attn1.attention: output[0], most on rank",
    "loss_that_is_no_sum": "0: gradient of output, most on rank",
}


def test_two_ranks(tmp_path: Path) -> None:
    """Equal ranks pass, a planted fault is named on every rank; one pair of processes runs all."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    arguments = ["2", str(tmp_path), str(server.port)]
    ranks = [subprocess.Popen([sys.executable, str(SCRIPT), str(rank), *arguments]) for rank in range(2)]
    try:
        assert [rank.wait(timeout=150) for rank in ranks] == [0, 0]
    finally:
        [rank.kill() for rank in ranks]
    reports = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert reports[0] == reports[1], "every rank gets the same report"
    for name, num_compared in EQUAL.items():
        assert reports[0][name]["text"] == f"2 ranks give one rank's numbers in all {num_compared} tensors", name
    for name, first in FIRST.items():
        assert reports[0][name]["text"].startswith(f"2 ranks differ from one, first at {first}"), reports[0][name]["text"]
        assert reports[0][name]["passed"] is False


class Odd(nn.Module):
    """Differs from itself where it is called again."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.inner(x) if self.calls == 2 else self.inner(x * 1.5)


def test_one_rank_without_a_process_group() -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    report = check_parallel_parity(nn.Sequential(nn.Linear(6, 6), nn.GELU()), {"input": x})
    assert report.passed
    report.raise_if_failed()
    report = check_parallel_parity(Odd(), [x])
    assert (report.first.label, report.first.ranks, report.first.kind) == (Label("inner", 0, "output"), (0,), "value")
    assert report.first.max_error == pytest.approx(0.5 * x.abs().max().item())
    with pytest.raises(ParityError, match=r"1 ranks differ from one, first at inner: output, most on rank 0: max error"):
        report.raise_if_failed()


def test_nonsense() -> None:
    module, x = nn.Linear(3, 3), torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"expected shard to name inputs that are tensors, got 'y'; there are \['input'\]"):
        check_parallel_parity(module, {"input": x}, shard={"y": 0})
    with pytest.raises(ValueError, match=r"add up to 4, got \(3,\)"):
        check_parallel_parity(module, {"input": x}, shard={"input": 0}, shard_lengths=[3])


def test_places() -> None:
    assert place_of((4, 6), [(4, 6), (4, 6)], 1) == Place(None)
    assert place_of((4, 6), [(4, 3), (4, 3)], 1) == Place(1, 3, 3)
    assert place_of((4, 6), [(4, 6), (0, 6)], 1) == Place(0, 4, 0)
    assert place_of((4, 6), [(4, 3), (4, 2)], 0) is None
    assert place_of((4, 6), [(2, 6), (2, 3)], 0) is None
    assert place_of((4, 6), [(24,), (24,)], 0) is None


def test_the_smaller_reading_of_a_gradient_counts_and_a_lost_call_is_told() -> None:
    x = torch.arange(5.0)
    label = Label("layer", 0, "output", True)
    row = measure([x / 2, x], x, x, fingerprint(x))
    assert find_divergences([{label: row}] * 2, (0, 1), 2.0, None) == ()
    row = measure([x / 2, x + 1], x, x, fingerprint(x))
    (found,) = find_divergences([{label: row}] * 2, (4, 5), 2.0, None)
    assert (found.max_error, found.mean_error, found.ranks) == (1.0, 1.0, (4,))
    (found,) = find_divergences([{label: measure([x], x, x, 0.0)}, {}], (4, 5), 2.0, None)
    assert (found.kind, found.ranks) == ("calls", (5,))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_finite_differs(wrong: float) -> None:
    x = torch.arange(5.0)
    y = x.clone()
    y[2] = wrong
    label = Label("layer", 0, "output")
    (found,) = find_divergences([{label: measure([y], x, x, 0.0)}], (0,), 2.0, None)
    assert found.max_error == float("inf")
    assert find_divergences([{label: measure([y], y, y, 0.0)}], (0,), 2.0, None) == ()


def test_gradients_of_parameters_stand_beside_their_layer() -> None:
    seen = [
        Label("block.inner", 0, "output"),
        Label("block", 0, "output"),
        Label("block", 0, "output", True),
        Label("block.inner", 0, "output", True),
        Label("", 0, "input 'x'", True),
        Label("block", 0, "table", True),
        Label("block.inner", 0, "weight", True),
    ]
    ordered = in_order(seen)
    assert ordered == [*seen[:4], seen[6], *seen[4:6]]


def test_rounding_is_one_unit_in_the_last_place() -> None:
    x = torch.full((1000,), 1.5)
    changed = Rounding(0)(x)
    assert set(((changed - x) / torch.finfo(x.dtype).eps).unique().tolist()) <= {-2.0, -1.0, 1.0, 2.0}
    assert torch.equal(changed, Rounding(0)(x))
    assert not torch.equal(changed, Rounding(1)(x))
