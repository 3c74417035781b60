"""Block-sparse attention in plain torch, for any device and float dtype; its cost follows the tokens of the kept tiles.

For a few query tiles at a time the listed keys and values are gathered together into a buffer that stays in cache, and
batched matmuls run over them; the backward computes the scores anew. All sums are in fp32 (fp64 for
fp64 inputs). One key/value head is worked on at a time, so the extra memory is that of a few heads. Tokens of tiles that
a query tile does not list are never read for it. On CUDA the order of the sums of dkey and dvalue is not fixed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastvideo.block_sparse.impl import Implementation
from fastvideo.block_sparse.impl.reference import accumulation_dtype
from fastvideo.block_sparse.pattern import BlockPattern, TileLayout

# Larger query tiles are cut, so that the scores of one problem stay small.
_MAX_QUERY_ROWS = 256
# Gathered keys, values and scores of one chunk: near the size of a CPU's cache, or enough to fill an accelerator.
_CHUNK_BYTES_CPU = 6 << 20
_CHUNK_BYTES_OTHER = 256 << 20


# The arguments are those of every implementation.
def rejections(query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern) -> tuple[str, ...]:  # noqa: ARG001
    """Nothing is refused."""
    return ()


class _Buffers:
    """Scratch memory that is reused from chunk to chunk, because fresh pages cost more than the gather itself."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._flat: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """Uninitialised memory of `shape`; the same name gives the same memory again."""
        size = 1
        for extent in shape:
            size *= extent
        if name not in self._flat or self._flat[name].numel() < size:
            self._flat[name] = self._like.new_empty(size)
        return self._flat[name][:size].view(shape)


class _Chunk(NamedTuple):
    """A few problems, each one piece of a query tile (`t` rows) and the keys it sees (`L` rows).

    Attributes:
        query_rows: `[n, t]` rows of the packed queries; the row behind the last one stands for "none".
        key_rows: `[n, L]` rows of the packed keys; likewise.
        is_absent: `[n, 1, L]` bool, which key rows are "none"; None when there are none of these.
    """

    query_rows: Tensor
    key_rows: Tensor
    is_absent: Tensor | None


class _Problems(NamedTuple):
    """All problems of the query heads that share one key/value head, `P` of them."""

    lists: Tensor  # [P, K] key tiles
    sizes: Tensor  # [P, K] tokens of these, 0 where an entry doesn't count
    query_start: Tensor  # [P] first packed query row
    query_count: Tensor  # [P]
    row_base: Tensor  # [P] first row of the head in the packed queries


def _problems(pattern: BlockPattern, batch: int, heads: range) -> _Problems:
    layout, num_heads = pattern.query_tiles, len(heads)
    indices, listed = pattern.indices, pattern.is_listed()
    index_batch = batch if indices.shape[0] > 1 else 0
    index_heads = slice(heads.start, heads.stop) if indices.shape[1] > 1 else slice(0, 1)
    lists = indices[index_batch, index_heads].expand(num_heads, -1, -1)
    listed = listed[index_batch, index_heads].expand(num_heads, -1, -1)
    # Entries that don't count may hold anything, so they are replaced before they index.
    lists = lists.masked_fill(~listed, 0).long()
    sizes = pattern.key_tiles.sizes.long()[lists].masked_fill(~listed, 0)

    rows = min(layout.max_size, _MAX_QUERY_ROWS)
    num_pieces = -(-layout.max_size // rows)
    offsets = layout.offsets.long()
    start = offsets[:-1, None] + torch.arange(num_pieces, device=offsets.device) * rows
    count = (offsets[1:, None] - start).clamp(0, rows)
    base = torch.arange(num_heads, device=offsets.device) * layout.num_tokens
    shape = (num_heads, layout.num_tiles, num_pieces)
    return _Problems(
        lists[:, :, None].expand(*shape, -1).flatten(0, 2),
        sizes[:, :, None].expand(*shape, -1).flatten(0, 2),
        start.expand(shape).flatten(),
        count.expand(shape).flatten(),
        base[:, None, None].expand(shape).flatten(),
    )


def _host_reads_are_free(device: torch.device) -> bool:
    """Whether looking at the lists makes nobody wait."""
    return device.type == "cpu"


def _spans(problems: _Problems, pattern: BlockPattern, row_bytes: int) -> Iterator[tuple[Tensor, int, int, bool]]:
    """Split the problems: which ones, query rows, key rows, and whether all of them have exactly so many keys."""
    totals, counts = problems.sizes.sum(-1), problems.query_count
    device = totals.device
    if not _host_reads_are_free(device):
        # Reading values would make the host wait, so every problem gets the largest size.
        rows = min(pattern.query_tiles.max_size, _MAX_QUERY_ROWS)
        width = min(problems.lists.shape[1] * pattern.key_tiles.max_size, pattern.key_tiles.num_tokens)
        is_full = pattern.key_tiles.is_uniform and pattern.counts is None
        step = max(1, _CHUNK_BYTES_OTHER // (width * (row_bytes + 4 * rows)))
        for first in range(0, totals.shape[0], step):
            members = torch.arange(first, min(first + step, totals.shape[0]), device=device)
            yield members, rows, width, is_full
        return
    # Neighbours of one size waste nothing; equal sizes keep the order, and with it the locality.
    order = torch.argsort(counts * (pattern.key_tiles.num_tokens + 1) + totals, stable=True)
    order = order[(counts[order] > 0) & (totals[order] > 0)]
    rows_of, width_of = counts[order].tolist(), totals[order].tolist()
    first, threads = 0, torch.get_num_threads()
    while first < len(rows_of):
        width, last = width_of[first], first + 1
        while last < len(rows_of):
            wider = max(width, width_of[last])
            if (last + 1 - first) * wider * (row_bytes + 4 * rows_of[last]) > _CHUNK_BYTES_CPU:
                break
            width, last = wider, last + 1
        # Threads share a batched matmul by problems.
        if last - first > threads:
            last -= (last - first) % threads
            width = max(width_of[first:last])
        yield order[first:last], rows_of[last - 1], width, min(width_of[first:last]) == width
        first = last


def _key_rows(lists: Tensor, sizes: Tensor, layout: TileLayout, width: int) -> Tensor:
    """Packed rows of the listed tiles one behind the other, `[n, width]`; behind the last one `num_tokens`."""
    total = sizes.sum(-1, keepdim=True)
    shift = layout.offsets.long()[lists] - sizes.cumsum(-1) + sizes
    # One more entry fills each list up to the common width.
    shift = torch.cat([shift, torch.zeros_like(total)], dim=1).flatten()
    repeats = torch.cat([sizes, width - total], dim=1).flatten()
    position = torch.arange(width, device=lists.device)
    rows = shift.repeat_interleave(repeats, output_size=lists.shape[0] * width).view(-1, width) + position
    return rows.masked_fill_(position >= total, layout.num_tokens)


def _chunks(pattern: BlockPattern, batch: int, heads: range, row_bytes: int) -> Iterator[_Chunk]:
    problems = _problems(pattern, batch, heads)
    none_row = len(heads) * pattern.query_tiles.num_tokens
    query_order, key_tiles = pattern.query_tiles.order, pattern.key_tiles
    for members, rows, width, is_full in _spans(problems, pattern, row_bytes):
        lists, sizes, start, count, base = (x[members] for x in problems)
        position = torch.arange(rows, device=members.device)
        query_rows = (start[:, None] + position).clamp_(max=pattern.query_tiles.num_tokens - 1)
        if query_order is not None:
            query_rows = query_order[query_rows].long()
        query_rows = (query_rows + base[:, None]).masked_fill_(position >= count[:, None], none_row)
        if is_full and key_tiles.is_uniform:
            inside = torch.arange(key_tiles.max_size, device=members.device)
            listed = lists[:, : width // key_tiles.max_size, None]
            key_rows = (listed * key_tiles.max_size + inside).flatten(1)
        else:
            key_rows = _key_rows(lists, sizes, key_tiles, width)
        yield _Chunk(query_rows, key_rows, None if is_full else (key_rows == key_tiles.num_tokens)[:, None])


def _pack_rows(x: Tensor, batch: int, heads: range) -> Tensor:
    """Rows `[len(heads) * S + 1, D]` of some heads of `[B, S, H, D]` in the accumulation dtype; the last one is zero."""
    rows = x[batch, :, heads.start : heads.stop].transpose(0, 1)
    packed = x.new_zeros(len(heads) * x.shape[1] + 1, x.shape[3], dtype=accumulation_dtype(x.dtype))
    packed[:-1].view(rows.shape).copy_(rows)
    return packed


def _pack_keys(key: Tensor, value: Tensor, batch: int, head: int, layout: TileLayout) -> Tensor:
    """Rows `[S_k + 1, 2, D]`: key and value of each token side by side, tile after tile; the last row is zero."""
    packed = key.new_zeros(key.shape[1] + 1, 2, key.shape[3], dtype=accumulation_dtype(key.dtype))
    for slot, x in enumerate((key, value)):
        rows = x[batch, :, head]
        packed[:-1, slot].copy_(rows if layout.order is None else rows.index_select(0, layout.order))
    return packed


def _gather(source: Tensor, rows: Tensor, buffer: Tensor) -> Tensor:
    torch.index_select(source, 0, rows.flatten(), out=buffer.view(rows.numel(), *source.shape[1:]))
    return buffer


def _kv_groups(query: Tensor, key: Tensor) -> Iterator[tuple[int, int, range]]:
    """Batch, key/value head and the query heads that use it."""
    group = query.shape[2] // key.shape[2]
    for batch in range(key.shape[0]):
        for head in range(key.shape[2]):
            yield batch, head, range(head * group, (head + 1) * group)


def forward(query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern, scale: float) -> tuple[Tensor, Tensor]:
    """See `Implementation.forward`."""
    num_queries, head_size = query.shape[1], query.shape[3]
    dtype = accumulation_dtype(query.dtype)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty(query.shape[:3], dtype=dtype)
    buffers = _Buffers(query.new_empty(0, dtype=dtype))
    for batch, head, heads in _kv_groups(query, key):
        q_rows = _pack_rows(query, batch, heads).mul_(scale)
        kv_rows = _pack_keys(key, value, batch, head, pattern.key_tiles)
        out_rows = torch.zeros_like(q_rows)
        lse_rows = q_rows.new_full(q_rows.shape[:1], -torch.inf)
        for chunk in _chunks(pattern, batch, heads, 2 * head_size * dtype.itemsize):
            n, t = chunk.query_rows.shape
            width = chunk.key_rows.shape[1]
            q = _gather(q_rows, chunk.query_rows, buffers.take("q", n, t, head_size))
            kv = _gather(kv_rows, chunk.key_rows, buffers.take("kv", n, width, 2, head_size))
            weights, total, top = _weights(chunk, q, kv[:, :, 0], buffers)
            o = torch.bmm(weights, kv[:, :, 1], out=q).div_(total.masked_fill(total == 0.0, 1.0))
            out_rows.index_copy_(0, chunk.query_rows.flatten(), o.flatten(0, 1))
            lse_rows.index_copy_(0, chunk.query_rows.flatten(), (top + total.log()).flatten())
        span = slice(heads.start, heads.stop)
        out[batch, :, span].copy_(out_rows[:-1].view(-1, num_queries, head_size).transpose(0, 1))
        lse[batch, :, span].copy_(lse_rows[:-1].view(-1, num_queries).transpose(0, 1))
    return out, lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,  # noqa: ARG001 (rounded to the inputs' dtype, it is less exact than what is computed anew)
    lse: Tensor,  # noqa: ARG001 (likewise)
    pattern: BlockPattern,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `Implementation.backward`."""
    num_queries, head_size = query.shape[1], query.shape[3]
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
    buffers = _Buffers(query.new_empty(0, dtype=accumulation_dtype(query.dtype)))
    order = pattern.key_tiles.order
    for batch, head, heads in _kv_groups(query, key):
        q_rows, do_rows = _pack_rows(query, batch, heads).mul_(scale), _pack_rows(dout, batch, heads)
        kv_rows = _pack_keys(key, value, batch, head, pattern.key_tiles)
        dlse_rows = None if dlse is None else _pack_rows(dlse[..., None], batch, heads)
        dq_rows, dkv_rows = torch.zeros_like(q_rows), torch.zeros_like(kv_rows)
        for chunk in _chunks(pattern, batch, heads, 4 * head_size * q_rows.itemsize):
            _backward_chunk(chunk, q_rows, do_rows, dlse_rows, kv_rows, dq_rows, dkv_rows, buffers)
        span = slice(heads.start, heads.stop)
        dq[batch, :, span].copy_(dq_rows[:-1].view(-1, num_queries, head_size).transpose(0, 1).mul_(scale))
        for grad, slot in ((dk, 0), (dv, 1)):
            rows = dkv_rows[:-1, slot].to(grad.dtype)
            if order is None:
                grad[batch, :, head].copy_(rows)
            else:
                grad[batch, :, head].index_copy_(0, order.long(), rows)
    return dq, dk, dv


def _weights(chunk: _Chunk, q: Tensor, k: Tensor, buffers: _Buffers) -> tuple[Tensor, Tensor, Tensor]:
    """Weights `[n, t, L]` (1 at the highest score of a row), their row sums and the highest scores."""
    weights = torch.bmm(q, k.transpose(1, 2), out=buffers.take("weights", *q.shape[:2], k.shape[1]))
    if chunk.is_absent is not None:
        weights.masked_fill_(chunk.is_absent, -torch.inf)
    top = weights.amax(-1, keepdim=True)
    # A row that sees nothing: its weights become 0, where -inf minus -inf would be NaN.
    top.masked_fill_(top == -torch.inf, 0.0)
    total = weights.sub_(top).exp_().sum(-1, keepdim=True)
    return weights, total, top


def _backward_chunk(
    chunk: _Chunk,
    q_rows: Tensor,
    do_rows: Tensor,
    dlse_rows: Tensor | None,
    kv_rows: Tensor,
    dq_rows: Tensor,
    dkv_rows: Tensor,
    buffers: _Buffers,
) -> None:
    """Write dq (without the scale) and add dk, dv of one chunk; the queries carry the scale.

    Probabilities are `weights / total`. Everything is linear in the output's gradient, so it takes the division.
    """
    n, t = chunk.query_rows.shape
    width, head_size = chunk.key_rows.shape[1], q_rows.shape[1]
    q = _gather(q_rows, chunk.query_rows, buffers.take("q", n, t, head_size))
    do = _gather(do_rows, chunk.query_rows, buffers.take("do", n, t, head_size))
    kv = _gather(kv_rows, chunk.key_rows, buffers.take("kv", n, width, 2, head_size))
    k, v = kv[:, :, 0], kv[:, :, 1]
    weights, total, _ = _weights(chunk, q, k, buffers)
    total.masked_fill_(total == 0.0, 1.0)
    do.div_(total)
    dscores = torch.bmm(do, v.transpose(1, 2), out=buffers.take("dscores", n, t, width)).mul_(weights)
    delta = dscores.sum(-1, keepdim=True)
    if dlse_rows is not None:
        delta -= _gather(dlse_rows, chunk.query_rows, buffers.take("dlse", n, t, 1))
    dscores.addcmul_(weights, delta.div_(total), value=-1)
    dq = torch.bmm(dscores, k, out=buffers.take("dq", n, t, head_size))
    dq_rows.index_copy_(0, chunk.query_rows.flatten(), dq.flatten(0, 1))
    # The gathered keys and values are no longer needed, so their gradients take their place.
    torch.bmm(dscores.transpose(1, 2), q, out=k)
    torch.bmm(weights.transpose(1, 2), do, out=v)
    dkv_rows.index_add_(0, chunk.key_rows.flatten(), kv.flatten(0, 1))


IMPLEMENTATION = Implementation(rejections, forward, backward)
