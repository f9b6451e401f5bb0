"""Figures of recall by rank and method, and of where targets first fail."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from pml.figures.style import (
    INK,
    PAPER,
    Styles,
    dashes,
    legend_below,
    literal,
    logarithmic,
    new_figure,
    percent_axis,
    styles_of,
)
from pml.records import Record
from pml.token_results import FirstPositions, RankCorrelation

__all__ = ["Measure", "first_failure_figure", "recall_figure"]

LABELS = {"tokens_certain": "tokens certain", "token_accuracy": "tokens right", "exact_match": "targets right"}
Measure = Literal["tokens_certain", "token_accuracy", "exact_match"]


def recall_figure(methods: Mapping[str, Iterable[Record]], measure: Measure) -> Figure | None:
    """Recall in percent under teacher forcing against rank, one panel per length and one line per method.

    Lines join the means over seeds; bars span the lowest to the highest seed. None with fewer than two ranks.

    Args:
        methods: Finished runs by method name.
        measure: `tokens_certain`, the share of target tokens with p > 0.5; `token_accuracy`, the share that are right;
            or `exact_match`, the share of targets that are right at every token.
    """
    runs = {method: list(records) for method, records in methods.items()}
    everything = [record for records in runs.values() for record in records]
    lengths = sorted({record.target_tokens for record in everything})
    ranks = sorted({record.rank for record in everything})
    if len(ranks) < 2:
        return None
    looks = styles_of(runs)
    columns = min(2, len(lengths))
    rows = -(-len(lengths) // columns)
    height = 3.6 if columns == 1 else 1.0 + 1.8 * rows
    with new_figure(height, rows, columns, sharex=True, sharey=True, squeeze=False) as (figure, grid):
        for i, axes in enumerate(grid.flat):
            if i >= len(lengths):
                axes.set_axis_off()
                continue
            _draw_recall(axes, runs, lengths[i], measure, looks)
            axes.set_title(f"{lengths[i]:,} tokens", fontsize=10)
            logarithmic(axes, ranks)
            axes.xaxis.set_tick_params(labelbottom=True)
            percent_axis(axes)
            if i % columns == 0:
                axes.set_ylabel(LABELS[measure])
            # Below the last panel of each column, which need not be in the last row.
            if i + columns >= len(lengths):
                axes.set_xlabel("LoRA rank")
        handles = [
            Line2D([], [], color=colour, marker=marker, markersize=6, linestyle=dashes(i), label=literal(method))
            for i, (method, (colour, marker)) in enumerate(looks.items())
        ]
        if len(handles) > 1:
            legend_below(figure, handles)
    return figure


def first_failure_figure(positions: FirstPositions, correlation: RankCorrelation) -> Figure:
    """First wrong token of a target against its first token with p <= 0.5, both counted from 1, on logarithmic axes.

    The area of a point grows with the number of targets there. A target without a wrong token fails one past its end.

    Args:
        positions: First positions of the targets of all runs; targets without a token with p <= 0.5 are not drawn.
        correlation: Spearman's rank correlation over the targets drawn.
    """
    shown = positions.sub_threshold < positions.length
    points, counts = np.unique(
        np.stack([positions.sub_threshold[shown], positions.failure[shown]], axis=1) + 1, axis=0, return_counts=True
    )
    edge = float(points.max())
    with new_figure(4.4) as (figure, axes):
        axes.plot([1, edge], [1, edge], color=INK, linewidth=1.0, linestyle="--", zorder=1)
        axes.scatter(
            points[:, 0],
            points[:, 1],
            s=32 + 14 * (counts - 1.0) ** 0.75,
            color="#0072B2",
            edgecolor=PAPER,
            linewidth=0.6,
            alpha=0.85,
            zorder=2,
        )
        axes.set(xscale="log", yscale="log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
            axis.set_minor_formatter(NullFormatter())
        margin = edge**0.06 * 1.05
        axes.set(xlim=(1 / margin, edge * margin), ylim=(1 / margin, edge * margin))
        axes.set(xlabel="first token with p <= 0.5", ylabel="first wrong token")
        axes.set_title(f"Spearman's $\\rho$ = {correlation.rho:.3f}, {correlation.targets:,} targets", fontsize=11)
    return figure


def _draw_recall(
    axes: Axes, runs: Mapping[str, Sequence[Record]], length: int, measure: Measure, looks: Styles
) -> None:
    for i, (method, records) in enumerate(runs.items()):
        colour, marker = looks[method]
        values: dict[int, list[float]] = {}
        for record in records:
            if record.target_tokens == length:
                values.setdefault(record.rank, []).append(_share(record, measure))
        if not values:
            continue
        ranks = sorted(values)
        means = np.array([np.mean(values[rank]) for rank in ranks])
        low, high = (np.array([f(values[rank]) for rank in ranks]) for f in (min, max))
        axes.errorbar(
            ranks,
            means,
            # The mean of equal floats may differ from them by rounding, and error bars cannot be negative.
            np.maximum([means - low, high - means], 0.0),
            color=colour,
            marker=marker,
            markersize=5,
            linestyle=dashes(i),
            linewidth=1.4,
            capsize=2.5,
            label=method,
            clip_on=False,
        )


def _share(record: Record, measure: str) -> float:
    return 1 - record.sub_threshold_fraction if measure == "tokens_certain" else float(getattr(record, measure))
