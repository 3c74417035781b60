"""Attention over some keys merged with attention over others, by their log-sum-exp.

With `lse` the log-sum-exp of a row's scores over a set of keys and `out` its output, two disjoint sets give
`out = (exp(lse_a) out_a + exp(lse_b) out_b) / (exp(lse_a) + exp(lse_b))` and `lse = log(exp(lse_a) + exp(lse_b))` (online
softmax, 1805.02867). A set in which a row sees nothing has output 0 and log-sum-exp minus infinity, and changes nothing.

On a GPU one Triton kernel merges two results in one pass over memory, and the last pass writes the result's dtype; elsewhere,
in other dtypes and in compiled code torch's operations do.
"""

from __future__ import annotations

import torch

from fastvideo.platforms.triton_support import device_of, runs_triton

__all__ = ["PartialMerger"]

_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class PartialMerger:
    """Gathers partial results of attention in float32 at least, some rows at a time.

    A result that was added is read until the next one is added, or the output asked for.

    Args:
        query: `[B, S, H, D]`; gives shape, device and dtype of the result.

    Example:
        >>> merger = PartialMerger(torch.zeros(1, 2, 1, 4))
        >>> merger.add(torch.ones(1, 2, 1, 4), torch.zeros(1, 2, 1), (0, 2))
        >>> merger.add(torch.full((1, 1, 1, 4), 3.0), torch.zeros(1, 1, 1), (1, 2))
        >>> merger.output()[0].sum(-1).flatten().tolist()
        [4.0, 8.0]
    """

    def __init__(self, query: torch.Tensor) -> None:
        self._query = query
        self._wide = torch.promote_types(query.dtype, torch.float32)
        # What is merged so far, and the last part, which is merged when it is known whether another follows.
        self._merged: tuple[torch.Tensor, torch.Tensor] | None = None
        self._last: tuple[torch.Tensor, torch.Tensor, tuple[int, int]] | None = None
        self._is_own = False

    def add(self, out: torch.Tensor, lse: torch.Tensor, rows: tuple[int, int]) -> None:
        """Merge `[B, n, H, D]` and its log-sum-exp `[B, n, H]` into the rows `rows[0] ... rows[1]`."""
        self._merge_last(self._wide)
        self._last = (out, lse.to(self._wide), rows)

    def output(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the merged output in query's dtype, `[B, S, H, D]`, and its log-sum-exp, `[B, S, H]`."""
        self._merge_last(self._query.dtype)
        out, lse = self._nothing() if self._merged is None else self._merged
        # Dynamo of torch 2.11 gives a result that `to` returns as it is no gradient.
        return out if out.dtype == self._query.dtype else out.to(self._query.dtype), lse

    def _merge_last(self, dtype: torch.dtype) -> None:
        """Merge the last part, if there is one, into a result of `dtype`."""
        if self._last is None:
            return
        (part, part_lse, rows), self._last = self._last, None
        if self._merged is None:
            if rows == (0, self._query.shape[1]):
                self._merged = (part, part_lse)
                return
            self._merged, self._is_own = self._nothing(), True
        out, lse = self._merged
        if part.dtype in _KERNEL_DTYPES and not torch.compiler.is_compiling() and runs_triton(part.device):
            target, target_lse = out, lse
            if not self._is_own or out.dtype != dtype:
                target = self._query.new_empty(self._query.shape, dtype=dtype)
                target_lse = self._query.new_empty(self._query.shape[:3], dtype=torch.float32)
            _merge_by_kernel(out, lse, part, part_lse, rows, target, target_lse)
            self._merged = (target, target_lse)
        else:
            if not self._is_own:
                out, lse = out.to(self._wide, copy=True), lse.clone()
            _merge_in_place(out, lse, part, part_lse, rows)
            self._merged = (out, lse)
        self._is_own = True

    def _nothing(self) -> tuple[torch.Tensor, torch.Tensor]:
        shape = self._query.shape
        return self._query.new_zeros(shape, dtype=self._wide), self._query.new_full(shape[:3], -torch.inf, dtype=self._wide)


def _merge_in_place(
    out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor, rows: tuple[int, int]
) -> None:
    first, count = rows[0], rows[1] - rows[0]
    so_far, lse_so_far = out.narrow(1, first, count), lse.narrow(1, first, count)
    # The share of the new part; minus infinity on both sides is no share at all.
    share = torch.sigmoid(part_lse - lse_so_far).nan_to_num(0.0)
    so_far.lerp_(part.to(so_far.dtype), share.unsqueeze(-1))
    lse_so_far.copy_(torch.logaddexp(lse_so_far, part_lse))


def _merge_by_kernel(
    out: torch.Tensor,
    lse: torch.Tensor,
    part: torch.Tensor,
    part_lse: torch.Tensor,
    rows: tuple[int, int],
    target: torch.Tensor,
    target_lse: torch.Tensor,
) -> None:
    from fastvideo.distributed.merge_kernels import launch_merge

    with device_of(target):
        launch_merge(out, lse, part, part_lse, rows, target, target_lse)
