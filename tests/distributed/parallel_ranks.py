"""Run by test_parallel.py and test_drawn.py once per rank: every case on all ranks, outputs and all gradients compared with
one device's.

Each rank draws the whole inputs from one seed and computes one device's numbers itself, by `reference_attention`.
"""

from __future__ import annotations

import json
import sys
import traceback
import zlib
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

sys.path.insert(0, str(Path(__file__).parent))

import named_cases
import sparse_cases
from parallel_cases import Case, draw_pairwise, shard_lengths

from fastvideo.attention import DistributedAttention
from fastvideo.distributed import SequenceGroup, key_padding_shard, sequence_parallel
from fastvideo.forward_context import set_forward_context
from fastvideo.testing import assert_within_budget, reference_attention

BATCH, HEAD_SIZE, REPLICATED = 2, 8, 3
Tensors = dict[str, torch.Tensor]


def part(x: torch.Tensor, dim: int, lengths: tuple[int, ...], rank: int) -> torch.Tensor:
    """Return a rank's part of a sequence along `dim`, with all that stands behind the sequence."""
    first, rest = sum(lengths[:rank]), x.shape[dim] - sum(lengths)
    pieces = [x.narrow(dim, first, lengths[rank]), x.narrow(dim, sum(lengths), rest)]
    return torch.cat(pieces, dim)


class Problem:
    """One case with its whole inputs, the same on every rank; the mask has the replicated tokens behind the others."""

    def __init__(self, case: Case, size: int, device: str) -> None:
        self.case, self.device = case, device
        self.lengths = shard_lengths(case.lengths, size)
        self.kv_lengths = self.lengths
        if case.keys == "sharded" and case.causal:  # as many as queries, elsewhere
            self.kv_lengths = (*self.lengths[1:-1], sum(self.lengths[-1:]) + self.lengths[0], 0) if size > 1 else self.lengths
        elif case.keys == "sharded":
            equal = len(set(self.lengths)) == 1
            self.kv_lengths = (5,) * size if equal else tuple((3 * rank + 2) % 7 for rank in range(size))
        elif case.keys == "replicated":
            self.kv_lengths = (0,) * size
        self.dtype = getattr(torch, case.dtype)
        self.generator = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
        heads, kv_heads = case.heads
        rows, keys = sum(self.lengths), sum(self.kv_lengths)
        self.inputs: Tensors = {
            "q": self.draw(BATCH, rows, heads, HEAD_SIZE),
            "k": self.draw(BATCH, keys, kv_heads, HEAD_SIZE),
            "v": self.draw(BATCH, keys, kv_heads, HEAD_SIZE),
        }
        self.more_rows = REPLICATED if case.replicated in ("rear", "front") else 0
        self.more_keys = REPLICATED if case.replicated else 0
        if self.more_rows:
            self.inputs["replicated_q"] = self.draw(BATCH, REPLICATED, heads, HEAD_SIZE)
        if self.more_keys:
            self.inputs["replicated_k"] = self.draw(BATCH, REPLICATED, kv_heads, HEAD_SIZE)
            self.inputs["replicated_v"] = self.draw(BATCH, REPLICATED, kv_heads, HEAD_SIZE)
        self.mask = self.draw_mask(rows + self.more_rows, keys, heads)
        self.weight = self.draw(BATCH, rows + self.more_rows, heads, HEAD_SIZE)

    def draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, dtype=self.dtype).to(self.device)

    def draw_mask(self, rows: int, keys: int, heads: int) -> torch.Tensor | None:
        """Return a mask in which some rows see nothing at all."""
        kind, columns = self.case.mask, keys + self.more_keys
        if not kind:
            return None
        if kind == "lengths":
            real = torch.tensor([[columns], [0 if keys else columns]])
            return (torch.arange(columns) < real).to(self.device)
        if kind == "key padding":
            mask = self.draw(BATCH, columns) > -0.3
            mask[1, : columns // 2] = False
            return mask
        mask = self.draw(BATCH if "bool" in kind else 1, heads if kind.endswith("heads") else 1, rows, columns)
        mask = mask.masked_fill(mask > 1.0, -torch.inf)
        mask[:, :, 0] = -torch.inf
        return mask > -0.5 if kind.startswith("bool") else mask

    def one_device(self, dtype: torch.dtype) -> Tensors:
        """Return outputs and gradients on one device."""
        leaves = {name: x.to(dtype).detach().requires_grad_() for name, x in self.inputs.items()}
        mask = self.mask
        if mask is not None and mask.is_floating_point():
            mask = leaves["attn_mask"] = mask.to(dtype).detach().requires_grad_()
        joined = [torch.cat([leaves[x] for x in (y, f"replicated_{y}") if x in leaves], dim=1) for y in "qkv"]
        if self.case.causal:
            mask = self.at_positions(mask, rows=joined[0].shape[1], columns=joined[1].shape[1])
        out = reference_attention(*joined, attn_mask=mask)
        (out * self.weight.to(dtype)).sum().backward()
        return {"out": out.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}

    def at_positions(self, mask: torch.Tensor | None, rows: int, columns: int) -> torch.Tensor:
        """Return a mask that lets each query see keys up to its own position; in front, replicated tokens have the first."""

        def positions(count: int, length: int) -> torch.Tensor:
            places = torch.arange(count, device=self.device)
            return (places + self.more_keys) % (length + self.more_keys) if "front" in self.case.replicated else places

        total = sum(self.lengths)
        seen = (positions(rows, total)[:, None] >= positions(columns, total))[None, None]
        if mask is None:
            return seen
        mask = mask[:, None, None] if mask.dim() == 2 else mask
        return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -torch.inf)

    def local(self, name: str, x: torch.Tensor, rank: int) -> torch.Tensor:
        """Return a rank's part of an input, an output or a gradient of that name."""
        if name in ("q", "out"):
            return part(x, 1, self.lengths, rank)
        if name in ("k", "v"):
            return part(x, 1, self.kv_lengths, rank)
        if name == "attn_mask":
            return part(x, 1, self.kv_lengths, rank) if x.dim() == 2 else part(x, 2, self.lengths, rank)
        return x

    def in_front(self, mask: torch.Tensor) -> torch.Tensor:
        """Return a local mask with the replicated tokens before the others."""
        mask = torch.cat([mask[..., mask.shape[-1] - self.more_keys :], mask[..., : mask.shape[-1] - self.more_keys]], -1)
        if mask.dim() == 4 and self.more_rows:
            mask = torch.cat([mask[:, :, -self.more_rows :], mask[:, :, : -self.more_rows]], 2)
        return mask

    def local_mask(self, leaf: torch.Tensor, group: SequenceGroup) -> torch.Tensor:
        if self.case.mask == "lengths" and sum(self.kv_lengths):
            real = torch.tensor([sum(self.kv_lengths), 0], device=self.device)
            own = key_padding_shard(real, group, shard_lengths=self.kv_lengths)
            leaf = torch.cat([own, leaf[:, own.shape[1] :]], dim=1)
        return self.in_front(leaf) if "front" in self.case.replicated else leaf

    def on_ranks(self, group: SequenceGroup) -> tuple[Tensors, torch.Tensor]:
        """Return outputs and gradients of this rank, and the outputs without a gradient, when tensors travel otherwise."""
        case, rank, size = self.case, group.rank, group.size
        leaves = {name: self.local(name, x, rank).clone().requires_grad_() for name, x in self.inputs.items()}
        keywords = {}
        if self.mask is not None:
            leaf = self.local("attn_mask", self.mask, rank).clone()
            if leaf.is_floating_point():
                leaves["attn_mask"] = leaf.requires_grad_()
            keywords["attn_mask"] = self.local_mask(leaf, group)
        equal = len(set(self.lengths)) == 1
        if case.keys != "own" and not (equal and len(set(self.kv_lengths)) == 1):
            keywords["kv_shard_lengths"] = self.kv_lengths
        layer = DistributedAttention(
            case.heads[0],
            HEAD_SIZE,
            num_kv_heads=case.heads[1],
            causal=case.causal,
            layout=self.layout_on(group),
            joint_strategy="front" if "front" in case.replicated else "rear",
            replicated_grad=case.grad,
            head_groups=case.groups,
        )
        tensors = {name: leaf for name, leaf in leaves.items() if name != "attn_mask"}
        with sequence_parallel(group), set_forward_context(0, None, shard_lengths=None if equal else self.lengths):
            inferred = []
            with torch.no_grad():
                # By collectives a gradient changes nothing but what groups of heads are written to.
                for _ in range(2 if self.device == "cuda" else int(case.groups is not None)):
                    inferred = [x for x in layer(**tensors, **keywords) if x is not None]
            out, text = layer(**tensors, **keywords)
        weight = self.local("out", self.weight, rank)
        loss = (out * weight[:, : out.shape[1]]).sum()
        if text is not None:  # its loss is counted once: unequal shares of the ranks add up to one
            loss = loss + 2 * (rank + 1) / (size * (size + 1)) * (text * weight[:, out.shape[1] :]).sum()
            out = torch.cat([out, text], dim=1)
        loss.backward()
        found = {"out": out.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}
        return found, torch.cat(inferred, dim=1) if inferred else found["out"]

    def layout_on(self, group: SequenceGroup) -> str:
        """Return the layout to ask for; a mesh without a ring has nobody to gather from."""
        on_mesh, _, wish = self.case.layout.rpartition(" ")
        if not on_mesh or wish == "ulysses":
            return wish
        return "gather" if wish == "gather" and group.ring.size > 1 else "auto"

    def check(self, group: SequenceGroup) -> None:
        found, inferred = self.on_ranks(group)
        exact, eager = self.one_device(torch.float64), self.one_device(self.dtype)
        if self.case.grad == "partial":
            for name, x in found.items():
                if name.startswith("replicated_"):
                    dist.all_reduce(x)
        assert found.keys() == exact.keys()
        for name, x in [("out", inferred), *found.items()]:
            expected, same_dtype = (self.local(name, y[name], group.rank) for y in (exact, eager))
            if name == "attn_mask" and self.more_rows and self.case.grad == "partial":
                own = self.lengths[group.rank]
                dist.all_reduce(rows := x[:, :, own:].contiguous())
                x = torch.cat([x[:, :, :own], rows], dim=2)
            assert x.dtype == self.dtype
            if not exact[name].any():  # one visible key: all gradients of scores are 0, and there is nothing to scale by
                torch.testing.assert_close(x, expected.to(x.dtype), rtol=0, atol=1e-13 if x.dtype == torch.float64 else 1e-5)
                continue
            # The whole tensor stands beside this rank's part, so that the budget is that of the whole, and ones, because
            # gradients that cancel are sums of terms of this size.
            ones = torch.ones_like(x).flatten()
            whole = [
                torch.cat([part.flatten(), y[name].flatten(), ones.to(part.dtype)])
                for part, y in ((expected, exact), (same_dtype, eager))
            ]
            assert_within_budget(torch.cat([x.flatten(), eager[name].flatten(), ones]), *whole, name=name, floor_ulps=16)


def group_of(case: Case, mesh) -> SequenceGroup:
    return SequenceGroup.from_mesh(mesh if case.layout.startswith("mesh") else dist.group.WORLD)


def run(name: str, function: Callable[[], None], report: dict[str, str], path: Path) -> None:
    try:
        function()
        report[name] = "equal"
    except AssertionError:
        report[name] = traceback.format_exc()
    except BaseException:
        report[name] = traceback.format_exc()
        path.write_text(json.dumps(report))
        raise  # the ranks may be out of step; the others end with a lost connection


def main(rank: str, size: str, folder: str, device: str = "cpu", only: str = "") -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if device == "cuda":
        torch.cuda.set_device(int(rank))
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder}/store",
        rank=int(rank),
        world_size=int(size),
        timeout=timedelta(seconds=60),
    )
    shape = (2, int(size) // 2) if int(size) % 2 == 0 else (int(size), 1)
    mesh = init_device_mesh(device, shape, mesh_dim_names=("ring", "ulysses"))
    report, path = {}, Path(folder, f"{rank}.json")
    given = Path(folder, "cases.json")
    cases = [Case.from_json(values) for values in json.loads(given.read_text())] if given.exists() else draw_pairwise(int(size))
    for case in cases:
        if only in str(case):
            run(str(case), lambda case=case: Problem(case, int(size), device).check(group_of(case, mesh)), report, path)
    sparse, named = ([], {}) if given.exists() else (sparse_cases.draw_sparse(seed=int(size)), named_cases.cases(mesh, device))
    for case in sparse:
        if only in str(case):
            run(str(case), lambda case=case: sparse_cases.check(case, mesh, device), report, path)
    for name, function in named.items():
        if only in name:
            run(name, function, report, path)
    path.write_text(json.dumps(report))
    dist.barrier()  # nobody leaves while another still talks
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
