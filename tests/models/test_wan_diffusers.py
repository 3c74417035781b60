"""The Wan transformer against diffusers' class: names, numbers in three dtypes, checkpoint folders."""

import pytest
import torch
from diffusers import WanTransformer3DModel as DiffusersWan
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file

from fastvideo.models.wan import WanConfig, WanTransformer3DModel

CONFIG = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 5,
    "text_dim": 10,
    "freq_dim": 14,
    "ffn_dim": 40,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
VARIANTS = {
    "plain": {},
    "no_cross_norm_odd_head": {"cross_attn_norm": False, "attention_head_dim": 10},
    "frames_in_patches": {"patch_size": (2, 1, 3), "num_attention_heads": 1},
}


def fill(model: torch.nn.Module, seed: int) -> None:
    """Give every parameter, norm weights and tables included, random values of a real model's size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.ndim > 1 and "table" not in name:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(0.3 * noise)


def inputs(config: dict, dtype: torch.dtype, grid_tyx=(3, 5, 7), batch=2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    edges = [tokens * edge for tokens, edge in zip(grid_tyx, config["patch_size"], strict=True)]
    video = torch.randn(batch, config["in_channels"], *edges, generator=generator).to(dtype)
    timestep = torch.tensor([993.7, 17.3, 500.0])[:batch].to(torch.promote_types(dtype, torch.float32))
    text = torch.randn(batch, 6, config["text_dim"], generator=generator).to(dtype)
    return video, timestep, text


def run_diffusers(model: DiffusersWan, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
    with torch.no_grad():
        return model(*args, return_dict=False)[0]


def diffusers_float64(config: dict, weights: dict, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Run diffusers' arithmetic wholly in float64, where it asks for float32 too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        model = DiffusersWan(**config).double()
        model.load_state_dict(weights)
        out = run_diffusers(model, tuple(arg.double() for arg in args))
    assert out.dtype == torch.float64
    return out


@pytest.fixture(params=list(VARIANTS))
def pair(request) -> tuple[dict, DiffusersWan, WanTransformer3DModel]:
    config = CONFIG | VARIANTS[request.param]
    theirs = DiffusersWan(**config)
    fill(theirs, seed=0)
    ours = WanTransformer3DModel.from_config(dict(theirs.config))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return config, theirs, ours


def test_names_and_shapes_are_equal_both_ways(pair):
    _, theirs, ours = pair
    expected = {name: tuple(weight.shape) for name, weight in theirs.state_dict().items()}
    assert {name: tuple(weight.shape) for name, weight in ours.state_dict().items()} == expected
    assert [name for name, _ in ours.named_buffers()] == []


def test_float64_output_is_equal(pair):
    config, theirs, ours = pair
    args = inputs(config, torch.float64)
    expected = diffusers_float64(config, theirs.state_dict(), args)
    with torch.no_grad():
        actual = ours.double()(*args)
    assert expected.abs().mean() > 0.1
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("grid_tyx", "batch"), [((3, 5, 7), 2), ((1, 1, 1), 1), ((2, 1, 11), 3)])
def test_float32_output_is_within_the_budget(pair, grid_tyx, batch):
    config, theirs, ours = pair
    args = inputs(config, torch.float32, grid_tyx, batch)
    truth = diffusers_float64(config, theirs.state_dict(), args)
    with torch.no_grad():
        actual = ours(*args)
    budget = (run_diffusers(theirs, args).double() - truth).abs()
    error = (actual.double() - truth).abs()
    floor = torch.finfo(torch.float32).eps * truth.abs().max()
    assert error.max() <= 2 * budget.max() + floor
    assert error.mean() <= 2 * budget.mean() + floor


def test_bfloat16_output_is_within_the_budget(pair):
    config, theirs, ours = pair
    theirs.to(torch.bfloat16)
    args = inputs(config, torch.bfloat16)
    truth = diffusers_float64(config, theirs.state_dict(), args)
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        actual = ours.to(torch.bfloat16)(*args)
    # Diffusers keeps its rotary tables in float32.
    theirs.rope = DiffusersWan(**config).rope
    budget = (run_diffusers(theirs, args).double() - truth).abs()
    error = (actual.double() - truth).abs()
    floor = torch.finfo(torch.bfloat16).eps * truth.abs().max() / 4
    assert actual.dtype == torch.bfloat16
    assert error.max() <= 2 * budget.max() + floor
    assert error.mean() <= 2 * budget.mean()


def test_diffusers_reads_our_folder_and_we_read_theirs(pair, tmp_path):
    _, theirs, ours = pair
    ours.save(tmp_path / "ours")
    # `from_pretrained` needs accelerate for this class; these are the files and names it reads.
    read = DiffusersWan.from_config(DiffusersWan.load_config(tmp_path / "ours"))
    read.load_state_dict(load_file(tmp_path / "ours" / SAFETENSORS_WEIGHTS_NAME), strict=True)
    assert WanConfig.from_dict(dict(read.config)) == WanConfig.from_dict(dict(theirs.config))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    loaded = WanTransformer3DModel.load(tmp_path / "theirs")
    assert loaded.config == ours.config
    for name, weight in theirs.state_dict().items():
        assert torch.equal(read.state_dict()[name], weight), name
        assert torch.equal(loaded.state_dict()[name], weight), name
