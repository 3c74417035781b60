"""A place where the ranks of a test meet, without a port that somebody else may take first."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist

__all__ = ["meeting_point"]


@contextlib.contextmanager
def meeting_point() -> Iterator[dict[str, str]]:
    """Keep a store, and yield the environment variables by which processes find it.

    A port that was free a moment ago may be taken when rank 0 listens on it. This process listens first, and the ranks, rank 0
    too, only connect. One meeting point serves one `init_process_group` of each rank.

    Example:
        >>> with meeting_point() as variables:
        ...     sorted(variables)
        ['MASTER_ADDR', 'MASTER_PORT', 'TORCHELASTIC_USE_AGENT_STORE']
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]  # not in `__all__`
    yield {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    del store
