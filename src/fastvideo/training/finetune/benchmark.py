"""How fast a random model of a real one's shape trains: tokens per second and share of the devices' peak, VSA against dense.

Model FLOPs are counted as the field does: a multiplication and an addition per weight and token forward, twice that backward,
attention by the keys that a query sees, and nothing for what is recomputed. Text tokens count where they are multiplied.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvideo.block_sparse.selection import num_kept_tiles
from fastvideo.models.wan import WanConfig, WanTransformer3DModel
from fastvideo.models.wan.config import AttentionKind
from fastvideo.training.finetune.config import FinetuneConfig
from fastvideo.training.finetune.data import Example, Shape
from fastvideo.training.finetune.parallel import Devices, shard_model
from fastvideo.training.finetune.trainer import Finetuner, RunOptions

__all__ = ["SHAPES", "BenchmarkReport", "BenchmarkRow", "benchmark", "model_flops"]

SHAPES = {
    "tiny": WanConfig(num_attention_heads=2, attention_head_dim=32, text_dim=64, ffn_dim=128, num_layers=2),
    "1.3b": WanConfig(num_attention_heads=12, ffn_dim=8960, num_layers=30),
    "14b": WanConfig(),
}
_TEXT_TOKENS = {"tiny": 16, "1.3b": 512, "14b": 512}
_PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "B200": 2250.0}
"""Dense bf16 peaks of the makers' data sheets (SXM)."""
_WARM_UP = 3


@dataclass(frozen=True)
class BenchmarkRow:
    """One model's speed.

    Attributes:
        attention: "vsa" or "dense".
        sparsity: Share of key tiles that are skipped.
        tokens_per_second: Video tokens, on all devices together.
        seconds_per_step: Median.
        tflops: Model TFLOP/s of one device.
        share_of_peak: Of one device's peak, or `None` where that is unknown.
        peak_memory_gib: Of one device, or `None` on a CPU.
    """

    attention: str
    sparsity: float
    tokens_per_second: float
    seconds_per_step: float
    tflops: float
    share_of_peak: float | None
    peak_memory_gib: float | None


@dataclass(frozen=True)
class BenchmarkReport:
    """What was timed, on what, and the rows."""

    shape: str
    latent_tyx: tuple[int, int, int]
    num_tokens: int
    batch_size: int
    num_devices: int
    sequence_parallel: int
    device: str
    torch: str
    rows: tuple[BenchmarkRow, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as data, ready for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.shape} on {self.num_devices} x {self.device} (sequence parallel {self.sequence_parallel}), torch "
            f"{self.torch}: {self.batch_size} x {self.num_tokens} tokens a step"
        ]
        for row in self.rows:
            share = "" if row.share_of_peak is None else f" ({row.share_of_peak:.1%} of peak)"
            memory = "" if row.peak_memory_gib is None else f", {row.peak_memory_gib:.1f} GiB"
            lines.append(
                f"  {row.attention:5} sparsity {row.sparsity:4.2f}: {row.tokens_per_second:10.0f} tokens/s, "
                f"{row.seconds_per_step:8.3f} s/step, {row.tflops:7.2f} model TFLOP/s a device{share}{memory}"
            )
        by_kind = {row.attention: row.tokens_per_second for row in self.rows}
        return "\n".join([*lines, f"  VSA is {by_kind['vsa'] / by_kind['dense']:.2f} times as fast"])


class _RandomExamples:
    """Random latents and texts, the same pair for every number."""

    null_text: Tensor | None = None

    def __init__(self, count: int, latent: Tensor, text: Tensor) -> None:
        self._count, self._example = count, Example(latent, text)

    @property
    def shapes(self) -> list[Shape]:
        latent, text, _ = self._example
        return [(tuple(latent.shape), tuple(text.shape))] * self._count

    def read(self, index: int) -> Example:  # noqa: ARG002  # one example stands for all
        return self._example


def model_flops(config: WanConfig, num_tokens: int, num_text: int, keys_seen: float) -> float:
    """Return the model FLOPs of one forward and backward pass over one example.

    Args:
        config: Sizes.
        num_tokens: Video tokens, S.
        num_text: Text tokens, L.
        keys_seen: Keys that a query of self attention sees: S where it is dense.

    Example:
        >>> dense = model_flops(SHAPES["1.3b"], 32760, 512, 32760)
        >>> f"{dense:.3g}"
        '8.49e+14'
    """
    dim, layers = config.inner_dim, config.num_layers
    on_video = 6 * dim**2 + 2 * dim * config.ffn_dim + (dim**2 if config.has_gate else 0)
    in_layers = num_tokens * on_video + num_text * 2 * dim**2
    ends = num_tokens * 2 * dim * config.in_channels * math.prod(config.patch_size)
    ends += num_text * dim * (config.text_dim + dim)
    attention = 2 * num_tokens * dim * (keys_seen + num_text)
    return 3.0 * 2.0 * (layers * (in_layers + attention) + ends)


def benchmark(
    config: FinetuneConfig,
    on: Devices,
    *,
    shape: str,
    latent_tyx: tuple[int, int, int],
    num_steps: int,
    accumulation: int = 1,
    checkpointing: bool = True,
    compiler: str | None = None,
    peak_tflops: float | None = None,
) -> BenchmarkReport:
    """Time training steps of a random model, dense and by VSA at the configuration's sparsity.

    Args:
        config: Settings of the run; its steps, ramp and attention don't matter.
        on: The devices.
        shape: A name of `SHAPES`.
        latent_tyx: Frames, rows and columns of a latent.
        num_steps: Steps that are timed, after some that aren't.
        accumulation: Parts of a device's share of a batch.
        checkpointing: Recompute blocks in backward.
        compiler: Compiler of the blocks, or `None`.
        peak_tflops: Peak of one device; `None` looks it up by the device's name.

    Raises:
        ValueError: A number is out of range, or the latent doesn't divide into patches.
    """
    if num_steps < 1:
        raise ValueError(f"expected at least one step to time, got {num_steps}")
    device = torch.cuda.get_device_name(on.device) if on.device.type == "cuda" else on.device.type
    if peak_tflops is None:
        peak_tflops = next((peak for name, peak in _PEAK_TFLOPS.items() if name in device), None)
    num_text, edges = _TEXT_TOKENS[shape], SHAPES[shape].patch_size
    num_tokens = math.prod(size // edge for size, edge in zip(latent_tyx, edges, strict=True))
    rows = []
    kinds: tuple[AttentionKind, ...] = ("dense", "vsa")
    for attention in kinds:
        settings = dataclasses.replace(
            config, attention=attention, max_steps=num_steps + _WARM_UP, sparsity_ramp=0.0, text_dropout=0.0
        )
        model_config = dataclasses.replace(SHAPES[shape], attention=attention)
        with tempfile.TemporaryDirectory() as folder:
            options = RunOptions(Path(folder), accumulation=accumulation, checkpointing=checkpointing)
            run = _random_run(settings, options, on, model_config, latent_tyx, num_text, compiler)
            seconds, memory = _time_steps(run, num_steps)
            del run
        rows.append(_row(settings, model_config, num_tokens, num_text, seconds, on.size, peak_tflops, memory))
    degree = on.mesh["ulysses"].size()
    return BenchmarkReport(
        shape, latent_tyx, num_tokens, config.batch_size, on.size, degree, device, torch.__version__, tuple(rows)
    )


def _row(
    config: FinetuneConfig,
    model_config: WanConfig,
    num_tokens: int,
    num_text: int,
    seconds: float,
    num_devices: int,
    peak_tflops: float | None,
    memory: float | None,
) -> BenchmarkRow:
    sparsity = config.sparsity_at(0)
    seen = _keys_seen(num_tokens, sparsity) if config.attention == "vsa" else num_tokens
    flops = model_flops(model_config, num_tokens, num_text, seen) * config.batch_size
    tflops = flops / seconds / num_devices / 1e12
    share = None if peak_tflops is None else tflops / peak_tflops
    return BenchmarkRow(config.attention, sparsity, config.batch_size * num_tokens / seconds, seconds, tflops, share, memory)


def _keys_seen(num_tokens: int, sparsity: float) -> float:
    num_tiles = max(1, round(num_tokens / 64))
    return num_tokens * num_kept_tiles(num_tiles, sparsity) / num_tiles


def _random_run(
    config: FinetuneConfig,
    options: RunOptions,
    on: Devices,
    model_config: WanConfig,
    latent_tyx: tuple[int, int, int],
    num_text: int,
    compiler: str | None,
) -> Finetuner:
    torch.manual_seed(config.seed)
    with torch.device(on.device):
        model = WanTransformer3DModel(model_config)
    torch.nn.init.normal_(model.proj_out.weight, std=0.02)  # at zero, no gradient would reach the blocks
    shard_model(model, on, config.precision, compiler)
    latent = torch.randn(model_config.in_channels, *latent_tyx)
    examples = _RandomExamples(config.batch_size, latent, torch.randn(num_text, model_config.text_dim))
    return Finetuner(config, options, model, on, examples)


def _time_steps(run: Finetuner, num_steps: int) -> tuple[float, float | None]:
    """Return the median seconds of a step and the peak memory in GiB."""
    is_cuda = run.on.device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(run.on.device)
    seconds = []
    for step in range(_WARM_UP + num_steps):
        begin = time.perf_counter()
        loss, _ = run.train_step(step)
        loss.item()  # waits for the step
        if is_cuda:
            torch.cuda.synchronize(run.on.device)
        seconds.append(time.perf_counter() - begin)
    memory = torch.cuda.max_memory_allocated(run.on.device) / 2**30 if is_cuda else None
    median = torch.tensor([statistics.median(seconds[_WARM_UP:])], dtype=torch.float64)
    return run.on.mean(median).item(), memory
