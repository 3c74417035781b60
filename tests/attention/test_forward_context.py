"""The forward context: per thread, matched by class, followed by compiled code, and brought back in recomputation."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest
import torch
from torch._dynamo.utils import counters

from fastvideo.attention import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    DistributedAttention,
    LocalAttention,
    register_attn_backend,
    use_attn_backend,
)
from fastvideo.forward_context import checkpoint, checkpoint_context_fn, get_forward_context, set_forward_context


@dataclass
class OffsetMetadata(AttentionMetadata):
    """Metadata of a backend that adds a tensor to the values."""

    offset: torch.Tensor


class OffsetImpl(AttentionImpl[OffsetMetadata]):
    def forward(self, query, key, value, attn_metadata):
        return query.tanh() * value + attn_metadata.offset


class OffsetBuilder(AttentionMetadataBuilder[OffsetMetadata]):
    def prepare(self):
        pass

    def build(self, current_timestep, offset):
        return OffsetMetadata(current_timestep, offset)


class OffsetBackend(AttentionBackend):
    @staticmethod
    def get_name():
        return "OFFSET"

    @staticmethod
    def get_impl_cls():
        return OffsetImpl

    @staticmethod
    def get_metadata_cls():
        return OffsetMetadata

    @staticmethod
    def get_builder_cls():
        return OffsetBuilder


@dataclass
class OtherMetadata(AttentionMetadata):
    pass


@pytest.fixture(scope="module", autouse=True)
def offset_backend():
    register_attn_backend("OFFSET", OffsetBackend)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()


def step(timestep: int) -> OffsetMetadata:
    return OffsetMetadata(timestep, torch.tensor(float(timestep)))


def expected(q: torch.Tensor, timestep: int) -> torch.Tensor:
    return q.tanh() * q + timestep


class Model(torch.nn.Module):
    """A block as in Wan: a sparse layer that needs metadata beside a dense one that ignores it."""

    def __init__(self) -> None:
        super().__init__()
        self.sparse = DistributedAttention(2, 8, backend="OFFSET")
        self.dense = LocalAttention(2, 8)

    def forward(self, q):
        out, _ = self.sparse(q, q, q)
        return self.dense(out, q, q)


def test_context_is_given_and_taken_back() -> None:
    with pytest.raises(RuntimeError, match="no forward context is set"):
        get_forward_context()
    with set_forward_context(3, None, forward_batch="batch") as context:
        assert get_forward_context() is context
        assert (context.current_timestep, context.forward_batch) == (3, "batch")
        with set_forward_context(4, None):
            assert get_forward_context().current_timestep == 4
        assert get_forward_context() is context
    with pytest.raises(RuntimeError):
        get_forward_context()


def test_context_ends_with_an_error() -> None:
    with pytest.raises(KeyError), set_forward_context(0, step(1)):
        raise KeyError
    with pytest.raises(RuntimeError):
        get_forward_context()


@pytest.mark.parametrize("wrong", ["text", {"OFFSET": step(1)}, {OffsetMetadata: OtherMetadata(1)}, [step(1)]])
def test_context_refuses_what_is_no_metadata(wrong) -> None:
    with pytest.raises(TypeError, match="attn_metadata"), set_forward_context(0, wrong):
        pass


@pytest.mark.parametrize("timestep", [7, 0.25, torch.tensor([3.0, 4.0])])
def test_a_timestep_is_a_number_or_a_tensor(timestep) -> None:
    with set_forward_context(timestep, None):
        assert get_forward_context().current_timestep is timestep


@pytest.mark.parametrize("wrong", ["7", None, [7], step(1)])
def test_context_refuses_what_is_no_timestep(wrong) -> None:
    with pytest.raises(TypeError, match="expected current_timestep as an integer, a float or a tensor"):
        set_forward_context(wrong, None).__enter__()


def test_four_threads_keep_four_contexts() -> None:
    layer, q = DistributedAttention(2, 8, backend="OFFSET"), torch.randn(1, 4, 2, 8)
    barrier, results = threading.Barrier(4), {}

    def run(number: int) -> None:
        with set_forward_context(number, step(number)):
            barrier.wait(timeout=30)
            for _ in range(20):
                results[number] = layer(q, q, q)[0]
            barrier.wait(timeout=30)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for number in range(4):
        torch.testing.assert_close(results[number], expected(q, number))
    with pytest.raises(RuntimeError):
        get_forward_context()


def test_metadata_is_matched_by_class() -> None:
    layer, q = LocalAttention(2, 8, backend="OFFSET"), torch.randn(1, 4, 2, 8)
    with set_forward_context(2, {OtherMetadata: OtherMetadata(2), OffsetMetadata: step(2)}):
        torch.testing.assert_close(layer(q, q, q), expected(q, 2))
    with set_forward_context(0, {AttentionMetadata: step(6)}):  # a mapping by a base class matches by the object
        torch.testing.assert_close(layer(q, q, q), expected(q, 6))


def test_missing_metadata_says_what_to_do() -> None:
    layer, q = LocalAttention(2, 8, backend="OFFSET"), torch.randn(1, 4, 2, 8)
    with pytest.raises(ValueError, match=r"needs metadata of class OffsetMetadata.*holds none.*set_forward_context"):
        layer(q, q, q)
    with set_forward_context(0, OtherMetadata(0)), pytest.raises(ValueError, match="holds OtherMetadata"):
        layer(q, q, q)
    with set_forward_context(0, {OtherMetadata: OtherMetadata(0)}), pytest.raises(ValueError, match="holds OtherMetadata"):
        layer(q, q, q)


def test_a_backward_pass_outside_the_context_is_told_of_our_checkpointing() -> None:
    layer, q = LocalAttention(2, 8, backend="OFFSET"), torch.randn(1, 4, 2, 8, requires_grad=True)
    with set_forward_context(2, step(2)):
        lost, kept = torch.utils.checkpoint.checkpoint(layer, q, q, q, use_reentrant=False), checkpoint(layer, q, q, q)
    with pytest.raises(ValueError, match=r"holds none.*forward_context\.checkpoint in place of torch\.utils\.checkpoint"):
        lost.sum().backward()
    kept.sum().backward()
    assert q.grad is not None


def test_metadata_handed_over_counts_and_must_fit() -> None:
    layer, q = LocalAttention(2, 8, backend="OFFSET"), torch.randn(1, 4, 2, 8)
    with set_forward_context(0, step(1)):
        torch.testing.assert_close(layer(q, q, q, attn_metadata=step(5)), expected(q, 5))
    with pytest.raises(TypeError, match="takes attn_metadata of class OffsetMetadata, got OtherMetadata"):
        layer(q, q, q, attn_metadata=OtherMetadata(0))


def test_dense_layers_ignore_the_metadata_of_their_neighbours() -> None:
    layer, q = LocalAttention(2, 8), torch.randn(1, 4, 2, 8)
    alone = layer(q, q, q)
    with set_forward_context(0, step(3)):
        torch.testing.assert_close(layer(q, q, q), alone, rtol=0, atol=0)


def test_compiled_calls_follow_the_context_and_thirty_steps_make_at_most_two_graphs() -> None:
    model, q = Model(), torch.randn(1, 4, 2, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for timestep in range(30):
        with set_forward_context(timestep, step(timestep)):
            torch.testing.assert_close(compiled(q), model(q))
    assert counters["stats"]["unique_graphs"] <= 2


def test_compiled_calls_follow_the_scope_of_backends() -> None:
    layer, q = DistributedAttention(2, 8), torch.randn(1, 4, 2, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    dense = compiled(q, q, q)[0]
    with set_forward_context(9, step(9)), use_attn_backend("OFFSET"):
        torch.testing.assert_close(compiled(q, q, q)[0], expected(q, 9))
        assert layer.decision.chosen == "OFFSET"
    torch.testing.assert_close(compiled(q, q, q)[0], dense)


def on_another_thread(function) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def test_checkpointing_recomputes_in_the_same_context_on_any_thread() -> None:
    layer = DistributedAttention(2, 8)
    gradients = []
    for run in (lambda x: layer(x, x, x)[0], lambda x: checkpoint(lambda y: layer(y, y, y)[0], x)):
        q = torch.randn(1, 4, 2, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with set_forward_context(3, step(3)), use_attn_backend("OFFSET"):
            out = run(q)
        on_another_thread(out.square().sum().backward)  # the context has ended, as it has on CUDA's backward thread
        gradients.append(q.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_checkpoint_context_fn_fits_torchs_own_checkpoint() -> None:
    layer, q = LocalAttention(2, 8, backend="OFFSET"), torch.randn(1, 4, 2, 8, requires_grad=True)
    with set_forward_context(3, step(3)):
        out = torch.utils.checkpoint.checkpoint(
            lambda x: layer(x, x, x), q, use_reentrant=False, context_fn=checkpoint_context_fn
        )
    with set_forward_context(8, step(8)):
        out.sum().backward()
    torch.testing.assert_close(q.grad, (1 - q.tanh() ** 2) * q + q.tanh())


def test_checkpointing_compiles() -> None:
    layer, q = DistributedAttention(2, 8, backend="OFFSET"), torch.randn(1, 4, 2, 8, requires_grad=True)
    compiled = torch.compile(lambda x: checkpoint(lambda y: layer(y, y, y)[0], x), fullgraph=True, backend="aot_eager")
    with set_forward_context(2, step(2)):
        out = compiled(q)
    out.sum().backward()
    torch.testing.assert_close(out, expected(q, 2))
    torch.testing.assert_close(q.grad, (1 - q.tanh() ** 2) * q + q.tanh())
