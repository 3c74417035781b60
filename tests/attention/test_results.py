"""What an implementation returns is held to its contract at every door."""

from __future__ import annotations

import pytest
import torch

from fastvideo.attention import (
    AttentionImpl,
    DistributedAttention,
    LocalAttention,
    attention,
    register_attn_backend,
)
from fastvideo.attention.backends.torch_sdpa import TorchSDPABackend
from fastvideo.attention.dispatch import Dispatcher
from fastvideo.attention.functional import describe_call
from fastvideo.attention.parts import BackendParts

FULL, LSE = r"torch.float32 \(2, 24, 4, 16\)", r"torch.float32 \(2, 24, 4\)"


class ReturningImpl(AttentionImpl):
    """Returns what a test makes of the query."""

    returned = staticmethod(lambda query: query)

    def forward(self, query, key, value, attn_metadata, *, return_lse=False):
        return self.returned(query)


class ReturningBackend(TorchSDPABackend):
    layer_independent = False

    @staticmethod
    def get_impl_cls():
        return ReturningImpl


class PaddedImpl(ReturningImpl):
    def preprocess_qkv(self, qkv, attn_metadata):
        return torch.nn.functional.pad(qkv, (0, 0, 0, 0, 0, 8))


class PaddedBackend(ReturningBackend):
    @staticmethod
    def get_impl_cls():
        return PaddedImpl


@pytest.fixture(autouse=True)
def backends() -> None:
    register_attn_backend("RETURNING", ReturningBackend)
    register_attn_backend("PADDED", PaddedBackend)


def draw(tokens: int = 24) -> torch.Tensor:
    return torch.randn(2, tokens, 4, 16)


@pytest.mark.parametrize(
    ("returned", "found"),
    [
        (lambda q: None, "NoneType"),
        (lambda q: [q], "list"),
        (lambda q: q[:, 1:], r"torch.float32 \(2, 23, 4, 16\)"),
        (lambda q: q.double(), r"torch.float64 \(2, 24, 4, 16\)"),
        (lambda q: (q, None), rf"\({FULL}, NoneType\)"),
        (lambda q: (q, q[..., 0]), rf"\({FULL}, {LSE}\)"),
    ],
)
def test_an_output_alone(returned, found, monkeypatch) -> None:
    monkeypatch.setattr(ReturningImpl, "returned", staticmethod(returned))
    q = draw()
    for door in (
        lambda: attention(q, q, q, backend="RETURNING"),
        lambda: LocalAttention(4, 16, backend="RETURNING")(q, q, q),
        lambda: DistributedAttention(4, 16, backend="RETURNING")(q, q, q),
    ):
        with pytest.raises(TypeError, match=f"backend RETURNING: expected {FULL} from its forward, got {found}; mend it"):
            door()


@pytest.mark.parametrize(
    ("returned", "found"),
    [
        (lambda q: q, FULL),
        (lambda q: (q, None), rf"\({FULL}, NoneType\)"),
        (lambda q: (q, q[..., 0].transpose(1, 2)), rf"\({FULL}, torch.float32 \(2, 4, 24\)\)"),
        (lambda q: (q, q[..., 0].bfloat16()), rf"\({FULL}, torch.bfloat16 \(2, 24, 4\)\)"),
        (lambda q: (q[:, 1:], q[..., 0]), r"\(torch.float32 \(2, 23, 4, 16\), "),
        (lambda q: (q, q[..., 0], q), rf"\({FULL}, {LSE}, {FULL}\)"),
    ],
)
def test_a_pair_with_the_log_sum_exp(returned, found, monkeypatch) -> None:
    monkeypatch.setattr(ReturningImpl, "returned", staticmethod(returned))
    q = draw()
    call = describe_call(q, q, q, None, None, 0.25, False, return_lse=True)
    selected = Dispatcher(backend="RETURNING").select(call)
    for door in (
        lambda: attention(q, q, q, backend="RETURNING", return_lse=True),
        lambda: BackendParts(selected, None, 0.25).forward(q, q, q, None, False),
    ):
        with pytest.raises(TypeError, match=rf"RETURNING: expected \({FULL}, {LSE}\) from its forward, got {found}"):
            door()


def test_replicated_tokens_are_part_of_the_output(monkeypatch) -> None:
    q, text = draw(), draw(5)
    layer = DistributedAttention(4, 16, backend="RETURNING")
    torch.testing.assert_close(layer(q, q, q, text, text, text), (q, text))
    monkeypatch.setattr(ReturningImpl, "returned", staticmethod(lambda query: query[:, :-5]))
    with pytest.raises(TypeError, match=r"expected torch.float32 \(2, 29, 4, 16\) from its forward, got .*\(2, 24, 4, 16\)"):
        layer(q, q, q, text, text, text)


def test_hooks_give_back_the_callers_tokens(monkeypatch) -> None:
    q, text = draw(), draw(5)
    layer = DistributedAttention(4, 16, backend="PADDED")
    for more in ((), (text, text, text)):
        with pytest.raises(
            TypeError, match=rf"expected {FULL} from its postprocess_output, got torch.float32 \(2, 32, 4, 16\)"
        ):
            layer(q, q, q, *more)
    monkeypatch.setattr(PaddedImpl, "postprocess_output", lambda self, output, attn_metadata: output[:, :24])
    torch.testing.assert_close(layer(q, q, q, text, text, text), (q, text))


def test_a_compiled_call_is_checked_too(monkeypatch) -> None:
    q = draw()
    layer = torch.compile(LocalAttention(4, 16, backend="RETURNING"), fullgraph=True, backend="eager")
    torch.testing.assert_close(layer(q, q, q), q)
    monkeypatch.setattr(ReturningImpl, "returned", staticmethod(lambda query: query[:, 1:]))
    with pytest.raises(Exception, match="expected"):
        torch.compile(LocalAttention(4, 16, backend="RETURNING"), fullgraph=True, backend="eager")(q, q, q)
