"""transformers' attention interface: text encoders and language models give the same numbers under our names."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fastvideo.attention import BackendUnavailable
from fastvideo.integrations.transformers import attention_names, register

transformers = pytest.importorskip("transformers", reason='needs transformers: pip install "transformers>=5"')

MASK = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])


def t5():
    config = transformers.UMT5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0, is_encoder_decoder=False
    )
    return transformers.UMT5EncoderModel(config)


def clip():
    return transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, eos_token_id=49
        )
    )


def llama():
    return transformers.LlamaModel(
        transformers.LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
@pytest.mark.parametrize("make", [t5, clip, llama])
def test_outputs_and_gradients_are_those_of_torchs_attention(make, mask: torch.Tensor | None) -> None:
    assert register() == register() == tuple(attention_names())
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # the initial weights let hardly any attention show
            parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    ids = torch.randint(0, 49, (2, 9))
    real = torch.ones(2, 9) if mask is None else mask

    def run(implementation: str) -> tuple[torch.Tensor, torch.Tensor]:
        model.set_attn_implementation(implementation)
        model.zero_grad()
        output = model(input_ids=ids, attention_mask=mask).last_hidden_state * real[:, :, None]
        output.square().sum().backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return output.detach(), torch.cat(grads)

    expected = run("sdpa")
    for name in ("fastvideo", "fastvideo_torch_sdpa"):
        for found, wanted in zip(run(name), expected, strict=True):
            assert torch.allclose(found, wanted, atol=1e-4, rtol=1e-4)
    assert expected[0].std() > 0.1
    model.set_attn_implementation("fastvideo_fa")
    with pytest.raises(BackendUnavailable, match="FLASH_ATTN"):
        model(input_ids=ids)


def test_generation_with_a_cache() -> None:
    register()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 49, (1, 5))
    outputs = []
    for name in ("sdpa", "fastvideo"):
        model.set_attn_implementation(name)
        outputs.append(model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0))
    assert torch.equal(outputs[0], outputs[1])


def test_without_transformers_the_error_says_what_to_install() -> None:
    code = """
import sys
sys.modules["transformers"] = None
from fastvideo.integrations.transformers import register
try:
    register()
except ImportError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert 'pip install "transformers>=5"' in result.stdout
