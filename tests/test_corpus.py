"""Pairs as token ids: what is supervised, what comes back, and what cannot be represented."""

from collections.abc import Sequence
from copy import deepcopy
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pml.corpus import (
    GHOST,
    IGNORE_INDEX,
    Corpus,
    Example,
    Pair,
    collate,
    encode_pairs,
    encode_prompt,
    encode_target,
    end_of_turn_id,
)
from pml.errors import InputError

TEXT = st.text(min_size=1)
AWKWARD = [
    "👩‍👩‍👧‍👦 🇯🇵",  # one glyph of several code points
    "שלום עולם",  # right to left
    "e\u0301 is not \u00e9",  # combining mark, not normalised
    "\x00\x07\x1b\x7f",  # control characters
    " ",
    "\r\n\t\u2028",
    "x" * 100_000,
    "<|im_end|>",  # looks like a special token
]


@pytest.fixture
def plain_tokenizer(tiny_tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """One of the test's own, without a chat template."""
    tokenizer = deepcopy(tiny_tokenizer)
    tokenizer.chat_template = None
    return tokenizer


@pytest.fixture(scope="module")
def word_tokenizer() -> PreTrainedTokenizerBase:
    """Knows three words and no end of sequence."""
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "yes": 1, "no": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids)))


def test_a_batch_is_padded_on_the_right_and_labels_cover_exactly_the_targets() -> None:
    batch = collate([Example(7, (11, 12), (13, 14, 15)), Example(3, (21,), (22,)), GHOST])
    expected = {
        "input_ids": [[11, 12, 13, 14, 15], [21, 22, 0, 0, 0], [0, 0, 0, 0, 0]],
        "labels": [[-100, -100, 13, 14, 15], [-100, 22, -100, -100, -100], [-100] * 5],
        "lengths": [5, 2, 1],
        "example_id": [7, 3, -1],
    }
    assert batch.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(batch[name], torch.tensor(values))


def test_a_batch_of_ghosts_supervises_nothing() -> None:
    batch = collate([GHOST])
    assert batch["input_ids"].shape == (1, 1)
    assert (batch["labels"] == IGNORE_INDEX).all()


@settings(deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5),
    ids=st.randoms(use_true_random=False),
)
def test_prompt_and_target_can_be_read_back_from_a_batch(sizes: list[tuple[int, int]], ids: Random) -> None:
    examples = [
        Example(i, tuple(ids.randrange(99) for _ in range(p)), tuple(ids.randrange(99) for _ in range(t)))
        for i, (p, t) in enumerate(sizes)
    ]
    batch = collate(examples)
    for row, example in enumerate(examples):
        tokens = batch["input_ids"][row, : batch["lengths"][row]]
        labels = batch["labels"][row]
        assert tuple(tokens.tolist()) == example.prompt_ids + example.target_ids
        assert tuple(labels[labels != IGNORE_INDEX].tolist()) == example.target_ids
        assert (labels[: len(example.prompt_ids)] == IGNORE_INDEX).all()
        assert (labels[batch["lengths"][row] :] == IGNORE_INDEX).all()


@settings(deadline=None)
@given(target=TEXT)
def test_a_target_decodes_to_exactly_its_text(tiny_tokenizer: PreTrainedTokenizerBase, target: str) -> None:
    assert text_of(tiny_tokenizer, encode_target(tiny_tokenizer, target)) == target


@pytest.mark.parametrize("target", AWKWARD, ids=lambda text: ascii(text[:12]))
def test_awkward_text_decodes_exactly(tiny_tokenizer: PreTrainedTokenizerBase, target: str) -> None:
    assert text_of(tiny_tokenizer, encode_target(tiny_tokenizer, target)) == target


@settings(max_examples=50, deadline=None)
@given(pairs=st.lists(st.builds(Pair, query=TEXT, target=TEXT), min_size=1, max_size=4))
def test_encoded_and_collated_targets_decode_to_exactly_their_text(
    tiny_tokenizer: PreTrainedTokenizerBase, pairs: list[Pair]
) -> None:
    labels = collate(encode_pairs(pairs, tiny_tokenizer, end_of_turn=False))["labels"]
    decoded = [text_of(tiny_tokenizer, row[row != IGNORE_INDEX].tolist()) for row in labels]
    assert decoded == [pair.target for pair in pairs]


def test_a_query_becomes_a_user_turn_and_opens_the_answer(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = text_of(tiny_tokenizer, encode_prompt(tiny_tokenizer, "Who?"))
    assert prompt.endswith("<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n")


def test_a_system_text_comes_first(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = text_of(tiny_tokenizer, encode_prompt(tiny_tokenizer, "Who?", system="Be brief."))
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_query_stands_alone_when_there_is_no_chat_template_or_it_is_not_wanted(
    tiny_tokenizer: PreTrainedTokenizerBase, plain_tokenizer: PreTrainedTokenizerBase
) -> None:
    for ids in (encode_prompt(tiny_tokenizer, "Who?", chat_template=False), encode_prompt(plain_tokenizer, "Who?")):
        assert text_of(tiny_tokenizer, ids) == "Who?"
    assert text_of(tiny_tokenizer, encode_prompt(plain_tokenizer, "Who?", system="Be brief.")) == "Be brief.\nWho?"


def test_the_end_of_turn_is_the_last_supervised_token_or_not_there(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    pairs = [Pair("Who?", "me"), Pair("When?", "now")]
    with_end, without = (encode_pairs(pairs, tiny_tokenizer, end_of_turn=end) for end in (True, False))
    end = tiny_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert [e.target_ids for e in with_end] == [(*e.target_ids, end) for e in without]
    assert [text_of(tiny_tokenizer, e.target_ids) for e in without] == ["me", "now"]
    assert [e.example_id for e in with_end] == [0, 1]


def test_the_end_of_turn_is_the_token_that_the_chat_template_puts_after_an_answer(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokenizer = deepcopy(tiny_tokenizer)
    tokenizer.eos_token = "<|endoftext|>"
    assert tokenizer.convert_ids_to_tokens(end_of_turn_id(tokenizer)) == "<|im_end|>"


def test_without_a_chat_template_the_end_of_sequence_ends_an_answer(plain_tokenizer: PreTrainedTokenizerBase) -> None:
    plain_tokenizer.eos_token = "<|im_start|>"  # another one than the template's
    assert end_of_turn_id(plain_tokenizer) == plain_tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_a_tokenizer_without_any_end_is_named_with_the_way_out(word_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match="end_of_turn: false"):
        end_of_turn_id(word_tokenizer)


def test_an_empty_target_is_refused_with_its_source(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match=r"book\.jsonl:3: the target is empty"):
        encode_pairs([Pair("Who?", "", source="book.jsonl:3")], tiny_tokenizer)


def test_a_target_that_the_tokenizer_cannot_represent_is_refused_at_its_first_wrong_character(
    word_tokenizer: PreTrainedTokenizerBase,
) -> None:
    with pytest.raises(InputError, match=r"pair 2: .*cannot represent .*character 5, 'maybe'.*\[UNK\]"):
        encode_pairs([Pair("?", "yes"), Pair("?", "yes maybe")], word_tokenizer, end_of_turn=False)


def test_length_is_the_sum_of_target_tokens_and_longest_counts_prompts_too() -> None:
    corpus = Corpus("two", [Example(0, (1, 2, 3), (4,)), Example(1, (1,), (4, 5))])
    assert (len(corpus), corpus.target_tokens, corpus.longest) == (2, 3, 4)


def test_the_hash_depends_on_every_id_their_order_and_where_the_target_begins_and_on_nothing_else() -> None:
    def content_hash(*pairs: tuple[tuple[int, ...], tuple[int, ...]], name: str = "a") -> str:
        return Corpus(name, [Example(i, *pair) for i, pair in enumerate(pairs)]).content_hash

    base = content_hash(((1, 2), (3, 4)), ((5,), (6,)))
    assert content_hash(((1, 2), (3, 4)), ((5,), (6,)), name="b") == base
    others = [
        content_hash(((9, 2), (3, 4)), ((5,), (6,))),
        content_hash(((1, 2), (3, 4)), ((5,), (9,))),
        content_hash(((1,), (2, 3, 4)), ((5,), (6,))),
        content_hash(((5,), (6,)), ((1, 2), (3, 4))),
        content_hash(((1, 2), (3, 4))),
    ]
    assert len({base, *others}) == 6


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "'c' is empty"),
        ([Example(1, (1,), (2,))], "example 0 has id 1"),
        ([Example(0, (1,), ())], "example 0 has an empty target"),
        ([Example(0, (), (2,))], "example 0 has an empty prompt"),
    ],
)
def test_a_corpus_that_cannot_be_trained_on_is_refused(examples: list[Example], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Corpus("c", examples)
