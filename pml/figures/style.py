"""Style and output of figures: colours, markers, axes, legends and files."""

import base64
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, PercentFormatter

from pml.atomic import whole_file

__all__ = [
    "FEW_COLOURS",
    "INK",
    "MARKERS",
    "PAPER",
    "Styles",
    "canvas",
    "dashes",
    "freeze_layout",
    "legend_below",
    "literal",
    "logarithmic",
    "new_figure",
    "percent_axis",
    "png_bytes",
    "point",
    "save_figure",
    "styles_of",
    "svg_data_uri",
    "thinned_labels",
]

# Okabe and Ito's colours, which colour-blind readers can tell apart, without the yellow that is too pale for lines.
FEW_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "os^DvPX<>ph"
INK = "#333333"
PAPER = "#FFFFFF"
GRID = "#E4E4E4"
# On a phone, where a figure fills the width of the page, this makes its letters as large as the text around it.
WIDTH_INCHES = 4.7
# Characters of a legend's font across a figure; a handle with its margins takes the room of six.
LEGEND_CHARACTERS = 66

Styles = dict[Any, tuple[str, str]]
"""A colour and a marker for each value that a figure tells apart."""


@contextmanager
def canvas() -> Iterator[None]:
    """Apply the style to everything drawn inside the context."""
    settings: dict[Any, Any] = {
        "font.size": 11.0,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "text.color": INK,
        # A light grid behind the data, and no frame where there is no scale.
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
    }
    with matplotlib.rc_context(settings):
        yield


@contextmanager
def new_figure(height: float = 3.9, rows: int = 1, columns: int = 1, **options: Any) -> Iterator[tuple[Figure, Any]]:
    """A figure one page column wide, and its axes; draw inside the context.

    Args:
        height: Height in inches.
        rows: Panels from top to bottom.
        columns: Panels from left to right.
        options: Further arguments of `Figure.subplots`.
    """
    with canvas():
        figure = Figure(figsize=(WIDTH_INCHES, height), dpi=160, layout="constrained", facecolor=PAPER)
        yield figure, figure.subplots(rows, columns, **options)


def styles_of(values: Iterable[Any]) -> Styles:
    """A colour and a marker for each value, in order."""
    ordered = list(values)
    if len(ordered) <= len(FEW_COLOURS):
        colours = list(FEW_COLOURS[: len(ordered)])
    else:
        # The pale end of the map would vanish on white.
        shades = matplotlib.colormaps["cividis"](np.linspace(0.0, 0.88, len(ordered)))
        colours = [matplotlib.colors.to_hex(shade) for shade in shades]
    return {
        value: (colour, MARKERS[i % len(MARKERS)])
        for i, (value, colour) in enumerate(zip(ordered, colours, strict=True))
    }


def point(look: tuple[str, str], *, is_hollow: bool = False, size: float = 8.0) -> dict[str, Any]:
    """Plot options for one run: hollow if it is saturated, otherwise filled."""
    colour, marker = look
    return {
        "linestyle": "none",
        "marker": marker,
        "markersize": size,
        "markerfacecolor": PAPER if is_hollow else colour,
        "markeredgecolor": colour if is_hollow else PAPER,
        "markeredgewidth": 1.6 if is_hollow else 0.8,
        "zorder": 3 if is_hollow else 4,
        "clip_on": False,
        "label": "saturated" if is_hollow else "unsaturated",
    }


def legend_below(figure: Figure, handles: Sequence[Any], title: str | None = None) -> None:
    """Put a legend below the axes, where it hides nothing, in up to three columns that fit the figure's width."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=max(1, min(3, LEGEND_CHARACTERS // (longest + 6), len(handles))),
        frameon=False,
        title=title,
        fontsize=10,
        title_fontsize=10,
        columnspacing=1.2,
        handlelength=1.6,
    )


def logarithmic(axes: Axes, values: Iterable[int]) -> None:
    """Make the horizontal axis logarithmic, with ticks at these values only; labels that would touch are left out."""
    ticks = sorted(set(values))
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(ticks, labels=thinned_labels(ticks))


def percent_axis(axes: Axes) -> None:
    """Make the vertical axis one of shares, from 0 to 100 %."""
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def dashes(i: int) -> Any:
    """Line style of the i-th method, for readers who cannot see the colours; the styles repeat after four."""
    return ("-", "--", ":", "-.")[i % 4]


def literal(text: str) -> str:
    """Text that a figure shows as it is: on one line, with `$` escaped so that nothing is taken for mathematics."""
    return " ".join(text.split()).replace("$", r"\$")


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure atomically, in the format of the path's suffix, and return the path."""
    with whole_file(path) as file:
        figure.savefig(file, format=path.suffix.removeprefix("."))
    return path


def freeze_layout(figure: Figure) -> None:
    """Lay out the figure once, so that writing it in several formats does not repeat the work."""
    figure.draw_without_rendering()
    figure.set_layout_engine(None)


def png_bytes(figure: Figure) -> bytes:
    """The figure as PNG; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def svg_data_uri(figure: Figure) -> str:
    """The figure as an SVG data URI, with letters drawn as paths so that no font is needed."""
    buffer = io.BytesIO()
    # Without a date, and with ids that depend only on the content, the same figure gives the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "pml", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def thinned_labels(values: Sequence[int], *, even: bool = False) -> list[str]:
    """Tick labels on a logarithmic or evenly spaced axis; a label that would touch the one before it is empty."""
    if not values:
        return []
    places = np.arange(len(values)) if even else np.log(values)
    room = (0.04 if even else 0.055) * float(places[-1] - places[0])
    labels, last = [], -math.inf
    for value, place in zip(values, places, strict=True):
        # Long numbers take more room.
        fits = place - last >= room * max(1.0, len(f"{value:,}") / 2)
        labels.append(f"{value:,}" if fits else "")
        last = place if fits else last
    return labels
