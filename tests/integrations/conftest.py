"""What the tests of the integrations share."""

from __future__ import annotations

import pytest

from fastvideo.integrations.diffusers import hooks


@pytest.fixture
def phases(monkeypatch) -> list[int]:
    """The phase of each forward call, in order."""
    seen: list[int] = []
    enter = hooks.enter_state

    def spy(state) -> None:
        seen.append(state.phase)
        enter(state)

    monkeypatch.setattr(hooks, "enter_state", spy)
    return seen
