"""Random targets: which tokens are drawn, their entropy, and how they depend on the seed."""

import math
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from data_modules import RandomTokens
from pml.encoding import TextEncoder
from pml.errors import InputError

VOCABULARY = 259  # 256 bytes and 3 special tokens


def targets(tokenizer: PreTrainedTokenizerBase, **options: Any) -> list[tuple[int, ...]]:
    corpus = RandomTokens(**options).build(tokenizer, VOCABULARY)
    return [example.target_ids for example in corpus.examples]


def test_count_and_length_set_the_number_of_targets_and_the_tokens_in_each(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    corpus = RandomTokens(length=10, count=3).build(tiny_tokenizer, VOCABULARY)
    assert [len(example.target_ids) for example in corpus.examples] == [10, 10, 10]
    assert corpus.target_tokens == 30


def test_ordinary_tokens_are_drawn_about_equally_often_and_special_tokens_never(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    (target,) = targets(tiny_tokenizer, length=256 * 200)
    counts = {i: target.count(i) for i in set(target)}
    ordinary = set(range(VOCABULARY)) - set(tiny_tokenizer.get_added_vocab().values())
    assert counts.keys() == ordinary
    # 200 expected each, with a standard deviation of 14; six of those never occur among 256 counts.
    assert all(abs(count - 200) < 6 * 14 for count in counts.values())


def test_ids_stay_below_the_vocabulary_size_of_the_backbone(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    corpus = RandomTokens(length=2000, prompt="abc", chat_template=False).build(tiny_tokenizer, vocab_size=100)
    assert max(corpus.examples[0].target_ids) < 100


def test_ids_stay_below_the_vocabulary_size_of_the_tokenizer_if_the_embedding_is_padded(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    corpus = RandomTokens(length=2000).build(tiny_tokenizer, vocab_size=100_000)
    assert max(corpus.examples[0].target_ids) < VOCABULARY


def test_entropy_is_that_of_independent_uniform_draws(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    corpus = RandomTokens(length=5, count=4).build(tiny_tokenizer, VOCABULARY)
    assert corpus.entropy_bits == 5 * 4 * math.log2(256)


def test_a_longer_target_begins_with_the_shorter_one_of_the_same_seed(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    (short,), (long,) = targets(tiny_tokenizer, length=7), targets(tiny_tokenizer, length=1000)
    assert long[:7] == short


def test_a_larger_count_begins_with_the_targets_of_a_smaller_one_of_the_same_seed(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    assert targets(tiny_tokenizer, length=7, count=50)[:3] == targets(tiny_tokenizer, length=7, count=3)


def test_the_seed_determines_the_tokens(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    assert targets(tiny_tokenizer, seed=1) == targets(tiny_tokenizer, seed=1)
    assert targets(tiny_tokenizer, seed=1) != targets(tiny_tokenizer, seed=2)


def test_a_single_target_has_the_published_prompt(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    (example,) = RandomTokens().build(tiny_tokenizer, VOCABULARY).examples
    published = "Please output the content of the vector memory injected into the activations."
    assert example.prompt_ids == TextEncoder(tiny_tokenizer).prompt(published).ids


def test_each_of_several_targets_has_a_numbered_query_of_its_own(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    corpus = RandomTokens(count=12, prompt="Which?", chat_template=False).build(tiny_tokenizer, VOCABULARY)
    assert [tiny_tokenizer.decode(list(e.prompt_ids)) for e in corpus.examples] == [f"Which? {i}" for i in range(1, 13)]


def test_the_settings_of_a_corpus_reproduce_it(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    corpus = RandomTokens(length=9, count=2, prompt="Which?", seed=5, system="S").build(tiny_tokenizer, VOCABULARY)
    again = RandomTokens(**corpus.settings).build(tiny_tokenizer, VOCABULARY)
    assert again.content_hash == corpus.content_hash


def test_a_length_or_count_of_zero_is_refused() -> None:
    with pytest.raises(InputError, match="length is 0; expected at least 1"):
        RandomTokens(length=0)
    with pytest.raises(InputError, match="count is 0; expected at least 1"):
        RandomTokens(count=0)
