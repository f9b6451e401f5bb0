"""The exception for invalid input, and short reasons from the exceptions of other libraries."""

import re

__all__ = ["InputError", "reason"]

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


KEY = re.compile(r'Parser key "([^"]*)":\s*(?:Problem with given class_path \'[^\']*\':\s*)?(.*)', re.DOTALL)
"""A key in a jsonargparse message, and the rest of the message, which may name a nested key."""


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
    said = re.sub(r"Expected an? <class '(\w+)'>(?:\. Got value: ([^;]*))?", _expected, said)
    return " ".join(f"{'.'.join(keys)}{': ' if keys else ''}{said}".split())


def _expected(found: re.Match[str]) -> str:
    got = f", got {found[2]}" if found[2] else ""
    return f"expected {'an' if found[1][0] in 'aeiou' else 'a'} {found[1]}{got}"
