"""The exception for invalid input, and short reasons from the exceptions of other libraries."""

import re
from collections.abc import Callable

__all__ = ["InputError", "first_line", "named_line", "not_finite", "reason"]

ATTEMPTS = re.compile(
    r"(Does not validate against any of the Union subtypes|Subtypes: .*|Errors:|Given value( type)?: .*"
    r"|Expected a <class 'NoneType'>.*)?$"
)
"""Lines in which jsonargparse lists what it tried, not what is wrong."""


class InputError(ValueError):
    """Something that the user supplied is invalid.

    The message is one line that says what arrived, what was expected and what to do. The command line prints it on
    stderr and exits with code 2. Other exceptions are bugs and keep their traceback.
    """


def not_finite(backbone: str, what: str, dtype: object) -> InputError:
    """The error for a backbone that overflows, or whose weights are damaged."""
    name = str(dtype).removeprefix("torch.")
    other = (
        "bfloat16 or float32" if name == "float16" else "float32" if name != "float32" else "a backbone that is whole"
    )
    return InputError(f"backbone {backbone!r} gives {what} that are not finite in {name}; take {other}")


KEY = re.compile(r'Parser key "([^"]*)":\s*(?:Problem with given class_path \'[^\']*\':\s*)?(.*)', re.DOTALL)
"""A key in a jsonargparse message, and the rest of the message, which may name a nested key."""


def first_line(error: BaseException) -> str:
    """First line of an exception's message, or the name of its class if there is no message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def named_line(error: BaseException) -> str:
    """Class of an exception and, if it has a message, the first line of that."""
    name, line = type(error).__name__, first_line(error)
    return name if line == name else f"{name}: {line}"


def reason(error: BaseException) -> str:
    """What is wrong, in one line: the InputError behind an exception, or else its message, shortened."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, InputError):
            return " ".join(str(cause).split())
        cause = cause.__cause__ or cause.__context__
    lines = [line.strip().lstrip("- ") for line in str(error).splitlines()]
    said = "; ".join(dict.fromkeys(line for line in lines if not ATTEMPTS.match(line))) or str(error)
    said, keys = said.replace(":;", ":"), []
    while found := KEY.match(said):
        keys.append(found[1])
        said = found[2]
    for pattern, plainly in IN_PLAIN_WORDS.items():
        said = re.sub(pattern, plainly, said)
    return " ".join(f"{'.'.join(keys)}{': ' if keys else ''}{said}".split())


def _expected_type(found: re.Match[str]) -> str:
    return f"expected {'an' if found[1][0] in 'aeiou' else 'a'} {found[1]}"


def _expected_choice(found: re.Match[str]) -> str:
    return f"expected one of {found[1].replace(chr(39), '')}"


NOT_A_FILE = r"Expected a path but (\S+) either not accessible or invalid; "
IN_PLAIN_WORDS: dict[str, str | Callable[[re.Match[str]], str]] = {
    r"Expected an? <class '(?:\w+\.)*(\w+)'>": _expected_type,
    r"Expected a (?=tuple|list|dict)": "expected a ",
    r"Expected a typing\.Literal\[([^\]]*)\]": _expected_choice,
    NOT_A_FILE + r"(expected a list; )?Expected a dot import path string: \1": (
        r"no class \1 fits here; expected a class of pml or of Lightning by its name, or your own as module.Class"
    ),
    NOT_A_FILE + r"(?=Problem|Import)": "",
    r"\. Got value: ": ", got ",
}
"""Patterns of jsonargparse's messages, with what they say in plain words."""
