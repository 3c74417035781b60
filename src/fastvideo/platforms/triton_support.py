"""Where Triton kernels run: on GPUs, and on a CPU in Triton's interpreter. Triton is imported at the first question."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from typing import Any

import torch

__all__ = ["device_of", "has_triton", "runs_triton"]

_NO_CONTEXT = contextlib.nullcontext()


@functools.cache
def has_triton() -> bool:
    """Return whether Triton is installed, without importing it."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _is_interpreted() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


@functools.cache
def _has_tensor_cores(index: int | None) -> bool:
    return torch.version.hip is not None or torch.cuda.get_device_capability(index) >= (8, 0)


def runs_triton(device: torch.device) -> bool:
    """Return whether Triton kernels can take tensors on `device`: AMD, NVIDIA from 8.0, or a CPU while they are interpreted.

    Example:
        >>> runs_triton(torch.device("meta"))
        False
    """
    if not has_triton():
        return False
    if device.type == "cuda":
        return _has_tensor_cores(device.index)
    return device.type == "cpu" and _is_interpreted()


def device_of(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which kernels are launched on the device of `x`."""
    # To enter what is current takes several microseconds.
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return _NO_CONTEXT
    return torch.cuda.device(x.device)
