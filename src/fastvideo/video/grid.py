"""From a latent video to its grid of tokens, `(t, y, x)`."""

from __future__ import annotations

from collections.abc import Sequence

from fastvideo.video.tiles import as_tyx

__all__ = ["check_num_tokens", "token_grid"]


def token_grid(raw_latent_shape: Sequence[int], patch_size: Sequence[int]) -> tuple[int, int, int]:
    """Return the tokens along time, height and width.

    Args:
        raw_latent_shape: Latent frames, height and width, before patches are made.
        patch_size: Latent cells of a token along the same axes.

    Raises:
        ValueError: One isn't three positive integers, or the patches don't divide the latents.

    Example:
        >>> token_grid((21, 90, 160), (1, 2, 2))
        (21, 45, 80)
    """
    latent, patch = as_tyx("raw_latent_shape", raw_latent_shape), as_tyx("patch_size", patch_size)
    if any(extent % cells for extent, cells in zip(latent, patch, strict=True)):
        raise ValueError(f"expected patch_size to divide raw_latent_shape, got raw_latent_shape={latent}, patch_size={patch}")
    t, y, x = (extent // cells for extent, cells in zip(latent, patch, strict=True))
    return t, y, x


def check_num_tokens(grid_tyx: tuple[int, int, int], num_tokens: int) -> None:
    """Check that a sequence is the one that metadata was built for.

    Raises:
        ValueError: The grid has another number of tokens.
    """
    expected = grid_tyx[0] * grid_tyx[1] * grid_tyx[2]
    if expected != num_tokens:
        raise ValueError(
            f"the metadata's {grid_tyx=} has {expected} tokens, the sequence has {num_tokens} beside replicated ones; "
            "build the metadata with this video's raw_latent_shape and patch_size"
        )
