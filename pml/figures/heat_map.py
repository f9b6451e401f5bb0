"""Heat maps of a number over ranks and lengths, one cell per grid point."""

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from pml.figures.style import INK, PAPER, thinned_labels
from pml.law import Observation

__all__ = ["Shade", "Values", "draw_heat_map", "is_grid", "over_grid"]

Shade = Literal["loss", "share"]
"""Kind of number: a loss, dark where high, or a share from 0 to 1, dark where low."""

Values = Mapping[tuple[int, int], float]
"""Numbers by (rank, length)."""

# Larger grids have no room for numbers.
MOST_NUMBERS = 64
NOTHING = "#DDDDDD"


def over_grid(runs: Iterable[Observation], value: Callable[[Observation], float | None]) -> Values:
    """Mean value over the runs at each rank and length; runs without a value are ignored."""
    found: dict[tuple[int, int], list[float]] = {}
    for run in runs:
        if (number := value(run)) is not None:
            found.setdefault((run.rank, run.target_tokens), []).append(number)
    return {point: float(np.mean(values)) for point, values in found.items()}


def is_grid(points: Iterable[tuple[int, int]]) -> bool:
    """Whether these (rank, length) points have several ranks and several lengths."""
    return sum(len(set(found)) > 1 for found in zip(*points, strict=True)) == 2


def draw_heat_map(axes: Axes, values: Values, title: str, shade: Shade) -> None:
    """Draw ranks from left to right, lengths from bottom to top, and numbers if they fit; grey cells have no run."""
    ranks, lengths = (sorted(set(found)) for found in zip(*values, strict=True))
    table = np.full((len(lengths), len(ranks)), np.nan)
    for (rank, length), value in values.items():
        table[lengths.index(length), ranks.index(rank)] = value
    low, high = (0.0, 1.0) if shade == "share" else (float(np.nanmin(table)), float(np.nanmax(table)))
    colours = matplotlib.colormaps["cividis_r" if shade == "loss" else "cividis"].with_extremes(bad=NOTHING)
    mesh = axes.pcolormesh(
        np.ma.masked_invalid(table), cmap=colours, vmin=low, vmax=high, edgecolor=PAPER, linewidth=0.6
    )
    axes.grid(False)
    axes.set_xticks(np.arange(len(ranks)) + 0.5, labels=thinned_labels(ranks, even=True))
    axes.set_yticks(np.arange(len(lengths)) + 0.5, labels=[f"{length:,}" for length in lengths])
    axes.tick_params(length=0)
    axes.set(xlabel="LoRA rank", ylabel="target tokens")
    axes.set_title(title, fontsize=11)
    bar = axes.figure.colorbar(mesh, ax=axes, pad=0.02)
    bar.outline.set_visible(False)
    if shade == "share":
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    if table.size > MOST_NUMBERS:
        return
    for (row, column), value in np.ndenumerate(table):
        if np.isfinite(value):
            light = sum(colours(mesh.norm(value))[:3]) > 1.5
            # 100 only where it is exactly that.
            text = f"{min(100 * value, 99 if value < 1 else 100):.0f}" if shade == "share" else f"{value:.2g}"
            ink = INK if light else PAPER
            axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=9, color=ink)
