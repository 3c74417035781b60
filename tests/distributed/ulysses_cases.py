"""Run by test_ulysses.py once per rank: every case on all ranks and on one, outputs and all gradients compared.

Each rank draws the whole inputs from one seed, so it can compute one device's numbers itself.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import re
import sys
import traceback
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from fastvideo.attention import DistributedAttention, DistributedAttention_VSA
from fastvideo.attention.backends.video_sparse_attn import VideoSparseAttentionMetadataBuilder
from fastvideo.distributed import gather_sequence, sequence_parallel, sequence_parallel_world, shard_sequence
from fastvideo.forward_context import set_forward_context

DEVICE = sys.argv[4] if len(sys.argv) > 4 else "cpu"
GRID = (5, 4, 8)  # 160 tokens in ragged tiles of 4 × 4 × 4, 20 of them
TOKENS = 160


@dataclass(frozen=True)
class Case:
    """One combination; `name` is what the report calls it."""

    name: str
    vsa: bool = False
    num_heads: int = 4
    num_kv_heads: int = 4
    key_len: int = TOKENS
    replicated: int = 0
    mask: str = ""
    causal: bool = False
    gate: bool = False
    rope: bool = False
    compiled: bool = False
    group: str = "default"
    partial: bool = False
    twin: str = ""
    scale: float | None = None


CASES = (
    Case("plain"),
    Case("batch and scale", scale=-0.2),
    Case("GQA", num_heads=8),
    Case("cross attention", key_len=24),
    Case("causal", causal=True),
    Case("replicated", replicated=7),
    Case("replicated, partial gradient", replicated=7, partial=True),
    Case("replicated, GQA", replicated=3, num_heads=8),
    Case("key padding", mask="key_padding"),
    Case("key padding, replicated", mask="key_padding", replicated=7),
    Case("bool mask of all heads", mask="bool"),
    Case("bool mask per head", mask="bool heads", replicated=5),
    Case("additive mask of all heads", mask="additive", replicated=5),
    Case("additive mask per head", mask="additive heads", replicated=5),
    Case("additive mask, cross attention", mask="additive", key_len=24),
    Case("causal with key padding", mask="key_padding", causal=True),
    Case("rotary embedding", rope=True, replicated=2),
    Case("compiled", compiled=True, replicated=7, mask="key_padding", rope=True),
    Case("mesh in a scope", group="scope"),
    Case("mesh of the layer", group="layer", replicated=7),
    Case("mesh of the layer, copied", group="layer", twin="deepcopy"),
    Case("mesh of the layer, pickled", group="layer", twin="pickle"),
    Case("VSA", vsa=True),
    Case("VSA, gate", vsa=True, gate=True),
    Case("VSA, gate, replicated, GQA", vsa=True, gate=True, replicated=7, num_heads=8),
    Case("VSA, compiled", vsa=True, gate=True, replicated=7, compiled=True, rope=True),
)


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def draw_inputs(case: Case) -> dict[str, torch.Tensor]:
    """Return whole inputs by name. Names tell how they are shared: by tokens, or replicated."""
    kv = case.num_kv_heads
    inputs = {
        "q": draw(2, TOKENS, case.num_heads, 16, seed=0),
        "k": draw(2, case.key_len, kv, 16, seed=1),
        "v": draw(2, case.key_len, kv, 16, seed=2),
    }
    if case.replicated:
        for number, (name, heads) in enumerate((("q", case.num_heads), ("k", kv), ("v", kv))):
            inputs[f"replicated_{name}"] = draw(2, case.replicated, heads, 16, seed=3 + number)
    if case.gate:
        inputs["gate_compress"] = draw(2, TOKENS, case.num_heads, 16, seed=6)
    return inputs


def draw_mask(case: Case) -> torch.Tensor | None:
    keys = case.key_len + case.replicated
    if not case.mask:
        return None
    if case.mask == "key_padding":
        return (torch.arange(keys) < torch.tensor([[keys], [keys // 2]])).to(DEVICE)
    heads = case.num_heads if case.mask.endswith("heads") else 1
    mask = draw(2, heads, TOKENS + case.replicated, keys, seed=7)
    return mask > 0 if case.mask.startswith("bool") else mask


def part(x: torch.Tensor, dim: int, rank: int, size: int, tail: int = 0) -> torch.Tensor:
    """Return a rank's part of the sequence along `dim`, and the whole replicated tail."""
    own, rest = x.split([x.shape[dim] - tail, tail], dim)
    return torch.cat([own.chunk(size, dim)[rank], rest], dim)


def run(case: Case, layer, inputs, mask, freqs, rank: int, size: int):
    """Call the layer on this rank's part and return outputs and the gradients of its parts."""
    leaves = {
        name: (x if name.startswith("replicated") else part(x, 1, rank, size)).clone().requires_grad_()
        for name, x in inputs.items()
    }
    keywords = {}
    if mask is not None:
        rows = 1 if mask.dim() == 2 else 2
        keywords["attn_mask"] = part(mask, rows, rank, size, case.replicated).clone()
        if mask.is_floating_point():
            leaves["attn_mask"] = keywords["attn_mask"].requires_grad_()
    if case.rope:
        keywords["freqs_cis"] = tuple(part(table, 0, rank, size) for table in freqs)
    call = torch.compile(layer, fullgraph=True, backend="aot_eager") if case.compiled and size > 1 else layer
    out, text = call(**{name: leaf for name, leaf in leaves.items() if name != "attn_mask"}, **keywords)
    loss = (out * part(draw(*inputs["q"].shape, seed=8), 1, rank, size)).sum()
    if text is not None:  # its loss is counted once: unequal shares of the ranks add up to one
        share = 2 * (rank + 1) / (size * (size + 1))
        loss = loss + share * (text * draw(*text.shape, seed=9)).sum()
    loss.backward()
    return out.detach(), None if text is None else text.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def build(case: Case, mesh):
    layer_cls = DistributedAttention_VSA if case.vsa else DistributedAttention
    layer = layer_cls(
        case.num_heads,
        16,
        num_kv_heads=case.num_kv_heads,
        softmax_scale=case.scale,
        causal=case.causal,
        mesh=mesh if case.group == "layer" else None,
        replicated_grad="partial" if case.partial else "reduced",
    )
    if case.twin == "deepcopy":
        return copy.deepcopy(layer)
    return pickle.loads(pickle.dumps(layer)) if case.twin == "pickle" else layer


def check(case: Case, mesh) -> None:
    torch._dynamo.reset()
    rank, size = dist.get_rank(), dist.get_world_size()
    inputs, mask = draw_inputs(case), draw_mask(case)
    angles = draw(TOKENS, 8, seed=10)
    freqs = (angles.cos(), angles.sin())
    metadata = VideoSparseAttentionMetadataBuilder().build(
        current_timestep=0, raw_latent_shape=GRID, patch_size=(1, 1, 1), VSA_sparsity=0.6, device=DEVICE
    )
    with set_forward_context(0, metadata):
        with sequence_parallel(None):
            alone = build(dataclasses.replace(case, group="default", twin=""), mesh)
            expected = run(case, alone, inputs, mask, freqs, 0, 1)
        layer = build(case, mesh)
        if case.group == "scope":
            with sequence_parallel(mesh):
                found = run(case, layer, inputs, mask, freqs, rank, size)
        else:
            found = run(case, layer, inputs, mask, freqs, rank, size)
    torch.testing.assert_close(found[0], part(expected[0], 1, rank, size))
    if case.replicated:
        torch.testing.assert_close(found[1], expected[1])
    for name, grad in expected[2].items():
        if name.startswith("replicated"):
            own = found[2][name]
            if case.partial:
                dist.all_reduce(own)
            torch.testing.assert_close(own, grad, msg=lambda text, name=name: f"{name}: {text}")
        else:
            dim, tail = (2, case.replicated) if name == "attn_mask" else (1, 0)
            torch.testing.assert_close(
                found[2][name], part(grad, dim, rank, size, tail), msg=lambda text, name=name: f"{name}: {text}"
            )


def check_shards() -> None:
    rank, size = sequence_parallel_world()
    assert (rank, size) == (dist.get_rank(), dist.get_world_size())
    whole = draw(2, 12, 3, seed=0).requires_grad_()
    weight = draw(2, 12, 3, seed=1)
    shard = shard_sequence(whole, 1)
    torch.testing.assert_close(shard, whole.chunk(size, 1)[rank])
    again = gather_sequence(shard * 2, 1)
    torch.testing.assert_close(again, whole * 2)
    ((again * weight).sum() / size).backward()
    torch.testing.assert_close(whole.grad, 2 * weight)


def expect(error, text: str, function, *arguments, **keywords) -> None:
    with pytest.raises(error, match=re.escape(text)):
        function(*arguments, **keywords)


def check_refusals() -> None:
    """What doesn't divide raises before anything is sent, so no rank waits for another."""
    size = dist.get_world_size()
    q = draw(1, 8, 3, 16, seed=0)
    expect(ValueError, f"can't be divided over {size} devices", DistributedAttention(3, 16), q, q, q)
    expect(ValueError, "1, 3 devices would fit", DistributedAttention(3, 16), q, q, q)
    expect(ValueError, "multiple of", shard_sequence, draw(1, 2 * size + 1, 1, seed=0), 1)
    layer, q = DistributedAttention(4, 16), draw(1, 8, 4, 16, seed=0)
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool, device=DEVICE)
    expect(ValueError, f"8, {8 * size}]", layer, q, q, q, attn_mask=mask)


def main(rank: str, size: str, folder: str, device: str = "cpu") -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(int(rank))
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder}/store",
        rank=int(rank),
        world_size=int(size),
        timeout=timedelta(seconds=120),
    )
    mesh = init_device_mesh(device, (1, int(size)), mesh_dim_names=("ring", "ulysses"))
    checks = {case.name: (check, case, mesh) for case in CASES}
    checks |= {"shards": (check_shards,), "refusals": (check_refusals,)}
    report = {}
    for name, (function, *arguments) in checks.items():
        try:
            function(*arguments)
            report[name] = "equal"
        except Exception:  # noqa: BLE001  # the report of one case must not hide the others
            report[name] = traceback.format_exc()
    Path(folder, f"{rank}.json").write_text(json.dumps(report))
    dist.barrier()  # nobody leaves while another still talks
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
