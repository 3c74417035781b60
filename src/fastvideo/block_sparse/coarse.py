"""The coarse part of Video Sparse Attention: means over the tiles of a video, and dense attention of those.

Means are in fp32 (fp64 for fp64), and so are the scores that choose tiles. Attention of the means multiplies in the dtype of
the tokens, as any attention of theirs does (`docs/kernels.md` says what fp32 cost there).

Shape legend: B batch, S video tokens, N tiles, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvideo.block_sparse.geometry import VideoGeometry
from fastvideo.video import tile_mean


def tile_means(inputs: Sequence[Tensor], geometry: VideoGeometry) -> list[Tensor]:
    """Means over tiles of the video rows of `[B, S + R, H, D]` tensors, `[B, N, H, D]` each, differentiable."""
    return [tile_mean(x[:, : geometry.grid.num_tokens], geometry.grid, geometry.video_tiles.sizes) for x in inputs]


def coarse_attention(means: Sequence[Tensor], scale: float, dtype: torch.dtype) -> Tensor:
    """Attention of the means of query, key and value of tokens in `dtype`.

    Args:
        means: `[B, N, Hq, D]` and twice `[B, N, Hkv, D]`, fp32 (fp64 for fp64); query head `h` meets key head
            `h // (Hq // Hkv)`.
        scale: Factor of the scores, any finite number.
        dtype: What products are made of.

    Returns:
        `[B, N, Hq, D]` in the dtype of the means.
    """
    # The scale goes into the means before they are rounded: kernels that take the row maximum before scaling need it positive.
    query, key, value = ((x * scale if i == 0 else x).to(dtype).transpose(1, 2) for i, x in enumerate(means))
    is_grouped = query.shape[1] != key.shape[1]
    if is_grouped and query.device.type != "cpu":
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        is_grouped = False
    out = F.scaled_dot_product_attention(query, key, value, scale=1.0, enable_gqa=is_grouped)
    return out.transpose(1, 2).to(means[0].dtype)
