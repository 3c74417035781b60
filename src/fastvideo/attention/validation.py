"""Checks at the public doors, before anything is chosen or computed.

Every message says what was expected, what came and what to do. `B batch, S tokens, H heads, D head size`.
"""

from __future__ import annotations

import math
import operator
from typing import TypeGuard

import torch

__all__ = [
    "as_size",
    "autocast",
    "check_causal_lengths",
    "check_dropout",
    "check_flags",
    "check_output_buffer",
    "check_qkv",
    "check_replicated",
    "check_scale",
    "check_sizes",
    "mask_kind",
]

_FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def as_size(name: str, size: int) -> int:
    """Return a positive integer of any type, NumPy's too, as an `int`.

    Raises:
        TypeError: It is not an integer.
        ValueError: It is not positive.
    """
    try:
        number = operator.index(size)
    except TypeError:
        number = None
    if number is None or isinstance(size, bool):
        raise TypeError(f"expected an integer {name}, got {size!r}")
    if number < 1:
        raise ValueError(f"expected {name} >= 1, got {size}")
    return number


def check_sizes(num_heads: int, num_kv_heads: int, head_size: int) -> tuple[int, int, int]:
    """Check the sizes that a layer is built with, and return them as `int`.

    Raises:
        TypeError: One is not an integer.
        ValueError: One is not positive, or `num_heads` is no multiple of `num_kv_heads`.
    """
    heads, kv_heads = as_size("num_heads", num_heads), as_size("num_kv_heads", num_kv_heads)
    if heads % kv_heads:
        raise ValueError(f"expected num_heads to be a multiple of num_kv_heads, got {heads} and {kv_heads}")
    return heads, kv_heads, as_size("head_size", head_size)


def check_scale(scale: float | None) -> None:
    """Check a softmax scale: any finite number, or `None` for `head_size ** -0.5`.

    Raises:
        TypeError: It is not a number.
        ValueError: It is NaN or infinite.
    """
    if scale is None:
        return
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"expected the softmax scale as a float or None, got {type(scale).__name__}")
    if not -math.inf < scale < math.inf:  # rejects NaN too; Dynamo can't trace `isfinite`
        raise ValueError(f"expected a finite softmax scale, got {scale}; None means head_size ** -0.5")


def check_qkv(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, may_lack_tokens: bool = False) -> None:
    """Check that query, key and value, `[B, S, H, D]`, belong together; `may_lack_tokens` lets S be 0.

    Raises:
        TypeError: One is no tensor, or their dtypes are not one common floating dtype.
        ValueError: Ranks, batches, heads, lengths, head sizes or devices don't fit, or a dim is empty.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"expected {name} as a tensor [batch, seq, heads, head_size], got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(f"expected {name} as [batch, seq, heads, head_size], got shape {tuple(tensor.shape)}")
        if tensor.dtype not in _FLOAT_DTYPES:
            raise TypeError(f"expected {name} in float16, bfloat16, float32 or float64, got {tensor.dtype}; convert it")
        if 0 in (tensor.shape[0], *tensor.shape[2:]) or (tensor.shape[1] == 0 and not may_lack_tokens):
            raise ValueError(f"expected {name} without empty dims, got shape {tuple(tensor.shape)}")
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(
            f"expected one dtype, got {query.dtype=}, {key.dtype=}, {value.dtype=}; convert them or use torch.autocast"
        )
    if not query.device == key.device == value.device:
        raise ValueError(f"expected one device, got {query.device=}, {key.device=}, {value.device=}")
    if key.shape != value.shape:
        raise ValueError(f"expected key and value of one shape, got {tuple(key.shape)} and {tuple(value.shape)}")
    if query.shape[0] != key.shape[0]:
        raise ValueError(f"expected one batch size, got query {tuple(query.shape)} and key {tuple(key.shape)}")
    if query.shape[3] != key.shape[3]:
        raise ValueError(f"expected one head size, got query {tuple(query.shape)} and key {tuple(key.shape)}")
    if query.shape[2] % key.shape[2]:
        raise ValueError(f"expected query heads to be a multiple of key heads, got {query.shape[2]} and {key.shape[2]}")


def mask_kind(mask: torch.Tensor | None, query_shape: tuple[int, ...], key_len: int, query: torch.Tensor) -> str | None:
    """Check an attention mask and return its kind, one of `MASK_KINDS` or `None`.

    Args:
        mask: Bool `[B, S_kv]` (key padding), or bool or float `[B|1, H|1, S_q, S_kv]`. True attends.
        query_shape: `[B, S_q, H, D]` that the mask has to fit.
        key_len: `S_kv` that the mask has to fit.
        query: Gives the dtype and the device that the mask has to have.

    Raises:
        TypeError: It is no tensor, or of a wrong dtype.
        ValueError: Its shape or device doesn't fit.
    """
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"expected attn_mask as a tensor or None, got {type(mask).__name__}")
    batch, query_len, num_heads, _ = query_shape
    if mask.device != query.device:
        raise ValueError(f"expected attn_mask on {query.device}, got {mask.device}")
    if mask.dim() == 2:
        if mask.dtype != torch.bool:
            raise TypeError(f"expected a key padding mask in torch.bool (True attends), got {mask.dtype}")
        if tuple(mask.shape) != (batch, key_len):
            raise ValueError(f"expected a key padding mask [batch, S_kv] = [{batch}, {key_len}], got {tuple(mask.shape)}")
        return "key_padding"
    fits = (
        mask.dim() == 4
        and mask.shape[0] in (1, batch)
        and mask.shape[1] in (1, num_heads)
        and tuple(mask.shape[2:]) == (query_len, key_len)
    )
    if not fits:
        raise ValueError(
            f"expected attn_mask as key padding [{batch}, {key_len}] or as "
            f"[{batch}|1, {num_heads}|1, {query_len}, {key_len}], got {tuple(mask.shape)}"
        )
    if mask.dtype == torch.bool:
        return "bool"
    if mask.dtype != query.dtype:
        raise TypeError(f"expected an additive attn_mask in query's dtype {query.dtype} (or bool), got {mask.dtype}")
    return "additive"


def check_dropout(dropout_p: float) -> None:
    """Check a dropout probability.

    Raises:
        TypeError: It is not a number.
        ValueError: It is outside [0, 1).
    """
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)):
        raise TypeError(f"expected dropout_p as a float, got {type(dropout_p).__name__}")
    if not 0.0 <= dropout_p < 1.0:  # rejects NaN too
        raise ValueError(f"expected dropout_p in [0, 1), got {dropout_p}")


def check_flags(**flags: bool) -> None:
    """Check what is either true or false.

    Raises:
        TypeError: One is no bool.
    """
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"expected {name} as a bool, got {flag!r}")


def check_output_buffer(out: torch.Tensor | None, query: torch.Tensor) -> None:
    """Check a buffer for the output.

    Raises:
        TypeError: It is no tensor.
        ValueError: It is not like query.
    """
    if out is None:
        return
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"expected out as a tensor or None, got {type(out).__name__}")
    if out.shape != query.shape or out.dtype != query.dtype or out.device != query.device:
        raise ValueError(f"expected out like query, {tuple(query.shape)} {query.dtype}, got {tuple(out.shape)} {out.dtype}")


def check_causal_lengths(query_len: int, key_len: int) -> None:
    """Refuse causal attention between unequal lengths, whose alignment would be a guess.

    Raises:
        NotImplementedError: The lengths differ.
    """
    if query_len != key_len:
        raise NotImplementedError(
            f"causal attention needs as many keys as queries, got {query_len} queries and {key_len} keys: SDPA would align "
            "them top-left and flash-attn bottom-right. Name the alignment by passing a bool attn_mask instead"
        )


def autocast(*arguments: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Cast floating tensors as SDPA does under `torch.autocast`; return what is no tensor, and all without it, as they are."""
    tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
    device = tensors[0].device.type if tensors else "cpu"
    if device == "meta" or not torch.is_autocast_enabled(device):
        return arguments
    dtype = torch.get_autocast_dtype(device)
    return tuple(argument.to(dtype) if _is_castable(argument) else argument for argument in arguments)


def _is_castable(argument: object) -> TypeGuard[torch.Tensor]:
    return isinstance(argument, torch.Tensor) and argument.is_floating_point() and argument.dtype != torch.float64


def check_replicated(
    query: torch.Tensor, key: torch.Tensor, replicated: tuple[torch.Tensor | None, ...]
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor] | None:
    """Check replicated query, key and value, `[B, R, H, D]`, against the sequence's; return them, or `None` for none.

    Keys and values may come without queries.

    Raises:
        TypeError: Their dtype differs from the sequence's.
        ValueError: Keys or values are missing, or shapes or device don't fit.
    """
    q, k, v = replicated
    if q is None and k is None and v is None:
        return None
    if k is None or v is None:
        given = [name for name, x in zip("qkv", replicated, strict=True) if x is not None]
        raise ValueError(
            "replicated tokens come as query, key and value, or as key and value, got only "
            f"replicated_{', replicated_'.join(given)}"
        )
    check_qkv(k if q is None else q, k, v)
    for name, x, like in (("query", q, query), ("key", k, key)):
        if x is None:
            continue
        if x.dtype != like.dtype or x.device != like.device:
            raise TypeError(f"expected replicated tokens as {like.dtype} on {like.device}, got {x.dtype} on {x.device}")
        if x.shape[1] != k.shape[1] or x.shape[0] != like.shape[0] or x.shape[2:] != like.shape[2:]:
            raise ValueError(
                f"expected replicated tokens [batch, R, heads, head_size] with a {name} like {tuple(like.shape)} and R = "
                f"{k.shape[1]} as of the key, got {tuple(x.shape)}"
            )
    return q, k, v
