"""The text around a query: a tokenizer's chat template, with a fixed date where it reads the clock."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any

from transformers import PreTrainedTokenizerBase

from pml.errors import InputError

__all__ = ["ANSWER", "ChatTemplate", "PromptFormat", "template_of"]

log = logging.getLogger(__name__)

ANSWER = "\N{BLACK SQUARE}"
"""Placeholder text, for finding out what a template or a tokenizer writes around it."""

CLOCK = re.compile(r"\bstrftime_now\s*\(")
CLOCK_WITH_FORMAT = re.compile(r"""\bstrftime_now\s*\(\s*(['"])((?:(?!\1).)*)\1\s*\)""")

TAKEN = ("messages", "conversation", "add_generation_prompt", "tools", "documents", "chat_template", "tokenize")
"""Names that a chat template's variables cannot have, since they are arguments of `apply_chat_template`."""


@dataclass(frozen=True)
class PromptFormat:
    """The format of prompts. A certificate holds only for prompts in the format it was made with.

    Args:
        chat_template: Put the query into the tokenizer's chat template as a user turn, if the tokenizer has one.
        system: Text of a system turn before the query; None leaves that to the template.
        template_kwargs: Variables of the chat template, such as `enable_thinking: false`.
        template_date: Day, as YYYY-MM-DD, that replaces today's date in a template that reads the clock.

    Raises:
        InputError: If a variable has a reserved name, or the date is not valid.
    """

    chat_template: bool = True
    system: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    # The date that Llama 3.1's template writes when it has no clock.
    template_date: str = "2024-07-26"

    def __post_init__(self) -> None:
        if taken := [name for name in self.template_kwargs if name in TAKEN]:
            raise InputError(
                f"template_kwargs has {taken[0]!r}, which pml sets itself; expected variables of the template"
            )
        try:
            date.fromisoformat(self.template_date)
        except (TypeError, ValueError) as error:
            raise InputError(f"template_date is {self.template_date!r}; expected a day such as 2024-07-26") from error


class ChatTemplate:
    """Renders queries through a tokenizer's chat template.

    Args:
        tokenizer: A tokenizer with a chat template.
        form: The system turn, the template's variables and the date.
        quiet: Do not warn of what servers must do to make the same prompts.

    Raises:
        InputError: If the template leaves out the user's text, rejects or leaves out a requested system turn, or reads
            the clock in a way that cannot be fixed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, form: PromptFormat, quiet: bool = False) -> None:
        self.tokenizer, self.form, self._quiet = tokenizer, form, quiet
        self.shows_date = False
        """Whether prompts contain the fixed date, because the template reads the clock."""
        self.fixed_dates: dict[str, str] = {}
        """Each call to the clock in the tokenizer's template, and what prompts have in its place."""
        self._parts = False
        self._template = self._without_clock(template_of(tokenizer))
        self._choose_content()

    def turns(self, query: str) -> list[dict[str, Any]]:
        """Messages for `apply_chat_template` that ask a query."""
        system = self.form.system
        turns = [] if system is None else [{"role": "system", "content": self._content(system)}]
        return [*turns, {"role": "user", "content": self._content(query)}]

    @property
    def options_elsewhere(self) -> dict[str, Any]:
        """Arguments that a server must give `apply_chat_template`: variables, and the template if a date was fixed."""
        fixed = {"chat_template": self._template} if self.shows_date else {}
        return {**self.form.template_kwargs, **fixed}

    def rendered(self, query: str, source: str = "") -> str:
        """The prompt for a query as text.

        Raises:
            InputError: If the template rejects the query.
        """
        return self._rendered(self.turns(query), source)

    def after_answer(self) -> str:
        """Text that the template writes after an answer."""
        turns = [*self.turns("?"), {"role": "assistant", "content": self._content(ANSWER)}]
        _, written, after = self._rendered(turns, "", generation=False).rpartition(ANSWER)
        return after if written else ""

    def sanitized(self, query: str) -> list[int]:
        """Token ids of the prompt, with control tokens typed in the query encoded as text.

        Raises:
            ValueError: If the tokenizer cannot tell typed control tokens from the template's; or NotImplementedError.
        """
        ids: Any = self.tokenizer.apply_chat_template(
            self.turns(query), **self._options, return_dict=False, sanitize_control_tokens=True
        )
        return list(ids)

    def _choose_content(self) -> None:
        """Find out in which form the template takes a message's content, and whether it takes a system turn."""
        for self._parts in (False, True):
            try:
                if ANSWER in self.rendered(ANSWER):
                    break
            except InputError:
                if not self._parts:
                    continue
                raise
        else:
            raise InputError(
                "the chat template does not write what the user says, so all queries would give the same prompt; use "
                "a backbone with another template, or `pml fit` with --data.chat_template false"
            )
        if self._parts and not self._quiet:
            log.warning("the chat template takes message content as a list of parts; servers must send it in that form")
        system = self.form.system
        if system is not None and system.strip() not in self.rendered(ANSWER):
            raise InputError("the chat template does not write the system text; leave system out")

    def _content(self, text: str) -> Any:
        return [{"type": "text", "text": text}] if self._parts else text

    @property
    def _options(self) -> dict[str, Any]:
        return {**self.form.template_kwargs, "chat_template": self._template, "add_generation_prompt": True}

    def _rendered(self, turns: Sequence[dict[str, Any]], source: str, generation: bool = True) -> str:
        options = {**self._options, "add_generation_prompt": generation}
        try:
            return str(self.tokenizer.apply_chat_template(list(turns), **options, tokenize=False))
        # Templates are programs and can raise anything.
        except Exception as error:
            reason, at = " ".join(str(error).split()) or type(error).__name__, f"{source}: " if source else ""
            if turns[0]["role"] == "system" and self._renders(turns[1:], generation):
                raise InputError(
                    f"{at}this backbone's chat template takes no system turn ({reason}); leave system out"
                ) from error
            raise InputError(f"{at}the chat template refuses this prompt: {reason}") from error

    def _renders(self, turns: Sequence[dict[str, Any]], generation: bool) -> bool:
        try:
            self._rendered(turns, "", generation)
        except InputError:
            return False
        return True

    def _without_clock(self, template: str) -> str:
        """The template with the fixed date in place of each call to the clock."""
        day = date.fromisoformat(self.form.template_date)
        self.fixed_dates = {call[0]: repr(day.strftime(call[2])) for call in CLOCK_WITH_FORMAT.finditer(template)}
        fixed = CLOCK_WITH_FORMAT.sub(lambda call: self.fixed_dates[call[0]], template)
        if CLOCK.search(fixed):
            raise InputError(
                "the chat template reads the clock in a way that cannot be fixed, so prompts would differ from day to "
                "day; use a backbone with another template, or `pml fit` with --data.chat_template false"
            )
        self.shows_date = fixed != template and self._differs_by_date(fixed, template)
        if self.shows_date and not self._quiet:
            log.warning(
                "the chat template writes the date; prompts say %s (template_date): give servers the same date, or "
                "their prompts change every day",
                self.form.template_date,
            )
        return fixed

    def _differs_by_date(self, fixed: str, template: str) -> bool:
        """Whether the date reaches a prompt; the template's variables may switch it off."""
        other = CLOCK_WITH_FORMAT.sub(lambda _: repr("another day"), template)
        shown = []
        for text in (fixed, other):
            self._template = text
            try:
                shown.append(self.rendered(ANSWER))
            except InputError:
                return True
        return shown[0] != shown[1]


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's chat template; if it has several, the one named `default`."""
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise InputError(f"the tokenizer has several chat templates, none of them the default: {error}") from error
