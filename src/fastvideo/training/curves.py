"""Loss curves of runs, drawn from their `metrics.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastvideo.training.metrics import METRICS_NAME


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read a run's lines of metrics.

    Raises:
        FileNotFoundError: The folder has none.
    """
    path = folder / METRICS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: give the folder of a training run")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def held_out_losses(metrics: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Collect the held-out losses by name, as (step, loss) in the order of the steps.

    Example:
        >>> held_out_losses([{"kind": "held_out", "step": 5, "loss": {"dense": 0.5}}])
        {'dense': [(5, 0.5)]}
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in metrics:
        if line["kind"] == "held_out":
            for name, loss in line["loss"].items():
                curves.setdefault(name, []).append((line["step"], loss))
    return curves


def figure_class() -> Any:
    """Return matplotlib's `Figure`; a run that is to draw at its end asks for it at its beginning.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing loss curves needs matplotlib: pip install 'fastvideo-attention[train]'") from error
    return Figure


def plot_runs(folders: Mapping[str, Path], out: Path) -> None:
    """Draw training and held-out losses of runs into one PNG.

    Args:
        folders: Run folders by the name that the legend gives them.
        out: The PNG to write.

    Raises:
        ImportError: matplotlib is missing.
        FileNotFoundError: A folder has no metrics.
    """
    figure = figure_class()(figsize=(9, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for label, folder in folders.items():
        metrics = read_metrics(folder)
        train = [(line["step"], line["loss"]) for line in metrics if line["kind"] == "train"]
        [faint] = axes.plot(*zip(*train, strict=True), alpha=0.35, linewidth=1, label=f"{label}, training")
        for index, (name, curve) in enumerate(held_out_losses(metrics).items()):
            axes.plot(
                *zip(*curve, strict=True),
                color=faint.get_color(),
                linestyle=("--", "-")[index % 2] if name != "dense" else "-",
                marker="o",
                markersize=3,
                label=f"{label}, held out, {name}",
            )
    axes.set(xlabel="step", ylabel="mean squared error of the velocity", yscale="log", title="Rectified flow on sprites")
    axes.grid(which="both", alpha=0.25)
    axes.legend()
    figure.savefig(out)


def plot_run(folder: Path, out: Path) -> None:
    """Draw a fine-tuning run's losses, and its sparsity below them, into a PNG.

    Args:
        folder: Where the run keeps its files.
        out: The PNG to write.

    Raises:
        ImportError: matplotlib is missing.
        FileNotFoundError: The folder has no metrics.
    """
    metrics = read_metrics(folder)
    train = [line for line in metrics if line["kind"] == "train"]
    steps = [line["step"] for line in train]
    figure = figure_class()(figsize=(9, 5.5), dpi=120, layout="constrained")
    losses, sparsity = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    losses.plot(steps, [line["loss"] for line in train], alpha=0.5, linewidth=1, label="training")
    for name, curve in held_out_losses(metrics).items():
        losses.plot(*zip(*curve, strict=True), marker="o", markersize=3, label=f"held out, {name}")
    losses.set(ylabel="mean squared error of the velocity")
    losses.legend()
    sparsity.plot(steps, [line["sparsity"] for line in train], drawstyle="steps-post")
    sparsity.set(xlabel="step", ylabel="sparsity", ylim=(-0.02, 1.02))
    for axes in (losses, sparsity):
        axes.grid(alpha=0.25)
    figure.savefig(out)
