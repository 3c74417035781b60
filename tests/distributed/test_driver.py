"""Calls of CUDA's driver, with functions of ours in its place."""

from __future__ import annotations

import ctypes
import types
from collections.abc import Callable

import pytest

from fastvideo.distributed.driver import Driver, open_driver

NAMES = ("cuMemcpyAsync", "cuMemcpy2DAsync_v2", "cuStreamWriteValue32_v2", "cuStreamWaitValue32_v2")


def driver_of(calls: list[tuple], error: int = 0) -> Driver:
    """Return a driver that notes its calls, a rectangle as the 16 words of 8 bytes that CUDA reads."""

    def noted(name: str) -> Callable[..., int]:
        def call(*arguments: object) -> int:
            if name == "cuMemcpy2DAsync_v2":
                arguments = (*(ctypes.c_uint64 * 16).from_buffer_copy(arguments[0]._obj), arguments[1])
            calls.append((name, *arguments))
            return error

        return call

    return Driver(types.SimpleNamespace(**{name: noted(name) for name in NAMES}))  # type: ignore[arg-type]


def test_copies_and_words_are_those_of_the_driver() -> None:
    calls: list[tuple] = []
    driver = driver_of(calls)
    driver.copy(1, 2, 3, 4)
    driver.copy_rows(10, 20, 30, 40, 5, 6, 7)
    driver.write(1, 2, (1 << 32) + 3)
    driver.wait(1, 2, -1)
    source, target = [0, 0, 4, 0, 30, 0, 40], [0, 0, 4, 0, 10, 0, 20]
    assert calls == [
        ("cuMemcpyAsync", 1, 2, 3, 4),
        ("cuMemcpy2DAsync_v2", *source, *target, 5, 6, 7),
        ("cuStreamWriteValue32_v2", 1, 2, 3, 0),
        ("cuStreamWaitValue32_v2", 1, 2, 0xFFFFFFFF, 0),
    ]


def test_an_error_of_the_driver_is_raised() -> None:
    driver = driver_of([], error=700)
    for call in (lambda: driver.copy(0, 0, 1, 0), lambda: driver.copy_rows(0, 1, 0, 1, 1, 2, 0), lambda: driver.wait(0, 0, 1)):
        with pytest.raises(RuntimeError, match="CUDA refused a copy or a word between devices: its driver returned error 700"):
            call()


def test_a_machine_without_the_driver_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastvideo.distributed.driver._library", lambda: types.SimpleNamespace())
    assert open_driver() is None, "too old for one of the calls"
    monkeypatch.setattr("fastvideo.distributed.driver._library", lambda: None)
    assert open_driver() is None
