"""Per-step information for layers deep inside a model, kept per thread.

A denoising loop sets the step's metadata once; every attention layer below takes the object that matches its backend.
The state is an ordinary attribute of a `threading.local`, which Dynamo traces and guards: a compiled model follows a change,
where a `ContextVar` would break the graph. Threads start empty.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias, TypeVar

from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.checkpoint import checkpoint as torch_checkpoint

if TYPE_CHECKING:
    from fastvideo.attention.backends.abstract import AttentionMetadata

__all__ = [
    "ForwardContext",
    "MetadataInContext",
    "checkpoint",
    "checkpoint_context_fn",
    "get_forward_context",
    "set_forward_context",
    "thread_state",
]

P = ParamSpec("P")
R = TypeVar("R")
MetadataInContext: TypeAlias = "AttentionMetadata | Mapping[type[AttentionMetadata], AttentionMetadata] | None"


@dataclass(frozen=True)
class ForwardContext:
    """What `set_forward_context` was given.

    Attributes:
        current_timestep: Index of the denoising step, or its timestep. Layers never read it, so that a change compiles
            nothing anew.
        attn_metadata: One metadata object, or a mapping from metadata class to object.
        forward_batch: Anything the caller wants to carry along.
        shard_lengths: Tokens of each rank's shard of the sequence; `None` means that they weren't given.
    """

    current_timestep: int | float | Tensor
    attn_metadata: MetadataInContext
    forward_batch: Any = None
    shard_lengths: tuple[int, ...] | None = None


class _ThreadState(threading.local):
    """What layers read. Set in `__init__`, which runs once per thread: Dynamo guards instance attributes only."""

    def __init__(self) -> None:
        self.context: ForwardContext | None = None
        self.attn_metadata: MetadataInContext = None
        self.backend_wish: str | None = None
        self.sequence_group: Any = None
        self.shard_lengths: tuple[int, ...] | None = None

    def snapshot(self) -> dict[str, Any]:
        return dict(self.__dict__)


thread_state = _ThreadState()
"""The state of the current thread. Written by the context managers of this package alone."""


@contextlib.contextmanager
def restored(**values: Any) -> Iterator[None]:
    """Set attributes of the thread's state, and put the old ones back on leaving."""
    before = {name: getattr(thread_state, name) for name in values}
    for name, value in values.items():
        setattr(thread_state, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(thread_state, name, value)


@contextlib.contextmanager
def set_forward_context(
    current_timestep: int | float | Tensor,
    attn_metadata: MetadataInContext,
    forward_batch: Any = None,
    *,
    shard_lengths: Sequence[int] | None = None,
) -> Iterator[ForwardContext]:
    """Carry a step's metadata to every attention layer called inside, on this thread.

    Args:
        current_timestep: Index of the denoising step, or its timestep: a number or a tensor.
        attn_metadata: One metadata object, a mapping from metadata class to object (several sparse backends in one
            model), or `None`.
        forward_batch: Anything that code inside wants to find again by `get_forward_context()`.
        shard_lengths: Tokens of each rank's shard where several devices share the sequence, in the order of ranks and the
            same on all; `None` leaves those of `sequence_parallel(...)`, by default equal shards.

    Raises:
        TypeError: `current_timestep` or `attn_metadata` is none of these, or `shard_lengths` are no integers.
        ValueError: A shard length is negative.

    Example:
        >>> with set_forward_context(current_timestep=7, attn_metadata=None):
        ...     get_forward_context().current_timestep
        7
    """
    if not isinstance(current_timestep, (int, float, Tensor)):
        raise TypeError(f"expected current_timestep as an integer, a float or a tensor, got {current_timestep!r:.80}")
    _check_metadata(attn_metadata)
    lengths = check_shard_lengths(shard_lengths)
    context = ForwardContext(current_timestep, attn_metadata, forward_batch, lengths)
    lengths = thread_state.shard_lengths if lengths is None else lengths
    with restored(context=context, attn_metadata=attn_metadata, shard_lengths=lengths):
        yield context


def get_forward_context() -> ForwardContext:
    """Return what the innermost `set_forward_context` of this thread was given.

    Raises:
        RuntimeError: None is active.

    Example:
        >>> with set_forward_context(current_timestep=7, attn_metadata=None):
        ...     get_forward_context().current_timestep
        7
    """
    context = thread_state.context
    if context is None:
        raise RuntimeError(
            "no forward context is set on this thread; call the model inside "
            "`with fastvideo.forward_context.set_forward_context(current_timestep=..., attn_metadata=...):`"
        )
    return context


def checkpoint_context_fn() -> tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]:
    """Return the pair that `torch.utils.checkpoint.checkpoint(..., context_fn=...)` wants.

    Recomputation runs after the forward context has ended and, on CUDA, on another thread; the second manager brings back
    the context, the backend scope and the mesh of the forward pass, so that it computes the same thing. Lists of tiles that
    the forward pass has chosen are kept and used again: a choice runs once.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> torch_checkpoint(torch.sin, x, use_reentrant=False, context_fn=checkpoint_context_fn).sum().backward()
        >>> torch.equal(x.grad, torch.cos(x))
        True
    """
    # The compiler traces torch's checkpointing: the forward context is already folded into the graph, and torch wants two
    # dispatch modes. `torch.compiler.is_compiling()` is false here in torch 2.11.
    if get_proxy_mode() is not None:
        contexts: tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]
        contexts = create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call]  # torch's own
        return contexts
    kept: list[Tensor] = []

    def keep(choose: Callable[[], Tensor]) -> Tensor:
        kept.append(choose())
        return kept[-1]

    return _ChoiceMode(keep), _Recomputation(kept, thread_state.snapshot())


def checkpoint(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run `function` under activation checkpointing, with this thread's forward context in the recomputation too.

    Lists of tiles that sparse attention chooses inside are kept, everything else is recomputed; see `checkpoint_context_fn`.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> checkpoint(torch.sin, x).sum().backward()
        >>> torch.equal(x.grad, torch.cos(x))
        True
    """
    call = functools.partial(function, *args, **kwargs)
    return torch_checkpoint(call, use_reentrant=False, context_fn=checkpoint_context_fn)  # type: ignore[no-any-return]


def _is_choice(op: Any) -> bool:
    return bool(op.name() == "fastvideo::select_tiles")


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:  # noqa: ARG001  # torch's signature
    return CheckpointPolicy.MUST_SAVE if _is_choice(op) else CheckpointPolicy.PREFER_RECOMPUTE


class _ChoiceMode(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Hands each choice of tiles to a function and leaves every other operator alone.

    Torch's selective checkpointing adds half as much again to each operator, serves one backward pass and refuses operators
    of higher order.

    Args:
        choose: Takes what would make the choice, and returns one.
    """

    supports_higher_order_operators = True

    def __init__(self, choose: Callable[[Callable[[], Tensor]], Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self._choose = choose

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled code inside stays compiled; the choice is an operator of its own there too."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return self._choose(functools.partial(func, *args, **kwargs)) if _is_choice(func) else func(*args, **kwargs)


class _Recomputation:
    """The state of the forward pass and what it has chosen; entered anew by each backward pass."""

    def __init__(self, kept: list[Tensor], state: dict[str, Any]) -> None:
        self._kept, self._state = kept, state
        self._inside = contextlib.ExitStack()

    def __enter__(self) -> None:
        kept = iter(self._kept)

        def again(choose: Callable[[], Tensor]) -> Tensor:
            choice = next(kept, None)
            return choose() if choice is None else choice

        self._inside.enter_context(restored(**self._state))
        self._inside.enter_context(_ChoiceMode(again))

    def __exit__(self, *error: object) -> None:
        self._inside.close()


def check_shard_lengths(shard_lengths: Sequence[int] | None) -> tuple[int, ...] | None:
    """Return shard lengths as a tuple of integers, or `None` for none.

    Raises:
        TypeError: They are no sequence of integers.
        ValueError: One is negative.

    Example:
        >>> check_shard_lengths([3, 0])
        (3, 0)
    """
    if shard_lengths is None:
        return None
    is_sequence = isinstance(shard_lengths, (tuple, list))
    if not is_sequence or not all(isinstance(length, int) and not isinstance(length, bool) for length in shard_lengths):
        raise TypeError(f"expected shard_lengths as a tuple of integers, one per rank, got {shard_lengths!r:.80}")
    if any(length < 0 for length in shard_lengths):
        raise ValueError(f"expected shard_lengths >= 0, got {shard_lengths}")
    return tuple(shard_lengths)


def _check_metadata(attn_metadata: MetadataInContext) -> None:
    from fastvideo.attention.backends.abstract import AttentionMetadata  # layers above this file import it

    if isinstance(attn_metadata, Mapping):
        for cls, metadata in attn_metadata.items():
            if not (isinstance(cls, type) and isinstance(metadata, cls) and issubclass(cls, AttentionMetadata)):
                raise TypeError(f"attn_metadata maps metadata classes to their objects, got {cls!r}: {type(metadata)}")
    elif attn_metadata is not None and not isinstance(attn_metadata, AttentionMetadata):
        raise TypeError(
            "attn_metadata is an AttentionMetadata, a mapping from metadata class to object, or None, "
            f"got {type(attn_metadata)}"
        )
