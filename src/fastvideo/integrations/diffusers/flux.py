"""Flux 1 and 2 of diffusers: text joined to the image in every block; later blocks get both as one sequence, text first."""

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
from fastvideo.integrations.diffusers.state import current_state
from fastvideo.integrations.plan import Place

__all__ = ["Flux2Family", "Flux2SingleProcessor", "FluxFamily", "FluxProcessor"]


class FluxProcessor(Processor):
    """Joint attention with norms of query and key per head; text and image are both rotated."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attend within image, `[B, S, C]`, and text, `[B, R, C]`; the arguments are those of diffusers' processor.

        Without `encoder_hidden_states`, `hidden_states` is text and then image, `[B, R + S, C]`.
        """
        query, key, value = _project(attn, hidden_states)
        if encoder_hidden_states is None:
            return self.attend_as_one(query, key, value, attention_mask, image_rotary_emb)
        text_query, text_key, text_value = _project_text(attn, encoder_hidden_states)
        num_text = encoder_hidden_states.shape[1]
        if image_rotary_emb is not None:
            text_tables = tuple(table[:num_text] for table in image_rotary_emb)
            image_tables = tuple(table[num_text:] for table in image_rotary_emb)
            text_query, text_key = _rotate(text_query, text_key, text_tables)
            query, key = _rotate(query, key, image_tables)
        mask = None if attention_mask is None else _text_last(attention_mask, num_text)
        output, text_output = self.attend(query, key, value, (text_query, text_key, text_value), mask=mask)
        return project_out(attn, output), attn.to_add_out(text_output.flatten(2, 3))

    def attend_as_one(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        tables: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        """Attend within text and then image, `[B, R + S, H, D]`; return `[B, R + S, H * D]`."""
        state = current_state()
        num_text = 0 if state is None else state.num_text
        query, key = _rotate(query, key, tables)
        text = tuple(x[:, :num_text] for x in (query, key, value)) if num_text else None
        mask = None if attention_mask is None else _text_last(attention_mask, num_text)
        output, text_output = self.attend(*(x[:, num_text:] for x in (query, key, value)), text, mask=mask)
        joined = output if text_output is None else torch.cat([text_output, output], dim=1)
        whole: torch.Tensor = joined.flatten(2, 3)
        return whole


class Flux2SingleProcessor(FluxProcessor):
    """Attention and feed-forward side by side, in one projection in and one out, on text and then image."""

    def __call__(  # type: ignore[override]  # a module of another kind, which has no text apart
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Attend within text and then image, `[B, R + S, C]`; the arguments are those of diffusers' processor."""
        projected = attn.to_qkv_mlp_proj(hidden_states)
        joined, fed = projected.split([3 * attn.inner_dim, attn.mlp_hidden_dim * attn.mlp_mult_factor], dim=-1)
        query, key, value = split_heads(attn, *joined.chunk(3, dim=-1))
        attended = self.attend_as_one(attn.norm_q(query), attn.norm_k(key), value, attention_mask, image_rotary_emb)
        output: torch.Tensor = attn.to_out(torch.cat([attended, attn.mlp_act_fn(fed)], dim=-1))
        return output


def _project(attn: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if attn.fused_projections:
        query, key, value = attn.to_qkv(x).chunk(3, dim=-1)
    else:
        query, key, value = attn.to_q(x), attn.to_k(x), attn.to_v(x)
    query, key, value = split_heads(attn, query, key, value)
    return attn.norm_q(query), attn.norm_k(key), value


def _project_text(attn: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if attn.fused_projections:
        query, key, value = attn.to_added_qkv(x).chunk(3, dim=-1)
    else:
        query, key, value = attn.add_q_proj(x), attn.add_k_proj(x), attn.add_v_proj(x)
    query, key, value = split_heads(attn, query, key, value)
    return attn.norm_added_q(query), attn.norm_added_k(key), value


def _rotate(query: torch.Tensor, key: torch.Tensor, tables: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if tables is None:
        return query, key
    cos, sin = (table[None, :, None, 0::2] for table in tables)
    return rotate_neighbours(query, cos, sin), rotate_neighbours(key, cos, sin)


def _text_last(mask: torch.Tensor, num_text: int) -> torch.Tensor:
    """Turn a mask over text and then image into one over image and then text."""
    mask = mask.roll(-num_text, dims=-1)
    has_rows = mask.dim() > 2 and mask.shape[-2] > 1
    return mask.roll(-num_text, dims=-2) if has_rows else mask


class FluxFamily(Family):
    """Flux's transformers: images, which are videos of one frame."""

    name = "Flux"
    model_classes = ("FluxTransformer2DModel",)

    def sites(self, model: nn.Module) -> Iterable[Site]:
        """Return the blocks with two streams, then those with one."""
        for number, path, _ in blocks_of(model, "transformer_blocks", "single_transformer_blocks"):
            yield Site(Place(f"{path}.attn", "self", number), FluxProcessor, ("FluxAttnProcessor", "FluxAttnProcessor2_0"))

    def video_shape(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:  # noqa: ARG002  # families look at it or not
        """Return the image's rows and columns of tokens, read from `img_ids`: once per call, from the device."""
        ids = inputs["img_ids"]
        last = (ids if ids.dim() == 2 else ids[0]).amax(dim=0)
        return tuple(int(extent) + 1 for extent in last[:3].tolist()), (1, 1, 1)

    def num_text(self, inputs: Mapping[str, Any]) -> int:
        """Return the text's length."""
        length: int = inputs["encoder_hidden_states"].shape[1]
        return length

    def shard_plan(self, model: nn.Module) -> ShardPlan:
        """Return the model's own plan, with the text whole on every device."""
        return from_cp_plan(model, replicated=("encoder_hidden_states", "txt_ids"))


class Flux2Family(FluxFamily):
    """Flux 2's transformers. Reference images stand beside the image, so that sparse attention runs without them alone."""

    name = "Flux 2"
    model_classes = ("Flux2Transformer2DModel",)

    def sites(self, model: nn.Module) -> Iterable[Site]:
        """Return the blocks with two streams, then those with one."""
        num_double = len(model.transformer_blocks)  # type: ignore[arg-type]  # a list of modules
        for number, path, _ in blocks_of(model, "transformer_blocks", "single_transformer_blocks"):
            place = Place(f"{path}.attn", "self", number)
            if number < num_double:
                yield Site(place, FluxProcessor, ("Flux2AttnProcessor",))
            else:
                yield Site(place, Flux2SingleProcessor, ("Flux2ParallelSelfAttnProcessor",))
