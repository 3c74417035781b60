"""Tiny whole Wan pipelines with random weights and a tokenizer of a few words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from PIL import Image

WEIGHTS = "diffusion_pytorch_model.safetensors"


def transformer(**changes: Any) -> WanTransformer3DModel:
    """Return a model whose attention shows."""
    model = WanTransformer3DModel(**{
        "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 16, "out_channels": 16, "text_dim": 16,
        "freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32, **changes,
    })  # fmt: skip
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 0.1)
    return model


def components(**changes: Any) -> dict[str, Any]:
    """Return the components of a text-to-video pipeline, the same every time, with those in `changes` in their place."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    words = ["<pad>", "</s>", "<unk>", *["a", "fox", "runs", "over", "the", "snow", "at", "night", "cat"]]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    sizes = {"d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 16, "num_layers": 1, "vocab_size": len(words)}
    parts = {
        "transformer": transformer(),
        "tokenizer": PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        ),
        "text_encoder": UMT5EncoderModel(UMT5Config(**sizes)).eval(),
        "vae": AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }
    return {**parts, **changes}


def ltx() -> Any:
    """Return a text-to-video pipeline of another family."""
    from diffusers import AutoencoderKLLTXVideo, LTXPipeline, LTXVideoTransformer3DModel
    from transformers import T5Config, T5EncoderModel

    shared = components()
    torch.manual_seed(0)
    vae = AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1), patch_size=1,
        spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False, False),
    )  # fmt: skip
    encoder = T5EncoderModel(T5Config(d_model=12, d_kv=4, num_heads=2, d_ff=16, num_layers=1, vocab_size=12)).eval()
    model = LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, num_layers=2,
        caption_channels=12,
    )  # fmt: skip
    return LTXPipeline(
        tokenizer=shared["tokenizer"], text_encoder=encoder, vae=vae, scheduler=shared["scheduler"], transformer=model
    )


def image_encoder() -> dict[str, Any]:
    """Return an image encoder of 9 tokens of 20 channels, and its processor."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(1)
    config = CLIPVisionConfig(
        hidden_size=20, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, image_size=24, patch_size=8
    )
    processor = CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    return {"image_encoder": CLIPVisionModel(config).eval(), "image_processor": processor}


def sheet(path: Path) -> torch.Tensor:
    """Return the contact sheet beside a video, which loses nothing."""
    return torch.from_numpy(np.asarray(Image.open(path.with_suffix(".png"))).astype(int))
