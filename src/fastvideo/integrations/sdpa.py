"""`torch.nn.functional.scaled_dot_product_attention` run by this system, inside a context manager and on its thread alone.

A `TorchFunctionMode` sees the calls; nothing is patched, so leaving the context, by whatever way, ends it. Torch's layout
`[..., heads, seq, head_size]` is kept at this door.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from fastvideo.attention.functional import attention
from fastvideo.attention.registry import backend_name
from fastvideo.attention.selector import BackendWish

__all__ = ["override_sdpa", "sdpa"]


class _Inside(threading.local):
    def __init__(self) -> None:
        self.active = False


_inside = _Inside()


class override_sdpa(TorchFunctionMode):
    """Run every `scaled_dot_product_attention` called inside, on this thread, by this system.

    Each call runs exactly as asked or raises; none falls back to torch's own function. A query with nothing to attend to gets
    0, as everywhere here. `torch.nn.MultiheadAttention` calls the function where no mode can see it, and is refused, but for
    `need_weights=True`, which makes it compute attention by other means.

    Args:
        backend: The backend, by name: it runs or raises. `None` follows scope, environment, then the fastest exact.

    Raises:
        UnknownBackend: No backend has that name.

    Example:
        >>> q = torch.randn(1, 2, 8, 16)
        >>> expected = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        >>> with override_sdpa("TORCH_SDPA"):
        ...     found = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        >>> torch.allclose(found, expected, atol=1e-6)
        True
    """

    def __init__(self, backend: BackendWish | None = None) -> None:
        super().__init__()
        is_auto = backend is None or (isinstance(backend, str) and backend.lower() == "auto")
        self.backend = None if is_auto or backend is None else backend_name(backend)

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run `func`, or in place of torch's attention function this system's. This mode is off meanwhile."""
        kwargs = kwargs or {}
        if _inside.active:  # an outer override, and a backend's own call of torch's function
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward and not kwargs.get("need_weights", True):
            raise NotImplementedError(
                "torch.nn.MultiheadAttention hides its call of scaled_dot_product_attention from override_sdpa; call it with "
                "need_weights=True or outside of the override"
            )
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        _inside.active = True
        try:
            return sdpa(*args, **kwargs, backend=self.backend)
        finally:
            _inside.active = False


def sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    backend: BackendWish | None = None,
) -> torch.Tensor:
    """Attend with the arguments of torch's function, whose meaning they keep.

    Args:
        query: `[..., H, S_q, D]`, or `[S_q, D]`.
        key: `[..., H_kv, S_kv, D]`.
        value: `[..., H_kv, S_kv, D]`.
        attn_mask: Bool (True attends) or additive, broadcastable to `[..., H, S_q, S_kv]`.
        dropout_p: Probability of dropping an attention weight.
        is_causal: Query i sees keys 0 to i, as torch aligns them, whatever the lengths.
        scale: Factor of the scores; `None` means `D ** -0.5`.
        enable_gqa: Allow fewer key and value heads than query heads.
        backend: Name of the backend to run; it runs or raises.

    Returns:
        `[..., H, S_q, D]`.

    Raises:
        TypeError: A dtype is wrong, or the mask's isn't bool nor the query's.
        ValueError: Shapes don't fit, or both a mask and `is_causal` are given.
        BackendUnavailable: The backend asked for can't run this, or none can.

    Example:
        >>> q, k = torch.randn(2, 3, 4, 5, 16), torch.randn(2, 3, 4, 7, 16)
        >>> sdpa(q, k, k).shape
        torch.Size([2, 3, 4, 5, 16])
    """
    if attn_mask is not None and is_causal:
        raise ValueError("expected either attn_mask or is_causal=True, got both; put the causal part into the mask")
    if min(query.dim(), key.dim(), value.dim()) < 2:
        shapes = f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        raise ValueError(f"expected query, key and value as [..., seq, head_size], got {shapes}")
    leading = query.shape[:-2]
    num_heads = leading[-1] if leading else 1
    batch = leading[:-1]
    query_len, key_len = query.shape[-2], key.shape[-2]
    if is_causal and query_len != key_len:
        attn_mask = torch.ones(query_len, key_len, dtype=torch.bool, device=query.device).tril()
        is_causal = False
    mask = None
    if attn_mask is not None:
        mask_heads = attn_mask.shape[-3] if attn_mask.dim() > 2 else 1
        mask = attn_mask.expand(*batch, mask_heads, query_len, key_len).reshape(
            math.prod(batch), mask_heads, query_len, key_len
        )
        mask = mask[:1] if attn_mask.dim() <= 3 else mask
    output: torch.Tensor = attention(
        _as_bshd(query, batch),
        _as_bshd(key, batch),
        _as_bshd(value, batch),
        attn_mask=mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
        backend=backend,
    )
    output = output.transpose(1, 2)
    return output.reshape(*batch, num_heads, query_len, -1) if leading else output.reshape(query_len, -1)


def _as_bshd(x: torch.Tensor, batch: tuple[int, ...]) -> torch.Tensor:
    """Return `[..., H, S, D]` as `[B, S, H, D]`, its leading dims broadcast to those of the query."""
    x = x if x.dim() > 2 else x.unsqueeze(0)
    return x.expand(*batch, *x.shape[-3:]).reshape(math.prod(batch), *x.shape[-3:]).transpose(1, 2)
