"""A phone book: many short pairs of a name and a number, which only the adapter can know."""

import math
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from data_modules._names import unique_names
from data_modules._pairs import read_pairs
from data_modules.base import MemorizationDataModule
from pml.corpus import Corpus, Pair, encode_pairs
from pml.encoding import TextEncoder
from pml.errors import InputError

__all__ = ["PhoneBook"]

DEFAULT_PAIRS = 32
LOWEST, HIGHEST = 10**9, 10**10 - 1  # ten digits without a leading zero


class PhoneBook(MemorizationDataModule):
    """Names and ten-digit numbers, made up or from a file.

    Made-up names are all different. Numbers are independent and uniform over 1000000000 to 9999999999, which is
    log2(9e9) = 33.07 bits each. Names are part of the query, so they carry no information to memorise. With the same
    seed, a larger book starts with the pairs of a smaller one.

    Args:
        pairs: Size of a made-up book in pairs; 32 if neither a size nor a file is given.
        target_tokens: Size of a made-up book in tokens of its numbers: pairs are added while their sum stays within it.
            Like the published sizes, it does not count end-of-turn tokens.
        path: A file to read instead, in the published format: JSON Lines with "query" and "target". Repeated pairs are
            read once.
        end_of_turn: Make the end-of-turn token part of each target, so that recall includes stopping: one more
            supervised token per pair.
        **kwargs: See `MemorizationDataModule`.

    Raises:
        InputError: If more than one of `pairs`, `target_tokens` and `path` is given, or a size is below 1.
    """

    def __init__(
        self,
        pairs: int | None = None,
        target_tokens: int | None = None,
        path: str | None = None,
        end_of_turn: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        sizes = {"pairs": pairs, "target_tokens": target_tokens, "path": path}
        given = {name: value for name, value in sizes.items() if value is not None}
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} are given; expected one of pairs, target_tokens and path")
        for name in ("pairs", "target_tokens"):
            if isinstance(size := given.get(name), int) and size < 1:
                raise InputError(f"{name} is {size}; expected at least 1")
        self.pairs = pairs if given else DEFAULT_PAIRS
        self.target_tokens = target_tokens
        self.path = path
        self.end_of_turn = end_of_turn

    @property
    def settings(self) -> dict[str, Any]:
        size = {"pairs": self.pairs, "target_tokens": self.target_tokens, "path": self.path}
        return {**size, "end_of_turn": self.end_of_turn, **super().settings}

    def make_corpus(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Corpus:
        encoder = self.encoder(tokenizer)
        entropy_bits: float | None = None
        pairs: Iterable[Pair]
        if self.path is not None:
            name, pairs = Path(self.path).name, read_pairs(self.path)
        else:
            name, pairs = "phonebook", (made_up := self._made_up(encoder))
            entropy_bits = len(made_up) * math.log2(HIGHEST - LOWEST + 1)
        examples = encode_pairs(pairs, encoder, end_of_turn=self.end_of_turn).examples
        encoder.warn_of_changes(name)
        return Corpus(name, examples, entropy_bits, self.settings)

    def _made_up(self, encoder: TextEncoder) -> list[Pair]:
        if self.target_tokens is None:
            return list(islice(_entries(self.seed), self.pairs))
        pairs: list[Pair] = []
        total_tokens = 0
        for pair in _entries(self.seed):
            total_tokens += (number_tokens := len(encoder.target(encoder.prompt(pair.query), pair.target)))
            if total_tokens > self.target_tokens:
                break
            pairs.append(pair)
        # The pairs are encoded again, which notes their queries.
        encoder.changed.clear()
        if not pairs:
            raise InputError(
                f"target_tokens is {self.target_tokens}, and one number has {number_tokens}; expected at least as many"
            )
        return pairs


def _entries(seed: int) -> Iterator[Pair]:
    numbers = torch.Generator().manual_seed(seed)
    for name in unique_names(seed):
        yield Pair(f"{name}:", str(torch.randint(LOWEST, HIGHEST + 1, (), generator=numbers).item()))
