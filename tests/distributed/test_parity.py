"""`check_parallel_parity` passes what is equal and names the first layer that isn't; the cases stand in parity_cases.py."""

from __future__ import annotations

import collections
import json
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fastvideo.distributed.parity import ParityError, check_parallel_parity
from fastvideo.distributed.parity_compare import Place, find_divergences, fingerprint, in_order, measure, place_of
from fastvideo.distributed.parity_record import Label, Rounding, flatten, replace_tensors

SCRIPT = Path(__file__).with_name("parity_cases.py")


EQUAL = {
    "wan_fp32": 206,
    "wan_bf16": 206,
    "wan_sparse": 214,
    "uneven_shards": 16,
    "uneven_by_default": 16,
    "partial_gradients": 16,
    "layer_mesh": 16,
    "own_loss": 9,
    "parameters_called_output": 5,
    "parameters_called_output_in_a_layer": 7,
    "gradients_are_left_alone": 5,
}
FIRST = {
    "wan_fault": "blocks.1.attn1.attention: output[0], most on rank 1: max error 0.0015",
    "wan_fault_in_backward": "blocks.0.attn2.to_v: gradient of parameter 'weight', most on rank",
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
    assert "rank 1 has step=raised ValueError: on purpose where rank 0 has" in reports[0]["one_rank_raises"]["text"]


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


@dataclass(frozen=True, slots=True)
class Output:
    """What a layer returns. Frozen, so that nothing but a copy can have other tensors."""

    sample: torch.Tensor
    rest: object = None


class Returns(nn.Module):
    """Returns its input as `made_of` packs it, another one from the second call on if `drifts`."""

    def __init__(self, made_of, *, drifts: bool = False) -> None:
        super().__init__()
        self.made_of, self.drifts, self.calls = made_of, drifts, 0

    def forward(self, x: torch.Tensor):
        self.calls += 1
        return self.made_of(1.5 * x if self.drifts and self.calls == 2 else x)


def test_outputs_of_dataclasses_are_compared() -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    report = check_parallel_parity(Returns(lambda x: Output(2 * x, [Output(3 * x)])), [x])
    assert (report.passed, report.num_compared) == (True, 5), "two outputs, their gradients and the input's"
    report = check_parallel_parity(Returns(lambda x: Output(2 * x, [Output(3 * x)]), drifts=True), [x])
    assert str(report.first.label) == "the module: output.sample"
    assert [str(found.label) for found in report.divergences][1] == "the module: output.rest[0].sample"


@pytest.mark.parametrize(
    "made_of",
    [lambda x: x.long(), lambda x: torch.complex(x, x), lambda x: x > 0, lambda _: None, lambda x: types.SimpleNamespace(a=x)],
    ids=["integers", "complex", "bool", "none", "object"],
)
def test_where_nothing_is_compared_nothing_passes(made_of) -> None:
    with pytest.raises(ValueError, match="there was nothing to compare: expected some submodule"):
        check_parallel_parity(Returns(made_of), [torch.ones(2)], backward=False)
    with pytest.raises(ValueError, match="there was nothing to compare"):
        check_parallel_parity(nn.Linear(2, 2), [torch.ones(2, 2)], backward=False, only=lambda name: name == "another")


def test_tensors_are_replaced_in_whatever_holds_them() -> None:
    x, steps = torch.ones(2), torch.arange(3)
    named = collections.namedtuple("named", "a b")
    default = collections.defaultdict(list, a=x, b=steps)
    for value in (
        default,
        collections.OrderedDict(a=x, b=steps),
        types.MappingProxyType({"a": x, "b": steps}),
        {"a": (x, [x]), "b": named(x, steps)},
        Output(x, [Output(x, steps)]),
    ):
        changed = replace_tensors(value, lambda tensor: 2 * tensor)
        assert type(changed) is type(value)
        tensors = dict(flatten(changed))
        assert list(tensors) == list(dict(flatten(value)))
        assert tensors
        assert all(tensor.tolist() == [2, 2] for tensor in tensors.values())
        assert all(tensor.tolist() == [1, 1] for _, tensor in flatten(value)), "the value itself is left alone"
    assert replace_tensors(default, lambda tensor: tensor)["new"] == [], "its factory is kept"
    report = check_parallel_parity(Returns(lambda x: collections.defaultdict(list, a=2 * x)), [x])
    assert (report.passed, report.num_compared) == (True, 3)


def test_outputs_of_diffusers_are_rebuilt() -> None:
    outputs = pytest.importorskip("diffusers.models.modeling_outputs", reason="diffusers is not installed")
    changed = replace_tensors(outputs.Transformer2DModelOutput(sample=torch.ones(2)), lambda tensor: 2 * tensor)
    assert type(changed) is outputs.Transformer2DModelOutput
    assert (changed.sample.tolist(), changed["sample"].tolist()) == ([2, 2], [2, 2])


def test_nonsense() -> None:
    module, x = nn.Linear(3, 3), torch.ones(4, 3)
    with pytest.raises(TypeError, match=r"module as an nn\.Module, whose layers are compared, got builtin_function_or_method"):
        check_parallel_parity(torch.relu, [x])
    with pytest.raises(TypeError, match="inputs by name or in order, got Tensor; put a lone one into a list"):
        check_parallel_parity(module, x)
    for dim in (7, 2, -3, 0.0, True):
        with pytest.raises(ValueError, match=rf"expected shard to name one of the 2 dims of input 'input', got {dim}"):
            check_parallel_parity(module, {"input": x}, shard={"input": dim})
    with pytest.raises(ValueError, match="expected shard to name one of the 0 dims of input 1, got 0"):
        check_parallel_parity(module, [x, torch.tensor(1.0)], shard={1: 0})
    assert check_parallel_parity(module, {"input": x}, shard={"input": -2}).passed
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
        Label("block", 0, "parameter 'table'", True),
        Label("block.inner", 0, "parameter 'weight'", True),
    ]
    ordered = in_order(seen)
    assert ordered == [*seen[:4], seen[6], *seen[4:6]]


def test_rounding_is_one_unit_in_the_last_place() -> None:
    x = torch.full((1000,), 1.5)
    changed = Rounding(0)(x)
    assert set(((changed - x) / torch.finfo(x.dtype).eps).unique().tolist()) <= {-2.0, -1.0, 1.0, 2.0}
    assert torch.equal(changed, Rounding(0)(x))
    assert not torch.equal(changed, Rounding(1)(x))
