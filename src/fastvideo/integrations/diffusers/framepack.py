"""HunyuanVideo Framepack of diffusers: a clip's next frames, joined by its past at several resolutions, an image and text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fastvideo.integrations.diffusers.family import Gather, ShardPlan, Split
from fastvideo.integrations.diffusers.hunyuan_video import HunyuanVideoFamily

__all__ = ["FramepackFamily"]


class FramepackFamily(HunyuanVideoFamily):
    """Framepack's transformers: HunyuanVideo's blocks on more than a video."""

    name = "HunyuanVideo Framepack"
    model_classes = ("HunyuanVideoFramepackTransformer3DModel",)
    without_grid = "Framepack joins a clip's past to it at several resolutions"

    def text_mask(self, inputs: Mapping[str, Any]) -> torch.Tensor | None:
        """Return which of the joined tokens are real: the image's, which come first, and then the text's.

        `None` for one sample, whose padding the model cuts off.
        """
        mask: torch.Tensor = inputs["encoder_attention_mask"]
        return None if len(mask) == 1 else torch.cat([mask.new_ones(inputs["image_embeds"].shape[:2]), mask], dim=1)

    def num_text(self, inputs: Mapping[str, Any]) -> int:
        """Return the number of joined tokens, padding included."""
        image, text = inputs["image_embeds"].shape[1], inputs["encoder_hidden_states"].shape[1]
        return int(image + text)

    def shard_plan(self, model: nn.Module) -> ShardPlan:
        """Cut the joined tokens ahead of the blocks, and their rotary tables; join behind the last block.

        The model takes the clip's own tokens from behind its past there.
        """
        last = len(model.single_transformer_blocks) - 1  # type: ignore[arg-type]  # a list of modules
        return {
            "transformer_blocks.0": {"hidden_states": Split(1)},
            "transformer_blocks.*": {"freqs_cis": Split(0)},
            "single_transformer_blocks.*": {"image_rotary_emb": Split(0)},
            f"single_transformer_blocks.{last}": Gather(1, output=0),
        }
