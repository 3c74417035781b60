"""The block-sparse attention engine: a rule picks tiles, one engine runs them."""

from fastvideo.block_sparse.attention import block_sparse_attention
from fastvideo.block_sparse.pattern import BlockPattern, InvertedLists, TileLayout

__all__ = ["BlockPattern", "InvertedLists", "TileLayout", "block_sparse_attention"]
