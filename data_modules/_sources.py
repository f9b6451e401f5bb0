"""Rows and text from files, read as they are asked for: a large file is never in memory as a whole."""

import codecs
import csv
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import inscriptis
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from pml.errors import InputError

__all__ = ["Document", "Row", "document_of_row", "first_row", "read_documents", "read_rows", "text_in"]

BLOCK_BYTES = 1 << 16
PARQUET_ROWS = 16
"""Rows decoded at a time; a row may be a whole book."""


class Row(NamedTuple):
    """One row of a table.

    Attributes:
        where: Where it stands, "file.csv:12", for error messages.
        values: What it holds by column.
    """

    where: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Document:
    """A text with a name of its own.

    Attributes:
        title: What to ask for it by.
        blocks: Its text in consecutive blocks, to be read once.
    """

    title: str
    blocks: Iterable[str]


def read_rows(path: str | Path, columns: Sequence[str]) -> Iterator[Row]:
    """Rows of a .jsonl, .csv, .parquet or .yaml file, in the file's order.

    JSON Lines has one object a line (blank lines are skipped), CSV a header and commas, YAML a list of mappings. All
    but Parquet is UTF-8. YAML files are small and are read as a whole.

    Args:
        path: The file; its suffix says what it is.
        columns: Columns that the rows have to have; others may be there too.

    Raises:
        InputError: With file and line: not UTF-8, malformed, a column missing, no row at all, file cannot be read.
    """
    path = Path(path)
    reader = ROW_READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: {_kind(path)} cannot be read as rows; expected one of {', '.join(ROW_READERS)}")
    empty = True
    try:
        for row in reader(path, columns):
            missing = [column for column in columns if column not in row.values]
            if missing:
                raise InputError(f"{row.where}: {_missing(missing[0], row.values)}")
            yield row
            empty = False
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected a file") from error
    if empty:
        raise InputError(f"{path}: the file is empty; expected rows with {' and '.join(map(repr, columns))}")


def first_row(path: str | Path) -> Row:
    """The first row of a file; see `read_rows`."""
    return next(read_rows(path, ()))


def read_documents(paths: Iterable[str | Path], column: str = "text") -> Iterator[Document]:
    """Documents of files, and of folders with everything below them, sorted by name.

    A .txt, .md or .rst file is a document as it is, line ends included; an .html file is one without its markup; in
    a .jsonl, .csv or .parquet file each row is one. In folders other files, hidden ones and empty ones are passed over.

    Args:
        paths: Files and folders, in the order of their text.
        column: Where the rows of .jsonl, .csv and .parquet files have their text.

    Raises:
        InputError: Not UTF-8, malformed, no such column, no text, unknown kind of file, file cannot be read.
    """
    for path in map(Path, paths):
        if not path.is_dir():
            yield from _documents(path, path.name, column)
            continue
        files = [file for file in sorted(path.rglob("*")) if _is_text(file.relative_to(path)) and file.is_file()]
        if not files:
            raise InputError(f"{path}: no text in this folder; expected files of {', '.join(TEXT_SUFFIXES)}")
        for file in files:
            if file.stat().st_size:
                yield from _documents(file, file.relative_to(path).as_posix(), column)


def document_of_row(row: Row, column: str) -> Document:
    """A row as a document; its title is in its column "title" where it has one.

    Raises:
        InputError: See `text_in`.
    """
    title = row.values.get("title")
    return Document(title if isinstance(title, str) and title else row.where, [text_in(row, column)])


def text_in(row: Row, column: str, name: str = "") -> str:
    """The text in one column of a row.

    Args:
        row: Where to look.
        column: Which column.
        name: What the text is, for messages; the column's name where that is empty.

    Raises:
        InputError: With file and line: no such column, not a string, empty, half of a surrogate pair in it.
    """
    if column not in row.values:
        raise InputError(f"{row.where}: {_missing(column, row.values)}")
    value = row.values[column]
    if not isinstance(value, str):
        raise InputError(f"{row.where}: {column!r} is {_shown(value)}; expected a string, in quotes")
    if not value:
        raise InputError(f"{row.where}: the {name or column} is empty; expected text")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise InputError(
            f"{row.where}: {column!r} holds half of a surrogate pair, which is no character; write the whole one"
        )
    return value


def _shown(value: object) -> str:
    # null rather than None, as most files have it
    return json.dumps(value, default=str, ensure_ascii=False)[:40]


def _missing(column: str, values: Iterable[str]) -> str:
    return f"no column {column!r}; found {', '.join(map(repr, values)) or 'none'}"


def _kind(path: Path) -> str:
    return f"a {path.suffix} file" if path.suffix else "a file without a suffix"


# Rows


def _lines(path: Path) -> Iterator[str]:
    # Binary lines end at line feeds alone, and a byte that is not UTF-8 is noticed on the line that has it.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                # Some editors put a byte-order mark at the start of a file.
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                byte = f"byte {error.start + 1} is 0x{error.object[error.start]:02x}"
                raise InputError(f"{path.name}:{number}: {_not_utf8(byte)}") from error


def _not_utf8(byte: str) -> str:
    return f"not UTF-8 ({byte}); save the file with UTF-8 encoding"


def _jsonl_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path.name}:{number}"
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{where}: malformed JSON at column {error.colno} ({error.msg}); expected one object"
            ) from error
        if not isinstance(values, dict):
            raise InputError(f"{where}: a JSON {type(values).__name__}; expected an object, one a line")
        yield Row(where, values)


def _csv_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # of the whole process; its default is less than a long target
    reader = csv.reader(_lines(path), strict=True)
    header: list[str] | None = None
    while True:
        where = f"{path.name}:{reader.line_num + 1}"  # a row starts here, and may go on for many lines
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(f"{where}: malformed CSV ({error}); expected commas, and quotes around text") from error
        if header is None:
            header = fields
            if missing := [column for column in columns if column not in header]:
                raise InputError(f"{where}: {_missing(missing[0], header)}")
        elif fields:
            if len(fields) != len(header):
                raise InputError(
                    f"{where}: {len(fields)} field{'s' * (len(fields) != 1)}, and the header has {len(header)}; put "
                    "text with commas or line breaks into quotes"
                )
            yield Row(where, dict(zip(header, fields, strict=True)))


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    try:
        # Without the buffer size a row group is read as a whole, and ahead of the rows.
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=BLOCK_BYTES) as file:
            names = file.schema_arrow.names
            if missing := [column for column in columns if column not in names]:
                raise InputError(f"{path.name}: {_missing(missing[0], names)}")
            wanted = [name for name in names if not columns or name in (*columns, "title")]
            number = 0
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=wanted):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{path.name} row {number}", values)
    except pa.ArrowInvalid as error:
        raise InputError(f"{path}: malformed Parquet ({str(error).splitlines()[0]})") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path.name} row {number + 1} or after: text that is not UTF-8; write the file anew"
        ) from error


def _yaml_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    text = "".join(_lines(path))
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            return
        if not isinstance(root, yaml.SequenceNode):
            raise InputError(f"{path.name}: {_yaml_kind(root)}; expected a list of entries with {', '.join(columns)}")
        for node in root.value:
            where = f"{path.name}:{node.start_mark.line + 1}"
            values = loader.construct_document(node)
            if not isinstance(values, dict):
                raise InputError(f"{where}: {_yaml_kind(node)}; expected a mapping with {', '.join(columns)}")
            yield Row(where, values)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{path.name}{line}: malformed YAML ({error.problem}); expected a list of entries") from error
    except yaml.reader.ReaderError as error:
        line = f":{text.count(chr(10), 0, error.position) + 1}"
        raise InputError(
            f"{path.name}{line}: YAML has no character {error.character:#x}; write it as an escape, in double quotes"
        ) from error


def _yaml_kind(node: yaml.Node) -> str:
    return f"a YAML {node.tag.rpartition(':')[2]}"


ROW_READERS = {
    ".jsonl": _jsonl_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
    ".yaml": _yaml_rows,
    ".yml": _yaml_rows,
}

# Documents

PLAIN_SUFFIXES = (".txt", ".md", ".rst")
HTML_SUFFIXES = (".html", ".htm")
TABLE_SUFFIXES = (".jsonl", ".csv", ".parquet")
TEXT_SUFFIXES = (*PLAIN_SUFFIXES, *HTML_SUFFIXES, *TABLE_SUFFIXES)


def _is_text(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return path.suffix.lower() in TEXT_SUFFIXES and not hidden


def _documents(path: Path, title: str, column: str) -> Iterator[Document]:
    suffix = path.suffix.lower()
    if suffix in TABLE_SUFFIXES:
        for row in read_rows(path, (column,)):
            yield document_of_row(row, column)
    elif suffix in PLAIN_SUFFIXES:
        yield Document(title, _blocks(path))
    elif suffix in HTML_SUFFIXES:
        yield Document(title, _without_markup(path))
    else:
        raise InputError(f"{path}: {_kind(path)} cannot be read as text; expected one of {', '.join(TEXT_SUFFIXES)}")


def _blocks(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line, empty = 1, True
    try:
        with path.open("rb") as file:
            for block in chain(iter(lambda: file.read(BLOCK_BYTES), b""), (b"",)):
                try:
                    text = decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    line += error.object.count(b"\n", 0, error.start)
                    byte = f"0x{error.object[error.start]:02x}"
                    raise InputError(f"{path.name}:{line}: {_not_utf8(byte)}") from error
                line += text.count("\n")
                empty = empty and not text
                yield text
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected a file") from error
    if empty:
        raise InputError(f"{path}: the file is empty; expected text")


def _without_markup(path: Path) -> Iterator[str]:
    if not (text := inscriptis.get_text("".join(_blocks(path))).strip()):
        raise InputError(f"{path}: no text is left without the markup; expected some")
    yield text
