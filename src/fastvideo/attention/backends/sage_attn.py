"""`SAGE_ATTN`: dense attention with 8-bit scores through the installed `sageattention`, for inference.

Papers: SageAttention, arXiv 2410.02367, and SageAttention2, arXiv 2411.10958. Queries and keys are rounded to 8 bits a block of
rows at a time, after the mean key is taken off, which changes no softmax; what multiplies the values is fp16 in release 1
and may be fp8 in release 2. The result is that of dense attention up to errors of about a hundredth, so no automatic selection
takes it; `fastvideo bench --backends SAGE_ATTN` prints the error on given shapes.

What the package does, and what follows: release 1 writes the smoothed keys over the caller's, so it gets a copy that is
smoothed here; it turns values into fp16, where bf16 ones above 65,504 become infinite; a scale of 0 makes it divide by 0.

Shape legend: B batch, S tokens, H heads, D head size.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from fastvideo.attention.backends.abstract import AttentionBackend, AttentionImpl, AttentionMetadata
from fastvideo.attention.backends.dense import DenseMetadataBuilder, common_rejections, with_positive_scale
from fastvideo.attention.request import AttentionRequest
from fastvideo.platforms import System, current_platform
from fastvideo.tangents import refuse_tangents

__all__ = ["SageAttentionBackend", "SageAttentionImpl"]

_PACKAGE = "sageattention"
_MINIMUM = (1, 0, 6)
_INSTALL = 'pip install "fastvideo-attention[sage]"'
_DTYPES = (torch.bfloat16, torch.float16)


class SageAttentionBackend(AttentionBackend):
    """8-bit attention by SageAttention; it runs only when named.

    Example:
        >>> from fastvideo.platforms import describe_system
        >>> request = AttentionRequest(8, 8, 80, 64, 64, torch.bfloat16, "cuda", system=describe_system("H200"))
        >>> SageAttentionBackend.rejections(request)
        ('head size 80 is not supported; expected 64 or 128, or 96 in release 1 of sageattention',)
    """

    layer_independent = True

    @staticmethod
    def get_name() -> str:
        """Return `"SAGE_ATTN"`."""
        return "SAGE_ATTN"

    @staticmethod
    def get_impl_cls() -> type[SageAttentionImpl]:
        """Return `SageAttentionImpl`."""
        return SageAttentionImpl

    @staticmethod
    def get_metadata_cls() -> type[AttentionMetadata]:
        """Return `AttentionMetadata`: nothing is needed."""
        return AttentionMetadata

    @staticmethod
    def get_builder_cls() -> type[DenseMetadataBuilder]:
        """Return `DenseMetadataBuilder`."""
        return DenseMetadataBuilder

    @classmethod
    def rejections(cls, request: AttentionRequest) -> tuple[str, ...]:
        """Return every reason against `request`: package, device, dtype, head size, scale 0, gradients, masks, log-sum-exp."""
        system = current_platform(request.device) if request.system is None else request.system
        reasons = [*super().rejections(request), *common_rejections(request), *_installation_rejections(system)]
        if request.device != "cuda":
            reasons.append(f"device {request.device!r} is not supported; expected cuda")
        elif system.platform != "cuda" or system.capability is None or system.capability < (8, 0):
            reasons.append(f"{system.device_name} is no NVIDIA GPU of compute capability 8.0 or newer, as its kernels need")
        if request.dtype not in _DTYPES:
            reasons.append(f"dtype {request.dtype} is not supported; expected torch.bfloat16 or torch.float16")
        sizes = (64, 96, 128) if _numbers(system)[:1] == (1,) else (64, 128)
        if request.head_size not in sizes:
            reasons.append(
                f"head size {request.head_size} is not supported; expected 64 or 128, or 96 in release 1 of {_PACKAGE}"
            )
        if request.softmax_scale == 0:
            reasons.append("scale 0 is not supported: queries are rounded after they are scaled; use TORCH_SDPA")
        if request.needs_grad:
            reasons.append("a gradient is not supported: 8-bit attention has no backward; use it under torch.no_grad()")
        return tuple(reasons)


def _numbers(system: System) -> tuple[int, ...]:
    """Numbers of the installed version; none where it is absent or unknown."""
    return tuple(map(int, re.findall(r"\d+", system.version_of(_PACKAGE) or "")))


def _installation_rejections(system: System) -> list[str]:
    if system.version_of(_PACKAGE) is None:
        return [f"{_PACKAGE} is not installed; {_INSTALL}"]
    numbers = _numbers(system)
    if numbers and numbers < _MINIMUM[: len(numbers)]:
        return [f"{_PACKAGE} {system.version_of(_PACKAGE)} is too old; {_INSTALL}"]
    return []


@torch.library.custom_op("fastvideo::sage_attention", mutates_args=())
def _sage_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, is_causal: bool) -> torch.Tensor:
    """Run the package on `[B, S, H, D]`; without an autograd formula, so that a gradient is an error and not zero."""
    from sageattention import sageattn

    query, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, value))
    # A new tensor: release 1 would write over the caller's keys.
    smooth = key - key.mean(dim=1, keepdim=True, dtype=torch.float32).to(key.dtype)
    output: torch.Tensor = sageattn(
        query, smooth.contiguous(), value, tensor_layout="NHD", is_causal=is_causal, sm_scale=scale, smooth_k=False
    )
    return output.contiguous()


@_sage_attention.register_fake
def _(query: torch.Tensor, *_rest: Any) -> torch.Tensor:
    return query.new_empty(query.shape)


class SageAttentionImpl(AttentionImpl[AttentionMetadata]):
    """Calls `sageattention`."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_metadata: AttentionMetadata | None,  # noqa: ARG002  # dense attention needs none
    ) -> torch.Tensor:
        """Return attention with 8-bit scores.

        Args:
            query: `[B, S_q, H, D]`.
            key: `[B, S_kv, H_kv, D]`, where `H_kv` divides `H`; not changed.
            value: `[B, S_kv, H_kv, D]`.
            attn_metadata: Ignored.

        Returns:
            `[B, S_q, H, D]` in the dtype of `query`.

        Raises:
            ValueError: The scale is 0.
            NotImplementedError: A gradient is needed, or an input has a forward-mode tangent.
        """
        refuse_tangents(query=query, key=key, value=value)
        if self.softmax_scale == 0:
            raise ValueError("SAGE_ATTN can't take a scale of 0, got softmax_scale=0; use TORCH_SDPA")
        if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
            raise NotImplementedError("SAGE_ATTN has no gradient; call it under torch.no_grad(), or use another backend")
        query, scale = with_positive_scale(query, self.softmax_scale)
        output: torch.Tensor = _sage_attention(query, key, value, scale, self.causal)
        return output
