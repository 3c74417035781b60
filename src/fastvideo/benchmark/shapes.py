"""Named shapes: what real models ask for, and the fine stage of sparse attention alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["SHAPES", "BenchmarkShape", "shape_named"]


@dataclass(frozen=True)
class BenchmarkShape:
    """One size of attention over a video.

    Attributes:
        grid_tyx: Video tokens along time, height and width.
        num_heads: Query, key and value heads.
        head_size: Size of a head.
        batch: Samples.
        sparsity: What is measured unless another is asked for.
        fine_tile_tyx: The tile of a fine stage alone, whose tokens lie tile after tile and whose lists are given; `None` for
            a whole layer, which chooses them.
    """

    grid_tyx: tuple[int, int, int]
    num_heads: int
    head_size: int
    batch: int = 1
    sparsity: float = 0.9
    fine_tile_tyx: tuple[int, int, int] | None = None

    @property
    def num_tokens(self) -> int:
        """Video tokens."""
        return math.prod(self.grid_tyx)

    def __str__(self) -> str:
        grid = "x".join(map(str, self.grid_tyx))
        batch = f"{self.batch} x " if self.batch > 1 else ""
        return f"{batch}{self.num_tokens} tokens ({grid}), {self.num_heads} heads x {self.head_size}"


SHAPES: dict[str, BenchmarkShape] = {
    "wan2.1-14b-720p": BenchmarkShape((21, 45, 80), 40, 128),
    "wan2.1-1.3b-480p": BenchmarkShape((21, 30, 52), 12, 128),
    "hunyuan-720p": BenchmarkShape((33, 45, 80), 24, 128),
    "million-tokens": BenchmarkShape((64, 128, 128), 8, 128, sparsity=0.97),
    "sprites": BenchmarkShape((16, 16, 16), 4, 64, batch=64, sparsity=0.75),
    # Keep 77 of 768, 144 of 1440 and 39 of 384 tiles.
    "fine-49k-tile64": BenchmarkShape((32, 32, 48), 16, 128, fine_tile_tyx=(4, 4, 4)),
    "fine-92k-tile64": BenchmarkShape((24, 48, 80), 40, 128, fine_tile_tyx=(4, 4, 4)),
    "fine-49k-tile128": BenchmarkShape((32, 32, 48), 16, 128, fine_tile_tyx=(4, 4, 8)),
    # For a CPU, and for tests of the benchmark itself.
    "cpu-4k": BenchmarkShape((8, 16, 32), 4, 32, sparsity=0.75),
    "cpu-16k": BenchmarkShape((16, 32, 32), 4, 64, sparsity=0.875),
    "tiny": BenchmarkShape((5, 6, 8), 2, 32, sparsity=0.5),
    "tiny-fine": BenchmarkShape((4, 8, 8), 2, 32, sparsity=0.5, fine_tile_tyx=(4, 4, 4)),
}


def shape_named(name: str) -> BenchmarkShape:
    """Return a named shape.

    Raises:
        ValueError: No shape has that name.

    Example:
        >>> print(shape_named("wan2.1-1.3b-480p"))
        32760 tokens (21x30x52), 12 heads x 128
    """
    if name not in SHAPES:
        raise ValueError(f"no shape is called {name!r}; there are {', '.join(SHAPES)}")
    return SHAPES[name]
