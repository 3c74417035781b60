"""The specification of Video Sparse Attention: dense masks and plain loops, in the dtype of its inputs, with autograd.

Run in float64 it is the truth that tests compare with; run in a lower dtype it is the arithmetic whose error sets their
budget. It shares no code with `fastvideo.block_sparse.video_sparse` or `fastvideo.video`.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor


def reference_tile_of_token(grid_tyx: tuple[int, int, int], tile_tyx: tuple[int, int, int]) -> list[int]:
    """Tile of each token, both numbered in raster order.

    Example:
        >>> reference_tile_of_token((1, 2, 3), (1, 2, 2))
        [0, 0, 1, 0, 0, 1]
    """
    _, num_y, num_x = (math.ceil(extent / tile) for extent, tile in zip(grid_tyx, tile_tyx, strict=True))
    return [
        ((t // tile_tyx[0]) * num_y + y // tile_tyx[1]) * num_x + x // tile_tyx[2]
        for t, y, x in itertools.product(*map(range, grid_tyx))
    ]


def reference_top_k(row: list[float], k: int) -> list[int]:
    """The `k` highest entries, ties to the lowest index, NaN below -inf, ascending.

    Example:
        >>> reference_top_k([float("nan"), 1.0, 2.0, 1.0], 2)
        [1, 2]
    """
    ranked = sorted(range(len(row)), key=lambda i: (math.isnan(row[i]), 0.0 if math.isnan(row[i]) else -row[i], i))
    return sorted(ranked[:k])


def video_sparse_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid_tyx: tuple[int, int, int],
    *,
    sparsity: float,
    gate: Tensor | None = None,
    tile_tyx: tuple[int, int, int] = (4, 4, 4),
    num_replicated: int = 0,
    scale: float | None = None,
    indices: Tensor | None = None,
) -> Tensor:
    """Video Sparse Attention as mathematics; arguments as those of `video_sparse_attention`.

    Args:
        query: `[B, S + R, Hq, D]`.
        key: `[B, S + R, Hkv, D]`.
        value: `[B, S + R, Hkv, D]`.
        grid_tyx: Tokens of the video along time, height and width.
        sparsity: Share of tiles to drop.
        gate: `[B, S, Hq, D]`, or None for no coarse part.
        tile_tyx: Tokens of a tile.
        num_replicated: R, how many of the last rows are text.
        scale: Factor of the scores; None means `1 / sqrt(D)`.
        indices: `[B, Hq, N, k]` tiles to keep instead of choosing them here, since rounding may change a choice.

    Returns:
        `[B, S + R, Hq, D]`.
    """
    num_tokens, head_size = math.prod(grid_tyx), query.shape[3]
    scale = head_size**-0.5 if scale is None else scale
    tiles = torch.tensor(reference_tile_of_token(grid_tyx, tile_tyx), device=query.device)
    num_tiles = int(tiles.max()) + 1
    member = torch.nn.functional.one_hot(tiles, num_tiles).T.to(query.dtype)
    average = member / member.sum(1, keepdim=True)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    q_mean, k_mean, v_mean = (average @ x[:, :, :num_tokens] for x in (q, k, v))
    coarse_scores = scale * (q_mean @ k_mean.transpose(-1, -2))

    if indices is None:
        num_kept = max(1, math.ceil(round((1 - sparsity) * num_tiles, 6)))
        rows = coarse_scores.detach().nan_to_num(math.inf, math.inf, -math.inf).flatten(0, -2).tolist()
        kept = torch.tensor([reference_top_k(row, num_kept) for row in rows], device=query.device)
        indices = kept.view(*coarse_scores.shape[:3], num_kept)
    sees_tile = torch.zeros_like(coarse_scores, dtype=torch.bool).scatter_(-1, indices.long(), True)
    sees = q.new_ones(*q.shape[:2], q.shape[2], k.shape[2], dtype=torch.bool)
    sees[:, :, :num_tokens, :num_tokens] = sees_tile[:, :, tiles][..., tiles]

    scores = (scale * (q @ k.transpose(-1, -2))).masked_fill(~sees, -torch.inf)
    out = (scores.softmax(-1) @ v).transpose(1, 2)
    if gate is None:
        return out
    coarse = (coarse_scores.softmax(-1) @ v_mean)[:, :, tiles].transpose(1, 2)
    gated = coarse * gate[:, :num_tokens]
    return torch.cat([out[:, :num_tokens] + gated, out[:, num_tokens:]], dim=1) if num_replicated else out + gated
