"""A backend's attention over some of the keys, and its gradients when the result over all keys is known.

Ring attention computes with the keys of one rank at a time and merges by log-sum-exp. With the merged output and
log-sum-exp, a kernel's own backward pass gives each part's exact share of the gradients (2310.01889), at no more work than the
backward pass on one device. The kernels of `TORCH_SDPA` and FlashAttention-4 are called so. Another backend's forward pass is
run again under autograd, which needs a differentiable log-sum-exp, costs that forward pass, and can't be compiled.

Shape legend: B batch, S tokens, H heads, D head size.
"""

from __future__ import annotations

import torch

from fastvideo.attention.backends import torch_sdpa
from fastvideo.attention.backends.dense import with_positive_scale
from fastvideo.attention.backends.flash_attn.kernels import NOT_PACKED
from fastvideo.attention.dispatch import Selected

__all__ = ["BackendParts"]

_aten = torch.ops.aten


class BackendParts:
    """Computes parts by the backend that was selected, as `fastvideo.distributed.ring.PartKernels` asks.

    Args:
        selected: The implementation for parts without causal.
        causal: That for the diagonal; `None` where attention isn't causal.
        scale: Factor of the scores.
    """

    def __init__(self, selected: Selected, causal: Selected | None, scale: float) -> None:
        self._selected = selected
        self._causal = selected if causal is None else causal
        self._scale = scale

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, is_causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the output over these keys, `[B, S_q, H, D]`, and its log-sum-exp, `[B, S_q, H]`."""
        extras = {"return_lse": True} if mask is None else {"return_lse": True, "attn_mask": mask}
        output, lse = (self._causal if is_causal else self._selected).forward(query, key, value, None, extras)
        return output, lse

    def backward(
        self,
        grad_output: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor,
        mask: torch.Tensor | None,
        is_causal: bool,
        mask_needs_grad: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return the gradients of query, key, value and mask; `output` and the finite `lse` are those over all keys."""
        arguments = (grad_output, query, key, value, output, lse, mask, is_causal)
        if not self._has_kernel(is_causal, mask is not None):
            return self._gradients_by_autograd(*arguments, mask_needs_grad)
        positive, factor = with_positive_scale(query, self._scale)
        arguments = (grad_output, positive, key, value, output, lse, mask, is_causal)
        grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]
        if self._name(is_causal) == "FLASH_ATTN":
            grads = _flash_gradients(grad_output, positive, key, value, output, lse, is_causal, factor)
        else:
            grads = _sdpa_gradients(*arguments, mask_needs_grad, factor)
        sign = 0 if self._scale == 0 else -1
        return grads if self._scale > 0 else (grads[0] * sign, *grads[1:])

    def check_compilable(self, needs_grad: bool, has_mask: bool) -> None:
        """Refuse what `torch.compile` can't trace.

        Raises:
            NotImplementedError: A gradient is needed, and no kernel gives it.
        """
        if needs_grad and not (self._has_kernel(True, has_mask) and self._has_kernel(False, has_mask)):
            raise NotImplementedError(
                f"the gradient of backend {self._selected.name} over parts of the keys can't be compiled"
                f"{' with a mask' if has_mask else ''}; use backend='TORCH_SDPA', layout='gather' or 'ulysses'"
            )

    def _name(self, is_causal: bool) -> str:
        return (self._causal if is_causal else self._selected).name

    def _has_kernel(self, is_causal: bool, has_mask: bool) -> bool:
        """Return whether a kernel gives the gradients; FlashAttention-4 is what runs where they need a log-sum-exp."""
        name = self._name(is_causal)
        return name == "TORCH_SDPA" or (name == "FLASH_ATTN" and not has_mask)

    def _gradients_by_autograd(
        self,
        grad_output: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor,
        mask: torch.Tensor | None,
        is_causal: bool,
        mask_needs_grad: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (query, key, value)]
            part_mask = mask.detach().requires_grad_(mask_needs_grad) if mask is not None else None
            part, part_lse = self.forward(leaves[0], leaves[1], leaves[2], part_mask, is_causal)
        # The merged output is `sum w_j out_j` with `w_j = exp(lse_j - lse)`.
        weight = (part_lse.detach() - lse).exp().unsqueeze(-1)
        wide_grad = grad_output.to(weight.dtype)
        grad_part = (weight * wide_grad).to(part.dtype)
        grad_lse = weight.squeeze(-1) * (wide_grad * (part.detach() - output).to(weight.dtype)).sum(-1)
        if part_mask is not None and mask_needs_grad:
            leaves.append(part_mask)
        grads = torch.autograd.grad((part, part_lse), leaves, (grad_part, grad_lse))
        return grads[0], grads[1], grads[2], grads[3] if mask_needs_grad else None


def _flash_gradients(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
    """Call the backward pass of FlashAttention-4 on `[B, S, H, D]` tensors."""
    tensors = (x.contiguous() for x in (query, key, value, output, lse.transpose(1, 2)))
    of_query, of_key, of_value = torch.ops.fastvideo.flash_attention_backward(
        grad_output.contiguous(), None, *tensors, *NOT_PACKED, scale, is_causal
    )
    return of_query, of_key, of_value, None


def _sdpa_gradients(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    mask_needs_grad: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Call the backward pass of PyTorch's kernels on `[B, S, H, D]` tensors."""
    grad, q, k, v, out = (x.contiguous().transpose(1, 2) for x in (grad_output, query, key, value, output))
    num_heads, num_kv_heads = q.shape[1], k.shape[1]
    k, v = torch_sdpa._repeat_heads(k, num_heads), torch_sdpa._repeat_heads(v, num_heads)
    if mask is not None:
        mask = mask[:, None, None, :] if mask.dim() == 2 else mask
        if is_causal:
            allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
            mask = mask & allowed if mask.dtype == torch.bool else mask.masked_fill(~allowed, -torch.inf)
            is_causal = False
    arguments = (grad, q, k, v, out, lse.transpose(1, 2), mask, is_causal, scale)
    if mask_needs_grad and mask is not None:
        grads, grad_mask = _written_out(*arguments)
    else:
        grads, grad_mask = _by_kernel(*arguments), None
    of_query, of_key, of_value = grads
    if num_kv_heads != num_heads:
        of_key, of_value = (torch.unflatten(x, 1, (num_kv_heads, -1)).sum(2) for x in (of_key, of_value))
    return of_query.transpose(1, 2), of_key.transpose(1, 2), of_value.transpose(1, 2), grad_mask


def _by_kernel(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of `[B, H, S, D]` tensors by the kernel that their forward pass takes."""
    if q.device.type == "cuda" and q.dtype != torch.float64:
        head_size = q.shape[-1]
        is_cudnn = torch_sdpa._takes_cudnn(q, k, mask, 0.0)
        grad, q, k, v, out = (torch_sdpa._pad_head(x) for x in (grad, q, k, v, out))
        if is_cudnn:
            grads = _by_cudnn(grad, q, k, v, out, lse, is_causal, scale)
        else:
            grads = _by_efficient(grad, q, k, v, out, lse, mask, is_causal, scale)
        return grads[0][..., :head_size], grads[1][..., :head_size], grads[2][..., :head_size]
    if q.device.type == "cpu":
        bias = torch_sdpa._as_bias(mask, q.dtype)
        of_query, of_key, of_value = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, is_causal, attn_mask=bias, scale=scale
        )
        return of_query, of_key, of_value
    return _written_out(grad, q, k, v, out, lse, mask, is_causal, scale)[0]


def _by_cudnn(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    nothing = torch.zeros((), dtype=torch.int64, device=q.device)
    of_query, of_key, of_value = _aten._scaled_dot_product_cudnn_attention_backward(
        grad, q, k, v, out, lse.unsqueeze(-1).contiguous(), nothing, nothing, None, None, None, q.shape[2], k.shape[2], 0.0,
        is_causal, scale=scale,
    )  # fmt: skip
    return of_query, of_key, of_value


def _by_efficient(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    nothing = torch.zeros((), dtype=torch.int64, device=q.device)
    bias = torch_sdpa._as_bias(mask, q.dtype)
    if bias is not None:
        bias = torch_sdpa._aligned(bias).expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    # The kernel reads whole blocks of 32 rows; weights of rows that don't exist are 0 with an infinite log-sum-exp.
    padded = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf).contiguous()
    of_query, of_key, of_value, _ = _aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, v, bias, out, padded, nothing, nothing, 0.0, [True, True, True, False], is_causal, scale=scale
    )
    return of_query, of_key, of_value


def _written_out(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor | None]:
    """Return the gradients of `[B, H, S, D]` tensors, and of an additive mask, holding all scores of the part."""
    scores = torch_sdpa._scores(q, k, mask, is_causal, scale)
    weights = (scores - lse.unsqueeze(-1)).exp()
    wide_grad, wide = grad.to(weights.dtype), weights.dtype
    delta = (wide_grad * out.to(wide)).sum(-1, keepdim=True)
    of_scores = weights * (wide_grad @ v.to(wide).mT - delta)
    grads = (
        (of_scores @ k.to(wide) * scale).to(q.dtype),
        (of_scores.mT @ q.to(wide) * scale).to(k.dtype),
        (weights.mT @ wide_grad).to(v.dtype),
    )
    of_mask = None
    if mask is not None and mask.is_floating_point():
        summed = [dim for dim in (0, 1) if mask.shape[dim] == 1]
        of_mask = of_scores.sum(summed, keepdim=True) if summed else of_scores
    return grads, of_mask
