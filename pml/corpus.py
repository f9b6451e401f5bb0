"""The corpus to memorise: pairs of text, their token ids, batches of them, and a content hash."""

import hashlib
import logging
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pml.encoding import ENCODING_VERSION, TextEncoder
from pml.errors import InputError

__all__ = [
    "IGNORE_INDEX",
    "PADDING_EXAMPLE",
    "Corpus",
    "EncodedPairs",
    "Example",
    "Pair",
    "collate",
    "encode_pairs",
    "end_of_turn_ids",
    "supervised_tokens",
]

log = logging.getLogger(__name__)

LISTED_CONFLICTS = 5
"""Number of conflicting queries that an error lists; thousands would bury the message."""

IGNORE_INDEX = -100
"""Label of a position that is not supervised (the value that `torch.nn.functional.cross_entropy` ignores)."""


@dataclass(frozen=True)
class Pair:
    """A query and the text that must be recalled in answer to it.

    Attributes:
        query: The user's text.
        target: The text to recall, character for character.
        source: Where the pair comes from (file and line), for error messages.
        paraphrases: The query in other words.
    """

    query: str
    target: str
    source: str = ""
    paraphrases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Example:
    """One pair as token ids. Training and recall compare these ids, not the text.

    Attributes:
        example_id: Position in the corpus; window states and metrics are keyed by it.
        prompt_ids: Token ids of everything before the target; never supervised.
        target_ids: Token ids to recall, including the end-of-turn token if targets end with one.
        replaced: Target positions, ascending, whose token was replaced by a random one.
        query: The query as the user wrote it.
        target: The target as the user wrote it; None if only the ids define it, as for random tokens.
        source: Where the pair comes from (file and line).
    """

    example_id: int
    prompt_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    replaced: tuple[int, ...] = ()
    query: str = ""
    target: str | None = None
    source: str = ""

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.target_ids)


PADDING_EXAMPLE = Example(example_id=-1, prompt_ids=(0,), target_ids=())
"""Stands in for a missing example when every rank needs a batch; it supervises nothing."""


@dataclass(frozen=True)
class Corpus:
    """Everything that one run memorises.

    Attributes:
        name: Short name of the generator or file, as it appears in records.
        examples: The encoded pairs; `examples[i].example_id == i`.
        entropy_bits: Information content of all targets given the queries, in bits; None if unknown.
        settings: The settings that made the corpus, as plain Python, for the record.
        fact_ids: For each example the fact that it asks for, if several examples ask for one fact in different words
            and `entropy_bits` counts it once; None if each example asks for its own fact.
        encoding: Version of the encoding rules that turned its text into ids.

    Raises:
        InputError: If there is no example, a prompt or target is empty, or the ids are out of order.
    """

    name: str
    examples: Sequence[Example]
    entropy_bits: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    fact_ids: Sequence[int] | None = None
    encoding: int = ENCODING_VERSION

    def __post_init__(self) -> None:
        if not self.examples:
            raise InputError(f"corpus {self.name!r} is empty: expected at least one pair of query and target")
        for i, example in enumerate(self.examples):
            if example.example_id != i:
                raise InputError(f"corpus {self.name!r}: example {i} has id {example.example_id}; expected {i}")
            if not example.target_ids or not example.prompt_ids:
                part = "prompt" if example.target_ids else "target"
                raise InputError(f"corpus {self.name!r}: example {i} has an empty {part}; expected at least one token")

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def facts(self) -> list[Example]:
        """The first example of each fact; all examples if each asks for its own fact."""
        ids = range(len(self)) if self.fact_ids is None else self.fact_ids
        first: dict[int, Example] = {}
        for fact, example in zip(ids, self.examples, strict=True):
            first.setdefault(fact, example)
        return list(first.values())

    @property
    def target_tokens(self) -> int:
        """Length l of the corpus: the number of supervised target tokens over all examples."""
        return sum(len(e.target_ids) for e in self.examples)

    @property
    def longest(self) -> int:
        """Number of tokens in the longest example, prompt and target together."""
        return max(len(e) for e in self.examples)

    @property
    def content_hash(self) -> str:
        """SHA-256 over the token ids of all prompts and targets, in order."""
        digest = hashlib.sha256()
        for example in self.examples:
            for ids in (example.prompt_ids, example.target_ids):
                digest.update(struct.pack(f"<I{len(ids)}I", len(ids), *ids))
        return digest.hexdigest()


class EncodedPairs(NamedTuple):
    """Result of `encode_pairs`.

    Attributes:
        examples: The distinct pairs as token ids.
        duplicates: Number of pairs left out because their token ids repeat an earlier pair's.
    """

    examples: list[Example]
    duplicates: int


def encode_pairs(
    pairs: Iterable[Pair],
    encoder: TextEncoder,
    *,
    end_of_turn: bool = True,
    limit: int | None = None,
) -> EncodedPairs:
    """Encode pairs as token ids, numbered in order of appearance, leaving out repeated pairs.

    Pairs are compared as the model sees them: queries that a template or a tokenizer makes equal are one query.

    Args:
        pairs: Queries and targets.
        encoder: Turns them into token ids.
        end_of_turn: Make the end-of-turn token the last token of every target, so that recall includes stopping; if
            the template writes none, targets end without it and a warning says so.
        limit: Number of distinct pairs to stop after; None takes all.

    Raises:
        InputError: If equal prompts have different targets, naming where they come from; see also
            `TextEncoder.prompt` and `TextEncoder.target`.
    """
    end = end_of_turn_ids(encoder, end_of_turn)
    examples: list[Example] = []
    known: dict[tuple[int, ...], Example] = {}
    conflicts: dict[tuple[int, ...], list[Example]] = {}
    duplicates = 0
    for number, pair in enumerate(pairs, start=1):
        source = pair.source or f"pair {number}"
        prompt = encoder.prompt(pair.query, source)
        target_ids = encoder.target(prompt, pair.target, source) + end
        example = Example(len(examples), prompt.ids, target_ids, (), pair.query, pair.target, source)
        before = known.setdefault(prompt.ids, example)
        if before is example:
            examples.append(example)
            if len(examples) == limit:
                break
        elif before.target_ids == target_ids:
            duplicates += 1
        else:
            conflicts.setdefault(prompt.ids, [before]).append(example)
    if conflicts:
        raise InputError(_in_words(list(conflicts.values())))
    return EncodedPairs(examples, duplicates)


def end_of_turn_ids(encoder: TextEncoder, wanted: bool = True) -> tuple[int, ...]:
    """Ids that end every target: the end-of-turn token, or nothing if it is unwanted or does not exist."""
    if not wanted:
        return ()
    if encoder.end_of_turn_id is None:
        log.warning("no end-of-turn token follows an answer under this chat template; targets end without one")
        return ()
    return (encoder.end_of_turn_id,)


def _in_words(conflicts: Sequence[Sequence[Example]]) -> str:
    listed = []
    for examples in conflicts[:LISTED_CONFLICTS]:
        queries = " and ".join(dict.fromkeys(ascii(e.query) for e in examples[: LISTED_CONFLICTS + 1]))
        sources = ", ".join(e.source for e in examples[: LISTED_CONFLICTS + 1])
        listed.append(f"{queries} ({sources})")
    more = f" and {len(conflicts) - len(listed)} more" if len(conflicts) > len(listed) else ""
    alike = any(len({e.query for e in examples}) > 1 for examples in conflicts)
    return (
        f"{len(conflicts)} quer{'y has' if len(conflicts) == 1 else 'ies have'} different targets, which could "
        f"never all be recalled: {'; '.join(listed)}{more}; "
        + ("the model sees the same prompt for each of them; " if alike else "")
        + "keep one target for each query"
    )


def collate(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Collate examples into a right-padded batch.

    Right padding needs no attention mask in a causal model, where no token sees the padding after it. Padding has token
    id 0 and is never supervised.

    Args:
        examples: B examples; the longest has T tokens.

    Returns:
        `input_ids` (B, T); `labels` (B, T), the token at each position, not shifted, with `IGNORE_INDEX` on prompt and
        padding; `lengths` (B,), tokens before the padding; `example_id` (B,); and `supervised` (3, N), see
        `supervised_tokens`.
    """
    longest = max(len(e) for e in examples)
    input_ids = torch.zeros(len(examples), longest, dtype=torch.long)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for row, example in enumerate(examples):
        start, end = len(example.prompt_ids), len(example)
        input_ids[row, :end] = torch.tensor(example.prompt_ids + example.target_ids)
        labels[row, start:end] = input_ids[row, start:end]
    return {
        "input_ids": input_ids,
        "labels": labels,
        "lengths": torch.tensor([len(e) for e in examples]),
        "example_id": torch.tensor([e.example_id for e in examples]),
        "supervised": supervised_tokens(labels),
    }


def supervised_tokens(labels: Tensor) -> Tensor:
    """Indices and ids of the N target tokens of a batch, computed on the host so that no device has to be waited for.

    Args:
        labels: (B, T) from `collate`. Below, S = max(T - 1, 1).

    Returns:
        (3, N) int64, in batch order: flat index in (B, S) of the position that predicts the token; flat index of the
        token in a (B, S) table whose column t is the t-th target token; id of the token.
    """
    shifted = labels[:, 1:] if labels.shape[1] > 1 else torch.full_like(labels, IGNORE_INDEX)
    supervised = shifted != IGNORE_INDEX
    table = torch.arange(supervised.shape[1]) < supervised.sum(dim=1, keepdim=True)
    places, cells = (mask.flatten().nonzero().squeeze(1) for mask in (supervised, table))
    return torch.stack([places, cells, shifted.flatten()[places]])
