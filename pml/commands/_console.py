"""The console that commands print tables on."""

import os
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from pml.escape import one_line, visible

__all__ = ["make_console", "one_line"]

# Without a terminal rich assumes 80 columns, in which numbers in result tables wrap.
WIDTH_ELSEWHERE = 120


class _SafeConsole(Console):
    """Spells out control characters in text; the console's own control codes pass unchanged."""

    def render_str(self, text: str, **options: Any) -> Text:
        # Before column widths are measured, since spelled-out text is wider.
        return super().render_str(visible(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


def make_console(**options: Any) -> Console:
    """Console, by default on stdout, as wide as the terminal; elsewhere as wide as COLUMNS says, or 120 columns.

    Text is shown literally: markup, emoji names and terminal escapes in it have no effect.
    """
    stream = sys.stderr if options.get("stderr") else sys.stdout
    known = stream.isatty() or "COLUMNS" in os.environ
    plain = {"markup": False, "emoji": False, "highlight": False, "width": None if known else WIDTH_ELSEWHERE}
    return _SafeConsole(**{**plain, **options})
