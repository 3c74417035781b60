"""How the fine stage asks an implementation for its output: into the call's own rows and gated where it can."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch

from fastvideo.block_sparse import fine_stage
from fastvideo.block_sparse.geometry import video_geometry, with_replicated
from fastvideo.block_sparse.impl import GatedTiles, load_implementation
from fastvideo.video import TileGrid

PORTABLE, REFERENCE = load_implementation("portable"), load_implementation("reference")


def make_call(num_text: int) -> tuple[Any, ...]:
    torch.manual_seed(0)
    geometry = with_replicated(video_geometry(TileGrid((3, 4, 5), (2, 2, 2)), "cpu"), num_text)
    num_tiles, rows = geometry.grid.num_tiles, geometry.grid.num_tokens + num_text
    query, key, value = torch.randn(3, 2, rows, 4, 16).unbind(0)
    coarse, gate = torch.randn(2, num_tiles, 4, 16), torch.randn(2, geometry.grid.num_tokens, 4, 16)
    indices = torch.stack([torch.randperm(num_tiles)[:3].sort().values for _ in range(8 * num_tiles)])
    return query, key, value, coarse, gate, indices.view(2, 4, num_tiles, 3).int(), geometry, 0.3, "portable"


def write(geometry, query, key, value, pattern, scale, out, lse, added: GatedTiles | None) -> None:
    """What `forward_into` has to do."""
    fine, sums = PORTABLE.forward(query, key, value, pattern, scale)
    out.copy_(fine if added is None else fine + added.gate * added.coarse[:, geometry.tile_of_token])
    lse.copy_(sums)


@pytest.mark.parametrize("num_text", [0, 7])
@pytest.mark.parametrize("has_gate", [True, False])
def test_output_goes_where_it_belongs(num_text: int, has_gate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = list(make_call(num_text))
    geometry = arguments[6]
    if not has_gate:
        arguments[3:5] = None, None
    expected = fine_stage.attend_to_tiles(*arguments)
    calls = []

    def forward_into(query, key, value, pattern, scale, out, lse, added: GatedTiles | None) -> None:
        calls.append((query.shape[1], out.data_ptr(), None if added is None else (added.gate, added.coarse)))
        assert out.shape == query.shape
        assert lse.shape == query.shape[:3]
        write(geometry, query, key, value, pattern, scale, out, lse, added)

    def refuse(*_: Any) -> None:
        raise AssertionError("expected the output in the call's own rows")

    ours = dataclasses.replace(PORTABLE, forward=refuse, forward_into=forward_into)
    monkeypatch.setattr(fine_stage, "load_implementation", lambda _: ours)
    out = fine_stage.attend_to_tiles(*arguments)
    torch.testing.assert_close(out, expected)
    num_video = geometry.grid.num_tokens
    assert [call[0] for call in calls] == ([num_video, num_text] if num_text else [num_video])
    assert [call[1] for call in calls] == [out.data_ptr(), out[:, num_video:].data_ptr()][: len(calls)]
    assert all((call[2] is not None) == (has_gate and i == 0) for i, call in enumerate(calls))


@pytest.mark.parametrize("num_text", [0, 7])
def test_gradients_with_and_without_the_fine_output(num_text: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row sums of what the gate adds, given as the gradient of the log-sum-exp, make up for the output that is gated."""
    *tensors, indices, geometry, scale, impl = make_call(num_text)
    dout, of_token = torch.randn_like(tensors[0]), geometry.tile_of_token

    def gradients() -> tuple[torch.Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        return torch.autograd.grad(fine_stage.attend_to_tiles(*leaves, indices, geometry, scale, impl), leaves, dout)

    expected, given = gradients(), []

    def differentiate_added(dout, coarse, gate, _geometry) -> tuple[torch.Tensor, ...]:
        dcoarse = torch.zeros_like(coarse).index_add_(1, of_token, dout * gate)
        return (dout * gate * coarse[:, of_token]).sum(-1), dcoarse, dout * coarse[:, of_token]

    def backward(dout, dlse, *rest: Any) -> tuple[torch.Tensor, ...]:
        given.append(dlse is not None)
        return REFERENCE.backward(dout, dlse, *rest)

    ours = dataclasses.replace(REFERENCE, backward=backward, is_delta_given=True, forward_into=partial(write, geometry))
    monkeypatch.setattr(fine_stage, "load_implementation", lambda _: ours)
    monkeypatch.setattr(fine_stage, "_differentiate_added", differentiate_added)
    for in_kernels in (False, True):
        monkeypatch.setattr(fine_stage, "_in_kernels", lambda _, answer=in_kernels: answer)
        for got, wanted in zip(gradients(), expected, strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    # The text has no gate, and only kernels make row sums.
    assert given == ([False, False, True, False] if num_text else [False, True])
