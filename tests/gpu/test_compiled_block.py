"""A Wan block that is compiled for training has the gradients of the block as it is, with one long example on a device."""

from __future__ import annotations

import pytest
import torch

from fastvideo.compilation import compiled_for_training
from fastvideo.models.wan import WanConfig
from fastvideo.models.wan.blocks import WanTransformerBlock

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_gradients_of_one_long_example() -> None:
    """From some 16 thousand tokens on Inductor sums over tokens in another way; see `compiled_for_training`."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = WanConfig(num_attention_heads=8, attention_head_dim=128, text_dim=64, freq_dim=64, ffn_dim=2048, num_layers=1)
    block = WanTransformerBlock(config).cuda()
    x, text = torch.randn(1, 32_760, 1024, device="cuda"), torch.randn(1, 64, 1024, device="cuda")
    modulation = torch.randn(1, 6, 1024, device="cuda", requires_grad=True)
    angle = torch.rand(32_760, 64, device="cuda")

    def gradients(function) -> dict[str, torch.Tensor]:
        for _ in range(2):  # what isn't written in the second step may hold the first one's numbers
            block.zero_grad()
            modulation.grad = None
            function(x, text, modulation, (angle.cos(), angle.sin())).sin().sum().backward()
        return {"modulation": modulation.grad, **{name: p.grad for name, p in block.named_parameters()}}

    expected = gradients(block)
    found = gradients(torch.compile(block.forward, fullgraph=True, **compiled_for_training("inductor")))
    for name, grad in found.items():
        difference = (grad - expected[name]).norm() / expected[name].norm()
        assert difference < 1e-3, name
    for part in range(6):
        difference = (found["scale_shift_table"] - expected["scale_shift_table"])[:, part].norm()
        assert difference < 1e-3 * expected["scale_shift_table"][:, part].norm(), part
