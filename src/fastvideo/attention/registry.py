"""Names of backends and where their classes live.

Built-ins, classes registered at run time, and classes that installed packages announce under the entry-point group
`fastvideo.attention_backends`. Nothing is imported before a name is resolved.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
import inspect
import logging
import re
from dataclasses import dataclass

from fastvideo.attention.backends.abstract import AttentionBackend
from fastvideo.platforms import AttentionBackendEnum

__all__ = [
    "ENTRY_POINT_GROUP",
    "BackendEntry",
    "BackendLoadError",
    "UnknownBackend",
    "backend_name",
    "load_backend",
    "register_attn_backend",
    "registered_backends",
]

logger = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "fastvideo.attention_backends"
_NAME = r"[A-Za-z][A-Za-z0-9_]*"


class UnknownBackend(ValueError):
    """No backend has the name that was asked for."""


class BackendLoadError(ImportError):
    """A backend's name is known, and its class can't be had."""


@dataclass(frozen=True)
class BackendEntry:
    """One name in the registry.

    Attributes:
        name: What users write.
        target: `"module:Class"`, or the class itself.
        origin: `"built-in"`, `"registered"` or `"entry point"`.
    """

    name: str
    target: str | type[AttentionBackend]
    origin: str


_BUILT_INS = {
    entry.name: entry
    for entry in (
        BackendEntry("FLASH_ATTN", "fastvideo.attention.backends.flash_attn:FlashAttentionBackend", "built-in"),
        BackendEntry("TORCH_SDPA", "fastvideo.attention.backends.torch_sdpa:TorchSDPABackend", "built-in"),
        BackendEntry("SAGE_ATTN", "fastvideo.attention.backends.sage_attn:SageAttentionBackend", "built-in"),
        BackendEntry(
            "SLIDING_TILE_ATTN",
            "fastvideo.attention.backends.sliding_tile_attn:SlidingTileAttentionBackend",
            "built-in",
        ),
        BackendEntry(
            "VIDEO_SPARSE_ATTN",
            "fastvideo.attention.backends.video_sparse_attn:VideoSparseAttentionBackend",
            "built-in",
        ),
    )
}
_REGISTERED: dict[str, BackendEntry] = {}


def register_attn_backend(name: str, backend: str | type[AttentionBackend]) -> None:
    """Make a backend available under a new name, everywhere a backend can be chosen.

    A package does the same without a call by an entry point in the group `fastvideo.attention_backends`.

    Args:
        name: The new name. Names are compared without regard to case.
        backend: The class, or `"module:Class"`, which is imported when the name is first resolved.

    Raises:
        ValueError: The name is taken by another backend, or is no name.
        TypeError: `backend` is neither a backend class nor such a string.

    Example:
        >>> from fastvideo.attention.backends.torch_sdpa import TorchSDPABackend
        >>> class MyBackend(TorchSDPABackend): ...
        >>> register_attn_backend("MY_BACKEND", MyBackend)
    """
    if not (isinstance(name, str) and re.fullmatch(_NAME, name) and name.upper() != "AUTO"):
        raise ValueError(f"expected a name of letters, digits and underscores, and not 'auto', got {name!r}")
    key = name.upper()
    if isinstance(backend, str):
        if backend.count(":") != 1:
            raise TypeError(f"expected a backend class or 'module:Class', got {backend!r}")
    elif not (inspect.isclass(backend) and issubclass(backend, AttentionBackend)):
        raise TypeError(f"expected a subclass of AttentionBackend or 'module:Class', got {backend!r}")
    entry = BackendEntry(key, backend, "registered")
    taken = registered_backends().get(key)
    if key == AttentionBackendEnum.NO_ATTENTION.name or (taken is not None and taken.target != backend):
        raise ValueError(f"the backend name {key!r} is taken by {taken or 'NO_ATTENTION'}; choose another")
    _REGISTERED[key] = entry


def registered_backends() -> dict[str, BackendEntry]:
    """Return every known backend by name: built-ins first, in the order in which automatic selection prefers equals."""
    return {**_BUILT_INS, **_REGISTERED, **_entry_points()}


def backend_name(wish: str | AttentionBackendEnum | type[AttentionBackend], place: str = "") -> str:
    """Return the registry's name for what a user wrote: a name in any case, an enum member, or a backend class.

    Args:
        wish: What the user wrote.
        place: Where it was written, before the words of an error.

    Raises:
        UnknownBackend: No backend has that name; close matches are named.
    """
    if isinstance(wish, AttentionBackendEnum):
        name = wish.name
    elif isinstance(wish, str):
        name = wish
    elif inspect.isclass(wish) and issubclass(wish, AttentionBackend):
        return _name_of_class(wish)
    else:
        raise TypeError(f"a backend is named by a string, an AttentionBackendEnum or its class, got {wish!r}")
    known = registered_backends()
    if name.upper() in known or name.upper() == AttentionBackendEnum.NO_ATTENTION.name:
        return name.upper()
    close = difflib.get_close_matches(name.upper(), known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(close)}" if close else f"known are {', '.join(known)}"
    raise UnknownBackend(
        f"{place}no attention backend is called {name!r}; {hint}. Third parties add one with register_attn_backend(...) or the "
        f"entry-point group {ENTRY_POINT_GROUP!r}."
    )


def _name_of_class(backend: type[AttentionBackend]) -> str:
    target = f"{backend.__module__}:{backend.__qualname__}"
    for entry in registered_backends().values():
        if entry.target is backend or entry.target == target:
            return entry.name
    raise UnknownBackend(
        f"the backend class {target} is not registered; call register_attn_backend({backend.__name__!r}, {backend.__name__})"
    )


def load_backend(name: str) -> type[AttentionBackend]:
    """Import and return the class behind a name of the registry.

    Raises:
        BackendLoadError: It is `NO_ATTENTION`, its module can't be imported or lacks the class, or that is no complete
            subclass of `AttentionBackend`.
    """
    if name == AttentionBackendEnum.NO_ATTENTION.name:
        raise BackendLoadError(f"{name} names no implementation; name a backend that computes attention, or none")
    entry = registered_backends()[name]
    backend = _import_target(entry.target) if isinstance(entry.target, str) else entry.target
    if not (inspect.isclass(backend) and issubclass(backend, AttentionBackend)):
        raise BackendLoadError(f"backend {name!r} is {backend!r}, which is no subclass of AttentionBackend")
    if missing := sorted(getattr(backend, "__abstractmethods__", ())):
        raise BackendLoadError(f"backend {name!r} ({backend.__qualname__}) lacks {', '.join(missing)}")
    return backend


@functools.cache
def _import_target(target: str) -> type[AttentionBackend]:
    module_name, _, class_name = target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a third party's module raises must not stop other backends
        raise BackendLoadError(f"{type(error).__name__}: {error}") from error
    if not hasattr(module, class_name):
        raise BackendLoadError(f"module {module_name!r} has no {class_name!r}")
    return getattr(module, class_name)  # type: ignore[no-any-return]


@functools.cache
def _entry_points() -> dict[str, BackendEntry]:
    found = {}
    for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        key = point.name.upper()
        if key in (*_BUILT_INS, "AUTO", AttentionBackendEnum.NO_ATTENTION.name) or not re.fullmatch(_NAME, key):
            logger.warning("entry point %r of group %s is no free name and is ignored", key, ENTRY_POINT_GROUP)
            continue
        found[key] = BackendEntry(key, point.value, "entry point")
    return found
