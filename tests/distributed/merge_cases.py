"""Partial results of attention, merged and held against attention over all keys in float64."""

from __future__ import annotations

import math

import torch

from fastvideo.distributed.merge import PartialMerger
from fastvideo.testing import assert_within_budget

TOKENS, HEADS, BATCH = 11, 3, 2

LAYOUTS = {
    "all rows": ((0, TOKENS),) * 3,
    "one part": ((0, TOKENS),),
    "causal": ((0, TOKENS), (0, TOKENS), (5, TOKENS), (5, TOKENS)),
    "rows in turn": ((0, 6), (0, 6), (6, TOKENS), (6, TOKENS)),
    "a part is empty": ((0, TOKENS), (4, 4), (0, TOKENS)),
    "rows without any": ((2, 5), (3, 9)),
}
"""Rows of each part."""


def check_merging(device: str, dtype: torch.dtype, layout: str, head_size: int = 16) -> None:
    """Merge random parts, of which some rows see nothing, and compare with float64."""
    generator = torch.Generator().manual_seed(len(layout))
    query = torch.zeros(BATCH, TOKENS, HEADS, head_size, dtype=dtype, device=device)
    merger, parts = PartialMerger(query), []
    wide = torch.promote_types(dtype, torch.float32)
    for first, last in LAYOUTS[layout]:
        out = torch.randn(BATCH, HEADS, last - first, head_size, generator=generator, dtype=torch.float64).to(dtype)
        lse = (30 * torch.randn(BATCH, HEADS, last - first, generator=generator, dtype=torch.float64)).to(wide)
        is_empty = torch.rand(lse.shape, generator=generator) < 0.25
        out, lse = out.masked_fill(is_empty[..., None], 0), lse.masked_fill(is_empty, -math.inf)
        parts.append((out.transpose(1, 2), lse.transpose(1, 2), (first, last)))
        merger.add(parts[-1][0].to(device), parts[-1][1].to(device), (first, last))
    merged, merged_lse = merger.output()
    assert merged.dtype == dtype
    assert merged_lse.dtype == wide
    expected, expected_lse = whole(parts, torch.float64)
    eager, eager_lse = whole(parts, wide)
    assert_within_budget(merged.cpu(), expected, eager.to(dtype), name="output")
    torch.testing.assert_close(merged_lse.cpu().double(), expected_lse, rtol=4 * torch.finfo(wide).eps, atol=1e-6)
    assert eager_lse.dtype == wide


def whole(
    parts: list[tuple[torch.Tensor, torch.Tensor, tuple[int, int]]], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weighted mean of parts and its log-sum-exp, written out."""
    batch, _, num_heads, head_size = parts[0][0].shape
    outs = torch.zeros(len(parts), batch, TOKENS, num_heads, head_size, dtype=dtype)
    lses = torch.full(outs.shape[:-1], -math.inf, dtype=dtype)
    for number, (out, lse, (first, last)) in enumerate(parts):
        outs[number, :, first:last], lses[number, :, first:last] = out.to(dtype), lse.to(dtype)
    lse = lses.logsumexp(0)
    weights = (lses - lse).exp().nan_to_num(0.0)
    return (weights[..., None] * outs).sum(0), lse
