"""Launches of Triton kernels that are prepared once and then cost the host a few microseconds each.

`kernel[grid](...)` looks at each argument of each call to find the compiled variant, which takes as long as small kernels run.
Where numbers follow from shapes, only tensors differ from call to call, and of those Triton minds dtype and alignment alone.

What differs between versions of Triton about launches is read in this file.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

__all__ = ["PreparedKernel"]

# Pointers to multiples of so many bytes have compiled variants of their own.
_ALIGNMENT = 16


class _Variant(NamedTuple):
    """What Triton has compiled for tensors of some dtypes and alignments on one device."""

    run: Callable[..., None]
    function: int
    metadata: Any
    # What stands behind the tensors.
    arguments: list[Any]
    # Its code is unloaded with it.
    compiled: Any


class PreparedKernel:
    """A Triton kernel with its grid and all arguments but tensors, which is launched on the current device and stream.

    The first launch with tensors of some dtypes and alignments on some device goes through Triton, which compiles the kernel or
    finds it; further ones go straight to what that gave, under the settings that Triton had then. While somebody hooks into
    launches, and in Triton's interpreter, all of them go through Triton.

    Example:
        >>> import torch
        >>> def interpreted(x, y, *, SIZE):
        ...     y.copy_(x * SIZE)
        >>> triple, y = PreparedKernel({(4,): interpreted}, (4,), ("x", "y"), {"SIZE": 3}), torch.zeros(2)
        >>> triple(torch.ones(2), y)
        >>> y.tolist()
        [3.0, 3.0]
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], tensors: Sequence[str], arguments: dict[str, Any], num_descriptors: int = 0
    ) -> None:
        """Keep what all launches share.

        Args:
            kernel: What `triton.jit` or `gluon.jit` made.
            grid: Programs along up to three axes.
            tensors: Names of the first parameters, whose tensors each launch gives.
            arguments: All other parameters and options such as `num_warps`, by name.
            num_descriptors: How many of `tensors` come first and are tensor descriptors, each of one box and layout.
        """
        self._kernel, self._grid, self._arguments = kernel, grid, arguments
        self._names, self._num_descriptors = tuple(tensors), num_descriptors
        self._grid_xyz = (*grid, 1, 1)[:3]
        self._variants: dict[tuple[Any, ...], _Variant] = {}

    def __call__(self, *given: Any, on: tuple[int, int] | None = None) -> None:
        """Launch.

        Args:
            *given: The descriptors, then the tensors, of which all but the first may be None. Addresses, as integers, may stand
                for all of them.
            on: The current device's index and the handle of the stream to launch on, in place of the current one; needed with
                addresses.
        """
        count = self._num_descriptors
        device = given[count].get_device() if on is None else on[0]
        # The dtypes, in brackets where the memory is not aligned, and what the kernel takes.
        kinds: list[Any] = [device]
        values: list[Any] = []
        for x in given[:count]:
            kinds.append(x.base.dtype)
            values.append(x)
        for x in given[count:] if count else given:
            if x is None or type(x) is int:
                values.append(x)
                kinds.append(type(x))
            else:
                address = x.data_ptr()
                values.append(address)
                kinds.append(x.dtype if address % _ALIGNMENT == 0 else (x.dtype,))
        key = tuple(kinds)
        variant = self._variants.get(key)
        if variant is None or self._kernel.pre_run_hooks or _is_hooked():
            with contextlib.nullcontext() if on is None else torch.cuda.stream(_stream(*on)):
                self._launch_by_triton(key, given)
            return
        run, function, metadata, rest, _ = variant
        stream = _runtime()[1].active.get_current_stream(device) if on is None else on[1]
        # Nobody is to be told of the launch.
        run(*self._grid_xyz, stream, function, metadata, None, None, None, *values, *rest)

    def _launch_by_triton(self, key: tuple[Any, ...], given: tuple[Any, ...]) -> None:
        compiled = self._kernel[self._grid](**dict(zip(self._names, given, strict=True)), **self._arguments)
        # Interpreted kernels return nothing.
        if compiled is None:
            return
        first, rest = self._kernel.arg_names[: len(given)], self._kernel.arg_names[len(given) :]
        if tuple(first) != self._names:
            raise ValueError(f"expected the first parameters of {self._kernel.__name__}, {first}, got {self._names}")
        # Options are no parameters; constants are, which are given and not read.
        arguments = [self._arguments[name] for name in rest]
        self._variants[key] = _Variant(compiled.run, compiled.function, compiled.packed_metadata, arguments, compiled)


@functools.cache
def _runtime() -> tuple[Any, Any]:
    """Triton's settings of launches, and what knows its driver."""
    from triton import knobs
    from triton.runtime import driver

    return knobs.runtime, driver


def _stream(device: int, handle: int) -> torch.cuda.Stream:
    # An external stream of handle 0 would be some stream of torch's pool.
    return torch.cuda.ExternalStream(handle, device=device) if handle else torch.cuda.default_stream(device)  # type: ignore[no-untyped-call]


def _is_hooked() -> bool:
    """Whether somebody wants to be told of launches."""
    runtime = _runtime()[0]
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    # Chains of callables, which are there without any.
    return (enter is not None and getattr(enter, "calls", True)) or (leave is not None and getattr(leave, "calls", True))
