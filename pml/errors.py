"""The one exception that means "what you gave me cannot work", and what is wrong where other exceptions say so."""

import re

__all__ = ["InputError", "reason"]

ATTEMPTS = re.compile(
    r"(Does not validate against any of the Union subtypes|Subtypes: .*|Errors:|Given value( type)?: .*"
    r"|Expected a <class 'NoneType'>.*)?$"
)
"""Lines in which jsonargparse tells what it tried, not what is wrong."""


class InputError(ValueError):
    """Something that a user supplied is wrong.

    The message is one line that says what arrived, what was expected and what to do. The command line prints it on
    stderr and exits with code 2; everything else is a bug and keeps its traceback.
    """


KEY = re.compile(r'Parser key "([^"]*)":\s*(?:Problem with given class_path \'[^\']*\':\s*)?(.*)', re.DOTALL)
"""A key that jsonargparse names, maybe within another's message, and what it says of it."""


def reason(error: BaseException) -> str:
    """What is wrong, on one line: the InputError behind an exception, else its message without what was tried."""
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
    said = re.sub(r"Expected an? <class '(\w+)'>(?:\. Got value: ([^;]*))?", _expected, said)
    return " ".join(f"{'.'.join(keys)}{': ' if keys else ''}{said}".split())


def _expected(found: re.Match[str]) -> str:
    got = f", got {found[2]}" if found[2] else ""
    return f"expected {'an' if found[1][0] in 'aeiou' else 'a'} {found[1]}{got}"
