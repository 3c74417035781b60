"""A cache for tensors that are built once per geometry and shared."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

__all__ = ["cache_tensors"]

P = ParamSpec("P")
R = TypeVar("R")


def cache_tensors(build: Callable[P, R], maxsize: int = 16) -> Callable[P, R]:
    """Return `build` behind an LRU cache, whose tensors serve training too when they are first made in inference mode.

    Under a `FakeTensorMode` nothing is taken or kept: its tensors serve that mode alone.

    Example:
        >>> ones = cache_tensors(torch.ones)
        >>> with torch.inference_mode():
        ...     ones(2).is_inference()
        False
    """

    def build_for_all(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(False), torch.no_grad():
            return build(*args, **kwargs)

    kept = functools.lru_cache(maxsize=maxsize)(build_for_all)

    @functools.wraps(build)
    def take_or_build(*args: P.args, **kwargs: P.kwargs) -> R:
        return (build_for_all if _is_fake() else kept)(*args, **kwargs)  # type: ignore[arg-type]  # hashable, or they raise

    return take_or_build


def _is_fake() -> bool:
    """Whether tensors that are made here and now hold no numbers."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
