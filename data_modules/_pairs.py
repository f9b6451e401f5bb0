"""Pairs from files."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from data_modules._chat import ADVICE, CHAT_COLUMNS, read_chat
from data_modules._rows import Columns, Row, checked_text, matching_columns, read_rows, text_in
from data_modules._wording import shown
from pml.corpus import Pair
from pml.errors import InputError

__all__ = ["read_pairs"]

DEFAULT_COLUMNS = ("query", "target")


def read_pairs(
    path: str | Path, query: str = "query", target: str = "target", paraphrases: str = "paraphrases"
) -> Iterator[Pair]:
    """Yield the pairs of a .jsonl, .csv, .parquet or .yaml file, in order; a `source` looks like "file.jsonl:12".

    If the column names are the defaults, a row without these two columns may be in a chat format: see `read_chat`. All
    rows of a file must be of one kind.

    Args:
        path: The file; see `read_rows`.
        query: Column of the query.
        target: Column of the text to recall.
        paraphrases: Column of other wordings of the query, if there is one: a list, or text with one per line.

    Raises:
        InputError: With file and line: if a value is not a string or is empty, if a row is not of the same kind as the
            first one, or as in `read_rows` and `read_chat`.
    """
    asked = Columns((query, target), (paraphrases,), advice=ADVICE)
    chats = [columns._replace(optional=(*columns.optional, paraphrases)) for columns in CHAT_COLUMNS]
    alternatives = (asked, *chats) if (query, target) == DEFAULT_COLUMNS else (asked,)
    first: tuple[Columns, str] | None = None
    for row in read_rows(path, *alternatives):
        columns = _columns_of(row, alternatives)
        first = first or (columns, row.where)
        if columns is not first[0]:
            raise InputError(
                f"{row.where}: has {_names(columns)}, and {first[1]} has {_names(first[0])}; expected rows of one kind"
            )
        if columns is asked:
            asks, answer = text_in(row, query, "query"), text_in(row, target, "target")
            yield Pair(asks, answer, row.where, _wordings(row, paraphrases))
        else:
            yield Pair(*read_chat(row, columns), row.where, _wordings(row, paraphrases))


def _wordings(row: Row, column: str) -> tuple[str, ...]:
    """Other wordings of a row's query; none if the cell is empty."""
    value = row.values.get(column)
    if value is None or value in ("", []):
        return ()
    listed = value.splitlines() if isinstance(value, str) else value
    if not isinstance(listed, list):
        raise InputError(f"{row.where}: {column!r} is {shown(value)}; expected a list of queries, or one a line")
    return tuple(checked_text(text, row.where, repr(column), "paraphrase") for text in listed if not _is_blank(text))


def _is_blank(text: object) -> bool:
    return isinstance(text, str) and not text.strip()


def _columns_of(row: Row, alternatives: Sequence[Columns]) -> Columns:
    found = matching_columns(row.where, row.values, alternatives)
    if len(found) > 1:
        raise InputError(f"{row.where}: has {', and also '.join(map(_names, found))}; {ADVICE}")
    return found[0]


def _names(columns: Columns) -> str:
    return " with ".join(map(repr, columns.required))
