"""Patterns, inputs and checks that the tests of several implementations of block-sparse attention share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch

from fastvideo.block_sparse import BlockPattern, TileLayout, block_sparse_attention
from fastvideo.testing import assert_op_within_budget, reference_attention

# Query tile sizes, key tile sizes, batch, query heads, key heads, head size.
Shape = tuple[list[int], list[int], int, int, int, int]


@dataclass(frozen=True)
class EngineCases:
    """What one implementation is tested with.

    Attributes:
        impl: The implementation.
        device: Where tensors are made; random numbers are the same on each.
        shapes: Sizes by name.
        density: Share of pairs of tiles that is listed.
        densities: The same for some shapes, by name.
    """

    impl: str
    device: str
    shapes: Mapping[str, Shape]
    density: float = 0.5
    densities: Mapping[str, float] = field(default_factory=dict)

    def make_pattern(self, shape: str, *, ordered: bool = True, shared: bool = False) -> BlockPattern:
        """Random lists; the first query tile sees nothing where there are several, and every token has moved."""
        query_sizes, key_sizes, batch, heads, *_ = self.shapes[shape]
        generator = torch.Generator().manual_seed(1)
        layouts = [
            TileLayout.from_sizes(
                sizes,
                order=torch.randperm(sum(sizes), generator=generator).to(self.device) if ordered else None,
                device=self.device,
            )
            for sizes in (query_sizes, key_sizes)
        ]
        extent = (1, 1) if shared else (batch, heads)
        mask = torch.rand(*extent, len(query_sizes), len(key_sizes), generator=generator)
        mask = mask < self.densities.get(shape, self.density)
        mask[:, :, 0] = len(query_sizes) == 1
        mask[:, :, -1, -1] = True
        return BlockPattern.from_mask(mask.to(self.device), *layouts)

    def make_inputs(self, shape: str, dtype: torch.dtype, size: float = 3.0) -> dict[str, torch.Tensor]:
        """Normal values, queries and keys `size` times as large."""
        query_sizes, key_sizes, batch, heads, kv_heads, head_size = self.shapes[shape]
        randn = partial(torch.randn, generator=torch.Generator().manual_seed(0))
        inputs = {
            "query": size * randn(batch, sum(query_sizes), heads, head_size),
            "key": size * randn(batch, sum(key_sizes), kv_heads, head_size),
            "value": randn(batch, sum(key_sizes), kv_heads, head_size),
        }
        return {name: x.to(self.device, dtype) for name, x in inputs.items()}

    def attend(self, query, key, value, *, pattern: BlockPattern, scale: float | None = None):
        """Output and log-sum-exp of the implementation."""
        return block_sparse_attention(query, key, value, pattern, scale=scale, return_lse=True, impl=self.impl)

    def check(
        self, inputs: dict[str, torch.Tensor], pattern: BlockPattern, scale: float | None = None, floor_ulps: int | None = None
    ) -> None:
        """Outputs and all gradients against dense attention in float64."""
        bound = {"pattern": pattern, "scale": scale}
        assert_op_within_budget(partial(self.attend, **bound), partial(reference, **bound), inputs, floor_ulps=floor_ulps)

    def gradients(self, inputs: dict[str, torch.Tensor], pattern: BlockPattern) -> tuple[torch.Tensor, ...]:
        """Output, log-sum-exp and the gradients of query, key and value."""
        leaves = [x.detach().requires_grad_() for x in inputs.values()]
        out, lse = self.attend(*leaves, pattern=pattern)
        loss = out.float().square().sum() + lse[lse.isfinite()].sum()
        return out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)


def reference(query, key, value, *, pattern: BlockPattern, scale: float | None = None):
    """Dense attention under the pattern's mask."""
    return reference_attention(query, key, value, attn_mask=pattern.token_mask(), scale=scale, return_lse=True)
