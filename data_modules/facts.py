"""Facts: users' own pairs of a question and an answer that must be recalled exactly."""

import logging
from collections.abc import Iterator
from importlib.resources import as_file, files
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from data_modules._pairs import read_pairs
from data_modules.base import MemorizationDataModule
from pml.corpus import Corpus, Pair, encode_pairs
from pml.errors import InputError

__all__ = ["Facts"]

log = logging.getLogger(__name__)


class Facts(MemorizationDataModule):
    """Pairs from a .jsonl, .csv, .parquet or .yaml file, one per row.

    A row has a column for the query and one for the target. If their names are the defaults, chat rows of one question
    and one answer are read too: OpenAI's "messages", ShareGPT's "conversations", Alpaca's "instruction", "input" and
    "output", and "prompt" and "completion".

    Without a file, the pairs are examples of what must be remembered exactly: made-up credentials, licence keys,
    addresses and watermarks, and public wording of statutes, diagnosis codes, formulas and citations.

    Pairs that are identical to the model are merged and counted; one query with different targets is an error.

    A row may have a column of paraphrases of its query: a list, or text with one per line. The last of them are held
    out: they are asked for but never trained on, and their recall is reported separately, since knowing one wording by
    heart is often not enough.

    Args:
        path: The file; null takes the examples that ship.
        query_column: Column of the query.
        target_column: Column of the target, which must be recalled character for character.
        paraphrases_column: Column of paraphrases of the query, which a row may lack.
        held_out_wordings: Number of paraphrases of each row to hold out, the last ones; the others are trained on.
        pairs: Number of distinct pairs to take from the start of the file, counting each wording; null takes all.
        end_of_turn: Make the end-of-turn token part of each target, so that recall includes stopping: one more
            supervised token per pair.
        **kwargs: See `MemorizationDataModule`.

    Raises:
        InputError: If `pairs` is below 1, `held_out_wordings` below 0, or two columns are the same.
    """

    def __init__(
        self,
        path: str | None = None,
        query_column: str = "query",
        target_column: str = "target",
        paraphrases_column: str = "paraphrases",
        held_out_wordings: int = 1,
        pairs: int | None = None,
        end_of_turn: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if pairs is not None and pairs < 1:
            raise InputError(f"pairs is {pairs}; expected at least 1, or null for all")
        if held_out_wordings < 0:
            raise InputError(f"held_out_wordings is {held_out_wordings}; expected a number of paraphrases, or 0")
        if paraphrases_column in (query_column, target_column):
            raise InputError(f"paraphrases_column is {paraphrases_column!r}; expected a column of its own")
        if query_column == target_column:
            raise InputError(f"query_column and target_column are both {query_column!r}; expected two columns")
        self.path = path
        self.query_column = query_column
        self.target_column = target_column
        self.paraphrases_column = paraphrases_column
        self.held_out_wordings = held_out_wordings
        self.pairs = pairs
        self.end_of_turn = end_of_turn
        self._rows_taken: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        columns = ("query_column", "target_column", "paraphrases_column")
        names = ("path", *columns, "held_out_wordings", "pairs", "end_of_turn")
        return {**{name: getattr(self, name) for name in names}, **super().settings}

    def make_corpus(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Corpus:
        encoder = self.encoder(tokenizer)
        # A generator: each pair is encoded as soon as it is read.
        rows = (wording for pair in self._counted_rows() for wording in self._wordings(pair, held_out=False))
        examples, duplicates = encode_pairs(rows, encoder, end_of_turn=self.end_of_turn, limit=self.pairs)
        encoder.warn_of_changes(self._name)
        if duplicates:
            log.info("%s: %d identical pairs are merged with earlier ones", self._name, duplicates)
        if self.pairs is not None and len(examples) < self.pairs:
            raise InputError(
                f"{self._name}: {len(examples)} different pairs, and pairs is {self.pairs}; expected no more"
            )
        number = {source: i for i, source in enumerate(dict.fromkeys(example.source for example in examples))}
        fact_ids = [number[example.source] for example in examples] if len(number) < len(examples) else None
        settings = {**self.settings, "merged_duplicates": duplicates}
        return Corpus(self._name, examples, settings=settings, fact_ids=fact_ids)

    def make_held_out(self, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Corpus | None:
        """The wordings that are asked for but never trained on."""
        if not any(pair.paraphrases for pair in self._rows(self._rows_taken)):
            return None
        encoder = self.encoder(tokenizer)
        trained = {example.prompt_ids for example in corpus.examples}

        def is_trained(pair: Pair) -> bool:
            return encoder.prompt(pair.query, pair.source).ids in trained

        # Only of facts that are trained on: `pairs` may end the corpus before the file.
        rows = (w for pair in self._rows(self._rows_taken) for w in self._wordings(pair, held_out=True))
        # A wording whose prompt equals one that is trained on is not held out.
        rows = (pair for pair in rows if not is_trained(pair))
        examples = encode_pairs(rows, encoder, end_of_turn=self.end_of_turn).examples
        encoder.changed.clear()
        return Corpus(f"{self._name}_held_out", examples, settings=self.settings) if examples else None

    @property
    def _name(self) -> str:
        return Path(self.path).name if self.path is not None else "facts"

    def _counted_rows(self) -> Iterator[Pair]:
        """The rows; how many of them were taken is kept."""
        for taken, pair in enumerate(self._rows(), start=1):
            self._rows_taken = taken
            yield pair

    def _rows(self, most: int | None = None) -> Iterator[Pair]:
        columns = (self.query_column, self.target_column, self.paraphrases_column)
        if self.path is not None:
            yield from islice(read_pairs(Path(self.path), *columns), most)
        else:
            with as_file(files("data_modules") / "examples" / "facts.yaml") as path:
                yield from islice(read_pairs(path, *columns), most)

    def _wordings(self, pair: Pair, held_out: bool) -> list[Pair]:
        """The pair in each wording that is held out, or in each that is trained on."""
        kept = max(len(pair.paraphrases) - self.held_out_wordings, 0)
        queries = pair.paraphrases[kept:] if held_out else (pair.query, *pair.paraphrases[:kept])
        return [Pair(query, pair.target, pair.source) for query in queries]
