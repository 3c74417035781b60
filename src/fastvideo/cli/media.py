"""Clips as files: H.264 in MP4, and a contact sheet of frames as PNG."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

__all__ = ["contact_sheet", "to_pixels", "write_mp4", "write_png"]

_INSTALL = "pip install 'fastvideo-attention[video]'"


def to_pixels(clip: torch.Tensor) -> torch.Tensor:
    """Turn a clip `[3, T, Y, X]` in [-1, 1] into 8-bit frames `[T, Y, X, 3]`.

    Example:
        >>> to_pixels(torch.full((3, 1, 1, 1), -1.0)).flatten().tolist()
        [0, 0, 0]
    """
    return ((clip.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).cpu().contiguous()


def enlarge(frames: torch.Tensor, factor: int) -> torch.Tensor:
    """Repeat each pixel of `[T, Y, X, 3]` `factor` times along both axes."""
    return frames.repeat_interleave(factor, 1).repeat_interleave(factor, 2)


def contact_sheet(frames: torch.Tensor, num_columns: int = 4, gap: int = 2) -> torch.Tensor:
    """Lay frames `[T, Y, X, 3]` out in rows of `num_columns`, as one picture `[Y', X', 3]` with grey gaps.

    Example:
        >>> contact_sheet(torch.zeros(4, 8, 8, 3, dtype=torch.uint8), num_columns=2).shape
        torch.Size([22, 22, 3])
    """
    count, height, width, _ = frames.shape
    num_rows = -(-count // num_columns)
    sheet = torch.full((gap + num_rows * (height + gap), gap + num_columns * (width + gap), 3), 160, dtype=torch.uint8)
    for index, frame in enumerate(frames):
        top = gap + index // num_columns * (height + gap)
        left = gap + index % num_columns * (width + gap)
        sheet[top : top + height, left : left + width] = frame
    return sheet


def write_png(picture: torch.Tensor, path: Path) -> None:
    """Write a picture `[Y, X, 3]` of 8-bit values.

    Raises:
        ImportError: Pillow is missing.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(f"writing {path} needs Pillow: {_INSTALL}") from error
    Image.fromarray(picture.numpy()).save(path)


def write_mp4(frames: torch.Tensor, path: Path, frames_per_second: int = 8) -> None:
    """Write frames `[T, Y, X, 3]` of 8-bit values; rows and columns must be even.

    Raises:
        ImportError: PyAV is missing.
        ValueError: A side is odd.
    """
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise ValueError(f"expected frames with even sides for H.264, got {tuple(frames.shape[1:3])}")
    try:
        import av
    except ImportError as error:
        raise ImportError(f"writing {path} needs PyAV: {_INSTALL}") from error
    with av.open(str(path), mode="w") as container:
        stream: Any = container.add_stream("libx264", rate=Fraction(frames_per_second), options={"crf": "12"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames.numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
