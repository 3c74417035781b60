"""Calls of CUDA's driver, with functions of ours in its place."""

from __future__ import annotations

import ctypes
import types
from collections.abc import Callable

import pytest

from fastvideo.distributed.driver import Driver, open_driver
from fastvideo.distributed.rows import Move

NAMES = (
    "cuMemcpyAsync", "cuMemcpy2DAsync_v2", "cuStreamWriteValue32_v2", "cuStreamWaitValue32_v2", "cuStreamBatchMemOp_v2",
    "cuEventCreate", "cuEventRecord", "cuStreamWaitEvent",
)  # fmt: skip


def driver_of(calls: list[tuple], error: int = 0) -> Driver:
    """Return a driver that notes its calls, and structures as the words of 8 bytes that CUDA reads."""

    def noted(name: str) -> Callable[..., int]:
        def call(*arguments: object) -> int:
            if name == "cuMemcpy2DAsync_v2":
                arguments = (*(ctypes.c_uint64 * 16).from_buffer_copy(arguments[0]._obj), arguments[1])
            elif name == "cuStreamBatchMemOp_v2":
                stream, number, words, flags = arguments
                arguments = (stream, [list(words[6 * i : 6 * i + 6]) for i in range(number)], flags)
            elif name == "cuEventCreate":
                arguments[0]._obj.value = 77
                arguments = arguments[1:]
            calls.append((name, *arguments))
            return error

        return call

    return Driver(types.SimpleNamespace(**{name: noted(name) for name in NAMES}))  # type: ignore[arg-type]


def test_copies_and_words_are_those_of_the_driver() -> None:
    calls: list[tuple] = []
    driver = driver_of(calls)
    driver.copy(7, [Move(1, 2, 20, 0, 8, 40, 5, 6), Move(0, 1, 5, 1, 3, 5, 5, 1)], [100, 200])
    driver.write(1, [(2, (1 << 32) + 3)])
    driver.wait(1, [(2, -1)])
    source, target = [0, 0, 4, 0, 108, 0, 40], [0, 0, 4, 0, 202, 0, 20]
    assert calls == [
        ("cuMemcpy2DAsync_v2", *source, *target, 5, 6, 7),
        ("cuMemcpyAsync", 101, 203, 5, 7),
        ("cuStreamWriteValue32_v2", 1, 2, 3, 0),
        ("cuStreamWaitValue32_v2", 1, 2, 0xFFFFFFFF, 0),
    ]


def test_several_words_are_one_call() -> None:
    """In the order of `CUstreamBatchMemOpParams`: operation, address, number, flags."""
    calls: list[tuple] = []
    driver = driver_of(calls)
    driver.write(5, [(10, 1), (20, 1)])
    driver.wait(6, [(30, 2), (40, -1), (50, 4)])
    driver.write(5, [(60, (1 << 32) + 7), (70, 8)])
    write, wait = [lambda *word, kind=kind: [kind, *word, 0, 0, 0] for kind in (2, 1)]
    assert calls == [
        ("cuStreamBatchMemOp_v2", 5, [write(10, 1), write(20, 1)], 0),
        ("cuStreamBatchMemOp_v2", 6, [wait(30, 2), wait(40, 0xFFFFFFFF), wait(50, 4)], 0),
        ("cuStreamBatchMemOp_v2", 5, [write(60, 7), write(70, 8)], 0),
    ]


def test_events_are_those_of_the_driver() -> None:
    calls: list[tuple] = []
    driver = driver_of(calls)
    event = driver.new_event()
    driver.record(event, 3)
    driver.after(4, event)
    assert calls == [("cuEventCreate", 2), ("cuEventRecord", 77, 3), ("cuStreamWaitEvent", 4, 77, 0)]


def test_an_error_of_the_driver_is_raised() -> None:
    driver = driver_of([], error=700)
    rows, line, words = Move(0, 0, 1, 0, 0, 1, 1, 2), Move(0, 0, 1, 0, 0, 1, 1, 1), [(0, 1), (4, 1)]
    for call in (
        lambda: driver.copy(0, [rows], [0]),
        lambda: driver.copy(0, [line], [0]),
        lambda: driver.wait(0, words),
        lambda: driver.wait(0, words[:1]),
        lambda: driver.write(0, words),
        lambda: driver.write(0, words[:1]),
        driver.new_event,
        lambda: driver.record(1, 2),
        lambda: driver.after(1, 2),
    ):
        with pytest.raises(RuntimeError, match="CUDA refused a copy or a word between devices: its driver returned error 700"):
            call()


def test_a_machine_without_the_driver_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastvideo.distributed.driver._library", lambda: types.SimpleNamespace())
    assert open_driver() is None, "too old for one of the calls"
    monkeypatch.setattr("fastvideo.distributed.driver._library", lambda: None)
    assert open_driver() is None
