"""Rebuilds the sprite atlas from a colour emoji font.

The font is Noto Color Emoji (SIL Open Font License 1.1), Debian's package `fonts-noto-color-emoji`; Pillow draws its
bitmaps at size 109 only. Each glyph is cropped, scaled down with premultiplied alpha and centred in a cell.

    apt-get install fonts-noto-color-emoji
    python scripts/build_sprite_atlas.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fastvideo.models.sprites.atlas import ATLAS_COLUMNS, CELL_SIZE, SPRITE_SIZE
from fastvideo.models.sprites.prompts import SPRITES

GLYPHS = {
    "red heart": "\u2764",
    "green tree": "\U0001f333",
    "blue fish": "\U0001f41f",
    "yellow star": "\u2b50",
    "orange pumpkin": "\U0001f383",
    "purple grapes": "\U0001f347",
    "green frog": "\U0001f438",
    "yellow sun": "\U0001f31e",
    "pink pig": "\U0001f437",
    "brown bear": "\U0001f43b",
    "red car": "\U0001f697",
    "green turtle": "\U0001f422",
    "pink flower": "\U0001f338",
    "green clover": "\U0001f340",
    "red mushroom": "\U0001f344",
    "blue gem": "\U0001f48e",
    "yellow duck": "\U0001f425",
    "pink octopus": "\U0001f419",
    "gray elephant": "\U0001f418",
    "green dinosaur": "\U0001f995",
    "orange fox": "\U0001f98a",
    "gold crown": "\U0001f451",
    "purple umbrella": "\u2614",
    "yellow lemon": "\U0001f34b",
    "brown cookie": "\U0001f36a",
    "red rose": "\U0001f339",
    "blue globe": "\U0001f30d",
    "purple eggplant": "\U0001f346",
}
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
OUT = Path(__file__).resolve().parent.parent / "src/fastvideo/models/sprites/atlas.png"
FONT_SIZE = 109


def draw_glyph(font: ImageFont.FreeTypeFont, glyph: str) -> np.ndarray:
    """One glyph cropped to its ink: `[h, w, 4]` float32 in [0, 1], premultiplied alpha."""
    image = Image.new("RGBA", (2 * FONT_SIZE, 2 * FONT_SIZE), (0, 0, 0, 0))
    ImageDraw.Draw(image).text((20, 20), glyph, font=font, embedded_color=True)
    ink = image.getchannel("A").getbbox()
    if ink is None:
        raise ValueError(f"the font draws nothing for U+{ord(glyph):04X}; install fonts-noto-color-emoji")
    rgba = np.asarray(image.crop(ink), dtype=np.float32) / 255
    rgba[..., :3] *= rgba[..., 3:]
    return rgba


def shrink(rgba: np.ndarray, size: int) -> np.ndarray:
    """Scales a premultiplied image so that its longer side is `size` pixels."""
    height, width = rgba.shape[:2]
    scale = size / max(height, width)
    shape = (max(1, round(width * scale)), max(1, round(height * scale)))
    planes = [Image.fromarray(np.ascontiguousarray(rgba[..., channel])) for channel in range(4)]
    small = np.stack([np.asarray(plane.resize(shape, Image.Resampling.LANCZOS)) for plane in planes], axis=-1)
    alpha = small[..., 3:].clip(0, 1)
    return np.concatenate([small[..., :3].clip(0, alpha), alpha], axis=-1)


def build_atlas(font_path: Path) -> Image.Image:
    """The atlas: cells of `CELL_SIZE` pixels in the order of `SPRITES`, straight (not premultiplied) alpha."""
    font = ImageFont.truetype(str(font_path), FONT_SIZE)
    rows = -(-len(SPRITES) // ATLAS_COLUMNS)
    atlas = np.zeros((rows * CELL_SIZE, ATLAS_COLUMNS * CELL_SIZE, 4), dtype=np.float32)
    for index, name in enumerate(SPRITES):
        sprite = shrink(draw_glyph(font, GLYPHS[name]), SPRITE_SIZE)
        height, width = sprite.shape[:2]
        y = index // ATLAS_COLUMNS * CELL_SIZE + (CELL_SIZE - height) // 2
        x = index % ATLAS_COLUMNS * CELL_SIZE + (CELL_SIZE - width) // 2
        atlas[y : y + height, x : x + width] = sprite
    colour = np.where(atlas[..., 3:] > 0, atlas[..., :3] / np.maximum(atlas[..., 3:], 1e-6), 0)
    straight = np.concatenate([colour, atlas[..., 3:]], axis=-1)
    return Image.fromarray((straight.clip(0, 1) * 255).round().astype(np.uint8))


def main() -> None:
    """Draws the atlas and writes it beside the package's code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--font", type=Path, default=FONT, help="path of NotoColorEmoji.ttf")
    parser.add_argument("--out", type=Path, default=OUT, help="path of the atlas to write")
    args = parser.parse_args()
    build_atlas(args.font).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
