"""The ranks of a measurement in step: short facts told through the process group's store, and times of calls that all make.

The store lives on the host, so a rank that waits for another one there leaves its own device, and everybody's links, alone.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

__all__ = ["Ranks"]

_PATIENCE = timedelta(minutes=10)
"""How long a rank waits for the others' word: as long as rank 0 may measure alone."""
_MOST = 20


class Ranks:
    """All ranks of the default process group.

    Args:
        device: This rank's device.

    Attributes:
        rank: This rank.
        size: How many there are.
        device: This rank's device.
    """

    def __init__(self, device: torch.device) -> None:
        # Torch may be built without them.
        from torch._C._distributed_c10d import PrefixStore
        from torch.distributed.distributed_c10d import _get_default_store

        self.rank, self.size, self.device = dist.get_rank(), dist.get_world_size(), device
        self._store: Store = PrefixStore("fastvideo/benchmark", _get_default_store())
        self._number = 0

    def tell(self, fact: Any) -> list[Any]:
        """Tell the others what `json` can write, and return every rank's, in the order of ranks, once all have come."""
        self._number += 1
        keys = [f"{self._number}/{rank}" for rank in range(self.size)]
        self._store.set(keys[self.rank], json.dumps(fact))
        self._store.wait(keys, _PATIENCE)
        return [json.loads(self._store.get(key)) for key in keys]

    def repeats(self, call: Callable[[], object], milliseconds: float) -> int:
        """Return how many calls take about `milliseconds`, 2 to 20, the same on every rank; makes two calls."""
        call()
        (once,) = _times(call, 1, self.device)
        return _count(milliseconds, max(self.tell(once)))

    def together_ms(self, call: Callable[[], object], repeats: int) -> float:
        """Return the time of a call that all ranks make, in ms.

        Calls follow each other without a pause, as layers of a model do, after two that warm up and bring ranks in step. A
        call takes as long as on its slowest rank; the median over calls counts.
        """
        self.tell(None)
        call()
        call()
        by_rank = self.tell(_times(call, repeats, self.device))
        return statistics.median(float(max(times)) for times in zip(*by_rank, strict=True))

    def alone_ms(self, call: Callable[[], object], milliseconds: float) -> float:
        """Return the time of a call of this rank alone, in ms, from calls for about `milliseconds`; tells nobody."""
        call()
        (once,) = _times(call, 1, self.device)
        return statistics.median(_times(call, _count(milliseconds, once), self.device))


def _count(milliseconds: float, once: float) -> int:
    return max(2, min(_MOST, round(milliseconds / max(once, 1e-6))))


def _times(call: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    """Return how long each of several calls in a row takes, in ms: on CUDA by events between them, elsewhere by the clock."""
    if device.type == "cuda":
        # No pause before the first: ranks are in step by the call before.
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]  # type: ignore[no-untyped-call]  # torch's own
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        torch.cuda.synchronize(device)
        return [before.elapsed_time(after) for before, after in itertools.pairwise(events)]
    marks = [time.perf_counter()]
    for _ in range(repeats):
        call()
        marks.append(time.perf_counter())
    return [1000 * (after - before) for before, after in itertools.pairwise(marks)]
