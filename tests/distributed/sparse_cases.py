"""Drawn calls of VSA that parallel_ranks.py runs: on ranks and on one device, outputs and all gradients."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from parallel_cases import draw_pairwise

from fastvideo.attention import DistributedAttention_VSA
from fastvideo.attention.backends.video_sparse_attn import VideoSparseAttentionMetadataBuilder
from fastvideo.distributed import SequenceGroup, sequence_parallel, split_lengths
from fastvideo.forward_context import set_forward_context

GRID = (5, 2, 6)  # ragged tiles of 4 × 4 × 4: 2 × 1 × 2 of them
TOKENS, HEAD_SIZE, REPLICATED = 60, 8, 3
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class SparseCase:
    """One call of VSA."""

    layout: str = "ulysses"
    heads: tuple[int, int] = (4, 4)
    lengths: str = "even"
    replicated: str = ""
    gate: bool = False
    batch: int = 1
    sparsity: float = 0.5
    grad: str = "reduced"

    def __str__(self) -> str:
        return " ".join(["VSA", *(f"{field.name}={getattr(self, field.name)}" for field in fields(self))])


VALUES: dict[str, tuple] = {
    "layout": ("ulysses", "mesh"),
    "heads": ((1, 1), (3, 1), (4, 4), (8, 2), (6, 3)),
    "lengths": ("even", "uneven", "empty shard", "all on one"),
    "replicated": ("", "rear", "front"),
    "gate": (False, True),
    "batch": (1, 2),
    "sparsity": (0.0, 0.5, 0.7),
    "grad": ("reduced", "partial"),
}


def is_legal(values: dict) -> bool:
    return values["grad"] == "reduced" or bool(values["replicated"])


def shard_lengths(kind: str, size: int) -> tuple[int, ...]:
    """Return the shards of the video's tokens."""
    if kind == "all on one" or size == 1:
        return (*(0,) * (size - 1), TOKENS)
    if kind == "empty shard":
        others = split_lengths(TOKENS, size - 1)
        return (others[0], 0, *others[1:])
    even = split_lengths(TOKENS, size)
    return even if kind == "even" else (even[0] + 7, *even[1:-1], even[-1] - 7)


def inputs_of(case: SparseCase, device: str) -> tuple[Tensors, torch.Tensor]:
    """Return the whole inputs by name, and weights of the outputs for a loss."""
    generator = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))

    def draw(length: int, heads: int) -> torch.Tensor:
        return torch.randn(case.batch, length, heads, HEAD_SIZE, generator=generator, dtype=torch.float64).to(device)

    counts = {"q": case.heads[0], "k": case.heads[1], "v": case.heads[1]}
    inputs = {name: draw(TOKENS, heads) for name, heads in counts.items()}
    if case.replicated:
        inputs |= {f"replicated_{name}": draw(REPLICATED, heads) for name, heads in counts.items()}
    if case.gate:
        inputs["gate_compress"] = draw(TOKENS, case.heads[0])
    return inputs, draw(TOKENS + REPLICATED, case.heads[0])


def local(name: str, x: torch.Tensor, lengths: tuple[int, ...], rank: int) -> torch.Tensor:
    return x if name.startswith("replicated") else x.split(lengths, dim=1)[rank]


def run(case: SparseCase, group: SequenceGroup | None, lengths: tuple[int, ...], device: str) -> Tensors:
    """Return outputs and gradients of this rank's part, or of all on one device."""
    rank, size = (0, 1) if group is None else (group.rank, group.size)
    inputs, weight = inputs_of(case, device)
    leaves = {name: local(name, x, lengths, rank).clone().requires_grad_() for name, x in inputs.items()}
    layer = DistributedAttention_VSA(
        case.heads[0],
        HEAD_SIZE,
        num_kv_heads=case.heads[1],
        layout="auto" if case.layout == "mesh" else case.layout,
        joint_strategy=case.replicated or "rear",
        replicated_grad=case.grad,
    )
    metadata = VideoSparseAttentionMetadataBuilder().build(
        current_timestep=0, raw_latent_shape=GRID, patch_size=(1, 1, 1), VSA_sparsity=case.sparsity, device=device
    )
    with sequence_parallel(group), set_forward_context(0, metadata, shard_lengths=lengths):
        with torch.no_grad():
            inferred = layer(**leaves)[0] if device == "cuda" else None
        out, text = layer(**leaves)
    loss = (out * local("out", weight[:, :TOKENS], lengths, rank)).sum()
    found = {"out": out.detach()} | ({} if inferred is None else {"inferred": inferred})
    if text is not None:  # its loss is counted once: unequal shares of the ranks add up to one
        loss = loss + 2 * (rank + 1) / (size * (size + 1)) * (text * weight[:, TOKENS:]).sum()
        found["replicated_out"] = text.detach()
    loss.backward()
    return found | {name: leaf.grad for name, leaf in leaves.items()}


def check(case: SparseCase, mesh, device: str) -> None:
    group = SequenceGroup.from_mesh(mesh if case.layout == "mesh" else dist.group.WORLD)
    lengths = shard_lengths(case.lengths, group.size)
    expected, found = run(case, None, (TOKENS,), device), run(case, group, lengths, device)
    assert found.keys() == expected.keys()
    for name, x in found.items():
        if case.grad == "partial" and name.startswith("replicated_") and name != "replicated_out":
            dist.all_reduce(x)
        assert expected[name].any(), name
        torch.testing.assert_close(
            x, local(name, expected[name], lengths, group.rank), msg=lambda text, name=name: f"{name}: {text}"
        )


def draw_sparse(seed: int) -> list[SparseCase]:
    """Return cases in which every pair of values of two fields occurs."""
    return draw_pairwise(seed, SparseCase, VALUES, is_legal, ())
