"""The block-sparse attention engine: a rule picks tiles, one engine runs them."""

from fastvideo.block_sparse.attention import block_sparse_attention
from fastvideo.block_sparse.pattern import BlockPattern, InvertedLists, TileLayout
from fastvideo.block_sparse.selection import num_kept_tiles, top_k_ascending
from fastvideo.block_sparse.video_sparse import VideoGeometry, video_geometry, video_sparse_attention

__all__ = [
    "BlockPattern",
    "InvertedLists",
    "TileLayout",
    "VideoGeometry",
    "block_sparse_attention",
    "num_kept_tiles",
    "top_k_ascending",
    "video_geometry",
    "video_sparse_attention",
]
