"""The sprite atlas: pictures of the sprites as a tensor with premultiplied alpha.

The pictures are drawn from Noto Color Emoji (SIL Open Font License 1.1, see `ATLAS-LICENSE.txt` beside this file) by
`scripts/build_sprite_atlas.py`, in cells of `CELL_SIZE` pixels, row by row in the order of `prompts.SPRITES`.
"""

from __future__ import annotations

import functools
from importlib import resources

import torch

from fastvideo.models.sprites.prompts import SPRITES

CELL_SIZE = 24
SPRITE_SIZE = 22
ATLAS_COLUMNS = 7


@functools.lru_cache(maxsize=1)
def _load_atlas() -> torch.Tensor:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("reading the sprite atlas needs Pillow; run: pip install pillow") from error
    with resources.files(__package__).joinpath("atlas.png").open("rb") as file, Image.open(file) as image:
        width, height, pixels = image.width, image.height, bytearray(image.convert("RGBA").tobytes())
    rows = -(-len(SPRITES) // ATLAS_COLUMNS)
    if (width, height) != (ATLAS_COLUMNS * CELL_SIZE, rows * CELL_SIZE):
        raise ValueError(f"atlas.png is {width} x {height} and doesn't fit {len(SPRITES)} sprites; rebuild it")
    rgba = torch.frombuffer(pixels, dtype=torch.uint8).to(torch.float32).div(255)
    cells = rgba.view(rows, CELL_SIZE, ATLAS_COLUMNS, CELL_SIZE, 4).permute(0, 2, 4, 1, 3).flatten(0, 1)[: len(SPRITES)]
    colour, alpha = cells[:, :3], cells[:, 3:]
    return torch.cat([colour * alpha, alpha], dim=1)


def load_atlas(device: torch.device | str = "cpu") -> torch.Tensor:
    """Pictures `[num_sprites, 4, CELL_SIZE, CELL_SIZE]` of all sprites, float32 in [0, 1], RGBA, premultiplied alpha.

    Raises:
        ImportError: Pillow is missing.

    Example:
        >>> atlas = load_atlas()
        >>> bool((atlas[:, :3] <= atlas[:, 3:]).all()), tuple(atlas.shape[1:])
        (True, (4, 24, 24))
    """
    return _load_atlas().to(device, copy=True)
