"""What is to be memorised: pairs of text, their token ids, batches of them, and a hash of the content."""

import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pml.errors import InputError

__all__ = [
    "GHOST",
    "IGNORE_INDEX",
    "Corpus",
    "Example",
    "Pair",
    "collate",
    "encode_pairs",
    "encode_prompt",
    "encode_target",
    "end_of_turn_id",
    "special_ids",
]

IGNORE_INDEX = -100
"""Label of a position that is not supervised (the value that `torch.nn.functional.cross_entropy` ignores)."""


@dataclass(frozen=True)
class Pair:
    """A query and the text that has to be recalled when it is asked.

    Attributes:
        query: What the user says.
        target: What has to come back, character for character.
        source: Where the pair came from (file and line), for error messages.
    """

    query: str
    target: str
    source: str = ""


@dataclass(frozen=True)
class Example:
    """One pair as token ids; these, not the text, are what is trained on and compared.

    Attributes:
        example_id: Position in the corpus. Caches, window states and metrics are kept by it.
        prompt_ids: Token ids of the query with its chat template; never supervised.
        target_ids: Token ids to recall, end-of-turn token included where it is part of the target.
        replaced: Positions in the target, ascending, whose token was put there at random.
    """

    example_id: int
    prompt_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    replaced: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.target_ids)


GHOST = Example(example_id=-1, prompt_ids=(0,), target_ids=())
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

    Raises:
        InputError: If there is no example, a target is empty, or the ids are out of order.
    """

    name: str
    examples: Sequence[Example]
    entropy_bits: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    fact_ids: Sequence[int] | None = None

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


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, query: str, *, chat_template: bool = True, system: str | None = None
) -> tuple[int, ...]:
    """Token ids of everything that stands before the target.

    Args:
        tokenizer: The backbone's tokenizer.
        query: What the user says.
        chat_template: Wrap the query as a user turn and open the assistant's turn, where the tokenizer has a chat
            template; otherwise the query stands alone.
        system: Text of a system turn put first; None leaves that to the template.
    """
    if chat_template and tokenizer.chat_template:
        turns = [{"role": "system", "content": system}] if system is not None else []
        turns.append({"role": "user", "content": query})
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
    else:
        ids = tokenizer(query if system is None else f"{system}\n{query}")["input_ids"]
    return tuple(ids)


def encode_target(tokenizer: PreTrainedTokenizerBase, target: str, source: str = "") -> tuple[int, ...]:
    """Token ids of a target text, without special tokens around it.

    Raises:
        InputError: If the target is empty, or the ids do not decode to exactly this text.
    """
    where = f"{source}: " if source else ""
    if not target:
        raise InputError(f"{where}the target is empty; expected text to memorise")
    if any("\ud800" <= character <= "\udfff" for character in target):
        raise InputError(f"{where}the target has a lone surrogate, which is not text; expected valid Unicode")
    ids = tokenizer(target, add_special_tokens=False)["input_ids"]
    decoded = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if decoded != target:
        at = next((i for i, (a, b) in enumerate(zip(decoded, target, strict=False)) if a != b), len(decoded))
        raise InputError(
            f"{where}the tokenizer cannot represent this target: character {at + 1}, {target[at : at + 12]!r}, comes "
            f"back as {decoded[at : at + 12]!r}; normalise the text or use a backbone with a byte-level tokenizer"
        )
    return tuple(ids)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of tokens that stand for no text, also of those that are marked as special without having a role."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an answer: the one the chat template puts after it, else the end-of-sequence token.

    Raises:
        InputError: If the tokenizer has neither.
    """
    if tokenizer.chat_template:
        answer = "\N{BLACK SQUARE}"
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
        after = str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition(answer)[2]
        ids = tokenizer(after, add_special_tokens=False)["input_ids"]
        if ids and ids[0] in special_ids(tokenizer):
            return ids[0]
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no end-of-turn token; set end_of_turn: false")
    return tokenizer.eos_token_id


def encode_pairs(
    pairs: Iterable[Pair],
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat_template: bool = True,
    system: str | None = None,
    end_of_turn: bool = True,
) -> list[Example]:
    """Pairs as token ids, numbered in the order they come.

    Args:
        pairs: Queries and targets.
        tokenizer: The backbone's tokenizer.
        chat_template: See `encode_prompt`.
        system: See `encode_prompt`.
        end_of_turn: Make the end-of-turn token the last token of every target, so that recall also means to stop.

    Raises:
        InputError: See `encode_target`.
    """
    end = (end_of_turn_id(tokenizer),) if end_of_turn else ()
    return [
        Example(
            example_id=i,
            prompt_ids=encode_prompt(tokenizer, pair.query, chat_template=chat_template, system=system),
            target_ids=encode_target(tokenizer, pair.target, pair.source or f"pair {i + 1}") + end,
        )
        for i, pair in enumerate(pairs)
    ]


def collate(examples: Sequence[Example]) -> dict[str, Tensor]:
    """A right-padded batch.

    Right padding needs no attention mask in a causal model: a token sees what stands before it, and padding stands
    after. Padding has token id 0 and is never supervised.

    Args:
        examples: B examples; the longest has T tokens.

    Returns:
        `input_ids` (B, T), `labels` (B, T) with `IGNORE_INDEX` on prompt and padding, where the label at position t is
        the token at position t; `lengths` (B,), tokens before the padding; `example_id` (B,).
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
    }
