"""The training loop: rectified flow on rendered clips, with VSA's sparsity raised in steps.

Nothing in the loop waits for the device but every `log_interval`-th step, which reads the losses since the last, and the
evaluations. A run keeps these files in its folder: `metrics.jsonl`, `checkpoint.pt`, and at its end `model/`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastvideo.attention.backends.abstract import AttentionMetadata
from fastvideo.compilation import compiled_for_training
from fastvideo.forward_context import set_forward_context
from fastvideo.models.flow import flow_matching_loss
from fastvideo.models.sprites.pipeline import SamplingSettings, SpriteVideoModel, with_coordinates
from fastvideo.models.text import WordEncoder
from fastvideo.models.wan import WanTransformer3DModel
from fastvideo.models.wan.checkpoint import cast_weights
from fastvideo.training.checkpoint import load_checkpoint, load_initial_weights, save_checkpoint
from fastvideo.training.config import TrainConfig
from fastvideo.training.data import Examples, ExampleSource
from fastvideo.training.metrics import Metrics
from fastvideo.training.optim import MasterWeights, build_optimizers, set_learning_rates

logger = logging.getLogger(__name__)

MODEL_NAME = "model"
_EVALUATION_STEP = 1 << 31
# Fixed, so that runs of any batch size are measured on the same clips.
_EVALUATION_BATCH = 64


@dataclass(frozen=True)
class RunOptions:
    """What a run has beside its settings: where it is, what it starts from, how long it takes, and what is reported when.

    Attributes:
        folder: Where the run keeps its files.
        device: Where it runs.
        max_seconds: A run that takes longer saves a checkpoint and stops; None means no limit.
        log_interval: Steps between two lines of training loss.
        eval_interval: Steps between two evaluations of the held-out loss.
        eval_clips: Held-out clips of an evaluation.
        checkpoint_interval: Steps between two checkpoints.
        resume: Continue from the folder's checkpoint, whose run must have started from the same weights.
        initial_weights: Folder of a finished model of the same sizes, or "bundled", whose weights the trained and the
            averaged weights start at; None means random ones.
        on_step: Called after each step with the number of finished steps and the last logged loss.
    """

    folder: Path
    device: torch.device
    max_seconds: float | None = None
    log_interval: int = 25
    eval_interval: int = 250
    eval_clips: int = 128
    checkpoint_interval: int = 1000
    resume: bool = False
    initial_weights: str | Path | None = None
    on_step: Callable[[int, float], None] | None = None


def compile_blocks(transformer: WanTransformer3DModel, backend: str = "inductor") -> None:
    """Compile each block whole; equal blocks share one graph for each sparsity.

    Args:
        transformer: Changed in place.
        backend: Compiler of the graphs, as `torch.compile` takes it.
    """
    for block in transformer.blocks:
        block.compile(fullgraph=True, **compiled_for_training(backend))


class Trainer:
    """One training run.

    Args:
        config: What is learned, and how.
        options: Where, how long, and what is reported.

    Example:
        >>> import tempfile
        >>> config = TrainConfig(attention="dense", dim=16, head_size=16, num_layers=1, text_dim=16, num_frames=2,
        ...     frame_size=16, max_steps=2, batch_size=2, precision="float32")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     options = RunOptions(Path(folder), torch.device("cpu"), eval_clips=2)
        ...     Trainer(config, options).run().finished_steps
        2
    """

    def __init__(self, config: TrainConfig, options: RunOptions) -> None:
        self.config, self.options = config, options
        torch.manual_seed(config.seed)
        self.transformer = WanTransformer3DModel(config.transformer_config())
        self.text_encoder = WordEncoder(config.text_config())
        self.module = nn.ModuleDict({"transformer": self.transformer, "text_encoder": self.text_encoder})
        start = options.initial_weights
        self.initial_weights = None if start is None else load_initial_weights(start, config, self.module)
        if config.precision == "bfloat16":
            # Master weights are taken before narrowing, so that they start unrounded.
            self._narrowed = cast_weights(self.transformer.state_dict(), torch.bfloat16)
        self.module.to(options.device)
        self.weights = MasterWeights(self.module)
        if config.precision == "bfloat16":
            for name, parameter in self.transformer.named_parameters():
                parameter.data = parameter.data.to(self._narrowed[name].dtype)
        self.optimizers = build_optimizers(config, self.weights)
        self.source = ExampleSource(config, options.device)
        self._metadata: dict[float, AttentionMetadata | None] = {}
        self.finished_steps, self._elapsed_before = 0, 0.0
        options.folder.mkdir(parents=True, exist_ok=True)
        if options.resume:
            self.finished_steps, self._elapsed_before = load_checkpoint(
                options.folder, config, self.weights, self.optimizers, self.initial_weights
            )
        self._metrics = Metrics(options.folder, self.finished_steps)
        if config.compile == "model":
            self.transformer.compile(dynamic=False, **compiled_for_training("inductor"))
        elif config.compile == "blocks":
            compile_blocks(self.transformer)
        self._started = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds of training so far, those before a resumption included."""
        return self._elapsed_before + time.monotonic() - self._started

    def run(self) -> Trainer:
        """Train to the last step or to the time limit; export the averaged weights if the last step was reached."""
        config, options = self.config, self.options
        self._started = time.monotonic()
        losses: list[Tensor] = []
        shown, logged_at, logged_step = float("nan"), time.monotonic(), self.finished_steps
        if self.finished_steps == 0:
            facts = {"num_parameters": self.num_parameters, "initial_weights": self.initial_weights}
            self.record({"kind": "config", **config.to_dict(), **facts})
        while self.finished_steps < config.max_steps:
            step = self.finished_steps
            losses.append(self.train_step(step))
            self.finished_steps = step + 1
            is_last = self.finished_steps == config.max_steps
            if self.finished_steps % options.log_interval == 0 or is_last:
                shown = torch.stack(losses).mean().item()
                losses.clear()
                now = time.monotonic()
                rate = (self.finished_steps - logged_step) * config.batch_size / (now - logged_at)
                logged_at, logged_step = now, self.finished_steps
                self.record(
                    {
                        "kind": "train",
                        "step": self.finished_steps,
                        "loss": shown,
                        "learning_rate_factor": config.learning_rate_at(step),
                        "sparsity": config.sparsity_at(step),
                        "clips_per_second": rate,
                        "seconds": self.elapsed,
                    }
                )
            if self.finished_steps % options.eval_interval == 0 or is_last:
                self.record_evaluation()
                logged_at, logged_step = time.monotonic(), self.finished_steps
            if options.on_step is not None:
                options.on_step(self.finished_steps, shown)
            is_late = options.max_seconds is not None and time.monotonic() - self._started > options.max_seconds
            if self.finished_steps % options.checkpoint_interval == 0 or is_last or is_late:
                self.save_checkpoint()
            if is_late and not is_last:
                logger.warning("stopped at step %d of %d by the time limit", self.finished_steps, config.max_steps)
                return self
        self.export(options.folder / MODEL_NAME)
        return self

    @property
    def num_parameters(self) -> int:
        """Trained numbers of transformer and text encoder."""
        return sum(master.numel() for master in self.weights.masters)

    def train_step(self, step: int) -> Tensor:
        """Take one step; return its loss, a scalar on the device."""
        config = self.config
        loss = self.loss(self.source.batch(step), config.sparsity_at(step)).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        self.weights.take_gradients()
        torch.nn.utils.clip_grad_norm_(self.weights.masters, config.max_grad_norm, foreach=True)
        set_learning_rates(self.optimizers, config.learning_rate_at(step))
        for optimizer in self.optimizers:
            optimizer.step()
        self.weights.update_average(config.ema_decay_at(step))
        self.weights.write()
        return loss.detach()

    def loss(self, examples: Examples, sparsity: float) -> Tensor:
        """Loss of each example, `[B]`, float32, at a sparsity."""
        dtype = self.transformer.patch_embedding.weight.dtype
        text = self.text_encoder(examples.token_ids).to(dtype)

        def velocity(x: Tensor, timestep: Tensor, /, **conditioning: Tensor) -> Tensor:
            predicted: Tensor = self.transformer(with_coordinates(x.to(dtype)), timestep, **conditioning)
            return predicted

        with set_forward_context(0, self.metadata(sparsity)):
            return flow_matching_loss(
                velocity,
                examples.clean,
                examples.noise,
                examples.sigmas,
                {"encoder_hidden_states": text},
            )

    def metadata(self, sparsity: float) -> AttentionMetadata | None:
        """Metadata of a sparsity, built once."""
        if sparsity not in self._metadata:
            shape = self.config.video_tyx
            self._metadata[sparsity] = self.transformer.attention_metadata(shape, 0, sparsity, self.options.device)
        return self._metadata[sparsity]

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean loss of the averaged weights on fixed held-out clips, noise and noise levels, by sparsity.

        Returns:
            "held_out_loss" by sparsity name: "dense" for a dense model, otherwise the lowest and the highest sparsity.
        """
        config, options = self.config, self.options
        held_out = ExampleSource(config, options.device, "held_out")
        if config.attention == "dense":
            levels = {"dense": 0.0}
        else:
            levels = {f"sparsity {level:g}": level for level in sorted({config.sparsity_levels[0], config.sparsity_levels[-1]})}
        size = min(options.eval_clips, _EVALUATION_BATCH)
        self.weights.write(average=True)
        totals = {}
        # Evaluation runs as it is written: graphs without gradients would have to be compiled for it.
        with torch.compiler.set_stance("force_eager"):
            for name, level in levels.items():
                losses = [
                    self.loss(held_out.batch(_EVALUATION_STEP + index, batch_size=size, text_dropout=0.0), level)
                    for index in range(-(-options.eval_clips // size))
                ]
                totals[name] = torch.cat(losses).mean().item()
        self.weights.write()
        return totals

    def record_evaluation(self) -> None:
        """Evaluate, and write a line of metrics."""
        self.record({"kind": "held_out", "step": self.finished_steps, "loss": self.evaluate(), "seconds": self.elapsed})

    def record(self, line: dict[str, Any]) -> None:
        """Append a line to `metrics.jsonl`."""
        self._metrics.write(line)

    def save_checkpoint(self) -> None:
        """Write the state that a resumed run continues from."""
        progress = (self.finished_steps, self.elapsed, self.initial_weights)
        save_checkpoint(self.options.folder, self.config, self.weights, self.optimizers, *progress)

    def export(self, folder: Path, dtype: torch.dtype = torch.float16) -> None:
        """Write the averaged weights and the configuration as a `SpriteVideoModel`.

        Args:
            folder: Where; made where it is missing.
            dtype: Dtype of the stored weights.
        """
        config = self.config
        transformer, encoder = WanTransformer3DModel(config.transformer_config()), WordEncoder(config.text_config())
        averages = dict(zip(self.weights.names, self.weights.average, strict=True))
        for prefix, module in (("transformer.", transformer), ("text_encoder.", encoder)):
            mine = {name.removeprefix(prefix): value for name, value in averages.items() if name.startswith(prefix)}
            module.load_state_dict(mine, strict=True)
        sparsity = config.sparsity_levels[-1] if config.attention == "vsa" else 0.0
        sampling = SamplingSettings(shift=config.noise_shift, sparsity=sparsity)
        notes = {"steps": self.finished_steps, "initial_weights": self.initial_weights, "training": config.to_dict()}
        SpriteVideoModel(transformer, encoder, config.video_tyx, sampling, notes).save(folder, dtype)
