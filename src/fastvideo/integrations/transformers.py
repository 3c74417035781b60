"""transformers' models, such as text encoders, on this attention system: names in its `AttentionInterface`.

`register()` adds `"fastvideo"` (automatic) and one name per exact backend, such as `"fastvideo_torch_sdpa"`. A model takes one
by `attn_implementation="fastvideo"` or `model.set_attn_implementation("fastvideo")`. transformers takes any name with "flash"
in it for a package of its own, so `FLASH_ATTN` is `"fastvideo_fa"`. Masks are made as for torch's own attention function.
Needs transformers 5: `pip install "transformers>=5"`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from fastvideo.attention.functional import attention
from fastvideo.integrations.masks import fit_mask
from fastvideo.integrations.plan import exact_backends

__all__ = ["attention_names", "register"]

AUTO_NAME = "fastvideo"


def attention_names() -> dict[str, str | None]:
    """Return the names that `register` adds, and the backend of each; `None` is automatic.

    Example:
        >>> attention_names()["fastvideo_fa"], attention_names()["fastvideo"]
        ('FLASH_ATTN', None)
    """
    short = {backend: backend.lower().replace("flash_attn", "fa").replace("flash", "fl") for backend in exact_backends()}
    return {AUTO_NAME: None, **{f"{AUTO_NAME}_{name}": backend for backend, name in short.items()}}


def register() -> tuple[str, ...]:
    """Add this system's names to transformers and return them. Calling it again changes nothing.

    Raises:
        ImportError: transformers isn't installed, or is older than its attention interface.

    Example:
        >>> from transformers import AttentionInterface
        >>> set(register()) <= set(AttentionInterface().valid_keys())
        True
    """
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    except ImportError as error:
        raise ImportError(
            f'transformers with an AttentionInterface is needed: pip install "transformers>=5" ({error})'
        ) from error
    for name, backend in attention_names().items():
        AttentionInterface.register(name, _forward(backend))
        AttentionMaskInterface.register(name, sdpa_mask)
    return tuple(attention_names())


@functools.cache
def _forward(backend: str | None) -> Callable[..., tuple[torch.Tensor, None]]:
    def fastvideo_attention_forward(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        position_bias: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attend as transformers calls it: `[B, H, S, D]` in, `[B, S, H, D]` out, no attention weights."""
        for name in ("softcap", "s_aux", "cache"):
            if kwargs.get(name) is not None:
                raise NotImplementedError(f"{type(module).__name__} asks for {name}, which no backend here has; use 'eager'")
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if is_causal is None:
            is_causal = bool(getattr(module, "is_causal", True))
        # With a mask, transformers has put the causal part into it; one query sees all keys of a cache.
        is_causal = is_causal and attention_mask is None and query.shape[1] > 1
        if is_causal and key.shape[1] > query.shape[1]:  # a cache filled for the first time: the rest of it is empty
            key, value = key[:, : query.shape[1]], value[:, : query.shape[1]]
            position_bias = None if position_bias is None else position_bias[..., : query.shape[1]]
        mask = None if attention_mask is None else fit_mask(attention_mask, query, key.shape[1])
        if position_bias is not None:
            mask = _with_bias(mask, position_bias, query, key.shape[1], is_causal)
            is_causal = False
        output: torch.Tensor = attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=is_causal,
            scale=scaling,
            enable_gqa=query.shape[2] != key.shape[2],
            backend=backend,
        )
        return output, None

    return fastvideo_attention_forward


def _with_bias(
    mask: torch.Tensor | None, bias: torch.Tensor, query: torch.Tensor, key_len: int, is_causal: bool
) -> torch.Tensor:
    """Join a bias of positions, as T5 has it, with a mask in one additive mask."""
    bias = fit_mask(bias.to(query.dtype), query, key_len)
    if is_causal:
        mask = torch.ones(query.shape[1], key_len, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is None:
        return bias
    mask = mask[:, None, None, :] if mask.dim() == 2 else mask
    return bias.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else bias + mask
