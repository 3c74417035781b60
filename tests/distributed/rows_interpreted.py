"""The kernel that copies rows, in Triton's interpreter; `test_row_kernels.py` runs this file.

The interpreter has to be switched on before the kernel is defined: `TRITON_INTERPRET=1 python -m pytest <this file>`.
"""

from __future__ import annotations

import contextlib

import pytest
import torch

from fastvideo.platforms import triton_launch

from .rows_cases import ROWS, check_copying


@pytest.fixture(autouse=True)
def _no_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "_stream", lambda *_args: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda _stream: contextlib.nullcontext())


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("count", [1, 3, 4, 6])
def test_copying_by_the_kernel(count: int, rows: tuple[int, int, int, int]) -> None:
    check_copying("cpu", count, *rows, by_kernel=True)


@pytest.mark.parametrize("rows", [(1, 4096, 4096, 4096), (5, 24, 48, 48), (5, 32, 40, 48), (5, 32, 48, 40)])
def test_what_the_kernel_leaves(rows: tuple[int, int, int, int]) -> None:
    check_copying("cpu", 1, *rows, by_kernel=False)


def test_odd_addresses_are_left() -> None:
    check_copying("cpu", 2, 5, 32, 48, 64, start=8, by_kernel=False)
