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


def reason(error: BaseException) -> str:
    """What is wrong, on one line: the InputError behind an exception, else its message without what was tried."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, InputError):
            return " ".join(str(cause).split())
        cause = cause.__cause__ or cause.__context__
    found = re.match(r'(Parser key "[^"]*":)?(.*)', str(error), re.DOTALL)
    where, message = (found[1] or "", found[2]) if found else ("", str(error))
    lines = [line.strip().lstrip("- ") for line in message.splitlines()]
    said = "; ".join(dict.fromkeys(line for line in lines if not ATTEMPTS.match(line)))
    return " ".join(f"{where} {said or message}".replace(":;", ":").split())
