"""Makes Triton's interpreter search its language once a launch and not at every call of a helper: a quarter of its time."""

from __future__ import annotations

import inspect
import os
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> None:
    """Let the interpreter pass over modules whose builtins it has already replaced, in which it would find none."""
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
