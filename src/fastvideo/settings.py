"""The only reader of environment variables."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["AGREEMENT_MODES", "EXCHANGES", "Settings"]

AGREEMENT_MODES = ("auto", "new", "every", "off")
"""When ranks compare their calls, see `fastvideo.distributed.agreement`."""

EXCHANGES = ("auto", "direct", "collective")
"""How eager code exchanges tensors between CUDA devices, see `fastvideo.distributed.direct`."""


@dataclass(frozen=True)
class Settings:
    """What the environment asks for.

    Attributes:
        attention_backend: `FASTVIDEO_ATTENTION_BACKEND`, the name of a backend; `None` if unset, empty or "auto".
        local_rank: `LOCAL_RANK`, this process's place on its machine under `torchrun`; `None` outside.
        agreement: `FASTVIDEO_AGREEMENT`, when ranks compare their calls: "auto" (the default), "new", "every" or "off".
        agreement_timeout: `FASTVIDEO_AGREEMENT_TIMEOUT`, seconds for which a rank waits for its peers' word, 60 by default.
        exchange: `FASTVIDEO_EXCHANGE`, how tensors travel between CUDA devices: "direct", by copy engines; "collective", by
            NCCL; "auto" (the default), directly where all ranks of a group can.
    """

    attention_backend: str | None = None
    local_rank: str | None = None
    agreement: str = "auto"
    agreement_timeout: float = 60.0
    exchange: str = "auto"

    @classmethod
    def current(cls) -> Settings:
        """Return the settings of this process, read once."""
        return _of_this_process()

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """Read the settings from `environment`, by default the process's own.

        Raises:
            ValueError: A number isn't one, or a mode is unknown.

        Example:
            >>> Settings.from_environment({"FASTVIDEO_ATTENTION_BACKEND": "TORCH_SDPA"}).attention_backend
            'TORCH_SDPA'
        """
        variables = os.environ if environment is None else environment
        backend = variables.get("FASTVIDEO_ATTENTION_BACKEND", "").strip()
        agreement = variables.get("FASTVIDEO_AGREEMENT", "").strip().lower() or "auto"
        if agreement not in AGREEMENT_MODES:
            raise ValueError(f"expected FASTVIDEO_AGREEMENT among {', '.join(AGREEMENT_MODES)}, got {agreement!r}")
        exchange = variables.get("FASTVIDEO_EXCHANGE", "").strip().lower() or "auto"
        if exchange not in EXCHANGES:
            raise ValueError(f"expected FASTVIDEO_EXCHANGE among {', '.join(EXCHANGES)}, got {exchange!r}")
        return cls(
            attention_backend=None if backend.lower() in ("", "auto") else backend,
            local_rank=variables.get("LOCAL_RANK") or None,
            agreement=agreement,
            agreement_timeout=_positive(variables, "FASTVIDEO_AGREEMENT_TIMEOUT", 60.0),
            exchange=exchange,
        )


@functools.cache
def _of_this_process() -> Settings:
    return Settings.from_environment()


def _positive(variables: Mapping[str, str], name: str, default: float) -> float:
    text = variables.get(name, "").strip()
    try:
        number = float(text) if text else default
    except ValueError:
        number = float("nan")
    if not 0 < number < float("inf"):
        raise ValueError(f"expected {name} as a positive number of seconds, got {text!r}")
    return number
