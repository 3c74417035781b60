"""Video Sparse Attention (VSA): each tile of video tokens attends to the few tiles whose means fit best.

Paper: "VSA: Faster Video Diffusion with Trainable Sparse Attention", arXiv 2505.13389. Layout BSHD in raster token order,
in and out. Per head: the tokens of each tile are averaged; scaled dot products of the means (coarse scores) pick the key
tiles that a query tile keeps; the fine stage is softmax attention over the tokens of those; with a gate, softmax
attention of the means, broadcast to the tokens of each tile and multiplied with the gate, is added.

Chosen differently from the paper's code: means and coarse scores are in fp32 (fp64 for fp64), work follows real tokens and
not padded slots, batches, grouped-query attention and any scale are allowed, and replicated text tokens take part.

Shape legend: B batch, S video tokens, R replicated tokens, N tiles, H heads, D head size; T, Y, X video grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvideo.block_sparse.attention import as_autocast, block_sparse_attention
from fastvideo.block_sparse.pattern import BlockPattern, TileLayout
from fastvideo.block_sparse.selection import num_kept_tiles, select_tiles
from fastvideo.tensor_cache import cache_tensors
from fastvideo.video import TileGrid, tile_mean, tile_sum
from fastvideo.video.choose_tile import resolve_tile


@dataclass(frozen=True, eq=False)
class VideoGeometry:
    """The layouts of one grid on one device; built once by `video_geometry` and shared between layers and steps.

    Attributes:
        grid: The grid and its tiles.
        num_replicated: Text tokens behind the video tokens.
        video_tiles: Layout of the video tokens: as queries, and as keys where there is no text.
        key_tiles: Layout of all keys: the video's tiles, then chunks of text.
        text_tiles: Layout of the text queries, or None.
        tile_of_token: `[S]` int64, tile of each video token.
    """

    grid: TileGrid
    num_replicated: int
    video_tiles: TileLayout
    key_tiles: TileLayout
    text_tiles: TileLayout | None
    tile_of_token: Tensor


def video_geometry(grid: TileGrid, device: torch.device | str, num_replicated: int = 0) -> VideoGeometry:
    """The layouts of a grid with `num_replicated` text tokens behind it; cached.

    Example:
        >>> video_geometry(TileGrid((2, 2, 2), (1, 2, 2)), "cpu", 3).key_tiles.sizes.tolist()
        [4, 4, 3]
    """
    # Dynamo would look through the cache, and warn.
    build = _video_geometry if torch.compiler.is_compiling() else _cached_video_geometry
    return with_replicated(build(grid, torch.device(device)), num_replicated)


def _video_geometry(grid: TileGrid, device: torch.device) -> VideoGeometry:
    tensors = grid.tensors(device)
    order = None if grid.is_raster else tensors.order
    video = TileLayout(tensors.offsets, grid.num_tokens, grid.max_size, grid.is_uniform, order)
    return VideoGeometry(grid, 0, video, video, None, tensors.tile_of_token)


_cached_video_geometry = cache_tensors(_video_geometry)


def with_replicated(geometry: VideoGeometry, num_replicated: int) -> VideoGeometry:
    """A geometry without text, with `num_replicated` text tokens behind it; cached."""
    if geometry.num_replicated:
        raise ValueError(f"expected a geometry without text, got {geometry.num_replicated=}")
    if num_replicated < 0:
        raise ValueError(f"expected num_replicated >= 0, got {num_replicated=}")
    if not num_replicated:
        return geometry
    build = _append_text if torch.compiler.is_compiling() else _cached_append_text
    return build(geometry, num_replicated)


def _append_text(geometry: VideoGeometry, num_replicated: int) -> VideoGeometry:
    grid, video = geometry.grid, geometry.video_tiles
    device, chunk, num_tokens = video.offsets.device, grid.max_size, grid.num_tokens + num_replicated
    num_chunks = -(-num_replicated // chunk)
    starts = torch.arange(num_chunks + 1, dtype=torch.int32, device=device) * chunk
    text_offsets = starts.clamp(max=num_replicated)
    text_rows = torch.arange(grid.num_tokens, num_tokens, dtype=torch.int32, device=device)
    are_chunks_full = num_replicated % chunk == 0
    keys = TileLayout(
        torch.cat([video.offsets, text_offsets[1:] + grid.num_tokens]),
        num_tokens,
        chunk,
        grid.is_uniform and are_chunks_full,
        None if video.order is None else torch.cat([video.order, text_rows]),
    )
    text = TileLayout(text_offsets, num_replicated, min(chunk, num_replicated), num_chunks == 1 or are_chunks_full)
    return VideoGeometry(grid, num_replicated, video, keys, text, geometry.tile_of_token)


_cached_append_text = cache_tensors(_append_text)


def video_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid_tyx: tuple[int, int, int],
    *,
    sparsity: float | None = None,
    num_kept: int | None = None,
    gate: Tensor | None = None,
    tile_tyx: tuple[int, int, int] | str = (4, 4, 4),
    num_replicated: int = 0,
    scale: float | None = None,
    geometry: VideoGeometry | None = None,
    impl: str | None = None,
) -> Tensor:
    """Video Sparse Attention: `fine + coarse[tile of token] * gate`.

    Each query tile keeps `max(1, ceil((1 - sparsity) * N))` of the N key tiles, those of highest coarse score, ties to the
    lowest index; the choice passes no gradient, the coarse part does. `gate=None` means no coarse part at all. The last
    `num_replicated` rows are text: every video token sees all of them beside its tiles, text queries see everything, and
    text takes no part in means, choice and coarse part. Query head `h` uses key and value head `h // (Hq // Hkv)`.

    Args:
        query: `[B, S + R, Hq, D]`, video tokens in raster order, then text.
        key: `[B, S + R, Hkv, D]`.
        value: `[B, S + R, Hkv, D]`.
        grid_tyx: Tokens of the video along time, height and width; their product is S.
        sparsity: Share of tiles to drop, in [0, 1). 0 is dense attention (plus the gated coarse part).
        num_kept: The number of tiles to keep, in place of `sparsity`.
        gate: `[B, S, Hq, D]` or `[B, S + R, Hq, D]`, of which the text rows are not read; None for no coarse part.
        tile_tyx: Tokens of a tile; tiles at the far edges may be smaller. `"auto"` picks that of at most 64 tokens which costs
            least on this grid (`fastvideo.video.choose_tile`).
        num_replicated: R, how many of the last rows are text.
        scale: Factor of all scores, any finite number; None means `1 / sqrt(D)`.
        geometry: Layouts of this grid and tile without text, if at hand (metadata holds them); None looks them up.
        impl: Name of a block-sparse implementation; None picks one.

    Returns:
        `[B, S + R, Hq, D]` in the dtype of `query`.

    Raises:
        TypeError: For tensors that are not floating point.
        ValueError: For shapes, dtypes, devices, a grid, a scale or a sparsity that do not fit.

    Example:
        >>> q, k, v = torch.randn(3, 1, 64, 2, 8).unbind(0)
        >>> out = video_sparse_attention(q, k, v, (4, 4, 4), sparsity=0.5, tile_tyx=(2, 2, 2))
        >>> dense = video_sparse_attention(q, k, v, (4, 4, 4), sparsity=0.0)
        >>> expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        >>> torch.allclose(dense, expected, atol=1e-5)
        True
    """
    tile_tyx = resolve_tile(tile_tyx, grid_tyx)
    geometry, num_kept = _resolve(query, grid_tyx, tile_tyx, num_replicated, geometry, sparsity, num_kept)
    query, key, value, *gates = as_autocast(query, key, value, *(() if gate is None else (gate,)))
    _check_inputs(query, key, value, geometry)
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    # Not `math.isfinite`, which Dynamo can't trace for a symbolic scale.
    if not -math.inf < scale < math.inf:
        raise ValueError(f"expected a finite scale, got {scale=}")
    gate = _video_gate(gates[0], query, geometry) if gates else None
    with torch.autocast(query.device.type, enabled=False):
        indices, coarse = _coarse_stage(query, key, value, geometry, num_kept, scale, has_gate=gate is not None)
        text: Tensor | None
        needs_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
        if impl is None and num_kept == geometry.grid.num_tiles and scale > 0 and not needs_grad:
            # Everything sees everything, which dense kernels do faster. They mind a negative scale, and their gradients
            # on the CPU are less exact than the engine's.
            out, text = _dense_stage(query, key, value, geometry, scale)
        else:
            out = _fine_stage(query, key, value, geometry, indices, scale, impl)
            text = _text_stage(query, key, value, geometry, scale, impl)
        if gate is not None and coarse is not None:
            out = _add_gated_tiles(out, coarse, gate, geometry)
        return out if text is None else torch.cat([out, text], dim=1)


def _resolve(
    query: Tensor,
    grid_tyx: tuple[int, int, int],
    tile_tyx: tuple[int, int, int],
    num_replicated: int,
    geometry: VideoGeometry | None,
    sparsity: float | None,
    num_kept: int | None,
) -> tuple[VideoGeometry, int]:
    """The geometry with its text, and the number of tiles to keep."""
    if geometry is None:
        geometry = video_geometry(TileGrid(grid_tyx, tile_tyx), query.device)
    elif (geometry.grid.grid_tyx, geometry.grid.tile_tyx) != (tuple(grid_tyx), tuple(tile_tyx)):
        raise ValueError(f"the geometry is that of {geometry.grid}, asked for were {grid_tyx=}, {tile_tyx=}")
    num_tiles = geometry.grid.num_tiles
    if (sparsity is None) == (num_kept is None):
        raise ValueError(f"expected either sparsity or num_kept, got {sparsity=}, {num_kept=}")
    if sparsity is not None:
        num_kept = num_kept_tiles(num_tiles, sparsity)
    if num_kept is None or not 1 <= num_kept <= num_tiles:
        raise ValueError(f"expected num_kept in [1, {num_tiles}], the tiles of grid {grid_tyx}, got {num_kept=}")
    return with_replicated(geometry, num_replicated), num_kept


def _check_inputs(query: Tensor, key: Tensor, value: Tensor, geometry: VideoGeometry) -> None:
    """What the engine would find only after the coarse stage has run; the engine checks the rest."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4:
            raise ValueError(f"expected {name} [batch, seq, heads, head_size], got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"expected a floating-point {name}, got {x.dtype}")
        expected = geometry.grid.num_tokens + geometry.num_replicated
        if x.shape[1] != expected:
            raise ValueError(
                f"grid {geometry.grid.grid_tyx} with num_replicated={geometry.num_replicated} has {expected} tokens, "
                f"{name} has {x.shape[1]}; pass the grid of this sequence (latent shape // patch size)"
            )
    if key.shape != value.shape or (key.shape[0], key.shape[3]) != (query.shape[0], query.shape[3]):
        raise ValueError(
            f"expected key and value of one shape with batch and head size of query {tuple(query.shape)}, "
            f"got {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if min(query.shape) < 1 or min(key.shape) < 1 or query.shape[2] % key.shape[2]:
        raise ValueError(
            f"expected query heads to be a multiple of key heads and no empty dimension, "
            f"got query {tuple(query.shape)} and key {tuple(key.shape)}"
        )
    if not query.dtype == key.dtype == value.dtype or not query.device == key.device == value.device:
        raise ValueError(
            f"expected one dtype and device, got {query.dtype=}, {key.dtype=}, {value.dtype=}, "
            f"{query.device=}, {key.device=}, {value.device=}"
        )
    if geometry.video_tiles.offsets.device != query.device:
        raise ValueError(
            f"the geometry was built for {geometry.video_tiles.offsets.device}, query is on {query.device}; "
            f"build the metadata with device={str(query.device)!r}"
        )


def _video_gate(gate: Tensor, query: Tensor, geometry: VideoGeometry) -> Tensor:
    """The gate's video rows."""
    batch, num_rows, num_heads, head_size = query.shape
    num_tokens = geometry.grid.num_tokens
    if tuple(gate.shape) not in ((batch, num_tokens, num_heads, head_size), (batch, num_rows, num_heads, head_size)):
        raise ValueError(
            f"expected a gate of shape {(batch, num_tokens, num_heads, head_size)} (or with the {num_rows} rows of query), "
            f"got {tuple(gate.shape)}"
        )
    if gate.dtype != query.dtype or gate.device != query.device:
        raise ValueError(f"expected the gate in {query.dtype} on {query.device} like query, got {gate.dtype} on {gate.device}")
    return gate[:, :num_tokens]


def _coarse_stage(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    geometry: VideoGeometry,
    num_kept: int,
    scale: float,
    *,
    has_gate: bool,
) -> tuple[Tensor, Tensor | None]:
    """Kept tiles `[B, H, N, k]`, and with a gate attention of the means `[B, N, H, D]` in fp32 or fp64."""
    num_tokens, group = geometry.grid.num_tokens, query.shape[2] // key.shape[2]

    def pooled(x: Tensor) -> Tensor:
        means = tile_mean(x[:, :num_tokens], geometry.grid, geometry.video_tiles.sizes)
        return means if x is query or group == 1 else means.repeat_interleave(group, dim=2)

    # Without a gate the means serve the choice alone, which passes no gradient.
    with torch.set_grad_enabled(torch.is_grad_enabled() and has_gate):
        query_means, key_means = pooled(query) * scale, pooled(key)
    indices = select_tiles(query_means, key_means, num_kept)
    if not has_gate:
        return indices, None
    # The scale is in the fp32 means already: kernels that take the row maximum before scaling need it positive.
    coarse = F.scaled_dot_product_attention(
        query_means.transpose(1, 2), key_means.transpose(1, 2), pooled(value).transpose(1, 2), scale=1.0
    )
    return indices, coarse.transpose(1, 2)


def _fine_stage(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    geometry: VideoGeometry,
    indices: Tensor,
    scale: float,
    impl: str | None,
) -> Tensor:
    """Attention of the video tokens over their kept tiles and all text, `[B, S, H, D]`."""
    num_tiles, num_key_tiles = geometry.grid.num_tiles, geometry.key_tiles.num_tiles
    if geometry.num_replicated:
        text = torch.arange(num_tiles, num_key_tiles, dtype=torch.int32, device=indices.device)
        indices = torch.cat([indices, text.expand(*indices.shape[:3], -1)], dim=-1)
        query = query[:, : geometry.grid.num_tokens]
    pattern = BlockPattern(geometry.video_tiles, geometry.key_tiles, indices)
    return block_sparse_attention(query, key, value, pattern, scale=scale, impl=impl)


def _dense_stage(
    query: Tensor, key: Tensor, value: Tensor, geometry: VideoGeometry, scale: float
) -> tuple[Tensor, Tensor | None]:
    """Dense attention of all tokens: that of the video, `[B, S, H, D]`, and that of the text or None without."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    is_grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=is_grouped).transpose(1, 2)
    num_video = geometry.grid.num_tokens
    return out[:, :num_video], out[:, num_video:] if geometry.num_replicated else None


def _text_stage(
    query: Tensor, key: Tensor, value: Tensor, geometry: VideoGeometry, scale: float, impl: str | None
) -> Tensor | None:
    """Dense attention of the text tokens, `[B, R, H, D]`, or None without text."""
    if geometry.text_tiles is None:
        return None
    everything = torch.arange(geometry.key_tiles.num_tiles, dtype=torch.int32, device=query.device)
    indices = everything.expand(1, 1, geometry.text_tiles.num_tiles, -1).contiguous()
    pattern = BlockPattern(geometry.text_tiles, geometry.key_tiles, indices)
    text = query[:, geometry.grid.num_tokens :]
    return block_sparse_attention(text, key, value, pattern, scale=scale, impl=impl)


def _add_gated_tiles(out: Tensor, coarse: Tensor, gate: Tensor, geometry: VideoGeometry) -> Tensor:
    result: Tensor = _AddGatedTiles.apply(out, coarse, gate, geometry)  # type: ignore[no-untyped-call]  # torch's own
    return result


class _AddGatedTiles(torch.autograd.Function):
    """`out + coarse[tile of token] * gate`, whose gradient for `coarse` is a tile sum in fp32 instead of an index_add."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, coarse: Tensor, gate: Tensor, geometry: VideoGeometry) -> Tensor:
        ctx.save_for_backward(coarse, gate, geometry.tile_of_token)
        ctx.grid = geometry.grid
        return torch.addcmul(out, coarse.to(out.dtype).index_select(1, geometry.tile_of_token), gate)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        coarse, gate, tile_of_token = ctx.saved_tensors
        (dout,) = grads
        dcoarse = dgate = None
        if ctx.needs_input_grad[1]:
            dcoarse = tile_sum(dout * gate, ctx.grid)
        if ctx.needs_input_grad[2]:
            dgate = coarse.to(dout.dtype).index_select(1, tile_of_token) * dout
        return dout, dcoarse, dgate, None
