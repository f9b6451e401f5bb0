"""Parquet files that are whole or not there, whenever the process dies."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["write_table"]


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table, making its folder where there is none.

    Args:
        path: The file; one that is there is replaced in one step.
        table: What it will hold.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        pq.write_table(table, partial, compression="zstd")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
