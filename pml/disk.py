"""Errors of a full, read-only or failing disk: how to tell them from others and report them in one line."""

import errno
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pml.errors import InputError

__all__ = ["DiskError", "disk_failure", "quiet_threads"]

FAILING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE}

WITHOUT_ERRNO = re.compile(r"I/O error: (.*) \(os error (\d+)\)")
"""Message of safetensors about a file that it could not write."""


class DiskError(InputError):
    """Writing to disk failed; files that were whole before still are."""


def disk_failure(error: BaseException | None) -> str | None:
    """Disk failure behind an error, such as `run/record.json: No space left on device`; None for any other error."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FAILING:
            return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
        found = WITHOUT_ERRNO.search(str(error))
        if found and int(found[2]) in FAILING:
            return found[1]
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def quiet_threads() -> Iterator[None]:
    """Silence threads that end with a disk failure: a logger raises the error of its thread at its next write."""
    before = threading.excepthook

    def hook(failed: threading.ExceptHookArgs) -> None:
        if disk_failure(failed.exc_value) is None:
            before(failed)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before
