"""Wan Animate of diffusers: Wan whose frames, after some blocks, attend to the motion of a face at their own time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastvideo.integrations.diffusers.family import (
    Gather,
    Processor,
    ShardPlan,
    Site,
    Split,
    blocks_of,
    split_heads,
)
from fastvideo.integrations.diffusers.state import current_state
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
        # Frames become samples: each sees the tokens of its own time. A device holds parts of its first and last frame.
        own = query.shape[1]
        first, total = self._place(own)
        per_frame = total // frames
        front, held = first % per_frame, slice(first // per_frame, -(-(first + own) // per_frame))
        query = F.pad(query, (0, 0, 0, 0, front, (held.stop - held.start) * per_frame - front - own))
        key, value = (torch.unflatten(x, 1, (frames, -1))[:, held].flatten(0, 1) for x in (key, value))
        output: torch.Tensor = self.attend(torch.unflatten(query, 1, (-1, per_frame)).flatten(0, 1), key, value)
        output = torch.unflatten(output.flatten(2), 0, (batch, -1)).flatten(1, 2)[:, front : front + own]
        output = attn.to_out(output)
        return output if attention_mask is None else output * attention_mask.flatten(start_dim=1)

    def _place(self, own: int) -> tuple[int, int]:
        """Return where this device's tokens begin in the video, and how many all devices have."""
        state = current_state()
        lengths = (own,) if state is None or state.shard_lengths is None else state.shard_lengths
        return sum(lengths[: self.attend.group.rank]) if len(lengths) > 1 else 0, sum(lengths)


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

    def shard_plan(self, model: nn.Module) -> ShardPlan:  # noqa: ARG002  # families look at it or not
        """Cut the video ahead of the first block; join before patches unfold."""
        return {
            "rope": {0: Split(1, of_output=True), 1: Split(1, of_output=True)},
            "blocks.0": {"hidden_states": Split(1)},
            "proj_out": Gather(1),
        }
