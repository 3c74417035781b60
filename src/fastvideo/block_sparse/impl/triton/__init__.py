"""Block-sparse attention in Triton, forward and backward, for any GPU that Triton compiles for.

Takes fp16, bf16 and fp32, head sizes to 256, tiles of 1 to 256 tokens of equal or unequal sizes, grouped heads and any
order of tokens; nothing is permuted or padded in memory. Sums are in fp32, and fp32 inputs are multiplied in full
precision. The same inputs give the same bits, forward and backward. Triton is imported at the first call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvideo.block_sparse.impl import kernels_of
from fastvideo.block_sparse.pattern import BlockPattern
from fastvideo.platforms.triton_support import has_triton

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_HEAD_SIZE = 256
_MAX_TILE_SIZE = 256


def _device_rejections(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    if device.type == "cuda":
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
            return (f"needs an NVIDIA GPU of compute capability 8.0 or newer, got {torch.cuda.get_device_name(device)}",)
        return ()
    if device.type == "cpu":
        from fastvideo.block_sparse.impl.triton.launch import is_interpreted

        if is_interpreted():
            return ("Triton's interpreter does not multiply bfloat16",) if dtype == torch.bfloat16 else ()
    return (f"needs tensors on a GPU (device type 'cuda'), got {device}",)


def rejections(query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern) -> tuple[str, ...]:  # noqa: ARG001
    """Every reason why the kernels can't run; see `Implementation.rejections`."""
    reasons: list[str] = []
    if has_triton():
        reasons += _device_rejections(query.device, query.dtype)
    else:
        reasons.append('triton is not installed: pip install "fastvideo-attention[triton]"')
    if query.dtype not in _DTYPES:
        reasons.append(f"needs float16, bfloat16 or float32, got {query.dtype}")
    if query.shape[3] > _MAX_HEAD_SIZE:
        reasons.append(f"needs a head size up to {_MAX_HEAD_SIZE}, got {query.shape[3]}")
    for name, layout in (("query", pattern.query_tiles), ("key", pattern.key_tiles)):
        if layout.max_size > _MAX_TILE_SIZE:
            reasons.append(f"needs {name} tiles up to {_MAX_TILE_SIZE} tokens, got {layout.max_size}")
    return tuple(reasons)


IMPLEMENTATION = kernels_of("fastvideo.block_sparse.impl.triton.launch", rejections)
