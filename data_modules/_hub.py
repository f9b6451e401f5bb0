"""Documents of a dataset on the Hugging Face hub or in a folder, through the `datasets` library."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_modules._documents import Document, document_of_row
from data_modules._rows import Row
from data_modules._wording import one_line
from pml.errors import InputError

__all__ = ["dataset_documents"]

READ = ("arrow", "csv", "json", "parquet", "text", "xml")
"""Kinds of dataset that are read: tables and text. None of them runs code that comes with the data."""


def dataset_documents(name: str, config: str | None, split: str, column: str) -> Iterator[Document]:
    """Yield each row of a dataset as a document, downloaded as they are read; rows without text are skipped.

    Args:
        name: Name on the hub, a folder with data files, or a folder written by `save_to_disk`.
        config: Name of a configuration, if the dataset has several.
        split: Name of a split.
        column: Column that holds the text.

    Raises:
        InputError: If `datasets` is not installed; if there is no such dataset, configuration, split or column; if two
            columns have that name; if no row has text in it; or if the dataset is neither tables nor text.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise InputError(f"dataset {name!r} needs the package datasets; pip install 'pml[hub]'") from error
    try:
        rows, empty = _rows(datasets, name, config, split), True
        for number, values in enumerate(rows, start=1):
            # `datasets` reads CSV with pandas, which gives this name to the second of two equally named columns.
            if rows.builder_name == "csv" and (second := f"{column}.1") in values:
                raise InputError(
                    f"{name} row {number}: two columns have the name {column!r}, or one has {second!r}; rename one"
                )
            # Of data made from lines of text, such as WikiText, many rows are empty.
            if column in values and values[column] in ("", None):
                continue
            yield document_of_row(Row(f"{name} row {number}", values), column)
            empty = False
        if empty:
            raise InputError(f"dataset {name!r}: no row of {split!r} has text in the column {column!r}; name another")
    except InputError:
        raise
    except Exception as error:
        # Each format is read by a library with exceptions of its own, so no list of them is complete.
        raise InputError(f"dataset {name!r} cannot be read: {one_line(error)}") from error


def _rows(datasets: Any, name: str, config: str | None, split: str) -> Any:
    if any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json")):
        saved = datasets.load_from_disk(name)
        return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
    builder = datasets.load_dataset_builder(name, config)
    if builder.name not in READ:
        raise InputError(f"dataset {name!r} is of the kind {builder.name!r}; expected one of {', '.join(READ)}")
    return builder.as_streaming_dataset(split=split)
