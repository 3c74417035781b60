"""Names for this system's dense backends in diffusers' own attention dispatcher.

They serve models that have no family here: `model.set_attention_backend("fastvideo")`, or diffusers' `attention_backend(...)`
scope. The dispatcher tells a backend neither the place nor the step nor the video's grid, so only exact backends are named;
`apply` is the way to sparse ones. The dispatcher's list of names is an `Enum`, which has no door for new ones: they are added
as `Enum` itself adds them, and diffusers from 0.42 is checked for what that needs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from fastvideo.attention.functional import attention
from fastvideo.integrations.masks import fit_mask
from fastvideo.integrations.plan import exact_backends

__all__ = ["dispatcher_names", "register_dispatcher_names"]

AUTO_NAME = "fastvideo"


def dispatcher_names() -> tuple[str, ...]:
    """Return the names that `register_dispatcher_names` adds.

    Example:
        >>> dispatcher_names()
        ('fastvideo', 'fastvideo_flash_attn', 'fastvideo_torch_sdpa'...)
    """
    return (AUTO_NAME, *(f"{AUTO_NAME}_{backend.lower()}" for backend in exact_backends()))


def register_dispatcher_names() -> tuple[str, ...]:
    """Add this system's names to diffusers' dispatcher and return them. Calling it again changes nothing.

    Raises:
        ImportError: diffusers isn't installed, or its dispatcher is built otherwise than that of 0.42.

    Example:
        >>> from diffusers import attention_backend
        >>> register_dispatcher_names()[0]
        'fastvideo'
        >>> with attention_backend("fastvideo"):  # yours: call a model
        ...     pass
    """
    try:
        from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
    except ImportError as error:
        raise ImportError(
            f'diffusers with an attention dispatcher is needed: pip install "diffusers>=0.42,<0.43" ({error})'
        ) from error
    names: Any = AttentionBackendName
    if not (hasattr(names, "_member_map_") and hasattr(names, "_value2member_map_") and hasattr(names, "_member_names_")):
        raise ImportError(
            "diffusers' AttentionBackendName is no Enum any more; use fastvideo.integrations.diffusers.apply instead"
        )
    for name in dispatcher_names():
        if name not in names._value2member_map_:
            member = str.__new__(names, name)
            member._name_, member._value_ = name.upper(), name
            names._member_names_.append(member._name_)
            names._member_map_[member._name_] = names._value2member_map_[name] = member
        member = names._value2member_map_[name]
        backend = None if name == AUTO_NAME else name.removeprefix(f"{AUTO_NAME}_").upper()
        _AttentionBackendRegistry.register(member)(_backend_function(backend))
    return dispatcher_names()


@functools.cache
def _backend_function(backend: str | None) -> Callable[..., Any]:
    def fastvideo_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        _parallel_config: Any = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attend as diffusers' dispatcher calls it: `[B, S, H, D]`, the mask broadcastable or `[B, S_kv]`."""
        if _parallel_config is not None:
            raise NotImplementedError(
                "this backend doesn't run inside diffusers' context parallelism; share tokens over devices with "
                "fastvideo.integrations.diffusers.apply(..., parallel=mesh)"
            )
        if attn_mask is not None and not isinstance(attn_mask, torch.Tensor):
            raise TypeError(f"expected attn_mask as a tensor or None, got {type(attn_mask).__name__}")
        mask = None if attn_mask is None else fit_mask(attn_mask, query, key.shape[1])
        call: Any = attention  # its two return types aren't told apart by a flag that is handed on
        result: torch.Tensor | tuple[torch.Tensor, torch.Tensor] = call(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
            return_lse=return_lse,
            backend=backend,
        )
        return result

    return fastvideo_attention
