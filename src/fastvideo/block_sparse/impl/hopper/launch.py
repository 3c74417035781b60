"""Launches of the Hopper kernels: which heads at a time, tensor maps, strides and the constants of a kernel."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastvideo.block_sparse.impl import GatedTiles
from fastvideo.block_sparse.impl.hopper import dkdv_kernel, dquery_kernel
from fastvideo.block_sparse.impl.hopper import forward_kernel as fwd
from fastvideo.block_sparse.impl.hopper.packing import PackedLayout, pack_layout, pack_queries_kernel
from fastvideo.block_sparse.impl.hopper.plan import Plan, Planner, planner_of
from fastvideo.block_sparse.impl.hopper.queues import QueueFiller
from fastvideo.block_sparse.impl.hopper.rows import Rows, in_place, maps_of_pairs, pack_keys
from fastvideo.block_sparse.pattern import BlockPattern
from fastvideo.platforms.triton_launch import PreparedKernel
from fastvideo.platforms.triton_support import device_of

_LOG2E = math.log2(math.e)
# Packed rows and plans of the heads that one launch works on stay near this, and at least one head is worked on.
_SCRATCH_BYTES = 1 << 30
# Keys and values of a head that need more than this fall out of the L2 cache unless all programs walk in step.
_IN_STEP_BYTES = 32 << 20
# How often a program in step looks for the others before it goes on; a look takes a good half microsecond, and each wave pays
# for all of them where another kernel holds multiprocessors.
_LOOKS = 300
# Of so many waves programs in step wait for each other once: walks differ by a few per cent, and each wait is for the longest.
# In each wave if walks are of one length, or if a head is larger than this (docs/kernels.md has the times).
_WAVES = 4
_EACH_WAVE_BYTES = 64 << 20

# What launches of a kernel differ in.
_FORWARD = (
    *("key_boxes", "value_boxes", "key_granules", "value_granules", "rows", "masks", "meta", "counts", "row_token", "arrivals"),
    *("query", "out", "lse", "gate", "coarse", "block_tiles"),
)

_PACKED = ("query", "dout", "out", "lse", "dlse", "packed_query", "packed_dout", "stats", "row_token", "counts")
_DQUERY = (
    *("key_boxes", "value_boxes", "key_granules", "value_granules", "rows", "masks", "meta", "counts", "row_token", "arrivals"),
    *("query", "dout", "stats", "dquery"),
)
_DKDV = (
    *(
        "query_boxes",
        "dout_boxes",
        "stats_boxes",
        "query_granules",
        "dout_granules",
        "stats_granules",
        "key_boxes",
        "value_boxes",
    ),
    *("queues", "ends", "lengths", "rows", "masks", "meta", "row_token", "dkey", "dvalue"),
)

Constants = dict[str, int]
# Stages of the rings by head size: what fits into 227 KiB of shared memory. Registers are those of a thread.
_REGISTERS: Constants = {"CONSUMER_REGISTERS": 240, "PRODUCER_REGISTERS": 24}
FWD: dict[int, Constants] = {
    64: {"K_STAGES": 2, "V_STAGES": 2, **_REGISTERS},
    128: {"K_STAGES": 1, "V_STAGES": 2, **_REGISTERS},
}
DQ: dict[int, Constants] = {64: {"STAGES": 4, **_REGISTERS}, 128: {"STAGES": 3, **_REGISTERS}}
DKDV: dict[int, Constants] = {64: {"STAGES": 4, **_REGISTERS}, 128: {"STAGES": 2, **_REGISTERS}}


@functools.cache
def _num_programs(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(**tensors: Tensor) -> dict[str, int]:
    strides = {}
    for name, x in tensors.items():
        strides[f"s_{name}b"], strides[f"s_{name}s"], strides[f"s_{name}h"] = x.stride()[:3]
    return strides


def _places(names: str, x: Tensor, packed: PackedLayout, *, is_packed: bool) -> dict[str, int]:
    """Where the rows of a head lie: packed heads follow one another, in token order a head is a range of columns."""
    places = (0, packed.max_rows, 0) if is_packed else (x.shape[1], 0, x.shape[3])
    return dict(zip(map(names.format, ("row_b", "row_h", "column_h")), places, strict=True))


def _pack_layouts(pattern: BlockPattern) -> tuple[PackedLayout, PackedLayout]:
    queries = pack_layout(pattern.query_tiles)
    is_one = pattern.query_tiles.is_same(pattern.key_tiles)
    return queries, queries if is_one else pack_layout(pattern.key_tiles)


def _head_groups(num_heads: int, head_bytes: int) -> Iterator[tuple[int, int]]:
    """First head and number of heads of each launch."""
    num_groups = -(-num_heads // max(1, _SCRATCH_BYTES // head_bytes))
    step = -(-num_heads // num_groups)
    for first in range(0, num_heads, step):
        yield first, min(step, num_heads - first)


def _are_walks_alike(own: PackedLayout, walked: PackedLayout) -> bool:
    """Whether lists of one length make walks of one length: a block holds one tile, and the tiles that it walks are equal."""
    return own.is_one_piece_a_block and walked.is_even


def _plan_bytes(pattern: BlockPattern, own: PackedLayout, walked: PackedLayout) -> int:
    """About what the plan of one query head takes, marks included."""
    listed = pattern.indices.shape[2:].numel() * walked.pieces
    return listed * 4 if _are_walks_alike(own, walked) else listed * 20 + own.layout.num_tiles * walked.layout.num_tiles


def _steps(
    programs: int, pairs: int, key: Tensor, pattern: BlockPattern, layouts: tuple[PackedLayout, PackedLayout]
) -> tuple[int, dict[str, int]]:
    """How many waves programs that walk in step count, each in a zero, and how often they look for each other."""
    head_bytes = 2 * layouts[1].max_rows * key.shape[3] * key.itemsize
    # Lists of different lengths would make everybody wait for the longest.
    if head_bytes <= _IN_STEP_BYTES or pattern.counts is not None:
        return 0, {"IN_STEP": 0, "WAVES": 1}
    is_each = head_bytes > _EACH_WAVE_BYTES or _are_walks_alike(*layouts)
    return -(-pairs // programs), {"IN_STEP": _LOOKS, "WAVES": 1 if is_each else _WAVES}


def _arrivals(plan: Plan, own: PackedLayout) -> Tensor:
    """Where programs in step count; if nobody does, any integers stand in."""
    return own.counts if plan.zeros is None else plan.zeros


def _kernel_scale(scale: float) -> float:
    """The factor of scores of packed keys, which carry the sign; they are 0 for a scale of 0."""
    return abs(scale) if scale else 1.0


def forward(query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern, scale: float) -> tuple[Tensor, Tensor]:
    """See `Implementation.forward`."""
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    forward_into(query, key, value, pattern, scale, out, lse, None)
    return out, lse


def forward_into(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: BlockPattern,
    scale: float,
    out: Tensor,
    lse: Tensor,
    added: GatedTiles | None,
) -> None:
    """See `Implementation.forward_into`."""
    query, key, value = _rows_contiguous(query), _rows_contiguous(key), _rows_contiguous(value)
    head_size = query.shape[3]
    with device_of(query):
        own, walked = _pack_layouts(pattern)
        gate, coarse, block_tiles = None, None, None
        if added is not None:
            gate, coarse, block_tiles = _readable(added.gate), added.coarse.contiguous(), own.block_tiles
        rows = in_place(key, value, walked) if scale > 0 else None
        kind = (query.shape, query.stride(), key.shape, out.stride(0), pattern.indices.shape, pattern.counts is None, scale)
        gated = None if gate is None or coarse is None else (gate.shape, gate.stride(), coarse.shape)
        launches = own.keep(
            ("forward", walked.numbers, rows is None, gated, kind),
            lambda: list(_prepare_forward(query, key, pattern, scale, out, gate, coarse, (own, walked), rows is None)),
        )
        for launch in launches:
            keys = rows or pack_keys(key, value, walked, launch.first, launch.heads, scale)
            plan = launch.planner(pattern, own, walked, launch.num_waves)
            walks = (plan.rows, plan.masks, plan.meta, own.counts, own.row_token, _arrivals(plan, own))
            launch.kernel(*keys.maps(head_size), *walks, query, out, lse, gate, coarse, block_tiles)


def _readable(gate: Tensor) -> Tensor:
    """A gate that the kernel can read, which copies 16 bytes at a time."""
    *strides, s_d = gate.stride()
    if s_d == 1 and gate.data_ptr() % 16 == 0:
        # The second look is for axes of one entry.
        s_b, s_s, s_h = strides
        if (s_b | s_s | s_h) % 16 == 0 or all(x % 16 == 0 or n == 1 for x, n in zip(strides, gate.shape, strict=False)):
            return gate
    return gate.clone(memory_format=torch.contiguous_format)


def _gate_numbers(gate: Tensor | None, coarse: Tensor | None) -> dict[str, int]:
    """Where the rows of gate and coarse output lie."""
    if gate is None or coarse is None:
        return dict.fromkeys(("s_gb", "s_gs", "s_gh", "NUM_TILES"), 0)
    strides = [0 if size == 1 else stride for size, stride in zip(gate.shape, gate.stride(), strict=True)]
    return {"s_gb": strides[0], "s_gs": strides[1], "s_gh": strides[2], "NUM_TILES": coarse.shape[1]}


class _ForwardLaunch(NamedTuple):
    """A launch of the forward kernel, for some key heads and the query heads that read them."""

    first: int
    heads: int
    planner: Planner
    num_waves: int
    kernel: PreparedKernel


def _prepare_forward(
    query: Tensor,
    key: Tensor,
    pattern: BlockPattern,
    scale: float,
    out: Tensor,
    gate: Tensor | None,
    coarse: Tensor | None,
    layouts: tuple[PackedLayout, PackedLayout],
    is_packing: bool,
) -> Iterator[_ForwardLaunch]:
    """The launches for tensors of these shapes, strides and dtypes."""
    batch, _, num_heads, head_size = query.shape
    (own, walked), kv_heads, group = layouts, key.shape[2], num_heads // key.shape[2]
    head_bytes = _plan_bytes(pattern, own, walked) * group
    head_bytes += 2 * walked.max_rows * head_size * key.itemsize if is_packing else 0
    for first, heads in _head_groups(batch * kv_heads, head_bytes):
        pairs = heads * group * own.max_pairs
        programs = min(_num_programs(query.device), pairs)
        num_waves, steps = _steps(programs, pairs, key, pattern, layouts)
        planner = planner_of(pattern, own, walked, (first * group, heads * group, batch * num_heads))
        arguments = {
            "num_heads": heads * group,
            "first_head": first * group,
            "HEADS": num_heads,
            "GROUP": group,
            "NUM_ROWS": out.stride(0) // (num_heads * head_size),
            **_places("s_{}", key, walked, is_packed=is_packing),
            **_strides(q=query),
            **_gate_numbers(gate, coarse),
            **planner.strides,
            "scale_log2": _kernel_scale(scale) * _LOG2E,
            "D": head_size,
            "BOX_TOKENS": walked.box_tokens,
            "num_warps": 4,
            **steps,
            **FWD[head_size],
        }
        kernel = PreparedKernel(fwd.block_sparse_fwd_kernel, (programs,), _FORWARD, arguments, num_descriptors=4)
        yield _ForwardLaunch(first, heads, planner, num_waves, kernel)


class _BackwardLaunch(NamedTuple):
    """The launches of the backward for some key heads and the query heads that read them."""

    first: int
    heads: int
    pack: PreparedKernel
    query_planner: Planner
    num_waves: int
    dquery: PreparedKernel
    key_planner: Planner
    fill: QueueFiller
    dkdv: PreparedKernel


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    pattern: BlockPattern,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `Implementation.backward`."""
    dout, query, key, value = (_rows_contiguous(x) for x in (dout, query, key, value))
    # Once, not for each launch's heads: rows of a video with text behind it lie apart in a batch.
    out, lse = out.contiguous(), lse.contiguous()
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
    head_size, group = query.shape[3], query.shape[2] // key.shape[2]
    with device_of(query):
        queries, keys = _pack_layouts(pattern)
        key_rows = in_place(key, value, keys) if scale > 0 else None
        query_rows = in_place(query, dout, queries)
        strides = _strides(q=query, d=dout, l=lse if dlse is None else dlse)
        kind = (query.shape, key.shape, tuple(strides.values()), pattern.indices.shape, pattern.counts is None, scale)
        are_packed = key_rows is None, query_rows is None
        launches = queries.keep(
            ("backward", keys.numbers, are_packed, kind),
            lambda: list(_Backward(query, key, pattern, scale, strides, queries, keys, *are_packed).launches()),
        )
        for launch in launches:
            own_keys = key_rows or pack_keys(key, value, keys, launch.first, launch.heads, scale)
            num_rows = launch.heads * group * queries.max_rows
            own_queries = query_rows or Rows.empty_like(query, num_rows)
            stats = lse.new_empty(num_rows, 2)
            launch.pack(query, dout, out, lse, dlse, *own_queries, stats, queries.row_token, queries.counts)
            plan = launch.query_planner(pattern, queries, keys, launch.num_waves)
            walks = (plan.rows, plan.masks, plan.meta, queries.counts, queries.row_token, _arrivals(plan, queries))
            key_maps = own_keys.maps(head_size)
            launch.dquery(*key_maps, *walks, query, dout, stats, dq)
            plan = launch.key_planner(pattern, keys, queries, 0)
            query_maps, stats_maps = own_queries.maps(head_size), maps_of_pairs(stats)
            maps = (*query_maps[:2], stats_maps[0], *query_maps[2:], stats_maps[1], *key_maps[:2])
            launch.dkdv(*maps, *launch.fill(plan, keys), plan.rows, plan.masks, plan.meta, keys.row_token, dk, dv)
    return dq, dk, dv


@dataclass(frozen=True)
class _Backward:
    """What the launches of a backward follow from: shapes, strides and dtypes, and whether keys and queries are packed."""

    query: Tensor
    key: Tensor
    pattern: BlockPattern
    scale: float
    strides: dict[str, int]
    queries: PackedLayout
    keys: PackedLayout
    packs_keys: bool
    packs_queries: bool

    @property
    def group(self) -> int:
        """Query heads of one key head."""
        return self.query.shape[2] // self.key.shape[2]

    @property
    def head_size(self) -> int:
        """Head size, D."""
        return self.query.shape[3]

    def launches(self) -> Iterator[_BackwardLaunch]:
        """Launches for as many key heads at a time as fit into the scratch."""
        queries, keys = self.queries, self.keys
        row_bytes = 2 * self.head_size * self.key.itemsize
        num_marks = queries.layout.num_tiles * keys.layout.num_tiles
        head_bytes = self.group * (2 * _plan_bytes(self.pattern, queries, keys) + num_marks)
        head_bytes += keys.max_rows * row_bytes if self.packs_keys else 0
        head_bytes += self.group * queries.max_rows * (8 + row_bytes if self.packs_queries else 8)
        for first, heads in _head_groups(self.key.shape[0] * self.key.shape[2], head_bytes):
            first_query, query_heads = first * self.group, heads * self.group
            pack, dquery = self._pack(first_query, query_heads), self._dquery(first_query, query_heads)
            yield _BackwardLaunch(first, heads, pack, *dquery, *self._dkdv(first, heads))

    def _pack(self, first: int, heads: int) -> PreparedKernel:
        """Statistics of some query heads, and perhaps their queries and gradients as rows."""
        arguments = {
            **self.strides,
            "first_head": first,
            "max_blocks": self.queries.max_blocks,
            "HEADS": self.query.shape[2],
            "NUM_QUERIES": self.query.shape[1],
            "D": self.head_size,
            "PACK": self.packs_queries,
            "num_warps": 4,
        }
        return PreparedKernel(pack_queries_kernel, (heads * self.queries.max_blocks,), _PACKED, arguments)

    def _dquery(self, first: int, heads: int) -> tuple[Planner, int, PreparedKernel]:
        """What plans for the gradient of some query heads, the waves that it counts, and the launch that writes it."""
        own, scale = self.queries, _kernel_scale(self.scale)
        pairs = heads * own.max_pairs
        programs = min(_num_programs(self.query.device), pairs)
        num_waves, steps = _steps(programs, pairs, self.key, self.pattern, (own, self.keys))
        planner = planner_of(self.pattern, own, self.keys, (first, heads, self.query.shape[0] * self.query.shape[2]))
        arguments = {
            "num_heads": heads,
            "max_blocks": own.max_blocks,
            "first_head": first,
            "HEADS": self.query.shape[2],
            "GROUP": self.group,
            "NUM_QUERIES": self.query.shape[1],
            **_places("s_{}", self.key, self.keys, is_packed=self.packs_keys),
            **{name: stride for name, stride in self.strides.items() if name[2] in "qd"},
            **planner.strides,
            "scale": scale,
            "scale_log2": scale * _LOG2E,
            "D": self.head_size,
            "BOX_TOKENS": self.keys.box_tokens,
            "num_warps": 4,
            **steps,
            **DQ[self.head_size],
        }
        kernel = dquery_kernel.block_sparse_bwd_dq_kernel
        return planner, num_waves, PreparedKernel(kernel, (programs,), _DQUERY, arguments, num_descriptors=4)

    def _dkdv(self, first: int, heads: int) -> tuple[Planner, QueueFiller, PreparedKernel]:
        """What plans for the gradients of some key heads, what shares out their blocks, and the launch that writes them."""
        own, group = self.keys, self.group
        query_heads = (first * group, heads * group, self.query.shape[0] * self.query.shape[2])
        planner = planner_of(self.pattern, own, self.queries, query_heads, by_key=True)
        programs = min(_num_programs(self.query.device), -(-heads * own.max_blocks // 2))
        arguments = {
            "max_blocks": own.max_blocks,
            "max_rows": self.queries.max_rows,
            "first_head": first,
            "HEADS": self.key.shape[2],
            "GROUP": group,
            "NUM_KEYS": self.key.shape[1],
            **_places("s_{}", self.query, self.queries, is_packed=self.packs_queries),
            **_places("s_k{}", self.key, own, is_packed=self.packs_keys),
            **planner.strides,
            # Unlike dquery, which keys with the sign have made, this sums queries, which have none.
            "scale": self.scale,
            "scale_log2": _kernel_scale(self.scale) * _LOG2E,
            "D": self.head_size,
            "num_warps": 4,
            **DKDV[self.head_size],
        }
        fill = QueueFiller(own, heads, group, 2 * programs, planner.strides["s_plan"])
        kernel = dkdv_kernel.block_sparse_bwd_dkdv_kernel
        return planner, fill, PreparedKernel(kernel, (programs,), _DKDV, arguments, num_descriptors=8)
