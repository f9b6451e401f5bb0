"""Opening and decoding files: regular files in UTF-8 only; a decoding error names its line."""

import codecs
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from pml.errors import InputError

__all__ = ["BLOCK_BYTES", "as_text", "blocks", "kind", "lines", "opened"]

BLOCK_BYTES = 1 << 16

UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
"""Byte-order marks of UTF-16; the first also starts little-endian UTF-32."""


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file to read bytes from.

    Raises:
        InputError: If it does not exist, may not be read or is not a regular file (a pipe could block forever), or the
            system fails while it is read.
    """
    try:
        if not stat.S_ISREG(mode := path.stat().st_mode):
            what = "a folder" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "a device or socket"
            raise InputError(f"{path}: cannot be read (it is {what}); expected a file")
        file = path.open("rb")
    except OSError as error:
        broken = f"a link to {path.readlink()}, which is not there" if os.path.islink(path) else error.strerror
        raise InputError(f"{path}: cannot be read ({broken}); expected a file") from error
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{str(path)!r}: cannot be read ({error}); expected a file") from error
    try:
        with file:
            yield file
    except OSError as error:
        raise InputError(f"{path}: cannot be read to its end ({error.strerror or error})") from error


def lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text table, line feeds included; nothing but a line feed ends a line.

    Raises:
        InputError: If the file is not UTF-8, or as in `opened`.
    """
    # Lines are decoded one by one, so that an error names the line of the byte that is not UTF-8.
    with opened(path) as file:
        for number, line in enumerate(file, start=1):
            # Without a byte-order mark, UTF-16 has a NUL byte beside its first letter; no table starts with one.
            if number == 1 and (line.startswith(UTF16_MARKS) or b"\0" in line[:2]):
                raise InputError(_utf16(path))
            try:
                # Some editors put a byte-order mark at the start of a file.
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                byte = f"byte {error.start + 1} is 0x{error.object[error.start]:02x}"
                raise InputError(f"{as_text(path.name)}:{number}: {_not_utf8(byte)}") from error


def blocks(path: Path) -> Iterator[str]:
    """Yield a text file in consecutive blocks, line ends included.

    Raises:
        InputError: If the file is not UTF-8 or empty, or as in `opened`.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line, empty, start = 1, True, True
    with opened(path) as file:
        for block in chain(iter(lambda: file.read(BLOCK_BYTES), b""), (b"",)):
            if start and block.startswith(UTF16_MARKS):
                raise InputError(_utf16(path))
            start = False
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                line += error.object.count(b"\n", 0, error.start)
                byte = f"0x{error.object[error.start]:02x}"
                raise InputError(f"{as_text(path.name)}:{line}: {_not_utf8(byte)}") from error
            line += text.count("\n")
            empty = empty and not text
            yield text
    if empty:
        raise InputError(f"{path}: the file is empty; expected text")


def as_text(name: str) -> str:
    """The name of a file as valid text: bytes that are not UTF-8 are replaced."""
    return os.fsencode(name).decode(errors="replace")


def kind(path: Path) -> str:
    """Kind of file by the suffix of its path, for messages."""
    return f"a {path.suffix} file" if path.suffix else "a file without a suffix"


def _utf16(path: Path) -> str:
    return f"{as_text(path.name)}:1: {_not_utf8('it looks like UTF-16')}"


def _not_utf8(reason: str) -> str:
    return f"not UTF-8 ({reason}); save the file with UTF-8 encoding"
