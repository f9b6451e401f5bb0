"""Parquet files of a run: written atomically, and read with one-line errors."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pml.atomic import whole_file
from pml.errors import InputError

__all__ = ["one_line_errors", "write_table"]


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table so that the file is either whole or not there.

    Args:
        path: The file; an existing one is replaced in one step.
        table: Its content.
    """
    with whole_file(path) as file:
        pq.write_table(table, file, compression="zstd")


@contextmanager
def one_line_errors(path: Path, columns: Sequence[str], written: str) -> Iterator[None]:
    """Turn every error from reading columns of a file into a one-line `InputError`.

    Args:
        path: The file.
        columns: Columns that it has to have.
        written: Clause of the message that says what writes the file.

    Raises:
        InputError: If the file is missing, is not Parquet, or has other columns.
    """
    try:
        yield
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        # Arrow's own messages repeat the path over several lines.
        if not path.is_file():
            raise InputError(f"{path}: no such file; {written}, so run it again") from error
        if isinstance(error, OSError) or not _is_parquet(path):
            raise InputError(f"{path}: not a Parquet file that can be read; {written}, so run it again") from error
        raise InputError(
            f"{path}: expected the columns {', '.join(columns)} of a run; run it again, or leave this run out"
        ) from error


def _is_parquet(path: Path) -> bool:
    try:
        pq.read_schema(path)
    except (OSError, pa.ArrowException):
        return False
    return True
