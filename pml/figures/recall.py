"""Recall and the threshold p = 0.5: by rank and method, over all tokens, and where targets first fail."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from pml.figures.style import (
    INK,
    PAPER,
    Looks,
    NothingToShow,
    draw_point,
    legend_below,
    literal,
    logarithmic,
    looks_of,
    new_figure,
    plain_log,
)
from pml.law import CRITICAL_LOSS
from pml.records import Record
from pml.token_results import FirstPositions, RankCorrelation, TokenResults

__all__ = ["first_failure_figure", "recall_figure", "threshold_figure", "token_loss_figure"]

# Below this a loss is a probability of 0.9999, as good as certain; smaller ones share the first bin.
SMALLEST_LOSS = 1e-4
CLASSES = (
    ("p > 0.5: certain", "#0072B2", ""),
    ("p <= 0.5, argmax right", "#56B4E9", "..."),
    ("argmax wrong", "#D55E00", "///"),
)


def recall_figure(methods: Mapping[str, Iterable[Record]], measure: Literal["token_accuracy", "exact_match"]) -> Figure:
    """Recall in percent under teacher forcing against rank, a panel for each length and a line for each method.

    Lines go through the means over seeds; bars reach from the lowest to the highest seed.

    Args:
        methods: Finished runs by the name of their method.
        measure: `token_accuracy`, share of target tokens, or `exact_match`, share of whole targets.

    Raises:
        NothingToShow: If there is no run.
    """
    runs = {method: list(records) for method, records in methods.items()}
    everything = [record for records in runs.values() for record in records]
    if not everything:
        raise NothingToShow("no run was finished")
    lengths = sorted({record.target_tokens for record in everything})
    ranks = sorted({record.rank for record in everything})
    looks = looks_of(runs)
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
            logarithmic(axes, "x", ranks)
            axes.xaxis.set_tick_params(labelbottom=True)
            _percent_axis(axes)
            if i % columns == 0:
                axes.set_ylabel("tokens right" if measure == "token_accuracy" else "targets right")
            # Below the last panel of each column, which need not be in the last row.
            if i + columns >= len(lengths):
                axes.set_xlabel("LoRA rank")
        handles = [
            Line2D([], [], color=colour, marker=marker, markersize=6, linestyle=_dashes(i), label=literal(method))
            for i, (method, (colour, marker)) in enumerate(looks.items())
        ]
        if len(handles) > 1:
            legend_below(figure, handles, columns=2)
    return figure


def threshold_figure(records: Sequence[Record], against: Literal["rank", "room"]) -> Figure:
    """Share of target tokens with p above the threshold, in percent, a line through the means of each length.

    Args:
        records: Finished runs of one method.
        against: What the horizontal axis is: `rank`, or `room`, adapter parameters per target token, on which runs of
            all lengths fall together where capacity is what limits them.

    Raises:
        NothingToShow: If there is no run.
    """
    if not records:
        raise NothingToShow("no run was finished")
    looks = looks_of(sorted({record.target_tokens for record in records}))
    with new_figure(4.2) as (figure, axes):
        for length, look in looks.items():
            of_length = [record for record in records if record.target_tokens == length]
            values: dict[float, list[float]] = {}
            for record in of_length:
                x = record.rank if against == "rank" else record.effective_parameters / length
                values.setdefault(x, []).append(1 - record.sub_threshold_fraction)
                draw_point(axes, x, 1 - record.sub_threshold_fraction, look, size=6.5)
            xs = sorted(values)
            axes.plot(xs, [float(np.mean(values[x])) for x in xs], color=look[0], linewidth=1.4, zorder=2)
        if against == "rank":
            logarithmic(axes, "x", {record.rank for record in records})
            axes.set_xlabel("LoRA rank")
        else:
            plain_log(axes, "x")
            axes.set_xlabel("adapter parameters per target token")
        _percent_axis(axes)
        axes.set_ylabel("target tokens with p > 0.5")
        legend_below(figure, _length_handles(looks), title="target tokens")
    return figure


def token_loss_figure(tokens: Iterable[TokenResults]) -> Figure:
    """How the losses of single target tokens are spread around ln 2, in percent of all tokens of these runs.

    Args:
        tokens: Per-token results of finished runs; all of them are put together.

    Raises:
        NothingToShow: If there is none.
    """
    every = list(tokens)
    if not every:
        raise NothingToShow("no run left per-token results")
    losses = np.maximum(np.concatenate([run.loss for run in every]), SMALLEST_LOSS)
    correct = np.concatenate([run.correct for run in every])
    certain = losses < CRITICAL_LOSS
    # A bin ends at ln 2, so that no bar has tokens of both sides.
    steps = np.log(CRITICAL_LOSS / SMALLEST_LOSS) / 24
    above = max(1, int(np.ceil(np.log(max(losses.max(), 2 * CRITICAL_LOSS) / CRITICAL_LOSS) / steps)))
    edges = CRITICAL_LOSS * np.exp(steps * np.arange(-24, above + 1))
    edges[-1] = max(edges[-1], losses.max())
    edges[0] = SMALLEST_LOSS
    bottom = np.zeros(len(edges) - 1)
    with new_figure(4.0) as (figure, axes):
        for (_, colour, hatch), chosen in zip(CLASSES, (certain, ~certain & correct, ~certain & ~correct), strict=True):
            shares = np.histogram(losses[chosen], edges)[0] / len(losses)
            axes.bar(
                edges[:-1],
                shares,
                np.diff(edges),
                bottom,
                align="edge",
                color=colour,
                hatch=hatch,
                edgecolor=PAPER,
                linewidth=0.3,
            )
            bottom += shares
        axes.axvline(CRITICAL_LOSS, color=INK, linewidth=1.3, linestyle="--")
        plain_log(axes, "x", decades=True)
        axes.set_ylim(0, max(float(bottom.max()) * 1.15, 1e-3))
        axes.text(CRITICAL_LOSS * 0.92, axes.get_ylim()[1], "ln 2", ha="right", va="top", fontsize=10)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if bottom.max() > 0.03 else None))
        axes.set(xlabel="loss of a token (nats, logarithmic)", ylabel="share of target tokens")
        handles = [Patch(facecolor=c, hatch=h, edgecolor=PAPER, label=name) for name, c, h in CLASSES]
        legend_below(figure, handles, columns=2)
    return figure


def first_failure_figure(positions: FirstPositions, correlation: RankCorrelation) -> Figure:
    """First wrong token of a target against its first token with p <= 0.5, both counted from 1, on logarithmic axes.

    The area of a point grows with the number of targets there.

    Args:
        positions: Of the targets of all runs; those without a token with p <= 0.5 are not drawn.
        correlation: Spearman's rank correlation of what is drawn.
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
        plain_log(axes, "x")
        plain_log(axes, "y")
        margin = edge**0.06 * 1.05
        axes.set(xlim=(1 / margin, edge * margin), ylim=(1 / margin, edge * margin))
        axes.set(xlabel="first token with p <= 0.5", ylabel="first wrong token")
        axes.set_title(f"Spearman's $\\rho$ = {correlation.rho:.3f}, {correlation.targets:,} targets", fontsize=11)
    return figure


def _draw_recall(axes: Axes, runs: Mapping[str, Sequence[Record]], length: int, measure: str, looks: Looks) -> None:
    for i, (method, records) in enumerate(runs.items()):
        colour, marker = looks[method]
        values: dict[int, list[float]] = {}
        for record in records:
            if record.target_tokens == length:
                values.setdefault(record.rank, []).append(getattr(record, measure))
        if not values:
            continue
        ranks = sorted(values)
        means = np.array([np.mean(values[rank]) for rank in ranks])
        low, high = (np.array([f(values[rank]) for rank in ranks]) for f in (min, max))
        axes.errorbar(
            ranks,
            means,
            # A mean of equal floats may differ from them by rounding, and bars have no negative length.
            np.maximum([means - low, high - means], 0.0),
            color=colour,
            marker=marker,
            markersize=5,
            linestyle=_dashes(i),
            linewidth=1.4,
            capsize=2.5,
            label=method,
            clip_on=False,
        )


def _dashes(i: int) -> Any:
    """Another line for each method, for those who cannot see the colours."""
    return ("-", "--", ":", "-.")[i % 4]


def _percent_axis(axes: Axes) -> None:
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _length_handles(looks: Looks) -> list[Line2D]:
    return [Line2D([], [], color=c, marker=m, markersize=6, label=f"{length:,}") for length, (c, m) in looks.items()]
