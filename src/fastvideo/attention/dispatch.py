"""The part that layers and `attention()` share: from a checked call to the implementation that runs it.

Everything here is traced by `torch.compile(fullgraph=True)` but `_select`, which Dynamo runs while tracing and whose answer
it keeps: its arguments are constants that Dynamo guards (shapes, dtypes, wishes and limits), so a change is followed.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastvideo.attention.backends.abstract import AttentionImpl, AttentionMetadata, forward_keywords
from fastvideo.attention.registry import backend_name, load_backend, registered_backends
from fastvideo.attention.request import AttentionRequest
from fastvideo.attention.selector import BackendWish, Decision, Wish, decide, resolve_wish, supported_names
from fastvideo.compilation import constant_while_tracing, plain
from fastvideo.forward_context import MetadataInContext, thread_state
from fastvideo.platforms import current_platform

__all__ = ["Dispatcher", "Selected", "check_sequence", "find_metadata"]

_Sizes = tuple[int, int, float, bool, int]
"""Query heads, head size, softmax scale, causal, key heads: what an implementation is built for."""

_dispatchers: weakref.WeakValueDictionary[int, Dispatcher] = weakref.WeakValueDictionary()
_tokens = itertools.count()


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

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        metadata: AttentionMetadata | None,
        extras: dict[str, Any],
    ) -> Any:
        """Return what the implementation's `forward` returns: the output, with `return_lse` beside the log-sum-exp.

        Raises:
            TypeError: It returns something else.
        """
        impl: Any = self.impl  # its keyword arguments are those of its backend
        return self.checked("forward", impl.forward(query, key, value, metadata, **extras), query, "return_lse" in extras)

    def postprocess(self, output: torch.Tensor, metadata: AttentionMetadata | None, like: torch.Tensor) -> torch.Tensor:
        """Return what the implementation's `postprocess_output` returns.

        Raises:
            TypeError: It returns something unlike the query, `like`.
        """
        found: torch.Tensor = self.checked("postprocess_output", self.impl.postprocess_output(output, metadata), like)
        return found

    def checked(self, method: str, result: Any, like: torch.Tensor, has_lse: bool = False) -> Any:
        """Return what a method of the implementation returned, if that is a tensor like `like`, or a pair with its log-sum-exp.

        Raises:
            TypeError: It isn't.
        """
        is_pair = has_lse and isinstance(result, tuple) and len(result) == 2
        output, lse = result if is_pair else (result, None)
        fits = isinstance(output, torch.Tensor) and output.shape == like.shape and output.dtype == like.dtype
        if fits and not has_lse:
            return result
        wide = torch.promote_types(like.dtype, torch.float32)
        if fits and isinstance(lse, torch.Tensor) and lse.shape == like.shape[:3] and lse.dtype == wide:
            return result
        expected = f"{like.dtype} {tuple(like.shape)}"
        if has_lse:
            expected = f"({expected}, {wide} {tuple(like.shape[:3])})"
        raise TypeError(f"backend {self.name}: expected {expected} from its {method}, got {_describe_result(result)}; mend it")


def _describe_result(result: Any) -> str:
    if isinstance(result, tuple):
        return f"({', '.join(map(_describe_result, result))})"
    return f"{result.dtype} {tuple(result.shape)}" if isinstance(result, torch.Tensor) else type(result).__name__


_MAX_KEPT = 4096
"""Implementations that are kept in one place; one made anew costs microseconds, and a compiled graph."""

_shared: dict[str, Selected] = {}
"""Implementations that keep nothing of their layer, by what they were built for."""

_traced: dict[str, Decision] = {}
"""The last decision made while compiling, by the configuration of the layers it holds for."""


class Dispatcher:
    """Chooses backends for one layer and keeps the implementations that are its own.

    Copies and pickles start without implementations and make their own.

    Args:
        built_for: What tells this layer's decisions while compiling from those of others.
        prefix: The layer's name in its model.
        supported: Backends that may run; `None` means every one.
        backend: The layer's own wish.
        default_backend: What runs instead of automatic selection when nobody wishes.
        extra_impl_args: Handed to the implementation.
    """

    def __init__(
        self,
        *,
        built_for: tuple[Any, ...] = (),
        prefix: str = "",
        supported: tuple[BackendWish, ...] | None = None,
        backend: BackendWish | None = None,
        default_backend: str | None = None,
        extra_impl_args: dict[str, Any] | None = None,
    ) -> None:
        self.prefix = prefix
        is_auto = backend is None or (isinstance(backend, str) and backend.lower() == "auto")
        own = None if is_auto or backend is None else backend_name(backend)
        self.limits = (supported_names(supported), own, default_backend)
        self.extra_impl_args = extra_impl_args or {}
        # A string, because Dynamo would make floats symbolic once they differ between layers.
        self.configuration = repr((built_for, self.limits))
        self._start_empty()

    def _start_empty(self) -> None:
        self.token = next(_tokens)
        self.own: dict[str, Selected] = {}
        self.last: Decision | None = None
        _dispatchers[self.token] = self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("token", "own", "last")}

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
        """The decision of the last eager call; before any, the last one made while compiling layers like this."""
        return _traced.get(self.configuration) if self.last is None else self.last

    def select(
        self, call: dict[str, Any], backend: BackendWish | None = None, metadata: AttentionMetadata | None = None
    ) -> Selected:
        """Return what runs a call.

        Traced code reads nothing that differs between layers of one configuration, unless the backend's implementations
        belong to their layers: so equal blocks share one compiled graph.

        Args:
            call: The fields of its `AttentionRequest`.
            backend: A backend asked for by this call.
            metadata: The metadata handed over; `None` means that the context's counts.

        Raises:
            BackendUnavailable: Nothing that may run it can, or the backend asked for can't.
        """
        has_own_arguments = len(self.extra_impl_args) > 0
        scope = thread_state.backend_wish
        call = _with_metadata(call, metadata)
        if torch.compiler.is_compiling():
            call = {name: plain(value) for name, value in call.items()}
            key = _select_while_tracing(self.configuration, self.limits, has_own_arguments, backend, scope, **call)
        else:
            key, decision = _select(self.limits, has_own_arguments, backend, scope, call)
            self.last = decision
        shared = _shared.get(key)
        if shared is not None:
            return shared
        _make_own(self.token, key, call["num_heads"], call["head_size"], call["scale"], call["is_causal"], call["num_kv_heads"])
        return self.own[key]

    def accepts(self, call: dict[str, Any], metadata: AttentionMetadata | None = None) -> bool:
        """Return whether `select` would find something to run a call, without running it or keeping the decision."""
        scope, call = thread_state.backend_wish, _with_metadata(call, metadata)
        if torch.compiler.is_compiling():
            return _accepts(self.limits, scope, **{name: plain(value) for name, value in call.items()})
        return _accepts(self.limits, scope, **call)

    def make_own(self, key: str, sizes: _Sizes) -> None:
        """Build the layer's own implementation for a key, if it is new."""
        if key not in self.own:
            prefix = f"{self.prefix}.impl" if self.prefix else ""
            _keep(self.own, key, _build(key.split()[0], sizes, prefix, self.extra_impl_args))


def _keep(kept: dict[str, Selected], key: str, selected: Selected) -> None:
    """Keep an implementation in the place of the oldest, so that calls of ever new scales don't fill memory."""
    if len(kept) >= _MAX_KEPT:
        kept.pop(next(iter(kept)), None)
    kept[key] = selected


def _with_metadata(call: dict[str, Any], metadata: AttentionMetadata | None) -> dict[str, Any]:
    at_hand = thread_state.attn_metadata if metadata is None else metadata
    return {**call, "metadata_cls": type(at_hand)} if isinstance(at_hand, AttentionMetadata) else call


def _decide(
    limits: tuple[tuple[str, ...] | None, str | None, str | None],
    backend: BackendWish | None,
    scope: str | None,
    call: dict[str, Any],
) -> Decision:
    supported, own, default = limits
    wish, notes = resolve_wish(backend, own, scope, supported)
    if wish is None and default is not None:
        wish = Wish(default, "layer")
    # The machine that tensors are seen by is that of the current device.
    is_cuda = call["device"] == "cuda" and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch's own
    device = torch.cuda.current_device() if is_cuda else None
    return _remembered(tuple(call.items()), device, wish, supported, notes, tuple(registered_backends()))


@functools.lru_cache(maxsize=4096)
def _remembered(
    fields: tuple[tuple[str, Any], ...],
    device: int | None,  # noqa: ARG001  # part of the key
    wish: Wish | None,
    supported: tuple[str, ...] | None,
    notes: tuple[str, ...],
    registry: tuple[str, ...],
) -> Decision:
    """`decide` by the fields of a request: to describe the machine and to build a request costs more than to look one up."""
    call = dict(fields)
    request = AttentionRequest(**call, system=current_platform(call["device"]))
    return decide(request, wish, supported, notes, registry)


@constant_while_tracing
def _accepts(limits: tuple[tuple[str, ...] | None, str | None, str | None], scope: str | None, **call: Any) -> bool:
    return _decide(limits, None, scope, call).chosen is not None


def _select(
    limits: tuple[tuple[str, ...] | None, str | None, str | None],
    has_own_arguments: bool,
    backend: BackendWish | None,
    scope: str | None,
    call: dict[str, Any],
) -> tuple[str, Decision]:
    """Choose, and return the key of the implementation, which is built if it is new and may be shared, and the decision."""
    decision = _decide(limits, backend, scope, call)
    name, request = decision.require(), decision.request
    sizes = (request.num_heads, request.head_size, request.softmax_scale, request.is_causal, request.num_kv_heads)
    key = f"{name} {sizes} {request.device}"
    if key not in _shared and not has_own_arguments and vars(load_backend(name)).get("layer_independent", False):
        _keep(_shared, key, _build(name, sizes, "", {}))
    return (f"{key} own" if has_own_arguments else key), decision


@constant_while_tracing
def _select_while_tracing(
    configuration: str,
    limits: tuple[tuple[str, ...] | None, str | None, str | None],
    has_own_arguments: bool,
    backend: BackendWish | None,
    scope: str | None,
    **call: Any,
) -> str:
    key, decision = _select(limits, has_own_arguments, backend, scope, call)
    _traced[configuration] = decision
    return key


@constant_while_tracing
def _make_own(token: int, key: str, *sizes: Any) -> None:
    _dispatchers[token].make_own(key, sizes)


def _build(name: str, sizes: _Sizes, prefix: str, extra: dict[str, Any]) -> Selected:
    backend = load_backend(name)
    impl_cls = backend.get_impl_cls()
    num_heads, head_size, softmax_scale, causal, num_kv_heads = sizes
    impl = impl_cls(
        num_heads=num_heads,
        head_size=head_size,
        softmax_scale=softmax_scale,
        causal=causal,
        num_kv_heads=num_kv_heads,
        prefix=prefix,
        **extra,
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


def find_metadata(selected: Selected, explicit: AttentionMetadata | None) -> AttentionMetadata | None:
    """Return the metadata that a backend takes: the one handed over, or the context's of its class.

    Raises:
        TypeError: The metadata handed over is of a class that the backend doesn't take.
        ValueError: The backend can't run without, and the context has none of its class.
    """
    wanted = selected.metadata_cls
    if explicit is not None:
        takes_any = wanted is not AttentionMetadata or type(explicit) is AttentionMetadata
        if not (isinstance(explicit, wanted) and takes_any):
            raise TypeError(
                f"backend {selected.name} takes attn_metadata of class {wanted.__name__}, got {type(explicit).__name__}; "
                "hand over what the backend's builder makes, or set metadata of other backends with set_forward_context"
            )
        return explicit
    found = match_metadata(thread_state.attn_metadata, wanted)
    if found is None and selected.requires_metadata:
        present = thread_state.attn_metadata
        raise ValueError(
            f"backend {selected.name} needs metadata of class {wanted.__name__}, and the forward context holds "
            f"{_describe(present)}; build it once per step with the backend's builder and call the model inside "
            "`with set_forward_context(current_timestep=..., attn_metadata=...):` (fastvideo.forward_context.checkpoint in "
            "place of torch.utils.checkpoint.checkpoint carries it to the recomputation)"
        )
    return found


def check_sequence(
    selected: Selected, metadata: AttentionMetadata | None, num_tokens: int, num_heads: int, *, are_cut: bool = False
) -> None:
    """Let a backend's metadata refuse tokens and heads, those of all devices, before anything is exchanged.

    Raises:
        ValueError: The metadata describes another sequence or other heads, or it can't be used where heads `are_cut`.
    """
    if metadata is not None and selected.requires_metadata:
        metadata.check_sequence(num_tokens)
        metadata.check_heads(num_heads, are_cut=are_cut)


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
