"""Batches: what is read and drawn for a step, and which part of it is this device's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastvideo.models.flow import shift_noise_levels
from fastvideo.training.finetune.config import FinetuneConfig, derived_seed
from fastvideo.training.finetune.data import ExampleStore, Shape, epoch_of_batches
from fastvideo.training.finetune.parallel import Devices

__all__ = ["Batch", "BatchSource"]


@dataclass(frozen=True)
class Batch:
    """This device's part of a batch, B examples of one shape.

    Attributes:
        clean: Latents `[B, C, T, Y, X]`, float32.
        noise: Standard normal, as `clean`.
        sigmas: Noise levels `[B]`, float32.
        text: `[B, L, text_dim]`, in the dtype of computation.
        condition: `[B, C', T, Y, X]`, in the dtype of computation, or `None`.
    """

    clean: Tensor
    noise: Tensor
    sigmas: Tensor
    text: Tensor
    condition: Tensor | None = None


class BatchSource:
    """Makes the batches of a run. What is drawn for an example depends on its place in the batch, not on who works on it.

    Args:
        store: The examples.
        config: Batch size, noise and the seed.
        on: The devices that share a batch.
        num_parts: In how many parts a device works through its share.
        is_evaluation: Whether the batches are the same in every evaluation, and no text is dropped.

    Raises:
        ValueError: A batch can't be divided, the data lacks what is asked for, or no shape fills a batch.
    """

    def __init__(
        self, store: ExampleStore, config: FinetuneConfig, on: Devices, num_parts: int = 1, *, is_evaluation: bool = False
    ) -> None:
        _, num_shares = on.data
        if config.batch_size % (num_shares * num_parts):
            raise ValueError(
                f"batch_size={config.batch_size} can't be divided over {num_shares} groups of devices in {num_parts} parts each"
            )
        self._text_dropout = 0.0 if is_evaluation else config.text_dropout
        if self._text_dropout > 0 and store.null_text is None:
            raise ValueError(
                f"text_dropout={config.text_dropout} needs null_text.safetensors among the data, the embedding of the null "
                "text; write it with write_null_text(folder, text), or set text_dropout to 0"
            )
        self._store, self._config, self._on, self.num_parts = store, config, on, num_parts
        self._is_evaluation = is_evaluation
        self._shapes = store.shapes
        self._epoch = 0
        self._batches = epoch_of_batches(self._shapes, config.batch_size, config.seed, 0)
        self._generator = torch.Generator(device=on.device)

    def part(self, step: int, part: int = 0) -> Batch:
        """Read and draw one part of this device's share of a step's batch.

        Args:
            step: Step of the run, or number of the evaluation's batch.
            part: Of `num_parts`.

        Raises:
            ValueError: An example holds NaN or infinity.
        """
        config, device = self._config, self._on.device
        share, num_shares = self._on.data
        size = config.batch_size // (num_shares * self.num_parts)
        first = (share * self.num_parts + part) * size
        indices = self._indices(step)
        examples = [self._example(indices[place], step, place) for place in range(first, first + size)]
        clean, noise, levels, text = (torch.stack(values) for values in zip(*(drawn for drawn, _ in examples), strict=True))
        dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
        conditions = [condition for _, condition in examples if condition is not None]
        condition = torch.stack(conditions).to(device, dtype) if conditions else None
        return Batch(clean, noise, shift_noise_levels(levels, config.noise_shift), text.to(dtype), condition)

    @property
    def num_shapes(self) -> int:
        """How many shapes the batches of a run have."""
        return len({self._shapes[batch[0]] for batch in self._batches})

    def shape(self, step: int) -> Shape:
        """Return the shapes of a step's latents and texts."""
        return self._shapes[self._indices(step)[0]]

    def _example(self, index: int, step: int, place: int) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor | None]:
        """Return an example's latent, noise, noise level before the shift, and text; and its condition."""
        store, generator, device = self._store, self._generator, self._on.device
        latent, text, condition = store.read(index)
        purpose = "evaluation" if self._is_evaluation else "training"
        generator.manual_seed(derived_seed(self._config.seed, purpose, step, place))
        noise = torch.randn(latent.shape, generator=generator, device=device)
        level = torch.randn((), generator=generator, device=device).sigmoid()
        is_dropped = torch.rand((), generator=generator, device=device) < self._text_dropout
        text = text.to(device)
        if store.null_text is not None:
            text = torch.where(is_dropped, store.null_text.to(device, text.dtype), text)
        return (latent.to(device, torch.float32), noise, level, text), condition

    def _indices(self, step: int) -> list[int]:
        """The example numbers of a step's batch."""
        epoch, place = divmod(step, len(self._batches))
        if self._is_evaluation:
            return self._batches[place]
        if epoch != self._epoch:
            config = self._config
            self._batches = epoch_of_batches(self._shapes, config.batch_size, config.seed, epoch)
            self._epoch = epoch
        return self._batches[place]
