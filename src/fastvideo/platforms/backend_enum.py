"""The names of the built-in attention backends."""

from __future__ import annotations

from enum import Enum

__all__ = ["AttentionBackendEnum"]


class AttentionBackendEnum(Enum):
    """Built-in backends. Wherever a member is accepted its name is too, and so is a registered third party's name.

    Example:
        >>> [str(backend) for backend in AttentionBackendEnum][:2]
        ['TORCH_SDPA', 'FLASH_ATTN']
    """

    TORCH_SDPA = "TORCH_SDPA"
    FLASH_ATTN = "FLASH_ATTN"
    SAGE_ATTN = "SAGE_ATTN"
    SLIDING_TILE_ATTN = "SLIDING_TILE_ATTN"
    VIDEO_SPARSE_ATTN = "VIDEO_SPARSE_ATTN"
    NO_ATTENTION = "NO_ATTENTION"

    def __str__(self) -> str:
        return self.name
