"""Mochi of diffusers: text joined to the video with weights of its own; each sample's padded text is seen by nobody."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from fastvideo.integrations.diffusers.family import (
    Family,
    Gather,
    Processor,
    ShardPlan,
    Site,
    Split,
    blocks_of,
    project_out,
    split_heads,
)
from fastvideo.integrations.diffusers.rotary import rotate_neighbours
from fastvideo.integrations.plan import Place

__all__ = ["MochiFamily", "MochiProcessor"]


class MochiProcessor(Processor):
    """Joint attention with norms of query and key per head, and rotary tables with angles of each head's own."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend within video, `[B, S, C]`, and text, `[B, R, C]`; the arguments are those of diffusers' processor."""
        query, key, value = split_heads(attn, attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states))
        query, key = attn.norm_q(query), attn.norm_k(key)
        text_query, text_key, text_value = split_heads(
            attn,
            attn.add_q_proj(encoder_hidden_states),
            attn.add_k_proj(encoder_hidden_states),
            attn.add_v_proj(encoder_hidden_states),
        )
        text = (attn.norm_added_q(text_query), attn.norm_added_k(text_key), text_value)
        if image_rotary_emb is not None:
            query, key = rotate_neighbours(query, *image_rotary_emb), rotate_neighbours(key, *image_rotary_emb)
        text_mask = attention_mask.bool()
        output, text_output = self.attend(query, key, value, text, text_mask=text_mask)
        # The model hands on 0 for padded text.
        text_output = (text_output * text_mask[:, :, None, None]).flatten(2, 3)
        if hasattr(attn, "to_add_out"):
            text_output = attn.to_add_out(text_output)
        return project_out(attn, output), text_output


class MochiFamily(Family):
    """Mochi's transformers."""

    name = "Mochi"
    model_classes = ("MochiTransformer3DModel",)

    def sites(self, model: nn.Module) -> Iterable[Site]:
        """Return `attn1` of each block."""
        for number, path, _ in blocks_of(model, "transformer_blocks"):
            yield Site(Place(f"{path}.attn1", "self", number), MochiProcessor, ("MochiAttnProcessor2_0",))

    def video_shape(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the latent's shape and the patch size: latents are `[B, C, T, Y, X]`."""
        patch: int = model.config.patch_size  # type: ignore[union-attr,assignment]  # diffusers' own attribute
        return tuple(inputs["hidden_states"].shape[2:]), (1, patch, patch)

    def text_mask(self, inputs: Mapping[str, Any]) -> torch.Tensor | None:
        """Return the text encoder's mask."""
        return inputs.get("encoder_attention_mask")

    def num_text(self, inputs: Mapping[str, Any]) -> int:
        """Return the text's length, padding included."""
        length: int = inputs["encoder_hidden_states"].shape[1]
        return length

    def shard_plan(self, model: nn.Module) -> ShardPlan:  # noqa: ARG002  # families look at it or not
        """Cut the video ahead of the first block, and the rotary tables; join before patches unfold."""
        return {
            "rope": {0: Split(0, of_output=True), 1: Split(0, of_output=True)},
            "transformer_blocks.0": {"hidden_states": Split(1)},
            "proj_out": Gather(1),
        }
