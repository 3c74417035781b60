"""Tiny random-weight models of every family, made by diffusers' own classes, and inputs for them.

Grids are ragged for tiles of 4 × 4 × 4, and the number of video tokens is even, so that two ranks can share them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from torch import nn

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One model: how it is made, what it is called with, and its video's grid, if its tokens are one.

    `text_lengths` are the real tokens of each sample, where a mask tells them.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    grid_tyx: tuple[int, int, int] | None
    has_cross: bool = False
    has_text: bool = False
    num_joined: int = 0
    text_lengths: tuple[int, ...] | None = None


def _wan(**extra: Any) -> Callable[[], nn.Module]:
    config = dict(  # noqa: C408  # reads as the call it becomes
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32,
        num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    return lambda: diffusers.WanTransformer3DModel(**{**config, **extra})


def _wan_inputs(**extra: Any) -> Inputs:
    inputs = {
        "hidden_states": torch.randn(2, 4, 5, 8, 12),
        "timestep": torch.tensor([500, 500]),
        "encoder_hidden_states": torch.randn(2, 7, 16),
    }
    return {**inputs, **extra}


def _wan_i2v_inputs() -> Inputs:
    return _wan_inputs(encoder_hidden_states=torch.randn(2, 512, 16), encoder_hidden_states_image=torch.randn(2, 9, 20))


def _wan_vace() -> nn.Module:
    return diffusers.WanVACETransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32,
        num_layers=2, rope_max_seq_len=32, vace_layers=[0, 1], vace_in_channels=6,
    )  # fmt: skip


def _wan_vace_inputs() -> Inputs:
    return _wan_inputs(control_hidden_states=torch.randn(2, 6, 5, 8, 12), control_hidden_states_scale=torch.tensor([1.0, 0.5]))


def _wan_animate() -> nn.Module:
    return diffusers.WanAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=12, latent_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=32, num_layers=4, rope_max_seq_len=32, image_dim=20, added_kv_proj_dim=24,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8}, motion_encoder_size=16, motion_style_dim=8, motion_dim=4,
        motion_encoder_dim=8, face_encoder_hidden_dim=8, face_encoder_num_heads=2, inject_face_latents_blocks=2,
    )  # fmt: skip


def _wan_animate_inputs() -> Inputs:
    return {
        **_wan_i2v_inputs(),
        "hidden_states": torch.randn(2, 12, 5, 8, 12),
        "pose_hidden_states": torch.randn(2, 4, 4, 8, 12),
        "face_pixel_values": torch.randn(2, 3, 13, 16, 16),
    }


def _chronoedit() -> nn.Module:
    return diffusers.ChronoEditTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32,
        num_layers=2, rope_max_seq_len=32, image_dim=20, added_kv_proj_dim=24, rope_temporal_skip_len=3,
    )  # fmt: skip


def _chronoedit_inputs() -> Inputs:
    return {**_wan_i2v_inputs(), "hidden_states": torch.randn(2, 4, 2, 8, 12)}  # of two frames, the second stands later


def skyreels(**extra: Any) -> nn.Module:
    """Return a model of SkyReels V2 whose configuration has `extra`."""
    config = dict(  # noqa: C408  # reads as the call it becomes
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32,
        num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    return diffusers.SkyReelsV2Transformer3DModel(**{**config, **extra})


def _skyreels_forcing_inputs() -> Inputs:
    return _wan_inputs(timestep=torch.randint(0, 1000, (2, 5)), enable_diffusion_forcing=True)


def _hunyuan(**extra: Any) -> Callable[[], nn.Module]:
    config = dict(  # noqa: C408  # reads as the call it becomes
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(4, 4, 4),
    )  # fmt: skip
    return lambda: diffusers.HunyuanVideoTransformer3DModel(**{**config, **extra})


def _hunyuan_inputs() -> Inputs:
    return {
        "hidden_states": torch.randn(2, 4, 5, 8, 12),
        "timestep": torch.tensor([500, 500]),
        "encoder_hidden_states": torch.randn(2, 7, 16),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0]]),
        "pooled_projections": torch.randn(2, 8),
        "guidance": torch.tensor([6000.0, 6000.0]),
    }


def _hunyuan_15() -> nn.Module:
    return diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2, num_refiner_layers=1,
        mlp_ratio=2.0, patch_size=2, text_embed_dim=16, text_embed_2_dim=10, image_embed_dim=6, rope_axes_dim=(4, 4, 4),
    )  # fmt: skip


def _hunyuan_15_inputs(*, has_image: bool) -> Inputs:
    return {
        "hidden_states": torch.randn(2, 4, 5, 8, 12),
        "timestep": torch.tensor([500.0, 500.0]),
        "encoder_hidden_states": torch.randn(2, 4, 16),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0], [0, 1, 0, 0]]),
        "encoder_hidden_states_2": torch.randn(2, 3, 10),
        "encoder_attention_mask_2": torch.tensor([[1, 1, 0], [1, 0, 0]]),
        "image_embeds": torch.randn(2, 2, 6) if has_image else torch.zeros(2, 2, 6),
    }


def _framepack() -> nn.Module:
    return diffusers.HunyuanVideoFramepackTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(4, 4, 4),
        has_image_proj=True, image_proj_dim=6, has_clean_x_embedder=True,
    )  # fmt: skip


def _framepack_inputs() -> Inputs:
    return {
        **_hunyuan_inputs(),
        "image_embeds": torch.randn(2, 2, 6),
        "indices_latents": torch.arange(19, 24),
        "latents_clean": torch.randn(2, 4, 2, 8, 12),
        "indices_latents_clean": torch.tensor([0, 18]),
        "latents_history_2x": torch.randn(2, 4, 2, 8, 12),
        "indices_latents_history_2x": torch.arange(16, 18),
        "latents_history_4x": torch.randn(2, 4, 4, 8, 12),
        "indices_latents_history_4x": torch.arange(12, 16),
    }


def _ltx() -> nn.Module:
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, num_layers=2,
        caption_channels=12,
    )  # fmt: skip


def _ltx_inputs() -> Inputs:
    return {
        "hidden_states": torch.randn(2, 5 * 4 * 6, 4),
        "encoder_hidden_states": torch.randn(2, 7, 12),
        "timestep": torch.tensor([500.0, 500.0]),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0]]),
        "num_frames": 5,
        "height": 4,
        "width": 6,
        "rope_interpolation_scale": (0.3, 32.0, 32.0),
    }


def _cogvideox(**extra: Any) -> Callable[[], nn.Module]:
    config = dict(  # noqa: C408  # reads as the call it becomes
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=16,
        num_layers=2, sample_width=12, sample_height=8, sample_frames=17, max_text_seq_length=7,
    )  # fmt: skip
    return lambda: diffusers.CogVideoXTransformer3DModel(**{**config, **extra})


def _cogvideox_inputs(num_frames: int = 5, patch_size_t: int = 1) -> Inputs:
    tokens = num_frames // patch_size_t * 4 * 6
    angles = torch.rand(tokens, 8).repeat_interleave(2, dim=1)
    return {
        "hidden_states": torch.randn(2, num_frames, 4, 8, 12),
        "encoder_hidden_states": torch.randn(2, 7, 16),
        "timestep": torch.tensor([500, 500]),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def _consisid() -> nn.Module:
    return diffusers.ConsisIDTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=16,
        num_layers=2, sample_width=12, sample_height=8, sample_frames=17, max_text_seq_length=7,
        use_rotary_positional_embeddings=True,
    )  # fmt: skip


def _mochi() -> nn.Module:
    model = diffusers.MochiTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16, in_channels=4, text_embed_dim=16,
        time_embed_dim=8, max_sequence_length=7,
    )  # fmt: skip
    nn.init.normal_(model.pos_frequencies)  # zeros would rotate nothing
    return model


def _mochi_inputs() -> Inputs:
    return {
        "hidden_states": torch.randn(2, 4, 5, 8, 12),
        "encoder_hidden_states": torch.randn(2, 7, 16),
        "timestep": torch.tensor([500, 500]),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0]]).bool(),
    }


def _cosmos(**extra: Any) -> Callable[[], nn.Module]:
    config = dict(  # noqa: C408  # reads as the call it becomes
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2, mlp_ratio=2.0,
        text_embed_dim=16, adaln_lora_dim=4, max_size=(8, 16, 16), concat_padding_mask=False,
    )  # fmt: skip

    def make() -> nn.Module:
        model = diffusers.CosmosTransformer3DModel(**{**config, **extra})
        if model.learnable_pos_embed is not None:
            for parameter in model.learnable_pos_embed.parameters():
                nn.init.normal_(parameter)
        return model

    return make


def _cosmos_inputs(**extra: Any) -> Inputs:
    inputs = {
        "hidden_states": torch.randn(2, 4, 5, 8, 12),
        "timestep": torch.tensor([0.5, 0.5]),
        "encoder_hidden_states": torch.randn(2, 7, 16),
        "attention_mask": torch.tensor([[True] * 5 + [False] * 2, [True] * 3 + [False] * 4]),
        "fps": 16,
    }
    return {**inputs, **extra}


def _cosmos_image_inputs() -> Inputs:
    return _cosmos_inputs(
        encoder_hidden_states=(torch.randn(2, 7, 16), torch.randn(2, 6, 10)),
        attention_mask=None,
        timestep=torch.rand(2, 1, 5, 1, 1),
    )


def _flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=12, num_attention_heads=2, joint_attention_dim=16,
        pooled_projection_dim=8, axes_dims_rope=(4, 4, 4),
    )  # fmt: skip


def _flux_inputs() -> Inputs:
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(10.0), indexing="ij")
    return {
        "hidden_states": torch.randn(2, 60, 4),
        "encoder_hidden_states": torch.randn(2, 7, 16),
        "pooled_projections": torch.randn(2, 8),
        "timestep": torch.tensor([0.5, 0.5]),
        "img_ids": torch.stack([torch.zeros(60), rows.flatten(), columns.flatten()], dim=1),
        "txt_ids": torch.randint(0, 9, (7, 3)).float(),
    }


def _flux_2() -> nn.Module:
    return diffusers.Flux2Transformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16,
        timestep_guidance_channels=8, mlp_ratio=2.0, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip


def _flux_2_inputs() -> Inputs:
    inputs = _flux_inputs()
    image, text = (F.pad(inputs[name], (0, 1))[None].expand(2, -1, -1) for name in ("img_ids", "txt_ids"))
    return {
        **{name: inputs[name] for name in ("hidden_states", "encoder_hidden_states", "timestep")},
        "guidance": torch.tensor([3.0, 4.0]),
        "img_ids": image,
        "txt_ids": text,
    }


CASES = {
    case.name: case
    for case in (
        Case("wan", _wan(), _wan_inputs, (5, 4, 6), has_cross=True),
        Case("wan i2v", _wan(image_dim=20, added_kv_proj_dim=24), _wan_i2v_inputs, (5, 4, 6), has_cross=True),
        Case(
            "wan ti2v",
            _wan(),
            lambda: _wan_inputs(timestep=torch.randint(0, 1000, (2, 120))),
            (5, 4, 6),
            has_cross=True,
        ),
        Case("wan vace", _wan_vace, _wan_vace_inputs, (5, 4, 6), has_cross=True),
        Case("wan animate", _wan_animate, _wan_animate_inputs, (5, 4, 6), has_cross=True),
        Case("chronoedit", _chronoedit, _chronoedit_inputs, (2, 4, 6), has_cross=True),
        Case("skyreels", skyreels, _wan_inputs, (5, 4, 6), has_cross=True),
        Case("skyreels forcing", skyreels, _skyreels_forcing_inputs, (5, 4, 6), has_cross=True),
        Case("hunyuan", _hunyuan(), _hunyuan_inputs, (5, 4, 6), has_text=True, num_joined=7, text_lengths=(5, 3)),
        Case(
            "hunyuan i2v",
            _hunyuan(image_condition_type="token_replace"),
            _hunyuan_inputs,
            (5, 4, 6),
            has_text=True,
            num_joined=7,
            text_lengths=(5, 3),
        ),
        Case(
            "hunyuan 1.5",
            _hunyuan_15,
            lambda: _hunyuan_15_inputs(has_image=False),
            (5, 4, 6),
            has_text=True,
            num_joined=9,
            text_lengths=(5, 2),
        ),
        Case(
            "hunyuan 1.5 i2v",
            _hunyuan_15,
            lambda: _hunyuan_15_inputs(has_image=True),
            (5, 4, 6),
            has_text=True,
            num_joined=9,
            text_lengths=(7, 4),
        ),
        Case("framepack", _framepack, _framepack_inputs, None, has_text=True, num_joined=9),
        Case("ltx", _ltx, _ltx_inputs, (5, 4, 6), has_cross=True),
        Case("cogvideox", _cogvideox(use_rotary_positional_embeddings=True), _cogvideox_inputs, (5, 4, 6), num_joined=7),
        Case(
            "cogvideox 1.5",
            _cogvideox(use_rotary_positional_embeddings=True, patch_size_t=2, patch_bias=False),
            lambda: _cogvideox_inputs(6, 2),
            (3, 4, 6),
            num_joined=7,
        ),
        Case("consisid", _consisid, _cogvideox_inputs, (5, 4, 6), num_joined=7),
        Case("mochi", _mochi, _mochi_inputs, (5, 4, 6), num_joined=7, text_lengths=(5, 3)),
        Case("cosmos", _cosmos(), _cosmos_inputs, (5, 4, 6), has_cross=True),
        Case(
            "cosmos transfer",
            _cosmos(extra_pos_embed_type=None, img_context_dim_in=10, img_context_dim_out=24),
            _cosmos_image_inputs,
            (5, 4, 6),
            has_cross=True,
        ),
        Case("flux", _flux, _flux_inputs, (1, 6, 10), num_joined=7),
        Case("flux 2", _flux_2, _flux_2_inputs, (1, 6, 10), num_joined=7),
    )
}
NAMES = tuple(CASES)
SPARSE = tuple(name for name, case in CASES.items() if case.grid_tyx is not None)
NAMED = ("wan", "hunyuan", "ltx", "cogvideox", "mochi", "cosmos", "flux")
ONE_OF_EACH = (*NAMED, "wan vace", "wan animate", "chronoedit", "skyreels", "hunyuan 1.5", "consisid", "flux 2")


def make(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Inputs]:
    """Return a model and inputs, the same ones every time.

    Output projections and norms of query and key get weights that let attention show: random ones instead of 0 or 1.
    """
    torch.manual_seed(0)
    model = CASES[name].make()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.min() == parameter.max():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    inputs = CASES[name].inputs()
    return model.to(dtype).eval(), convert(inputs, dtype)


def convert(inputs: Any, dtype: torch.dtype) -> Any:
    """Return inputs with their floating point tensors in `dtype`; positions and rotary tables stay as they are."""
    kept = ("image_rotary_emb", "img_ids", "txt_ids")
    return {name: x if name in kept else _convert(x, dtype) for name, x in inputs.items()}


def _convert(x: Any, dtype: torch.dtype) -> Any:
    if isinstance(x, tuple) and all(isinstance(part, torch.Tensor) for part in x):
        return tuple(_convert(part, dtype) for part in x)
    return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def in_float64(model: nn.Module) -> nn.Module:
    """Return a copy in float64."""
    wide = copy.deepcopy(model).double()
    if getattr(wide, "learnable_pos_embed", None) is not None:
        wide.learnable_pos_embed.float()  # diffusers computes its norm in float32 and takes nothing wider
    return wide


def call(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """Return the model's output."""
    return model(**inputs, return_dict=False)[0]


def call_with_gradients(model: nn.Module, inputs: Inputs) -> dict[str, torch.Tensor]:
    """Return the output and the gradients of the video, the text and all weights, under a fixed cotangent."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in ("hidden_states",)}
    model.zero_grad()
    output = call(model, {**inputs, **leaves})
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    output.backward(cotangent)
    found = {"output": output.detach(), "gradient of hidden_states": leaves["hidden_states"].grad}
    weights = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    # One tensor, because single weights may have gradients that are 0 up to rounding.
    found["gradient of weights"] = torch.cat([grad.flatten() for grad in weights.values()])
    return found
