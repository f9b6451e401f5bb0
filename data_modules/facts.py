"""Facts: people's own pairs of a question and an answer that has to come back exactly."""

import logging
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from data_modules._pairs import read_pairs
from data_modules.base import MemorizationDataModule
from pml.corpus import Corpus, encode_pairs
from pml.errors import InputError

__all__ = ["Facts"]

log = logging.getLogger(__name__)


class Facts(MemorizationDataModule):
    """Pairs from a .jsonl, .csv, .parquet or .yaml file, one row each.

    A row has the two columns. With their default names, rows of chats will do too where they hold one question and one
    answer: OpenAI's "messages", ShareGPT's "conversations", Alpaca's "instruction", "input" and "output", and "prompt"
    and "completion".

    Without a file these are examples of what has to be remembered exactly: made-up credentials, licence keys, addresses
    and watermarks, and public wording of statutes, diagnosis codes, formulas and citations.

    Rows that the model cannot tell apart are taken once, and counted; one query with different targets is an error.

    Args:
        path: The file; null takes the examples.
        query_column: Where a row has what is asked.
        target_column: Where it has what has to come back, character for character.
        pairs: Different pairs to take from the beginning of the file; null takes all.
        end_of_turn: Make the end-of-turn token part of each target, so that recalling it also means to stop: one
            supervised token more per pair.
        **kwargs: See `MemorizationDataModule`.

    Raises:
        InputError: If `pairs` is below 1, or both columns are the same.
    """

    def __init__(
        self,
        path: str | None = None,
        query_column: str = "query",
        target_column: str = "target",
        pairs: int | None = None,
        end_of_turn: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if pairs is not None and pairs < 1:
            raise InputError(f"pairs is {pairs}; expected at least 1, or null for all")
        if query_column == target_column:
            raise InputError(f"query_column and target_column are both {query_column!r}; expected two columns")
        self.path = path
        self.query_column = query_column
        self.target_column = target_column
        self.pairs = pairs
        self.end_of_turn = end_of_turn

    @property
    def settings(self) -> dict[str, Any]:
        names = ("path", "query_column", "target_column", "pairs", "end_of_turn")
        return {**{name: getattr(self, name) for name in names}, **super().settings}

    def make_corpus(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Corpus:
        if self.path is not None:
            return self._corpus_of(Path(self.path), Path(self.path).name, tokenizer)
        with as_file(files("data_modules") / "examples" / "facts.yaml") as path:
            return self._corpus_of(path, "facts", tokenizer)

    def _corpus_of(self, path: Path, name: str, tokenizer: PreTrainedTokenizerBase) -> Corpus:
        encoder = self.encoder(tokenizer)
        # Pairs go straight from the file into token ids.
        rows = read_pairs(path, self.query_column, self.target_column)
        examples, duplicates = encode_pairs(rows, encoder, end_of_turn=self.end_of_turn, limit=self.pairs)
        encoder.warn_of_changes(name)
        if duplicates:
            log.info("%s: %d identical pairs are merged with earlier ones", name, duplicates)
        if self.pairs is not None and len(examples) < self.pairs:
            raise InputError(f"{name}: {len(examples)} different pairs, and pairs is {self.pairs}; expected no more")
        return Corpus(name, examples, settings={**self.settings, "merged_duplicates": duplicates})
