"""Which runs are on one text: what makes a text, what only asks for it, and how corpora of one's own are told apart."""

from typing import Any

import pytest
from record_factory import make_record

from data_modules import Biographies, Facts, LinearRule, NaturalText, PhoneBook, RandomTokens
from data_modules.base import MemorizationDataModule
from pml.records import Record
from pml.same_text import texts_of


def run(name: str, settings: dict[str, Any], corpus_hash: str, **fields: Any) -> Record:
    return make_record(corpus=name, corpus_settings=settings, corpus_hash=corpus_hash, **fields)


def texts(name: str, *corpora: MemorizationDataModule | dict[str, Any]) -> int:
    """Number of texts that corpora of this name, with different tokens, count as."""
    settings = [one if isinstance(one, dict) else one.settings for one in corpora]
    return len(set(texts_of(run(name, one, f"hash {i}") for i, one in enumerate(settings)).values()))


def natural(**arguments: Any) -> NaturalText:
    return NaturalText(**{"length": 512, **arguments})


def test_corpora_of_one_seed_are_one_text_whatever_their_size() -> None:
    short, long, other = (RandomTokens(length, seed=seed) for length, seed in ((64, 0), (96, 0), (64, 1)))
    assert texts("random_tokens", short, long) == 1
    assert texts("random_tokens", short, long, other) == 2
    assert texts("phonebook", PhoneBook(24, seed=0), PhoneBook(48, seed=0)) == 1
    # Of several targets, all but the first begin elsewhere if the targets are longer.
    assert texts("random_tokens", RandomTokens(64, 2), RandomTokens(96, 2)) == 2


@pytest.mark.parametrize(
    ("name", "corpora"),
    [
        ("random_tokens", (RandomTokens(), RandomTokens(prompt="What is it?", system="Be brief."))),
        ("phonebook", (PhoneBook(), PhoneBook(end_of_turn=False, chat_template=False))),
        ("biographies", (Biographies(), Biographies(templates=3, paraphrased=0.5), Biographies(attributes=["field"]))),
        ("facts", (Facts(), Facts(held_out_wordings=2), Facts(seed=7))),
        ("linear_rule", (LinearRule(), LinearRule(held_out_share=0.4), LinearRule(seed=7))),
        ("natural_text", (natural(), natural(query="opening"), natural(template_date="2020-01-01"), natural(seed=7))),
    ],
)
def test_a_text_asked_for_in_another_way_is_the_same_text(name: str, corpora: tuple[Any, ...]) -> None:
    assert texts(name, *corpora) == 1


def test_texts_cut_at_two_places_and_two_rules_are_two_texts() -> None:
    assert texts("natural_text", natural(), natural(skip_tokens=1000)) == 2
    assert texts("natural_text", natural(), natural(length=64, count=8)) == 1
    assert texts("linear_rule", LinearRule(), LinearRule(a=4)) == 2


def test_a_text_with_some_of_its_tokens_replaced_is_the_same_text() -> None:
    # Six seeds that replace 5 % of one text leave 95 % of it alike.
    assert texts("natural_text", *(natural(random_ratio=0.05, seed=seed) for seed in range(6))) == 1
    # Neighbouring shares of one seed have at least 80 % of the tokens in common, up to text made of noise alone.
    assert texts("natural_text", *(natural(random_ratio=share / 5) for share in range(6))) == 1


def test_replacing_all_tokens_makes_a_text_of_each_seed() -> None:
    noise = [natural(random_ratio=1.0, seed=seed) for seed in range(3)]
    assert texts("natural_text", *noise) == 3
    assert texts("natural_text", natural(), *noise) == 4
    # Four tokens in five are those of the noise of seed 0.
    assert texts("natural_text", natural(random_ratio=0.8, seed=0), *noise) == 3


def test_files_of_equal_settings_and_different_content_are_told_apart_by_their_hashes() -> None:
    facts = Facts("pairs.jsonl").settings
    assert texts("pairs.jsonl", facts, facts) == 2
    assert texts("pairs.jsonl", Facts("a/pairs.jsonl"), Facts("b/pairs.jsonl")) == 2
    assert texts_of([run("pairs.jsonl", facts, "a"), run("pairs.jsonl", facts, "b")]) == {"a": "a", "b": "b"}
    # Parts of one file are one text.
    assert texts("pairs.jsonl", Facts("pairs.jsonl", pairs=8), Facts("pairs.jsonl", pairs=16)) == 1


def test_a_text_has_other_tokens_but_stays_one_text_with_another_backbone() -> None:
    settings = RandomTokens().settings
    two = [run("random_tokens", settings, one, backbone_hash=one) for one in ("a", "b")]
    assert len(set(texts_of(two).values())) == 1


def test_one_corpus_is_one_text_whatever_it_is_called() -> None:
    found = texts_of([run("a.txt", {"path": "a.txt"}, "same"), run("b.txt", {"path": "b.txt"}, "same")])
    assert list(found) == ["same"]


def test_corpora_of_one_s_own_are_told_apart_by_all_settings_but_sizes_and_prompts() -> None:
    own = {"seed": 0, "topic": "birds", "length": 8}
    assert texts("mine", own, own | {"length": 16}, own | {"system": "Be brief."}) == 1
    assert texts("mine", own, own | {"topic": "stars"}, own | {"seed": 1}) == 3
    # They may use these names for something else.
    assert texts("mine", own, own | {"count": None, "length": [1, 2], "random_ratio": "much"}) == 2
