"""`SLIDING_TILE_ATTN`: each tile of video tokens attends to the window of tiles around it, on any device.

Paper: "Fast Video Generation with Sliding Tile Attention", arXiv 2502.04507; the arithmetic of windows is in
`fastvideo.video.windows`. Needs metadata: the video's token grid, the tile and the windows in tiles, one for all heads or
one per head, built once per step and shared between steps. Any grid and any tile: tiles at the far edges hold the tokens
that exist. Tokens come and go in raster order, replicated text tokens behind them: every video token sees all text, and
text sees everything. Work and memory follow the windows.

Shape legend: B batch, S video tokens, R replicated tokens, H heads, D head size; T, Y, X video grid; N engine tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch

from fastvideo.attention.backends.abstract import (
    AttentionBackend,
    AttentionMetadataBuilder,
)
from fastvideo.attention.backends.sparse import SparseAttentionImpl, SparseMetadata, common_rejections
from fastvideo.attention.request import AttentionRequest
from fastvideo.block_sparse.attention import block_sparse_attention
from fastvideo.block_sparse.pattern import BlockPattern
from fastvideo.block_sparse.video_sparse import VideoGeometry, video_geometry, with_replicated
from fastvideo.tensor_cache import cache_tensors
from fastvideo.video.choose_tile import resolve_tile
from fastvideo.video.grid import check_num_tokens, token_grid
from fastvideo.video.tiles import TileGrid
from fastvideo.video.windows import as_window_tyx, largest_part, window_lists

__all__ = [
    "SlidingTileAttentionBackend",
    "SlidingTileAttentionImpl",
    "SlidingTileAttentionMetadata",
    "SlidingTileAttentionMetadataBuilder",
]

Window: TypeAlias = tuple[int, int, int]

DEFAULT_TILE_TYX = (6, 8, 8)
"""The paper's tile: 384 tokens."""
_MAX_TILE = 256
"""Tokens of the largest tile that every implementation of the engine takes; larger ones run as parts."""
_MAX_PART = 128
"""Tokens of the largest part: two blocks of 64 rows fill it to the last."""


class SlidingTileAttentionBackend(AttentionBackend):
    """Sliding Tile Attention.

    Example:
        >>> metadata = SlidingTileAttentionMetadataBuilder().build(
        ...     current_timestep=0, raw_latent_shape=(4, 8, 8), patch_size=(1, 1, 1), STA_window=(1, 3, 1),
        ...     tile_tyx=(4, 2, 2), device="cpu",
        ... )
        >>> impl = SlidingTileAttentionBackend.get_impl_cls()(num_heads=2, head_size=8, softmax_scale=0.25)
        >>> impl.forward(*torch.ones(3, 1, 256, 2, 8), metadata).unique()
        tensor([1.])
    """

    layer_independent = True

    @staticmethod
    def get_name() -> str:
        """Return `"SLIDING_TILE_ATTN"`."""
        return "SLIDING_TILE_ATTN"

    @staticmethod
    def get_impl_cls() -> type[SlidingTileAttentionImpl]:
        """Return `SlidingTileAttentionImpl`."""
        return SlidingTileAttentionImpl

    @staticmethod
    def get_metadata_cls() -> type[SlidingTileAttentionMetadata]:
        """Return `SlidingTileAttentionMetadata`."""
        return SlidingTileAttentionMetadata

    @staticmethod
    def get_builder_cls() -> type[SlidingTileAttentionMetadataBuilder]:
        """Return `SlidingTileAttentionMetadataBuilder`."""
        return SlidingTileAttentionMetadataBuilder

    @classmethod
    def rejections(cls, request: AttentionRequest) -> tuple[str, ...]:
        """Return every reason against `request`: masks, causal, dropout, gate, log-sum-exp, cross attention, dtype.

        A request does not say whether the metadata has one window or one per head; with heads exchanged between devices
        the latter is refused by `SlidingTileAttentionMetadata.check_heads`.
        """
        reasons = [*super().rejections(request), *common_rejections(request)]
        if request.metadata_cls is not None and not issubclass(request.metadata_cls, SlidingTileAttentionMetadata):
            reasons.append(
                f"metadata of class {request.metadata_cls.__name__} is not this backend's; build it with "
                "SlidingTileAttentionMetadataBuilder"
            )
        return tuple(reasons)


class WindowedGrid(NamedTuple):
    """Tiles and windows on one device, with what follows from them; see the fields of `SlidingTileAttentionMetadata`."""

    grid_tyx: tuple[int, int, int]
    tile_tyx: tuple[int, int, int]
    windows: tuple[Window, ...]
    geometry: VideoGeometry
    pattern: BlockPattern


@dataclass
class SlidingTileAttentionMetadata(SparseMetadata):
    """The video and the windows of one denoising step. Build it with `SlidingTileAttentionMetadataBuilder`; its fields don't
    change.

    Attributes:
        current_timestep: Index of the denoising step; no layer reads it.
        windowed: What the other fields are taken from, shared between steps.
        grid_tyx: Video tokens along time, height and width.
        tile_tyx: Tokens of a tile; tiles at the far edges may be smaller.
        windows: Tiles of a window along the same axes: one window for all heads, or one for each.
        geometry: The index tensors of the grid and the engine's tiles.
        pattern: Which tiles see which without text.
    """

    windowed: WindowedGrid = field(repr=False)
    grid_tyx: tuple[int, int, int] = field(init=False)
    tile_tyx: tuple[int, int, int] = field(init=False)
    windows: tuple[Window, ...] = field(init=False)
    geometry: VideoGeometry = field(init=False, repr=False)
    pattern: BlockPattern = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.grid_tyx, self.tile_tyx, self.windows, self.geometry, self.pattern = self.windowed

    def check_sequence(self, num_tokens: int) -> None:
        """Raise `ValueError` if the grid doesn't have `num_tokens` tokens."""
        check_num_tokens(self.grid_tyx, num_tokens)

    def check_heads(self, num_heads: int, *, are_cut: bool) -> None:
        """Raise `ValueError` if there are windows for other heads than `num_heads`, or for each head where heads `are_cut`."""
        num_windows = len(self.windows)
        if num_windows not in (1, num_heads):
            raise ValueError(
                f"the metadata has windows for {num_windows} heads, this call has {num_heads}; give one window for all "
                "heads, or one per head"
            )
        if num_windows > 1 and are_cut:
            raise ValueError(
                f"the metadata has a window for each of {num_windows} heads; where devices share a sequence by exchanging "
                "heads (Ulysses), each computes its own share of them and is not told which: give one window for all heads"
            )


class SlidingTileAttentionMetadataBuilder(AttentionMetadataBuilder[SlidingTileAttentionMetadata]):
    """Builds `SlidingTileAttentionMetadata`. Index tensors are built once per grid, tile, windows and device, and shared.

    Example:
        >>> metadata = SlidingTileAttentionMetadataBuilder().build(
        ...     current_timestep=0, raw_latent_shape=(30, 96, 160), patch_size=(1, 2, 2), STA_window=(3, 3, 3), device="cpu"
        ... )
        >>> metadata.grid_tyx, metadata.tile_tyx, metadata.windows
        ((30, 48, 80), (6, 8, 8), ((3, 3, 3),))
    """

    def prepare(self) -> None:
        """Do nothing: what is kept depends on the geometry alone and stays right."""

    def build(  # type: ignore[override]  # the contract's `**kwargs: dict[str, Any]` can't name a single argument
        self,
        *,
        current_timestep: int,
        raw_latent_shape: Sequence[int],
        patch_size: Sequence[int],
        STA_window: Sequence[int] | Sequence[Sequence[int]],
        device: torch.device | str,
        tile_tyx: Sequence[int] | str = DEFAULT_TILE_TYX,
        VSA_sparsity: float | None = None,  # noqa: ARG002  # pipelines hand it to every builder
        **settings: Any,
    ) -> SlidingTileAttentionMetadata:
        """Return the metadata of one step.

        Args:
            current_timestep: Index of the denoising step.
            raw_latent_shape: Latent frames, height and width, before patches are made.
            patch_size: Latent cells of a token along the same axes; they must divide `raw_latent_shape`.
            STA_window: Tiles of a window along the same axes, odd; or a list of those, one per head. A window longer
                than an axis of the grid sees the whole axis.
            device: Where the model runs.
            tile_tyx: Tokens of a tile; `"auto"` picks that of at most 64 tokens which costs least on this grid, `"auto128"` of
                at most 128.
            VSA_sparsity: Not read: the windows say what is seen.
            **settings: No other setting is known.

        Raises:
            TypeError: `settings` holds a name, or `STA_window` is no sequence.
            ValueError: The shapes are not three positive integers or do not divide, or a window is even.
        """
        if settings:
            raise TypeError(
                f"build() knows no argument {sorted(settings)}; it takes current_timestep, raw_latent_shape, patch_size, "
                "STA_window, device, tile_tyx and VSA_sparsity"
            )
        grid_tyx = token_grid(raw_latent_shape, patch_size)
        grid, windows = TileGrid(grid_tyx, resolve_tile(tile_tyx, grid_tyx)), _as_windows(STA_window)
        return SlidingTileAttentionMetadata(current_timestep, _cached_windowed(grid, windows, torch.device(device)))


class SlidingTileAttentionImpl(SparseAttentionImpl[SlidingTileAttentionMetadata]):
    """Computes Sliding Tile Attention for one layer; its scale is that of all scores."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_metadata: SlidingTileAttentionMetadata,
        *,
        num_replicated: int = 0,
    ) -> torch.Tensor:
        """Attend to the windows.

        Args:
            query: `[B, S + R, H, D]`, video tokens in raster order, then replicated text tokens.
            key: `[B, S + R, H_kv, D]`.
            value: `[B, S + R, H_kv, D]`.
            attn_metadata: The step's metadata.
            num_replicated: R. Every video token sees these tokens, and they see everything.

        Returns:
            `[B, S + R, H, D]`.

        Raises:
            ValueError: There is no metadata, its grid is not that of the sequence, or its windows are for other heads.
        """
        metadata = self._check_metadata(query, attn_metadata, num_replicated)
        scale, num_tokens = self.softmax_scale, query.shape[1] - num_replicated
        if not num_replicated:
            return block_sparse_attention(query, key, value, metadata.pattern, scale=scale)
        join = _with_text if torch.compiler.is_compiling() else _cached_with_text
        video, text = join(metadata.geometry, metadata.pattern, num_replicated)
        outputs = [
            block_sparse_attention(query[:, :num_tokens], key, value, video, scale=scale),
            block_sparse_attention(query[:, num_tokens:], key, value, text, scale=scale),
        ]
        return torch.cat(outputs, dim=1)

    def _check_metadata(self, query: torch.Tensor, metadata: object, num_replicated: int) -> SlidingTileAttentionMetadata:
        if not isinstance(metadata, SlidingTileAttentionMetadata):
            raise ValueError(
                f"SLIDING_TILE_ATTN needs metadata of class SlidingTileAttentionMetadata, got {type(metadata).__name__}; "
                "build it with SlidingTileAttentionMetadataBuilder().build(current_timestep=..., raw_latent_shape=..., "
                "patch_size=..., STA_window=..., device=...) and run the model inside "
                "fastvideo.forward_context.set_forward_context(current_timestep, metadata)"
            )
        metadata.check_sequence(query.shape[1] - num_replicated)
        metadata.check_heads(query.shape[2], are_cut=False)
        if metadata.pattern.indices.device != query.device:
            raise ValueError(
                f"the metadata was built for {metadata.pattern.indices.device}, query is on {query.device}; "
                f"build the metadata with device={str(query.device)!r}"
            )
        return metadata


def _as_windows(value: Sequence[int] | Sequence[Sequence[int]]) -> tuple[Window, ...]:
    """One window, or one per head."""
    if not isinstance(value, Sequence):
        raise TypeError(f"expected STA_window to be three odd integers (t, y, x) or a list of those, got {value!r}")
    windows: list[Any] = [*value]
    if not windows:
        raise ValueError("expected STA_window to be three odd integers (t, y, x) or a list of those, got none")
    if not any(isinstance(window, Sequence) for window in windows):
        return (as_window_tyx("STA_window", windows),)
    if not all(isinstance(window, Sequence) for window in windows):
        raise ValueError(f"expected STA_window to be three odd integers (t, y, x) or a list of those, got {value!r}")
    return tuple(as_window_tyx(f"STA_window[{head}]", window) for head, window in enumerate(windows))


def _windowed(asked: TileGrid, windows: tuple[Window, ...], device: torch.device) -> WindowedGrid:
    """Windows on a grid, with the engine's tiles and which of them see which."""
    t, y, x = map(min, asked.tile_tyx, asked.grid_tyx)
    grid = TileGrid(asked.grid_tyx, (t, y, x))
    part_tyx = grid.tile_tyx if grid.max_size <= _MAX_TILE else largest_part(grid.tile_tyx, _MAX_PART)
    geometry = video_geometry(TileGrid(grid.grid_tyx, part_tyx), device)
    per_head = windows[:1] if len(set(windows)) == 1 else windows
    # Heads share few different windows.
    lists = {window: window_lists(grid, window, part_tyx) for window in dict.fromkeys(per_head)}
    width = max(indices.shape[-1] for indices, _ in lists.values())
    is_ragged = any(counts is not None or indices.shape[-1] < width for indices, counts in lists.values())
    num_tiles = geometry.grid.num_tiles
    indices = torch.zeros(1, len(per_head), num_tiles, width, dtype=torch.int32)
    all_counts = torch.empty(1, len(per_head), num_tiles, dtype=torch.int32)
    for head, window in enumerate(per_head):
        listed, counts = lists[window]
        indices[0, head, :, : listed.shape[-1]] = listed
        all_counts[0, head] = listed.shape[-1] if counts is None else counts
    layout = geometry.video_tiles
    pattern = BlockPattern(layout, layout, indices.to(device), all_counts.to(device) if is_ragged else None)
    return WindowedGrid(asked.grid_tyx, asked.tile_tyx, windows, geometry, _for_all_steps(pattern))


def _for_all_steps(pattern: BlockPattern) -> BlockPattern:
    """The pattern, which all layers and steps share, with what kernels make of it unless that is large."""
    return pattern.reusable() if pattern.indices.shape[1] == 1 else pattern


# Lists of many heads are large: 1,440 tiles that see 486 take 112 MB for 40 heads.
_cached_windowed = cache_tensors(_windowed, maxsize=8)


def _with_text_for_all_steps(
    geometry: VideoGeometry, pattern: BlockPattern, num_replicated: int
) -> tuple[BlockPattern, BlockPattern]:
    video, text = _with_text(geometry, pattern, num_replicated)
    return _for_all_steps(video), _for_all_steps(text)


def _with_text(geometry: VideoGeometry, pattern: BlockPattern, num_replicated: int) -> tuple[BlockPattern, BlockPattern]:
    """What the video sees and what the text sees, with `num_replicated` text tokens behind the video; no host waits."""
    geometry = with_replicated(geometry, num_replicated)
    keys, text_queries = geometry.key_tiles, geometry.text_tiles
    if text_queries is None:
        raise ValueError(f"expected text tokens, got {num_replicated=}")
    indices, counts = pattern.indices, pattern.counts
    num_tiles = geometry.grid.num_tiles
    text_keys = torch.arange(num_tiles, keys.num_tiles, dtype=torch.int32, device=indices.device)
    text_lists = text_keys.expand(*indices.shape[:3], -1)
    if counts is None:
        indices = torch.cat([indices, text_lists], dim=-1)
    else:  # behind the last entry that counts
        places = counts[..., None] + (text_keys - num_tiles)
        indices = torch.cat([indices, torch.zeros_like(text_lists)], dim=-1).scatter(-1, places.long(), text_lists)
        counts = counts + text_keys.shape[0]
    everything = torch.arange(keys.num_tiles, dtype=torch.int32, device=indices.device)
    text = everything.expand(1, 1, text_queries.num_tiles, -1).contiguous()
    return BlockPattern(geometry.video_tiles, keys, indices, counts), BlockPattern(text_queries, keys, text)


_cached_with_text = cache_tensors(_with_text_for_all_steps, maxsize=8)
