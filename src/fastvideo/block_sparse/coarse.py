"""The coarse part of Video Sparse Attention: means over the tiles of a video, and dense attention of those.

Means are in fp32 (fp64 for fp64), and so are the scores that choose tiles. Attention of the means multiplies in the dtype of
the tokens, as any attention of theirs does (`docs/kernels.md` says what fp32 cost there). One custom op makes both from query,
key and value at once: on GPUs one Triton kernel reads each token once.

Shape legend: B batch, S video tokens, R replicated tokens, N tiles, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvideo.block_sparse.eager import eager_function, function_of
from fastvideo.block_sparse.geometry import VideoGeometry, geometry_of
from fastvideo.platforms.triton_support import device_of, runs_triton
from fastvideo.video import TileGrid, tile_mean

_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class TileMeans(NamedTuple):
    """What the coarse stage makes of the tokens.

    Attributes:
        query: `[B, N, Hq, D]` in fp32 (fp64 for fp64), to choose tiles by; passes no gradient.
        key: `[B, N, Hkv, D]`, likewise.
        low: What coarse attention multiplies, in the dtype of the tokens, differentiable: means of query times the scale, of
            key and of value; `()` where there is no gate.
        tokens: Query, key and value again, for attention to take instead of those that were given: gradients that come back
            through them are those that the means' are added to, in place; `()` where nothing is added.
    """

    query: Tensor
    key: Tensor
    low: tuple[Tensor, ...]
    tokens: tuple[Tensor, ...] = ()


def tile_means(query: Tensor, key: Tensor, value: Tensor | None, geometry: VideoGeometry, scale: float) -> TileMeans:
    """Means over the tiles of the video rows of `[B, S + R, H, D]` tensors; without `value` those that choose alone."""
    grid = geometry.grid
    if value is None:
        with torch.no_grad():
            mean_query, mean_key = _means_op(query, key, None, grid.grid_tyx, grid.tile_tyx, scale)[:2]
        return TileMeans(mean_query, mean_key, ())
    run = eager_function(_means_op, _EagerMeans, (query, key, value))
    mean_query, mean_key, *rest = run(query, key, value, grid.grid_tyx, grid.tile_tyx, scale)
    return TileMeans(mean_query, mean_key, tuple(rest[:3]), tuple(rest[3:]))


def lowered(means: Sequence[Tensor], scale: float, dtype: torch.dtype) -> TileMeans:
    """The same from means `[B, N, H, D]` in fp32 (fp64 for fp64) of query, key and, for a gate, of value."""
    if len(means) < 3:
        return TileMeans(means[0].detach(), means[1].detach(), ())
    # The scale goes into the means before they are rounded: kernels that take the row maximum before scaling need it positive.
    low = tuple((x * scale if i == 0 else x).to(dtype) for i, x in enumerate(means))
    return TileMeans(means[0].detach(), means[1].detach(), low)


def coarse_attention(low: Sequence[Tensor]) -> Tensor:
    """Attention of means, `[B, N, Hq, D]` in their dtype.

    Args:
        low: `[B, N, Hq, D]`, the query times the scale, and twice `[B, N, Hkv, D]`; query head `h` meets key head
            `h // (Hq // Hkv)`.
    """
    query, key, value = low[0].transpose(1, 2), low[1].transpose(1, 2), low[2].transpose(1, 2)
    is_grouped = query.shape[1] != key.shape[1]
    if is_grouped and query.device.type != "cpu":
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        is_grouped = False
    return F.scaled_dot_product_attention(query, key, value, scale=1.0, enable_gqa=is_grouped).transpose(1, 2)


def make_means(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    grid_tyx: Sequence[int],
    tile_tyx: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The custom op behind `tile_means`."""
    return means_of(query, key, value, geometry_of(grid_tyx, tile_tyx, query.device), scale)


def means_of(
    query: Tensor, key: Tensor, value: Tensor | None, geometry: VideoGeometry, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Means of query and key, then the three low ones, which are empty without `value`; no gradient passes."""
    if _in_kernels(query):
        from fastvideo.block_sparse.coarse_kernels import launch_means

        query = query if query.stride(-1) == 1 else query.contiguous()
        key = key if key.stride(-1) == 1 else key.contiguous()
        value = value if value is None or value.stride(-1) == 1 else value.contiguous()
        made = _empty_means(query, key, value, geometry.video_tiles.num_tiles)
        wanted = made if value is not None else (*made[:2], None, None, None)
        with device_of(query):
            launch_means(query, key, value, wanted, geometry.grid, scale)
        return made
    count, sizes = geometry.grid.num_tokens, geometry.video_tiles.sizes
    tensors = (query, key) if value is None else (query, key, value)
    means = [tile_mean(x[:, :count], geometry.grid, sizes) for x in tensors]
    if value is None:
        low: list[Tensor] = [query.new_empty(0) for _ in range(3)]
    else:
        low = [(x * scale if i == 0 else x).to(query.dtype, copy=True) for i, x in enumerate(means)]
    return means[0], means[1], low[0], low[1], low[2]


_means_op = torch.library.custom_op("fastvideo::tile_means", make_means, mutates_args=())


def _empty_means(
    query: Tensor, key: Tensor, value: Tensor | None, num_tiles: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    batch, _, num_heads, head_size = query.shape
    query_shape, key_shape = (batch, num_tiles, num_heads, head_size), (batch, num_tiles, key.shape[2], head_size)
    means = query.new_empty(*query_shape, dtype=dtype), query.new_empty(*key_shape, dtype=dtype)
    if value is None:
        return *means, query.new_empty(0), query.new_empty(0), query.new_empty(0)
    return *means, query.new_empty(*query_shape), query.new_empty(*key_shape), query.new_empty(*key_shape)


@_means_op.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    grid_tyx: Sequence[int],
    tile_tyx: Sequence[int],
    scale: float,  # noqa: ARG001  # the op's arguments
) -> tuple[Tensor, ...]:
    num_tiles = TileGrid((grid_tyx[0], grid_tyx[1], grid_tyx[2]), (tile_tyx[0], tile_tyx[1], tile_tyx[2])).num_tiles
    return _empty_means(query, key, value, num_tiles)


@torch.library.custom_op("fastvideo::tile_means_backward", mutates_args=())
def _means_backward_op(
    dquery: Tensor,
    dkey: Tensor,
    dvalue: Tensor,
    grid_tyx: Sequence[int],
    tile_tyx: Sequence[int],
    num_rows: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of tokens, `[B, S + R, H, D]`, from those of the low means, `[B, N, H, D]`."""
    low, count = (dquery, dkey, dvalue), grid_tyx[0] * grid_tyx[1] * grid_tyx[2]
    grads = [x.new_empty(x.shape[0], num_rows, *x.shape[2:]) for x in low]
    for x in grads if num_rows > count else ():
        x[:, count:].zero_()
    _spread_gradients(low, grads, grid_tyx, tile_tyx, scale, is_sum=False)
    return grads[0], grads[1], grads[2]


@_means_backward_op.register_fake
def _(
    dquery: Tensor,
    dkey: Tensor,
    dvalue: Tensor,
    grid_tyx: Sequence[int],  # noqa: ARG001  # the op's arguments
    tile_tyx: Sequence[int],  # noqa: ARG001
    num_rows: int,
    scale: float,  # noqa: ARG001
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape[0], num_rows, *x.shape[2:]) for x in (dquery, dkey, dvalue))


@torch.library.custom_op("fastvideo::add_tile_means_backward", mutates_args=("dquery", "dkey", "dvalue"))
def _add_gradients_op(
    dquery: Tensor,
    dkey: Tensor,
    dvalue: Tensor,
    dlow_query: Tensor,
    dlow_key: Tensor,
    dlow_value: Tensor,
    grid_tyx: Sequence[int],
    tile_tyx: Sequence[int],
    scale: float,
) -> None:
    """Add what `_means_backward_op` makes to gradients of tokens, contiguous `[B, S + R, H, D]`."""
    low, grads = (dlow_query, dlow_key, dlow_value), (dquery, dkey, dvalue)
    _spread_gradients(low, grads, grid_tyx, tile_tyx, scale, is_sum=True)


def _spread_gradients(
    low: Sequence[Tensor],
    grads: Sequence[Tensor],
    grid_tyx: Sequence[int],
    tile_tyx: Sequence[int],
    scale: float,
    *,
    is_sum: bool,
) -> None:
    """Fill the video rows of `grads` with those of the means' gradients `low`, or add them."""
    geometry = geometry_of(grid_tyx, tile_tyx, grads[0].device)
    if _in_kernels(grads[0]):
        from fastvideo.block_sparse.coarse_kernels import launch_means_backward

        with device_of(grads[0]):
            launch_means_backward([x.contiguous() for x in low], grads, geometry.grid, scale, is_sum=is_sum)
        return
    dtype = torch.float64 if grads[0].dtype == torch.float64 else torch.float32
    sizes, count = geometry.video_tiles.sizes[:, None, None], geometry.grid.num_tokens
    for i, (x, grad) in enumerate(zip(low, grads, strict=True)):
        share = ((x.to(dtype) * scale if i == 0 else x.to(dtype)) / sizes).to(x.dtype).index_select(1, geometry.tile_of_token)
        if is_sum:
            grad[:, :count] += share
        else:
            grad[:, :count] = share


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[0], output[1])
    query, _, _, grid_tyx, tile_tyx, scale = inputs
    ctx.settings = (grid_tyx, tile_tyx, query.shape[1], scale)
    ctx.likes = [(x.shape, x.dtype, x.device) for x in output[2:5]]


def _differentiate(ctx: Any, _dmean_query: None, _dmean_key: None, *dlow: Tensor | None) -> tuple[Tensor | None, ...]:
    if all(x is None for x in dlow):
        return (None,) * 6
    given = [
        torch.zeros(shape, dtype=dtype, device=device) if x is None else x
        for x, (shape, dtype, device) in zip(dlow, ctx.likes, strict=True)
    ]
    return *_means_backward_op(*given, *ctx.settings), *(None,) * 3


_means_op.register_autograd(_differentiate, setup_context=_save)


def _means_and_tokens(query: Tensor, key: Tensor, value: Tensor, *settings: Any) -> tuple[Tensor, ...]:
    return *_means_op(query, key, value, *settings), query, key, value


def _differentiate_with_tokens(
    ctx: Any, dmean_query: None, dmean_key: None, *grads: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients of tokens: those that have come back through them, with those of the means added where they lie."""
    dlow, dtokens = grads[:3], grads[3:]
    if all(x is None for x in dlow):
        return *dtokens, None, None, None
    # Custom ops make gradients that nothing else holds; a sum of them that autograd has made is such a one, too.
    given = [x for x in dtokens if x is not None and x.is_contiguous()]
    if len(given) < 3 or any(x is None for x in dlow) or torch.is_grad_enabled():
        made = _differentiate(ctx, dmean_query, dmean_key, *dlow)
        sums = (x if y is None else y if x is None else x + y for x, y in zip(made[:3], dtokens, strict=True))
        return *sums, None, None, None
    grid_tyx, tile_tyx, _, scale = ctx.settings
    _add_gradients_op(*given, *dlow, grid_tyx, tile_tyx, scale)
    return *given, None, None, None


_EagerMeans = function_of(_means_and_tokens, _differentiate_with_tokens, _save)


def _in_kernels(x: Tensor) -> bool:
    return x.dtype in _KERNEL_DTYPES and runs_triton(x.device)
