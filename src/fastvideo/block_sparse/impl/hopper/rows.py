"""Keys and values, or queries and the output's gradient, as rows that tensor copies read: in place, or packed."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl

from fastvideo.block_sparse.impl.hopper.gluon_names import TensorDescriptor, moved
from fastvideo.block_sparse.impl.hopper.packing import PackedLayout, pack_keys_kernel
from fastvideo.platforms.triton_launch import PreparedKernel


class Rows(NamedTuple):
    """Two tensors of one shape as rows that tensor copies read.

    Attributes:
        first: `[rows, columns]`.
        second: `[rows, columns]`.
    """

    first: Tensor
    second: Tensor

    @classmethod
    def empty_like(cls, x: Tensor, num_rows: int) -> Rows:
        """Room for `num_rows` packed rows of two tensors like `x`."""
        return cls(*x.new_empty(2, num_rows, x.shape[3]).unbind())

    def maps(self, head_size: int) -> list[TensorDescriptor]:
        """Tensor maps of both for boxes of 64 rows of one head, then for those of 16."""
        first, second = self.first, self.second
        ones = _described(first.shape, first.stride(), first.dtype, head_size)
        others = _described(second.shape, second.stride(), second.dtype, head_size)
        return [moved(ones[0], first), moved(others[0], second), moved(ones[1], first), moved(others[1], second)]


@functools.lru_cache(64)
def _described(
    shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, head_size: int
) -> tuple[TensorDescriptor, TensorDescriptor]:
    stand_in = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    boxes, granules = (TensorDescriptor.from_tensor(stand_in, [rows, head_size], _row_layout()) for rows in (64, 16))
    return boxes, granules


@functools.cache
def _row_layout() -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


def maps_of_pairs(pairs: Tensor) -> list[TensorDescriptor]:
    """Tensor maps of `[rows, 2]` contiguous fp32 for 64 rows and for 16."""
    flat = pairs.view(-1)
    return [moved(described, flat) for described in _described_pairs(flat.shape[0])]


@functools.lru_cache(64)
def _described_pairs(size: int) -> tuple[TensorDescriptor, ...]:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    stand_in = torch.empty(size, dtype=torch.float32, device="meta")
    return tuple(TensorDescriptor.from_tensor(stand_in, [2 * rows], layout) for rows in (64, 16))


def in_place(first: Tensor, second: Tensor, packed: PackedLayout) -> Rows | None:
    """Rows in token order without a copy, where packed order is token order and one tensor map reaches all heads."""
    batch, num_tokens, num_heads, head_size = first.shape
    if packed.row_token is not None:
        return None
    flat = []
    for x in (first, second):
        s_b, s_s, s_h, s_d = x.stride()
        is_flat = s_d == 1 and s_h == head_size and (batch == 1 or s_b == num_tokens * s_s)
        if not is_flat or s_s % 8 or x.data_ptr() % 16:
            return None
        flat.append(x.as_strided((batch * num_tokens, num_heads * head_size), (s_s, 1)))
    return Rows(*flat)


def pack_keys(key: Tensor, value: Tensor, packed: PackedLayout, first_head: int, heads: int, scale: float) -> Rows:
    """Keys with the sign of the scale, and values, of some heads as packed rows."""
    rows = Rows.empty_like(key, heads * packed.max_rows)
    kind = (key.shape, key.stride(), value.stride(), first_head, heads, (scale > 0) - (scale < 0))
    pack = packed.keep(("pack", *kind), lambda: _prepare_packing(packed, *kind))
    pack(key, value, rows.first, rows.second, packed.row_token, packed.counts)
    return rows


def _prepare_packing(
    packed: PackedLayout,
    shape: torch.Size,
    key_strides: tuple[int, ...],
    value_strides: tuple[int, ...],
    first_head: int,
    heads: int,
    sign: int,
) -> PreparedKernel:
    """The launch that packs some heads of keys and values of one shape."""
    names = ("s_kb", "s_ks", "s_kh", "s_vb", "s_vs", "s_vh")
    arguments = {
        **dict(zip(names, (*key_strides[:3], *value_strides[:3]), strict=True)),
        "first_head": first_head,
        "max_blocks": packed.max_blocks,
        "HEADS": shape[2],
        "D": shape[3],
        "SIGN": sign,
        "num_warps": 4,
    }
    tensors = ("key", "value", "packed_key", "packed_value", "row_token", "counts")
    return PreparedKernel(pack_keys_kernel, (heads * packed.max_blocks,), tensors, arguments)
