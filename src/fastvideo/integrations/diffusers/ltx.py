"""LTX-Video of diffusers: self attention over the video, cross attention to text under an additive padding mask."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from fastvideo.integrations.diffusers.family import (
    Family,
    Processor,
    ShardPlan,
    Site,
    blocks_of,
    from_cp_plan,
    project_out,
    split_heads,
)
from fastvideo.integrations.diffusers.rotary import rotate_neighbours
from fastvideo.integrations.plan import Place

__all__ = ["LTXCrossProcessor", "LTXFamily", "LTXSelfProcessor"]

_REPLACES = ("LTXVideoAttnProcessor", "LTXVideoAttentionProcessor2_0")


class LTXSelfProcessor(Processor):
    """Self attention: QK norm and rotary positions over all heads at once."""

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
            cos, sin = (table[..., 0::2] for table in image_rotary_emb)
            query, key = rotate_neighbours(query, cos, sin), rotate_neighbours(key, cos, sin)
        output, _ = self.attend(*split_heads(attn, query, key, value), mask=attention_mask)
        return project_out(attn, output)


class LTXCrossProcessor(Processor):
    """Cross attention to text. The model's mask is a bias of -10000, which lets a sample without any text see all of it."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Attend from the video, `[B, S, C]`, to the text, `[B, R, C]`; the arguments are those of diffusers' processor."""
        if encoder_hidden_states is None or image_rotary_emb is not None:
            raise ValueError(f"{self.attend.place.path} is cross attention; it takes text and no rotary embedding")
        if attention_mask is not None and attention_mask.dim() == 3:
            attention_mask = attention_mask.unsqueeze(1)  # [B, 1 or S, R] holds for every head
        query, key, value = split_heads(attn, *_project(attn, hidden_states, encoder_hidden_states))
        return project_out(attn, self.attend(query, key, value, attention_mask))


def _project(attn: Any, x: torch.Tensor, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(context)), attn.to_v(context)


class LTXFamily(Family):
    """LTX-Video's transformers."""

    name = "LTX-Video"
    model_classes = ("LTXVideoTransformer3DModel",)

    def sites(self, model: nn.Module) -> Iterable[Site]:
        """Return `attn1`, within the video, and `attn2`, to text, of each block."""
        for number, path, _ in blocks_of(model, "transformer_blocks"):
            yield Site(Place(f"{path}.attn1", "self", number), LTXSelfProcessor, _REPLACES)
            yield Site(Place(f"{path}.attn2", "cross", number), LTXCrossProcessor, _REPLACES)

    def video_shape(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the tokens along each axis, which the caller hands over: they are packed already."""
        sizes = tuple(inputs.get(name) for name in ("num_frames", "height", "width"))
        if None in sizes:
            return super().video_shape(model, inputs)
        return sizes, (1, 1, 1)  # type: ignore[return-value]  # none is None

    def shard_plan(self, model: nn.Module) -> ShardPlan:
        """Return the model's own plan, with the text whole on every device."""
        return from_cp_plan(model, replicated=("encoder_hidden_states", "encoder_attention_mask"))
