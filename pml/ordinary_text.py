"""Ordinary text, which an adapter should leave unchanged: for the guard, the KL penalty, and measuring harm.

The package holds three files of prose, code and chats, without overlap. `texts/guard.jsonl` and `texts/penalty.jsonl`
were sampled from SmolLM2-135M-Instruct (Apache-2.0) at temperature 0.8. What they say is often wrong, which does not
matter: only the model's activations and predictions on them are used. `texts/harm.jsonl` was written for this project.
Chats are put into the backbone's chat template if it can be used, the other kinds are encoded without one.
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
"""Most tokens of a passage; of a chat, most tokens of the answer."""

PASSAGE_CHARACTERS = 640
"""Characters of a passage cut from a user's own text: with most tokenizers, rather more than `PASSAGE_TOKENS`."""

MOST_PASSAGES = 512
"""Most passages of a user's own text; more would change the principal directions little."""


@dataclass(frozen=True)
class Passage:
    """A piece of ordinary text.

    Attributes:
        kind: `prose`, `code` or `chat`; `text` if it came from a user's own file.
        text: The text; of a chat, the answer.
        query: The user's question in a chat, else empty.
    """

    kind: str
    text: str
    query: str = ""


def shipped_passages(*names: str) -> list[Passage]:
    """Passages of the packaged files of these names: `guard`, `penalty` or `harm`."""
    texts = [(files("pml") / "texts" / f"{name}.jsonl").read_text(encoding="utf-8") for name in names]
    return [Passage(**json.loads(line)) for text in texts for line in text.splitlines()]


def ordinary_passages(text: str | Iterable[str] | None, *shipped: str) -> list[Passage]:
    """Passages of the user's own files, or of the packaged files named in `shipped` if `text` is None.

    Raises:
        InputError: See `passages_of_files`.
    """
    if text is None:
        return shipped_passages(*shipped)
    return passages_of_files([text] if isinstance(text, str) else text)


def passages_of_files(paths: Iterable[str | Path]) -> list[Passage]:
    """Text files cut into passages; above `MOST_PASSAGES`, an evenly spaced selection of them.

    Raises:
        InputError: If a file cannot be read as UTF-8, or there is no text in any of them.
    """
    pieces: list[str] = []
    for path in map(Path, paths):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"ordinary text {path}: cannot be read ({error}); expected a UTF-8 text file") from error
        cut = (text[start : start + PASSAGE_CHARACTERS] for start in range(0, len(text), PASSAGE_CHARACTERS))
        pieces += [piece for piece in cut if piece.strip()]
    if not pieces:
        raise InputError("ordinary text: there is no text in it; expected text such as prose and code")
    step = max(1, -(-len(pieces) // MOST_PASSAGES))
    return [Passage("text", piece) for piece in pieces[::step]]


def text_examples(
    passages: Sequence[Passage],
    tokenizer: PreTrainedTokenizerBase,
    max_positions: int | None = None,
    vocab_size: int | None = None,
    form: PromptFormat | None = None,
) -> list[Example]:
    """Encode each passage as an example that begins as the tokenizer begins a text or, for a chat, with the query.

    The prompt of a passage is what the tokenizer puts before it, if anything, and otherwise its first token.

    Args:
        passages: Passages to encode.
        tokenizer: The backbone's tokenizer.
        max_positions: Context length in tokens; passages are cut to it, and left out if no target token remains.
        vocab_size: Number of token ids that the backbone knows; passages with other ids are left out.
        form: Prompt format of chats; None takes the default one.
    """
    plain = TextEncoder(tokenizer, PromptFormat(chat_template=False))
    try:
        chat = TextEncoder(tokenizer, form, quiet=True)
    except InputError:  # the user's own text does without this template, or fails with the same message
        chat = plain
    examples = []
    for number, passage in enumerate(passages):
        if passage.query:
            prompt = chat.prompt(passage.query).ids
            target = (*chat.document(passage.text)[:PASSAGE_TOKENS],)
        else:
            ids = [*plain.put_before, *plain.document(passage.text)]
            begin = len(plain.put_before) or 1
            prompt, target = tuple(ids[:begin]), tuple(ids[begin : begin + PASSAGE_TOKENS])
        target = target[: max_positions - len(prompt)] if max_positions is not None else target
        if target and len(prompt) < (max_positions or len(prompt) + 1):
            examples.append(Example(number, prompt, target, query=passage.query, source=passage.kind))
    return [e for e in examples if vocab_size is None or max(e.prompt_ids + e.target_ids) < vocab_size]
