"""Files in the published long-context format: one long target, and the positions of random tokens in it."""

import os
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from reprlib import repr as short_repr

from data_modules._rows import read_rows, text_in
from pml.errors import InputError

__all__ = ["LongContextFile", "read_long_context"]


@dataclass(frozen=True)
class LongContextFile:
    """Content of one file.

    Attributes:
        question: The query.
        text: The target, under "matching" in the file.
        original_tokens: Its length in tokens of the tokenizer that it was made with; None if not given.
        random_positions: Positions of its random tokens under that tokenizer, ascending.
    """

    question: str
    text: str
    original_tokens: int | None
    random_positions: tuple[int, ...]

    def positions_in(self, tokens: int) -> tuple[int, ...] | None:
        """Positions of the random tokens if the text encodes to so many tokens; None if they cannot be known.

        Adjacent random tokens may encode differently when the text is read back, and another tokenizer encodes all of
        it differently. So the positions hold only if the number of tokens is the original one.
        """
        return self.random_positions if tokens == self.original_tokens or not self.random_positions else None


def read_long_context(path: Path, column: str) -> LongContextFile | None:
    """Content of a file, or None if its first row is not in this format.

    Args:
        path: Any file.
        column: Column that the user asks for; a row that has it is an ordinary row.

    Raises:
        InputError: If a .jsonl file is malformed or has a second row, or the positions are not whole numbers.
    """
    if path.suffix.lower() != ".jsonl" or not os.path.isfile(path):
        return None
    row, *more = islice(read_rows(path), 2)
    if column in row.values or not {"question", "matching"} <= row.values.keys():
        return None
    if more:
        raise InputError(
            f"{more[0].where}: a second row in a file of one long target; give each a file of its own, or read them "
            "with Facts (--data.query_column question --data.target_column matching)"
        )
    positions = row.values.get("noise_positions", [])
    if not isinstance(positions, list) or not all(type(position) is int for position in positions):
        raise InputError(f"{row.where}: 'noise_positions' is {short_repr(positions)}; expected a list of whole numbers")
    tokens = row.values.get("original_token_count")
    if tokens is not None and (type(tokens) is not int or tokens < 1):
        raise InputError(
            f"{row.where}: 'original_token_count' is {short_repr(tokens)}; expected a whole number above 0"
        )
    if len(set(positions)) < len(positions) or any(p < 0 or (tokens is not None and p >= tokens) for p in positions):
        raise InputError(f"{row.where}: 'noise_positions' has a position twice or outside the text's tokens")
    return LongContextFile(text_in(row, "question"), text_in(row, "matching"), tokens, tuple(sorted(positions)))
