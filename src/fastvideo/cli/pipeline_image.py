"""The image that a pipeline of image to video starts from: read, and cut to the video's shape, never squeezed into it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

__all__ = ["cut_to_shape", "default_size", "image_arguments", "multiples", "read_image"]


def read_image(path: Path) -> Any:
    """Read a picture, upright and in RGB.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: Pillow is missing.
        ValueError: It is no picture.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise ImportError(f"reading {path} needs Pillow: pip install 'fastvideo-attention[video]'") from error
    if not path.is_file():
        raise FileNotFoundError(f"--image {path} is no file; give a picture, such as a PNG")
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"--image {path} can't be read as a picture ({error}); give a whole PNG or JPEG") from error


def image_arguments(pipe: Any, image: Any, height: int | None, width: int | None) -> dict[str, Any]:
    """Return what a pipeline is called with: the image, cut to the shape of the video, and the video's height and width.

    Args:
        pipe: Loaded.
        image: A Pillow picture.
        height: As wished; without a wish the video has the image's shape and the pipeline's default area.
        width: Likewise.
    """
    if height is None or width is None:
        height, width = default_size(pipe, image)
    return {"image": cut_to_shape(image, height, width), "height": height, "width": width}


def multiples(pipe: Any) -> tuple[int, int]:
    """Return of what a Wan video's height and width are multiples, in pixels.

    Example:
        >>> from types import SimpleNamespace
        >>> model = SimpleNamespace(config=SimpleNamespace(patch_size=(1, 2, 2)))
        >>> multiples(SimpleNamespace(transformer=model, vae_scale_factor_spatial=8))
        (16, 16)
    """
    model = pipe.transformer if pipe.transformer is not None else pipe.transformer_2
    edge: int = pipe.vae_scale_factor_spatial
    return edge * model.config.patch_size[1], edge * model.config.patch_size[2]


def default_size(pipe: Any, image: Any, num_pixels: int = 480 * 832) -> tuple[int, int]:
    """Return a height and width in the shape of an image, of about so many pixels, as Wan's own programs choose them.

    Args:
        pipe: Says what both are multiples of.
        image: A Pillow picture.
        num_pixels: Of the video's frames; those of the pipeline's default size.

    Example:
        >>> from types import SimpleNamespace
        >>> model = SimpleNamespace(config=SimpleNamespace(patch_size=(1, 2, 2)))
        >>> pipe = SimpleNamespace(transformer=model, vae_scale_factor_spatial=8)
        >>> default_size(pipe, SimpleNamespace(width=1664, height=960))
        (480, 832)
        >>> default_size(pipe, SimpleNamespace(width=60, height=90))
        (768, 512)
    """
    aspect = image.height / image.width
    sides = (math.sqrt(num_pixels * aspect), math.sqrt(num_pixels / aspect))
    # A whole number of units may come out a hair below itself.
    height, width = (max(1, int(side / unit + 1e-6)) * unit for side, unit in zip(sides, multiples(pipe), strict=True))
    return height, width


def cut_to_shape(image: Any, height: int, width: int) -> Any:
    """Cut the middle of an image that has the proportions of a video; the pipeline makes it as large as that.

    Args:
        image: A Pillow picture.
        height: Of the video.
        width: Of the video.

    Example:
        >>> from PIL import Image
        >>> cut_to_shape(Image.new("RGB", (100, 100)), height=480, width=832).size
        (100, 58)
    """
    shown_width = min(image.width, max(1, round(image.height * width / height)))
    shown_height = min(image.height, max(1, round(image.width * height / width)))
    left, top = (image.width - shown_width) // 2, (image.height - shown_height) // 2
    return image.crop((left, top, left + shown_width, top + shown_height))
