"""The generations of flash-attention, what each refuses, and which one runs a request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastvideo.attention.backends.flash_attn.kernels import run_fa2, run_fa3, run_fa3_forward, run_fa4
from fastvideo.attention.request import AttentionRequest
from fastvideo.platforms import System
from fastvideo.platforms.system import is_older

__all__ = ["GENERATIONS", "Generation", "choose_generation"]


@dataclass(frozen=True)
class Generation:
    """One flash-attention package.

    Attributes:
        name: Name for people.
        package: Distribution.
        minimum: Numbers of the oldest version that is known to work.
        install: Command that installs it.
        majors: Major compute capabilities that it runs on.
        speed: TFLOP/s in bf16, forward alone and forward with backward.
        limits: What it refuses beyond that.
        run: The function of `kernels.py` that calls it.
        needs: Distributions that it can't run without.
    """

    name: str
    package: str
    minimum: tuple[int, ...]
    install: str
    majors: tuple[int, ...]
    speed: tuple[float, float]
    limits: Callable[[AttentionRequest, System], list[str]]
    run: Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
    needs: tuple[str, ...] = ()

    def rejections(self, request: AttentionRequest, system: System) -> tuple[str, ...]:
        """Return every reason why this generation can't run `request` on `system`, each with its name."""
        reasons = []
        version = system.version_of(self.package)
        if version is None:
            reasons.append(f"not installed; {self.install}")
        else:
            if is_older(version, self.minimum):
                reasons.append(f"version {version} is too old; {self.install}")
            reasons += [f"{name} is missing; {self.install}" for name in self.needs if system.version_of(name) is None]
        capability = system.capability if system.platform == "cuda" else None
        if capability is None or capability[0] not in self.majors:
            found = "none" if capability is None else "{}.{}".format(*capability)
            wanted = ", ".join(f"{major}.x" for major in self.majors)
            reasons.append(f"needs compute capability {wanted}; {system.device_name} has {found}")
        reasons += self.limits(request, system)
        return tuple(f"{self.name} ({self.package}): {reason}" for reason in reasons)


def choose_generation(request: AttentionRequest, system: System) -> tuple[Generation | None, tuple[str, ...]]:
    """Return the fastest generation that accepts `request` on `system`, or `None` with every generation's reasons.

    Example:
        >>> from fastvideo.platforms import describe_system
        >>> request = AttentionRequest(8, 8, 128, 4096, 4096, torch.bfloat16, "cuda", needs_grad=True)
        >>> choose_generation(request, describe_system("H200"))[0].package
        'flash-attn-4'
    """
    reasons = [(generation, generation.rejections(request, system)) for generation in GENERATIONS]
    fitting = [generation for generation, why_not in reasons if not why_not]
    if fitting:
        return max(fitting, key=lambda generation: generation.speed[request.needs_grad]), ()
    return None, tuple(reason for _, why_not in reasons for reason in why_not)


def _limits_fa4(request: AttentionRequest, system: System) -> list[str]:
    is_blackwell = system.capability is not None and system.capability[0] in (10, 11)
    size, largest = request.head_size, 128 if is_blackwell else 256
    reasons = []
    if size % 8 or (size > largest and size != 256):
        also = " or 256" if is_blackwell else ""
        reasons.append(f"head size {size} is not supported; expected a multiple of 8 up to {largest}{also}")
    if request.needs_grad and request.needs_lse and size == 256 and is_blackwell:
        reasons.append("a gradient through the log-sum-exp is not supported at head size 256")
    if request.dropout_p > 0:
        reasons.append(f"dropout (dropout_p={request.dropout_p}) is not supported")
    return reasons


def _limits_fa3(request: AttentionRequest, system: System) -> list[str]:  # noqa: ARG001  # one signature for all
    reasons = []
    if request.head_size % 8 or request.head_size > 256:
        reasons.append(f"head size {request.head_size} is not supported; expected a multiple of 8 up to 256")
    if request.dropout_p > 0:
        reasons.append(f"dropout (dropout_p={request.dropout_p}) is not supported")
    if request.needs_grad and request.needs_lse:
        reasons.append("a gradient through the log-sum-exp is not supported")
    return reasons


def _limits_fa3_fwd(request: AttentionRequest, system: System) -> list[str]:
    reasons = _limits_fa3(request, system)
    if request.dtype == torch.float16:
        reasons.append("dtype torch.float16 is not in this build; expected torch.bfloat16")
    if request.needs_grad:
        reasons.append("a gradient is not supported: the package has no backward")
    return reasons


def _limits_fa2(request: AttentionRequest, system: System) -> list[str]:
    reasons = []
    if request.head_size > 256:
        reasons.append(f"head size {request.head_size} is not supported; expected at most 256")
    if request.needs_grad and request.needs_lse:
        reasons.append("a gradient through the log-sum-exp is not supported")
    if request.dropout_p > 0 and request.needs_lse:
        reasons.append("the log-sum-exp together with dropout is not supported: it would keep all attention weights")
    has_big_memory = system.capability in ((8, 0), (9, 0), (10, 0))
    if request.dropout_p > 0 and request.needs_grad and request.head_size > 192 and not has_big_memory:
        reasons.append(f"a gradient with dropout at head size {request.head_size} needs an A100, H100 or B200")
    return reasons


# Speeds of FlashAttention-4 and of the forward of FlashAttention-3 were measured on an H200 at 32,768 tokens and head
# size 128. The backward of FlashAttention-3 is an estimate. FlashAttention-2 is the kernel that PyTorch ships, so it
# stands a little below it: the package pays off where PyTorch has no kernel, as with key padding.
GENERATIONS = (
    Generation(
        "FlashAttention-4",
        "flash-attn-4",
        (4, 0, 0, 36),
        'pip install "flash-attn-4[cu13]>=4.0.0b36"',
        (9, 10, 11),
        (683.0, 643.0),
        _limits_fa4,
        run_fa4,
        needs=("nvidia-cutlass-dsl",),
    ),
    Generation(
        "FlashAttention-3",
        "flash-attn-3",
        (3,),
        'pip install "git+https://github.com/Dao-AILab/flash-attention.git#subdirectory=hopper"',
        (9,),
        (689.0, 580.0),
        _limits_fa3,
        run_fa3,
    ),
    Generation(
        "FlashAttention-3 forward",
        "fa3-fwd",
        (0, 0, 3),
        'pip install "fa3-fwd>=0.0.3"',
        (9,),
        (688.0, 0.0),
        _limits_fa3_fwd,
        run_fa3_forward,
    ),
    Generation(
        "FlashAttention-2",
        "flash-attn",
        (2, 8),
        'pip install "flash-attn>=2.8" --no-build-isolation',
        (8, 9, 10, 12),
        (350.0, 320.0),
        _limits_fa2,
        run_fa2,
    ),
)
