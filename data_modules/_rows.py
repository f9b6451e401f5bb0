"""Rows of tables, read lazily: of all files, only YAML is in memory as a whole."""

import csv
import json
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from data_modules._files import BLOCK_BYTES, as_text, kind, lines, opened
from data_modules._wording import listed, one_line, quoted, shown
from data_modules._yaml import yaml_entries
from pml.errors import InputError

__all__ = ["Columns", "Row", "checked_text", "matching_columns", "read_rows", "text_in"]

SURROGATE = re.compile("[\ud800-\udfff]")

SPACE_BEFORE_QUOTES = re.compile(r'\s+".*"\s*', re.DOTALL)
"""A field of CSV whose quotes, after a space, are read as part of the text."""

PARQUET_ROWS = 16
"""Rows decoded at a time; a row may be a whole book."""


class Row(NamedTuple):
    """One row of a table.

    Attributes:
        where: Its place, such as "file.csv:12", for error messages.
        values: Values by column.
    """

    where: str
    values: dict[str, Any]


class Columns(NamedTuple):
    """Columns from which a row can be read.

    Attributes:
        required: Columns that the row must have.
        optional: Columns that are read if the row has them.
        advice: What to do if a required column is missing, for error messages.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    advice: str = ""


def read_rows(path: str | Path, *alternatives: Columns) -> Iterator[Row]:
    """Yield the rows of a .jsonl, .csv, .parquet or .yaml file, in order.

    JSON Lines has one object per line (blank lines are skipped), CSV a header and commas, YAML a list of mappings. All
    but Parquet are in UTF-8. YAML files are small and are read as a whole; of Parquet only the named columns are read.

    Args:
        path: The file; its suffix says what it is.
        alternatives: Each row must have the required columns of at least one of these, and may have others; see
            `matching_columns`. Without alternatives, rows may have any columns.

    Raises:
        InputError: With file and line: if the file is unreadable, not a regular file, not UTF-8, malformed or without
            rows, if a key or column occurs twice, or if a column is missing.
    """
    path = Path(path)
    reader = ROW_READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: {kind(path)} cannot be read as rows; expected one of {', '.join(ROW_READERS)}")
    empty = True
    for row in reader(path, alternatives):
        matching_columns(row.where, row.values, alternatives)
        yield row
        empty = False
    if empty:
        raise InputError(f"{path}: the file is empty; expected rows with {_required(alternatives)}")


def matching_columns(where: str, names: Collection[str], alternatives: Sequence[Columns]) -> Sequence[Columns]:
    """The alternatives whose required columns are all present; only the first, if it is among them.

    Raises:
        InputError: If none fits.
    """
    if not alternatives or all(name in names for name in alternatives[0].required):
        return alternatives[:1]
    found = [columns for columns in alternatives[1:] if all(name in names for name in columns.required)]
    if not found:
        missing = next(name for name in alternatives[0].required if name not in names)
        raise InputError(
            f"{where}: {_missing(missing, names)}{alternatives[0].advice and '; '}{alternatives[0].advice}"
        )
    return found


def text_in(row: Row, column: str, name: str = "") -> str:
    """The text in one column of a row.

    Args:
        row: The row.
        column: Name of the column.
        name: What the text is, for messages; if empty, the column's name.

    Raises:
        InputError: With file and line: if there is no such column, or as in `checked_text`.
    """
    if column not in row.values:
        raise InputError(f"{row.where}: {_missing(column, row.values)}")
    return checked_text(row.values[column], row.where, repr(column), name or column)


def checked_text(value: object, where: str, what: str, name: str) -> str:
    """Return a value if it is text.

    Args:
        value: Any value.
        where: File and line, for messages.
        what: What has the value, such as a column in quotes, for messages.
        name: What the text is, for messages.

    Raises:
        InputError: With file and line: if it is not a string, is empty, or holds half of a surrogate pair.
    """
    if not isinstance(value, str):
        raise InputError(f"{where}: {what} is {shown(value)}; expected a string, in quotes")
    if not value:
        raise InputError(f"{where}: the {name} is empty; expected text")
    if SURROGATE.search(value):
        raise InputError(f"{where}: {what} holds half a surrogate pair, which is not a character; write the whole pair")
    return value


def _required(alternatives: Sequence[Columns]) -> str:
    return " and ".join(map(repr, alternatives[0].required)) if alternatives else "columns"


def _missing(column: str, names: Iterable[str]) -> str:
    return f"no column {column!r}; found {listed(names)}"


def _repeated(names: Iterable[str]) -> str | None:
    """The first name that repeats an earlier one; None if there is none."""
    known: set[str] = set()
    return next((name for name in names if name in known or known.add(name)), None)  # type: ignore[func-returns-value]


# JSON Lines


def _jsonl_rows(path: Path, alternatives: Sequence[Columns]) -> Iterator[Row]:
    file_name = as_text(path.name)
    for number, line in enumerate(lines(path), start=1):
        if not line.strip():
            continue
        where = f"{file_name}:{number}"
        if line.lstrip().startswith("["):
            raise InputError(
                f"{where}: a JSON list; expected an object, one a line, without brackets and commas around them "
                "(jq -c '.[]' writes that)"
            )
        try:
            values = json.loads(line, object_pairs_hook=_object, parse_int=_integer)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{where}: malformed JSON at column {error.pos + 1} ({error.msg}); expected one whole object a line"
            ) from error
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        except RecursionError as error:
            raise InputError(f"{where}: nested too deeply to be read; expected text in columns") from error
        if not isinstance(values, dict):
            raise InputError(f"{where}: a JSON {type(values).__name__}; expected an object, one a line")
        yield Row(where, values)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        key = _repeated(key for key, _ in pairs)
        raise InputError(f"the key {quoted(str(key))} occurs twice in one object; keep one of them")
    return values


def _integer(digits: str) -> int:
    try:
        return int(digits)
    except ValueError as error:
        # Python limits the number of digits.
        raise InputError(
            f"a number of {len(digits.lstrip('-'))} digits, which cannot be read; write it in quotes"
        ) from error


# CSV


def _csv_rows(path: Path, alternatives: Sequence[Columns]) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # for the whole process; the default is shorter than a long target
    taken: list[str] = []  # the lines of a row
    reader = csv.reader(_noted(lines(path), taken), strict=True)
    header: list[str] | None = None
    file_name, empty = as_text(path.name), True
    while True:
        where = f"{file_name}:{reader.line_num + 1}"  # a row starts here and may span many lines
        try:
            fields = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            raise InputError(f"{where}: {_csv_fault(error)}") from error
        if header is None:
            header = fields
            if len(header) == 1 and (separator := next((mark for mark in ";\t" if mark in header[0]), None)):
                raise InputError(f"{where}: the columns are separated by {separator!r}; save the file with commas")
            if (name := _repeated(filter(None, header))) is not None:
                raise InputError(f"{where}: two columns have the name {quoted(name)}; give each a name of its own")
            matching_columns(where, header, alternatives)
        elif fields:
            if len(fields) != len(header):
                raise InputError(
                    f"{where}: {len(fields)} field{'s' * (len(fields) != 1)}, and the header has {len(header)}; put "
                    "text with commas or line breaks into quotes"
                )
            for name, field in zip(header, fields, strict=True):
                # Text that really begins in this way stands in quotes itself.
                if SPACE_BEFORE_QUOTES.fullmatch(field) and _in_quotes(field) not in "".join(taken):
                    raise InputError(
                        f"{where}: {name!r} is {quoted(field)}, with quotes that follow a space and so are part of the "
                        f"text; write {quoted(field.strip())} directly after the comma, or {quoted(_in_quotes(field))} "
                        "if the text has them"
                    )
            yield Row(where, dict(zip(header, fields, strict=True)))
            empty = False
        taken.clear()
    if header is not None and empty:
        raise InputError(f"{path}: a header and no rows; expected rows with {_required(alternatives)}")


def _noted(lines_of_file: Iterator[str], taken: list[str]) -> Iterator[str]:
    """The same lines; each is also added to a list."""
    for line in lines_of_file:
        taken.append(line)
        yield line


def _in_quotes(text: str) -> str:
    """The text as a field of CSV in quotes."""
    return '"' + text.replace('"', '""') + '"'


def _csv_fault(error: csv.Error) -> str:
    if "new-line character" in str(error):
        return "a carriage return outside of quotes; save the file with line feeds at the ends of its lines"
    return f"malformed CSV ({error}); expected commas, and quotes around text"


# Parquet


def _parquet_rows(path: Path, alternatives: Sequence[Columns]) -> Iterator[Row]:
    file_name, number = as_text(path.name), 0
    with (
        opened(path) as file,
        _said_of_parquet(path),
        # Without a buffer size, a row group would be read as a whole and ahead of its rows.
        pq.ParquetFile(file, pre_buffer=False, buffer_size=BLOCK_BYTES) as table,
    ):
        names = table.schema_arrow.names
        if (name := _repeated(names)) is not None:
            raise InputError(f"{file_name}: two columns have the name {quoted(name)}; give each a name of its own")
        found = matching_columns(file_name, names, alternatives)
        looked_at = {name for columns in found for name in (*columns.required, *columns.optional)}
        wanted = [name for name in names if not alternatives or name in looked_at]
        for batch in table.iter_batches(batch_size=PARQUET_ROWS, columns=wanted):
            columns = [_python_values(batch.column(name), file_name, number + 1, name) for name in wanted]
            for values in zip(*columns, strict=True):
                number += 1
                yield Row(f"{file_name} row {number}", dict(zip(wanted, values, strict=True)))


@contextmanager
def _said_of_parquet(path: Path) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno:
            raise
        # A damaged file makes pyarrow fail in many ways: no list of exceptions is complete.
        raise InputError(f"{path}: malformed Parquet ({one_line(error)}); write the file again") from error


def _python_values(values: Any, file_name: str, first_row: int, column: str) -> list[Any]:
    try:
        return values.to_pylist()
    except Exception:
        # The error does not name the row, so convert the values one by one.
        return [
            _python_value(value, f"{file_name} row {number}", column)
            for number, value in enumerate(values, start=first_row)
        ]


def _python_value(scalar: Any, where: str, column: str) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: {column!r} is text that is not UTF-8; write the file again") from error
    except Exception as error:
        # Dates outside Python's range, structs with repeated names, unknown time zones, ...
        raise InputError(
            f"{where}: {column!r} is a {quoted(str(scalar.type))} that cannot be read ({one_line(error)}); "
            "write it as a string"
        ) from error


# YAML


def _yaml_rows(path: Path, alternatives: Sequence[Columns]) -> Iterator[Row]:
    for where, values in yaml_entries("".join(lines(path)), as_text(path.name)):
        if not isinstance(values, dict):
            raise InputError(f"{where}: {shown(values)}; expected a mapping with {_required(alternatives)}")
        yield Row(where, values)


ROW_READERS: dict[str, Callable[[Path, Sequence[Columns]], Iterator[Row]]] = {
    ".jsonl": _jsonl_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
    ".yaml": _yaml_rows,
    ".yml": _yaml_rows,
}
