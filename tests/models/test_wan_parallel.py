"""The Wan transformer on two gloo ranks gives the outputs and gradients of one."""

import subprocess
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from fastvideo.forward_context import set_forward_context
from fastvideo.models.wan import WanConfig, WanTransformer3DModel

NUM_RANKS = 2
LATENT_SHAPE = (3, 6, 10)  # a token grid of (3, 3, 5): 45 tokens, 23 on one rank and 22 on the other


def outcome(attention: str) -> dict[str, torch.Tensor]:
    """Output and gradients of a tiny model on whatever ranks this process belongs to."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    config = WanConfig(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=3,
        out_channels=3,
        text_dim=7,
        freq_dim=8,
        ffn_dim=48,
        num_layers=2,
        attention=attention,
    )
    model = WanTransformer3DModel(config).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.3 * noise if parameter.ndim == 1 else noise * parameter[0].numel() ** -0.5)
    video, weight = torch.randn(2, 2, 3, *LATENT_SHAPE, generator=generator, dtype=torch.float64)
    video.requires_grad_()
    text = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    metadata = model.attention_metadata(LATENT_SHAPE, 0, 0.0 if attention == "dense" else 0.5)
    with set_forward_context(0, metadata):
        out = model(video, torch.tensor([100.0, 900.0]), text)
    # The loss on the whole output counts once: each rank takes its share.
    ((out * weight).sum() / size).backward()
    found = {"output": out.detach(), "input gradient": video.grad}
    for name, parameter in model.named_parameters():
        if size > 1:
            dist.all_reduce(parameter.grad)
        found[name] = parameter.grad
    return found


def worker(rank: str, attention: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=int(rank),
        world_size=NUM_RANKS,
        timeout=timedelta(seconds=60),
    )
    torch.save(outcome(attention), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("attention", ["dense", "vsa"])
def test_two_ranks_equal_one(attention, tmp_path):
    # This file run as a program: spawned workers could not import it by name under pytest's importlib mode.
    ranks = [subprocess.Popen([sys.executable, __file__, str(rank), attention, str(tmp_path)]) for rank in range(NUM_RANKS)]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0] * NUM_RANKS
    finally:
        for rank in ranks:
            rank.kill()
    expected = outcome(attention)
    for rank in range(NUM_RANKS):
        actual = torch.load(tmp_path / f"{rank}.pt")
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            assert value.abs().max() > 1e-9, name
            torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-10, msg=f"{name} on rank {rank}")


if __name__ == "__main__":
    worker(*sys.argv[1:])
