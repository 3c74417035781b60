"""Tiles in slots of one size, as kernels of other packages read them: packing, unpacking, and rules that they share.

A slot holds the tokens of one tile first and zeros behind them, because a weight of 0 times what lies there must be 0. Where
the tokens already lie so, nothing is copied.

Shape legend: B batch, S tokens, H heads, D head size, N tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastvideo.block_sparse.pattern import BlockPattern, TileLayout
from fastvideo.platforms.system import installed_packages, is_older

__all__ = [
    "Slots",
    "fold_scale",
    "needs_cuda",
    "package_rejections",
    "repeat_heads",
    "sum_groups",
    "tile_rejections",
    "tokens_that_see_nothing",
]


@dataclass(frozen=True)
class Slots:
    """A layout's tiles in slots of `size` tokens.

    Attributes:
        num_rows: Rows of the packed tensors, N times the slot.
        places: `[S]` int64, the row of each token; `None` where each token is in its place.
    """

    num_rows: int
    places: Tensor | None

    @classmethod
    def of(cls, layout: TileLayout, size: int) -> Slots:
        """Slots of `size` tokens, at least the layout's largest tile."""
        num_rows = layout.num_tiles * size
        if layout.order is None and num_rows == layout.num_tokens:
            return cls(num_rows, None)
        tiles = torch.arange(layout.num_tiles, device=layout.offsets.device)
        offsets = layout.offsets.long()
        shift = torch.repeat_interleave(tiles * size - offsets[:-1], layout.sizes, output_size=layout.num_tokens)
        places = shift + torch.arange(layout.num_tokens, device=shift.device)
        if layout.order is not None:
            places = torch.empty_like(places).scatter_(0, layout.order.long(), places)
        return cls(num_rows, places)

    def pack(self, x: Tensor) -> Tensor:
        """`[B, S, ...]` to `[B, N * size, ...]`, with zeros where no token is; contiguous."""
        if self.places is None:
            return x.contiguous()
        return x.new_zeros(x.shape[0], self.num_rows, *x.shape[2:]).index_copy_(1, self.places, x)

    def unpack(self, x: Tensor) -> Tensor:
        """`[B, N * size, ...]` to `[B, S, ...]`; contiguous."""
        return x.contiguous() if self.places is None else x.index_select(1, self.places)


def tokens_that_see_nothing(pattern: BlockPattern) -> Tensor | None:
    """Bool `[B|1, S_q, H|1]`; `None` where every query sees a tile."""
    if pattern.counts is None:
        return None
    return (pattern.counts == 0).transpose(1, 2).index_select(1, pattern.query_tiles.tile_of_token())


def fold_scale(query: Tensor, scale: float) -> tuple[Tensor, float, float]:
    """A query and a positive scale that give the same scores, and the factor of the query's gradient.

    Kernels that take the maximum of unscaled scores overflow for a negative scale.

    Example:
        >>> fold_scale(torch.ones(1), -0.5)
        (tensor([-1.]), 0.5, -1.0)
    """
    if scale > 0:
        return query, scale, 1.0
    return (torch.zeros_like(query), 1.0, 0.0) if scale == 0 else (-query, -scale, -1.0)


def repeat_heads(x: Tensor, num_heads: int) -> Tensor:
    """`[B, S, Hkv, D]` to `[B, S, num_heads, D]`: each head once for every query head that uses it."""
    return x if x.shape[2] == num_heads else x.repeat_interleave(num_heads // x.shape[2], dim=2)


def sum_groups(x: Tensor, num_heads: int) -> Tensor:
    """The gradient of `repeat_heads`: `[B, S, Hq, D]` to `[B, S, num_heads, D]`, summed in fp32."""
    if x.shape[2] == num_heads:
        return x
    grouped = x.unflatten(2, (num_heads, x.shape[2] // num_heads))  # type: ignore[no-untyped-call]  # torch's own
    return grouped.sum(3, dtype=torch.float32).to(x.dtype)  # type: ignore[no-any-return]  # likewise


def needs_cuda(query: Tensor, majors: tuple[int, ...]) -> list[str]:
    """The reason against a device that is no NVIDIA GPU of these major compute capabilities, if any."""
    if query.device.type != "cuda" or torch.version.hip is not None:
        return [f"needs an NVIDIA GPU, got a tensor on {query.device}"]
    major, minor = torch.cuda.get_device_capability(query.device)
    if major in majors:
        return []
    return [f"needs compute capability {', '.join(f'{wanted}.x' for wanted in majors)}, this GPU has {major}.{minor}"]


def package_rejections(package: str, minimum: tuple[int, ...], extra: str) -> list[str]:
    """The reason against a package that is absent or older than `minimum`, with what installs it, if any."""
    version = dict(installed_packages()).get(package)
    install = f'pip install "fastvideo-attention[{extra}]"'
    if version is None:
        return [f"{package} is not installed: {install}"]
    if is_older(version, minimum):
        return [f"{package} {version} is too old: {install}"]
    return []


def tile_rejections(pattern: BlockPattern, size: int, *, exactly: bool) -> list[str]:
    """Reasons against tiles that don't fit slots of `size` tokens, or don't fill them where `exactly` asks for that."""
    reasons = []
    for name, layout in (("query", pattern.query_tiles), ("key", pattern.key_tiles)):
        fills = layout.is_uniform and layout.max_size == size
        if layout.max_size > size:
            reasons.append(f"needs {name} tiles of {'' if exactly else 'at most '}{size} tokens, got {layout.max_size}")
        elif exactly and not fills:
            reasons.append(f"needs {name} tiles of exactly {size} tokens, got smaller ones")
    return reasons
