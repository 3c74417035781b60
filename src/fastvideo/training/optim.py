"""Optimisers over float32 master weights: AdamW, Muon for the blocks' matrices, and an average of the weights.

Muon (arXiv 2502.16982) replaces a matrix's momentum by its nearest semi-orthogonal matrix, found by a Newton-Schulz
iteration, scaled by `0.2 sqrt(max(rows, columns))` so that an update has the root mean square of AdamW's. Matrices of one
shape are orthogonalised together in one batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastvideo.training.config import TrainConfig

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor, num_steps: int = 5) -> Tensor:
    """Move all singular values of matrices close to 1 by a quintic Newton-Schulz iteration.

    Args:
        matrices: `[N, rows, columns]`.
        num_steps: Iterations.

    Returns:
        `[N, rows, columns]`, bfloat16 on CUDA and float32 elsewhere.

    Example:
        >>> singular = torch.linalg.svdvals(orthogonalize(torch.diag(torch.tensor([3.0, 1.0, 0.5]))[None])[0])
        >>> bool(((singular > 0.6) & (singular < 1.3)).all())
        True
    """
    a, b, c = _NEWTON_SCHULZ
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = x.to(torch.bfloat16 if matrices.device.type == "cuda" else torch.float32)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-7)
    for _ in range(num_steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    balanced: Tensor = x.mT if is_tall else x
    return balanced


class Muon(torch.optim.Optimizer):
    """Nesterov momentum with orthogonalised updates, for matrices.

    Args:
        params: Matrices, or parameter groups of matrices.
        lr: Learning rate.
        momentum: Decay of the momentum.
        weight_decay: Decoupled.

    Raises:
        ValueError: A parameter is no matrix.

    Example:
        >>> weight = nn.Parameter(torch.eye(2))
        >>> optimizer = Muon([weight], lr=0.1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> bool(weight.diagonal().max() < 1)
        True
    """

    def __init__(self, params: Any, lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(f"Muon takes matrices, got a parameter of shape {tuple(parameter.shape)}.")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002  # torch's signature
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            by_shape: defaultdict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                self._update(group, shape, parameters)

    def _update(self, group: dict[str, Any], shape: torch.Size, parameters: list[Tensor]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        momenta = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])
        updates = orthogonalize(torch.stack(list(ahead))).to(parameters[0].dtype)
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, list(updates.unbind()), alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


class MasterWeights:
    """Float32 copies of a model's parameters, which the optimisers update, and their running average.

    Attributes:
        names: Names of the parameters.
        masters: Float32 parameters, in that order.
        average: Float32 averages, in that order.
    """

    def __init__(self, module: nn.Module) -> None:
        named = list(module.named_parameters())
        self.names = [name for name, _ in named]
        self._parameters = [parameter for _, parameter in named]
        self.masters = [nn.Parameter(parameter.detach().float().clone()) for parameter in self._parameters]
        self.average = [master.detach().clone() for master in self.masters]

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Copy the model's gradients to the masters and drop them from the model."""
        for parameter, master in zip(self._parameters, self.masters, strict=True):
            if parameter.grad is not None and master.grad is None:
                master.grad = torch.empty_like(master)
        pairs = [
            (master.grad, parameter.grad)
            for parameter, master in zip(self._parameters, self.masters, strict=True)
            if parameter.grad is not None and master.grad is not None
        ]
        torch._foreach_copy_([wide for wide, _ in pairs], [narrow for _, narrow in pairs])
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def update_average(self, decay: float) -> None:
        """Move the averages towards the masters by a share of `1 - decay`."""
        torch._foreach_lerp_(self.average, list(self.masters), 1 - decay)

    @torch.no_grad()
    def write(self, *, average: bool = False) -> None:
        """Write the masters, or their averages, into the model."""
        torch._foreach_copy_(list[Tensor](self._parameters), self.average if average else list(self.masters))


def build_optimizers(config: TrainConfig, weights: MasterWeights) -> list[torch.optim.Optimizer]:
    """Optimisers for all master weights; each group carries its peak learning rate as "peak".

    Matrices of transformer blocks go to Muon if the configuration asks for it; embeddings, tables, norms, the first and
    the last layer always go to AdamW, with weight decay on matrices only.
    """
    matrices, others, vectors = [], [], []
    for name, master in zip(weights.names, weights.masters, strict=True):
        if config.optimizer == "muon" and master.ndim == 2 and "blocks." in name:
            matrices.append(master)
        elif master.ndim >= 2 and "embedding" not in name and "scale_shift_table" not in name:
            others.append(master)
        else:
            vectors.append(master)
    fused = weights.masters[0].device.type == "cuda"
    groups = [
        {"params": others, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), eps=1e-8, fused=fused)
    ]
    if matrices:
        optimizers.append(Muon(matrices, lr=config.muon_learning_rate, weight_decay=config.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def set_learning_rates(optimizers: Sequence[torch.optim.Optimizer], factor: float) -> None:
    """Set every group's learning rate to `factor` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
