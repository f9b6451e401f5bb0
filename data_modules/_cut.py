"""Cutting a text into pieces of a given number of tokens, reading only as far as needed."""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

from data_modules._documents import Document
from pml.encoding import Prompt, TextEncoder
from pml.errors import InputError

__all__ = ["CutText", "CutTokens", "Cutter", "Piece"]

BLOCK_CHARACTERS = 1 << 16

SEPARATOR = "\n\n"
"""Stands between documents."""

CHARACTERS_PER_TOKEN = 8
"""Characters encoded at first for each token; more are read if these are too few."""

MARGIN_TOKENS = 16
"""Tokens encoded beyond a cut, because the last tokens of a text depend on what follows."""

LOOK_BACK_TOKENS = 64
"""How far back to look for a cut whose text encodes to the same tokens again."""

EMPTY_PROMPT = Prompt((), "")
"""Empty prompt, for text that stands alone."""


class Piece(NamedTuple):
    """Consecutive tokens of a text.

    Attributes:
        title: Title of the document in which it begins.
        start: Position of its first token, in tokens of the text.
        ids: Its token ids.
    """

    title: str
    start: int
    ids: tuple[int, ...]


class Cutter(Protocol):
    """Takes consecutive pieces from a text."""

    def take(self, tokens: int | None) -> Piece:
        """The next piece.

        Args:
            tokens: Most tokens that it may have; None takes all that are left.

        Raises:
            InputError: If fewer tokens are left, or none.
        """


class CutText:
    """Cuts a text into pieces that encode to the same tokens again.

    A piece ends at the last token boundary within its length where that holds: not inside a character of several
    tokens, and not where the tokenizer merges across the cut. So it may be a token or two short, and a longer piece
    starts with a shorter one. The next piece starts at the next character.

    Args:
        documents: The text; a blank line goes between documents.
        encoder: Turns text into token ids.
        name: Name of the text, for messages.

    Raises:
        InputError: From `take`, if there is too little text or the tokenizer cannot represent it.
    """

    def __init__(self, documents: Iterable[Document], encoder: TextEncoder, name: str) -> None:
        self._encoder = encoder
        self._name = name
        self._titles: deque[tuple[int, str]] = deque()  # where documents begin, in characters
        self._blocks = self._all_blocks(documents)
        self._buffer = ""
        self._read = 0  # characters read so far; the buffer holds the last of them
        self._tokens = 0  # tokens taken so far

    def take(self, tokens: int | None) -> Piece:
        text, ids = self._rest() if tokens is None else self._cut(self._encoded(tokens))
        piece = Piece(self._title(), self._tokens, tuple(ids))
        self._buffer = self._buffer[len(text) :]
        self._tokens += len(ids)
        return piece

    def _rest(self) -> tuple[str, list[int]]:
        self._fill(None)
        if not self._buffer:
            raise InputError(_too_short(self._name, self._tokens, 0, None))
        return self._buffer, list(self._encoder.target(EMPTY_PROMPT, self._buffer, self._name))

    def _encoded(self, tokens: int) -> list[int]:
        """The next token ids, encoded together with the text that follows."""
        size = (tokens + MARGIN_TOKENS) * CHARACTERS_PER_TOKEN
        while True:
            more = self._fill(size)
            ids = self._encoder.document(self._buffer[:size])
            if len(ids) >= tokens + MARGIN_TOKENS or not more:
                break
            size *= 2
        if len(ids) < tokens:
            raise InputError(_too_short(self._name, self._tokens, len(ids), tokens))
        return ids[:tokens]

    def _cut(self, ids: list[int]) -> tuple[str, list[int]]:
        _check_represented(self._encoder, ids, self._buffer, self._name)
        for end in range(len(ids), max(0, len(ids) - LOOK_BACK_TOKENS), -1):
            text = self._encoder.decode(ids[:end])
            if self._buffer.startswith(text) and self._encoder.document(text) == ids[:end]:
                return text, ids[:end]
        raise InputError(
            f"{self._name}: from token {self._tokens} on, no cut within {len(ids)} tokens gives text that is encoded "
            "the same way again; change length or skip_tokens"
        )

    def _fill(self, size: int | None) -> bool:
        """Read until the buffer has `size` characters, or all text if None; false if the text ends before that."""
        read, characters = [self._buffer], len(self._buffer)
        while size is None or characters < size:
            if (block := next(self._blocks, None)) is None:
                break
            read.append(block)
            characters += len(block)
        self._buffer = "".join(read)
        return size is not None and characters >= size

    def _all_blocks(self, documents: Iterable[Document]) -> Iterator[str]:
        for document in documents:
            if self._titles:
                self._read += len(SEPARATOR)
                yield SEPARATOR
            self._titles.append((self._read, document.title))
            for block in document.blocks:
                # Short blocks, because `take` copies the rest of the buffer after each piece.
                for start in range(0, len(block), BLOCK_CHARACTERS):
                    short = block[start : start + BLOCK_CHARACTERS]
                    self._read += len(short)
                    yield short

    def _title(self) -> str:
        position = self._read - len(self._buffer)
        while len(self._titles) > 1 and self._titles[1][0] <= position:
            self._titles.popleft()
        return self._titles[0][1]


class CutTokens:
    """Cuts a text into pieces of exactly the given number of tokens, wherever that falls, as in the published files.

    Args:
        text: The whole text.
        encoder: Turns text into token ids.
        title: Title of the text.

    Raises:
        InputError: From `take`, if there is too little text or the tokenizer cannot represent it.
    """

    def __init__(self, text: str, encoder: TextEncoder, title: str) -> None:
        self._text = text
        self._encoder = encoder
        self._title = title
        self._ids = encoder.document(text)
        self._tokens = 0

    def __len__(self) -> int:
        """Number of tokens in the whole text."""
        return len(self._ids)

    def take(self, tokens: int | None) -> Piece:
        end = len(self._ids) if tokens is None else self._tokens + tokens
        ids = self._ids[self._tokens : end]
        if len(ids) < (tokens or 1):
            raise InputError(_too_short(self._title, self._tokens, len(ids), tokens))
        _check_represented(self._encoder, self._ids[:end], self._text, self._title)
        piece = Piece(self._title, self._tokens, tuple(ids))
        self._tokens = end
        return piece


def _check_represented(encoder: TextEncoder, ids: list[int], text: str, name: str) -> None:
    # A cut inside a character leaves bytes at the end that decode to replacement characters.
    if not text.startswith(encoder.decode(ids).rstrip("\N{REPLACEMENT CHARACTER}")) or encoder.control_in(ids):
        encoder.target(EMPTY_PROMPT, text, name)  # raises if a character is lost, and names it
        raise InputError(f"{name}: the tokenizer cannot represent this text in pieces; use a byte-level tokenizer")


def _too_short(name: str, taken: int, left: int, asked: int | None) -> str:
    return (
        f"{name}: the text has {taken + left} tokens, of which {left} are left after {taken}; expected at least "
        f"{asked or 1} more: lower length, count or skip_tokens, or give more text"
    )
