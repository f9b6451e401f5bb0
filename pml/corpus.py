"""What is to be memorised: pairs of text, their token ids, batches of them, and a hash of the content."""

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
"""Conflicting queries that an error spells out; a file with thousands would bury the message."""

IGNORE_INDEX = -100
"""Label of a position that is not supervised (the value that `torch.nn.functional.cross_entropy` ignores)."""


@dataclass(frozen=True)
class Pair:
    """A query and the text that has to be recalled when it is asked.

    Attributes:
        query: What the user says.
        target: What has to come back, character for character.
        source: Where the pair came from (file and line), for error messages.
        paraphrases: The query in other words.
    """

    query: str
    target: str
    source: str = ""
    paraphrases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Example:
    """One pair as token ids; these, not the text, are what is trained on and compared.

    Attributes:
        example_id: Position in the corpus. Caches, window states and metrics are kept by it.
        prompt_ids: Token ids of the query with its chat template; never supervised.
        target_ids: Token ids to recall, end-of-turn token included where it is part of the target.
        replaced: Positions in the target, ascending, whose token was put there at random.
        query: What is asked, as the user wrote it.
        target: The target as the user wrote it; None where the ids are the truth, as those of random tokens are.
        source: Where the pair came from (file and line).
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
"""Stands in for a missing example where every rank must have a batch; it supervises nothing."""


@dataclass(frozen=True)
class Corpus:
    """Everything one run has to memorise.

    Attributes:
        name: Short name of the generator or file, as it appears in records.
        examples: The encoded pairs; `examples[i].example_id == i`.
        entropy_bits: Information content of all targets in bits given the queries, None where it is unknown.
        settings: What the corpus was made with, as plain Python, for the record.
        fact_ids: For each example the fact that it asks for, where several ask for the same one in other words and
            `entropy_bits` counts it once; None where each example asks for a fact of its own.
        encoding: Version of the rules by which its text became ids.

    Raises:
        InputError: If there is no example, a target is empty, or the ids are out of order.
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
    def target_tokens(self) -> int:
        """Length l of the corpus: supervised target tokens, summed over all examples."""
        return sum(len(e.target_ids) for e in self.examples)

    @property
    def longest(self) -> int:
        """Tokens in the longest prompt with its target."""
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
    """What `encode_pairs` gives.

    Attributes:
        examples: The pairs as token ids, each once.
        duplicates: Pairs left out since the model has seen them before.
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
    """Pairs as token ids, numbered in the order they come; a pair that the model has seen before is left out.

    What counts is what the model sees: queries that a template or a tokenizer makes equal are one query.

    Args:
        pairs: Queries and targets.
        encoder: Turns them into token ids.
        end_of_turn: Make the end-of-turn token the last token of every target, so that recall also means to stop;
            where the template writes none, that is said, and targets end without it.
        limit: Different pairs to stop after; None takes all.

    Raises:
        InputError: If prompts are equal whose targets differ, naming where they come from; and see
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
    """What a target ends with: the end-of-turn token, or nothing where it is not wanted, or where there is none."""
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
    """A right-padded batch.

    Right padding needs no attention mask in a causal model: a token sees what stands before it, and padding stands
    after. Padding has token id 0 and is never supervised.

    Args:
        examples: B examples; the longest has T tokens.

    Returns:
        `input_ids` (B, T), `labels` (B, T) with `IGNORE_INDEX` on prompt and padding, where the label at position t is
        the token at position t; `lengths` (B,), tokens before the padding; `example_id` (B,); and `supervised` (3, N),
        see `supervised_tokens`.
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
    """Where the N target tokens of a batch are: made on the host, since a device would have to be waited for.

    Args:
        labels: (B, T) as `collate` gives them. Below, S is T - 1, and at least 1.

    Returns:
        (3, N) int64, row by row of the batch: the place of the position that predicts the token, in (B, S) taken flat;
        the place of the token in a table (B, S) whose column t is the t-th target token; the token's id.
    """
    shifted = labels[:, 1:] if labels.shape[1] > 1 else torch.full_like(labels, IGNORE_INDEX)
    supervised = shifted != IGNORE_INDEX
    table = torch.arange(supervised.shape[1]) < supervised.sum(dim=1, keepdim=True)
    places, cells = (mask.flatten().nonzero().squeeze(1) for mask in (supervised, table))
    return torch.stack([places, cells, shifted.flatten()[places]])
