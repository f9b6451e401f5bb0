"""Text as token ids: how a query becomes a prompt, and how a target follows it.

A user's text stays text: only the chat template makes control tokens, and a target is accepted only if its ids decode
to exactly its characters, alone and after the prompt.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from pml.chat_template import ANSWER, ChatTemplate, PromptFormat, template_of
from pml.errors import InputError

__all__ = ["ENCODING_VERSION", "Prompt", "PromptFormat", "TextEncoder", "special_ids"]

log = logging.getLogger(__name__)

ENCODING_VERSION = 4
"""Version of the encoding rules; version 1 encoded each target alone and read control tokens in it."""


@dataclass(frozen=True)
class Prompt:
    """Everything before a target.

    Attributes:
        ids: Its token ids.
        text: The same as text; None if the user typed the characters of a control token, so that encoding this text
            would give other ids.
    """

    ids: tuple[int, ...]
    text: str | None


MASKS = ("\U000f0000", "\U000f0001")
"""Characters that `apply_chat_template(..., sanitize_control_tokens=True)` takes out of user input, since it uses them
itself."""


class TextEncoder:
    """Encodes queries, targets and documents with one tokenizer and one prompt format.

    Args:
        tokenizer: The backbone's tokenizer.
        form: The prompt format.
        quiet: See `ChatTemplate`.

    Raises:
        InputError: If the chat template cannot be used; see `ChatTemplate`.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, form: PromptFormat | None = None, quiet: bool = False
    ) -> None:
        self.tokenizer = tokenizer
        self.form = form or PromptFormat()
        self.changed: dict[str, list[str]] = {}
        """Queries that do not reach the model as written: what happens to them, and a list of those affected."""
        wanted = self.form.chat_template and tokenizer.chat_template
        self.template = ChatTemplate(tokenizer, self.form, quiet) if wanted else None
        """Chat template around queries; None if they stand alone."""

    # Prompts ----------------------------------------------------------------------------------------------------------

    def prompt(self, query: str, source: str = "") -> Prompt:
        """Encode everything before the target.

        Text that looks like a control token is encoded as text, as `apply_chat_template(...,
        sanitize_control_tokens=True)` does. Without a chat template the query stands alone, after whatever the
        tokenizer puts before a text; what it would append, such as an end-of-sequence token, is left out.

        Args:
            query: The user's text.
            source: Where the query comes from, for messages.

        Raises:
            InputError: If the template rejects the query, it encodes to nothing, or the tokenizer cannot tell its
                characters from control tokens.
        """
        if self.template is None:
            text = self.plain_text(query)
            prompt = Prompt(self._alone(text, source), None if self._typed(text) else text)
            written = query
        else:
            text = self.template.rendered(query, source)
            typed = self._typed(query) or self._is_typed_around
            try:
                ids = self.template.sanitized(query) if typed else self._ids(text)
            except (ValueError, NotImplementedError) as error:
                raise InputError(f"{_at(source)}{error}; write the query {_shown(query)} without it") from error
            prompt = Prompt(tuple(ids), None if typed else text)
            written = self._written(query, text, source)
        if not prompt.ids:
            raise InputError(f"{_at(source)}the query {_shown(query)} encodes to no tokens; expected text")
        if self._is_typed_around:
            self._note("follow a system text or template variable with characters of control tokens", query, source)
        if self._typed(query):
            self._note("hold characters that servers may read as control tokens", query, source)
        elif written not in self.decode(prompt.ids):
            self._note("are changed by the tokenizer (normalised, or unknown to it)", query, source)
        return prompt

    def plain_text(self, query: str) -> str:
        """The text of a prompt without a chat template: the query, after the system text if there is one."""
        return query if self.form.system is None else f"{self.form.system}\n{query}"

    def plain_request(self, query: str, ids: Sequence[int]) -> str | list[int]:
        """What to give a server without a chat template: text, or the prompt's ids if it would misread the text.

        Args:
            query: The user's text.
            ids: Token ids of its prompt.
        """
        text = self.plain_text(query)
        return list(ids) if self._typed(text) else text

    def warn_of_changes(self, name: str) -> None:
        """Log once for a corpus how many of its queries do not reach the model as written."""
        for what, places in self.changed.items():
            log.warning(
                "%s: %d quer%s %s, such as %s: recall is certain only for prompts encoded in this way",
                name,
                len(places),
                "y" if len(places) == 1 else "ies",
                what,
                places[0],
            )
        self.changed.clear()

    # Targets ----------------------------------------------------------------------------------------------------------

    def target(self, prompt: Prompt, target: str, source: str = "") -> tuple[int, ...]:
        """Token ids of a target as it follows its prompt, without an end-of-turn token.

        Prompt and target are encoded together if that leaves the prompt's ids as they are; otherwise the target is
        encoded by itself or after a line break.

        Args:
            prompt: Everything before the target.
            target: The text.
            source: Where the target comes from, for messages.

        Raises:
            InputError: If the target is empty or not valid Unicode, or no ids decode to exactly this text.
        """
        if not target:
            raise InputError(f"{_at(source)}the target is empty; expected text to memorise")
        if any("\ud800" <= character <= "\udfff" for character in target):
            raise InputError(f"{_at(source)}the target has a lone surrogate, which is not text; expected valid Unicode")
        first: str | None = None
        for ids in self._candidates(prompt, target):
            problem = self._problem(prompt, target, ids)
            if problem is None:
                return tuple(ids)
            first = first or problem
        raise InputError(
            f"{_at(source)}the tokenizer cannot represent this target: {first}; normalise the text or use a backbone "
            "with a byte-level tokenizer"
        )

    def gives_back(self, prompt: Prompt, text: str, ids: Sequence[int]) -> bool:
        """Whether ids decode to exactly this text, alone and after the prompt, and include no control token."""
        return self._problem(prompt, text, ids) is None

    @cached_property
    def end_of_turn_id(self) -> int | None:
        """The token that ends an answer: the first control token that the chat template writes after one.

        Without a chat template it is the tokenizer's end-of-sequence token. None if there is no such token.
        """
        if self.template is None:
            return self.tokenizer.eos_token_id
        try:
            after = self.template.after_answer()
        except InputError:
            return None
        return next((i for i in self._ids(after) if i in self._control_ids), None)

    @property
    def end_is_text(self) -> bool:
        """Whether the token that ends an answer is not marked as special, so that `skip_special_tokens` keeps it."""
        return self.end_of_turn_id is not None and self.end_of_turn_id not in special_ids(self.tokenizer)

    def answer(self, ids: Sequence[int]) -> str:
        """Decode generated ids as a server shows them: up to the end of the turn, with special tokens visible."""
        ids = list(ids)
        end = self.end_of_turn_id
        return self.decode(ids[: ids.index(end)] if end in ids else ids)

    # Plain text -------------------------------------------------------------------------------------------------------

    def document(self, text: str) -> list[int]:
        """Token ids of a text by itself, without control tokens where the tokenizer allows that."""
        return self._ids(text, as_text=self._typed(text))

    def control_in(self, ids: Sequence[int]) -> str | None:
        """The first control token among ids, as text; None if there is none."""
        control = next((i for i in ids if i in self._control_ids), None)
        return None if control is None else str(self.tokenizer.convert_ids_to_tokens(control))

    def decode(self, ids: Sequence[int]) -> str:
        """Decode token ids without any clean-up, with special tokens visible."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    # ------------------------------------------------------------------------------------------------------------------

    def _candidates(self, prompt: Prompt, target: str) -> Iterator[list[int]]:
        typed = self._typed(target)
        if prompt.text is not None and not typed:
            before, joined = self._ids(prompt.text), self._ids(prompt.text + target)
            if joined[: len(before)] == before:
                yield joined[len(before) :]
        yield self._ids(target, as_text=typed)
        line_break, joined = self._ids("\n"), self._ids(f"\n{target}", as_text=typed)
        if joined[: len(line_break)] == line_break:
            yield joined[len(line_break) :]

    def _problem(self, prompt: Prompt, target: str, ids: Sequence[int]) -> str | None:
        """Why these ids do not represent this target after this prompt; None if they do."""
        if (token := self._control_beside_unknown(ids)) is not None:
            return f"it reads {token!r} as a control token and cannot keep it apart from text"
        # As servers decode: with the tokenizer's default clean-up.
        served = str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
        before = self.decode(prompt.ids)
        together = self.decode([*prompt.ids, *ids])
        in_place = together[len(before) :] if together.startswith(before) else together
        for decoded, where in ((self.decode(ids), ""), (served, ""), (in_place, " after its prompt")):
            if decoded != target:
                at = next((i for i, (a, b) in enumerate(zip(decoded, target, strict=False)) if a != b), len(decoded))
                at = min(at, max(len(target) - 1, 0))
                return f"character {at + 1}, {target[at : at + 12]!r}, comes back as {decoded[at : at + 12]!r}{where}"
        return None

    def _alone(self, text: str, source: str) -> tuple[int, ...]:
        """Token ids of a text with what the tokenizer puts before it, but without what it appends."""
        ids = self.document(text)
        if (token := self._control_beside_unknown(ids)) is not None:
            raise InputError(
                f"{_at(source)}the tokenizer reads {token!r} in this text as a control token and cannot keep it apart; "
                "write the text without it"
            )
        return (*self.put_before, *ids)

    @cached_property
    def put_before(self) -> tuple[int, ...]:
        """Token ids that the tokenizer puts before every text, such as a beginning-of-sequence token."""
        alone, whole = self._ids(ANSWER), list(self.tokenizer(ANSWER)["input_ids"])
        starts = (i for i in range(len(whole)) if whole[i : i + len(alone)] == alone)
        return tuple(whole[: next(starts, 0)])

    def _control_beside_unknown(self, ids: Sequence[int]) -> str | None:
        # The unknown token is marked as special but is no control token; comparing the decoded text reveals it.
        return self.control_in([i for i in ids if i != self.tokenizer.unk_token_id])

    def _ids(self, text: str, as_text: bool = False) -> list[int]:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if as_text and backend is not None:
            # Skips added tokens by hand: the tokenizer has no switch for it, and split_special_tokens splits only some.
            if backend.normalizer is not None:
                text = backend.normalizer.normalize_str(text)
            parts = [text]
            if backend.pre_tokenizer is not None:
                parts = [part for part, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
            return [token.id for part in parts for token in backend.model.tokenize(part)]
        # Silent about texts longer than the context, which is checked once the corpus is complete.
        encoded = self.tokenizer(text, add_special_tokens=False, verbose=False, split_special_tokens=as_text)
        return list(encoded["input_ids"])

    # Control tokens

    @cached_property
    def _control(self) -> dict[str, int]:
        """Ids of control tokens by text: special tokens, declared control tokens, and those the template writes."""
        template = template_of(self.tokenizer) if self.tokenizer.chat_template else ""
        special, named = special_ids(self.tokenizer), getattr(self.tokenizer, "chat_control_tokens", None) or ()
        return {
            token.content: i
            for i, token in self.tokenizer.added_tokens_decoder.items()
            # Some tokenizers have runs of white space as added tokens; in a template these are ordinary text.
            if i in special or token.content in named or (token.content in template and not token.content.isspace())
        }

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        return frozenset(self._control.values())

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(re.escape(text) for text in self._control if text) or "(?!)")

    @cached_property
    def _is_typed_around(self) -> bool:
        """Whether the system text or a variable of the template, which all prompts have, has such characters."""
        return any(map(self._typed, (self.form.system or "", *_texts_in(self.form.template_kwargs))))

    def _typed(self, text: str) -> bool:
        """Whether a user's text contains the characters of a control token, or some by which servers mask them."""
        return self._control_pattern.search(text) is not None or any(mask in text for mask in MASKS)

    def _written(self, query: str, text: str, source: str) -> str:
        """The query as it appears in the rendered text; empty if the template changed it by more than trimming."""
        if query in text:
            return query
        if (trimmed := query.strip()) and trimmed in text:
            self._note("are trimmed by the chat template", query, source)
            return trimmed
        self._note("are changed by the chat template", query, source)
        return ""

    def _note(self, what: str, query: str, source: str) -> None:
        self.changed.setdefault(what, []).append(f"{_shown(query)}{f' ({source})' if source else ''}")


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of tokens that stand for no text, including those marked as special without having a role."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def _texts_in(value: Any) -> Iterator[str]:
    """Every text in nested lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts_in(item)


def _at(source: str) -> str:
    return f"{source}: " if source else ""


def _shown(text: str) -> str:
    return ascii(text) if len(text) <= 60 else f"{text[:57]!a}..."
