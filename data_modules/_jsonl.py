"""Pairs from JSON Lines files, read line by line."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from pml.corpus import Pair
from pml.errors import InputError

__all__ = ["merge_duplicates", "read_pairs"]

LISTED_CONFLICTS = 5
"""Conflicting queries that an error spells out; a file with thousands would bury the message."""


def read_pairs(path: str | Path, query: str = "query", target: str = "target") -> Iterator[Pair]:
    """Pairs of a file with one JSON object a line, in the file's order; `source` is "file.jsonl:12".

    Blank lines are skipped, and so are all keys but the two.

    Args:
        path: The file, in UTF-8.
        query: Key of the query.
        target: Key of the text to recall.

    Raises:
        InputError: With file and line: not UTF-8, malformed JSON, not an object, a key missing, a value that is not a
            string or is empty, no pair at all, file cannot be read.
    """
    path = Path(path)
    empty = True
    try:
        # Binary lines end at line feeds alone, and a byte that is not UTF-8 is noticed on the line that has it.
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                where = f"{path.name}:{number}"
                text = _decode(line, where)
                if text.strip():
                    row = _parse(text, where)
                    yield Pair(_text(row, query, where), _text(row, target, where), source=where)
                    empty = False
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected a JSON Lines file") from error
    if empty:
        raise InputError(f'{path}: the file is empty; expected lines like {{"{query}": "...", "{target}": "..."}}')


def merge_duplicates(pairs: Iterable[Pair]) -> list[Pair]:
    """Pairs with each query once, where it came first; identical duplicates are merged.

    Raises:
        InputError: If a query has different targets: no model can recall both. Lists the queries with their sources.
    """
    first: dict[str, Pair] = {}
    conflicts: dict[str, list[Pair]] = {}
    for pair in pairs:
        known = first.setdefault(pair.query, pair)
        if known.target != pair.target:
            conflicts.setdefault(pair.query, [known]).append(pair)
    if conflicts:
        listed = [
            f"{query!r} ({', '.join(pair.source for pair in found[: LISTED_CONFLICTS + 1])})"
            for query, found in list(conflicts.items())[:LISTED_CONFLICTS]
        ]
        more = f" and {len(conflicts) - len(listed)} more" if len(conflicts) > len(listed) else ""
        raise InputError(
            f"{len(conflicts)} quer{'y has' if len(conflicts) == 1 else 'ies have'} different targets, which could "
            f"never all be recalled: {'; '.join(listed)}{more}; keep one target for each query"
        )
    return list(first.values())


def _decode(line: bytes, where: str) -> str:
    try:
        # Some editors put a byte-order mark at the start of a file.
        return line.decode("utf-8-sig" if where.endswith(":1") else "utf-8")
    except UnicodeDecodeError as error:
        byte = f"byte {error.start + 1} is 0x{line[error.start]:02x}"
        raise InputError(f"{where}: not UTF-8 ({byte}); save the file with UTF-8 encoding") from error


def _parse(text: str, where: str) -> dict[str, object]:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{where}: malformed JSON at column {error.colno} ({error.msg}); expected one object"
        ) from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: a JSON {type(row).__name__}; expected an object, one a line")
    return row


def _text(row: dict[str, object], key: str, where: str) -> str:
    if key not in row:
        raise InputError(f"{where}: no column {key!r}; found {', '.join(map(repr, row)) or 'none'}")
    value = row[key]
    if not isinstance(value, str):
        raise InputError(f"{where}: {key!r} is {json.dumps(value)[:40]}; expected a string, in quotes")
    if not value:
        raise InputError(f"{where}: the {key} is empty; expected text")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise InputError(f"{where}: {key!r} holds half of a surrogate pair, which is no character; write the whole one")
    return value
