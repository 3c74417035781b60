"""What of Gluon may differ between versions of Triton; the kernels and their launches take it from here alone."""

from __future__ import annotations

from torch import Tensor
from triton.experimental.gluon.language.nvidia.hopper import async_copy, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

__all__ = ["TensorDescriptor", "copy_rows", "moved", "tma_load"]

# Named by its direction in Triton 3.6 to 3.8, by what it does later; the old name then raises.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
copy_rows = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


def moved(descriptor: TensorDescriptor, x: Tensor) -> TensorDescriptor:
    """The descriptor for another tensor of its shape, strides and dtype, at a multiple of 16 bytes; checks nothing again."""
    other = object.__new__(TensorDescriptor)
    vars(other).update(vars(descriptor), base=x)
    return other
