"""One attention to share: the whole inputs, a rank's shard of them, and the layers that compute it.

`B batch, S tokens, H heads, D head size`; `[B, S, H, D]` everywhere. A rank holds its shard of the tokens; the whole inputs,
alike on every rank, are there for one card's result and for the local part of a layout without any exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastvideo.attention import DistributedAttention, DistributedAttention_VSA
from fastvideo.attention.backends.video_sparse_attn import VideoSparseAttentionMetadata, VideoSparseAttentionMetadataBuilder
from fastvideo.benchmark.accuracy import Attended
from fastvideo.benchmark.cases import AUTOMATIC, VSA, make_cases, parse_tile
from fastvideo.benchmark.inputs import Inputs, make_inputs
from fastvideo.benchmark.shapes import BenchmarkShape
from fastvideo.distributed.mesh import LOCAL, SequenceGroup
from fastvideo.distributed.shards import split_lengths
from fastvideo.distributed.ulysses import share_heads

__all__ = ["Call", "Problem", "local_call", "make_problem", "one_card"]

Call = Callable[..., Tensor]


@dataclass(frozen=True)
class Problem:
    """One attention to share, as one rank sees it.

    Attributes:
        shape: Its sizes.
        sparsity: What VSA skips.
        inputs: The whole inputs, the same on every rank.
        lengths: Tokens of each rank's shard.
        rank: This rank.
        tile_tyx: The tiles of VSA.
    """

    shape: BenchmarkShape
    sparsity: float
    inputs: Inputs
    lengths: tuple[int, ...]
    rank: int
    tile_tyx: tuple[int, int, int]

    @property
    def device(self) -> torch.device:
        """Where this rank's tensors are."""
        return self.inputs.query.device

    @property
    def size(self) -> int:
        """How many ranks share it."""
        return len(self.lengths)

    def shard(self, x: Tensor) -> Tensor:
        """Return this rank's tokens of a tensor `[B, S, H, D]`, in memory of their own."""
        return x.narrow(1, sum(self.lengths[: self.rank]), self.lengths[self.rank]).contiguous()

    def shards(self) -> Inputs:
        """Return this rank's part of every input."""
        whole = self.inputs
        return Inputs(*(self.shard(x) for x in (whole.query, whole.key, whole.value, whole.gate, whole.dout)))

    def local_part(self, ulysses: int) -> Inputs:
        """Return what this rank attends to once everything has arrived: its row's queries and all keys, of its heads."""
        row, column = divmod(self.rank, ulysses)
        first, stop = share_heads(self.shape.num_heads, self.shape.num_heads, ulysses).query[column]
        start, count = sum(self.lengths[: row * ulysses]), sum(self.lengths[row * ulysses : (row + 1) * ulysses])
        whole = self.inputs
        query, gate, dout = (x[:, start : start + count, first:stop] for x in (whole.query, whole.gate, whole.dout))
        key, value = (x[:, :, first:stop] for x in (whole.key, whole.value))
        return Inputs(*(x.contiguous() for x in (query, key, value, gate, dout)))

    def attended(self, backend: str) -> Attended:
        """Return what a backend computes, for the reference."""
        if backend != VSA:
            return Attended()
        (case,) = make_cases(
            self.shape,
            self.inputs,
            "random",
            backends=[backend],
            impls=[AUTOMATIC],
            sparsities=[self.sparsity],
            tiles=["x".join(map(str, self.tile_tyx))],
            window_tyx=(1, 1, 1),
        )
        return case.attended()

    def metadata(self) -> VideoSparseAttentionMetadata:
        """Return the metadata of VSA."""
        return VideoSparseAttentionMetadataBuilder().build(
            current_timestep=0,
            raw_latent_shape=self.shape.grid_tyx,
            patch_size=(1, 1, 1),
            VSA_sparsity=self.sparsity,
            device=self.device,
            tile_tyx=self.tile_tyx,
        )

    def layer(self, backend: str, num_heads: int, group: SequenceGroup, lengths: Sequence[int] | None, **options: Any) -> Call:
        """Return a layer of `num_heads` heads on the ranks of `group` as a call of query, key, value and perhaps gate."""
        if backend == VSA:
            sparse = DistributedAttention_VSA(num_heads, self.shape.head_size, mesh=group, **options)
            metadata = self.metadata()

            def attend_sparsely(query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
                out: Tensor = sparse(query, key, value, gate_compress=gate, attn_metadata=metadata, shard_lengths=lengths)[0]
                return out

            return attend_sparsely
        dense = DistributedAttention(num_heads, self.shape.head_size, mesh=group, backend=backend, **options)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            out: Tensor = dense(query, key, value, shard_lengths=lengths)[0]
            return out

        return attend


def make_problem(
    shape: BenchmarkShape, dtype: torch.dtype, device: torch.device, *, sparsity: float | None, tile: str, seed: int
) -> Problem:
    """Make the inputs of a shape, alike on every rank of the default process group.

    Raises:
        ValueError: The shape is a fine stage alone, or `tile` is none.
    """
    if shape.fine_tile_tyx is not None:
        raise ValueError(f"expected the shape of a whole layer, got a fine stage alone: {shape}")
    inputs = make_inputs(shape, "random", dtype, device, seed)
    lengths = split_lengths(shape.num_tokens, dist.get_world_size())
    wanted = shape.sparsity if sparsity is None else sparsity
    return Problem(shape, wanted, inputs, lengths, dist.get_rank(), parse_tile(tile, shape.grid_tyx))


def one_card(problem: Problem, backend: str) -> Call:
    """Return the same layer on one card, for the whole inputs."""
    return problem.layer(backend, problem.shape.num_heads, LOCAL, None)


def local_call(problem: Problem, backend: str, num_heads: int) -> Call:
    """Return the layer of one rank's heads alone, for `Problem.local_part`; with more ranks than heads some have no work."""
    if num_heads == 0:
        return lambda query, *others: query + sum(0 * x.sum() for x in others)
    return problem.layer(backend, num_heads, LOCAL, None)
