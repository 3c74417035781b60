"""The settings of a fine-tuning run and the schedules that follow from them, all functions of the step alone."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from typing import Any, Literal

from fastvideo.models.wan.config import AttentionKind

Precision = Literal["bfloat16", "float32"]


def derived_seed(*parts: int | str) -> int:
    """Return the seed of one stream of random numbers of a run, told apart from all others by `parts`.

    Hashed, because a generator on the CPU looks at the low 32 bits of its seed alone.

    Example:
        >>> derived_seed(0, "order", 1) == derived_seed(0, "order", 1) != derived_seed(1, "order", 1)
        True
    """
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "little")


@dataclass(frozen=True)
class FinetuneConfig:
    """Everything that a run depends on, besides checkpoint and data.

    Two runs of one configuration see the same examples, noise and schedules, on any number of devices and however a batch is
    split between them.

    Attributes:
        attention: What the model becomes: "vsa", with gates that start at zero where the checkpoint has none, or "dense".
        max_steps: Steps of the run.
        batch_size: Examples of a step, on all devices together.
        learning_rate: Peak, reached after the warm-up and kept.
        warmup_steps: Steps of linear warm-up.
        weight_decay: Decoupled, on matrices.
        beta1: Decay of AdamW's first moment.
        beta2: Decay of AdamW's second moment.
        max_grad_norm: Gradients are scaled down to this global norm.
        ema_decay: Decay of the averaged weights, which are what is exported.
        text_dropout: Share of texts replaced by the null text, for guidance; needs the data to have one.
        noise_shift: Shift of logit-normal noise levels towards high noise, see `fastvideo.models.flow.shift_noise_levels`.
        sparsity: Last sparsity of "vsa", in [0, 1).
        sparsity_increment: The sparsity rises from 0 by so much at a time.
        sparsity_ramp: Share of the steps after which the last sparsity holds.
        precision: Of weights in computation and activations. Masters, averages, gradients' sums and norms are float32.
        seed: Of the order of examples, noise and noise levels.

    Raises:
        ValueError: A setting is out of range.

    Example:
        >>> config = FinetuneConfig(max_steps=100, sparsity=0.8, sparsity_increment=0.2, sparsity_ramp=0.5)
        >>> [round(config.sparsity_at(step), 3) for step in (0, 12, 13, 25, 38, 50, 99)]
        [0.0, 0.0, 0.2, 0.4, 0.6, 0.8, 0.8]
    """

    attention: AttentionKind = "vsa"
    max_steps: int = 4000
    batch_size: int = 64
    learning_rate: float = 1e-5
    warmup_steps: int = 100
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    text_dropout: float = 0.0
    noise_shift: float = 5.0
    sparsity: float = 0.9
    sparsity_increment: float = 0.05
    sparsity_ramp: float = 0.5
    precision: Precision = "bfloat16"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("max_steps", 1), ("batch_size", 1), ("warmup_steps", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        for name in ("sparsity", "ema_decay", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}.")
        for name in ("text_dropout", "sparsity_ramp"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}.")
        for name in ("learning_rate", "max_grad_norm", "noise_shift", "sparsity_increment"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}.")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be at least 0 and finite, got {self.weight_decay}.")
        for name, choices in (("attention", ("vsa", "dense")), ("precision", ("bfloat16", "float32"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then constant.

        Example:
            >>> config = FinetuneConfig(learning_rate=1.0, warmup_steps=4)
            >>> [config.learning_rate_at(step) for step in (0, 1, 3, 100)]
            [0.25, 0.5, 1.0, 1.0]
        """
        return self.learning_rate * min(1.0, (step + 1) / max(1, self.warmup_steps))

    def sparsity_at(self, step: int) -> float:
        """Sparsity of a step: rises in equal steps from 0; always 0 for dense attention."""
        if self.attention == "dense":
            return 0.0
        # The small subtrahend keeps 0.8 / 0.2 from needing a fifth increment.
        count = math.ceil(self.sparsity / self.sparsity_increment - 1e-9)
        ramp = self.sparsity_ramp * self.max_steps
        level = count if step >= ramp else int(step * count / ramp)
        return min(self.sparsity, level * self.sparsity_increment) if level < count else self.sparsity

    def to_dict(self) -> dict[str, Any]:
        """Return the settings by name, ready for JSON."""
        return dataclasses.asdict(self)
