"""What a Wan transformer computes before its blocks: patches, rotary tables, timestep and text embeddings.

Shape legend: `B` batch, `S` tokens, `D` head size, `L` text tokens, `T, Y, X` token grid. Tables and sinusoids are
computed in float64 (float32 on MPS, which lacks float64) and rounded once, as the original Wan code does.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RotaryTables = tuple[Tensor, Tensor]


def widest_dtype(device: torch.device) -> torch.dtype:
    """Return the widest float dtype of a device: float64, or float32 on MPS.

    Example:
        >>> widest_dtype(torch.device("cpu"))
        torch.float64
    """
    return torch.float32 if device.type == "mps" else torch.float64


def patchify(video: Tensor, patch_size: tuple[int, int, int]) -> Tensor:
    """Cut a video into flattened patches in raster order (frames slowest, columns fastest).

    Args:
        video: `[B, C, T * p_t, Y * p_y, X * p_x]`, any dtype.
        patch_size: (p_t, p_y, p_x).

    Returns:
        `[B, T * Y * X, C * p_t * p_y * p_x]`, channels ordered as a `Conv3d` kernel's.

    Example:
        >>> patchify(torch.arange(8.0).view(1, 1, 1, 2, 4), (1, 2, 2))
        tensor([[[0., 1., 4., 5.],
                 [2., 3., 6., 7.]]])
    """
    p_t, p_y, p_x = patch_size
    batch, channels, frames, rows, columns = video.shape
    split = video.reshape(batch, channels, frames // p_t, p_t, rows // p_y, p_y, columns // p_x, p_x)
    # [B, C, T, p_t, Y, p_y, X, p_x] -> [B, T, Y, X, C, p_t, p_y, p_x]
    return split.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def unpatchify(patches: Tensor, grid_tyx: tuple[int, int, int], patch_size: tuple[int, int, int]) -> Tensor:
    """Join predicted patches to a video.

    Args:
        patches: `[B, S, p_t * p_y * p_x * C]`, channels fastest (unlike `patchify`: the two orders are the
            checkpoints').
        grid_tyx: Tokens per axis, with `S = T * Y * X`.
        patch_size: (p_t, p_y, p_x).

    Returns:
        `[B, C, T * p_t, Y * p_y, X * p_x]`.

    Example:
        >>> unpatchify(torch.tensor([[[0., 1., 4., 5.], [2., 3., 6., 7.]]]), (1, 1, 2), (1, 2, 2)).flatten(0, 3)
        tensor([[0., 1., 2., 3.],
                [4., 5., 6., 7.]])
    """
    split = patches.reshape(patches.shape[0], *grid_tyx, *patch_size, -1)
    # [B, T, Y, X, p_t, p_y, p_x, C] -> [B, C, T, p_t, Y, p_y, X, p_x]
    return split.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def rotary_tables(grid_tyx: tuple[int, int, int], head_size: int, device: torch.device) -> RotaryTables:
    """Return the cosines and sines of 3D rotary position embedding (RoPE, arXiv 2104.09864) for a token grid.

    Each axis rotates its own channels: rows and columns get `2 * (head_size // 6)` each, frames the rest. Within an
    axis of d channels, pair i turns by `position * 10000 ** (-2 i / d)`.

    Args:
        grid_tyx: Tokens per axis.
        head_size: Channels per head, even.
        device: Where to build the tables.

    Returns:
        Cosines and sines, each `[S, head_size / 2]`, in `widest_dtype(device)`, tokens in raster order.

    Example:
        >>> cos, sin = rotary_tables((1, 1, 3), 6, torch.device("cpu"))
        >>> cos.round(decimals=4)  # the last pair belongs to the columns
        tensor([[ 1.0000,  1.0000,  1.0000],
                [ 1.0000,  1.0000,  0.5403],
                [ 1.0000,  1.0000, -0.4161]], dtype=torch.float64)
    """
    wide = widest_dtype(device)
    dim_space = 2 * (head_size // 6)
    angles = []
    for axis, dim in enumerate((head_size - 2 * dim_space, dim_space, dim_space)):
        frequencies = 10000.0 ** (torch.arange(0, dim, 2, dtype=wide, device=device) / -dim)
        axis_angles = torch.arange(grid_tyx[axis], dtype=wide, device=device)[:, None] * frequencies
        shape = [1, 1, 1, dim // 2]
        shape[axis] = grid_tyx[axis]
        angles.append(axis_angles.view(shape).expand(*grid_tyx, dim // 2))
    angle = torch.cat(angles, dim=-1).reshape(math.prod(grid_tyx), head_size // 2)
    return angle.cos(), angle.sin()


def sinusoidal_embedding(timestep: Tensor, num_channels: int) -> Tensor:
    """Return the sinusoidal embedding of diffusion timesteps: cosines first, then sines.

    Args:
        timestep: `[B]`, any real dtype, 0 to 1000.
        num_channels: Even; channel i and `num_channels / 2 + i` turn by `timestep * 10000 ** (-2 i / num_channels)`.

    Returns:
        `[B, num_channels]` in `widest_dtype`.

    Example:
        >>> sinusoidal_embedding(torch.tensor([0.0]), 4)
        tensor([[1., 1., 0., 0.]], dtype=torch.float64)
    """
    wide = widest_dtype(timestep.device)
    exponent = torch.arange(0, num_channels, 2, dtype=wide, device=timestep.device) / -num_channels
    angle = timestep.to(wide)[:, None] * 10000.0**exponent
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


class TwoLayerEmbedder(nn.Module):
    """Two linear layers with an activation between, named `linear_1` and `linear_2`."""

    def __init__(self, in_features: int, out_features: int, activation: nn.Module) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_features, out_features)
        self.activation = activation
        self.linear_2 = nn.Linear(out_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in_features]` to `[..., out_features]`."""
        out: Tensor = self.linear_2(self.activation(self.linear_1(x)))
        return out


class ConditionEmbedder(nn.Module):
    """Embeds the timestep, as six modulation vectors for the blocks and one for the output, and the text.

    Args:
        dim: Channels of a token.
        freq_dim: Channels of the sinusoidal timestep embedding.
        text_dim: Channels of the text embeddings.

    Example:
        >>> embedder = ConditionEmbedder(dim=8, freq_dim=4, text_dim=3)
        >>> time, modulation, text = embedder(torch.tensor([500.0]), torch.zeros(1, 2, 3))
        >>> tuple(time.shape), tuple(modulation.shape), tuple(text.shape)
        ((1, 8), (1, 6, 8), (1, 2, 8))
    """

    def __init__(self, dim: int, freq_dim: int, text_dim: int) -> None:
        super().__init__()
        self.freq_dim = freq_dim
        self.time_embedder = TwoLayerEmbedder(freq_dim, dim, nn.SiLU())
        self.time_proj = nn.Linear(dim, 6 * dim)
        self.text_embedder = TwoLayerEmbedder(text_dim, dim, nn.GELU(approximate="tanh"))

    def forward(self, timestep: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the time embedding `[B, dim]`, the modulation `[B, 6, dim]` and the text `[B, L, dim]`."""
        sinusoids = sinusoidal_embedding(timestep, self.freq_dim)
        # The time embedder may be kept in float32 while the other weights are narrower.
        time = self.time_embedder(sinusoids.to(self.time_embedder.linear_1.weight.dtype))
        time = time.to(self.time_proj.weight.dtype)
        modulation = self.time_proj(F.silu(time)).unflatten(1, (6, -1))
        return time, modulation, self.text_embedder(text)
