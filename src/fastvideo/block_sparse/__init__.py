"""The block-sparse attention engine: a rule picks tiles, one engine runs them."""

from fastvideo.block_sparse.attention import block_sparse_attention
from fastvideo.block_sparse.pattern import BlockPattern, InvertedLists, TileLayout
from fastvideo.block_sparse.selection import keep_tile_lists, num_kept_tiles, top_k_ascending
from fastvideo.block_sparse.video_sparse import VideoGeometry, pool_tiles, video_geometry, video_sparse_attention

__all__ = [
    "BlockPattern",
    "InvertedLists",
    "TileLayout",
    "VideoGeometry",
    "block_sparse_attention",
    "keep_tile_lists",
    "num_kept_tiles",
    "pool_tiles",
    "top_k_ascending",
    "video_geometry",
    "video_sparse_attention",
]
