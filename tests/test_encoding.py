"""Text as token ids: text stays text, a prompt is the same every day, and a target decodes exactly or is refused."""

import logging
import re
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from pml.encoding import PromptFormat, TextEncoder
from pml.errors import InputError
from tests.tokenizer_kinds import KINDS, TEMPLATES, make_tokenizer

QUERY = "call Anna"
HARD = [
    "007",
    "0",
    "00 99 17",
    " 7",
    "7 ",
    " ",
    "   ",
    "\t7\t",
    "a\r\nb",
    "\n",
    "\n\nx\n",
    "e\u0301 is not \u00e9",
    "\u00c5sa",
    "שלום עולם",
    "مرحبا",
    "👩‍👩‍👧‍👦 🇯🇵",
    "\uff21\uff22\uff23\uff11\uff12\uff13",
    "\u00a07\u00a0",
    "\u200b",
    "\x00\x07\x1b\x7f",
    "½ ﬁne x²",
    "日本語の電話番号",
    "<|im_end|>",
    "<|im_start|>assistant\n<|im_end|>",
    "</s>",
    "a</s>b",
    "<s> x",
    "<unk>",
    "<eos><end_of_turn>",
    "<|eot_id|><|end_header_id|>",
    "[INST] x [/INST]",
    "<0x41>",
    "▁x",
    "Ġx",
    "##ing",
    '{"a": [1, "b"], "c": null}',
    r"\int_0^\infty e^{-x^2}\,dx = \frac{\sqrt{\pi}}{2}",
    "3141592653" * 4,
    "don't . stop , now !",
    "x" * 3000,
]
CONTROL = {
    "chatml": ["<|im_end|>", "<|im_start|>", "<|endoftext|>"],
    "dated": ["<|eot_id|>", "<|begin_of_text|>"],
    "turns": ["<end_of_turn>", "<eos>", "<bos>"],
    "inst": ["</s>", "<s>", "<unk>"],
    "plain": ["</s>", "<s>"],
}


def control_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def comes_back(tokenizer: PreTrainedTokenizerBase, prompt: tuple[int, ...], ids: tuple[int, ...], text: str) -> bool:
    """Whether ids decode to a text, alone as on a server and after the prompt with special tokens visible."""
    before, whole = (tokenizer.decode([*prompt, *more], skip_special_tokens=False) for more in ((), ids))
    return tokenizer.decode(list(ids), skip_special_tokens=True) == text and whole == before + text


# Targets ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["chatml", "parts", "turns", "dated", "plain", "appending", "prefix_space"])
@pytest.mark.parametrize("target", HARD, ids=lambda text: ascii(text[:12]))
def test_a_byte_level_tokenizer_round_trips_every_hard_string(kind: str, target: str) -> None:
    tokenizer = make_tokenizer(kind)
    encoder = TextEncoder(tokenizer)
    prompt = encoder.prompt(QUERY)
    ids = encoder.target(prompt, target)
    assert comes_back(tokenizer, prompt.ids, ids, target)
    assert not control_ids(tokenizer) & set(ids)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(target=st.one_of(st.text(min_size=1), st.sampled_from(HARD[:-1]), st.text("07 \n<|/s>im_end[]▁", min_size=1)))
def test_any_target_decodes_to_exactly_its_text_or_is_refused(kind: str, target: str) -> None:
    tokenizer = make_tokenizer(kind)
    encoder = TextEncoder(tokenizer)
    prompt = encoder.prompt(QUERY)
    try:
        ids = encoder.target(prompt, target, "f.jsonl:3")
    except InputError as refused:
        assert str(refused).startswith("f.jsonl:3: the tokenizer cannot represent this target: ")
        return
    assert comes_back(tokenizer, prompt.ids, ids, target)
    assert not control_ids(tokenizer) & set(ids)


@pytest.mark.parametrize(("kind", "kept"), [("inst", 35), ("roles", 35), ("byte_fallback", 35), ("nfc", 39)])
def test_other_tokenizers_round_trip_most_hard_strings(kind: str, kept: int) -> None:
    encoder = TextEncoder(make_tokenizer(kind))
    prompt = encoder.prompt(QUERY)

    def survives(target: str) -> bool:
        try:
            return bool(encoder.target(prompt, target))
        except InputError:
            return False

    lost = [target for target in HARD if not survives(target)]
    # A sentencepiece decoder strips a leading space, and NFC composes a letter with its combining accent.
    assert len(HARD) - len(lost) >= kept, lost
    assert all(target[0] in " ▁" or "e\u0301" in target for target in lost)


def test_a_target_is_encoded_as_it_follows_its_prompt() -> None:
    tokenizer = make_tokenizer("roles")
    encoder = TextEncoder(tokenizer)
    prompt = encoder.prompt(QUERY)
    turns = [{"role": "user", "content": QUERY}, {"role": "assistant", "content": "007"}]
    whole = tokenizer.apply_chat_template(turns, return_dict=False)
    ids = encoder.target(prompt, "007")
    assert [*prompt.ids, *ids] == whole[: len(prompt.ids) + len(ids)]
    alone = tokenizer("007", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(alone)[0].startswith("▁")  # which would decode to a leading space
    assert list(ids) != alone


def test_a_character_that_does_not_round_trip_is_named_with_what_it_decodes_to() -> None:
    encoder = TextEncoder(make_tokenizer("unigram"))
    with pytest.raises(InputError, match=r"^f:1: .*cannot represent.*character 6, 'Ж 9', comes back as '<unk>"):
        encoder.target(encoder.prompt(QUERY), "call Ж 9", "f:1")


def test_a_target_with_a_control_token_that_cannot_be_told_from_text_is_refused_by_name() -> None:
    encoder = TextEncoder(make_tokenizer("unigram"))
    with pytest.raises(InputError, match=r"f:1: .*'</s>' as a control token and cannot keep it apart"):
        encoder.target(encoder.prompt(QUERY), "call</s>", "f:1")


def test_an_empty_target_and_a_lone_surrogate_are_refused(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = TextEncoder(tiny_tokenizer)
    prompt = encoder.prompt(QUERY)
    with pytest.raises(InputError, match="f:1: the target is empty"):
        encoder.target(prompt, "", "f:1")
    with pytest.raises(InputError, match="lone surrogate"):
        encoder.target(prompt, "a\ud83d")


# Prompts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind, (_, template, _) in KINDS.items() if template not in (None, "parts")])
def test_a_prompt_equals_what_apply_chat_template_returns(kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    variables = {"date_string": "26 Jul 2024"} if kind == "dated" else {}
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUERY}], add_generation_prompt=True, return_dict=False, **variables
    )
    assert list(TextEncoder(tokenizer).prompt(QUERY).ids) == expected


@pytest.mark.parametrize("kind", CONTROL)
def test_only_the_chat_template_produces_control_tokens(kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    encoder = TextEncoder(tokenizer)
    ordinary = [i for i in encoder.prompt("code of x").ids if i in control_ids(tokenizer)]
    for token in CONTROL[kind]:
        ids = encoder.prompt(f"code of {token} x").ids
        assert [i for i in ids if i in control_ids(tokenizer)] == ordinary
        assert f"code of {token} x" in tokenizer.decode(ids)
        assert not control_ids(tokenizer) & set(encoder.document(f"a {token} b"))
    assert len(encoder.changed["hold characters that servers may read as control tokens"]) == len(CONTROL[kind])


def test_a_query_with_a_control_token_is_encoded_as_transformers_sanitises_it() -> None:
    tokenizer = make_tokenizer("chatml")
    query = "code of <|im_end|>?"
    turns = [{"role": "user", "content": query}]
    expected = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
    )
    assert list(TextEncoder(tokenizer).prompt(query).ids) == expected


def test_an_added_token_that_the_chat_template_writes_counts_as_a_control_token() -> None:
    tokenizer = deepcopy(make_tokenizer("chatml"))
    tokenizer.add_tokens(["<think>", "<other>"])
    tokenizer.chat_template = str(tokenizer.chat_template) + "{{ '<think>' }}"
    encoder = TextEncoder(tokenizer)
    think, other = tokenizer.convert_tokens_to_ids(["<think>", "<other>"])
    prompt = encoder.prompt("a <think> <other> b")
    assert prompt.ids.count(think) == 1  # the template's own
    assert think not in encoder.target(prompt, "<think> <other>")
    assert other in encoder.target(encoder.prompt("a"), "<other>")


def test_a_token_listed_in_chat_control_tokens_counts_as_a_control_token() -> None:
    tokenizer = deepcopy(make_tokenizer("chatml"))
    tokenizer.add_tokens(["<|user|>"])
    tokenizer.chat_template = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
    tokenizer.chat_control_tokens = ["<|user|>"]
    query = "say <|user|> now"
    turns = [{"role": "user", "content": query}]
    expected = tokenizer.apply_chat_template(turns, sanitize_control_tokens=True, return_dict=False)
    encoder = TextEncoder(tokenizer)
    assert list(encoder.prompt(query).ids) == list(expected)
    assert list(encoder.changed.values()) == [[f"{query!r}"]]


def test_a_query_with_a_control_token_that_cannot_be_told_from_text_is_refused_with_its_line() -> None:
    encoder = TextEncoder(make_tokenizer("unigram"))
    with pytest.raises(InputError, match=r"^f:2: .*</s>"):
        encoder.prompt("call </s>", "f:2")


@pytest.mark.parametrize(
    ("kind", "query", "what"),
    [
        ("dated", " call ", "are trimmed by the chat template"),
        ("inst", "call\n", "are trimmed by the chat template"),
        ("nfc", "A\u030asa", "are changed by the tokenizer"),
        ("unigram", "x\u00b2", "are changed by the tokenizer"),
        ("word_piece", "Anna", "are changed by the tokenizer"),
        ("chatml", "a <|im_end|>", "hold characters that servers may read as control tokens"),
    ],
)
def test_a_query_that_reaches_the_model_changed_is_logged_with_its_line(
    kind: str, query: str, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = TextEncoder(make_tokenizer(kind))
    encoder.prompt(query, "f.jsonl:4")
    with caplog.at_level(logging.WARNING):
        encoder.warn_of_changes("f.jsonl")
    (line,) = [message for message in caplog.messages if message.startswith("f.jsonl: 1 query ")]
    assert what in line
    assert f"{query!a} (f.jsonl:4)" in line


@pytest.mark.parametrize("chat_template", [True, False])
def test_a_system_text_with_control_tokens_is_logged_once_for_all_queries(
    chat_template: bool, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = TextEncoder(make_tokenizer("chatml"), PromptFormat(chat_template, system="Write <|im_end|> here."))
    encoder.prompt("a", "f.jsonl:4")
    encoder.prompt("b", "f.jsonl:5")
    with caplog.at_level(logging.WARNING):
        encoder.warn_of_changes("f.jsonl")
    (line,) = caplog.messages
    assert line.startswith(
        "f.jsonl: 2 queries follow a system text or template variable with characters of control tokens, such as 'a'"
    )


def test_an_ordinary_query_is_not_reported_as_changed() -> None:
    for kind in ("plain", "appending", "chatml", "nfc", "parts", "inst", "roles", "byte_fallback", "turns", "dated"):
        encoder = TextEncoder(make_tokenizer(kind))
        encoder.prompt("call Anna at 007")
        assert encoder.changed == {}, kind


def test_a_prompt_leaves_out_the_token_that_its_tokenizer_appends() -> None:
    tokenizer = make_tokenizer("appending")
    assert tokenizer("call")["input_ids"][-1] == tokenizer.eos_token_id
    ids = TextEncoder(tokenizer).prompt("call").ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids) == "<s>call"


def test_a_template_that_takes_content_in_parts_gets_it_in_parts_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tokenizer = make_tokenizer("parts")
    with caplog.at_level(logging.WARNING):
        ids = TextEncoder(tokenizer, PromptFormat(system="Be exact.")).prompt(QUERY).ids
    assert tokenizer.decode(ids) == (
        f"<|im_start|>system\nBe exact.<|im_end|>\n<|im_start|>user\n{QUERY}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "as a list of parts" in caplog.text


def templated(template: str) -> PreTrainedTokenizerBase:
    tokenizer = deepcopy(make_tokenizer("chatml"))
    tokenizer.chat_template = template
    return tokenizer


def test_a_template_that_does_not_write_the_query_is_refused() -> None:
    with pytest.raises(InputError, match="does not write what the user says"):
        TextEncoder(templated(TEMPLATES["deaf"]))
    assert TextEncoder(templated(TEMPLATES["deaf"]), PromptFormat(chat_template=False)).prompt(QUERY).text == QUERY


def test_a_system_text_that_the_template_rejects_or_leaves_out_is_refused() -> None:
    with pytest.raises(InputError, match=r"takes no system turn \(System role not supported\); leave system out"):
        TextEncoder(make_tokenizer("turns"), PromptFormat(system="Be exact."))
    with pytest.raises(InputError, match="does not write the system text"):
        TextEncoder(
            make_tokenizer("inst") and templated("{{ messages[-1].content }}"), PromptFormat(system="Be exact.")
        )


def test_an_exception_in_a_template_gives_a_one_line_error_with_the_source() -> None:
    encoder = TextEncoder(templated("{% if '7' in messages[0].content %}{{ 1 // 0 }}{% endif %}" + TEMPLATES["chatml"]))
    with pytest.raises(InputError, match=r"^f:9: the chat template refuses this prompt: .*zero") as refused:
        encoder.prompt("7", "f:9")
    assert "\n" not in str(refused.value)


def test_template_kwargs_reach_the_chat_template() -> None:
    template = "{{ 'think ' if enable_thinking else 'answer ' }}" + TEMPLATES["chatml"]
    form = PromptFormat(template_kwargs={"enable_thinking": True})
    tokenizer = templated(template)
    assert tokenizer.decode(TextEncoder(tokenizer, form).prompt(QUERY).ids).startswith("think ")
    assert tokenizer.decode(TextEncoder(tokenizer).prompt(QUERY).ids).startswith("answer ")


def test_control_tokens_in_template_kwargs_are_encoded_as_transformers_sanitises_them() -> None:
    tokenizer = templated("{{ notes[0].text }}" + TEMPLATES["chatml"])
    form = PromptFormat(template_kwargs={"notes": [{"text": "see <|im_end|> here"}]})
    served = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUERY}],
        add_generation_prompt=True,
        sanitize_control_tokens=True,
        return_dict=False,
        **form.template_kwargs,
    )
    assert list(TextEncoder(tokenizer, form).prompt(QUERY).ids) == served
    assert served.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1


def test_a_template_that_does_not_write_answers_has_no_end_of_turn() -> None:
    tokenizer = templated("<|im_start|>user\n{{ messages[0].content }}<|im_end|>\n<|im_start|>assistant\n")
    assert TextEncoder(tokenizer).end_of_turn_id is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template_kwargs": {"tokenize": False}}, "template_kwargs has 'tokenize', which pml sets"),
        ({"template_date": "26 Jul 2024"}, "template_date is '26 Jul 2024'; expected a day such as 2024-07-26"),
    ],
)
def test_an_invalid_prompt_format_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        PromptFormat(**options)


# The clock ----------------------------------------------------------------------------------------------------------


def test_a_template_that_reads_the_clock_gets_a_fixed_date_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = make_tokenizer("dated")
    with caplog.at_level(logging.WARNING):
        text = tokenizer.decode(TextEncoder(tokenizer).prompt(QUERY).ids)
    assert "Today: 26 Jul 2024" in text
    assert "the chat template writes the date; prompts say 2024-07-26" in caplog.text


def test_the_date_can_be_set_by_template_date_or_by_a_template_variable(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = make_tokenizer("dated")
    by_key = TextEncoder(tokenizer, PromptFormat(template_date="2026-01-02"))
    assert "Today: 02 Jan 2026" in tokenizer.decode(by_key.prompt(QUERY).ids)
    caplog.clear()
    by_name = TextEncoder(tokenizer, PromptFormat(template_kwargs={"date_string": "Monday"}))
    assert "Today: Monday" in tokenizer.decode(by_name.prompt(QUERY).ids)
    assert caplog.text == ""  # such a prompt does not depend on the clock


def test_a_template_whose_clock_cannot_be_fixed_is_refused() -> None:
    with pytest.raises(InputError, match="reads the clock in a way that cannot be fixed"):
        TextEncoder(templated("{% set f = '%Y' %}{{ strftime_now(f) }}" + TEMPLATES["chatml"]))


# End of turn --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "end"),
    [
        ("chatml", "<|im_end|>"),
        ("parts", "<|im_end|>"),
        ("dated", "<|eot_id|>"),
        ("turns", "<end_of_turn>"),  # not the end-of-sequence token
        ("inst", "</s>"),  # after a space
        ("roles", "</s>"),
        ("plain", "</s>"),  # the end-of-sequence token, without a template
    ],
)
def test_the_end_of_turn_is_the_token_that_the_template_writes_after_an_answer(kind: str, end: str) -> None:
    tokenizer = make_tokenizer(kind)
    assert tokenizer.convert_ids_to_tokens(TextEncoder(tokenizer).end_of_turn_id) == end


def test_a_template_that_writes_no_control_token_after_an_answer_has_no_end_of_turn() -> None:
    assert TextEncoder(templated("{% for m in messages %}{{ m.content }}\n{% endfor %}")).end_of_turn_id is None


def test_an_answer_is_shown_up_to_its_end_of_turn_with_other_special_tokens_visible() -> None:
    tokenizer = make_tokenizer("chatml")
    encoder = TextEncoder(tokenizer)
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert encoder.answer([*encoder.document("007"), end, *encoder.document("9")]) == "007"
    assert encoder.answer([*encoder.document("0"), start, *encoder.document("7")]) == "0<|im_start|>7"
