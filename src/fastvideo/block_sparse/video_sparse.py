"""Video Sparse Attention (VSA): each tile of video tokens attends to the few tiles whose means fit best.

Paper: "VSA: Faster Video Diffusion with Trainable Sparse Attention", arXiv 2505.13389. Layout BSHD in raster token order,
in and out. Per head: the tokens of each tile are averaged; scaled dot products of the means (coarse scores) pick the key
tiles that a query tile keeps; the fine stage is softmax attention over the tokens of those; with a gate, softmax
attention of the means, broadcast to the tokens of each tile and multiplied with the gate, is added.

Chosen differently from the paper's code: means and the scores that choose are in fp32 (fp64 for fp64), work follows real
tokens and not padded slots, batches, grouped-query attention and any scale are allowed, and replicated text tokens take part.

Shape legend: B batch, S video tokens, R replicated tokens, N tiles, H heads, D head size; T, Y, X video grid.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvideo.block_sparse.attention import as_autocast, check_impl, check_scale, check_types
from fastvideo.block_sparse.coarse import coarse_attention, lowered, tile_means
from fastvideo.block_sparse.eager import without_autocast
from fastvideo.block_sparse.fine_stage import add_gated_tiles, attend_to_tiles
from fastvideo.block_sparse.geometry import VideoGeometry, check_num_replicated, video_geometry, with_replicated
from fastvideo.block_sparse.inference import attend_without_gradients
from fastvideo.block_sparse.selection import num_kept_tiles, select_tiles
from fastvideo.tangents import refuse_tangents
from fastvideo.video import TileGrid, tile_mean
from fastvideo.video.choose_tile import resolve_tile

__all__ = ["VideoGeometry", "pool_tiles", "video_geometry", "video_sparse_attention", "with_replicated"]

Pooled = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]


def video_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid_tyx: tuple[int, int, int],
    *,
    sparsity: float | None = None,
    gate: Tensor | None = None,
    tile_tyx: tuple[int, int, int] | str = (4, 4, 4),
    replicated: tuple[Tensor, Tensor, Tensor] | None = None,
    scale: float | None = None,
    num_kept: int | None = None,
    num_replicated: int = 0,
    pooled: Pooled | None = None,
    geometry: VideoGeometry | None = None,
    impl: str | None = None,
) -> Tensor:
    """Video Sparse Attention: `fine + coarse[tile of token] * gate`.

    Each query tile keeps `max(1, ceil((1 - sparsity) * N))` of the N key tiles, those of highest coarse score, ties to the
    lowest index, with NaN as infinity, so that a NaN in a key shows in the output; the choice passes no gradient, the coarse
    part does. `gate=None` means no coarse part at all. Text of R tokens may follow the video: every video token sees all of
    it beside its tiles, text queries see everything, and text takes no part in means, choice and coarse part. Query head `h`
    uses key and value head `h // (Hq // Hkv)`.

    Nothing waits for the device. Coarse scores exist a few rows at a time, no tensor is copied to be permuted, and what is
    kept for the backward beside inputs and output is the lists, the log-sum-exp and the means.

    Args:
        query: `[B, S + R, Hq, D]`, video tokens in raster order, then text.
        key: `[B, S + R, Hkv, D]`.
        value: `[B, S + R, Hkv, D]`.
        grid_tyx: Tokens of the video along time, height and width; their product is S.
        sparsity: Share of tiles to drop, in [0, 1). 0 is dense attention (plus the gated coarse part).
        gate: `[B, S, Hq, D]` or `[B, S + R, Hq, D]`, of which the text rows are not read; None for no coarse part.
        tile_tyx: Tokens of a tile; tiles at the far edges may be smaller. `"auto"` picks that of at most 64 tokens which costs
            least on this grid, `"auto128"` of at most 128 (`fastvideo.video.choose_tile`).
        replicated: Query, key and value of the text, `[B, R, H, D]`, where `query`, `key` and `value` are the video alone; they
            are copied behind it. Callers that hold both in one tensor say `num_replicated` instead.
        scale: Factor of all scores, any finite number; None means `1 / sqrt(D)`.
        num_kept: The number of tiles to keep, in place of `sparsity`.
        num_replicated: R, how many of the last rows are text.
        pooled: Means of query and key over the tiles of the video, `[B, N, H, D]` in fp32 (fp64 for fp64) as `pool_tiles`
            gives them, and with a gate of value too, from a caller that has them; None computes them.
        geometry: Layouts of this grid and tile without text, if at hand (metadata holds them); None looks them up.
        impl: Name of a block-sparse implementation; None picks one.

    Returns:
        `[B, S + R, Hq, D]` in the dtype of `query`.

    Raises:
        TypeError: For tensors that are not floating point, something else in the place of a tensor or of a number, and a
            `num_kept` or `num_replicated` that isn't an integer.
        ValueError: For shapes, dtypes, devices, a grid, a scale or a sparsity that do not fit, or an `impl` that nobody knows.
        NotImplementedError: When `impl` (or every implementation) can't run the call; for tensors with a forward-mode tangent.

    Example:
        >>> q, k, v = torch.randn(3, 1, 64, 2, 8).unbind(0)
        >>> out = video_sparse_attention(q, k, v, (4, 4, 4), sparsity=0.5, tile_tyx=(2, 2, 2))
        >>> dense = video_sparse_attention(q, k, v, (4, 4, 4), sparsity=0.0)
        >>> expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        >>> torch.allclose(dense, expected, atol=1e-5)
        True
    """
    check_types(query=query, key=key, value=value, **({} if gate is None else {"gate": gate}))
    check_impl(impl)
    tile_tyx = resolve_tile(tile_tyx, grid_tyx)
    if replicated is not None:
        query, key, value, num_replicated = _join_replicated((query, key, value), replicated, num_replicated)
    refuse_tangents(query=query, key=key, value=value, gate=gate)
    geometry, num_kept = _resolve(query, grid_tyx, tile_tyx, num_replicated, geometry, sparsity, num_kept)
    query, key, value, *gates = as_autocast(query, key, value, *(() if gate is None else (gate,)))
    _check_inputs(query, key, value, geometry)
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    check_scale(scale)
    gate = _video_gate(gates[0], query, geometry) if gates else None
    if pooled is not None:
        _check_pooled(pooled, (query, key, value), geometry, has_gate=gate is not None)
        refuse_tangents(**{f"pooled[{place}]": x for place, x in enumerate(pooled)})
    with without_autocast(query.device.type):
        return _run(query, key, value, gate, pooled, geometry, num_kept, scale, impl)


def pool_tiles(
    x: Tensor, grid_tyx: tuple[int, int, int], *, tile_tyx: tuple[int, int, int] | str = (4, 4, 4), num_replicated: int = 0
) -> Tensor:
    """Means over tiles as `pooled` of `video_sparse_attention` takes them.

    Args:
        x: Query, key or value, `[B, S + R, H, D]`: S video tokens in raster order, then R replicated ones, which have no mean.
        grid_tyx: Video tokens along time, height and width, S of them.
        tile_tyx: The tile, N of them on this grid; or `"auto"` or `"auto128"`, as `video_sparse_attention` reads them.
        num_replicated: R.

    Returns:
        `[B, N, H, D]` in fp32 (fp64 for fp64), differentiable.

    Raises:
        TypeError: For a `num_replicated` that isn't an integer.
        ValueError: For a tensor of another rank or number of tokens, a tile that isn't one, or a negative `num_replicated`.

    Example:
        >>> pool_tiles(torch.arange(8.0).view(1, 8, 1, 1), (2, 2, 2), tile_tyx=(1, 2, 2)).flatten().tolist()
        [1.5, 5.5]
    """
    check_num_replicated(num_replicated)
    grid = TileGrid(grid_tyx, resolve_tile(tile_tyx, grid_tyx))
    return tile_mean(x[:, : x.shape[1] - num_replicated], grid)


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    pooled: Pooled | None,
    geometry: VideoGeometry,
    num_kept: int,
    scale: float,
    impl: str | None,
) -> Tensor:
    """The stages, for inputs that are checked."""
    leaves = (query, key, value) if gate is None else (query, key, value, gate)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in leaves)
    # Where everything sees everything dense kernels are faster. They mind a negative scale, and their gradients on the CPU
    # are less exact than the engine's.
    is_dense = impl is None and num_kept == geometry.video_tiles.num_tiles and scale > 0 and not needs_grad
    if is_dense and gate is None:
        return _dense_stage(query, key, value, scale)
    is_eager = not torch.compiler.is_compiling()
    if is_eager and not (needs_grad or is_dense) and pooled is None:
        return attend_without_gradients(query, key, value, gate, geometry, num_kept, scale, impl)
    if pooled is not None:
        means = lowered(pooled[:2] if gate is None else pooled, scale, query.dtype)
    else:
        means = tile_means(query, key, None if gate is None else value, geometry, scale)
        query, key, value = means.tokens or (query, key, value)
    coarse = None if gate is None else coarse_attention(means.low)
    if is_dense and gate is not None and coarse is not None:
        return add_gated_tiles(_dense_stage(query, key, value, scale), coarse, gate, geometry)
    indices = select_tiles(means.query, means.key, num_kept, scale)
    return attend_to_tiles(query, key, value, coarse, gate, indices, geometry, scale, impl)


def _join_replicated(
    video: tuple[Tensor, Tensor, Tensor], text: tuple[Tensor, Tensor, Tensor], num_replicated: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    if num_replicated:
        raise ValueError(f"expected either replicated or num_replicated, got both, {num_replicated=}")
    check_types(**{f"replicated[{place}]": x for place, x in enumerate(text)})
    if len(text) != 3 or any(x.ndim != 4 for x in (*video, *text)):
        raise ValueError(
            "expected replicated to be query, key and value of the text, [batch, seq, heads, head_size] each, "
            f"got shapes {[tuple(x.shape) for x in text]}"
        )
    lengths = {x.shape[1] for x in text}
    if len(lengths) > 1:
        raise ValueError(f"expected replicated tensors of one length, got {[x.shape[1] for x in text]}")
    for name, x, like in zip(("query", "key", "value"), text, video, strict=True):
        if x.dtype != like.dtype or x.device != like.device or (x.shape[0], x.shape[2:]) != (like.shape[0], like.shape[2:]):
            raise ValueError(
                f"expected the replicated {name} like the video's, {tuple(like.shape)} with another length, {like.dtype} on "
                f"{like.device}, got {tuple(x.shape)}, {x.dtype} on {x.device}"
            )
    query, key, value = (torch.cat(pair, dim=1) for pair in zip(video, text, strict=True))
    return query, key, value, lengths.pop()


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
    num_tiles = geometry.video_tiles.num_tiles
    if (sparsity is None) == (num_kept is None):
        raise ValueError(f"expected either sparsity or num_kept, got {sparsity=}, {num_kept=}")
    if sparsity is not None:
        num_kept = num_kept_tiles(num_tiles, sparsity)
    if isinstance(num_kept, (bool, float)):
        raise TypeError(f"expected num_kept as an integer, got {num_kept!r}")
    if num_kept is None or not 1 <= num_kept <= num_tiles:
        raise ValueError(f"expected num_kept in [1, {num_tiles}], the tiles of grid {grid_tyx}, got {num_kept=}")
    return with_replicated(geometry, num_replicated), num_kept


def _check_inputs(query: Tensor, key: Tensor, value: Tensor, geometry: VideoGeometry) -> None:
    """What the engine would find only after the coarse stage has run; the engine checks the rest."""
    expected = geometry.video_tiles.num_tokens + geometry.num_replicated
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4:
            raise ValueError(f"expected {name} [batch, seq, heads, head_size], got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"expected a floating-point {name}, got {x.dtype}")
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
    num_tokens = geometry.video_tiles.num_tokens
    if tuple(gate.shape) not in ((batch, num_tokens, num_heads, head_size), (batch, num_rows, num_heads, head_size)):
        raise ValueError(
            f"expected a gate of shape {(batch, num_tokens, num_heads, head_size)} (or with the {num_rows} rows of query), "
            f"got {tuple(gate.shape)}"
        )
    if gate.dtype != query.dtype or gate.device != query.device:
        raise ValueError(f"expected the gate in {query.dtype} on {query.device} like query, got {gate.dtype} on {gate.device}")
    return gate if num_rows == num_tokens else gate[:, :num_tokens]


def _check_pooled(pooled: Pooled, inputs: tuple[Tensor, Tensor, Tensor], geometry: VideoGeometry, *, has_gate: bool) -> None:
    if len(pooled) not in ((3,) if has_gate else (2, 3)):
        raise ValueError(
            f"expected pooled means of {'query, key and value' if has_gate else 'query and key'}, got {len(pooled)}"
        )
    dtype = torch.float64 if inputs[0].dtype == torch.float64 else torch.float32
    for x, like in zip(pooled, inputs, strict=False):
        shape = (like.shape[0], geometry.grid.num_tiles, *like.shape[2:])
        if tuple(x.shape) != shape or x.dtype != dtype or x.device != like.device:
            raise ValueError(
                f"expected pooled means of shape {shape} in {dtype} on {like.device}, "
                f"got {tuple(x.shape)} in {x.dtype} on {x.device}"
            )


def _dense_stage(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Dense attention of all tokens, `[B, S + R, H, D]`."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    is_grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=is_grouped).transpose(1, 2)
