"""Several devices as one: the mesh, the sharded model, and what is summed between them.

The mesh has the dims "data" (each holds other examples) and "ulysses" (each holds a share of the tokens of the same examples).
Parameters, gradients and optimiser states are sharded over both by FSDP2. FSDP averages gradients over all devices; with a
device's loss taken whole, as the mean over its own examples, that average is the gradient of the mean loss.

A few small parameters stay whole on every device and in float32: what FSDP narrows, it narrows together with the rest of its
unit, and errors in these reach every token (`_REPLICATED`). The timestep embedder is a unit of its own, in float32.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from fastvideo.compilation import compiled_for_training
from fastvideo.models.wan import WanConfig, WanTransformer3DModel
from fastvideo.models.wan.config import AttentionKind
from fastvideo.settings import Settings
from fastvideo.training.finetune.config import Precision
from fastvideo.training.finetune.origin import Origin

__all__ = ["Devices", "average_replicated", "clip_gradients", "devices", "load_sharded", "local", "shard_model"]

_REPLICATED = ("scale_shift_table", "norm2")


@dataclass(frozen=True)
class Devices:
    """The devices of a run and this process's place among them.

    Attributes:
        device: This process's device.
        mesh: Dims "data" and "ulysses".
        shard: The same devices along one dim, over which parameters are sharded.
    """

    device: torch.device
    mesh: DeviceMesh
    shard: DeviceMesh

    @property
    def rank(self) -> int:
        """This process among all."""
        return dist.get_rank()

    @property
    def size(self) -> int:
        """Number of processes."""
        return dist.get_world_size()

    @property
    def data(self) -> tuple[int, int]:
        """This process's place along "data", and how many there are."""
        return self.mesh["data"].get_local_rank(), self.mesh["data"].size()

    def mean(self, values: Tensor) -> Tensor:
        """Average float64 numbers over all processes; waits for the devices."""
        total = values.to(self.device, torch.float32 if self.device.type == "mps" else torch.float64)
        dist.all_reduce(total)
        return total.cpu() / self.size


@contextlib.contextmanager
def devices(device: str | None = None, sequence_parallel: int = 1) -> Iterator[Devices]:
    """Join the processes that `torchrun` started, or be one alone, and lay the mesh over them.

    Args:
        device: "cpu" or "cuda"; `None` means cuda where there is one.
        sequence_parallel: How many devices share the tokens of an example.

    Raises:
        ValueError: The number of processes is no multiple of `sequence_parallel`.
    """
    local_rank = Settings.from_environment().local_rank
    kind = torch.device(device).type if device else "cuda" if torch.cuda.is_available() else "cpu"
    place = torch.device(kind, int(local_rank or 0)) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(place)
    # Gloo beside NCCL, for what checkpoints say to each other on the CPU.
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    timeout = datetime.timedelta(minutes=30)
    if local_rank is None:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)  # type: ignore[attr-defined]  # in torch
    else:
        dist.init_process_group(backend, timeout=timeout)
    try:
        size = dist.get_world_size()
        if sequence_parallel < 1 or size % sequence_parallel:
            raise ValueError(f"{size} processes can't be divided into groups of sequence_parallel={sequence_parallel}")
        shape = (size // sequence_parallel, sequence_parallel)
        mesh = init_device_mesh(kind, shape, mesh_dim_names=("data", "ulysses"))
        yield Devices(place, mesh, mesh._flatten("shard"))
    finally:
        dist.destroy_process_group()


def shard_model(
    model: WanTransformer3DModel, on: Devices, precision: Precision, compiler: str | None = None
) -> WanTransformer3DModel:
    """Shard a model over all devices, in place, block by block.

    Args:
        model: Float32, equal on all devices, or on the meta device.
        on: The devices.
        precision: Of weights in computation.
        compiler: `torch.compile` each block whole with this backend, equal blocks sharing a graph; `None` compiles nothing.
    """
    narrow = torch.bfloat16 if precision == "bfloat16" else None
    # Inputs are never cast: timesteps and rotary tables stay wide.
    policy = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32, cast_forward_inputs=False)
    wide = MixedPrecisionPolicy(cast_forward_inputs=False)
    ignored = {parameter for name, parameter in model.named_parameters() if is_replicated(name)}
    for block in model.blocks:
        if compiler is not None:
            # The function and not the module, so that FSDP's hooks stay outside of the graph.
            block.forward = torch.compile(block.forward, fullgraph=True, **compiled_for_training(compiler))
        fully_shard(block, mesh=on.shard, mp_policy=policy, ignored_params=ignored)
    fully_shard(model.condition_embedder.time_embedder, mesh=on.shard, mp_policy=wide)
    fully_shard(model, mesh=on.shard, mp_policy=policy, ignored_params=ignored)
    return model


def load_sharded(
    origin: Origin, attention: AttentionKind, on: Devices, precision: Precision, compiler: str | None = None
) -> WanTransformer3DModel:
    """Load a checkpoint into a sharded model; one process reads it, and no device ever holds it whole.

    Args:
        origin: The checkpoint.
        attention: Kind of self attention, as for `WanTransformer3DModel.load`.
        on: Where.
        precision: Of weights in computation; masters are float32.
        compiler: As for `shard_model`.

    Raises:
        FileNotFoundError: The checkpoint lacks its weights.
    """
    whole = origin.load(attention) if on.rank == 0 else None
    described = [None if whole is None else whole.config.to_dict()]
    dist.broadcast_object_list(described, src=0)
    with torch.device("meta"):
        model = WanTransformer3DModel(WanConfig.from_dict(described[0] or {}))
    shard_model(model, on, precision, compiler)
    model.to_empty(device=on.device)
    weights = {} if whole is None else whole.state_dict()
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    return model


def is_replicated(name: str) -> bool:
    """Whether a parameter stays whole on every device.

    Example:
        >>> is_replicated("blocks.0.norm2.weight"), is_replicated("blocks.0.attn1.norm_q.weight")
        (True, False)
    """
    return any(part in name.split(".") for part in _REPLICATED)


def local(tensor: Tensor) -> Tensor:
    """Return this device's part of a tensor, sharing memory."""
    part: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return part


@torch.no_grad()
def average_replicated(model: nn.Module) -> None:
    """Average the gradients of whole parameters over all devices, in one message."""
    grads = [p.grad for p in model.parameters() if p.grad is not None and not isinstance(p.grad, DTensor)]
    if not grads or dist.get_world_size() == 1:
        return
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    parts = torch.split(flat, [grad.numel() for grad in grads])
    torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(parts, grads, strict=True)])


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale gradients down to a global norm; return the norm before, a scalar on the device. Waits for nothing."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    sharded = [local(grad) for grad in grads if isinstance(grad, DTensor)]
    whole = [grad for grad in grads if not isinstance(grad, DTensor)]
    total = _sum_of_squares(sharded)
    dist.all_reduce(total)
    norm = (total + _sum_of_squares(whole)).sqrt()
    torch._foreach_mul_([*sharded, *whole], (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _sum_of_squares(tensors: list[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors)).square().sum()
