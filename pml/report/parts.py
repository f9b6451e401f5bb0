"""Building blocks of a page: sections, figures with captions, and values as text."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from matplotlib.figure import Figure

from pml.figures import freeze_layout, png_bytes, svg_data_uri
from pml.law import Equation
from pml.tables import TextTable

__all__ = ["Panel", "Section", "draw", "shown", "spans"]


@dataclass(frozen=True)
class Panel:
    """A figure on the page.

    Attributes:
        name: File name of the PNG without its suffix; unique on the page.
        title: What it shows.
        caption: How to read it.
        alt: Alternative text for readers who cannot see it.
        svg: The figure as a data URI.
        png: The figure as PNG.
    """

    name: str
    title: str
    caption: str
    alt: str
    svg: str
    png: bytes = field(repr=False)


@dataclass(frozen=True)
class Section:
    """A heading and its content, which the page shows in this order.

    Attributes:
        title: The heading.
        equation: A law, which the page shows as HTML.
        sentences: Paragraphs.
        warnings: Reasons to trust the section less than its numbers suggest.
        panels: Figures.
        tables: Tables.
    """

    title: str
    equation: Equation | None = None
    sentences: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    panels: list[Panel] = field(default_factory=list)
    tables: list[TextTable] = field(default_factory=list)

    def __bool__(self) -> bool:
        """Whether anything stands below the heading."""
        return bool(self.equation or self.sentences or self.warnings or self.panels or self.tables)


def draw(name: str, title: str, caption: str, alt: str, figure: Figure | None) -> list[Panel]:
    """A list with the panel of this figure; an empty list for None, when the runs have nothing to show."""
    if figure is None:
        return []
    freeze_layout(figure)
    return [Panel(name, title, caption, alt, svg_data_uri(figure), png_bytes(figure))]


def shown(value: Any) -> str:
    """A setting as text: lists without brackets, None as a dash."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value)) or "-"
    if isinstance(value, dict):
        return ", ".join(f"{key} {shown(inner)}" for key, inner in value.items()) or "-"
    return str(value)


def spans(values: Iterable[float], digits: int = 0) -> str:
    """The smallest and the largest value, such as `1 to 8`; one number if both are shown alike."""
    known = sorted(values)
    low, high = f"{known[0]:,.{digits}f}", f"{known[-1]:,.{digits}f}"
    return low if low == high else f"{low} to {high}"
