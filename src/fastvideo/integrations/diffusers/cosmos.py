"""Cosmos of diffusers: self attention over the video, cross attention to text and, in Transfer 2.5, to an image."""

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
from fastvideo.integrations.diffusers.rotary import rotate_halves
from fastvideo.integrations.plan import Place

__all__ = ["CosmosCrossProcessor", "CosmosFamily", "CosmosSelfProcessor"]


class CosmosSelfProcessor(Processor):
    """Self attention with norms of query and key per head, rotary positions in halves."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Attend within the video, `[B, S, C]`; the arguments are those of diffusers' processor."""
        if encoder_hidden_states is not None:
            raise ValueError(f"{self.attend.place.path} is self attention, and got encoder_hidden_states")
        query, key, value = _project(attn, hidden_states, hidden_states)
        if image_rotary_emb is not None:
            cos, sin = (table[None, :, None, : table.shape[-1] // 2] for table in image_rotary_emb)
            query, key = rotate_halves(query, cos, sin), rotate_halves(key, cos, sin)
        output, _ = self.attend(query, key, value, mask=attention_mask)
        return project_out(attn, output)


class CosmosCrossProcessor(Processor):
    """Cross attention to text, and to an image's tokens with weights of their own where the model has them."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | tuple[torch.Tensor, torch.Tensor | None],
        attention_mask: torch.Tensor | tuple[torch.Tensor | None, torch.Tensor | None] | None = None,
    ) -> torch.Tensor:
        """Attend from the video, `[B, S, C]`, to text and image; the arguments are those of diffusers' processors."""
        text, image = encoder_hidden_states if isinstance(encoder_hidden_states, tuple) else (encoder_hidden_states, None)
        text_mask, image_mask = attention_mask if isinstance(attention_mask, tuple) else (attention_mask, None)
        output = self.attend(*_project(attn, hidden_states, text), text_mask)
        if image is not None:
            query, key, value = split_heads(attn, attn.q_img(hidden_states), attn.k_img(image), attn.v_img(image))
            output = output + self.attend(attn.q_img_norm(query), attn.k_img_norm(key), value, image_mask)
        return project_out(attn, output)


def _project(attn: Any, x: torch.Tensor, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query, key, value = split_heads(attn, attn.to_q(x), attn.to_k(context), attn.to_v(context))
    return attn.norm_q(query), attn.norm_k(key), value


class CosmosFamily(Family):
    """Cosmos 1, Predict 2 and 2.5, Transfer 2.5."""

    name = "Cosmos"
    model_classes = ("CosmosTransformer3DModel",)

    def sites(self, model: nn.Module) -> Iterable[Site]:
        """Return `attn1`, within the video, and `attn2`, to text and image, of each block."""
        for number, path, _ in blocks_of(model, "transformer_blocks"):
            yield Site(Place(f"{path}.attn1", "self", number), CosmosSelfProcessor, ("CosmosAttnProcessor2_0",))
            replaces = ("CosmosAttnProcessor2_0", "CosmosAttnProcessor2_5")
            yield Site(Place(f"{path}.attn2", "cross", number), CosmosCrossProcessor, replaces)

    def video_shape(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the latent's shape and the patch size: latents are `[B, C, T, Y, X]`."""
        return tuple(inputs["hidden_states"].shape[2:]), tuple(model.config.patch_size)  # type: ignore[union-attr,arg-type]

    def shard_plan(self, model: nn.Module) -> ShardPlan:
        """Cut the video ahead of the first block and all that is as long as it; join before patches unfold."""
        per_token: dict[str | int, Split] = {
            name: Split(1, num_dims=3) for name in ("embedded_timestep", "temb", "controlnet_residual")
        }
        plan: ShardPlan = {
            "rope": {0: Split(0, of_output=True), 1: Split(0, of_output=True)},
            "transformer_blocks.0": {"hidden_states": Split(1)},
            "transformer_blocks.*": per_token,
            "norm_out": {"embedded_timestep": Split(1, num_dims=3), "temb": Split(1, num_dims=3)},
            "proj_out": Gather(1),
        }
        if getattr(model, "learnable_pos_embed", None) is not None:
            plan["learnable_pos_embed"] = {0: Split(1, of_output=True)}
        return plan
