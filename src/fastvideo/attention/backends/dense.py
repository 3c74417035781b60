"""What the dense backends share: a builder for metadata that holds nothing but the step, and a rule for scales.

This is no backend, so backends may import it.
"""

from __future__ import annotations

from typing import Any

import torch

from fastvideo.attention.backends.abstract import AttentionMetadata, AttentionMetadataBuilder
from fastvideo.attention.request import AttentionRequest

__all__ = ["DenseMetadataBuilder", "common_rejections", "with_positive_scale"]

_SETTINGS_OF_OTHERS = frozenset({"raw_latent_shape", "patch_size", "VSA_sparsity", "STA_window", "tile_tyx", "device"})
"""Step settings that pipelines hand to every builder, whichever backend runs."""


class DenseMetadataBuilder(AttentionMetadataBuilder[AttentionMetadata]):
    """Builds `AttentionMetadata`, of which a dense backend reads nothing.

    Example:
        >>> DenseMetadataBuilder().build(current_timestep=3, VSA_sparsity=0.9)
        AttentionMetadata(current_timestep=3)
    """

    def prepare(self) -> None:
        """Do nothing: there is nothing to prepare."""

    def build(  # type: ignore[override]  # the contract's `**kwargs: dict[str, Any]` can't name a single argument
        self, *, current_timestep: int, **settings: Any
    ) -> AttentionMetadata:
        """Return the metadata of one step.

        Args:
            current_timestep: Index of the denoising step.
            **settings: `raw_latent_shape`, `patch_size`, `VSA_sparsity`, `STA_window`, `tile_tyx` and `device` are accepted
                and have no meaning for dense attention.

        Raises:
            TypeError: `settings` holds another name.
        """
        if unknown := settings.keys() - _SETTINGS_OF_OTHERS:
            raise TypeError(
                f"build() knows no argument {sorted(unknown)}; it takes current_timestep, and ignores "
                f"{sorted(_SETTINGS_OF_OTHERS)}"
            )
        return AttentionMetadata(current_timestep=current_timestep)


def common_rejections(request: AttentionRequest) -> tuple[str, ...]:
    """Return the reasons that hold for every dense backend."""
    reasons = []
    if request.is_causal and request.query_len != request.key_len:
        reasons.append(
            f"is_causal needs equal lengths, got {request.query_len} queries and {request.key_len} keys (libraries "
            "disagree on the alignment); pass a mask"
        )
    if request.dropout_p > 0 and request.layout != "local":
        reasons.append(
            f"dropout (dropout_p={request.dropout_p}) under layout={request.layout!r} is not supported: each device "
            "would draw its own random numbers"
        )
    return tuple(reasons)


def with_positive_scale(query: torch.Tensor, scale: float) -> tuple[torch.Tensor, float]:
    """Return a query and a positive scale that give the same scores.

    Fused kernels take the maximum of the unscaled scores, so a negative scale would overflow in them, and zero would turn
    the -inf of a masked score into NaN.

    Example:
        >>> with_positive_scale(torch.ones(1), -0.5)
        (tensor([-1.]), 0.5)
    """
    if scale > 0:
        return query, scale
    return (query * 0, 1.0) if scale == 0 else (-query, -scale)
