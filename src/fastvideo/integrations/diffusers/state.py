"""What the places of a model need to know about the forward call that they run in.

The hook at the model's door writes a `ForwardState`; processors deep inside read it. It is per thread, and everything that
layers read from it is a small constant or a tensor: a compiled block is compiled anew when the phase changes, not with every
step. Each thread keeps its state in a box, because Dynamo, which may compile a hook by itself, carries out what that writes to
an ordinary object, and forgets what it writes to a `threading.local`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from fastvideo.attention.backends.abstract import AttentionMetadata

__all__ = ["ForwardState", "current_state", "enter_state", "leave_state", "with_state"]


class ForwardState:
    """One forward call of one model.

    Attributes:
        owner: The hook that wrote it.
        phase: Number of the plan's phase.
        metadata: The metadata objects of the call, by their place in the plan; `None` where this phase needs none.
        text_lengths: Real text tokens of each sample, where some backend takes no padding mask; else `None`.
        num_text: Text tokens that the model joins to its video tokens, padding included.
        shard_lengths: Video tokens of each device, where several share them; else `None`.
        before: The state that this one hides until it is left.
    """

    def __init__(self, owner: object, phase: int, num_metadata: int, num_text: int) -> None:
        self.owner = owner
        self.phase = phase
        self.metadata: tuple[AttentionMetadata | None, ...] = (None,) * num_metadata
        self.text_lengths: tuple[int, ...] | None = None
        self.num_text = num_text
        self.shard_lengths: tuple[int, ...] | None = None
        self.before: ForwardState | None = None


class _Box:
    def __init__(self) -> None:
        self.state: ForwardState | None = None


class _Thread(threading.local):
    def __init__(self) -> None:
        self.box = _Box()


_thread = _Thread()


def enter_state(state: ForwardState) -> None:
    """Make `state` the current one of this thread until `leave_state`, for a pair of hooks around a model."""
    leave_state(state.owner)  # a call that ended without its second hook has left its state behind
    state.before = _thread.box.state
    _thread.box.state = state


def leave_state(owner: object) -> None:
    """Put back what was before the current state, if `owner` wrote that."""
    state = _thread.box.state
    if state is not None and state.owner is owner:
        _thread.box.state = state.before


def current_state() -> ForwardState | None:
    """Return the state of the forward call that runs on this thread, or `None` outside of one."""
    return _thread.box.state


@contextlib.contextmanager
def with_state(state: ForwardState | None) -> Iterator[None]:
    """Make a forward call's state the current one, for what is computed again later or on another thread.

    Example:
        >>> with with_state(ForwardState(object(), phase=1, num_metadata=0, num_text=0)):
        ...     current_state().phase
        1
    """
    before = _thread.box.state
    _thread.box.state = state
    try:
        yield
    finally:
        _thread.box.state = before
