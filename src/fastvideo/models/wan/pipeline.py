"""A Wan transformer of ours in the place of diffusers' in its pipelines, for checkpoints that diffusers would load in part.

diffusers' class has no gates, drops their weights when it loads a checkpoint of the FastWan kind, and makes other videos then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fastvideo.attention.backends.abstract import AttentionMetadata
from fastvideo.forward_context import set_forward_context
from fastvideo.models.wan.transformer import WanTransformer3DModel

__all__ = ["WanInPipeline"]


class WanInPipeline(nn.Module):
    """Calls a `WanTransformer3DModel` as diffusers' `WanPipeline` calls its own.

    Args:
        transformer: The model.
        sparsity: Share of key tiles that a "vsa" model skips, in [0, 1); 0 for a dense one.

    Raises:
        ValueError: The sparsity is out of range, or not 0 for a dense model.

    Example:
        >>> from fastvideo.models.wan import WanConfig
        >>> model = WanTransformer3DModel(WanConfig(num_attention_heads=2, attention_head_dim=12, in_channels=3,
        ...     out_channels=3, text_dim=8, freq_dim=8, ffn_dim=32, num_layers=1, attention="vsa"))
        >>> inside = WanInPipeline(model, sparsity=0.5)
        >>> video, text = torch.randn(1, 3, 2, 16, 16), torch.randn(1, 5, 8)
        >>> inside(hidden_states=video, timestep=torch.tensor([500]), encoder_hidden_states=text, return_dict=False)[0].shape
        torch.Size([1, 3, 2, 16, 16])
    """

    def __init__(self, transformer: WanTransformer3DModel, sparsity: float = 0.0) -> None:
        super().__init__()
        self.transformer = transformer
        self.config = SimpleNamespace(**transformer.config.to_dict())
        self.set_sparsity(sparsity)

    def set_sparsity(self, sparsity: float) -> None:
        """Change the share of key tiles that are skipped.

        Raises:
            ValueError: It is out of range, or not 0 for a dense model.
        """
        if not 0 <= sparsity < 1:
            raise ValueError(f"expected a sparsity in [0, 1), got {sparsity}")
        if sparsity and self.transformer.config.attention == "dense":
            raise ValueError(f"this model is dense and has no sparsity, got {sparsity}")
        self.sparsity = sparsity
        self._metadata: dict[tuple[int, ...], AttentionMetadata | None] = {}

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that latents and text are handed over in."""
        return self.transformer.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.transformer.patch_embedding.weight.device

    @contextlib.contextmanager
    def cache_context(self, name: str, **state: Any) -> Iterator[None]:  # noqa: ARG002  # diffusers' signature
        """Do nothing: no caching of features is installed."""
        yield

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor]:
        """Predict the velocity; the arguments are those of diffusers' class.

        Args:
            hidden_states: Noisy latents `[B, C, T, Y, X]`.
            timestep: `[B]`.
            encoder_hidden_states: Text embeddings `[B, L, text_dim]`.
            encoder_hidden_states_image: Image embeddings; must be None.
            return_dict: Must be False, as pipelines pass it.
            attention_kwargs: Must be empty.

        Raises:
            NotImplementedError: Something else is asked for.
        """
        if encoder_hidden_states_image is not None or attention_kwargs or return_dict:
            raise NotImplementedError(
                "this model takes neither image embeddings nor attention_kwargs, and return_dict=False only"
            )
        num_frames, num_rows, num_columns = hidden_states.shape[2:]
        shape = (num_frames, num_rows, num_columns)
        if shape not in self._metadata:
            self._metadata[shape] = self.transformer.attention_metadata(shape, 0, self.sparsity, self.device)
        with set_forward_context(0, self._metadata[shape]):
            return (self.transformer(hidden_states, timestep, encoder_hidden_states),)
