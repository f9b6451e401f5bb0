"""Atomic writes: a file is either whole or absent, whenever the process dies."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

__all__ = ["whole_file"]


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a temporary file beside `path`; once it is whole on disk, move it to `path` in one step.

    Missing parent folders are made. An existing file is replaced, or kept if writing fails.

    Args:
        path: The final path of the file.

    Raises:
        OSError: If the file cannot be written; it names `path`, not the temporary file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        if error.filename not in (None, str(partial)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        # On a read-only disk this fails too, and would hide the error above.
        with suppress(OSError):
            partial.unlink()
