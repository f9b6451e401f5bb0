"""Parameters of several laws beside each other."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pml.figures.style import FEW_COLOURS, PAPER, NothingToShow, literal, new_figure
from pml.law import Estimate

__all__ = ["side_by_side_figure"]


def side_by_side_figure(laws: Mapping[str, Mapping[str, Estimate]], symbols: Mapping[str, str]) -> Figure:
    """Parameters with their 95 % intervals, a panel for each parameter and in it a line for each law.

    Args:
        laws: Parameters by name, by what each law is called.
        symbols: What a parameter is called in the figure; those that some law lacks are left out.

    Raises:
        NothingToShow: If there is no parameter that all laws have.
    """
    names = [name for name in symbols if all(name in parameters for parameters in laws.values())]
    if not laws or not names:
        raise NothingToShow("the laws have no parameter in common")
    with new_figure((0.75 + 0.27 * len(laws)) * len(names), rows=len(names)) as (figure, grid):
        for axes, name, colour in zip(np.atleast_1d(grid), names, FEW_COLOURS, strict=False):
            for line, parameters in enumerate(laws.values()):
                _draw(axes, line, parameters[name], colour)
            axes.set_yticks(range(len(laws)), labels=[literal(label) for label in laws], fontsize=10)
            # The first law on top, as in a table.
            axes.set_ylim(len(laws) - 0.5, -0.5)
            axes.set_xlabel(symbols[name])
            axes.xaxis.set_major_locator(MaxNLocator(4))
    return figure


def _draw(axes: Axes, line: int, estimate: Estimate, colour: str) -> None:
    if estimate.interval is not None:
        axes.plot(estimate.interval, [line, line], color=colour, linewidth=2.2, solid_capstyle="butt", zorder=2)
    axes.plot([estimate.value], [line], "o", markersize=7, markerfacecolor=colour, markeredgecolor=PAPER, zorder=3)
