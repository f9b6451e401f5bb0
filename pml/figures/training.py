"""Figures of target tokens over the steps of a run: certain, right but not certain, or wrong."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullLocator, StrMethodFormatter, SymmetricalLogLocator

from pml.figures.style import PAPER, dashes, legend_below, literal, new_figure, percent_axis, styles_of

__all__ = ["Curves", "learning_figure", "phases_figure"]

Array = npt.NDArray[np.float64]

PHASES = (("p > 0.5: certain", "#0072B2", ""), ("right, p <= 0.5", "#56B4E9", "..."), ("wrong", "#D55E00", "///"))


@dataclass(frozen=True)
class Curves:
    """Measurements at each look of a run, all of shape (looks,).

    Attributes:
        step: Optimiser steps taken.
        certain: Share of target tokens with p > 0.5.
        right: Share of target tokens that are the argmax but not certain.
        loss: Mean loss in nats per target token.
    """

    step: npt.NDArray[np.int64]
    certain: Array
    right: Array
    loss: Array


def phases_figure(runs: Mapping[str, Curves]) -> Figure | None:
    """Shares of target tokens that are certain, right but not certain, and wrong, over steps; None without runs.

    Args:
        runs: A few runs, by the title of their panel.
    """
    if not runs:
        return None
    # The panels share one axis.
    last = max(int(run.step[-1]) for run in runs.values())
    with new_figure(1.1 + 2.1 * len(runs), rows=len(runs), sharex=True, squeeze=False) as (figure, grid):
        for axes, (name, run) in zip(grid[:, 0], runs.items(), strict=True):
            shares = (run.certain, run.right, 1 - run.certain - run.right)
            bottom = np.zeros(len(run.step))
            for (_, colour, hatch), share in zip(PHASES, shares, strict=True):
                top = bottom + share
                axes.fill_between(run.step, bottom, top, facecolor=colour, hatch=hatch, edgecolor=PAPER, linewidth=0.0)
                bottom = top
            axes.set_title(literal(name), fontsize=10)
            _step_axis(axes, last)
            percent_axis(axes)
            axes.set_ylim(0, 1)
            axes.set_ylabel("target tokens")
        grid[-1, 0].set_xlabel("optimiser steps")
        handles = [Patch(facecolor=c, hatch=h, edgecolor=PAPER, label=name) for name, c, h in PHASES]
        legend_below(figure, handles)
    return figure


def learning_figure(groups: Mapping[str, list[Curves]], title: str) -> Figure | None:
    """Mean loss and share of certain tokens over optimiser steps, one line per run; None without runs.

    Args:
        groups: Runs by the legend's label for them, such as their method or rank.
        title: Title of the legend.
    """
    every = [run for runs in groups.values() for run in runs]
    if not every:
        return None
    looks = styles_of(groups)
    faint = 1.0 if len(every) <= len(groups) else 0.6
    with new_figure(5.3, rows=2, sharex=True) as (figure, (above, below)):
        for i, (name, runs) in enumerate(groups.items()):
            for run in runs:
                line = {"color": looks[name][0], "linestyle": dashes(i), "alpha": faint}
                above.plot(run.step, run.loss, **line)
                below.plot(run.step, run.certain, **line)
        _step_axis(below, max(int(run.step[-1]) for run in every))
        above.set_ylim(bottom=0)
        above.set_ylabel("loss (nats per token)")
        percent_axis(below)
        below.set(xlabel="optimiser steps", ylabel="tokens certain")
        handles = [
            Line2D([], [], color=colour, linestyle=dashes(i), label=literal(name))
            for i, (name, (colour, _)) in enumerate(looks.items())
        ]
        if len(handles) > 1:
            legend_below(figure, handles, title=title)
    return figure


def _step_axis(axes: Axes, last: int) -> None:
    """Make the step axis logarithmic above 1, since early steps change most; linear for fewer than 10 steps."""
    axes.set_xlim(0, max(last, 1))
    if last < 10:
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        return
    axes.set_xscale("symlog", linthresh=1, linscale=0.3)
    axes.xaxis.set_major_locator(
        SymmetricalLogLocator(base=10, linthresh=1, subs=(1.0, 2.0, 5.0) if last < 300 else (1.0, 3.0))
    )
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
