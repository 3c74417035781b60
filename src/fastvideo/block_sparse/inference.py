"""Video Sparse Attention where no gradient is needed: all stages in one custom op.

Each op that eager code calls costs the host some 20 to 40 us beside its work, and stages of small videos, or of the few heads
that a device has under sequence parallelism, take the GPU no longer than that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvideo.block_sparse.coarse import coarse_attention, means_of
from fastvideo.block_sparse.eager import without_autocast
from fastvideo.block_sparse.fine_stage import forward_of
from fastvideo.block_sparse.geometry import VideoGeometry, geometry_of
from fastvideo.block_sparse.impl import AUTOMATIC
from fastvideo.block_sparse.selection import choose_tiles
from fastvideo.platforms.triton_support import device_of


def attend_without_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    geometry: VideoGeometry,
    num_kept: int,
    scale: float,
    impl: str | None,
) -> Tensor:
    """Means, choice of tiles, coarse and fine part of checked inputs; the same bits as the stages one by one.

    Args:
        query: `[B, S + R, Hq, D]`.
        key: `[B, S + R, Hkv, D]`.
        value: `[B, S + R, Hkv, D]`.
        gate: `[B, S, Hq, D]`, or None for no coarse part.
        geometry: Grid, tiles and R.
        num_kept: Tiles to keep.
        scale: Factor of all scores.
        impl: Name of a block-sparse implementation; None picks one.

    Returns:
        `[B, S + R, Hq, D]`.
    """
    grid, name = geometry.grid, AUTOMATIC if impl is None else impl
    out: Tensor = _whole_op(
        query, key, value, gate, grid.grid_tyx, grid.tile_tyx, geometry.num_replicated, num_kept, scale, name
    )
    return out


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    grid_tyx: Sequence[int],
    tile_tyx: Sequence[int],
    num_replicated: int,
    num_kept: int,
    scale: float,
    impl: str,
) -> Tensor:
    geometry = geometry_of(grid_tyx, tile_tyx, query.device, num_replicated)
    with without_autocast(query.device.type), device_of(query):
        means_query, means_key, *low = means_of(query, key, None if gate is None else value, geometry, scale)
        indices = choose_tiles(means_query, means_key, num_kept, scale)
        del means_query, means_key
        coarse = None if gate is None else coarse_attention(low)
        del low
        return forward_of(query, key, value, coarse, gate, indices, geometry, scale, impl)[0]


def _fake(query: Tensor, *_rest: Any) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


# `torch.library.custom_op` goes through Python for each dispatch key, which takes three times as long.
_LIBRARY = torch.library.Library("fastvideo", "FRAGMENT")  # type: ignore[no-untyped-call]  # torch's own, as those below
_SCHEMA = "video_sparse_attention" + torch.library.infer_schema(_attend, mutates_args=())
_LIBRARY.define(_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
_LIBRARY.impl("video_sparse_attention", _attend, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("fastvideo::video_sparse_attention", _fake, lib=_LIBRARY)
_whole_op = torch.ops.fastvideo.video_sparse_attention.default
