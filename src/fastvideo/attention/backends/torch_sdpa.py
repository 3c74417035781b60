"""`TORCH_SDPA`: exact dense attention through PyTorch's own kernels, on any device and for every request.

Masks of every kind, causal, grouped-query and cross attention, any finite scale, dropout, and a differentiable
log-sum-exp. A row with nothing to attend to gives output 0, log-sum-exp -inf and gradients 0. On NVIDIA Hopper and
Blackwell, cuDNN's kernel is called directly where it is the fastest (`cudnn_refusals`), which needs no global switch;
elsewhere `scaled_dot_product_attention` picks.

Memory: kernels keep no scores, with these exceptions. Causal with a mask, and a 4-D mask, hold a mask of
`[B|1, H|1, S_q, S_kv]`; float64 on CUDA, and dropout on CPU, hold the scores; so does a log-sum-exp whose gradient
flows into a mask.

Shape legend: B batch, S tokens, H heads, D head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastvideo.attention.backends.abstract import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
)
from fastvideo.attention.backends.dense import DenseMetadataBuilder, common_rejections, with_positive_scale
from fastvideo.attention.request import AttentionRequest
from fastvideo.compilation import constant_while_tracing
from fastvideo.second_derivatives import differentiable_once_view

__all__ = ["TorchSDPABackend", "TorchSDPAImpl", "cudnn_refusals"]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_HALF_DTYPES = (torch.bfloat16, torch.float16)

# TFLOP/s, forward alone and forward with backward, bf16, head size 128, 32,768 tokens, on an H200. Only the order of
# backends on one machine follows from them, so they stand in for other cards too. Masked and float32 are estimates.
_SPEED_CUDNN = (600.0, 558.0)
_SPEED_FLASH = (353.0, 322.0)
_SPEED_MASKED = (150.0, 130.0)
_SPEED_FLOAT32 = (25.0, 20.0)
_SPEED_CPU = (0.1, 0.1)

_MAX_CHUNK_ELEMENTS = 2**26
"""Scores held at once where the log-sum-exp is computed in plain torch."""


class TorchSDPABackend(AttentionBackend):
    """PyTorch's scaled dot product attention.

    Example:
        >>> impl = TorchSDPABackend.get_impl_cls()(num_heads=2, head_size=8, softmax_scale=0.25)
        >>> impl.forward(*torch.ones(3, 1, 4, 2, 8), None).shape
        torch.Size([1, 4, 2, 8])
    """

    exact = True
    layer_independent = True

    @staticmethod
    def get_name() -> str:
        """Return `"TORCH_SDPA"`."""
        return "TORCH_SDPA"

    @staticmethod
    def get_impl_cls() -> type[TorchSDPAImpl]:
        """Return `TorchSDPAImpl`."""
        return TorchSDPAImpl

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
        """Return every reason against `request`: the device, the dtype, or what no dense backend does."""
        reasons = [*super().rejections(request), *common_rejections(request)]
        if request.device not in ("cpu", "cuda", "mps"):
            reasons.append(f"device {request.device!r} is not supported; expected cpu, cuda or mps")
        if request.dtype not in _DTYPES:
            reasons.append(f"dtype {request.dtype} is not supported; expected one of {', '.join(map(str, _DTYPES))}")
        if request.device == "mps" and request.dtype == torch.float64:
            reasons.append("dtype torch.float64 does not exist on mps; use float32")
        return tuple(reasons)

    @classmethod
    def expected_speed(cls, request: AttentionRequest) -> float:
        """Return TFLOP/s by the kernel that would run, as measured on an H200."""
        if request.device != "cuda":
            speed = _SPEED_CPU
        elif request.dtype not in _HALF_DTYPES:
            speed = _SPEED_FLOAT32
        elif request.mask is not None:
            speed = _SPEED_MASKED
        else:
            system = request.system
            refusals = cudnn_refusals(
                capability=system.capability if system is not None and system.platform == "cuda" else None,
                dtype=request.dtype,
                head_size=request.head_size,
                query_len=request.query_len,
                key_len=request.key_len,
                has_mask=False,
                dropout_p=request.dropout_p,
            )
            speed = _SPEED_FLASH if refusals else _SPEED_CUDNN
        return speed[1] if request.needs_grad else speed[0]


def cudnn_refusals(
    *,
    capability: tuple[int, int] | None,
    dtype: torch.dtype,
    head_size: int,
    query_len: int,
    key_len: int,
    has_mask: bool,
    dropout_p: float,
) -> tuple[str, ...]:
    """Return why cuDNN's attention kernel is not called directly; an empty tuple calls it.

    The limits are those of the kernel or narrower: masks and dropout stay with the kernels that have done them longest.

    Args:
        capability: Compute capability, `None` where the device is no NVIDIA GPU or cuDNN is switched off.
        dtype: Dtype of query, key and value.
        head_size: Size of a head.
        query_len: Query tokens.
        key_len: Key tokens.
        has_mask: A mask is given.
        dropout_p: Probability of dropping an attention weight.

    Example:
        >>> cudnn_refusals(capability=(9, 0), dtype=torch.bfloat16, head_size=128, query_len=4096, key_len=512,
        ...                has_mask=False, dropout_p=0.0)
        ()
    """
    checks = (
        (capability in ((9, 0), (10, 0)), f"compute capability is {capability}, not 9.0 or 10.0, or cuDNN is off"),
        (dtype in _HALF_DTYPES, f"dtype is {dtype}, not bfloat16 or float16"),
        (head_size <= 128, f"head size {head_size} is above 128"),
        (min(query_len, key_len) >= 128, f"{query_len} queries or {key_len} keys are fewer than 128"),
        (not has_mask, "there is a mask"),
        (dropout_p == 0, f"dropout_p is {dropout_p}"),
    )
    return tuple(reason for holds, reason in checks if not holds)


class TorchSDPAImpl(AttentionImpl[AttentionMetadata]):
    """Calls PyTorch's attention kernels."""

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
            attn_mask: Bool `[B, S_kv]` (key padding), bool or additive `[B|1, H|1, S_q, S_kv]`.
            dropout_p: Probability of dropping an attention weight; the log-sum-exp is that of all weights.
            return_lse: Return the log-sum-exp too.

        Returns:
            `[B, S_q, H, D]`, and with `return_lse` also `[B, S_q, H]` in float32 (float64 for float64 inputs).
        """
        query, scale = with_positive_scale(query, self.softmax_scale)
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        mask, is_causal, is_empty = _resolve_mask(attn_mask, self.causal, query.shape[1], key.shape[1])
        whole_samples = is_empty is not None and is_empty.shape[1:3] == (1, 1)
        if is_empty is not None and whole_samples:
            v = v.masked_fill(is_empty, 0)
        lse = None
        if return_lse:
            output, lse = _attend_with_lse(q, k, v, mask, is_causal, scale, dropout_p)
        else:
            output = _attend(q, k, v, mask, is_causal, scale, dropout_p)
        if is_empty is not None and not whole_samples:
            output = output.masked_fill(is_empty, 0)
        output = output.transpose(1, 2)
        if lse is None:
            return output
        if is_empty is not None:
            lse = lse.masked_fill(is_empty.squeeze(-1), -torch.inf)
        return output, lse.transpose(1, 2)


def _resolve_mask(
    attn_mask: torch.Tensor | None, is_causal: bool, query_len: int, key_len: int
) -> tuple[torch.Tensor | None, bool, torch.Tensor | None]:
    """Return a mask in which every row attends to something, whether causal is left to do, and which rows were empty.

    PyTorch's kernels differ on empty rows (0, NaN, the mean of all values), so an empty row is opened to all keys here,
    and its result is replaced by zeros, which also stops its gradients. The mask is broadcastable to
    `[B, H, S_q, S_kv]`, the empty rows to `[B, H, S_q, 1]`.
    """
    if attn_mask is None:
        return None, is_causal, None
    mask = attn_mask[:, None, None, :] if attn_mask.dim() == 2 else attn_mask
    is_bool = mask.dtype == torch.bool
    if is_causal:
        # No kernel takes both, so they are merged.
        allowed = torch.ones(query_len, key_len, dtype=torch.bool, device=mask.device).tril()
        mask = mask & allowed if is_bool else mask.masked_fill(~allowed, -torch.inf)
    if is_bool:
        is_empty = ~mask.any(-1, keepdim=True)
        return mask | is_empty, False, is_empty
    is_empty = (mask.detach() == -torch.inf).all(-1, keepdim=True)
    return mask.masked_fill(is_empty, 0), False, is_empty


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
) -> torch.Tensor:
    """Return attention of `[B, H, S, D]` tensors by the fastest kernel; `mask` excludes `is_causal`."""
    head_size = q.shape[-1]
    if _takes_cudnn(q, k, mask, dropout_p):
        return _cudnn(q, k, v, is_causal, scale)[0][..., :head_size]
    if q.device.type == "cuda":
        if mask is not None and q.dtype != torch.float64 and torch.version.hip is None:
            return _efficient(q, k, v, mask, is_causal, scale, dropout_p)[0]
        # Off multiples of 8, PyTorch falls back to holding all scores.
        q, k, v = (_pad_head(x) for x in (q, k, v))
    if _shares_heads_natively(q, mask):
        gqa = q.shape[1] != k.shape[1]
    else:
        k, v, gqa = _repeat_heads(k, q.shape[1]), _repeat_heads(v, q.shape[1]), False
    output = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=gqa
    )
    return output[..., :head_size]


def _attend_with_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention and a differentiable log-sum-exp `[B, H, S_q]` of `[B, H, S, D]` tensors."""
    if mask is not None and mask.requires_grad and torch.is_grad_enabled():
        # The gradient of the mask is as large as the scores, so nothing is lost by holding them.
        return _attend(q, k, v, mask, is_causal, scale, dropout_p), _scores(q, k, mask, is_causal, scale).logsumexp(-1)
    output, lse = _kernel_with_lse(q, k, v, mask, is_causal, scale)
    if dropout_p > 0:
        output = _attend(q, k, v, mask, is_causal, scale, dropout_p)
    lse = lse.detach()
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        # Kernels give no gradient through the log-sum-exp. With P the attention weights, it is `scale * P @ k` for the
        # query and `scale * P^T @ q` for the key: the gradients of `q . attention(q', k', value=k)`, primes detached.
        # Those gradients take P for a constant, so they have none themselves.
        q, k = differentiable_once_view(q), differentiable_once_view(k)
        mean_key = _attend(q.detach(), k.detach(), k, mask, is_causal, scale, 0.0)
        linear = scale * (q.to(lse.dtype) * mean_key.to(lse.dtype)).sum(-1)
        lse = lse + (linear - linear.detach())
    return output, lse


def _kernel_with_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, is_causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return differentiable attention and the value of the log-sum-exp, `[B, H, S_q]`."""
    num_heads, query_len, head_size = q.shape[1:]
    if _takes_cudnn(q, k, mask, 0.0):
        output, lse = _cudnn(q, k, v, is_causal, scale, needs_lse=True)
        return output[..., :head_size], lse.reshape(q.shape[0], num_heads, query_len)
    if q.device.type == "cpu":
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        k, v = _repeat_heads(k, num_heads), _repeat_heads(v, num_heads)
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, is_causal, attn_mask=_as_bias(mask, q.dtype), scale=scale
        )
        return output, lse
    if q.device.type == "cuda" and q.dtype != torch.float64:
        return _efficient(q, k, v, mask, is_causal, scale, 0.0)
    return _attend(q, k, v, mask, is_causal, scale, 0.0), _chunked_lse(q, k, mask, is_causal, scale)


def _efficient(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call the memory-efficient CUDA kernel, which takes every mask; return the output and the log-sum-exp `[B, H, S_q]`.

    It is called by name where there is a mask: what PyTorch would pick, cuDNN's kernel, gave wrong gradients for a mask
    broadcast over queries on an H200 (torch 2.11).
    """
    num_heads, query_len, head_size = q.shape[1:]
    q, k, v = (_pad_head(x) for x in (q, k, v))
    k, v = _repeat_heads(k, num_heads), _repeat_heads(v, num_heads)
    bias = _as_bias(mask, q.dtype)
    if bias is not None:
        bias = _aligned(bias).expand(q.shape[0], num_heads, query_len, k.shape[2])
    output, lse = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, bias, True, dropout_p, is_causal, scale=scale
    )[:2]
    # The kernel rounds the number of rows up.
    return output[..., :head_size], lse[..., :query_len]


def _takes_cudnn(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, dropout_p: float) -> bool:
    if q.device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        return False
    return not cudnn_refusals(
        capability=_cudnn_capability(q.device.index),
        dtype=q.dtype,
        head_size=q.shape[-1],
        query_len=q.shape[2],
        key_len=k.shape[2],
        has_mask=mask is not None,
        dropout_p=dropout_p,
    )


@constant_while_tracing
def _cudnn_capability(device_index: int) -> tuple[int, int] | None:
    """Return the compute capability, or `None` where cuDNN's attention doesn't exist or is switched off."""
    is_enabled = torch.backends.cudnn.is_available() and torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]  # in torch
    return torch.cuda.get_device_capability(device_index) if is_enabled and torch.version.hip is None else None


def _cudnn(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool, scale: float, *, needs_lse: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call cuDNN's kernel; its backward needs the log-sum-exp, so that is computed for training too."""
    num_heads = q.shape[1]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in map(_pad_head, (q, k, v)))
    k, v = _repeat_heads(k, num_heads), _repeat_heads(v, num_heads)
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    output, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, needs_lse or needs_grad, 0.0, is_causal, False, scale=scale
    )[:2]
    return output, lse


def _shares_heads_natively(q: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Return whether the kernel that PyTorch picks reads grouped heads without holding all scores."""
    if q.device.type == "cpu":
        return True
    is_nvidia = q.device.type == "cuda" and torch.version.hip is None
    return is_nvidia and mask is None and q.dtype in _HALF_DTYPES and q.shape[-1] <= 256


def _repeat_heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], dim=1)


def _pad_head(x: torch.Tensor) -> torch.Tensor:
    """Return `x` with zeros appended to the head, up to a multiple of 8; they change no score."""
    return x if x.shape[-1] % 8 == 0 else F.pad(x, (0, -x.shape[-1] % 8))


def _as_bias(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)


def _aligned(bias: torch.Tensor) -> torch.Tensor:
    """Return `bias` in memory whose rows start at multiples of 16 elements, as the CUDA kernel reads them."""
    key_len = bias.shape[-1]
    return F.pad(bias, (0, -key_len % 16))[..., :key_len]


def _scores(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, is_causal: bool, scale: float) -> torch.Tensor:
    """Return the masked scores, `[B, H, S_q, S_kv]`, in float32 at least."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        scores = (q.to(dtype) * scale) @ _repeat_heads(k, q.shape[1]).to(dtype).mT
    if is_causal:
        is_later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        return scores.masked_fill(is_later, -torch.inf)
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(dtype)


@torch.no_grad()
def _chunked_lse(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, is_causal: bool, scale: float) -> torch.Tensor:
    """Return the log-sum-exp, `[B, H, S_q]`, a few query rows at a time, for devices whose kernels don't return it."""
    batch, num_heads, query_len = q.shape[:3]
    key_len = k.shape[2]
    if is_causal:
        mask = torch.ones(query_len, key_len, dtype=torch.bool, device=q.device).tril()[None, None]
    rows = max(1, _MAX_CHUNK_ELEMENTS // (batch * num_heads * key_len))
    chunks = []
    for start in range(0, query_len, rows):
        part = mask if mask is None or mask.shape[2] == 1 else mask[:, :, start : start + rows]
        chunks.append(_scores(q[:, :, start : start + rows], k, part, False, scale).logsumexp(-1))
    return torch.cat(chunks, dim=-1)
