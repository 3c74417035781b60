"""Spares Triton's interpreter half of its time: what it searches in vain at each call, and sums done twice, once in 64 bits."""

from __future__ import annotations

import dataclasses
import inspect
import os
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> None:
    """Let it pass over modules whose builtins it has replaced already, and let int32 wrap around as it does on a GPU."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    search, first_builtin = interpreter._patch_builtin, {}

    def search_if_new(place: Any, *rest: Any) -> None:
        if place not in first_builtin:
            first_builtin[place] = next((name for name, member in inspect.getmembers(place) if is_builtin(member)), None)
        name = first_builtin[place]
        if name is not None and is_builtin(getattr(place, name)):
            search(place, *rest)

    interpreter._patch_builtin = search_if_new
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
