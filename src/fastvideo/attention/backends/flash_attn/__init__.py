"""`FLASH_ATTN`: exact dense attention through the flash-attention packages, the fastest installed one that fits.

Generations, each a distribution of its own: FlashAttention-4 (`flash-attn-4`, CuTe kernels compiled at first use),
FlashAttention-3 (`flash-attn-3`, or `fa3-fwd`, which has a forward only) and FlashAttention-2 (`flash-attn`). Which one
runs is a function of the request and the system alone (`choose_generation`). Nothing is imported before the first call.

Key padding goes through the variable-length kernels: keys that are attended to move to the front, in order, by tensor
operations of fixed shapes, so nothing waits for the device. A sample whose keys are all padding attends to one key and
value of zeros, which makes its output and its gradients 0; its log-sum-exp is set to -inf.

Shape legend: B batch, S tokens, H heads, D head size.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F

from fastvideo.attention.backends.abstract import AttentionBackend, AttentionImpl, AttentionMetadata
from fastvideo.attention.backends.dense import DenseMetadataBuilder, common_rejections, with_positive_scale
from fastvideo.attention.backends.flash_attn.generations import GENERATIONS, Generation, choose_generation
from fastvideo.attention.backends.flash_attn.kernels import NOT_PACKED, Lengths
from fastvideo.attention.request import AttentionRequest
from fastvideo.compilation import constant_while_tracing
from fastvideo.platforms import current_platform

__all__ = ["FlashAttentionBackend", "FlashAttentionImpl", "Generation", "choose_generation"]

_HALF_DTYPES = (torch.bfloat16, torch.float16)


class FlashAttentionBackend(AttentionBackend):
    """FlashAttention-4, -3 or -2.

    Example:
        >>> from fastvideo.platforms import describe_system
        >>> request = AttentionRequest(8, 8, 128, 64, 64, torch.float32, "cuda", system=describe_system("H200"))
        >>> FlashAttentionBackend.rejections(request)
        ('dtype torch.float32 is not supported; expected torch.bfloat16 or torch.float16',)
    """

    exact = True
    layer_independent = True

    @staticmethod
    def get_name() -> str:
        """Return `"FLASH_ATTN"`."""
        return "FLASH_ATTN"

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        """Return `FlashAttentionImpl`."""
        return FlashAttentionImpl

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
        """Return every reason against `request`: those of any generation first, then those of each that remain."""
        reasons = [*super().rejections(request), *common_rejections(request)]
        system = current_platform(request.device) if request.system is None else request.system
        if request.device != "cuda":
            reasons.append(f"device {request.device!r} is not supported; expected cuda")
        elif system.platform != "cuda":
            reasons.append(f"{system.device_name} is not an NVIDIA GPU, for which these packages are built")
        if request.dtype not in _HALF_DTYPES:
            reasons.append(f"dtype {request.dtype} is not supported; expected torch.bfloat16 or torch.float16")
        if request.mask in ("bool", "additive"):
            reasons.append(f"a full {request.mask} mask is not supported; key padding, a bool [B, S_kv], is")
        if request.mask == "key_padding" and request.is_causal:
            reasons.append("causal with key padding is not supported: padded keys are moved, which changes positions")
        return (*reasons, *choose_generation(request, system)[1])

    @classmethod
    def expected_speed(cls, request: AttentionRequest) -> float:
        """Return TFLOP/s of the generation that would run, as measured on an H200."""
        system = current_platform(request.device) if request.system is None else request.system
        generation, _ = choose_generation(request, system)
        return 0.0 if generation is None else generation.speed[request.needs_grad]


class FlashAttentionImpl(AttentionImpl[AttentionMetadata]):
    """Calls the generation of FlashAttention that `choose_generation` names."""

    def forward(  # type: ignore[override]  # the contract has no log-sum-exp, so no pair
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_metadata: AttentionMetadata | None,  # noqa: ARG002  # dense attention needs none
        *,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        return_lse: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return attention, and with `return_lse` the natural log-sum-exp of the scores too.

        Args:
            query: `[B, S_q, H, D]`.
            key: `[B, S_kv, H_kv, D]`, where `H_kv` divides `H`.
            value: `[B, S_kv, H_kv, D]`.
            attn_metadata: Ignored.
            attn_mask: Key padding, bool `[B, S_kv]`.
            dropout_p: Probability of dropping an attention weight; FlashAttention-2 only.
            return_lse: Return the log-sum-exp too; its gradient needs FlashAttention-4.

        Returns:
            `[B, S_q, H, D]`, and with `return_lse` also `[B, S_q, H]` in float32.

        Raises:
            NotImplementedError: No installed generation can run this; the message has every reason.
        """
        needs_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
        mask = None if attn_mask is None else "key_padding" if attn_mask.dim() == 2 else "bool"
        index = _generation_here(
            self.head_size, query.dtype, query.device.type, self.causal, mask, dropout_p > 0, needs_grad, return_lse
        )
        run = GENERATIONS[index].run
        lse: torch.Tensor | None
        query, scale = with_positive_scale(query, self.softmax_scale)
        if attn_mask is None:
            output, lse = run(query, key, value, NOT_PACKED, scale, self.causal, dropout_p, return_lse)
            return output if lse is None or not return_lse else (output, lse.transpose(1, 2))
        batch, query_len = query.shape[:2]
        key, value, lengths = _pack_keys(key, value, attn_mask, query_len)
        output, lse = run(query.flatten(0, 1), key, value, lengths, scale, self.causal, dropout_p, return_lse)
        output = output.view(batch, query_len, *output.shape[1:])
        if lse is None or not return_lse:
            return output
        lse = lse.view(-1, batch, query_len).permute(1, 2, 0)
        return output, lse.masked_fill(~attn_mask.any(1)[:, None, None], -torch.inf)


@constant_while_tracing
def _generation_here(*call: Any) -> int:
    """Return the index in `GENERATIONS` of the one that runs a call on the machine at hand."""
    return _cached_generation(*call)


@functools.cache
def _cached_generation(
    head_size: int,
    dtype: torch.dtype,
    device: str,
    is_causal: bool,
    mask: str | None,
    has_dropout: bool,
    needs_grad: bool,
    needs_lse: bool,
) -> int:
    """Return the index in `GENERATIONS`; numbers of tokens and heads play no part in the choice.

    Raises:
        NotImplementedError: None can run this; the message has every reason.
    """
    system = current_platform(device)
    request = AttentionRequest(
        num_heads=1,
        num_kv_heads=1,
        head_size=head_size,
        query_len=1,
        key_len=1,
        dtype=dtype,
        device=device,
        is_causal=is_causal,
        mask=mask,
        dropout_p=0.5 if has_dropout else 0.0,
        needs_grad=needs_grad,
        needs_lse=needs_lse,
        system=system,
    )
    if reasons := FlashAttentionBackend.rejections(request):
        raise NotImplementedError("FLASH_ATTN can't run this; choose TORCH_SDPA, or see to\n  " + "\n  ".join(reasons))
    chosen, _ = choose_generation(request, system)
    return next(index for index, generation in enumerate(GENERATIONS) if generation is chosen)


def _pack_keys(
    key: torch.Tensor, value: torch.Tensor, key_padding: torch.Tensor, query_len: int
) -> tuple[torch.Tensor, torch.Tensor, Lengths]:
    """Return keys and values, `[B * S_kv, H_kv, D]`, with those attended to in front, sample by sample.

    What follows them is zero, and `masked_fill` keeps whatever a kernel leaves in its gradient from flowing on. A sample
    without any key keeps its first slot, zeroed.
    """
    batch, key_len = key_padding.shape
    is_empty = ~key_padding.any(1, keepdim=True)
    has_slot = torch.cat([key_padding[:, :1] | is_empty, key_padding[:, 1:]], dim=1)
    order = torch.argsort((~has_slot).flatten().to(torch.uint8), stable=True)
    is_padding = ~key_padding.flatten()[order][:, None, None]
    key, value = (x.flatten(0, 1).index_select(0, order).masked_fill(is_padding, 0) for x in (key, value))
    cu_key_lens = F.pad(has_slot.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    cu_query_lens = torch.arange(batch + 1, dtype=torch.int32, device=key.device) * query_len
    return key, value, (cu_query_lens, cu_key_lens, query_len, key_len)
