"""Results for people: tables of rows, and a picture of time against sparsity."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastvideo.benchmark.parallel_row import ParallelRow
from fastvideo.benchmark.run import PASSES, Row

__all__ = ["format_parallel_rows", "format_rows", "plot_results"]

_INSTALL = "pip install matplotlib"


def format_rows(rows: Sequence[Row]) -> str:
    """A table a pass, fastest first; rows over budget and rows that could not run follow without a rank.

    Example:
        >>> print(format_rows([Row("TORCH_SDPA", "forward", True, 0.0, refused="no kernel")]))
        forward
           -  TORCH_SDPA: can't run: no kernel
    """
    lines: list[str] = []
    for pass_name in PASSES:
        own = [row for row in rows if row.pass_name == pass_name]
        if not own:
            continue
        dense = min((row.ms for row in own if row.is_dense and row.is_ranked and row.ms is not None), default=None)
        ran = sorted((row for row in own if row.ms is not None), key=lambda row: (not row.is_ranked, row.ms))
        width = max((len(row.case) for row in ran), default=0)
        lines.append(pass_name)
        if ran:
            lines.append(f"{'rank':>4}  {'case':{width}}  {_HEADER}")
        for rank, row in enumerate(ran, 1):
            lines.append(f"{rank if row.is_ranked else '-':>4}  {row.case:{width}}  {_numbers(row, dense)}")
            if row.over_budget is not None:
                lines.append(f"      OVER BUDGET, not ranked: {row.over_budget}")
        lines += [f"   -  {row.case}: can't run: {_short(row.refused)}" for row in own if row.refused is not None]
    return "\n".join(lines)


_HEADER = (
    f"{'skipped':>7} {'ms':>9} {'x dense':>7} {'TFLOP/s real':>12} {'padded':>6} {'extra GiB':>9} {'saved GiB':>9} "
    f"{'SM MHz':>6}  errors"
)


def _numbers(row: Row, dense: float | None) -> str:
    ratio = None if dense is None or row.ms is None else dense / row.ms
    errors = " ".join(f"{name} {value:.1e}" for name, value in row.errors.items()) or "not compared"
    overlap = "" if row.overlap is None else f"; overlap of neighbours {row.overlap:.2f}"
    return (
        f"{row.sparsity:7.3f} {_cell(row.ms, 9, 3)} {_cell(ratio, 7, 2)} {_cell(row.tflops_real, 12, 1)} "
        f"{_cell(row.tflops_padded, 6, 1)} {_cell(row.extra_peak_gib, 9, 3)} {_cell(row.saved_gib, 9, 3)} "
        f"{_cell(row.clock_mhz, 6, 0)}  {errors}{overlap}"
    )


def format_parallel_rows(rows: Sequence[ParallelRow], *, with_model: bool = False) -> str:
    """A table for each pass of dense and of sparse attention, fastest first, with one card and what has no rank in place.

    Example:
        >>> print(format_parallel_rows([ParallelRow("ring VSA", "forward", "fastvideo", "VSA", "ring", 2, 1, refused="no")]))
        forward, dense
           -  ring VSA: can't run: no
    """
    lines: list[str] = []
    for is_sparse in (False, True):
        for pass_name in PASSES:
            own = [row for row in rows if row.pass_name == pass_name and row.is_sparse == is_sparse]
            if own:
                lines.append(f"{pass_name}, {'sparse' if is_sparse else 'dense'}")
                lines += _parallel_lines(own, with_model)
    return "\n".join(lines)


def _parallel_lines(rows: Sequence[ParallelRow], with_model: bool) -> list[str]:
    lines: list[str] = []
    ran = sorted((row for row in rows if row.ms is not None), key=lambda row: row.ms or 0.0)
    width = max((len(row.case) for row in ran), default=0)
    if ran:
        model = f" {'model ms':>9}" if with_model else ""
        lines.append(
            f"{'rank':>4}  {'case':{width}}  {'ms':>9}{model} {'efficiency':>10} {'exposed':>8} {'extra GiB':>9}  errors"
        )
    rank = 0
    for row in ran:
        rank += row.is_ranked
        errors = " ".join(f"{name} {value:.1e}" for name, value in row.errors.items())
        lines.append(
            f"{rank if row.is_ranked else '-':>4}  {row.case:{width}}  {_cell(row.ms, 9, 3)}"
            f"{' ' + _cell(row.model_ms, 9, 3) if with_model else ''} {_percent(row.efficiency, 10)} "
            f"{_percent(row.exposed_share, 8)} {_cell(row.extra_peak_gib, 9, 3)}  {errors}".rstrip()
        )
        if row.over_budget is not None:
            lines.append(f"      OVER BUDGET, not ranked: {row.over_budget}")
    return lines + [f"   -  {row.case}: can't run: {_short(row.refused)}" for row in rows if row.refused is not None]


def _percent(value: float | None, width: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width}.1%}"


def _short(reason: str, limit: int = 240) -> str:
    """One line; the JSON has the whole."""
    words = " ".join(reason.split())
    return words if len(words) <= limit else f"{words[:limit]}..."


def _cell(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"


def plot_results(results: Sequence[tuple[str, Sequence[Row]]], path: Path) -> None:
    """Draw time against sparsity: a panel a result and pass, dense attention as a line, the ideal `1 - s` as another.

    Args:
        results: Titles and rows; rows without a rank are left out.
        path: The PNG to write.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: `path` doesn't end in .png, or no row is ranked.
    """
    if path.suffix != ".png":
        raise ValueError(f"expected a path that ends in .png, got {path}")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"drawing {path} needs matplotlib: {_INSTALL}") from error
    panels = [
        (f"{title}, {pass_name}", [row for row in rows if row.pass_name == pass_name and row.is_ranked])
        for title, rows in results
        for pass_name in PASSES
    ]
    panels = [(title, rows) for title, rows in panels if rows]
    if not panels:
        raise ValueError("no row is ranked, so there is nothing to draw")
    num_columns = min(2, len(panels))
    num_lines = -(-len(panels) // num_columns)
    figure = Figure(figsize=(7 * num_columns, 4.5 * num_lines), layout="constrained")
    for place, (title, rows) in enumerate(panels, 1):
        axes = figure.add_subplot(num_lines, num_columns, place)
        _draw_panel(axes, rows)
        axes.set(title=title, xlabel="sparsity", ylabel="ms", xlim=(0, 1), ylim=(0, None))
        axes.legend(fontsize="small")
    FigureCanvasAgg(figure)
    figure.savefig(path)


def _draw_panel(axes, rows: Sequence[Row]) -> None:  # type: ignore[no-untyped-def]  # matplotlib's axes
    dense = [row for row in rows if row.is_dense and row.ms is not None]
    for row, style in zip(dense, ("-", "--", "-.", ":") * len(dense), strict=False):
        axes.axhline(row.ms, color="black", linestyle=style, linewidth=1, label=row.case)
    fastest = min((row.ms for row in dense if row.ms is not None), default=None)
    if fastest is not None:
        axes.plot([0, 1], [fastest, 0], color="grey", linestyle=":", label="ideal: dense x (1 - s)")
    for name in dict.fromkeys(row.case for row in rows if not row.is_dense):
        points = sorted((row.sparsity, row.ms) for row in rows if row.case == name and row.ms is not None)
        axes.plot([s for s, _ in points], [ms for _, ms in points], marker="o", label=name)
