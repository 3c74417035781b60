"""Which tiles a query tile keeps: an exact top-k of coarse scores with a fixed answer for every input.

Ties go to the lowest index, NaN ranks below -inf, -0 equals +0, and there are always exactly `k` distinct indices. No
host waits, and no gradient passes. On GPUs two Triton kernels do it (`selection_kernels`), elsewhere torch's stable sort.
"""

from __future__ import annotations

import functools
import math
import numbers
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from fastvideo.platforms.triton_support import device_of, runs_triton

# Scores, and what is made of them, exist for so many bytes of rows at a time.
_SCRATCH_BYTES = 192 << 20
# Longer rows don't fit into the registers of one program.
_MAX_KERNEL_COLUMNS = 16_384


def num_kept_tiles(num_tiles: int, sparsity: float) -> int:
    """How many of `num_tiles` are kept at a sparsity: `max(1, ceil((1 - sparsity) * num_tiles))`.

    Rounding of the product does not count as a further tile: 0.7 of 10 dropped keeps 3, although
    `(1 - 0.7) * 10 > 3` in floating point.

    Args:
        num_tiles: Tiles of the grid, at least 1.
        sparsity: Share of tiles to drop, in [0, 1).

    Raises:
        TypeError: For a sparsity that is no number.
        ValueError: For one outside [0, 1) or NaN.

    Example:
        >>> [num_kept_tiles(10, sparsity) for sparsity in (0.0, 0.7, 0.9, 0.99)]
        [10, 3, 1, 1]
    """
    return max(1, math.ceil((1.0 - as_sparsity("sparsity", sparsity)) * num_tiles - 1e-6))


def as_sparsity(name: str, value: Any) -> float:
    """Check that `value`, which errors call `name`, is a share of tiles to drop, and return it as a float.

    Raises:
        TypeError: It is no number.
        ValueError: It lies outside [0, 1), or is NaN.

    Example:
        >>> as_sparsity("VSA_sparsity", 0)
        0.0
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"expected {name} as a number in [0, 1), got {value!r}")
    share = float(value)
    if not 0.0 <= share < 1.0:
        raise ValueError(f"expected {name} in [0, 1), got {value!r}")
    return share


@torch.no_grad()
def top_k_ascending(scores: Tensor, k: int) -> Tensor:
    """Indices of the `k` highest scores of each row, in ascending order.

    Args:
        scores: `[..., N]`, floating point.
        k: How many to keep, 1 to N.

    Returns:
        `[..., k]` int32, distinct and ascending.

    Raises:
        ValueError: For `k` outside `[1, N]`.

    Example:
        >>> top_k_ascending(torch.tensor([1.0, float("nan"), 3.0, 3.0, 3.0]), 2).tolist()
        [2, 3]
    """
    num_tiles = scores.shape[-1]
    if not 1 <= k <= num_tiles:
        raise ValueError(f"expected k in [1, {num_tiles}], got {k=}")
    if k == num_tiles:
        return _everything(scores.shape, scores.device)
    if _fits_kernel(scores, num_tiles):
        from fastvideo.block_sparse.selection_kernels import launch_top_k

        indices = scores.new_empty(*scores.shape[:-1], k, dtype=torch.int32)
        with device_of(scores):
            launch_top_k(scores.contiguous(), indices)
        return indices
    # An ascending sort of the negated scores puts NaN last; subtracting from +0 makes one zero of both.
    ranked = torch.sort(0.0 - scores, dim=-1, stable=True).indices[..., :k]
    return ranked.to(torch.int32).sort(dim=-1).values


def select_tiles(pooled_query: Tensor, pooled_key: Tensor, num_kept: int, scale: float = 1.0) -> Tensor:
    """The `num_kept` key tiles of highest dot product for each query tile, as `top_k_ascending` ranks them.

    A product that is NaN counts as infinity, so that a key that is NaN is kept and shows in the output, as in dense attention.

    The scores of a few heads, or of a few query tiles of one head, exist at a time. One custom op, so that activation
    checkpointing can keep its result (`keep_tile_lists`).

    Args:
        pooled_query: `[B, N, Hq, D]` in fp32 or fp64.
        pooled_key: `[B, N, Hkv, D]`; query head `h` meets key head `h // (Hq // Hkv)`.
        num_kept: Tiles to keep.
        scale: Factor of the scores, multiplied into the query.

    Returns:
        `[B, Hq, N, num_kept]` int32, ascending.
    """
    indices: Tensor = _select_op(pooled_query.detach(), pooled_key.detach(), num_kept, scale)
    return indices


def choose_tiles(query: Tensor, key: Tensor, num_kept: int, scale: float) -> Tensor:
    """The custom op behind `select_tiles`."""
    batch, num_tiles, num_heads, _ = query.shape
    if num_kept == num_tiles:
        return _everything(torch.Size((batch, num_heads, num_tiles, num_tiles)), query.device)
    indices = query.new_empty(batch, num_heads, num_tiles, num_kept, dtype=torch.int32)
    num_lists = batch * num_heads
    if _fits_kernel(query, num_tiles):
        _choose_in_kernels(query, key, indices, _steps(num_lists, num_tiles, num_tiles * query.itemsize, _SCRATCH_BYTES), scale)
        return indices
    query = query if scale == 1.0 else query * scale
    # There are also the negated scores, the sorted copy and 8-byte indices.
    for lists, rows in _steps(num_lists, num_tiles, num_tiles * (3 * query.itemsize + 8), _SCRATCH_BYTES):
        scores = torch.cat([_scores(query, key, entry, rows) for entry in range(num_lists)[lists]])
        scores.nan_to_num_(nan=math.inf, posinf=math.inf, neginf=-math.inf)
        indices.flatten(0, 1)[lists, rows] = top_k_ascending(scores, num_kept)
    return indices


@functools.lru_cache(64)
def _steps(num_lists: int, num_tiles: int, row_bytes: int, scratch_bytes: int) -> tuple[tuple[slice, slice], ...]:
    """Steps of even size whose rows fit into the scratch: all lists, or whole lists, or rows of one list."""
    num_rows = max(1, scratch_bytes // row_bytes)
    num_steps = -(-num_lists // max(1, num_rows // num_tiles))
    step_lists, step_rows = -(-num_lists // num_steps), min(num_rows, num_tiles)
    return tuple(
        (slice(first, min(first + step_lists, num_lists)), slice(row, min(row + step_rows, num_tiles)))
        for first in range(0, num_lists, step_lists)
        for row in range(0, num_tiles, step_rows)
    )


_select_op = torch.library.custom_op("fastvideo::select_tiles", choose_tiles, mutates_args=())


@_select_op.register_fake
def _(query: Tensor, key: Tensor, num_kept: int, scale: float) -> Tensor:  # noqa: ARG001  # the op's arguments
    batch, num_tiles, num_heads, _ = query.shape
    return query.new_empty(batch, num_heads, num_tiles, num_kept, dtype=torch.int32)


def keep_tile_lists() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """A `context_fn` for `torch.utils.checkpoint.checkpoint`, which keeps the lists of tiles and recomputes the rest.

    Without it recomputation chooses again, and finds the same tiles, since the choice has no randomness; with it the
    choice runs once.

    Example:
        >>> from torch.utils.checkpoint import checkpoint
        >>> x = torch.randn(1, 4, 1, 8, requires_grad=True)
        >>> attend = lambda x: x.sin().sum() + select_tiles(x, x, 2).sum()
        >>> loss = checkpoint(attend, x, use_reentrant=False, context_fn=keep_tile_lists)
        >>> torch.equal(torch.autograd.grad(loss, x)[0], x.cos())
        True
    """
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    kept = [torch.ops.fastvideo.select_tiles.default]
    contexts: tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
    contexts = create_selective_checkpoint_contexts(kept)  # type: ignore[no-untyped-call]  # torch's own
    return contexts


def _everything(shape: torch.Size, device: torch.device) -> Tensor:
    return torch.arange(shape[-1], dtype=torch.int32, device=device).expand(shape).contiguous()


def _fits_kernel(scores: Tensor, num_tiles: int) -> bool:
    """Whether the kernels run: on fp32, where Triton does, for rows that fit one program."""
    return scores.dtype == torch.float32 and num_tiles <= _MAX_KERNEL_COLUMNS and runs_triton(scores.device)


def _scores(query: Tensor, key: Tensor, entry: int, rows: slice) -> Tensor:
    """Scores `[1, rows, N]` of one head of one sample, counted through."""
    num_heads = query.shape[2]
    sample, head = divmod(entry, num_heads)
    keys = key[sample, :, head // (num_heads // key.shape[2])]
    return (query[sample, rows, head] @ keys.transpose(0, 1))[None]


def _choose_in_kernels(
    query: Tensor, key: Tensor, indices: Tensor, steps: tuple[tuple[slice, slice], ...], scale: float
) -> None:
    from fastvideo.block_sparse.selection_kernels import launch_scores, launch_top_k, row_stride

    query = query if query.stride(-1) == 1 else query.contiguous()
    key = key if key.stride(-1) == 1 else key.contiguous()
    num_tiles = query.shape[1]
    stride = row_stride(num_tiles)
    with device_of(query):
        for lists, rows in steps:
            scores = query.new_empty(lists.stop - lists.start, rows.stop - rows.start, stride)
            launch_scores(query, key, scores, lists.start, rows.start, scale)
            # Views cost the host as much as a small launch.
            part = indices if len(steps) == 1 else indices.flatten(0, 1)[lists, rows]
            launch_top_k(scores, part, num_tiles)
