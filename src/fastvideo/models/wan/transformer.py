"""The Wan 2.1 video transformer: patches in, blocks over all tokens, predicted velocity out.

Shape legend: `B` batch, `T, Y, X` token grid, `S = T * Y * X` tokens, `L` text tokens, `C` channels of a token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvideo.attention.backends.abstract import AttentionMetadata
from fastvideo.distributed import gather_sequence, shard_sequence, shards_of
from fastvideo.forward_context import checkpoint
from fastvideo.models.wan.blocks import WanTransformerBlock, WideLayerNorm, modulate, widen
from fastvideo.models.wan.checkpoint import cast_weights, gate_names, read_config, read_weights, write_folder
from fastvideo.models.wan.config import AttentionKind, WanConfig
from fastvideo.models.wan.embeddings import ConditionEmbedder, patchify, rotary_tables, unpatchify


class WanTransformer3DModel(nn.Module):
    """Predicts the flow velocity of a noisy video from a timestep and text embeddings (Wan 2.1, arXiv 2503.20314).

    Parameter names and formulas are those of diffusers' class of this name, so its text-to-video checkpoints load
    with `strict=True`. A gated "vsa" model has `blocks.N.to_gate_compress` besides, which starts at zero: then
    Video Sparse Attention at sparsity 0 equals the dense model.

    Where sequence parallelism is active, every rank is given the whole input, computes its share of the tokens and
    returns the whole output. A parameter's gradient is then the sum over ranks of what each rank computes, under the
    convention that the global loss is the sum of the ranks' losses (give each rank its share of the loss).

    Attributes:
        config: The configuration the model was built from.
        gradient_checkpointing: Whether blocks are recomputed in backward to save memory; False after construction.

    Args:
        config: Sizes and switches.

    Example:
        >>> model = WanTransformer3DModel(WanConfig(num_attention_heads=2, attention_head_dim=12, in_channels=3,
        ...     out_channels=3, text_dim=8, freq_dim=8, ffn_dim=32, num_layers=1))
        >>> video = torch.randn(1, 3, 2, 4, 4)
        >>> velocity = model(video, timestep=torch.tensor([500.0]), encoder_hidden_states=torch.randn(1, 5, 8))
        >>> velocity.shape == video.shape
        True
    """

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        dim = config.inner_dim
        # Holds the weights under the checkpoints' name and shape; `forward` applies them as a linear over patches.
        self.patch_embedding = nn.Conv3d(config.in_channels, dim, kernel_size=config.patch_size, stride=config.patch_size)
        self.condition_embedder = ConditionEmbedder(dim, config.freq_dim, config.text_dim)
        self.blocks = nn.ModuleList(WanTransformerBlock(config, index) for index in range(config.num_layers))
        self.norm_out = WideLayerNorm(dim, config.eps, elementwise_affine=False)
        self.proj_out = nn.Linear(dim, (config.out_channels or config.in_channels) * math.prod(config.patch_size))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        """Xavier linears without bias, small embedders, and zero where a training run must start neutral."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        for embedder in (self.condition_embedder.time_embedder, self.condition_embedder.text_embedder):
            nn.init.normal_(embedder.linear_1.weight, std=0.02)
            nn.init.normal_(embedder.linear_2.weight, std=0.02)
        nn.init.zeros_(self.proj_out.weight)
        for name, parameter in self.named_parameters():
            if "to_gate_compress" in name:
                nn.init.zeros_(parameter)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Predict the velocity `noise - clean`.

        Args:
            hidden_states: Noisy video `[B, C_in, T * p_t, Y * p_y, X * p_x]`, in the dtype of the weights (any float
                dtype under autocast).
            timestep: `[B]`, 1000 times the noise level, 0 to 1000, float or integer.
            encoder_hidden_states: Text embeddings `[B, L, text_dim]`, dtype as `hidden_states`.
            encoder_attention_mask: Key padding of the text `[B, L]`, bool, True = attend; None attends to all L, as
                checkpoints trained on zero-padded text expect.

        Returns:
            `[B, C_out, T * p_t, Y * p_y, X * p_x]`, in the dtype of the weights.

        Raises:
            ValueError: A shape doesn't fit the configuration.
            TypeError: A dtype doesn't fit the weights.
            NotImplementedError: `timestep` is `[B, S]`, one noise level per token.
        """
        self._check_dtypes(hidden_states, encoder_hidden_states, encoder_attention_mask)
        self._check_shapes(hidden_states, timestep, encoder_hidden_states, encoder_attention_mask)
        grid_tyx = self._grid_tyx(tuple(hidden_states.shape[2:]))
        with shards_of(math.prod(grid_tyx)):
            return self._denoise(hidden_states, timestep, encoder_hidden_states, encoder_attention_mask, grid_tyx)

    def _denoise(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None,
        grid_tyx: tuple[int, int, int],
    ) -> Tensor:
        """Compute this rank's tokens and return the whole output."""
        config = self.config
        # Sharded before any weight is used, so that every parameter's gradient is this rank's share of the sum.
        patches = shard_sequence(patchify(hidden_states, config.patch_size), 1)
        weight = self.patch_embedding.weight
        # Under autocast the products are narrow; the sum over blocks stays in the dtype of the weights.
        x = F.linear(patches, weight.flatten(1), self.patch_embedding.bias).to(weight.dtype)
        wide = widen(x).dtype
        cos, sin = rotary_tables(grid_tyx, config.attention_head_dim, x.device)
        rotary = (shard_sequence(cos.to(wide), 0), shard_sequence(sin.to(wide), 0))
        time, modulation, text = self.condition_embedder(timestep, encoder_hidden_states)

        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, text, modulation, rotary, encoder_attention_mask)
            else:
                x = block(x, text, modulation, rotary, encoder_attention_mask)

        shift, scale = (widen(self.scale_shift_table) + widen(time)[:, None]).chunk(2, dim=1)
        patches = self.proj_out(modulate(self.norm_out, x, scale, shift)).to(weight.dtype)
        return unpatchify(gather_sequence(patches, 1), grid_tyx, config.patch_size)

    def attention_metadata(
        self,
        latent_shape: tuple[int, int, int],
        timestep_index: int,
        sparsity: float,
        device: torch.device | str | None = None,
    ) -> AttentionMetadata | None:
        """Build what self attention needs in the forward context of one denoising step.

        Args:
            latent_shape: (frames, rows, columns) of `hidden_states`, before patches are cut.
            timestep_index: Index of the denoising step.
            sparsity: Share of key tiles that a query tile skips, in [0, 1).
            device: Where the model runs; None means where its weights are.

        Returns:
            The metadata for `fastvideo.forward_context.set_forward_context`, or None for a dense model.

        Raises:
            ValueError: `latent_shape` doesn't divide into patches, or `sparsity` lies outside [0, 1), or is not 0
                for a dense model.
        """
        self._grid_tyx(tuple(latent_shape))
        if self.config.attention == "dense":
            if sparsity != 0:
                raise ValueError(f'A dense model has no sparsity, got {sparsity}: pass 0 or use attention="vsa".')
            return None
        from fastvideo.attention.backends.video_sparse_attn import VideoSparseAttentionMetadataBuilder

        metadata: AttentionMetadata = VideoSparseAttentionMetadataBuilder().build(
            current_timestep=timestep_index,
            raw_latent_shape=tuple(latent_shape),
            patch_size=self.config.patch_size,
            VSA_sparsity=sparsity,
            device=torch.device(device) if device is not None else self.proj_out.weight.device,
        )
        return metadata

    @classmethod
    def from_config(cls, values: Mapping[str, Any]) -> WanTransformer3DModel:
        """Build a model with fresh weights from the content of a `config.json` (see `WanConfig.from_dict`)."""
        return cls(WanConfig.from_dict(values))

    def save(self, directory: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write `config.json` and the weights to a folder that `load`, and for a dense model diffusers, reads.

        Args:
            directory: The folder; made where it is missing.
            dtype: Dtype of every stored weight; None keeps each as it is.
        """
        weights = self.state_dict()
        if dtype is not None:
            weights = {name: weight.to(dtype) for name, weight in weights.items()}
        write_folder(Path(directory), self.config.to_dict(), weights)

    @classmethod
    def load(
        cls,
        directory: str | Path,
        *,
        attention: AttentionKind | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> WanTransformer3DModel:
        """Load a model from a folder written by `save` or by diffusers.

        Args:
            directory: Holds `config.json` and safetensors files.
            attention: Overrides the stored kind. A dense checkpoint becomes a "vsa" model with zero gates, the start
                of the adaptation recipe of arXiv 2505.13389; the gates of a "vsa" checkpoint can't be dropped.
            dtype: Dtype of the weights; the timestep embedder, scale-shift tables and `norm2` are kept in at least
                float32. None keeps each weight as it is stored.
            device: Where to put the weights.

        Raises:
            FileNotFoundError: The folder lacks its configuration or weights.
            ValueError: A file is broken, or gates would be dropped.
            RuntimeError: Weights are missing, unknown or of another shape than the configuration says.
        """
        values = read_config(Path(directory))
        weights = read_weights(Path(directory), device)
        return cls.from_weights(values, weights, attention=attention, dtype=dtype, source=str(directory))

    @classmethod
    def from_weights(
        cls,
        values: Mapping[str, Any],
        weights: Mapping[str, Tensor],
        *,
        attention: AttentionKind | None = None,
        dtype: torch.dtype | None = None,
        source: str = "this checkpoint",
    ) -> WanTransformer3DModel:
        """Build a model around weights that are at hand already, which it keeps.

        Args:
            values: Content of a `config.json`.
            weights: By name, all of them, on one device.
            attention: As for `load`.
            dtype: As for `load`.
            source: Where both come from, for messages.

        Raises:
            ValueError: Gates would be dropped.
            RuntimeError: Weights are missing, unknown or of another shape than the configuration says.
        """
        stored_gate = WanConfig.from_dict(values).has_gate
        config = WanConfig.from_dict({**values, **({} if attention is None else {"attention": attention})})
        if stored_gate and not config.has_gate:
            raise ValueError(
                f"{source} holds the gates of Video Sparse Attention, which a dense model has no place for; load it with "
                'attention="vsa".'
            )
        with torch.device("meta"):
            model = cls(config)
        kept = dict(weights)
        if config.has_gate and not stored_gate:
            like = kept.get("proj_out.weight", torch.empty(0))  # without one, the weights are refused below
            for name in gate_names(model.state_dict()):
                kept[name] = torch.zeros(model.get_parameter(name).shape, dtype=like.dtype, device=like.device)
        model.load_state_dict(kept if dtype is None else cast_weights(kept, dtype), strict=True, assign=True)
        return model

    def _grid_tyx(self, latent_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Return the tokens per axis of a video of (frames, rows, columns)."""
        patch_size = self.config.patch_size
        if len(latent_shape) != 3 or any(latent_shape[i] < 1 or latent_shape[i] % patch_size[i] for i in range(3)):
            raise ValueError(
                f"The video's (frames, rows, columns) must be positive multiples of {patch_size=}, "
                f"got {tuple(latent_shape)}: pad or crop it."
            )
        num_frames, num_rows, num_columns = (latent_shape[i] // patch_size[i] for i in range(3))
        if max(num_frames, num_rows, num_columns) > self.config.rope_max_seq_len:
            raise ValueError(
                f"The token grid {(num_frames, num_rows, num_columns)} exceeds "
                f"rope_max_seq_len={self.config.rope_max_seq_len} on an axis."
            )
        return num_frames, num_rows, num_columns

    def _check_shapes(self, video: Tensor, timestep: Tensor, text: Tensor, mask: Tensor | None) -> None:
        """Raise where a shape doesn't fit the configuration."""
        config = self.config
        if video.ndim != 5 or video.shape[1] != config.in_channels:
            raise ValueError(f"hidden_states must be [B, {config.in_channels}, T, Y, X], got shape {tuple(video.shape)}.")
        batch = video.shape[0]
        if timestep.ndim == 2:
            raise NotImplementedError(
                f"timestep must be [B], one noise level per video, got shape {tuple(timestep.shape)}: noise levels "
                "per token (Wan 2.2 TI2V) are not supported."
            )
        if tuple(timestep.shape) != (batch,):
            raise ValueError(f"timestep must be [{batch}], as hidden_states' batch, got shape {tuple(timestep.shape)}.")
        if text.ndim != 3 or text.shape[0] != batch or text.shape[1] < 1 or text.shape[2] != config.text_dim:
            raise ValueError(
                f"encoder_hidden_states must be [{batch}, L >= 1, {config.text_dim}], got shape {tuple(text.shape)}."
            )
        if mask is not None and mask.shape != text.shape[:2]:
            raise ValueError(
                f"encoder_attention_mask must be {list(text.shape[:2])}, as encoder_hidden_states, "
                f"got shape {tuple(mask.shape)}."
            )

    def _check_dtypes(self, video: Tensor, text: Tensor, mask: Tensor | None) -> None:
        """Raise where a dtype doesn't fit the weights."""
        expected = self.patch_embedding.weight.dtype
        autocast = torch.is_autocast_enabled(video.device.type)
        for name, tensor in (("hidden_states", video), ("encoder_hidden_states", text)):
            fits = tensor.is_floating_point() if autocast else tensor.dtype == expected
            if not fits:
                raise TypeError(
                    f"{name} must have the weights' dtype {expected}, got {tensor.dtype}: convert it, or run under "
                    "torch.autocast."
                )
        if mask is not None and mask.dtype != torch.bool:
            raise TypeError(f"encoder_attention_mask must be bool (True = attend), got {mask.dtype}: pass mask.bool().")
