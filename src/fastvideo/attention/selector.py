"""Which backend runs a request, and why not the others.

`choose` is pure: a request (with the machine in it), a wish and the candidates in, a `Decision` with its whole trace out.
Order of wishes: call argument, layer argument, `use_attn_backend(...)`, `FASTVIDEO_ATTENTION_BACKEND`, automatic.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from fastvideo.attention.backends.abstract import AttentionBackend
from fastvideo.attention.registry import BackendLoadError, backend_name, load_backend, registered_backends
from fastvideo.attention.request import AttentionRequest
from fastvideo.attention.validation import as_size
from fastvideo.forward_context import restored, thread_state
from fastvideo.platforms import AttentionBackendEnum, current_platform
from fastvideo.settings import Settings

__all__ = [
    "BackendUnavailable",
    "BackendWish",
    "Decision",
    "Verdict",
    "Wish",
    "choose",
    "get_attn_backend",
    "resolve_wish",
    "use_attn_backend",
]

logger = logging.getLogger("fastvideo.attention")

BackendWish = str | AttentionBackendEnum | type[AttentionBackend]
"""How a user names a backend."""


class BackendUnavailable(RuntimeError):
    """No allowed backend can run the request. `decision` holds the request and every reason.

    Example:
        >>> from fastvideo.attention import attention
        >>> q = torch.randn(1, 4, 2, 8)
        >>> try:
        ...     attention(q, q, q, dropout_p=0.5, backend="SLIDING_TILE_ATTN")
        ... except BackendUnavailable as error:
        ...     print(error.decision.trace[0].reasons[0])
        dropout (dropout_p=0.5) is not supported (its forward takes no `dropout_p`)
    """

    def __init__(self, decision: Decision) -> None:
        super().__init__(str(decision))
        self.decision = decision


@dataclass(frozen=True)
class Wish:
    """A backend asked for by name, and by whom: `"call"`, `"layer"`, `"scope"` or `"environment"`."""

    name: str
    source: str


@dataclass(frozen=True)
class Verdict:
    """What one backend says to a request; it accepts when there are no reasons against it."""

    backend: str
    reasons: tuple[str, ...] = ()
    exact: bool = False
    expected_speed: float = 0.0

    @property
    def accepts(self) -> bool:
        """Whether the backend can run the request."""
        return not self.reasons


@dataclass(frozen=True)
class Decision:
    """The outcome of a selection.

    Attributes:
        request: What was asked.
        wish: The backend asked for by name, or `None` for automatic selection.
        chosen: Name of the backend that runs, or `None` if none can.
        trace: One verdict per candidate.
        notes: What else shaped the choice, for people.
    """

    request: AttentionRequest
    wish: Wish | None
    chosen: str | None
    trace: tuple[Verdict, ...]
    notes: tuple[str, ...] = ()

    def require(self) -> str:
        """Return the chosen backend's name.

        Raises:
            BackendUnavailable: None can run; the message lists every reason.
        """
        if self.chosen is None:
            raise BackendUnavailable(self)
        return self.chosen

    def __str__(self) -> str:
        call, others = _short(self.request), self.trace
        if self.chosen is not None:
            asked = "chosen automatically" if self.wish is None else f"asked for by {self.wish.source}"
            head = f"{self.chosen} runs ({asked}): {call}"
        elif self.wish is None:
            head = f"no attention backend can run this: {call}"
        else:
            # The trace begins with the backend that was asked for, and its reasons are what the caller needs to know.
            asked_for, *rest = self.trace
            reasons, others = "\n    ".join(asked_for.reasons), tuple(rest)
            head = f"backend {self.wish.name}, asked for by {self.wish.source}, can't run this: {reasons}\n  the call: {call}"
        lines = [head]
        for verdict in others:
            accepted = "accepts" if verdict.exact else "accepts, but runs only when named"
            lines.append(f"  - {verdict.backend}: " + ("\n      ".join(verdict.reasons) or accepted))
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def choose(
    request: AttentionRequest,
    wish: Wish | None = None,
    candidates: tuple[str, ...] | None = None,
    notes: tuple[str, ...] = (),
) -> Decision:
    """Decide which backend runs a request, without running or importing anything heavy.

    Args:
        request: The call, with `system` filled in.
        wish: A backend asked for by name: it runs or nothing does. `None` takes the fastest exact one that accepts.
        candidates: Names allowed to run; `None` means every registered backend.
        notes: Carried into the decision.

    Example:
        >>> request = AttentionRequest(8, 8, 64, 128, 128, torch.float32, "cpu", system=current_platform("cpu"))
        >>> choose(request).chosen
        'TORCH_SDPA'
    """
    allowed = tuple(registered_backends()) if candidates is None else candidates
    trace = [_verdict(name, request, automatic=wish is None) for name in allowed]
    if wish is None:
        exact = [verdict for verdict in trace if verdict.accepts and verdict.exact]
        chosen = max(exact, key=lambda verdict: verdict.expected_speed).backend if exact else None
        return Decision(request, wish, chosen, tuple(trace), notes)
    if wish.name not in allowed:
        reason = f"not among the backends that are supported here: {', '.join(allowed)}"
        if wish.name == AttentionBackendEnum.NO_ATTENTION.name:
            reason = "it names no implementation; name a backend that computes attention, or none for automatic selection"
        return Decision(request, wish, None, (Verdict(wish.name, (reason,)), *trace), notes)
    # The trace begins with the backend that the caller asked for.
    trace.sort(key=lambda verdict: verdict.backend != wish.name)
    return Decision(request, wish, wish.name if trace[0].accepts else None, tuple(trace), notes)


def _verdict(name: str, request: AttentionRequest, *, automatic: bool) -> Verdict:
    try:
        backend = load_backend(name)
    except BackendLoadError as error:
        return Verdict(name, (f"can't be loaded: {error}",))
    try:
        reasons, speed = backend.rejections(request), backend.expected_speed(request)
    except Exception as error:  # what a third party's class raises must not stop other backends
        if registered_backends()[name].origin == "built-in":
            raise
        return Verdict(name, (f"its class raised {type(error).__name__} when it was asked: {error}",))
    if automatic and backend.exact and backend.requires_metadata():
        wanted = backend.get_metadata_cls()
        if request.metadata_cls is None or not issubclass(request.metadata_cls, wanted):
            reasons = (*reasons, f"needs metadata of class {wanted.__name__}; set it with set_forward_context(...)")
    return Verdict(name, tuple(reasons), backend.exact, speed)


def resolve_wish(
    call: BackendWish | None,
    layer: str | None,
    scope: str | None,
    supported: tuple[str, ...] | None,
) -> tuple[Wish | None, tuple[str, ...]]:
    """Return the wish that counts, and notes on those that don't apply.

    A wish by call or layer is meant for this place and is kept whatever `supported` says. A wish by scope or environment
    is meant for many layers: one that declares its supported backends, and not this one, isn't addressed by it.
    """
    if call is not None and not _is_auto(call):
        return Wish(backend_name(call), "call"), ()
    if layer is not None:
        return Wish(layer, "layer"), ()
    notes: list[str] = []
    environment = Settings.from_environment().attention_backend
    for name, source in ((scope, "scope"), (environment, "environment")):
        if name is None:
            continue
        if _is_auto(name):
            return None, ()
        wish = Wish(backend_name(name, "FASTVIDEO_ATTENTION_BACKEND: " if source == "environment" else ""), source)
        if supported is None or wish.name in supported:
            return wish, ()
        notes.append(f"{wish.name}, asked for by {source}, doesn't address this layer: it supports {', '.join(supported)}")
        break
    return None, tuple(notes)


@functools.lru_cache(maxsize=4096)
def decide(
    request: AttentionRequest,
    wish: Wish | None,
    candidates: tuple[str, ...] | None,
    notes: tuple[str, ...],
    registry: tuple[str, ...],  # noqa: ARG001  # part of the key: a new backend makes new decisions
) -> Decision:
    """`choose`, remembered, and logged when first made."""
    decision = choose(request, wish, candidates, notes)
    logger.info("%s", decision)
    return decision


@contextlib.contextmanager
def use_attn_backend(backend: BackendWish) -> Iterator[None]:
    """Ask for a backend in every attention call inside, on this thread.

    Layers with a narrower wish of their own keep it. `"auto"` undoes an outer scope and the environment variable.

    Raises:
        UnknownBackend: No backend has that name.

    Example:
        >>> from fastvideo.attention import attention
        >>> q = torch.randn(1, 16, 2, 32)
        >>> with use_attn_backend("TORCH_SDPA"):
        ...     out = attention(q, q, q)
    """
    with restored(backend_wish="auto" if _is_auto(backend) else backend_name(backend)):
        yield


def get_attn_backend(
    head_size: int,
    dtype: torch.dtype,
    supported_attention_backends: tuple[AttentionBackendEnum | str, ...] | None = None,
) -> type[AttentionBackend]:
    """Return the backend class that a plain self-attention layer would use on this machine's fastest device.

    Args:
        head_size: Size of a head.
        dtype: Dtype of query, key and value.
        supported_attention_backends: Backends that may be chosen; `None` means every one.

    Raises:
        TypeError: A size, the dtype or the backends are of a wrong type.
        ValueError: The size isn't positive, or there are no backends.
        BackendUnavailable: None can run it, or the one asked for by scope or environment can't.

    Example:
        >>> get_attn_backend(64, torch.float32).get_name()
        'TORCH_SDPA'
    """
    head_size = as_size("head_size", head_size)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"expected dtype as a torch.dtype, such as torch.bfloat16, got {dtype!r}")
    system = current_platform()
    supported = supported_names(supported_attention_backends)
    request = AttentionRequest(1, 1, head_size, 1, 1, dtype, system.device_type, system=system)
    wish, notes = resolve_wish(None, None, thread_state.backend_wish, supported)
    return load_backend(choose(request, wish, supported, notes).require())


def supported_names(supported: Iterable[BackendWish] | None) -> tuple[str, ...] | None:
    """Return the names of a layer's supported backends; `None` means every backend.

    Raises:
        TypeError: It is a single name instead of a tuple of names.
        ValueError: It is empty.
    """
    if supported is None:
        return None
    if isinstance(supported, str) or not isinstance(supported, Iterable):
        raise TypeError(f"expected supported_attention_backends as a tuple, got {supported!r}; write (backend,) for one")
    names = tuple(backend_name(backend) for backend in supported)
    if not names:
        raise ValueError(f"expected at least one backend to support, or None for every one, got {supported!r}")
    return names


def _is_auto(wish: BackendWish) -> bool:
    return isinstance(wish, str) and wish.lower() == "auto"


def _short(request: AttentionRequest) -> str:
    parts = [
        f"query [{request.batch}, {request.query_len}, {request.num_heads}, {request.head_size}]",
        f"key [{request.batch}, {request.key_len}, {request.num_kv_heads}, {request.head_size}]",
        str(request.dtype).removeprefix("torch."),
        request.device,
        *(what for what in request.requested_keywords().values()),
    ]
    parts += ["causal"] * request.is_causal + ["with gradient"] * request.needs_grad
    return ", ".join(parts)
