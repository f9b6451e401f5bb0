"""Biographies: the people, their queries and targets, and the entropy of the corpus."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from data_modules import Biographies
from data_modules._people import (
    CITIES,
    EMPLOYERS,
    OCCUPATIONS,
    SOURCES,
    TEMPLATES,
    Numbers,
    Source,
    Table,
    entropy_bits,
)
from pml.corpus import Corpus
from pml.errors import InputError
from pml.token_scores import TokenScores

VOCABULARY = 259
ROOT = Path(__file__).resolve().parents[2]


def asked(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    """Queries and targets as text."""
    decode = tokenizer.decode
    return [(str(decode(list(e.prompt_ids))), str(decode(list(e.target_ids)))) for e in corpus.examples]


def pairs(tokenizer: PreTrainedTokenizerBase, **options: Any) -> list[tuple[str, str]]:
    plain = {"chat_template": False, "end_of_turn": False}
    return asked(Biographies(**{**plain, **options}).build(tokenizer, VOCABULARY), tokenizer)


# Entropy -----------------------------------------------------------------------------------------------------------


def bits(attributes: list[str], people: int = 1) -> float:
    return entropy_bits(SOURCES, attributes, people)


def test_the_entropy_of_attributes_matches_hand_worked_values() -> None:
    assert bits(["birth_city"]) == pytest.approx(6)  # 64 cities
    assert bits(["employer"]) == pytest.approx(5)  # 32 employers
    assert bits(["field"]) == pytest.approx(3)  # 8 fields
    assert bits(["birth_date"]) == pytest.approx(math.log2(60 * 365 + 15))  # 1940 to 1999, 15 leap years
    assert bits(["birth_city", "employer"], people=7) == pytest.approx(7 * 11)


def test_an_attribute_that_another_determines_adds_no_entropy_but_has_its_own_when_alone() -> None:
    assert bits(["birth_city", "birth_country"]) == bits(["birth_city"])
    # The countries have 5, 6, 3, 4, ... and 1 of the 64 cities; one with n adds n/64 log2(64/n) bits.
    by_hand = sum(n / 64 * math.log2(64 / n) for n in (5, 6, 3, 4, 2, 1, 6, 6, 6, 3, 5, 3, 5, 4, 4, 1))
    assert bits(["birth_country"]) == pytest.approx(by_hand)
    assert bits(["employer", "employer_city"]) == bits(["employer"]) > bits(["employer_city"])


def test_an_attribute_that_depends_on_another_adds_its_conditional_entropy() -> None:
    # A field has 3, 4, 2, 4, 3, 4, 5 or 3 occupations.
    left = sum(math.log2(n) for n in (3, 4, 2, 4, 3, 4, 5, 3)) / 8
    assert bits(["field", "occupation"]) == pytest.approx(3 + left)
    # No occupation is in two fields, so the occupation determines the field.
    assert bits(["occupation"]) == pytest.approx(3 + left)


def test_badge_numbers_are_drawn_without_replacement_so_each_person_has_one_choice_fewer() -> None:
    assert bits(["badge_number"], people=3) == pytest.approx(math.log2(900_000 * 899_999 * 899_998), abs=1e-12)


TINY: tuple[Source, ...] = (
    # b depends on a but is not determined by it, and rows differ in weight.
    Table(("a", "b"), [("x", "1"), ("x", "2"), ("y", "2"), ("z", "3")], [1, 3, 2, 2]),
    Table(("c",), [("p",), ("q",), ("r",)], [1, 1, 1]),
    Numbers(("n",), 4, 7),
)


def enumerated_bits(attributes: Sequence[str], people: int) -> float:
    """Entropy of the attributes of all people together, by enumerating every possible draw."""
    first, second, numbers = TINY
    assert isinstance(first, Table)
    assert isinstance(second, Table)
    assert isinstance(numbers, Numbers)
    chances: Counter[tuple[Any, ...]] = Counter()
    person = [
        ({"a": a, "b": b, "c": c}, weight)
        for (a, b), weight in zip(first.rows, first.weights, strict=True)
        for (c,) in second.rows
    ]
    for drawn in itertools.product(person, repeat=people):
        for badges in itertools.permutations(range(numbers.lowest, numbers.highest + 1), people):
            values = [{**row, "n": str(badge)} for (row, _), badge in zip(drawn, badges, strict=True)]
            outcome = tuple(value[name] for value in values for name in attributes)
            chances[outcome] += math.prod(weight for _, weight in drawn)
    total = sum(chances.values())
    return sum(n / total * math.log2(total / n) for n in chances.values())


@pytest.mark.parametrize("attributes", [s for n in range(1, 5) for s in itertools.combinations("abcn", n)])
def test_entropy_equals_that_of_an_enumeration_of_all_draws(attributes: tuple[str, ...]) -> None:
    assert entropy_bits(TINY, attributes, 2) == pytest.approx(enumerated_bits(attributes, 2), rel=1e-12)


def test_rows_are_drawn_in_proportion_to_their_weights() -> None:
    table, generator = TINY[0], torch.Generator().manual_seed(3)
    counts = Counter(table.draw(generator, set()) for _ in range(8000))
    for row, expected in {("x", "1"): 1000, ("x", "2"): 3000, ("y", "2"): 2000, ("z", "3"): 2000}.items():
        # Six standard deviations of a binomial count.
        assert abs(counts[row] - expected) < 6 * math.sqrt(expected * (1 - expected / 8000))


def test_numbers_are_drawn_without_replacement_and_in_every_order_equally_often() -> None:
    numbers, generator = Numbers(("n",), 4, 7), torch.Generator().manual_seed(3)
    orders = Counter()
    for _ in range(2400):
        drawn: list[tuple[str, ...]] = []
        for _ in range(4):
            drawn.append(numbers.draw(generator, set(drawn)))
        orders[tuple(drawn)] += 1
    assert len(orders) == 24  # every permutation, 100 times each, with a standard deviation of 10
    assert all(abs(count - 100) < 60 for count in orders.values())


def test_table_rows_cities_and_occupations_are_unique() -> None:
    for source in SOURCES:
        if isinstance(source, Table):
            assert len(set(source.rows)) == len(source.rows) == len(source.weights)
    assert sum(map(len, CITIES.values())) == len({city for cities in CITIES.values() for city in cities}) == 64
    assert len(EMPLOYERS) == 32
    assert len({job for jobs in OCCUPATIONS.values() for job in jobs}) == sum(map(len, OCCUPATIONS.values()))


# The corpus --------------------------------------------------------------------------------------------------------


def test_every_person_has_one_pair_per_attribute(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    corpus = Biographies(people=5).build(tiny_tokenizer, VOCABULARY)
    assert len(corpus) == 5 * 8
    assert corpus.fact_ids is None
    assert corpus.entropy_bits == bits(list(TEMPLATES), 5)


def test_queries_are_unique_and_the_targets_of_one_person_are_consistent(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    book = pairs(tiny_tokenizer, people=20)
    assert len({query for query, _ in book}) == len(book)
    by_attribute = [book[i::8] for i in range(8)]
    cities = {city: country for country, found in CITIES.items() for city in found}
    for (_, city), (_, country) in zip(by_attribute[1], by_attribute[2], strict=True):
        assert cities[city] == country
    for (_, field), (_, job) in zip(by_attribute[3], by_attribute[4], strict=True):
        assert job in OCCUPATIONS[field]
    for (_, employer), (_, city) in zip(by_attribute[5], by_attribute[6], strict=True):
        assert EMPLOYERS[employer] == city
    assert all(re.fullmatch(r"\d{1,2} [A-Z][a-z]+ 19[4-9]\d", target) for _, target in by_attribute[0])
    badges = [target for _, target in by_attribute[7]]
    assert all(re.fullmatch(r"[1-9]\d{5}", badge) for badge in badges)
    assert len(set(badges)) == 20


def test_the_end_of_turn_adds_one_target_token_per_pair(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    without, with_end = (
        Biographies(people=3, end_of_turn=end).build(tiny_tokenizer, VOCABULARY).target_tokens for end in (False, True)
    )
    assert with_end == without + 3 * 8


@pytest.mark.parametrize(("share", "asked_twice"), [(0.0, 0), (0.3, 3), (0.5, 5), (0.99, 9), (1.0, 10)])
def test_the_paraphrased_share_of_people_has_one_pair_per_template_and_the_others_one_pair(
    share: float, asked_twice: int, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    corpus = Biographies(people=10, attributes=["employer"], templates=3, paraphrased=share).build(
        tiny_tokenizer, VOCABULARY
    )
    ways = Counter(corpus.fact_ids or range(10))
    assert sorted(ways.values()) == [1] * (10 - asked_twice) + [3] * asked_twice


def test_a_paraphrase_has_another_query_the_same_target_and_no_entropy_of_its_own(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    options: dict[str, Any] = {"people": 6, "chat_template": False, "end_of_turn": False}
    once = Biographies(**options).build(tiny_tokenizer, VOCABULARY)
    corpus = Biographies(**options, templates=4).build(tiny_tokenizer, VOCABULARY)
    assert corpus.entropy_bits == once.entropy_bits
    assert len(corpus) == 4 * len(once)
    facts: dict[int, list[tuple[str, str]]] = {}
    for fact, pair in zip(corpus.fact_ids or (), asked(corpus, tiny_tokenizer), strict=True):
        facts.setdefault(fact, []).append(pair)
    assert len(facts) == len(once)
    for ways in facts.values():
        assert len({query for query, _ in ways}) == 4
        assert len({target for _, target in ways}) == 1


def test_all_wordings_of_an_attribute_are_used(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    book = pairs(tiny_tokenizer, people=60, attributes=["birth_city"])
    openings = Counter(query.split()[0] for query, _ in book)
    # Each of the four wordings begins with a different word.
    assert openings.keys() == {"In", "What", "Where", "Name"}
    # 15 expected each, standard deviation 3.4.
    assert all(2 <= count <= 30 for count in openings.values())


def test_more_people_other_attributes_or_more_templates_leave_existing_pairs_unchanged(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    few = pairs(tiny_tokenizer, people=3)
    assert pairs(tiny_tokenizer, people=9)[: len(few)] == few
    assert pairs(tiny_tokenizer, people=3, attributes=["occupation"]) == few[4::8]
    assert pairs(tiny_tokenizer, people=3, templates=4)[::4] == few


def test_the_held_out_part_asks_for_every_fact_in_a_wording_that_is_not_trained_on(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    data = Biographies(people=4, templates=2, paraphrased=0.5, chat_template=False)
    corpus = data.build(tiny_tokenizer, VOCABULARY)
    assert data.held_out is not None
    trained, held_out = asked(corpus, tiny_tokenizer), asked(data.held_out, tiny_tokenizer)
    assert len(held_out) == 4 * 8
    assert not {query for query, _ in trained} & {query for query, _ in held_out}
    # All wordings of a fact have one target, so any of them gives the target of the fact.
    targets = {fact: target for fact, (_, target) in zip(corpus.fact_ids or (), trained, strict=True)}
    assert [target for _, target in held_out] == [targets[fact] for fact in range(32)]


def test_nothing_is_held_out_if_all_wordings_are_trained_on(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    data = Biographies(people=2, templates=4)
    data.build(tiny_tokenizer, VOCABULARY)
    assert data.held_out is None


def test_another_seed_draws_other_people(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    data = Biographies(people=12)
    one, two = (d.build(tiny_tokenizer, VOCABULARY) for d in (data, data.with_seed(data.seed + 1)))
    assert not {e.prompt_ids for e in one.examples} & {e.prompt_ids for e in two.examples}
    assert [e.target_ids for e in one.examples] != [e.target_ids for e in two.examples]
    assert data.corpus is one


def test_the_settings_of_a_corpus_reproduce_it(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    data = Biographies(people=3, attributes=["field", "birth_date"], templates=2, paraphrased=0.4, seed=8, system="S")
    corpus = data.build(tiny_tokenizer, VOCABULARY)
    again = Biographies(**corpus.settings).build(tiny_tokenizer, VOCABULARY)
    assert again.content_hash == corpus.content_hash


# Figures -----------------------------------------------------------------------------------------------------------


def test_figures_give_bits_per_person_and_exact_match_by_person_and_by_attribute(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    data = Biographies(people=2, attributes=["employer", "field"], templates=2, paraphrased=0.5)
    corpus = data.build(tiny_tokenizer, VOCABULARY)
    # The first person is asked once for each, the second twice: employer, field, employer, employer, field, field.
    assert list(corpus.fact_ids or ()) == [0, 1, 2, 2, 3, 3]
    right = torch.tensor([[1], [1], [1], [0], [1], [1]]).bool()
    scores = TokenScores(torch.zeros(6, 1), right, torch.ones(6, 1).bool(), torch.arange(6))
    assert data.figures(scores) == pytest.approx(
        {"bits_per_person": 8, "people_exact_match": 1 / 2, "exact_match_employer": 2 / 3, "exact_match_field": 1}
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"people": 0}, "people is 0; expected 1 to 900000"),
        ({"people": 900_001}, "people is 900001; expected 1 to 900000, as many as there are badge numbers"),
        ({"attributes": []}, r"attributes is \[\]; expected each once, and at least one"),
        ({"attributes": ["field", "field"]}, "expected each once"),
        ({"attributes": ["age"]}, "attributes has age; expected some of birth_date, birth_city"),
        ({"templates": 0}, "templates is 0; expected 1 to 4"),
        ({"templates": 5}, "templates is 5; expected 1 to 4"),
        ({"paraphrased": 1.5}, r"paraphrased is 1\.5; expected a share of people in \[0, 1\]"),
        ({"paraphrased": -0.1}, r"paraphrased is -0\.1; expected a share"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Biographies(**options)
