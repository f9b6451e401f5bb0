"""Text that a terminal shows and does not obey."""

__all__ = ["one_line"]


def one_line(text: str) -> str:
    """Text as one line; control characters, which a terminal would obey, are spelled out."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
