"""Pairs as users give them to `memorize`: a file, or queries and targets in Python, which become a file."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pml.atomic import whole_file
from pml.errors import InputError

__all__ = ["checked_pairs", "file_with"]

PAIRS_NAME = "pairs.jsonl"


def checked_pairs(pairs: Any) -> Path | list[tuple[str, str]]:
    """The path of a file with pairs, or the pairs themselves if they are given in Python.

    Args:
        pairs: A path, a mapping of queries to targets, or (query, target) tuples.

    Raises:
        InputError: If there is no pair, or one is not two texts.
    """
    if isinstance(pairs, (str, Path)):
        return Path(pairs)
    rows = list(pairs.items() if isinstance(pairs, Mapping) else pairs)
    if not rows:
        raise InputError("pairs is empty; expected at least one query with its target")
    for row in rows:
        if not (isinstance(row, (tuple, list)) and len(row) == 2):
            raise InputError(f"pairs has {row!r}; expected tuples of a query and a target")
        for text in row:
            if not isinstance(text, str) or not text or text != text.encode(errors="ignore").decode():
                raise InputError(f"pairs has {row!r}; expected text that is not empty and has no lone surrogate")
    return rows


@contextmanager
def file_with(pairs: Path | list[tuple[str, str]], folder: Path) -> Iterator[Path]:
    """Yield the path of a file with the pairs; those given in Python are written into the folder.

    If an `InputError` shows that the pairs are refused, everything is as before: the file is removed, and with it a new
    folder, or has its former content again.

    Args:
        pairs: From `checked_pairs`.
        folder: The run's folder.
    """
    if isinstance(pairs, Path):
        yield pairs
        return
    is_new, path = not folder.exists(), folder / PAIRS_NAME
    before = path.read_bytes() if path.exists() else None
    with whole_file(path) as file:
        for query, target in pairs:
            file.write(json.dumps({"query": query, "target": target}, ensure_ascii=False).encode() + b"\n")
    try:
        yield path
    except InputError:
        if before is not None:
            with whole_file(path) as file:
                file.write(before)
        else:
            path.unlink()
        if is_new:
            folder.rmdir()
        raise
