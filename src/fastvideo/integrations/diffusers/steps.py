"""Which denoising step a forward call belongs to.

In a pipeline its scheduler knows: it counts the steps it has taken, whatever the number of forward calls per step
(classifier-free guidance) and of models that share the steps (the two of Wan 2.2). A model on its own is told by
`denoising_step`. Nothing is guessed from the order of calls.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from fastvideo.video.tiles import as_tyx

__all__ = ["StepCounter", "denoising_step", "told_grid", "told_step"]


class _Told(threading.local):
    """What the caller says about the calls inside. Set in `__init__`: Dynamo guards instance attributes only."""

    def __init__(self) -> None:
        self.step: int | None = None
        self.grid_tyx: tuple[int, int, int] | None = None


_told = _Told()


@contextlib.contextmanager
def denoising_step(step: int, *, grid_tyx: Sequence[int] | None = None) -> Iterator[None]:
    """Say which denoising step the models called inside are at, on this thread; it counts before what a scheduler says.

    Args:
        step: Index of the step, from 0.
        grid_tyx: The video's tokens along time, height and width, for a model whose inputs don't tell.

    Raises:
        TypeError: `step` is no integer.
        ValueError: `step` is negative, or `grid_tyx` isn't three positive integers.

    Example:
        >>> with denoising_step(3):
        ...     StepCounter(None).current({})
        3
    """
    if isinstance(step, bool) or not isinstance(step, int):
        raise TypeError(f"expected the step as an integer, got {step!r}")
    if step < 0:
        raise ValueError(f"expected a step >= 0, got {step}")
    before = (_told.step, _told.grid_tyx)
    _told.step, _told.grid_tyx = step, None if grid_tyx is None else as_tyx("grid_tyx", grid_tyx)
    try:
        yield
    finally:
        _told.step, _told.grid_tyx = before


def told_step() -> int | None:
    """Return the step that the innermost `denoising_step` was given.

    Example:
        >>> with denoising_step(3):
        ...     told_step()
        3
    """
    return _told.step


def told_grid() -> tuple[int, int, int] | None:
    """Return the grid that the innermost `denoising_step` was given.

    Example:
        >>> with denoising_step(3, grid_tyx=(2, 4, 4)):
        ...     told_grid()
        (2, 4, 4)
    """
    return _told.grid_tyx


class StepCounter:
    """Finds the step of a forward call.

    Args:
        pipeline: The pipeline that the model is part of, or `None`. It is held weakly; copies and pickles of the model belong
            to no pipeline.
        before: The counter that this one takes the place of, whose pipelines may still share the model.
    """

    def __init__(self, pipeline: Any | None, before: StepCounter | None = None) -> None:
        earlier = () if before is None or pipeline is None else before._pipelines
        own = () if pipeline is None else (weakref.ref(pipeline),)
        self._pipelines: tuple[weakref.ref[Any], ...] = (*(ref for ref in earlier if ref() not in (None, pipeline)), *own)

    def __getstate__(self) -> dict[str, Any]:
        return {"_pipelines": ()}

    def __deepcopy__(self, memo: dict[int, Any]) -> StepCounter:
        return StepCounter(None)

    def hint(self) -> int | None:
        """Return the step where that costs nothing, for metadata that carries it; `None` otherwise."""
        if _told.step is not None:
            return _told.step
        running = [scheduler for scheduler in self._schedulers() if hasattr(scheduler, "step_index")]
        return _counted_step(running[0]) if len(running) == 1 else None

    def num_steps(self) -> int | None:
        """Return how many steps the run has that goes on, where its scheduler says it."""
        schedulers = self._schedulers()
        if _told.step is not None or len(schedulers) != 1:
            return None
        return len(schedulers[0].timesteps) - (getattr(schedulers[0], "begin_index", None) or 0)

    def _schedulers(self) -> list[Any]:
        """Return the schedulers that say they are in the middle of a run; of those that don't count, the last pipeline's."""
        found = [getattr(ref(), "scheduler", None) for ref in self._pipelines]
        return [
            scheduler
            for scheduler in dict.fromkeys(scheduler for scheduler in found if scheduler is not None)
            if (_counted_step(scheduler) is not None if hasattr(scheduler, "step_index") else scheduler is found[-1])
        ]

    def current(self, inputs: Mapping[str, Any]) -> int | None:
        """Return the index of the step, or `None` where nobody knows it, as between a pipeline's runs.

        Args:
            inputs: The arguments of the forward call by name; only a scheduler that doesn't count reads them.

        Raises:
            ValueError: The scheduler doesn't count, and the call's timestep is none of its timesteps; or several pipelines
                that share the model are in the middle of a run.
        """
        if _told.step is not None:
            return _told.step
        schedulers = self._schedulers()
        if len(schedulers) > 1:
            raise ValueError(
                f"can't tell the denoising step: {len(schedulers)} pipelines that share this model are in the middle of a run; "
                "let one end before the next begins, and where one was broken off call remove(...) and apply(...) for the other"
            )
        if not schedulers:
            return None
        if hasattr(schedulers[0], "step_index"):
            return _counted_step(schedulers[0])
        return _step_by_timestep(schedulers[0].timesteps, inputs.get("timestep"))


def _counted_step(scheduler: Any) -> int | None:
    index = scheduler.step_index
    # No run has begun, or the last one is over: a call now belongs to none, or to another pipeline with this model.
    if getattr(scheduler, "num_inference_steps", None) is None or (index or 0) >= len(scheduler.timesteps):
        return None
    # A pipeline that starts from an image or a video skips the first timesteps; its own first step is 0.
    return 0 if index is None else int(index - (scheduler.begin_index or 0))


def _step_by_timestep(timesteps: torch.Tensor, timestep: Any) -> int:
    if isinstance(timestep, torch.Tensor):
        timestep = timestep.flatten()[0].item()
    found = (timesteps == timestep).nonzero()
    if not len(found):
        raise ValueError(
            f"can't tell the denoising step: timestep {timestep} is none of the scheduler's {timesteps.tolist()}; call the "
            "model inside `with fastvideo.integrations.diffusers.denoising_step(step):`"
        )
    return int(found[0])
