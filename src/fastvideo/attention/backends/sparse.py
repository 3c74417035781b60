"""What the sparse backends share: what no sparse method over the tiles of a video does, as reasons and as errors, and how
metadata stays consistent.

This is no backend, so backends may import it.
"""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError
from typing import TypeVar

import torch

from fastvideo.attention.backends.abstract import AttentionImpl, AttentionMetadata
from fastvideo.attention.request import AttentionRequest

__all__ = ["SparseAttentionImpl", "SparseMetadata", "common_rejections"]

M = TypeVar("M", bound=AttentionMetadata)

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def common_rejections(request: AttentionRequest) -> list[str]:
    """Return the reasons that hold for every method over the tiles of one video."""
    reasons = []
    if request.is_causal:
        reasons.append("causal attention is not supported: tiles see each other in both directions")
    if request.query_len != request.key_len:
        reasons.append(
            f"cross attention ({request.query_len} queries, {request.key_len} keys) is not supported: queries and keys "
            "are tiles of one video"
        )
    elif request.num_replicated >= request.query_len:
        reasons.append(f"no video tokens: {request.num_replicated} of {request.query_len} tokens are replicated text")
    if request.dtype not in _DTYPES:
        reasons.append(f"dtype {request.dtype} is not supported; expected one of {', '.join(map(str, _DTYPES))}")
    if request.device == "mps" and request.dtype == torch.float64:
        reasons.append("dtype torch.float64 does not exist on mps; use float32")
    return reasons


class SparseMetadata(AttentionMetadata):
    """Metadata whose fields follow from one another, so that none of them changes."""

    def __setattr__(self, name: str, value: object) -> None:
        # A dataclass that extends one which isn't frozen can't be frozen itself.
        if name in self.__dict__:
            raise FrozenInstanceError(
                f"{name} of {type(self).__name__} can't change, because other fields follow from it; build another one"
            )
        super().__setattr__(name, value)


class SparseAttentionImpl(AttentionImpl[M]):
    """Computes sparse attention over a video's tiles for one layer.

    Args:
        num_heads: Number of query heads.
        head_size: Size of one head.
        softmax_scale: Factor of the scores; any finite number.
        causal: Must be False.
        num_kv_heads: Number of key and value heads; `None` means `num_heads`.
        prefix: The layer's dotted name in its model.
        **extra_impl_args: None is known.

    Raises:
        TypeError: `extra_impl_args` holds a name.
        NotImplementedError: `causal` is True.
        ValueError: `softmax_scale` is not finite.
    """

    def __init__(  # type: ignore[no-untyped-def]  # the contract leaves `extra_impl_args` without annotation
        self,
        num_heads: int,
        head_size: int,
        softmax_scale: float,
        causal: bool = False,
        num_kv_heads: int | None = None,
        prefix: str = "",
        **extra_impl_args,
    ) -> None:
        super().__init__(num_heads, head_size, softmax_scale, causal, num_kv_heads, prefix, **extra_impl_args)
        if causal:
            raise NotImplementedError(f"{type(self).__name__} has no causal form; use causal=False or a dense backend")
        if not math.isfinite(softmax_scale):
            raise ValueError(f"expected a finite softmax_scale, got {softmax_scale=}")
