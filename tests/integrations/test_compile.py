"""Every family's model under `torch.compile`, outputs and gradients; one of each kind of processor through Inductor."""

from __future__ import annotations

import shutil

import diffusers
import pytest
import torch
from torch import nn

from fastvideo.integrations.diffusers import AttentionPolicy, Rule, apply, plan_of
from fastvideo.testing import assert_within_budget

from .tiny_models import NAMED, SPARSE, call_with_gradients, convert, in_float64, make

diffusers.utils.logging.set_verbosity_error()

VSA = AttentionPolicy(rules=[Rule(role="self", backend="VIDEO_SPARSE_ATTN", sparsity=0.5)])
# Others have no processor of their own. HunyuanVideo 1.5 and Framepack read numbers of text tokens: only their blocks compile.
WHOLE = (*NAMED, "wan vace", "wan animate")
BLOCKS = (*NAMED, "wan animate", "hunyuan 1.5", "framepack", "flux 2")


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        scale = float(expected[key].abs().max())
        assert torch.allclose(tensor, expected[key], atol=1e-5 * scale, rtol=1e-5), key


def one_block_of_each_kind(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules around the first attention of each role and processor."""
    found = {}
    for place in plan_of(model).places:
        attn = model.get_submodule(place.path)
        kind = (place.role, type(attn.processor).__name__)
        around = place.path.rpartition(".")[0]
        path = place.path if isinstance(model.get_submodule(around), nn.ModuleList) else around
        found.setdefault(kind, path)
    return {path: model.get_submodule(path) for path in found.values()}


@pytest.mark.parametrize("name", WHOLE)
def test_compiled_whole(name: str) -> None:
    model, inputs = make(name)
    apply(model, VSA)
    expected = call_with_gradients(model, inputs)
    torch._dynamo.reset()
    assert_equal(call_with_gradients(torch.compile(model, backend="eager", fullgraph=True), inputs), expected)


@pytest.mark.parametrize("name", BLOCKS)
def test_compiled_blocks_with_a_traced_backward_pass(name: str) -> None:
    model, inputs = make(name)
    apply(model, VSA if name in SPARSE else "auto")
    expected = call_with_gradients(model, inputs)
    torch._dynamo.reset()
    for block in one_block_of_each_kind(model).values():
        block.compile(backend="aot_eager", fullgraph=True)
    assert_equal(call_with_gradients(model, inputs), expected)


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor on a CPU needs a C++ compiler")
@pytest.mark.parametrize(("name", "path"), [("wan", "blocks.0"), ("cogvideox", "transformer_blocks.0.attn1")])
def test_compiled_for_speed(name: str, path: str) -> None:
    """A block with attention beside text; attention joined by text alone, because each further kernel takes a second."""
    model, inputs = make(name)
    apply(model, VSA)
    expected = call_with_gradients(model, inputs)
    exact = call_with_gradients(in_float64(model), convert(inputs, torch.float64))
    torch._dynamo.reset()
    model.get_submodule(path).compile(fullgraph=True)
    for key, tensor in call_with_gradients(model, inputs).items():
        assert_within_budget(tensor, exact[key], expected[key], name=key)
