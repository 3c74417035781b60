"""The part that layers and `attention()` share: from a checked call to the implementation that runs it.

Everything here is traced by `torch.compile(fullgraph=True)` but `_select`, which Dynamo runs while tracing and whose answer
it keeps: its arguments are constants that Dynamo guards (shapes, dtypes, the wish of call and scope), so a change is followed.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastvideo.attention.backends.abstract import AttentionImpl, AttentionMetadata, forward_keywords
from fastvideo.attention.registry import backend_name, load_backend, registered_backends
from fastvideo.attention.request import AttentionRequest
from fastvideo.attention.selector import BackendWish, Decision, decide, resolve_wish, supported_names, with_system
from fastvideo.compilation import constant_while_tracing
from fastvideo.forward_context import MetadataInContext, thread_state

__all__ = ["Dispatcher", "Selected", "find_metadata"]

_dispatchers: weakref.WeakValueDictionary[int, Dispatcher] = weakref.WeakValueDictionary()
_next_token = itertools.count()


@dataclass(frozen=True)
class Selected:
    """An implementation ready to run, with what its backend says about itself.

    Attributes:
        name: The backend's name.
        impl: The implementation, built for the heads of one device.
        keywords: What its `forward` takes by keyword.
        metadata_cls: The metadata that it takes.
        requires_metadata: Whether it can't run without.
        has_preprocess: It overrides `preprocess_qkv`.
        has_postprocess: It overrides `postprocess_output`.
    """

    name: str
    impl: AttentionImpl[Any]
    keywords: frozenset[str]
    metadata_cls: type[AttentionMetadata]
    requires_metadata: bool
    has_preprocess: bool
    has_postprocess: bool


class Dispatcher:
    """Chooses backends for one layer and keeps their implementations.

    Copies and pickles start without implementations and make their own.

    Args:
        head_size: Size of a head.
        softmax_scale: Factor of the scores.
        causal: Each query sees only keys up to its own position.
        prefix: The layer's name in its model.
        supported: Backends that may run; `None` means every one.
        backend: The layer's own wish.
        default_backend: What runs instead of automatic selection when nobody wishes.
        extra_impl_args: Handed to the implementation.
    """

    def __init__(
        self,
        *,
        head_size: int,
        softmax_scale: float,
        causal: bool,
        prefix: str = "",
        supported: tuple[BackendWish, ...] | None = None,
        backend: BackendWish | None = None,
        default_backend: str | None = None,
        extra_impl_args: dict[str, Any] | None = None,
    ) -> None:
        self.head_size = head_size
        self.softmax_scale = softmax_scale
        self.causal = causal
        self.prefix = prefix
        self.supported = supported_names(supported)
        is_auto = backend is None or (isinstance(backend, str) and backend.lower() == "auto")
        self.backend = None if is_auto or backend is None else backend_name(backend)
        self.default_backend = default_backend
        self.extra_impl_args = extra_impl_args or {}
        self._start_empty()

    def _start_empty(self) -> None:
        self.token = next(_next_token)
        self.selected: dict[str, Selected] = {}
        self.decisions: dict[str, Decision] = {}
        self.last_key: str | None = None
        _dispatchers[self.token] = self

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("token", "selected", "decisions", "last_key")
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_empty()

    def __deepcopy__(self, memo: dict[int, Any]) -> Dispatcher:
        copy = type(self).__new__(type(self))
        memo[id(self)] = copy
        copy.__setstate__(self.__getstate__())
        return copy

    @property
    def decision(self) -> Decision | None:
        """The last decision made, eagerly or while compiling; `None` before the first call."""
        return None if self.last_key is None else self.decisions[self.last_key]

    def select(self, call: dict[str, Any], backend: BackendWish | None = None) -> Selected:
        """Return what runs a call.

        Args:
            call: The fields of its `AttentionRequest`.
            backend: A backend asked for by this call.

        Raises:
            BackendUnavailable: Nothing that may run it can, or the backend asked for can't.
        """
        key = _select(self.token, backend, thread_state.backend_wish, **call)
        if not torch.compiler.is_compiling():  # a side effect that checkpointing under compile can't have
            self.last_key = key
        return self.selected[key]

    def select_now(self, request: AttentionRequest, backend: BackendWish | None, scope: str | None) -> str:
        """Choose, build the implementation if it is new, and return the key under which both are kept."""
        wish, notes = resolve_wish(backend, self.backend, scope, self.supported)
        candidates = self.supported
        if wish is None and self.default_backend is not None:
            wish, _ = resolve_wish(None, self.default_backend, None, self.supported)
        decision = decide(with_system(request), wish, candidates, notes, tuple(registered_backends()))
        name = decision.require()
        key = f"{name} with {request.num_heads} and {request.num_kv_heads} heads on {request.device}"
        if key not in self.selected:
            self.selected[key] = self._build(name, request)
        self.decisions[key] = decision
        self.last_key = key
        return key

    def _build(self, name: str, request: AttentionRequest) -> Selected:
        backend = load_backend(name)
        impl_cls = backend.get_impl_cls()
        impl = impl_cls(
            num_heads=request.num_heads,
            head_size=self.head_size,
            softmax_scale=self.softmax_scale,
            causal=self.causal,
            num_kv_heads=request.num_kv_heads,
            prefix=f"{self.prefix}.impl" if self.prefix else "",
            **self.extra_impl_args,
        )
        return Selected(
            name=name,
            impl=impl,
            keywords=forward_keywords(impl_cls),
            metadata_cls=backend.get_metadata_cls(),
            requires_metadata=backend.requires_metadata(),
            has_preprocess=impl_cls.preprocess_qkv is not AttentionImpl.preprocess_qkv,
            has_postprocess=impl_cls.postprocess_output is not AttentionImpl.postprocess_output,
        )


@constant_while_tracing
def _select(token: int, backend: BackendWish | None, scope: str | None, **call: Any) -> str:
    return _dispatchers[token].select_now(AttentionRequest(**call), backend, scope)


def find_metadata(selected: Selected, explicit: AttentionMetadata | None) -> AttentionMetadata | None:
    """Return the metadata that a backend takes: the one handed over, or the context's of its class.

    Raises:
        TypeError: The metadata handed over is of a class that the backend doesn't take.
        ValueError: The backend can't run without, and the context has none of its class.
    """
    wanted = selected.metadata_cls
    if explicit is not None:
        if not isinstance(explicit, wanted):
            raise TypeError(
                f"backend {selected.name} takes attn_metadata of class {wanted.__name__}, got {type(explicit).__name__}"
            )
        return explicit
    found = match_metadata(thread_state.attn_metadata, wanted)
    if found is None and selected.requires_metadata:
        present = thread_state.attn_metadata
        raise ValueError(
            f"backend {selected.name} needs metadata of class {wanted.__name__}, and the forward context holds "
            f"{_describe(present)}; build it once per step with the backend's builder and call the model inside "
            "`with set_forward_context(current_timestep=..., attn_metadata=...):`"
        )
    return found


def match_metadata(present: MetadataInContext, wanted: type[AttentionMetadata]) -> AttentionMetadata | None:
    """Return the object of class `wanted` among the context's metadata, or `None`."""
    if present is None or isinstance(present, AttentionMetadata):
        return present if isinstance(present, wanted) else None
    if wanted in present:
        return present[wanted]
    return next((metadata for metadata in present.values() if isinstance(metadata, wanted)), None)


def _describe(present: MetadataInContext) -> str:
    if present is None:
        return "none"
    if isinstance(present, Mapping):
        return ", ".join(cls.__name__ for cls in present) or "an empty mapping"
    return type(present).__name__
