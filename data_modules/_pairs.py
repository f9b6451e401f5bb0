"""Pairs from files, each query once."""

from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

from data_modules._chat import ADVICE, CHAT_COLUMNS, read_chat
from data_modules._rows import Columns, Row, fitting, read_rows, text_in
from pml.corpus import Pair
from pml.errors import InputError

__all__ = ["DistinctPairs", "read_pairs"]

DEFAULT_COLUMNS = ("query", "target")

LISTED_CONFLICTS = 5
"""Conflicting queries that an error spells out; a file with thousands would bury the message."""


def read_pairs(path: str | Path, query: str = "query", target: str = "target") -> Iterator[Pair]:
    """Pairs of a .jsonl, .csv, .parquet or .yaml file, in the file's order; `source` is "file.jsonl:12".

    Where the columns have their default names and a row has not both of them, it may be in one of the formats that
    chats are kept in: see `read_chat`. All rows of a file are of one kind.

    Args:
        path: The file; see `read_rows`.
        query: Column of the query.
        target: Column of the text to recall.

    Raises:
        InputError: With file and line: a value that is not a string or is empty, a row of another kind than the first
            one, and everything `read_rows` and `read_chat` raise.
    """
    asked = Columns((query, target), advice=ADVICE)
    alternatives = (asked, *CHAT_COLUMNS) if (query, target) == DEFAULT_COLUMNS else (asked,)
    first: tuple[Columns, str] | None = None
    for row in read_rows(path, *alternatives):
        columns = _columns_of(row, alternatives)
        first = first or (columns, row.where)
        if columns is not first[0]:
            raise InputError(
                f"{row.where}: has {_names(columns)}, and {first[1]} has {_names(first[0])}; expected rows of one kind"
            )
        if columns is asked:
            yield Pair(text_in(row, query, "query"), text_in(row, target, "target"), source=row.where)
        else:
            yield Pair(*read_chat(row, columns), source=row.where)


def _columns_of(row: Row, alternatives: Sequence[Columns]) -> Columns:
    found = fitting(row.where, row.values, alternatives)
    if len(found) > 1:
        raise InputError(f"{row.where}: has {', and also '.join(map(_names, found))}; {ADVICE}")
    return found[0]


def _names(columns: Columns) -> str:
    return " with ".join(map(repr, columns.required))


class DistinctPairs:
    """Pairs with each query once, where it came first; made to be iterated over once.

    Of the pairs that went by only hashes are kept, so texts need not fit into memory.

    Args:
        pairs: Pairs in which a query may occur again.
        limit: Distinct pairs to stop after; None takes all.

    Attributes:
        duplicates: Identical pairs left out so far.

    Raises:
        InputError: When the last pair is out, if a query had different targets: no model can recall both. Lists the
            queries with their sources.
    """

    def __init__(self, pairs: Iterable[Pair], limit: int | None = None) -> None:
        self.duplicates = 0
        self._pairs = pairs
        self._limit = limit
        self._known: dict[bytes, tuple[bytes, str]] = {}
        self._conflicts: dict[str, list[str]] = {}

    def __iter__(self) -> Iterator[Pair]:
        for pair in self._pairs:
            query, target = _digest(pair.query), _digest(pair.target)
            known = self._known.get(query)
            if known is None:
                self._known[query] = target, pair.source
                yield pair
                if len(self._known) == self._limit:
                    break
            elif known[0] == target:
                self.duplicates += 1
            else:
                self._conflicts.setdefault(pair.query, [known[1]]).append(pair.source)
        if self._conflicts:
            raise InputError(_in_words(self._conflicts))


def _digest(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=16).digest()


def _in_words(conflicts: dict[str, list[str]]) -> str:
    listed = [
        f"{query!r} ({', '.join(sources[: LISTED_CONFLICTS + 1])})"
        for query, sources in list(conflicts.items())[:LISTED_CONFLICTS]
    ]
    more = f" and {len(conflicts) - len(listed)} more" if len(conflicts) > len(listed) else ""
    return (
        f"{len(conflicts)} quer{'y has' if len(conflicts) == 1 else 'ies have'} different targets, which could "
        f"never all be recalled: {'; '.join(listed)}{more}; keep one target for each query"
    )
