"""All files below a folder, those behind links included."""

import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["files_below"]


def files_below(folder: Path) -> Iterator[Path]:
    """Files in a folder and below it, in no particular order; folders that cannot be read are left out.

    Links to folders are followed, since a part of the tree may lie on another disk. Each folder is visited once: by its
    real path if that lies below `folder`, and otherwise by the first link, in the order of their names.
    """
    seen: set[Path] = set()
    waiting = [folder]
    while waiting:
        links: list[Path] = []
        for top in waiting:
            for place, folders, files in os.walk(top):  # lists links to folders, but does not enter them
                real = Path(place).resolve()
                if real in seen:
                    folders.clear()
                    continue
                seen.add(real)
                links += (Path(place) / name for name in folders if os.path.islink(os.path.join(place, name)))
                yield from (Path(place) / name for name in files)
        waiting = sorted(links)
