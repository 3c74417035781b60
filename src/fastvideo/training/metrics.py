"""What a run says while it goes: lines of JSON, and a progress bar."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

__all__ = ["METRICS_NAME", "Metrics", "ProgressBar"]

METRICS_NAME = "metrics.jsonl"

logger = logging.getLogger(__name__)


class Metrics:
    """A run's `metrics.jsonl`.

    Args:
        folder: Where the run keeps its files.
        resumed_at: The finished steps of the checkpoint that a run continues from: later lines, of steps that are run again,
            are dropped. `None` or 0 starts the file anew.
    """

    def __init__(self, folder: Path, resumed_at: int | None = None) -> None:
        self.path = folder / METRICS_NAME
        kept = []
        if resumed_at and self.path.is_file():
            # The last line may be cut off where the run was killed.
            lines = [line for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
            kept = [line for line in lines if json.loads(line).get("step", 0) <= resumed_at]
        self.path.write_text("".join(kept), encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        """Append a line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class ProgressBar:
    """A tqdm bar with the loss beside it, or nothing where tqdm is missing or another process shows it.

    Args:
        max_steps: Steps of the run.
        shown: Whether this process shows it.
    """

    def __init__(self, max_steps: int, *, shown: bool = True) -> None:
        self._max_steps, self._shown = max_steps, shown
        self._bar: Any = None

    def __enter__(self) -> ProgressBar:
        if self._shown:
            try:
                from tqdm import tqdm
            except ImportError:
                logger.info("no progress bar: tqdm is missing (pip install tqdm)")
                return self
            self._bar = tqdm(total=self._max_steps, unit="step", dynamic_ncols=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, finished_steps: int, loss: float) -> None:
        """Show the number of finished steps and the last logged loss."""
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            self._bar.update(finished_steps - self._bar.n)
