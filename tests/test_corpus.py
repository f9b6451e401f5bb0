"""Pairs as token ids: what is supervised, how batches are padded, and what is refused."""

import logging
from collections.abc import Iterator, Sequence
from copy import deepcopy
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from pml.corpus import (
    IGNORE_INDEX,
    PADDING_EXAMPLE,
    Corpus,
    Example,
    Pair,
    collate,
    encode_pairs,
)
from pml.encoding import TextEncoder
from pml.errors import InputError
from tests.tokenizer_kinds import make_tokenizer

TEXT = st.text(min_size=1)


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids)))


def test_a_batch_is_padded_on_the_right_and_labels_cover_exactly_the_targets() -> None:
    batch = collate([Example(7, (11, 12), (13, 14, 15)), Example(3, (21,), (22,)), PADDING_EXAMPLE])
    expected = {
        "input_ids": [[11, 12, 13, 14, 15], [21, 22, 0, 0, 0], [0, 0, 0, 0, 0]],
        "labels": [[-100, -100, 13, 14, 15], [-100, 22, -100, -100, -100], [-100] * 5],
        "lengths": [5, 2, 1],
        "example_id": [7, 3, -1],
        # Of the four positions per row that predict a token: those that predict target tokens, the cells of the target
        # tokens in a table of targets only, and their ids.
        "supervised": [[1, 2, 3, 4], [0, 1, 2, 4], [13, 14, 15, 22]],
    }
    assert batch.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(batch[name], torch.tensor(values))


def test_a_batch_of_padding_examples_supervises_nothing() -> None:
    batch = collate([PADDING_EXAMPLE])
    assert batch["input_ids"].shape == (1, 1)
    assert (batch["labels"] == IGNORE_INDEX).all()
    assert batch["supervised"].shape == (3, 0)


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


@settings(max_examples=50, deadline=None)
@given(pairs=st.dictionaries(TEXT, TEXT, min_size=1, max_size=4))
def test_encoded_and_collated_targets_decode_to_exactly_their_text(
    tiny_tokenizer: PreTrainedTokenizerBase, pairs: dict[str, str]
) -> None:
    encoded = encode_pairs((Pair(*pair) for pair in pairs.items()), TextEncoder(tiny_tokenizer), end_of_turn=False)
    labels = collate(encoded.examples)["labels"]
    decoded = [text_of(tiny_tokenizer, row[row != IGNORE_INDEX].tolist()) for row in labels]
    assert decoded == list(pairs.values())
    assert [(e.query, e.target) for e in encoded.examples] == list(pairs.items())


def test_the_end_of_turn_token_is_the_last_target_token_only_if_requested(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    pairs = [Pair("Who?", "me"), Pair("When?", "now")]
    encoder = TextEncoder(tiny_tokenizer)
    with_end, without = (encode_pairs(pairs, encoder, end_of_turn=end).examples for end in (True, False))
    end = tiny_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert [e.target_ids for e in with_end] == [(*e.target_ids, end) for e in without]
    assert [text_of(tiny_tokenizer, e.target_ids) for e in without] == ["me", "now"]
    assert [e.example_id for e in with_end] == [0, 1]


def test_a_requested_end_of_turn_token_that_the_tokenizer_lacks_gives_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tokenizer = deepcopy(make_tokenizer("plain"))
    tokenizer.eos_token = None
    with caplog.at_level(logging.WARNING):
        examples = encode_pairs([Pair("Who?", "007")], TextEncoder(tokenizer)).examples
    assert tokenizer.decode(examples[0].target_ids) == "007"
    assert "no end-of-turn token follows an answer" in caplog.text


def test_an_empty_target_is_refused_with_its_source(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match=r"book\.jsonl:3: the target is empty"):
        encode_pairs([Pair("Who?", "", source="book.jsonl:3")], TextEncoder(tiny_tokenizer))


def test_a_repeated_pair_is_left_out_and_counted(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    encoded = encode_pairs((Pair(query, "1") for query in "abacab"), TextEncoder(tiny_tokenizer))
    assert [e.query for e in encoded.examples] == ["a", "b", "c"]
    assert [e.example_id for e in encoded.examples] == [0, 1, 2]
    assert encoded.duplicates == 3


def test_no_pair_is_read_beyond_the_limit(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    def one_line_errors() -> Iterator[Pair]:
        yield from (Pair("a", "1"), Pair("a", "1"), Pair("b", "2"))
        raise AssertionError("read on")

    encoded = encode_pairs(one_line_errors(), TextEncoder(tiny_tokenizer), limit=2)
    assert [e.query for e in encoded.examples] == ["a", "b"]


def test_different_targets_for_one_query_are_refused_with_their_sources(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    pairs = [Pair("a", "1", "f:1"), Pair("b", "2", "f:2"), Pair("a", "3", "f:3"), Pair("a", "1", "f:4")]
    with pytest.raises(InputError, match=r"^1 query has different targets.*: 'a' \(f:1, f:3\); keep one target"):
        encode_pairs(pairs, TextEncoder(tiny_tokenizer))


def test_different_targets_for_one_query_before_the_limit_are_refused(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    pairs = [Pair("a", "1", "f:1"), Pair("a", "2", "f:2"), Pair("b", "3", "f:3")]
    with pytest.raises(InputError, match=r"1 query has different targets.*'a' \(f:1, f:2\)"):
        encode_pairs(pairs, TextEncoder(tiny_tokenizer), limit=2)


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        ("dated", "Agent", " Agent "),  # trimmed by the template
        ("turns", "Agent", "Agent\n"),
        ("nfc", "\u00c5sa", "A\u030asa"),  # normalised
        ("unigram", "x\u00b2", "x2"),
        ("unigram", "call \u0416", "call \u0428"),  # unknown
    ],
)
def test_queries_that_encode_to_the_same_prompt_count_as_one_query(kind: str, first: str, second: str) -> None:
    encoder = TextEncoder(make_tokenizer(kind))
    with pytest.raises(InputError) as refused:
        encode_pairs([Pair(first, "0", "f:1"), Pair(second, "1", "f:2")], encoder)
    assert f"{first!a} and {second!a} (f:1, f:2)" in str(refused.value)
    assert "the model sees the same prompt" in str(refused.value)
    encoded = encode_pairs([Pair(first, "0", "f:1"), Pair(second, "0", "f:2")], encoder)
    assert (len(encoded.examples), encoded.duplicates) == (1, 1)


def test_target_tokens_exclude_prompts_and_the_longest_example_includes_its_prompt() -> None:
    corpus = Corpus("two", [Example(0, (1, 2, 3), (4,)), Example(1, (1,), (4, 5))])
    assert (len(corpus), corpus.target_tokens, corpus.longest) == (2, 3, 4)


def test_the_content_hash_depends_on_ids_order_and_target_start_but_not_on_the_name() -> None:
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
