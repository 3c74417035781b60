"""HunyuanVideo of diffusers: text joined to the video in every block, real text told from padding by a mask.

The text's own refiner, ahead of the blocks, has the role `"text"`.
"""

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

__all__ = ["TEXT_REPLACES", "HunyuanVideoFamily", "HunyuanVideoProcessor", "TextSelfProcessor"]

_REPLACES = ("HunyuanVideoAttnProcessor2_0",)
TEXT_REPLACES = ("AttnProcessor2_0", "AttnProcessor")


class HunyuanVideoProcessor(Processor):
    """Joint attention of blocks with weights for text of their own, and of those where text and video share weights."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend within video, `[B, S, C]`, and text, `[B, R, C]`; the arguments are those of diffusers' processor."""
        video = _project(attn, hidden_states, "to_q", "to_k", "to_v", "norm_q", "norm_k")
        if attn.add_q_proj is None:
            text = _project(attn, encoder_hidden_states, "to_q", "to_k", "to_v", "norm_q", "norm_k")
        else:
            text = _project(
                attn, encoder_hidden_states, "add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k"
            )
        query, key, value = video
        if image_rotary_emb is not None:
            cos, sin = (table[None, :, None, 0::2] for table in image_rotary_emb)
            query, key = rotate_neighbours(query, cos, sin), rotate_neighbours(key, cos, sin)
        text_mask = self.text_mask(attention_mask, encoder_hidden_states.shape[1])
        output, text_output = self.attend(query, key, value, text, text_mask=text_mask)
        text_output = text_output.flatten(2, 3)
        # Blocks with one stream project out later, together with their feed-forward.
        if getattr(attn, "to_add_out", None) is not None:
            text_output = attn.to_add_out(text_output)
        if getattr(attn, "to_out", None) is None:
            return output.flatten(2, 3), text_output
        return project_out(attn, output), text_output

    @staticmethod
    def text_mask(attention_mask: torch.Tensor | None, num_text: int) -> torch.Tensor | None:
        """Return which text tokens are real, bool `[B, R]`, by the mask that the model hands over."""
        # It is [B, 1, 1, S + R] and hides nothing but padded text.
        return None if attention_mask is None else attention_mask[:, 0, 0, -num_text:]


def _project(attn: Any, x: torch.Tensor, *names: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return query, key and value as `[B, S, H, D]`, query and key normed per head where the model has norms."""
    to_query, to_key, to_value, norm_query, norm_key = (getattr(attn, name) for name in names)
    query, key, value = split_heads(attn, to_query(x), to_key(x), to_value(x))
    query = query if norm_query is None else norm_query(query)
    return query, key if norm_key is None else norm_key(key), value


class TextSelfProcessor(Processor):
    """Self attention among text tokens under a bool mask, in the general attention module of diffusers."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend within the text, `[B, R, C]`; the arguments are those of diffusers' processor."""
        if encoder_hidden_states is not None or hidden_states.dim() != 3:
            raise ValueError(f"{self.attend.place.path} attends among text tokens [B, R, C] alone")
        query, key, value = _project(attn, hidden_states, "to_q", "to_k", "to_v", "norm_q", "norm_k")
        return project_out(attn, self.attend(query, key, value, attention_mask))


class HunyuanVideoFamily(Family):
    """HunyuanVideo's transformers, image to video included."""

    name = "HunyuanVideo"
    model_classes = ("HunyuanVideoTransformer3DModel",)

    def sites(self, model: nn.Module) -> Iterable[Site]:
        """Return the refiner's layers, then the blocks with two streams, then those with one."""
        refiner = "context_embedder.token_refiner.refiner_blocks"
        for number in range(len(model.get_submodule(refiner))):  # type: ignore[arg-type]  # a list of modules
            yield Site(Place(f"{refiner}.{number}.attn", "text"), TextSelfProcessor, TEXT_REPLACES)
        for number, path, _ in blocks_of(model, "transformer_blocks", "single_transformer_blocks"):
            yield Site(Place(f"{path}.attn", "self", number), HunyuanVideoProcessor, _REPLACES)

    def video_shape(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the latent's shape and the patch size: latents are `[B, C, T, Y, X]`."""
        config: Any = model.config
        patch = (config.patch_size_t, config.patch_size, config.patch_size)
        return tuple(inputs["hidden_states"].shape[2:]), patch

    def text_mask(self, inputs: Mapping[str, Any]) -> torch.Tensor | None:
        """Return the text encoder's mask."""
        return inputs.get("encoder_attention_mask")

    def num_text(self, inputs: Mapping[str, Any]) -> int:
        """Return the text's length, padding included."""
        length: int = inputs["encoder_hidden_states"].shape[1]
        return length

    def shard_plan(self, model: nn.Module) -> ShardPlan:  # families look at it or not
        """Cut the embedded video, which the model measures its mask by, and the rotary tables; join before patches unfold."""
        plan: ShardPlan = {
            "x_embedder": {0: Split(1, of_output=True)},
            "rope": {0: Split(0, of_output=True), 1: Split(0, of_output=True)},
            "proj_out": Gather(1),
        }
        config: Any = model.config
        if config.image_condition_type == "token_replace":  # its blocks treat the first frame's tokens apart, by their number
            plan |= {f"{blocks}.*": {"num_tokens": Split(0)} for blocks in ("transformer_blocks", "single_transformer_blocks")}
        return plan
