"""Documents from files and folders, read lazily: of all files, only HTML is in memory as a whole."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import inscriptis

from data_modules._files import as_text, blocks, kind
from data_modules._rows import Columns, Row, read_rows, text_in
from data_modules._wording import one_line
from pml.errors import InputError
from pml.folders import files_below

__all__ = ["Document", "document_of_row", "read_documents"]

PLAIN_SUFFIXES = (".txt", ".md", ".rst")
HTML_SUFFIXES = (".html", ".htm")
TABLE_SUFFIXES = (".jsonl", ".csv", ".parquet")
TEXT_SUFFIXES = (*PLAIN_SUFFIXES, *HTML_SUFFIXES, *TABLE_SUFFIXES)


@dataclass(frozen=True)
class Document:
    """A text with a title.

    Attributes:
        title: Name that a query can ask for.
        blocks: Its text in consecutive blocks, which can be read once.
    """

    title: str
    blocks: Iterable[str]


def read_documents(paths: Iterable[str | Path], column: str = "text") -> Iterator[Document]:
    """Yield the documents in files, and in all files below folders, sorted by path.

    A .txt, .md or .rst file is one document, line ends included. An .html file is one document without its markup. In
    a .jsonl, .csv or .parquet file each row is a document. In folders, other, hidden and empty files are skipped.

    Args:
        paths: Files and folders, in the order in which their text is read.
        column: Column of .jsonl, .csv and .parquet files that holds the text.

    Raises:
        InputError: If a file is unreadable, malformed, not UTF-8, of an unknown kind, or has no such column or no text.
    """
    for path in map(Path, paths):
        if not os.path.isdir(path):  # unlike Path.is_dir, false if the system raises an error
            yield from _documents(path, as_text(path.name), column)
            continue
        for file in _files_below(path):
            yield from _documents(file, as_text(file.relative_to(path).as_posix()), column)


def document_of_row(row: Row, column: str) -> Document:
    """A row as a document; its title is its column "title", or else its place in the file.

    Raises:
        InputError: See `text_in`.
    """
    title = row.values.get("title")
    named = isinstance(title, str) and title
    return Document(text_in(row, "title") if named else row.where, [text_in(row, column)])


def _files_below(folder: Path) -> list[Path]:
    try:
        files = [file for file in sorted(files_below(folder)) if _is_text(file.relative_to(folder)) and file.is_file()]
        if not files:
            raise InputError(f"{folder}: no text in this folder; expected files of {', '.join(TEXT_SUFFIXES)}")
        return [file for file in files if file.stat().st_size]
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror}); expected a folder of text") from error


def _is_text(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return path.suffix.lower() in TEXT_SUFFIXES and not hidden


def _documents(path: Path, title: str, column: str) -> Iterator[Document]:
    suffix = path.suffix.lower()
    if suffix in TABLE_SUFFIXES:
        for row in read_rows(path, Columns((column,), ("title",), "name the column with the text by data.column")):
            yield document_of_row(row, column)
    elif suffix in PLAIN_SUFFIXES:
        yield Document(title, blocks(path))
    elif suffix in HTML_SUFFIXES:
        yield Document(title, _without_markup(path))
    else:
        raise InputError(f"{path}: {kind(path)} cannot be read as text; expected one of {', '.join(TEXT_SUFFIXES)}")


def _without_markup(path: Path) -> Iterator[str]:
    html = "".join(blocks(path))
    try:
        text = inscriptis.get_text(html).strip()
    except Exception as error:
        # The parser accepts broken markup; what it does not accept raises many kinds of exceptions.
        raise InputError(f"{path}: malformed HTML ({one_line(error)}); save it as plain text") from error
    if not text:
        raise InputError(f"{path}: no text is left without the markup; expected text")
    yield text
