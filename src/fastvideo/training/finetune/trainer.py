"""The fine-tuning loop: rectified flow on stored latents, over devices that share batches and sequences.

Nothing in the loop waits for the device but every `log_interval`-th step, checkpoints and evaluations. A run keeps in its
folder `run.json`, `metrics.jsonl`, `checkpoints/`, and at its end `model/`, the averaged weights, and `loss.png`.
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from fastvideo.attention.backends.abstract import AttentionMetadata
from fastvideo.distributed import sequence_parallel
from fastvideo.forward_context import set_forward_context
from fastvideo.models.flow import flow_matching_loss
from fastvideo.models.sprites.pipeline import with_coordinates
from fastvideo.models.wan import WanTransformer3DModel
from fastvideo.models.wan.checkpoint import cast_weights
from fastvideo.training.finetune.batches import Batch, BatchSource
from fastvideo.training.finetune.checkpoint import Progress, check_settings, last_checkpoint, load_checkpoint, save_checkpoint
from fastvideo.training.finetune.config import FinetuneConfig
from fastvideo.training.finetune.data import ExampleStore
from fastvideo.training.finetune.origin import Origin
from fastvideo.training.finetune.parallel import Devices, average_replicated, clip_gradients, is_replicated, local
from fastvideo.training.metrics import Metrics

__all__ = ["Finetuner", "RunOptions"]

MODEL_NAME = "model"


@dataclass(frozen=True)
class RunOptions:
    """What doesn't change what is learned: where, how long, and what is reported when.

    Attributes:
        folder: Where the run keeps its files.
        accumulation: In how many parts a device works through its share of a batch.
        checkpointing: Recompute blocks in backward, to save memory.
        compiled: The blocks are compiled: room is made for a graph of each sparsity and shape, and evaluations run without.
        log_interval: Steps between two lines of training loss.
        eval_interval: Steps between two evaluations of the held-out loss, where there is held-out data.
        eval_batches: Batches of an evaluation.
        checkpoint_interval: Steps between two checkpoints.
        max_seconds: A run that takes longer saves a checkpoint and stops where it logs; `None` means no limit.
        resume: Continue from the folder's last checkpoint.
        sources: Checkpoint and data that the run begins with, compared when it is resumed.
        on_step: Called after each step with the number of finished steps and the last logged loss.
    """

    folder: Path
    accumulation: int = 1
    checkpointing: bool = True
    compiled: bool = False
    log_interval: int = 10
    eval_interval: int = 250
    eval_batches: int = 4
    checkpoint_interval: int = 250
    max_seconds: float | None = None
    resume: bool = False
    sources: dict[str, str] | None = None
    on_step: Callable[[int, float], None] | None = None


class Finetuner:
    """One fine-tuning run; every process of it builds one.

    Args:
        config: What is learned, and how.
        options: Where, how long, and what is reported.
        model: Sharded, see `fastvideo.training.finetune.parallel`.
        on: The devices it is sharded over.
        examples: What is learned from.
        held_out: What is evaluated on, if anything.
        origin: The checkpoint that the model comes from: the result is written as it is, with coordinates appended to the
            input where it has them. `None` stands for one of Wan weights.

    Raises:
        FileNotFoundError: There is nothing to resume.
        ValueError: Settings, data and devices don't fit each other.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        options: RunOptions,
        model: WanTransformer3DModel,
        on: Devices,
        examples: ExampleStore,
        held_out: ExampleStore | None = None,
        origin: Origin | None = None,
    ) -> None:
        self.config, self.options, self.model, self.on = config, options, model, on
        self.origin = origin or Origin(options.folder, model.config, is_sprites=False)
        self.batches = BatchSource(examples, config, on, options.accumulation)
        self.held_out = None if held_out is None else BatchSource(held_out, config, on, is_evaluation=True)
        check_settings(options.folder, config, options.sources or {}, resume=options.resume)
        model.gradient_checkpointing = options.checkpointing
        self.parameters = list(model.parameters())
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.optimizer = _build_optimizer(config, model, on.device)
        checkpoint, before = last_checkpoint(options.folder) if options.resume else None, Progress()
        if checkpoint is not None:
            before = load_checkpoint(checkpoint, model, self.optimizer, self.average)
        self.finished_steps, self._elapsed_before = before.step, before.elapsed
        self._loss_sum = torch.tensor(before.loss_sum, dtype=torch.float64, device=on.device)
        self._num_losses = before.num_losses
        resumed_at = self.finished_steps if options.resume else None
        self._metrics = Metrics(options.folder, resumed_at) if on.rank == 0 else None
        self._metadata: dict[tuple[tuple[int, ...], float], AttentionMetadata | None] = {}
        self._started = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds of training so far, those before a resumption included."""
        return self._elapsed_before + time.monotonic() - self._started

    def run(self) -> Finetuner:
        """Train to the last step or to the time limit; export the averaged weights if the last step was reached."""
        if not self.options.compiled:
            return self._run()
        import torch._dynamo  # here, because it takes a second

        num_levels = len(set(map(self.config.sparsity_at, range(self.config.max_steps))))
        # Two graphs each: what enters the first block isn't what leaves another.
        count = 8 + 2 * num_levels * self.batches.num_shapes
        with torch._dynamo.config.patch(recompile_limit=count, accumulated_recompile_limit=max(256, 2 * count)):
            return self._run()

    def _run(self) -> Finetuner:
        config, options = self.config, self.options
        self._started = time.monotonic()
        shown, logged_at, num_tokens = float("nan"), time.monotonic(), 0
        if self.finished_steps == 0:
            self.record({"kind": "config", **config.to_dict(), **(options.sources or {}), "num_devices": self.on.size})
        while self.finished_steps < config.max_steps:
            step = self.finished_steps
            loss, norm = self.train_step(step)
            self._loss_sum += loss
            self._num_losses += 1
            num_tokens += config.batch_size * self.num_tokens(step)
            self.finished_steps = step + 1
            is_last, is_late = self.finished_steps == config.max_steps, False
            if self.finished_steps % options.log_interval == 0 or is_last:
                late = options.max_seconds is not None and time.monotonic() - self._started > options.max_seconds
                total, lateness = self.on.mean(torch.stack([self._loss_sum, self._loss_sum.new_tensor(late)])).tolist()
                shown, is_late = total / self._num_losses, lateness > 0
                self._loss_sum.zero_()
                self._num_losses = 0
                if not math.isfinite(shown):
                    raise RuntimeError(
                        f"the loss of the steps up to {self.finished_steps} is {shown}; begin again with a lower learning "
                        "rate, or look at the data"
                    )
                rate = num_tokens / (time.monotonic() - logged_at)
                self._record_training(step, shown, norm.item(), rate)
                logged_at, num_tokens = time.monotonic(), 0
            if self.held_out is not None and (self.finished_steps % options.eval_interval == 0 or is_last):
                self.record({"kind": "held_out", "step": self.finished_steps, "loss": self.evaluate()})
                logged_at = time.monotonic()
            if options.on_step is not None:
                options.on_step(self.finished_steps, shown)
            if self.finished_steps % options.checkpoint_interval == 0 or is_last or is_late:
                self.save_checkpoint()
                logged_at = time.monotonic()
            if is_late and not is_last:
                return self
        self.export(options.folder / MODEL_NAME)
        return self

    def train_step(self, step: int) -> tuple[Tensor, Tensor]:
        """Take one step; return the mean loss of this device's examples and the global gradient norm, on the device."""
        config, parts = self.config, self.options.accumulation
        total = torch.zeros((), device=self.on.device)
        for part in range(parts):
            loss = self.loss(self.batches.part(step, part), config.sparsity_at(step)).mean() / parts
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        average_replicated(self.model)
        norm = clip_gradients(self.model, config.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            masters = [local(parameter.detach()) for parameter in self.parameters]
            torch._foreach_lerp_([local(average) for average in self.average], masters, 1 - config.ema_decay)
        return total, norm

    def loss(self, batch: Batch, sparsity: float) -> Tensor:
        """Loss of each example, `[B]`, float32, at a sparsity."""
        dtype = batch.text.dtype

        def velocity(x: Tensor, timestep: Tensor, /, **conditioning: Tensor) -> Tensor:
            predicted: Tensor = self.model(self.with_condition(x.to(dtype), batch.condition), timestep, **conditioning)
            return predicted

        metadata = self._metadata_of(tuple(batch.clean.shape[2:]), sparsity)
        with (
            sequence_parallel(self.on.mesh["ulysses"]),
            set_forward_context(0, metadata),
            warnings.catch_warnings(),
        ):
            # The output is a view that nothing writes to.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
            return flow_matching_loss(velocity, batch.clean, batch.noise, batch.sigmas, {"encoder_hidden_states": batch.text})

    def with_condition(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """Append to noisy latents `[B, C, T, Y, X]` what else the model's input has: `[B, C + C', T, Y, X]`."""
        x = with_coordinates(x) if self.origin.is_sprites else x
        return x if condition is None else torch.cat([x, condition], dim=1)

    def num_tokens(self, step: int) -> int:
        """Video tokens of each example of a step."""
        (_, *latent), _ = self.batches.shape(step)
        return math.prod(size // edge for size, edge in zip(latent, self.model.config.patch_size, strict=True))

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean loss of the averaged weights on fixed held-out examples and noise, by sparsity: 0 and the last."""
        if self.held_out is None:
            raise ValueError("there is no held-out data to evaluate on")
        levels = {"dense": 0.0}
        if self.config.attention == "vsa":
            levels = {f"sparsity {level:g}": level for level in sorted({0.0, self.config.sparsity})}
        masters = [local(parameter).clone() for parameter in self.parameters]
        self._write(self.average)
        found = {}
        # Graphs without gradients would have to be compiled for it.
        with torch.compiler.set_stance("force_eager") if self.options.compiled else contextlib.nullcontext():
            for name, level in levels.items():
                batches = map(self.held_out.part, range(self.options.eval_batches))
                losses = [self.loss(batch, level).double().mean() for batch in batches]
                found[name] = self.on.mean(torch.stack(losses)).mean().item()
        self._write(masters)
        return found

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        torch._foreach_copy_([local(parameter) for parameter in self.parameters], [local(value) for value in values])
        # FSDP keeps the root's weights whole after a forward pass that no backward follows; they would be used again.
        cast(FSDPModule, self.model).reshard()

    def record(self, line: dict[str, Any]) -> None:
        """Append a line to `metrics.jsonl`."""
        if self._metrics is not None:
            self._metrics.write(line)

    def save_checkpoint(self) -> None:
        """Write the state that a resumed run continues from."""
        loss_sum = self.on.mean(self._loss_sum).item()
        progress = Progress(self.finished_steps, self.elapsed, loss_sum, self._num_losses)
        save_checkpoint(self.options.folder, self.model, self.optimizer, self.average, progress)

    @torch.no_grad()
    def export(self, folder: Path) -> None:
        """Write the averaged weights and the configuration as the run's checkpoint had them, for the same `load`."""
        weights: dict[str, Tensor] = {}
        dtype = self.origin.stored_dtype(self.config)
        for (name, _), average in zip(self.model.named_parameters(), self.average, strict=True):
            whole = average.full_tensor() if isinstance(average, DTensor) else average
            if self.on.rank == 0:
                weights |= cast_weights({name: whole.to("cpu")}, dtype)
        if self.on.rank == 0:
            self.origin.save(folder, self.model.config, weights, self.config)

    def _record_training(self, step: int, loss: float, norm: float, tokens_per_second: float) -> None:
        line = {
            "kind": "train",
            "step": step + 1,
            "loss": loss,
            "gradient_norm": norm,
            "learning_rate": self.config.learning_rate_at(step),
            "sparsity": self.config.sparsity_at(step),
            "tokens_per_second": tokens_per_second,
            "seconds": self.elapsed,
        }
        if self.on.device.type == "cuda":
            line["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.on.device) / 2**30
        self.record(line)

    def _metadata_of(self, latent_tyx: tuple[int, ...], sparsity: float) -> AttentionMetadata | None:
        """Metadata of a shape and a sparsity, built once."""
        key = (latent_tyx, sparsity)
        if key not in self._metadata:
            num_frames, num_rows, num_columns = latent_tyx
            shape = (num_frames, num_rows, num_columns)
            self._metadata[key] = self.model.attention_metadata(shape, 0, sparsity, self.on.device)
        return self._metadata[key]


def _build_optimizer(config: FinetuneConfig, model: WanTransformer3DModel, device: torch.device) -> torch.optim.Optimizer:
    """AdamW with weight decay on the matrices; whole and sharded parameters stay in groups of their own."""
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and not is_replicated(name)
        groups.setdefault((is_matrix, isinstance(parameter, DTensor)), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": config.weight_decay if is_matrix else 0.0}
            for (is_matrix, _), parameters in groups.items()
        ],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=device.type == "cuda",
    )
