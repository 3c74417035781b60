"""Wan Animate of diffusers: Wan whose frames, after some blocks, attend to the motion of a face at their own time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fastvideo.integrations.diffusers.family import Processor, ShardPlan, Site, blocks_of, split_heads
from fastvideo.integrations.diffusers.wan import REPLACES, WanCrossProcessor, WanFamily, WanSelfProcessor, key_and_value
from fastvideo.integrations.plan import Place

__all__ = ["WanAnimateFamily", "WanFaceProcessor"]


class WanFaceProcessor(Processor):
    """Cross attention of each latent frame to the few tokens of a face at that time."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend from the video, `[B, S, C]`, to face tokens, `[B, T, N, C]`; the arguments are diffusers' processor's.

        `attention_mask`, over `[B, S]`, multiplies the output.
        """
        batch, frames = encoder_hidden_states.shape[:2]
        query = attn.to_q(attn.pre_norm_q(hidden_states))
        # In three dims, as diffusers projects them: quantised linear layers take no four.
        key, value = key_and_value(attn, attn.pre_norm_kv(encoder_hidden_states).flatten(1, 2))
        query, key, value = split_heads(attn, query, key, value)
        query, key = attn.norm_q(query), attn.norm_k(key)
        # Frames become samples: each sees the tokens of its own time.
        query, key, value = (torch.unflatten(x, 1, (frames, -1)).flatten(0, 1) for x in (query, key, value))
        output: torch.Tensor = self.attend(query, key, value)
        output = attn.to_out(torch.unflatten(output.flatten(2), 0, (batch, frames)).flatten(1, 2))
        return output if attention_mask is None else output * attention_mask.flatten(start_dim=1)


class WanAnimateFamily(WanFamily):
    """Wan Animate's transformers."""

    name = "Wan Animate"
    model_classes = ("WanAnimateTransformer3DModel",)

    def sites(self, model: nn.Module) -> Iterable[Site]:
        """Return `attn1` and `attn2` of each block, and attention to the face behind it, cross attention of that layer."""
        config: Any = model.config
        for number, path, _ in blocks_of(model, "blocks"):
            yield Site(Place(f"{path}.attn1", "self", number), WanSelfProcessor, REPLACES)
            yield Site(Place(f"{path}.attn2", "cross", number), WanCrossProcessor, REPLACES)
            adapter, remainder = divmod(number, config.inject_face_latents_blocks)
            if not remainder:
                face = Place(f"face_adapter.{adapter}", "cross", number)
                yield Site(face, WanFaceProcessor, ("WanAnimateFaceBlockAttnProcessor",))

    def shard_plan(self, model: nn.Module) -> ShardPlan:
        """Refuse: attention to the face takes whole frames, and devices hold parts of them.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            f"{type(model).__name__} attends to a face frame by frame, which devices can't share yet; leave out parallel"
        )
