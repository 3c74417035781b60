"""Wan VACE of diffusers: Wan with a second list of blocks, which reads the control video ahead of the first."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from fastvideo.integrations.diffusers.family import Gather, ShardPlan, Site, Split, blocks_of
from fastvideo.integrations.diffusers.wan import REPLACES, WanCrossProcessor, WanFamily, WanSelfProcessor
from fastvideo.integrations.plan import Place

__all__ = ["WanVACEFamily"]


class WanVACEFamily(WanFamily):
    """Wan VACE's transformers. Layers count the control blocks first, since they run first."""

    name = "Wan VACE"
    model_classes = ("WanVACETransformer3DModel",)

    def sites(self, model: nn.Module) -> Iterable[Site]:
        """Return `attn1`, within the video, and `attn2`, to text and image, of each control block and then each block."""
        for number, path, _ in blocks_of(model, "vace_blocks", "blocks"):
            yield Site(Place(f"{path}.attn1", "self", number), WanSelfProcessor, REPLACES)
            yield Site(Place(f"{path}.attn2", "cross", number), WanCrossProcessor, REPLACES)

    def shard_plan(self, model: nn.Module) -> ShardPlan:  # noqa: ARG002  # families look at it or not
        """Cut the video ahead of both lists of blocks: control blocks add it, uncut, to their own stream."""
        return {
            "rope": {0: Split(1, of_output=True), 1: Split(1, of_output=True)},
            "vace_blocks.*": {"hidden_states": Split(1)},
            "vace_blocks.0": {"control_hidden_states": Split(1)},
            "blocks.0": {"hidden_states": Split(1)},
            "proj_out": Gather(1),
        }
