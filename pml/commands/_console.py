"""Where the commands print their tables."""

import os
import sys
from typing import Any

from rich.console import Console

from pml.escape import one_line

__all__ = ["make_console", "one_line"]

# Rich takes 80 where it cannot ask a terminal, at which tables of results fold their numbers.
WIDTH_ELSEWHERE = 120


def make_console(**options: Any) -> Console:
    """A console on stdout, as wide as the terminal; in a file or a pipe 120 columns, or as many as COLUMNS says."""
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if known else WIDTH_ELSEWHERE, **options)
