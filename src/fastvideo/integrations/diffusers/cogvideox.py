"""CogVideoX of diffusers: text joined to the video, with the same weights for both; rotary positions come from the pipeline."""

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

__all__ = ["CogVideoXFamily", "CogVideoXProcessor"]


class CogVideoXProcessor(Processor):
    """Joint attention with layer norms of query and key per head; only video tokens are rotated."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend within video, `[B, S, C]`, and text, `[B, R, C]`; the arguments are those of diffusers' processor."""
        query, key, value = _project(attn, hidden_states)
        text = _project(attn, encoder_hidden_states)
        if image_rotary_emb is not None:
            cos, sin = (table.to(query.device)[None, :, None, 0::2] for table in image_rotary_emb)
            query, key = rotate_neighbours(query, cos, sin), rotate_neighbours(key, cos, sin)
        num_text = encoder_hidden_states.shape[1]
        num_tokens = self.attend.num_tokens(hidden_states.shape[1]) + num_text
        mask = None if attention_mask is None else _text_last(attn, attention_mask, len(hidden_states), num_tokens, num_text)
        output, text_output = self.attend(query, key, value, text, mask=mask)
        return project_out(attn, output), project_out(attn, text_output)


def _project(attn: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if attn.fused_projections:
        query, key, value = attn.to_qkv(x).chunk(3, dim=-1)
    else:
        query, key, value = attn.to_q(x), attn.to_k(x), attn.to_v(x)
    query, key, value = split_heads(attn, query, key, value)
    query = query if attn.norm_q is None else attn.norm_q(query)
    return query, key if attn.norm_k is None else attn.norm_k(key), value


def _text_last(attn: Any, mask: torch.Tensor, batch: int, total: int, num_text: int) -> torch.Tensor:
    """Turn a mask over text and then video into one over video and then text, `[B, H, 1 or all, all]`."""
    mask = attn.prepare_attention_mask(mask, total, batch).view(batch, attn.heads, -1, total)
    mask = mask.roll(-num_text, dims=3)
    return mask if mask.shape[2] == 1 else mask.roll(-num_text, dims=2)


class CogVideoXFamily(Family):
    """CogVideoX 1.0 and 1.5, text and image to video, and ConsisID, whose face extractor attends by itself."""

    name = "CogVideoX"
    model_classes = ("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel")

    def sites(self, model: nn.Module) -> Iterable[Site]:
        """Return `attn1` of each block."""
        replaces = ("CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0")
        for number, path, _ in blocks_of(model, "transformer_blocks"):
            yield Site(Place(f"{path}.attn1", "self", number), CogVideoXProcessor, replaces)

    def video_shape(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the latent's shape and the patch size: latents are `[B, T, C, Y, X]`."""
        config: Any = model.config
        frames, _, height, width = inputs["hidden_states"].shape[1:]
        return (frames, height, width), (config.get("patch_size_t") or 1, config.patch_size, config.patch_size)

    def num_text(self, inputs: Mapping[str, Any]) -> int:
        """Return the text's length."""
        length: int = inputs["encoder_hidden_states"].shape[1]
        return length

    def shard_plan(self, model: nn.Module) -> ShardPlan:  # noqa: ARG002  # families look at it or not
        """Cut the video ahead of the first block, and the rotary tables, which are inputs; join before patches unfold."""
        return {
            "": {"image_rotary_emb": Split(0)},
            "transformer_blocks.0": {"hidden_states": Split(1)},
            "proj_out": Gather(1),
        }
