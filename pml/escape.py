"""Text that a terminal shows and does not obey, and the only way by which commands say anything."""

import json
import re
import sys
from typing import Any, TextIO

__all__ = ["one_line", "say", "say_json", "shortened", "visible"]

OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that move, colour or turn round what a terminal shows, and bytes of a name that are no text.

New lines and tabs are not among them.
"""


def one_line(text: str) -> str:
    """Text as one line; control characters, which a terminal would obey, are spelled out."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def shortened(line: str, most: int) -> str:
    """A line, or as much of it as leaves room for dots within so many characters."""
    return line if len(line) <= most else f"{line[: most - 3]}..."


def visible(text: str) -> str:
    r"""Text of any number of lines, with control characters spelled out.

    Example:
        >>> print(visible("a" + chr(27) + "[2Jb"))
        a\x1b[2Jb
    """
    return OBEYED.sub(lambda found: repr(found[0])[1:-1], text)


def say(text: object, *, to: TextIO | None = None, end: str = "\n") -> None:
    """Print, with control characters spelled out: whatever is said may have text of data in it.

    Args:
        text: What to say.
        to: Where; stdout unless given.
        end: What follows.
    """
    print(visible(str(text)), file=to or sys.stdout, end=end, flush=True)


def say_json(content: Any) -> None:
    """Print JSON, in which every control character is an escape of JSON's own."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    print(OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", text), flush=True)
