"""Parquet files of a run: written whole, and read back with one line for what is wrong."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pml.atomic import whole_file
from pml.errors import InputError

__all__ = ["reading", "write_table"]


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table so that the file is either whole or not there.

    Args:
        path: The file; one that is there is replaced in one step.
        table: What it will hold.
    """
    with whole_file(path) as file:
        pq.write_table(table, file, compression="zstd")


@contextmanager
def reading(path: Path, columns: Sequence[str], written: str) -> Iterator[None]:
    """Turn whatever reading some columns of a file raises into one line.

    Args:
        path: The file.
        columns: What it has to have.
        written: What writes it, for the message.

    Raises:
        InputError: If it is not there, is not Parquet, or its columns are others.
    """
    try:
        yield
    except OSError as error:
        # Arrow's own message repeats the path over several lines.
        reason = "no such file" if not path.is_file() else "not a Parquet file that can be read"
        raise InputError(f"{path}: {reason}; {written}: run it again") from error
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise InputError(
            f"{path}: expected the columns {', '.join(columns)} of a run; run it again, or leave this run out"
        ) from error
