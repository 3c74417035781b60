"""What the sparse backends share: an implementation that refuses what no sparse method here has.

This is no backend, so backends may import it.
"""

from __future__ import annotations

import math
from typing import TypeVar

from fastvideo.attention.backends.abstract import AttentionImpl, AttentionMetadata

__all__ = ["SparseAttentionImpl"]

M = TypeVar("M", bound=AttentionMetadata)


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
