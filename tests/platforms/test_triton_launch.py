"""Prepared launches hand a kernel what Triton's own do: compiled for sm_90 without a GPU, and recorded instead of launched."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fastvideo.platforms import triton_launch
from fastvideo.platforms.triton_launch import PreparedKernel


@triton.jit(do_not_specialize=["plain"])
def add_kernel(x, y, total, count, plain, factor, SIZE: tl.constexpr):
    o_entry = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    b_total = tl.load(x + o_entry) * factor + plain
    if y is not None:
        b_total += tl.load(y + o_entry)
    tl.store(total + o_entry, (b_total * count).to(total.dtype.element_ty))


class Recorder:
    """Stands in for a GPU of compute capability 9.0 and its driver, and keeps each launch: grid, stream, variant, arguments."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.binaries: list[bytes] = []
        self.utils = self

    def launcher_cls(self, _source: Any, _metadata: Any) -> Any:
        def launch(*given: Any) -> None:
            *grid, stream, function, _, _, enter, leave = given[:9]
            for hook in (enter, leave):
                if hook is not None:
                    hook(None)
            addresses = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in given[9:]]
            self.launches.append((grid, stream, function, addresses))

        return launch

    def load_binary(self, _name: str, binary: bytes, _shared: int, _device: int) -> tuple[Any, ...]:
        self.binaries.append(binary)
        return "module", len(self.binaries), 32, 0, 1024

    def unload_module(self, _module: str) -> None:
        pass

    def get_device_properties(self, _device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448}

    def get_current_device(self) -> int:
        return -1

    def get_current_stream(self, device: int) -> int:
        assert device == -1
        return 7

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    recorder = Recorder()
    monkeypatch.setattr(driver, "_active", recorder)
    yield recorder
    # What was compiled for one recorder is loaded there.
    for kernel in (add_kernel, double_kernel):
        kernel.device_caches.clear()
    gc.collect()


def tensors(dtype: torch.dtype = torch.float32, offset: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, y, total = (torch.zeros(260, dtype=dtype)[offset:] for _ in range(3))
    return x, y, total


# Numbers that Triton compiles as constants, as multiples of 16, and as neither, and a long one.
@pytest.mark.parametrize("count", [1, 16, 17, 1 << 40])
def test_what_is_compiled_is_given_what_triton_gives_it(recorder: Recorder, count: int) -> None:
    numbers = {"count": count, "plain": 16, "factor": 0.5, "SIZE": 256}
    prepared = PreparedKernel(add_kernel, (3, 2), ("x", "y", "total"), {**numbers, "num_warps": 2})
    aligned, other = tensors(), tensors(offset=1)
    kinds = {
        "aligned": aligned,
        "not aligned": other,
        "the last not": (*aligned[:2], other[2]),
        "half": tensors(torch.float16),
        "none": (aligned[0], None, aligned[2]),
    }
    expected = {}
    for kind, (x, y, total) in kinds.items():
        add_kernel[3, 2](x, y, total, **numbers, num_warps=2)
        expected[kind] = recorder.launches.pop()
    assert len(set(recorder.binaries)) == len(kinds)
    for _ in range(2):
        for kind, given in kinds.items():
            prepared(*given)
            assert recorder.launches.pop() == expected[kind], kind


def test_further_launches_go_past_triton(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = PreparedKernel(add_kernel, (1,), ("x", "y", "total"), {"count": 5, "plain": 2, "factor": 1.0, "SIZE": 256})
    prepared(*tensors())
    monkeypatch.setattr(type(add_kernel), "run", None)
    prepared(*tensors())
    assert len(recorder.launches) == 2


@triton.jit(do_not_specialize=["x", "total"])
def double_kernel(x, total, SIZE: tl.constexpr):
    o_entry = tl.arange(0, SIZE)
    b_x = tl.load(x.to(tl.pointer_type(tl.float32)) + o_entry)
    tl.store(total.to(tl.pointer_type(tl.float32)) + o_entry, 2 * b_x)


def test_addresses_on_a_stream(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses need no tensors; the first launch goes through Triton, on that stream too."""
    entered: list[int] = []
    monkeypatch.setattr(triton_launch, "_stream", lambda device, handle: (device, handle))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: entered.append(stream) or contextlib.nullcontext())
    prepared = PreparedKernel(double_kernel, (3,), ("x", "total"), {"SIZE": 16})
    for x, total in ((1 << 44, 3 << 44), (5 << 44, 7 << 44)):
        prepared(x, total, on=(-1, 9))
    (_, stream, function, first), (grid, other, same, second) = recorder.launches
    assert (stream, other, grid, function == same) == (7, 9, [3, 1, 1], True)
    assert entered == [(-1, 9)]
    assert (first[:2], second[:2]) == ([1 << 44, 3 << 44], [5 << 44, 7 << 44])


def test_the_default_stream_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch takes an external stream of handle 0 for a wish for a stream of its pool."""
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: ("default", device))
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda handle, device: (handle, device))
    assert triton_launch._stream(1, 0) == ("default", 1)
    assert triton_launch._stream(1, 9) == (9, 1)


def test_who_hooks_into_launches_is_told(recorder: Recorder) -> None:
    prepared = PreparedKernel(add_kernel, (1,), ("x", "y", "total"), {"count": 5, "plain": 2, "factor": 1.0, "SIZE": 256})
    prepared(*tensors())
    told: list[str] = []
    enter, leave = (lambda _metadata: told.append("enter")), (lambda _metadata: told.append("leave"))
    knobs.runtime.launch_enter_hook.add(enter)
    prepared(*tensors())
    knobs.runtime.launch_enter_hook.remove(enter)
    knobs.runtime.launch_exit_hook.add(leave)
    prepared(*tensors())
    knobs.runtime.launch_exit_hook.remove(leave)
    add_kernel.add_pre_run_hook(lambda *_args, **_options: told.append("before"))
    prepared(*tensors())
    add_kernel.pre_run_hooks.clear()
    prepared(*tensors())
    assert told == ["enter", "leave", "before"]
    assert len(recorder.launches) == 5
    assert len(recorder.binaries) == 1
