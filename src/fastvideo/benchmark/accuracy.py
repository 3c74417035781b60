"""The error of a result: attention of sampled heads again in float64, and in the dtype's own arithmetic for the budget.

A row is within budget when, for the output and each gradient, its max and mean error are at most twice those of the same
arithmetic done eagerly in its dtype, plus a rounding floor (`fastvideo.testing.budget`). Heads are computed a block of
queries at a time. Where a head has more pairs of tokens than `MAX_PAIRS`, blocks are sampled, and the gradients of key and
value, which need all queries, are not compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvideo.block_sparse import TileLayout
from fastvideo.testing.budget import assert_within_budget

__all__ = ["Attended", "Comparison", "compare", "head_results"]

MAX_PAIRS = 8e9
_NUM_SAMPLED_BLOCKS = 24
_BLOCK_ROWS = 1024


@dataclass(frozen=True)
class Attended:
    """What a case computes.

    Attributes:
        lists: `[B|1, H|1, N, k]` key tiles of each query tile; `None` for dense attention.
        counts: `[B|1, H|1, N]`, how many entries of a list count; `None` for all.
        layout: The tiles of queries and keys; `None` for dense attention.
        has_coarse: The gated attention of the tiles' means is added.
    """

    lists: Tensor | None = None
    counts: Tensor | None = None
    layout: TileLayout | None = None
    has_coarse: bool = False


@dataclass(frozen=True)
class Comparison:
    """Errors by name: largest difference over largest magnitude; and the budget that was exceeded, if one was."""

    errors: dict[str, float]
    over_budget: str | None


def compare(attended: Attended, leaves: Sequence[Tensor], dout: Tensor | None, results: dict[str, Tensor]) -> Comparison:
    """Compare `results` (`"out"`, and with `dout` also `"dquery"`, `"dkey"`, `"dvalue"`, `"dgate"`) on two sampled heads.

    Args:
        attended: What was computed.
        leaves: Query, key, value and, for a coarse part, gate, `[B, S, H, D]`.
        dout: The output's gradient, or `None` to compare outputs alone.
        results: Tensors `[B, S, H, D]`.
    """
    batch, _, num_heads, _ = leaves[0].shape
    errors: dict[str, float] = {}
    over: str | None = None
    for sample, head in dict.fromkeys([(0, 0), (batch - 1, num_heads - 1)]):
        heads = [x[sample, :, head] for x in (*leaves, *(() if dout is None else (dout,)))]
        expected, rows = head_results(attended, sample, head, [x.double() for x in heads], dout is not None)
        eager, _ = head_results(attended, sample, head, heads, dout is not None)
        for name, reference in expected.items():
            # Sampled blocks have the output, and the gradients that belong to queries.
            got = results[name][sample, :, head][rows]
            difference = (got.double() - reference[rows]).abs().max() / reference[rows].abs().max().clamp(min=1e-30)
            errors[name] = max(errors.get(name, 0.0), float(difference.nan_to_num(nan=torch.inf)))
            try:
                assert_within_budget(got, reference[rows], eager[name][rows].to(got.dtype), name=name)
            except AssertionError as error:
                over = over or str(error)
    return Comparison(errors, over)


def head_results(
    attended: Attended, sample: int, head: int, tensors: list[Tensor], needs_grad: bool
) -> tuple[dict[str, Tensor], Tensor | slice]:
    """Output and gradients of one head, `[S, D]` each, and the rows that were computed.

    Args:
        attended: What is computed.
        sample: The sample, for its lists.
        head: The head, likewise.
        tensors: Its query, key, value, with a coarse part also gate, and with gradients also that of the output, `[S, D]`.
        needs_grad: Compute the gradients, by the names that `compare` takes.
    """
    query, key, value = tensors[:3]
    dout = tensors[-1] if needs_grad else None
    sums = torch.promote_types(query.dtype, torch.float32)
    out = torch.zeros_like(query, dtype=sums)
    dq, dk, dv = (torch.zeros_like(x, dtype=sums) for x in (query, key, value))
    blocks, is_sampled = _blocks(attended, sample, head, query.shape[0], query.device)
    for rows, columns in blocks:
        parts = [x.detach().requires_grad_(needs_grad) for x in (query[rows], key[columns], value[columns])]
        block = _attend(*parts)
        out[rows] = block.detach().to(sums)
        if dout is not None:
            grads = torch.autograd.grad(block, parts, dout[rows])
            dq[rows] = grads[0].to(sums)
            dk.index_add_(0, columns, grads[1].to(sums))
            dv.index_add_(0, columns, grads[2].to(sums))
    found = {"out": out, "dquery": dq, "dkey": dk, "dvalue": dv}
    if attended.has_coarse and attended.layout is not None:
        _add_coarse(found, tensors, attended.layout, dout)
    wanted = ["out"]
    if needs_grad:
        wanted += ["dquery"] if is_sampled else ["dquery", "dkey", "dvalue"]
        wanted += ["dgate"] if attended.has_coarse else []
    kept: Tensor | slice = torch.cat([rows for rows, _ in blocks]) if is_sampled else slice(None)
    return {name: found[name] for name in wanted}, kept


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention in the dtype of the inputs with a softmax in fp32 at least."""
    scores = (query @ key.mT).to(torch.promote_types(query.dtype, torch.float32)) * query.shape[-1] ** -0.5
    weights: Tensor = scores.softmax(-1).to(value.dtype)
    return weights @ value


def _blocks(
    attended: Attended, sample: int, head: int, num_tokens: int, device: torch.device
) -> tuple[list[tuple[Tensor, Tensor]], bool]:
    """Blocks of queries with the keys that they see, and whether they are a sample."""
    layout, lists = attended.layout, attended.lists
    if lists is None or layout is None:
        everything = torch.arange(num_tokens, device=device)
        rows = torch.split(everything, _BLOCK_ROWS)
        chosen, is_sampled = _sample(len(rows), float(num_tokens) ** 2)
        return [(rows[i], everything) for i in chosen], is_sampled
    place = (sample if lists.shape[0] > 1 else 0, head if lists.shape[1] > 1 else 0)
    listed = lists[place].tolist()
    if attended.counts is not None:
        listed = [entries[:count] for entries, count in zip(listed, attended.counts[place].tolist(), strict=True)]
    packed = torch.arange(num_tokens, device=device) if layout.order is None else layout.order.long()
    sizes: list[int] = layout.sizes.tolist()
    tiles = torch.split(packed, sizes)
    pairs = sum(size * sum(sizes[entry] for entry in entries) for size, entries in zip(sizes, listed, strict=True))
    chosen, is_sampled = _sample(len(tiles), float(pairs))
    return [(tiles[i], torch.cat([tiles[entry] for entry in listed[i]])) for i in chosen], is_sampled


def _sample(num_blocks: int, pairs: float) -> tuple[list[int], bool]:
    if pairs <= MAX_PAIRS:
        return list(range(num_blocks)), False
    step = -(-num_blocks // _NUM_SAMPLED_BLOCKS)
    # The last block may be a short one.
    return sorted({*range(0, num_blocks, step), num_blocks - 1}), True


def _add_coarse(found: dict[str, Tensor], tensors: list[Tensor], layout: TileLayout, dout: Tensor | None) -> None:
    """Add attention of the means of one head, broadcast and gated, and its gradients."""
    leaves = [x.detach().requires_grad_(dout is not None) for x in tensors[:4]]
    tile_of_token, sizes = layout.tile_of_token(), layout.sizes
    sums = torch.promote_types(leaves[0].dtype, torch.float32)

    def mean(x: Tensor) -> Tensor:
        total = torch.zeros(layout.num_tiles, x.shape[1], dtype=sums, device=x.device)
        return (total.index_add(0, tile_of_token, x.to(sums)) / sizes[:, None]).to(x.dtype)

    coarse = _attend(*(mean(x) for x in leaves[:3]))
    gated = F.embedding(tile_of_token, coarse) * leaves[3]
    found["out"] += gated.detach().to(sums)
    if dout is not None:
        grads = torch.autograd.grad(gated, leaves, dout)
        for name, grad in zip(("dquery", "dkey", "dvalue"), grads[:3], strict=True):
            found[name] += grad.to(sums)
        found["dgate"] = grads[3].to(sums)
