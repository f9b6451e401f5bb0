"""Where the commands print their tables."""

import os
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from pml.escape import one_line, visible

__all__ = ["make_console", "one_line"]

# Rich takes 80 where it cannot ask a terminal, at which tables of results fold their numbers.
WIDTH_ELSEWHERE = 120


class _SafeConsole(Console):
    """Shows control characters of what it is given; its own are kept apart from text by rich."""

    def render_str(self, text: str, **options: Any) -> Text:
        # Before columns are measured: spelled out, text is wider.
        return super().render_str(visible(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


def make_console(**options: Any) -> Console:
    """A console on stdout, as wide as the terminal; in a file or a pipe 120 columns, or as many as COLUMNS says.

    Text is shown as it is: nothing in it is taken for markup, an emoji's name, or a command to the terminal.
    """
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    plain = {"markup": False, "emoji": False, "highlight": False, "width": None if known else WIDTH_ELSEWHERE}
    return _SafeConsole(**{**plain, **options})
