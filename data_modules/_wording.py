"""Values and names as error messages show them: on one line, with a limited length."""

from collections.abc import Iterable
from itertools import islice

__all__ = ["listed", "one_line", "quoted", "shown"]

LONGEST = 40
"""Most characters of a user's text in a message."""

LONGEST_REASON = 200
"""Most characters of a library's error message."""

LISTED = 10
"""Most names in a list; a table may have thousands of columns."""

DIGITS_SHOWN_BITS = 128
"""Most bits of an integer that is written out; Python refuses to write thousands of digits."""


def quoted(text: str) -> str:
    """The beginning of a text, in quotes."""
    return repr(text if len(text) <= LONGEST else text[:LONGEST] + "…")


def listed(names: Iterable[object]) -> str:
    """The first `LISTED` names, in quotes; "none" if there are none."""
    names = list(names)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return (", ".join(quoted(str(name)) for name in islice(names, LISTED)) or "none") + more


def shown(value: object) -> str:
    """A value as a user would write it, or its kind if that may be long; takes any value."""
    if value is None:
        return "null"  # what most files call it
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, bytes):
        return "binary data"
    if isinstance(value, int) and value.bit_length() > DIGITS_SHOWN_BITS:
        return "a number of many digits"
    return " ".join(str(value).split())[:LONGEST]


def one_line(error: Exception) -> str:
    """Message of a library's error on one line; the name of its class if it has no message."""
    return " ".join(str(error).split())[:LONGEST_REASON] or type(error).__name__
