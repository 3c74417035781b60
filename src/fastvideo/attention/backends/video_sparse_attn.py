"""`VIDEO_SPARSE_ATTN`: each tile of video tokens attends to the few tiles that fit it best, on any device.

Paper: "VSA: Faster Video Diffusion with Trainable Sparse Attention", arXiv 2505.13389; the mathematics, and where it
differs, is in `fastvideo.block_sparse.video_sparse`. Needs metadata: the video's token grid and the number of tiles to
keep, built once per step. Tokens come and go in raster order, replicated text tokens behind them; tiling happens inside
`forward`, by index. Work and memory follow the kept tiles.

Shape legend: B batch, S video tokens, R replicated tokens, H heads, D head size; T, Y, X video grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastvideo.attention.backends.abstract import (
    AttentionBackend,
    AttentionMetadataBuilder,
)
from fastvideo.attention.backends.sparse import SparseAttentionImpl, SparseMetadata, common_rejections
from fastvideo.attention.request import AttentionRequest
from fastvideo.block_sparse.selection import as_sparsity, num_kept_tiles
from fastvideo.block_sparse.video_sparse import VideoGeometry, video_geometry, video_sparse_attention
from fastvideo.video.choose_tile import resolve_tile
from fastvideo.video.grid import check_num_tokens, token_grid
from fastvideo.video.tiles import TileGrid

__all__ = [
    "VideoSparseAttentionBackend",
    "VideoSparseAttentionImpl",
    "VideoSparseAttentionMetadata",
    "VideoSparseAttentionMetadataBuilder",
]

DEFAULT_TILE_TYX = (4, 4, 4)
"""The paper's tile: 64 tokens."""


class VideoSparseAttentionBackend(AttentionBackend):
    """Video Sparse Attention.

    Example:
        >>> metadata = VideoSparseAttentionMetadataBuilder().build(
        ...     current_timestep=0, raw_latent_shape=(4, 8, 8), patch_size=(1, 1, 1), VSA_sparsity=0.5, device="cpu"
        ... )
        >>> impl = VideoSparseAttentionBackend.get_impl_cls()(num_heads=2, head_size=8, softmax_scale=0.25)
        >>> impl.forward(*torch.ones(3, 1, 256, 2, 8), metadata).unique()
        tensor([1.])
    """

    layer_independent = True

    @staticmethod
    def get_name() -> str:
        """Return `"VIDEO_SPARSE_ATTN"`."""
        return "VIDEO_SPARSE_ATTN"

    @staticmethod
    def get_impl_cls() -> type[VideoSparseAttentionImpl]:
        """Return `VideoSparseAttentionImpl`."""
        return VideoSparseAttentionImpl

    @staticmethod
    def get_metadata_cls() -> type[VideoSparseAttentionMetadata]:
        """Return `VideoSparseAttentionMetadata`."""
        return VideoSparseAttentionMetadata

    @staticmethod
    def get_builder_cls() -> type[VideoSparseAttentionMetadataBuilder]:
        """Return `VideoSparseAttentionMetadataBuilder`."""
        return VideoSparseAttentionMetadataBuilder

    @classmethod
    def rejections(cls, request: AttentionRequest) -> tuple[str, ...]:
        """Return every reason against `request`: masks, causal, dropout, log-sum-exp, cross attention, dtype."""
        return (*super().rejections(request), *common_rejections(request))


@dataclass
class VideoSparseAttentionMetadata(SparseMetadata):
    """The video of one denoising step. Build it with `VideoSparseAttentionMetadataBuilder`; its fields don't change.

    Attributes:
        current_timestep: Index of the denoising step; no layer reads it.
        sparsity: Share of key tiles to drop, in [0, 1).
        geometry: The index tensors of grid and tile, shared between steps.
        grid_tyx: Video tokens along time, height and width.
        tile_tyx: Tokens of a tile; tiles at the far edges may be smaller.
        num_kept_tiles: Key tiles that each query tile keeps.
    """

    sparsity: float
    geometry: VideoGeometry = field(repr=False)
    grid_tyx: tuple[int, int, int] = field(init=False)
    tile_tyx: tuple[int, int, int] = field(init=False)
    num_kept_tiles: int = field(init=False)

    def __post_init__(self) -> None:
        grid = self.geometry.grid
        self.grid_tyx, self.tile_tyx = grid.grid_tyx, grid.tile_tyx
        self.num_kept_tiles = num_kept_tiles(grid.num_tiles, self.sparsity)

    def check_sequence(self, num_tokens: int) -> None:
        """Raise `ValueError` if the grid doesn't have `num_tokens` tokens."""
        check_num_tokens(self.grid_tyx, num_tokens)


class VideoSparseAttentionMetadataBuilder(AttentionMetadataBuilder[VideoSparseAttentionMetadata]):
    """Builds `VideoSparseAttentionMetadata`. Index tensors are built once per grid, tile and device, and shared.

    Example:
        >>> metadata = VideoSparseAttentionMetadataBuilder().build(
        ...     current_timestep=0, raw_latent_shape=(16, 64, 64), patch_size=(1, 4, 4), VSA_sparsity=0.75, device="cpu"
        ... )
        >>> metadata.grid_tyx, metadata.num_kept_tiles
        ((16, 16, 16), 16)
    """

    def prepare(self) -> None:
        """Do nothing: what is kept depends on the geometry alone and stays right."""

    def build(  # type: ignore[override]  # the contract's `**kwargs: dict[str, Any]` can't name a single argument
        self,
        *,
        current_timestep: int,
        raw_latent_shape: Sequence[int],
        patch_size: Sequence[int],
        VSA_sparsity: float,
        device: torch.device | str,
        tile_tyx: Sequence[int] | str = DEFAULT_TILE_TYX,
        STA_window: Sequence[Any] | None = None,  # noqa: ARG002  # pipelines hand it to every builder
        **settings: Any,
    ) -> VideoSparseAttentionMetadata:
        """Return the metadata of one step.

        Args:
            current_timestep: Index of the denoising step.
            raw_latent_shape: Latent frames, height and width, before patches are made.
            patch_size: Latent cells of a token along the same axes; they must divide `raw_latent_shape`.
            VSA_sparsity: Share of tiles to drop, in [0, 1).
            device: Where the model runs.
            tile_tyx: Tokens of a tile; `"auto"` picks that of at most 64 tokens which costs least on this grid, `"auto128"` of
                at most 128.
            STA_window: Not read: tiles are chosen by their content.
            **settings: No other setting is known.

        Raises:
            TypeError: `settings` holds a name, or the sparsity is no number.
            ValueError: The shapes are not three positive integers or do not divide, or the sparsity lies outside [0, 1).
        """
        if settings:
            raise TypeError(
                f"build() knows no argument {sorted(settings)}; it takes current_timestep, raw_latent_shape, patch_size, "
                "VSA_sparsity, device, tile_tyx and STA_window"
            )
        sparsity = as_sparsity("VSA_sparsity", VSA_sparsity)
        grid_tyx = token_grid(raw_latent_shape, patch_size)
        grid = TileGrid(grid_tyx, resolve_tile(tile_tyx, grid_tyx))
        return VideoSparseAttentionMetadata(current_timestep, sparsity, video_geometry(grid, device))


class VideoSparseAttentionImpl(SparseAttentionImpl[VideoSparseAttentionMetadata]):
    """Computes Video Sparse Attention for one layer; its scale is that of all scores."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_metadata: VideoSparseAttentionMetadata,
        *,
        gate_compress: torch.Tensor | None = None,
        num_replicated: int = 0,
    ) -> torch.Tensor:
        """Attend to the tiles that fit best.

        Args:
            query: `[B, S + R, H, D]`, video tokens in raster order, then replicated text tokens.
            key: `[B, S + R, H_kv, D]`.
            value: `[B, S + R, H_kv, D]`.
            attn_metadata: The step's metadata.
            gate_compress: Factor of the coarse part's output, `[B, S, H, D]`; `None` means no coarse part at all.
            num_replicated: R. Every video token sees these tokens, and they see everything.

        Returns:
            `[B, S + R, H, D]`.

        Raises:
            ValueError: There is no metadata, or its grid is not that of the sequence.
        """
        # Not the annotated type where someone calls this by hand.
        metadata: object = attn_metadata
        if not isinstance(metadata, VideoSparseAttentionMetadata):
            raise ValueError(
                f"VIDEO_SPARSE_ATTN needs metadata of class VideoSparseAttentionMetadata, got {type(metadata).__name__}; build "
                "it with VideoSparseAttentionMetadataBuilder().build(current_timestep=..., raw_latent_shape=..., "
                "patch_size=..., VSA_sparsity=..., device=...) and run the model inside "
                "fastvideo.forward_context.set_forward_context(current_timestep, metadata)"
            )
        metadata.check_sequence(query.shape[1] - num_replicated)
        return video_sparse_attention(
            query,
            key,
            value,
            metadata.grid_tyx,
            num_kept=metadata.num_kept_tiles,
            gate=gate_compress,
            tile_tyx=metadata.tile_tyx,
            num_replicated=num_replicated,
            scale=self.softmax_scale,
            geometry=metadata.geometry,
        )
