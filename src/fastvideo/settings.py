"""The only reader of environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """What the environment asks for.

    Attributes:
        attention_backend: `FASTVIDEO_ATTENTION_BACKEND`, the name of a backend; `None` if unset, empty or "auto".
        local_rank: `LOCAL_RANK`, this process's place on its machine under `torchrun`; `None` outside.
    """

    attention_backend: str | None = None
    local_rank: str | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """Read the settings from `environment`, by default the process's own.

        Example:
            >>> Settings.from_environment({"FASTVIDEO_ATTENTION_BACKEND": "TORCH_SDPA"})
            Settings(attention_backend='TORCH_SDPA', local_rank=None)
        """
        variables = os.environ if environment is None else environment
        backend = variables.get("FASTVIDEO_ATTENTION_BACKEND", "").strip()
        return cls(
            attention_backend=None if backend.lower() in ("", "auto") else backend,
            local_rank=variables.get("LOCAL_RANK") or None,
        )
