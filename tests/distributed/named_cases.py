"""Cases that test_parallel.py runs by name: what one layer does beyond plain calls, and what is refused."""

from __future__ import annotations

import copy
import functools
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch.autograd import forward_ad

from fastvideo.attention import AttentionImpl, DistributedAttention, DistributedAttention_VSA, register_attn_backend
from fastvideo.attention.backends.sliding_tile_attn import SlidingTileAttentionMetadataBuilder
from fastvideo.attention.backends.torch_sdpa import TorchSDPABackend
from fastvideo.attention.backends.video_sparse_attn import VideoSparseAttentionMetadataBuilder
from fastvideo.attention.selector import BackendUnavailable
from fastvideo.distributed import (
    SequenceGroup,
    gather_sequence,
    sequence_parallel,
    sequence_parallel_world,
    shard_sequence,
    split_lengths,
)
from fastvideo.forward_context import set_forward_context
from fastvideo.testing import reference_attention

GRID = (5, 4, 8)  # 160 tokens in ragged tiles of 4 × 4 × 4, 20 of them
TOKENS = 160


@dataclass(frozen=True)
class Named:
    """One layer and how it is called. Compared with itself on one device."""

    vsa: bool = False
    heads: tuple[int, int] = (4, 4)
    layout: str = "auto"
    on: str = "world"
    replicated: int = 0
    only_keys: bool = False
    gate: bool = False
    rope: bool = False
    causal: bool = False
    padding: bool = False
    uneven: bool = False
    empty: bool = False
    scale: float | None = None
    compiled: bool = False
    backend: str = "aot_eager"
    dtype: torch.dtype = torch.float64
    twin: str = ""
    groups: int | None = None
    alone: bool = False


NAMED = {
    "batch and scale": Named(scale=-0.2),
    "scale of zero in a ring": Named(scale=0.0, layout="ring"),
    "negative scale in a ring": Named(scale=-0.2, layout="ring", causal=True),
    "rotary embedding, uneven": Named(rope=True, replicated=2, uneven=True),
    "rotary embedding in a causal ring": Named(rope=True, causal=True, layout="ring", uneven=True),
    "bfloat16 in a ring": Named(layout="ring", dtype=torch.bfloat16, padding=True),
    "bfloat16 by heads": Named(layout="ulysses", dtype=torch.bfloat16, replicated=3),
    "a loss on replicated tokens on one rank, by heads": Named(layout="ulysses", replicated=3, alone=True),
    "a loss on replicated tokens on one rank, causal ring": Named(layout="ring", replicated=3, causal=True, alone=True),
    "a loss on replicated tokens on one rank, VSA": Named(vsa=True, replicated=3, gate=True, alone=True),
    "mesh in a scope": Named(on="scope"),
    "mesh of the layer": Named(on="layer", replicated=7),
    "mesh of the layer, copied": Named(on="layer", twin="deepcopy"),
    "mesh of the layer, pickled": Named(on="layer", twin="pickle"),
    "VSA": Named(vsa=True),
    "VSA, gate": Named(vsa=True, gate=True),
    "VSA, gate, replicated, GQA": Named(vsa=True, gate=True, replicated=7, heads=(8, 4)),
    "VSA, gate, replicated, uneven, heads that do not divide": Named(
        vsa=True, gate=True, replicated=5, heads=(6, 3), uneven=True
    ),
    "VSA on a mesh, gate, replicated, uneven": Named(vsa=True, gate=True, on="scope", heads=(6, 3), replicated=3, uneven=True),
    "VSA on a mesh, one head": Named(vsa=True, on="scope", heads=(1, 1)),
    "VSA, one head": Named(vsa=True, gate=True, heads=(1, 1), uneven=True, replicated=2),
}

COMPILED = {
    "compiled, by heads": Named(compiled=True, replicated=7, padding=True, rope=True, uneven=True),
    "compiled, groups of heads and GQA": Named(compiled=True, heads=(8, 4), layout="ulysses", groups=2),
    "compiled, ring": Named(compiled=True, layout="ring", replicated=3, padding=True, uneven=True),
    "compiled, causal ring": Named(compiled=True, layout="ring", causal=True, replicated=3),
    "compiled, gather": Named(compiled=True, layout="gather", replicated=3, only_keys=True, groups=2),
    "compiled, mesh": Named(compiled=True, on="scope", layout="ring"),
    "compiled, VSA": Named(compiled=True, vsa=True, gate=True, replicated=7, rope=True),
}

# Ranks whose graphs differ: a compiler that reorders has to keep the order in which they meet.
OPTIMISED = {
    "optimised, by heads": Named(compiled=True, backend="inductor", replicated=3, padding=True, uneven=True, layout="ulysses"),
    "optimised, more ranks than heads": Named(compiled=True, backend="inductor", heads=(1, 1), replicated=3, layout="ulysses"),
    "optimised, causal ring, an empty shard": Named(
        compiled=True, backend="inductor", replicated=3, causal=True, empty=True, layout="ring"
    ),
}


def draw(*shape: int, seed: int, device: str) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)


def draw_inputs(case: Named, device: str) -> dict[str, torch.Tensor]:
    """Return whole inputs by name. Names tell how they are shared: by tokens, or replicated."""
    heads, kv_heads = case.heads
    counts = {"q": heads, "k": kv_heads, "v": kv_heads}
    inputs = {name: draw(2, TOKENS, counts[name], 16, seed=i, device=device) for i, name in enumerate("qkv")}
    for i, name in enumerate("kv" if case.only_keys else "qkv"):
        if case.replicated:
            inputs[f"replicated_{name}"] = draw(2, case.replicated, counts[name], 16, seed=3 + i, device=device)
    if case.gate:
        inputs["gate_compress"] = draw(2, TOKENS, heads, 16, seed=6, device=device)
    return {name: x.to(case.dtype) for name, x in inputs.items()}


def build(case: Named, mesh):
    layer_cls = DistributedAttention_VSA if case.vsa else DistributedAttention
    heads, kv_heads = case.heads
    return layer_cls(
        heads,
        16,
        num_kv_heads=kv_heads,
        softmax_scale=case.scale,
        causal=case.causal,
        layout=case.layout,
        mesh=mesh,
        head_groups=case.groups,
    )


def run(case: Named, layer, lengths: tuple[int, ...], rank: int, device: str) -> dict[str, torch.Tensor]:
    """Call the layer on this rank's part and return outputs and the gradients of its parts."""
    mine = functools.partial(part, lengths=lengths, rank=rank)
    leaves = {
        name: (x if name.startswith("replicated") else mine(x, 1)).clone().requires_grad_()
        for name, x in draw_inputs(case, device).items()
    }
    keywords = {}
    if case.padding:
        keys = TOKENS + case.replicated
        padding = torch.arange(keys) < torch.tensor([[keys], [keys // 2]])
        keywords["attn_mask"] = mine(padding.to(device), 1)
    if case.rope:
        angles = draw(TOKENS, 8, seed=10, device=device)
        keywords["freqs_cis"] = (mine(angles.cos(), 0), mine(angles.sin(), 0))
    call = torch.compile(layer, fullgraph=True, backend=case.backend) if case.compiled and len(lengths) > 1 else layer
    out, text = call(**leaves, **keywords)
    loss = (out * mine(draw(2, TOKENS, case.heads[0], 16, seed=8, device=device), 1)).sum()
    if text is not None:
        of_text = (text * draw(*text.shape, seed=9, device=device)).sum()
        if not case.alone:
            loss = loss + 2 * (rank + 1) / (len(lengths) * (len(lengths) + 1)) * of_text
        elif rank == 0:
            loss = loss + of_text
    loss.backward()
    found = {"out": out.detach()} | ({} if text is None else {"replicated_out": text.detach()})
    return found | {name: leaf.grad for name, leaf in leaves.items()}


def part(x: torch.Tensor, dim: int, lengths: tuple[int, ...], rank: int) -> torch.Tensor:
    """Return a rank's part of the sequence along `dim`, and what stands behind the sequence."""
    first, total = sum(lengths[:rank]), sum(lengths)
    own = x.narrow(dim, first, lengths[rank])
    return torch.cat([own, x.narrow(dim, total, x.shape[dim] - total)], dim)


def check(case: Named, mesh, device: str) -> None:
    torch._dynamo.reset()
    rank, size = sequence_parallel_world()
    metadata = VideoSparseAttentionMetadataBuilder().build(
        current_timestep=0, raw_latent_shape=GRID, patch_size=(1, 1, 1), VSA_sparsity=0.6, device=device
    )
    lengths = tuple(TOKENS // size + (7 if rank == 0 else 0) for rank in range(size)) if case.uneven or TOKENS % size else None
    if lengths is not None:
        lengths = (*lengths[:-1], TOKENS - sum(lengths[:-1]))
    if case.empty:
        lengths = (TOKENS, *[0] * (size - 1))
    with set_forward_context(0, metadata):
        with sequence_parallel(None):
            expected = run(case, build(case, None), (TOKENS,), 0, device)
        layer = build(case, mesh if case.on == "layer" else None)
        if case.twin:
            layer = copy.deepcopy(layer) if case.twin == "deepcopy" else pickle.loads(pickle.dumps(layer))
        scope = mesh if case.on == "scope" else dist.group.WORLD
        with sequence_parallel(scope, shard_lengths=lengths):
            lengths = lengths or split_lengths(TOKENS, size)
            found = run(case, layer, lengths, rank, device)
    assert found.keys() == expected.keys()
    tolerance = {} if case.dtype == torch.float64 else {"rtol": 0.05, "atol": 0.06}
    for name, x in found.items():
        whole = name.startswith("replicated")
        assert not x.isnan().any(), f"{name}: NaN in {int(x.isnan().sum())} of {x.numel()} places"
        assert x.any() or case.scale == 0 or x.numel() == 0, f"{name}: all zero"
        torch.testing.assert_close(
            x,
            expected[name] if whole else part(expected[name], 1, lengths, rank),
            **tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def check_shards(mesh, device: str) -> None:
    rank, size = sequence_parallel_world()
    assert (rank, size) == (dist.get_rank(), dist.get_world_size())
    whole, weight = (draw(2, 11, 3, seed=seed, device=device) for seed in (0, 1))
    for group in (dist.group.WORLD, mesh):
        whole = whole.detach().requires_grad_()
        lengths = split_lengths(11, size)
        with sequence_parallel(group, shard_lengths=lengths):
            shard = shard_sequence(whole, 1)
            with set_forward_context(0, None), sequence_parallel(group):
                torch.testing.assert_close(shard_sequence(whole, 1), shard)
            with sequence_parallel(None):
                assert shard_sequence(whole, 1) is whole
            torch.testing.assert_close(shard, whole.split(lengths, 1)[rank])
            again = gather_sequence(shard * 2, 1)
        torch.testing.assert_close(again, whole * 2)
        ((again * weight).sum() / size).backward()
        torch.testing.assert_close(whole.grad, 2 * weight)
        turned, factor = (torch.complex(whole.detach(), weight), torch.complex(weight, whole.detach()))
        turned.requires_grad_()
        with sequence_parallel(group, shard_lengths=lengths):
            (shard_sequence(turned, 1) * factor.split(lengths, 1)[rank]).real.sum().backward()
        torch.testing.assert_close(turned.grad, factor.conj().resolve_conj())
    twelve = draw(12, seed=2, device=device)
    torch.testing.assert_close(shard_sequence(twelve, 0), twelve.chunk(size)[rank])
    torch.testing.assert_close(
        gather_sequence(twelve[:rank], 0, shard_lengths=tuple(range(size)))[: max(0, size - 2)],
        torch.cat([twelve[:r] for r in range(size)])[: max(0, size - 2)],
    )


def check_float8(mesh, device: str) -> None:
    """What travels in float8 comes out close to what it was, and never with a gradient."""
    size = dist.get_world_size()
    q, k, v = (draw(2, 6, 4, 16, seed=seed, device=device).bfloat16() for seed in range(3))
    for group, layout in ((dist.group.WORLD, "ulysses"), (dist.group.WORLD, "gather"), (mesh, "gather")):
        if group is mesh and mesh["ring"].size() == 1:
            continue
        exact = DistributedAttention(4, 16, layout=layout, mesh=group)
        eighth = DistributedAttention(4, 16, layout=layout, mesh=group, exchange_dtype=torch.float8_e4m3fn, head_groups=2)
        expected, _ = exact(q, k, v)
        found, _ = eighth(q, k, v)
        off = (found - expected).norm() / expected.norm()
        assert 0.001 < off < 0.08, f"{layout}: off by {off}"
        leaf = q.clone().requires_grad_()
        expect(NotImplementedError, "is for inference", eighth, leaf, k, v)
    ring = DistributedAttention(4, 16, layout="ring", exchange_dtype=torch.float8_e4m3fn)
    expect(NotImplementedError, "got layout 'ring'", ring, q, k, v)
    causal = DistributedAttention(4, 16, layout="gather", causal=True, exchange_dtype=torch.float8_e4m3fn)
    expect(NotImplementedError, "no partial results are merged, by Ulysses or by gather without causal", causal, q, k, v)
    assert size > 1


def check_asked_gradients(mesh, device: str) -> None:
    """Ranks may ask for the gradients of different inputs."""
    rank, size = sequence_parallel_world()
    weight, *whole = (draw(2, 2 * size, 3, 16, seed=seed, device=device) for seed in range(4))
    leaves = [x.clone().requires_grad_() for x in whole]
    expected = torch.autograd.grad(reference_attention(*leaves), leaves, weight)[rank % 3]
    for layout in ("ulysses", "gather", "ring"):
        own = [x.chunk(size, 1)[rank].clone().requires_grad_() for x in whole]
        out, _ = DistributedAttention(3, 16, layout=layout)(*own)
        (found,) = torch.autograd.grad(out, own[rank % 3], weight.chunk(size, 1)[rank])
        torch.testing.assert_close(found, expected.chunk(size, 1)[rank], msg=lambda text, layout=layout: f"{layout}: {text}")


class NoLseImpl(AttentionImpl):
    """A backend of somebody else's, which knows nothing of a log-sum-exp or a mask."""

    def forward(self, query, key, value, attn_metadata):
        return reference_attention(query, key, value, scale=self.softmax_scale)


class NoLseBackend(TorchSDPABackend):
    @staticmethod
    def get_name():
        return "NO_LSE"

    @staticmethod
    def get_impl_cls():
        return NoLseImpl


def check_third_party(mesh, device: str) -> None:
    """A backend that can't be merged runs in the layouts that don't merge, and "auto" takes one of them."""
    register_attn_backend("NO_LSE", NoLseBackend)
    rank, size = sequence_parallel_world()
    whole = [draw(2, 3 * size, 1, 16, seed=seed, device=device) for seed in range(3)]
    own = [x.chunk(size, 1)[rank] for x in whole]
    for layout in ("auto", "gather", "ulysses"):
        out, _ = DistributedAttention(1, 16, backend="NO_LSE", layout=layout)(*own)
        torch.testing.assert_close(out, reference_attention(*whole).chunk(size, 1)[rank])
    ring = DistributedAttention(1, 16, backend="NO_LSE", layout="ring")
    expect(BackendUnavailable, "log-sum-exp", ring, *own)


def check_compiled_lengths(mesh, device: str) -> None:
    """Compiled layers follow lengths that change from step to step, uneven ones too."""
    rank, size = sequence_parallel_world()
    for layout in ("ulysses", "ring"):
        torch._dynamo.reset()
        layer = DistributedAttention(4, 16, layout=layout)
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        for length in (8, 13, 5):
            lengths = tuple(length + r for r in range(size))
            q, k, v = (draw(1, lengths[rank], 4, 16, seed=seed + rank, device=device) for seed in range(3))
            with set_forward_context(0, None, shard_lengths=lengths):
                torch.testing.assert_close(compiled(q, k, v)[0], layer(q, k, v)[0])


def expect(error, text: str, function, *arguments, **keywords) -> None:
    with pytest.raises(error, match=re.escape(text)):
        function(*arguments, **keywords)


def check_refusals(mesh, device: str) -> None:
    """What can't run raises before anything is sent, so no rank waits for another."""
    size, group = dist.get_world_size(), SequenceGroup.from_mesh(mesh)
    expect(ValueError, "without shard lengths", shard_sequence, draw(1, 2 * size + 1, 1, seed=0, device=device), 1)
    for share in (gather_sequence, shard_sequence):
        expect(ValueError, "with a dim 1 along which it is shared, got shape ()", share, torch.ones((), device=device))
        expect(ValueError, "with a dim -3 along which it is shared, got shape (2, 3)", share, torch.ones(2, 3), -3)
    layer, q = DistributedAttention(4, 16), draw(1, 8, 4, 16, seed=0, device=device)
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool, device=device)
    expect(ValueError, f"8, {8 * size}]", layer, q, q, q, attn_mask=mask)
    expect(ValueError, f"of the {size} ranks", layer, q, q, q, shard_lengths=(8,) * (size + 1))
    expect(ValueError, "its tensor has 8", layer, q, q, q, shard_lengths=(7,) * size)
    uneven = tuple(range(8 - dist.get_rank(), 8 - dist.get_rank() + size))
    expect(ValueError, "kv_shard_lengths=", layer, q, q[:, :5], q[:, :5], shard_lengths=uneven)
    empty = q[:, :0]
    expect(ValueError, "without empty dims", layer, q, empty, empty)
    metadata = VideoSparseAttentionMetadataBuilder().build(
        current_timestep=0, raw_latent_shape=(1, 8, size), patch_size=(1, 1, 1), VSA_sparsity=0.0, device=device
    )
    for layout in ("ring", "gather"):
        sparse = DistributedAttention_VSA(4, 16, layout=layout)
        expect(BackendUnavailable, "layout='ulysses'", sparse, q, q, q, attn_metadata=metadata)
    for count, text in ((2, "windows for 2 heads, this call has 4"), (4, "a window for each of 4 heads; where devices share")):
        windows = SlidingTileAttentionMetadataBuilder().build(
            current_timestep=0,
            raw_latent_shape=(1, 8, size),
            patch_size=(1, 1, 1),
            STA_window=[(1, 1, 1), (1, 3, 1)] * (count // 2),
            tile_tyx=(1, 2, 2),
            device=device,
        )
        windowed = DistributedAttention(4, 16, backend="SLIDING_TILE_ATTN")
        expect(ValueError, text, windowed, q, q, q, attn_metadata=windows)
    if group.ring.size == 1:
        with sequence_parallel(group):
            expect(ValueError, "nobody to share keys with", DistributedAttention(4, 16, layout="ring"), q, q, q)
    expect(ValueError, "expected layout as one of", DistributedAttention, 4, 16, layout="rings")


def check_second_derivatives(mesh, device: str) -> None:
    """First derivatives that are recorded are right, and second ones refused, also beside a term that has its own."""
    rank, size = sequence_parallel_world()
    whole = draw(1, 4 * size, 4, 16, seed=0, device=device)
    mask = draw(1, 1, 4, 4 * size, seed=1, device=device).requires_grad_()
    calls = {
        layout: functools.partial(
            lambda layer, x: layer(x, x, x, attn_mask=mask)[0], DistributedAttention(4, 16, layout=layout)
        )
        for layout in ("ulysses", "ring", "gather")
    }
    for name, call in {**calls, "gather_sequence": gather_sequence, "shard_sequence": shard_sequence}.items():
        x = (whole if name == "shard_sequence" else whole.chunk(size, 1)[rank]).clone().requires_grad_()
        out = call(x)
        (expected,) = torch.autograd.grad(out.pow(3).sum(), x, retain_graph=True)
        (grad,) = torch.autograd.grad(out.pow(3).sum(), x, create_graph=True)
        torch.testing.assert_close(grad, expected)
        expect(NotImplementedError, "first derivatives only", torch.autograd.grad, grad.sum() + x.pow(2).sum(), x)
        if name == "ring":  # whose gradients are no linear function of that of its output
            (grad,) = torch.autograd.grad(call(x).sum(), x, create_graph=True)
            expect(NotImplementedError, "first derivatives only", torch.autograd.grad, grad.sum() + x.pow(2).sum(), x)


def check_tangents(mesh, device: str) -> None:
    """Forward-mode derivatives are refused, not lost on the way."""
    x = draw(1, 4, 4, 16, seed=dist.get_rank(), device=device)
    layer = DistributedAttention(4, 16, layout="ulysses")
    for function in (gather_sequence, lambda x: layer(x, x, x)[0]):
        for jvp in (torch.func.jvp, with_dual_numbers):
            expect(NotImplementedError, "got sent with one, which would be dropped here", jvp, function, (x,), (x,))


def with_dual_numbers(function, primals, tangents) -> torch.Tensor:
    with forward_ad.dual_level():
        return function(*map(forward_ad.make_dual, primals, tangents))


def cases(mesh, device: str) -> dict[str, Callable[[], None]]:
    """Return the checks of this number of ranks by name."""
    size = dist.get_world_size()
    if size == 1:
        return {}
    named = dict(NAMED)
    if size == 2:
        named |= COMPILED | OPTIMISED
    elif size == 4:
        named["compiled, mesh"] = COMPILED["compiled, mesh"]
        named["compiled, VSA on a mesh"] = Named(compiled=True, vsa=True, gate=True, replicated=3, on="scope")
    # Of float64 on a CPU torch 2.11 tells compilers of a log-sum-exp in float32.
    compiles_rings = device == "cuda" or torch.__version__ >= (2, 12)
    named = {name: case for name, case in named.items() if compiles_rings or not (case.compiled and case.layout == "ring")}
    checks = {name: functools.partial(check, case, mesh, device) for name, case in named.items()}
    checks["shards"] = functools.partial(check_shards, mesh, device)
    checks["gradients that not all ask for"] = functools.partial(check_asked_gradients, mesh, device)
    checks["float8"] = functools.partial(check_float8, mesh, device)
    if size == 2 and compiles_rings:
        checks["compiled, changing lengths"] = functools.partial(check_compiled_lengths, mesh, device)
    checks["second derivatives"] = functools.partial(check_second_derivatives, mesh, device)
    checks["tangents"] = functools.partial(check_tangents, mesh, device)
    checks["a backend without log-sum-exp"] = functools.partial(check_third_party, mesh, device)
    checks["refusals"] = functools.partial(check_refusals, mesh, device)
    return checks
