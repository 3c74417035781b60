"""Wan 2.1 and 2.2 of diffusers: self attention over the video, cross attention to text, and to an image in I2V models.

Models that were made from Wan's blocks (ChronoEdit, SkyReels V2, VACE, Animate) run by the same processors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

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
    from_cp_plan,
    project_out,
    split_heads,
)
from fastvideo.integrations.diffusers.rotary import rotate_neighbours
from fastvideo.integrations.plan import Place
from fastvideo.models.wan.checkpoint import INDEX_NAME, WEIGHTS_NAME, gate_names, read_header

__all__ = ["SkyReelsFamily", "WanCrossProcessor", "WanFamily", "WanSelfProcessor", "key_and_value"]

REPLACES = ("WanAttnProcessor", "WanAttnProcessor2_0", "SkyReelsV2AttnProcessor", "SkyReelsV2AttnProcessor2_0")
NUM_TEXT = 512
"""Text tokens that Wan's pipelines always hand over; in I2V models the image's tokens stand before them."""


class WanSelfProcessor(Processor):
    """Self attention: QK norm over all heads, rotary positions."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Attend within the video, `[B, S, C]`; the arguments are those of diffusers' processor."""
        if encoder_hidden_states is not None:
            raise ValueError(f"{self.attend.place.path} is self attention, and got encoder_hidden_states")
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key, value = split_heads(attn, attn.norm_q(query), attn.norm_k(key), value)
        if rotary_emb is not None:
            # The tables hold each pair's angle twice.
            cos, sin = rotary_emb[0][..., 0::2], rotary_emb[1][..., 1::2]
            query, key = rotate_neighbours(query, cos, sin), rotate_neighbours(key, cos, sin)
        output, _ = self.attend(query, key, value, mask=attention_mask)
        return project_out(attn, output)


class WanCrossProcessor(Processor):
    """Cross attention to text and, where the model has weights for them, to the tokens of an image."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Attend from the video, `[B, S, C]`, to the text, `[B, R, C]`; the arguments are those of diffusers' processor."""
        if encoder_hidden_states is None or rotary_emb is not None:
            raise ValueError(f"{self.attend.place.path} is cross attention; it takes encoder_hidden_states and no rotary_emb")
        image = None
        if attn.add_k_proj is not None:
            num_image = encoder_hidden_states.shape[1] - NUM_TEXT
            image, encoder_hidden_states = encoder_hidden_states[:, :num_image], encoder_hidden_states[:, num_image:]
        key, value = key_and_value(attn, encoder_hidden_states)
        query = attn.norm_q(attn.to_q(hidden_states))
        query, key, value = split_heads(attn, query, attn.norm_k(key), value)
        output = self.attend(query, key, value, attention_mask)
        if image is not None:
            if attn.fused_projections:
                image_key, image_value = attn.to_added_kv(image).chunk(2, dim=-1)
            else:
                image_key, image_value = attn.add_k_proj(image), attn.add_v_proj(image)
            image_key, image_value = split_heads(attn, attn.norm_added_k(image_key), image_value)
            output = output + self.attend(query, image_key, image_value)
        return project_out(attn, output)


def key_and_value(attn: Any, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the key and value projections of what cross attention looks at, `[B, R, C]`, fused or not."""
    if attn.fused_projections:
        key, value = attn.to_kv(context).chunk(2, dim=-1)
        return key, value
    return attn.to_k(context), attn.to_v(context)


def _folders(source: str) -> Iterable[Path]:
    """Return where weights may lie of what diffusers noted: a folder or repository, or the one around a subfolder."""
    if not source or Path(source).is_dir():
        return [Path(source), Path(source, "transformer")] if source else []
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    files = [f"{folder}{name}" for folder in ("", "transformer/") for name in (WEIGHTS_NAME, INDEX_NAME)]
    try:
        found = [try_to_load_from_cache(source, file) for file in files]
    except HFValidationError:  # a folder that is gone
        return []
    return [Path(path).parent for path in found if isinstance(path, str)]


class WanFamily(Family):
    """Wan's video transformers, and ChronoEdit's, which differ in the positions of frames."""

    name = "Wan"
    model_classes: ClassVar[tuple[str, ...]] = ("WanTransformer3DModel", "ChronoEditTransformer3DModel")

    def check(self, model: nn.Module) -> None:
        """Refuse a model whose checkpoint has gates of Video Sparse Attention, which diffusers dropped when it loaded it.

        Raises:
            ValueError: The folder that it was loaded from, or what the Hub's cache holds of that repository, has such weights.
        """
        config: Any = model.config
        for folder in _folders(str(config.get("_name_or_path") or "")):
            names = {name for path in folder.glob("*.safetensors") for name in read_header(path)}
            if gates := gate_names(names):
                raise ValueError(
                    f"{folder} holds gates of Video Sparse Attention, {gates[0]} and others, and diffusers dropped them when "
                    "it loaded this model; load it by fastvideo.models.wan.WanTransformer3DModel.load(folder), which takes "
                    "text-to-video models, and put fastvideo.models.wan.pipeline.WanInPipeline(model) into the pipeline"
                )

    def sites(self, model: nn.Module) -> Iterable[Site]:
        """Return `attn1`, within the video, and `attn2`, to text and image, of each block."""
        for number, path, _ in blocks_of(model, "blocks"):
            yield Site(Place(f"{path}.attn1", "self", number), WanSelfProcessor, REPLACES)
            yield Site(Place(f"{path}.attn2", "cross", number), WanCrossProcessor, REPLACES)

    def video_shape(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the latent's shape and the patch size: latents are `[B, C, T, Y, X]`."""
        return tuple(inputs["hidden_states"].shape[2:]), tuple(model.config.patch_size)  # type: ignore[union-attr,arg-type]

    def shard_plan(self, model: nn.Module) -> ShardPlan:
        """Return the model's own plan."""
        return from_cp_plan(model)


class SkyReelsFamily(WanFamily):
    """SkyReels V2's transformers, diffusion forcing included: frames with timesteps of their own, and causal blocks."""

    name = "SkyReels V2"
    model_classes = ("SkyReelsV2Transformer3DModel",)

    def follows_scheduler(self, inputs: Mapping[str, Any]) -> bool:
        """Return whether all frames are at one step; where they aren't, each has a scheduler of its own."""
        timestep = inputs["timestep"]
        return not isinstance(timestep, torch.Tensor) or timestep.dim() < 2

    def shard_plan(self, model: nn.Module) -> ShardPlan:  # noqa: ARG002  # families look at it or not
        """Cut what is as long as the video ahead of the blocks; join before the last modulation, which is made whole."""
        return {
            "rope": {0: Split(1, of_output=True), 1: Split(1, of_output=True)},
            "blocks.0": {"hidden_states": Split(1)},
            "blocks.*": {"temb": Split(2, num_dims=4)},
            "norm_out": Gather(1),
        }
