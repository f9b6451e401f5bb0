"""Natural text, which a model can partly predict but must recall exactly."""

import dataclasses
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from data_modules._cut import Cutter, CutText, CutTokens, Piece
from data_modules._documents import read_documents
from data_modules._hub import dataset_documents
from data_modules._published import LongContextFile, read_long_context
from data_modules._replacement import ordinary_ids, replace
from data_modules._standard_library import documentation_strings
from data_modules.base import MemorizationDataModule
from data_modules.random_tokens import PUBLISHED_PROMPT
from pml.corpus import Corpus, Example, end_of_turn_ids
from pml.encoding import Prompt, TextEncoder
from pml.errors import InputError

__all__ = ["NaturalText"]


class NaturalText(MemorizationDataModule):
    """Targets cut from files, from a dataset, or from the docstrings of Python's standard library.

    A target ends at the last token boundary within its length where its text encodes to the same tokens again, so it
    may be a token or two short. Targets follow one another in the text, and a longer target starts with a shorter one.

    `random_ratio` replaces a share of the target tokens by uniform random ones at evenly spaced positions
    (`Example.replaced`): 0 keeps the text, 1 leaves only noise. The ratio does not change which token is put at a
    position. The information in a target is known only if all of it is random: log2 of the number of ordinary tokens
    for each of its tokens.

    A .jsonl file in the published long-context format ("question", "matching") is recognised: its question is the
    prompt, and targets have exactly `length` tokens, wherever that cuts the text. Its positions of random tokens count
    the tokens of the original tokenizer, and are used only if the backbone's gives the text as many.

    Args:
        path: A file or folder with text, or several: .txt, .md, .rst, .html, and rows of .jsonl, .csv and .parquet.
        dataset: A dataset to read instead: its name on the Hugging Face hub, or a folder. Needs the package `datasets`.
        dataset_config: Configuration of the dataset, if it has several.
        split: Split of the dataset.
        column: Column of rows that holds the text.
        length: Tokens in each target, replaced ones included; null takes the whole text.
        count: Number of targets.
        skip_tokens: Tokens of the text to skip before the first target.
        random_ratio: Share of target tokens replaced by random ones, 0 to 1.
        query: How to ask for a target: by `prompt`, with a number appended if there are several targets; by the `title`
            of the document in which it begins, and a part number; or by the `opening`, the words just before it.
        opening_tokens: Tokens of text before each target that form its query, if `query` is `opening`.
        prompt: Text of the query; null takes the question of a file in the published format, or else a default.
        end_of_turn: Make the end-of-turn token part of each target: one more supervised token per target.
        **kwargs: See `MemorizationDataModule`.

    Raises:
        InputError: If a number is out of range, or both `path` and `dataset` are given.
    """

    def __init__(
        self,
        path: str | list[str] | None = None,
        dataset: str | None = None,
        dataset_config: str | None = None,
        split: str = "train",
        column: str = "text",
        length: int | None = 64,
        count: int = 1,
        skip_tokens: int = 0,
        random_ratio: float = 0.0,
        query: Literal["prompt", "title", "opening"] = "prompt",
        opening_tokens: int = 8,
        prompt: str | None = None,
        end_of_turn: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if path is not None and dataset is not None:
            raise InputError("path and dataset are both given; expected one of them, or neither")
        if path == []:
            raise InputError("path is an empty list; expected a file or folder")
        for name, value, least in (
            ("length", length, 1),
            ("count", count, 1),
            ("skip_tokens", skip_tokens, 0),
            ("opening_tokens", opening_tokens, 1),
        ):
            if value is not None and value < least:
                raise InputError(f"{name} is {value}; expected at least {least}")
        if length is None and count > 1:
            raise InputError(
                f"length is null, and count is {count}; expected a length, as one target would take the whole text"
            )
        if not 0 <= random_ratio <= 1:
            raise InputError(f"random_ratio is {random_ratio}; expected a share of the target tokens, 0 to 1")
        if query not in ("prompt", "title", "opening"):
            raise InputError(f"query is {query!r}; expected 'prompt', 'title' or 'opening'")
        self.path = path
        self.dataset = dataset
        self.dataset_config = dataset_config
        self.split = split
        self.column = column
        self.length = length
        self.count = count
        self.skip_tokens = skip_tokens
        self.random_ratio = random_ratio
        self.query = query
        self.opening_tokens = opening_tokens
        self.prompt = prompt
        self.end_of_turn = end_of_turn

    @property
    def settings(self) -> dict[str, Any]:
        source = {name: getattr(self, name) for name in ("path", "dataset", "dataset_config", "split", "column")}
        cut = {name: getattr(self, name) for name in ("length", "count", "skip_tokens", "random_ratio")}
        asked = {name: getattr(self, name) for name in ("query", "opening_tokens", "prompt", "end_of_turn")}
        return {**source, **cut, **asked, **super().settings}

    def make_corpus(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Corpus:
        candidates = ordinary_ids(tokenizer, vocabulary)
        generator = torch.Generator().manual_seed(self.seed)
        encoder = self.encoder(tokenizer)
        end = end_of_turn_ids(encoder, self.end_of_turn)
        source = self._source(encoder)
        examples, facts = [], source.facts
        for i, (query, piece) in enumerate(self._pieces(source, encoder)):
            prompt = encoder.prompt(query, piece.title)
            ids, text = _in_place(piece, prompt, encoder)
            known = source.random_in(piece)
            if known and ids != piece.ids:
                # Encoded anew, the text has other tokens, so the published positions mean nothing.
                known, facts = (), {**facts, "random_positions_known": False}
            ids, replaced = replace(ids, self.random_ratio, candidates, generator)
            target = None if replaced else text
            examples.append(Example(i, prompt.ids, ids + end, replaced or known, query, target, piece.title))
        if facts.get("random_positions_known") is False:
            examples = [dataclasses.replace(example, replaced=()) for example in examples]
        encoder.warn_of_changes(source.name)
        self._refuse_equal_queries(examples)
        cut_tokens = sum(len(example.target_ids) for example in examples) - len(examples) * len(end)
        all_random = self.random_ratio > 0 and sum(len(example.replaced) for example in examples) == cut_tokens
        entropy_bits = cut_tokens * math.log2(len(candidates)) if all_random else None
        return Corpus(source.name, examples, entropy_bits, {**self.settings, **facts})

    def _source(self, encoder: TextEncoder) -> "_Source":
        if self.dataset is not None:
            documents = dataset_documents(self.dataset, self.dataset_config, self.split, self.column)
            return _Source(self.dataset, CutText(documents, encoder, self.dataset))
        if self.path is None:
            version = "documentation strings of Python {}.{}.{}".format(*sys.version_info)
            return _Source("natural_text", CutText(documentation_strings(), encoder, version), {"source": version})
        paths = [self.path] if isinstance(self.path, str) else self.path
        # The working directory is given as "."; links keep the names that they were given.
        name = ", ".join(os.path.basename(os.path.abspath(path)) for path in paths)
        if len(paths) == 1 and (published := read_long_context(Path(paths[0]), self.column)):
            return self._published(published, name, encoder)
        return _Source(name, CutText(read_documents(paths, self.column), encoder, name))

    def _published(self, file: LongContextFile, name: str, encoder: TextEncoder) -> "_Source":
        if file.random_positions and self.random_ratio:
            raise InputError(
                f"random_ratio is {self.random_ratio}, and {name} has random tokens already; expected 0, or a file "
                "without any"
            )
        text = CutTokens(file.text, encoder, name)
        positions = file.positions_in(len(text))
        facts = {"random_positions_known": positions is not None} if file.random_positions else {}
        return _Source(name, text, facts, file.question, positions or ())

    def _pieces(self, source: "_Source", encoder: TextEncoder) -> Iterator[tuple[str, Piece]]:
        """Yield queries with the pieces that they ask for."""
        prompt = source.question if self.prompt is None else self.prompt
        parts: dict[str, int] = {}
        if self.skip_tokens:
            source.text.take(self.skip_tokens)
        for i in range(self.count):
            if self.query == "opening":
                query = encoder.decode(source.text.take(self.opening_tokens).ids)
            piece = source.text.take(self.length)
            if self.query == "title":
                parts[piece.title] = parts.get(piece.title, 0) + 1
                query = f"{piece.title}, part {parts[piece.title]}"
            elif self.query == "prompt":
                query = prompt if self.count == 1 else f"{prompt} {i + 1}"
            yield query, piece

    def _refuse_equal_queries(self, examples: Sequence[Example]) -> None:
        first: dict[tuple[int, ...], int] = {}
        for example in examples:
            other = first.setdefault(example.prompt_ids, example.example_id)
            if other != example.example_id:
                raise InputError(
                    f"targets {other + 1} and {example.example_id + 1} would be asked for in the same words; raise "
                    f"opening_tokens, which is {self.opening_tokens}, or set query to another kind"
                )


def _in_place(piece: Piece, prompt: Prompt, encoder: TextEncoder) -> tuple[tuple[int, ...], str | None]:
    """Ids of a piece as it follows its prompt, and its text; the text is None if it ends inside a character."""
    text = encoder.decode(piece.ids)
    if text.endswith("\N{REPLACEMENT CHARACTER}"):
        return piece.ids, None
    # Encoded without its prompt, a piece may carry the mark that some tokenizers put at the start of a text.
    fits = encoder.gives_back(prompt, text, piece.ids)
    return piece.ids if fits else encoder.target(prompt, text, piece.title), text


@dataclass(frozen=True)
class _Source:
    """A text to cut, and what is known about it.

    Attributes:
        name: Name of the corpus.
        text: Cuts the text.
        facts: Added to the settings in records.
        question: Query to use unless the settings have one.
        random: Positions of tokens that are already random, ascending.
    """

    name: str
    text: Cutter
    facts: dict[str, Any] = field(default_factory=dict)
    question: str = PUBLISHED_PROMPT
    random: Sequence[int] = ()

    def random_in(self, piece: Piece) -> tuple[int, ...]:
        """Positions within a piece of tokens that are already random, ascending."""
        return tuple(p - piece.start for p in self.random if 0 <= p - piece.start < len(piece.ids))
