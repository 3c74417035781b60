"""Block-sparse attention by kernels of our own for NVIDIA Hopper (sm_90a), written in Gluon; forward and backward.

Work follows real tokens: tiles lie packed in granules of 16 rows, up to four small tiles share one block of the tensor
cores, and keys of partial tiles are loaded granule by granule. Output and gradients are the same bits for the same
inputs. Where small query tiles share a block, a NaN or infinity in a key tile that one of them lists reaches the others.

The parts: `packing` and `rows` (rows, and what tensor copies read of them), `plan` (what each block walks), `queues` (which
blocks a consumer of the backward works on), `forward_kernel` and its `epilogue`, `dquery_kernel`, `dkdv_kernel`, `launch`.
"""

from __future__ import annotations

import functools
import importlib.metadata

import torch
from torch import Tensor

from fastvideo.block_sparse.impl import kernels_of
from fastvideo.block_sparse.pattern import BlockPattern
from fastvideo.platforms.triton_support import has_triton

_DTYPES = (torch.float16, torch.bfloat16)
# What ran on a GPU against float64: ptxas 12.8 gave a kernel wrong registers without a word, so one that compiles is not yet
# one that is right.
_HEAD_SIZES = (64, 128)
_TRITON_VERSIONS = ("3.6",)
_MAX_TILE_SIZE = 128
_INSTALL = 'pip install "fastvideo-attention[triton]"'


@functools.cache
def _triton_rejection() -> str | None:
    if not has_triton():
        return f"triton is not installed: {_INSTALL}"
    version = importlib.metadata.version("triton")
    if not version.startswith(tuple(f"{known}." for known in _TRITON_VERSIONS)):
        return f"is checked with triton {', '.join(_TRITON_VERSIONS)} (torch 2.11 brings it), got {version}"
    return None


def _device_rejection(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"needs tensors on a GPU (device type 'cuda'), got {device}"
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) != (9, 0):
        return f"needs an NVIDIA Hopper GPU (compute capability 9.0), got {torch.cuda.get_device_name(device)}"
    return None


@functools.cache
def _reasons_here(device: torch.device) -> tuple[str, ...]:
    return tuple(reason for reason in (_triton_rejection(), _device_rejection(device)) if reason is not None)


def rejections(query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern) -> tuple[str, ...]:  # noqa: ARG001
    """Every reason why the kernels can't run; see `Implementation.rejections`."""
    reasons = list(_reasons_here(query.device))
    if query.dtype not in _DTYPES:
        reasons.append(f"needs float16 or bfloat16, got {query.dtype}")
    if query.shape[3] not in _HEAD_SIZES:
        reasons.append(f"needs a head size of {' or '.join(map(str, _HEAD_SIZES))}, got {query.shape[3]}")
    for name, layout in (("query", pattern.query_tiles), ("key", pattern.key_tiles)):
        if layout.max_size > _MAX_TILE_SIZE:
            reasons.append(f"needs {name} tiles up to {_MAX_TILE_SIZE} tokens, got {layout.max_size}")
    return tuple(reasons)


IMPLEMENTATION = kernels_of("fastvideo.block_sparse.impl.hopper.launch", rejections)
