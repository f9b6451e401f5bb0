"""All files below a folder, those behind links included."""

import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["files_below"]


def files_below(folder: Path) -> Iterator[Path]:
    """Files in a folder and below it, in no particular order.

    Links to folders are followed, since a part of the tree may lie on another disk; each folder is visited once, since
    links may form a loop.

    Raises:
        OSError: If the folder cannot be read.
    """
    seen: set[Path] = set()
    for place, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        real = Path(place).resolve()
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(place) / name for name in files)


def _raise(error: OSError) -> None:
    raise error
