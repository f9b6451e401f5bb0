"""Ordinary text, which an adapter should leave alone: for the guard, for the KL penalty, and to measure harm on.

Files of prose, code and chats ship, with nothing in common. `texts/guard.jsonl` and `texts/penalty.jsonl` were sampled
from SmolLM2-135M-Instruct (Apache-2.0) at temperature 0.8: what they say is of no account, often wrong and never used,
only what a model makes of it. `texts/harm.jsonl` was written for this project. A chat is put into the chat template of
the backbone, the other kinds stand alone.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from pml.corpus import Example
from pml.encoding import PromptFormat, TextEncoder
from pml.errors import InputError

__all__ = [
    "KINDS",
    "PASSAGE_TOKENS",
    "Passage",
    "ordinary_passages",
    "passages_of_files",
    "shipped_passages",
    "text_examples",
]

KINDS = ("prose", "code", "chat")

PASSAGE_TOKENS = 128
"""Longest passage; of a chat, longest answer."""

PASSAGE_CHARACTERS = 640
"""A passage of somebody's own text: somewhat more than `PASSAGE_TOKENS` of most tokenizers."""

MOST_PASSAGES = 512
"""Of somebody's own text; further ones would change the principal directions little."""


@dataclass(frozen=True)
class Passage:
    """A piece of ordinary text.

    Attributes:
        kind: `prose`, `code` or `chat`; `text` where it came from a file of one's own.
        text: The text; of a chat, the answer.
        query: What the user asks; empty where it is no chat.
    """

    kind: str
    text: str
    query: str = ""


def shipped_passages(*names: str) -> list[Passage]:
    """The passages of files that ship: `guard`, `penalty` or `harm`."""
    texts = [(files("pml") / "texts" / f"{name}.jsonl").read_text(encoding="utf-8") for name in names]
    return [Passage(**json.loads(line)) for text in texts for line in text.splitlines()]


def ordinary_passages(text: str | Iterable[str] | None, *shipped: str) -> list[Passage]:
    """What an adapter should leave alone: the passages of somebody's own files, where there are none those that ship.

    Raises:
        InputError: See `passages_of_files`.
    """
    if text is None:
        return shipped_passages(*shipped)
    return passages_of_files([text] if isinstance(text, str) else text)


def passages_of_files(paths: Iterable[str | Path]) -> list[Passage]:
    """Text files cut into passages, evenly spaced where there are more than `MOST_PASSAGES`.

    Raises:
        InputError: If a file cannot be read as UTF-8, or there is no text in them.
    """
    pieces: list[str] = []
    for path in map(Path, paths):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"guard text {path}: cannot be read ({error}); expected a text file in UTF-8") from error
        cut = (text[start : start + PASSAGE_CHARACTERS] for start in range(0, len(text), PASSAGE_CHARACTERS))
        pieces += [piece for piece in cut if piece.strip()]
    if not pieces:
        raise InputError("guard text: there is no text in it; expected ordinary text, such as prose and code")
    step = max(1, -(-len(pieces) // MOST_PASSAGES))
    return [Passage("text", piece) for piece in pieces[::step]]


def text_examples(
    passages: Sequence[Passage],
    tokenizer: PreTrainedTokenizerBase,
    max_positions: int | None = None,
    vocab_size: int | None = None,
) -> list[Example]:
    """Passages as token ids, a passage an example: the first token is the prompt, or what stands before an answer.

    Args:
        passages: What to encode.
        tokenizer: The backbone's.
        max_positions: Tokens that fit into its context; passages are cut to it, and left out where nothing is left.
        vocab_size: Ids that it knows; passages with others are left out.
    """
    plain, chat = TextEncoder(tokenizer, PromptFormat(chat_template=False)), TextEncoder(tokenizer)
    examples = []
    for number, passage in enumerate(passages):
        if passage.query:
            prompt = chat.prompt(passage.query).ids
            target = (*chat.document(passage.text)[:PASSAGE_TOKENS],)
        else:
            ids = plain.document(passage.text)[: PASSAGE_TOKENS + 1]
            prompt, target = tuple(ids[:1]), tuple(ids[1:])
        target = target[: max_positions - len(prompt)] if max_positions is not None else target
        if target and len(prompt) < (max_positions or len(prompt) + 1):
            examples.append(Example(number, prompt, target, query=passage.query, source=passage.kind))
    return [e for e in examples if vocab_size is None or max(e.prompt_ids + e.target_ids) < vocab_size]
