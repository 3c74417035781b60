"""Tensors sent in float8: half the bytes of a 16-bit exchange, for inference.

Each token of each head carries its own scale, its largest magnitude over that of float8 (E4M3: 448), in float32 behind its
values, so that a value is off by 1/16 of its size at most and one outlier costs its own token alone. A head of 128 takes 132
bytes instead of 256. Nothing here has a gradient.
"""

from __future__ import annotations

import torch

__all__ = ["FLOAT8", "from_float8", "to_float8"]

FLOAT8 = torch.float8_e4m3fn
_SCALE_BYTES = 4


def to_float8(x: torch.Tensor) -> torch.Tensor:
    """Return `[..., D]` as bytes `[..., D + 4]`, values and then their scale.

    Example:
        >>> x = torch.tensor([[448.0, 1.0, -0.5]])
        >>> from_float8(to_float8(x), torch.float32).tolist()
        [[448.0, 1.0, -0.5]]
    """
    scale = x.detach().abs().amax(-1, keepdim=True).float() / torch.finfo(FLOAT8).max
    scale = scale.masked_fill(scale == 0, 1.0)
    values = (x.detach() / scale).to(FLOAT8)
    return torch.cat([values.view(torch.uint8), scale.view(torch.uint8)], dim=-1)


def from_float8(sent: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return what `to_float8` made bytes of, in `dtype`."""
    values, scale = torch.split(sent, [sent.shape[-1] - _SCALE_BYTES, _SCALE_BYTES], dim=-1)
    wide = values.contiguous().view(FLOAT8).to(torch.float32)
    # A copy starts at an address that four bytes may be read from.
    return (wide * scale.clone(memory_format=torch.contiguous_format).view(torch.float32)).to(dtype)
