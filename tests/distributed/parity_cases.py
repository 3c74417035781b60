"""Run by test_parity.py once per rank: modules that give one rank's numbers on two, and modules with a planted fault."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from fastvideo.attention import DistributedAttention
from fastvideo.distributed import current_sequence_group, sequence_parallel
from fastvideo.distributed.agreement import RanksDisagree
from fastvideo.distributed.parity import ParityReport, check_parallel_parity
from fastvideo.forward_context import set_forward_context
from fastvideo.models.wan import WanConfig, WanTransformer3DModel

RANK, SIZE, FOLDER, PORT = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
LATENT_SHAPE = (3, 8, 10)  # 60 tokens, 30 on each of two ranks


def is_shared() -> bool:
    return current_sequence_group().size > 1


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def wan(dtype: torch.dtype = torch.float32, attention: str = "dense") -> WanTransformer3DModel:
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
    model = WanTransformer3DModel(config)
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            scale = 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(scale * draw(*parameter.shape, seed=seed))
    return model.to(dtype)


def check_wan(model: WanTransformer3DModel, **arguments) -> ParityReport:
    dtype = model.proj_out.weight.dtype
    inputs = {
        "hidden_states": draw(2, 3, *LATENT_SHAPE, dtype=dtype),
        "timestep": torch.tensor([100.0, 900.0]),
        "encoder_hidden_states": draw(2, 5, 7, seed=1, dtype=dtype),
    }
    sparsity = 0.0 if model.config.attention == "dense" else 0.5
    with set_forward_context(0, model.attention_metadata(LATENT_SHAPE, 0, sparsity)):
        return check_parallel_parity(model, inputs, **arguments)


def plant(layer: nn.Module, fault: Callable[[torch.Tensor], torch.Tensor], ranks: tuple[int, ...] = (1,)) -> None:
    """Change a layer's first output where it is shared."""

    def hook(_layer, _arguments, output):
        if RANK not in ranks or not is_shared():
            return output
        return (fault(output[0]), *output[1:]) if isinstance(output, tuple) else fault(output)

    layer.register_forward_hook(hook)


def wan_fp32() -> ParityReport:
    return check_wan(wan())


def wan_bf16() -> ParityReport:
    return check_wan(wan(torch.bfloat16))


def wan_sparse() -> ParityReport:
    return check_wan(wan(attention="vsa"))


def wan_fault() -> ParityReport:
    model = wan()
    plant(model.blocks[1].attn1.attention, lambda x: torch.cat([x[:, :-1], 1.001 * x[:, -1:]], dim=1))
    return check_wan(model)


def wan_fault_in_backward() -> ParityReport:
    model = wan()
    plant(model.blocks[0].attn2.to_v, lambda x: x + 1e-3 * (x - x.detach()))
    return check_wan(model)


def wan_other_weight() -> ParityReport:
    model = wan()
    if RANK == 1:
        with torch.no_grad():
            model.blocks[1].ffn.net[0].proj.weight[0, 0] += 0.1
    return check_wan(model)


def wan_shape() -> ParityReport:
    """A rank loses the part of text that it holds."""
    model = wan()
    plant(model.condition_embedder.text_embedder, lambda x: x[:, :-1])
    return check_wan(model)


def wan_only_attention() -> ParityReport:
    model = wan()
    plant(model.blocks[0].attn1, lambda x: 1.01 * x)
    return check_wan(model, only=lambda name: name.endswith("attn1.attention"), backward=False)


class Attention(nn.Module):
    """Attention over shards, with text that every rank holds."""

    def __init__(self, **arguments) -> None:
        super().__init__()
        self.project = nn.Linear(16, 16)
        self.attention = DistributedAttention(4, 16, **arguments)
        with torch.no_grad():
            self.project.weight.copy_(draw(16, 16) / 4)
            self.project.bias.zero_()

    def forward(self, q, k, v, text):
        q = self.project(q)
        out, text_out = self.attention(q, k, v, text, text, text)
        return {"video": out, "text": text_out}


def check_attention(module: nn.Module, **arguments) -> ParityReport:
    q, k, v = (draw(1, 13, 4, 16, seed=seed) for seed in range(3))
    shard = dict.fromkeys("qkv", 1)
    inputs = {"q": q, "k": k, "v": v, "text": draw(1, 3, 4, 16, seed=3)}
    return check_parallel_parity(module, inputs, shard=shard, **arguments)


def uneven_shards() -> ParityReport:
    return check_attention(Attention(), shard_lengths=(9, 4))


def uneven_by_default() -> ParityReport:
    return check_attention(Attention())


def partial_gradients() -> ParityReport:
    return check_attention(Attention(replicated_grad="partial"), shard_lengths=(7, 6))


def layer_mesh() -> ParityReport:
    """A layer that names its ranks runs alone when it has to."""
    module = Attention(mesh=dist.group.WORLD)
    with sequence_parallel(None):
        report = check_attention(module, mesh=dist.group.WORLD, shard_lengths=(7, 6))
    return report if module.attention.sequence_group.size == SIZE else None


def own_loss() -> ParityReport:
    module = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    with torch.no_grad():
        module[0].weight.copy_(draw(4, 4))
        module[0].bias.zero_()
    return check_parallel_parity(module, [draw(6, 4)], shard={0: 0}, loss=lambda out: out.pow(2).sum())


def loss_that_is_no_sum() -> ParityReport:
    module = nn.Sequential(nn.Linear(4, 4))
    with torch.no_grad():
        module[0].weight.copy_(draw(4, 4))
        module[0].bias.zero_()
    return check_parallel_parity(module, [draw(6, 4)], shard={0: 0}, loss=lambda out: out.pow(2).mean())


class Scale(nn.Module):
    """Has parameters that are called like what modules return."""

    def __init__(self) -> None:
        super().__init__()
        self.output, self.output_scale = (nn.Parameter(draw(4, seed=seed)) for seed in (1, 2))

    def forward(self, x):
        return x * self.output_scale + self.output


def parameters_called_output() -> ParityReport:
    return check_parallel_parity(Scale(), [draw(6, 4)], shard={0: 0})


def parameters_called_output_in_a_layer() -> ParityReport:
    return check_parallel_parity(nn.Sequential(Scale()), [draw(6, 4)], shard={0: 0})


def gradients_are_left_alone() -> ParityReport:
    module = nn.Linear(4, 4)
    with torch.no_grad():
        module.weight.copy_(draw(4, 4))
        module.bias.zero_()
    module.weight.grad = torch.full((4, 4), 7.0)
    state = torch.get_rng_state()
    report = check_parallel_parity(module, [draw(6, 4)], shard={0: 0})
    assert module.weight.grad.eq(7.0).all()
    assert module.bias.grad is None
    assert torch.equal(state, torch.get_rng_state())
    return report


def one_rank_raises() -> ParityReport:
    """The last case: ranks that disagreed don't call each other again."""

    def fail(_: torch.Tensor) -> torch.Tensor:
        raise ValueError("on purpose")

    module = nn.Linear(4, 4)
    plant(module, fail)
    return check_parallel_parity(module, [draw(6, 4)], shard={0: 0})


CASES = (
    wan_fp32,
    wan_bf16,
    wan_sparse,
    wan_fault,
    wan_fault_in_backward,
    wan_other_weight,
    wan_shape,
    wan_only_attention,
    uneven_shards,
    uneven_by_default,
    partial_gradients,
    layer_mesh,
    own_loss,
    loss_that_is_no_sum,
    parameters_called_output,
    parameters_called_output_in_a_layer,
    gradients_are_left_alone,
    one_rank_raises,
)


def main() -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", PORT, SIZE, is_master=False, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=RANK, world_size=SIZE, timeout=timedelta(seconds=60))
    reports = {}
    for case in CASES:
        try:
            report = case()
            reports[case.__name__] = {"passed": report.passed, "text": str(report), "num": report.num_compared}
        except RanksDisagree as error:
            reports[case.__name__] = {"passed": None, "text": str(error), "num": 0}
        except Exception:  # noqa: BLE001  # the report of one case must not hide the others
            reports[case.__name__] = {"passed": None, "text": traceback.format_exc(), "num": 0}
    (FOLDER / f"{RANK}.json").write_text(json.dumps(reports))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
