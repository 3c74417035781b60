"""HunyuanVideo 1.5 of diffusers: text of two encoders and an image's tokens joined to the video, real ones first.

The text's own refiner, ahead of the blocks, has the role `"text"`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from fastvideo.integrations.diffusers.family import Gather, ShardPlan, Site, Split, blocks_of
from fastvideo.integrations.diffusers.hunyuan_video import (
    TEXT_REPLACES,
    HunyuanVideoFamily,
    HunyuanVideoProcessor,
    TextSelfProcessor,
)
from fastvideo.integrations.plan import Place

__all__ = ["HunyuanVideo15Family", "HunyuanVideo15Processor"]


class HunyuanVideo15Processor(HunyuanVideoProcessor):
    """Joint attention under a mask over the joined tokens alone, `[B, R]`."""

    @staticmethod
    def text_mask(attention_mask: torch.Tensor | None, num_text: int) -> torch.Tensor | None:  # noqa: ARG004  # of equal length
        """Return which of the joined tokens are real, bool `[B, R]`."""
        return None if attention_mask is None else attention_mask.bool()


class HunyuanVideo15Family(HunyuanVideoFamily):
    """HunyuanVideo 1.5's transformers, text and image to video."""

    name = "HunyuanVideo 1.5"
    model_classes = ("HunyuanVideo15Transformer3DModel",)

    def sites(self, model: nn.Module) -> Iterable[Site]:
        """Return the refiner's layers, then the blocks."""
        refiner = "context_embedder.token_refiner.refiner_blocks"
        for number in range(len(model.get_submodule(refiner))):  # type: ignore[arg-type]  # a list of modules
            yield Site(Place(f"{refiner}.{number}.attn", "text"), TextSelfProcessor, TEXT_REPLACES)
        for number, path, _ in blocks_of(model, "transformer_blocks"):
            yield Site(Place(f"{path}.attn", "self", number), HunyuanVideo15Processor, ("HunyuanVideo15AttnProcessor2_0",))

    def text_mask(self, inputs: Mapping[str, Any]) -> torch.Tensor | None:
        """Return which of the joined tokens are real: of an image and two texts, which the model sorts, real ones first."""
        masks = (inputs["encoder_attention_mask"], inputs["encoder_attention_mask_2"])
        image = inputs["image_embeds"]
        num_image = 0 if bool((image == 0).all()) else image.shape[1]  # zeros stand for no image
        lengths = sum((mask != 0).sum(dim=1) for mask in masks) + num_image
        places = torch.arange(self.num_text(inputs), device=image.device)
        is_real: torch.Tensor = places[None] < lengths[:, None]
        return is_real

    def num_text(self, inputs: Mapping[str, Any]) -> int:
        """Return the number of joined tokens, padding included."""
        names = ("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")
        return sum(inputs[name].shape[1] for name in names)

    def shard_plan(self, model: nn.Module) -> ShardPlan:  # noqa: ARG002  # families look at it or not
        """Cut the embedded video and the rotary tables; join before patches unfold."""
        return {
            "x_embedder": {0: Split(1, of_output=True)},
            "rope": {0: Split(0, of_output=True), 1: Split(0, of_output=True)},
            "proj_out": Gather(1),
        }
