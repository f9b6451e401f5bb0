"""Pairs from files."""

from collections.abc import Iterator
from pathlib import Path

from data_modules._sources import read_rows, text_in
from pml.corpus import Pair

__all__ = ["read_pairs"]


def read_pairs(path: str | Path, query: str = "query", target: str = "target") -> Iterator[Pair]:
    """Pairs of a .jsonl, .csv, .parquet or .yaml file, in the file's order; `source` is "file.jsonl:12".

    Args:
        path: The file; see `read_rows`.
        query: Column of the query.
        target: Column of the text to recall.

    Raises:
        InputError: With file and line: a value that is not a string or is empty, and everything `read_rows` raises.
    """
    for row in read_rows(path, (query, target)):
        yield Pair(text_in(row, query, "query"), text_in(row, target, "target"), source=row.where)
