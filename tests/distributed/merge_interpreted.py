"""The kernel that merges partial results in Triton's interpreter; `test_merge.py` runs this file.

The interpreter has to be switched on before the kernel is defined: `TRITON_INTERPRET=1 python -m pytest <this file>`.
"""

from __future__ import annotations

import math

import pytest
import torch

from fastvideo.distributed import merge
from fastvideo.distributed.merge import PartialMerger
from fastvideo.platforms.triton_support import runs_triton

from .merge_cases import LAYOUTS, check_merging

TOKENS, HEADS = 11, 3


def test_the_kernel_runs_here() -> None:
    assert runs_triton(torch.device("cpu"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head_size", [16, 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_merging_by_the_kernel(dtype: torch.dtype, head_size: int, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "_merge_in_place", None)
    check_merging("cpu", dtype, layout, head_size=head_size)


def test_nothing_of_unused_memory_is_read() -> None:
    """Parts are windows of tensors of NaN, as they are of memory that others write."""
    query = torch.zeros(1, TOKENS, HEADS, 4)
    merger = PartialMerger(query)
    room, lse_room = torch.full((2, 3 * TOKENS, HEADS + 1, 9), math.nan), torch.full((2, TOKENS + 4, HEADS + 1), math.nan)
    room[1:, TOKENS : 2 * TOKENS, :HEADS, 2:6], lse_room[1:, 2 : TOKENS + 2, 1:] = 1.0, 0.0
    whole, whole_lse = room[1:, TOKENS : 2 * TOKENS, :HEADS, 2:6], lse_room[1:, 2 : TOKENS + 2, 1:]
    merger.add(whole, whole_lse, (0, TOKENS))
    merger.add(3 * whole[:, 4:6], whole_lse[:, 4:6], (2, 4))
    merger.add(5 * whole[:, :1], whole_lse[:, :1] + math.log(2.0), (3, 4))
    out, lse = merger.output()
    means, sums = torch.ones(TOKENS), torch.ones(TOKENS)
    means[2], means[3], sums[2], sums[3] = 2.0, 3.5, 2.0, 4.0
    torch.testing.assert_close(out, means[None, :, None, None].expand_as(out), rtol=1e-6, atol=0)
    torch.testing.assert_close(lse, sums.log()[None, :, None].expand_as(lse), rtol=1e-6, atol=1e-6)
    assert whole.unique().tolist() == [1.0], "what was added stays as it was"
