"""The one exception that means "what you gave me cannot work"."""

__all__ = ["InputError"]


class InputError(ValueError):
    """Something that a user supplied is wrong.

    The message is one line that says what arrived, what was expected and what to do. The command line prints it on
    stderr and exits with code 2; everything else is a bug and keeps its traceback.
    """
