"""Text with control characters spelled out, so that a terminal does not obey them; commands print through it."""

import json
import re
import sys
import unicodedata
from typing import Any, TextIO

__all__ = ["one_line", "say", "say_json", "shortened", "visible"]

CONTROL_CHARACTERS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Characters that move, colour or reverse text in a terminal, and surrogates of file names that are not text.

Newlines and tabs are not among them.
"""


def one_line(text: str) -> str:
    """Text as one line, with line breaks, control characters and all else that shows nothing spelled out."""
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else repr(c)[1:-1] for c in text)


def shortened(line: str, most: int) -> str:
    """A line cut to at most `most` characters, with three dots at the end if it was longer."""
    return line if len(line) <= most else f"{line[: most - 3]}..."


def visible(text: str) -> str:
    r"""Text with control characters spelled out; newlines and tabs stay.

    Example:
        >>> print(visible("a" + chr(27) + "[2Jb"))
        a\x1b[2Jb
    """
    return CONTROL_CHARACTERS.sub(lambda found: repr(found[0])[1:-1], text)


def say(text: object, *, to: TextIO | None = None, end: str = "\n") -> None:
    """Print with control characters spelled out, since any message may contain text from data.

    Args:
        text: What to print.
        to: Stream; None is stdout.
        end: Text printed after it.
    """
    print(visible(str(text)), file=to or sys.stdout, end=end, flush=True)


def say_json(content: Any) -> None:
    """Print JSON with every control character as a JSON escape."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    print(CONTROL_CHARACTERS.sub(lambda found: f"\\u{ord(found[0]):04x}", text), flush=True)
