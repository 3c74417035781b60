"""Attention over some keys merged with attention over others, by their log-sum-exp.

With `lse` the log-sum-exp of a row's scores over a set of keys and `out` its output, two disjoint sets give
`out = (exp(lse_a) out_a + exp(lse_b) out_b) / (exp(lse_a) + exp(lse_b))` and `lse = log(exp(lse_a) + exp(lse_b))` (online
softmax, 1805.02867). A set in which a row sees nothing has output 0 and log-sum-exp minus infinity, and changes nothing.
"""

from __future__ import annotations

import torch

__all__ = ["PartialMerger"]


class PartialMerger:
    """Gathers partial results of attention in float32 at least, some rows at a time.

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
        self._dtype = query.dtype
        wide = torch.promote_types(query.dtype, torch.float32)
        self._out = query.new_zeros(query.shape, dtype=wide)
        self._lse = query.new_full(query.shape[:3], -torch.inf, dtype=wide)

    def add(self, out: torch.Tensor, lse: torch.Tensor, rows: tuple[int, int]) -> None:
        """Merge `[B, n, H, D]` and its log-sum-exp `[B, n, H]` into the rows `rows[0] ... rows[1]`."""
        first, count = rows[0], rows[1] - rows[0]
        so_far, lse_so_far = self._out.narrow(1, first, count), self._lse.narrow(1, first, count)
        # The share of the new part; minus infinity on both sides is no share at all.
        share = torch.sigmoid(lse - lse_so_far).nan_to_num(0.0)
        so_far.lerp_(out.to(so_far.dtype), share.unsqueeze(-1))
        lse_so_far.copy_(torch.logaddexp(lse_so_far, lse))

    def output(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the merged output in query's dtype, `[B, S, H, D]`, and its log-sum-exp, `[B, S, H]`."""
        # Dynamo of torch 2.11 gives a result that `to` returns as it is no gradient.
        return self._out if self._out.dtype == self._dtype else self._out.to(self._dtype), self._lse
