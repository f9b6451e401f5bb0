"""Biographies of synthetic people: facts of exactly known information, asked for in one way or in several."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from data_modules._names import unique_names
from data_modules._people import SOURCES, TEMPLATES, Numbers, entropy_bits
from data_modules.base import MemorizationDataModule
from pml import metrics
from pml.corpus import Corpus, Example, Pair, encode_pairs
from pml.errors import InputError
from pml.weighting import TokenScores

__all__ = ["Biographies"]

MOST_TEMPLATES = min(map(len, TEMPLATES.values()))


@dataclass(frozen=True)
class _Person:
    """A name, a value of each attribute, and the order in which the ways to ask for each are taken."""

    name: str
    values: dict[str, str]
    orders: dict[str, list[int]]

    def pair(self, attribute: str, way: int) -> Pair:
        template = TEMPLATES[attribute][self.orders[attribute][way]]
        return Pair(template.format(name=self.name), self.values[attribute])


class Biographies(MemorizationDataModule):
    """Questions about made-up people, each about one fact, with the fact alone as the target.

    Attributes are `birth_date` (any day of 1940 to 1999), `birth_city`, `birth_country` (that of the city), `field` of
    study, `occupation` (one of the field's), `employer`, `employer_city` (that of the employer), and `badge_number`
    (six digits, no two people alike). Names are all different; they and the wording of a question are given and count
    nothing. The information in the targets is exact: what one attribute says about another is not counted again, nor
    is a fact that is asked in several ways. With the same seed more people start with the same people, who have the
    same values whichever attributes and however many ways to ask are chosen.

    The held-out part asks for every fact in a way that it is never trained in; there is none where all ways are used.

    Args:
        people: Number of people.
        attributes: What is asked about each; null asks for everything.
        templates: Ways in which a fact is asked, 1 to 4.
        paraphrased: Share of people whose facts are asked in all these ways; those of others are asked in one.
        end_of_turn: Make the end-of-turn token part of each target, so that recalling it also means to stop: one
            supervised token more per pair.
        **kwargs: See `MemorizationDataModule`.

    Raises:
        InputError: If a number is out of range, or an attribute is unknown or named twice.
    """

    def __init__(
        self,
        people: int = 16,
        attributes: list[str] | None = None,
        templates: int = 1,
        paraphrased: float = 1.0,
        end_of_turn: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        most = min(source.count for source in SOURCES if isinstance(source, Numbers))
        if not 1 <= people <= most:
            raise InputError(f"people is {people}; expected 1 to {most}, as many as there are badge numbers")
        if attributes is not None and (not attributes or len(set(attributes)) < len(attributes)):
            raise InputError(f"attributes is {attributes}; expected each once, and at least one, or null for all")
        if unknown := [name for name in attributes or () if name not in TEMPLATES]:
            raise InputError(f"attributes has {', '.join(unknown)}; expected some of {', '.join(TEMPLATES)}")
        if not 1 <= templates <= MOST_TEMPLATES:
            raise InputError(f"templates is {templates}; expected 1 to {MOST_TEMPLATES} ways to ask for a fact")
        if not 0 <= paraphrased <= 1:
            raise InputError(f"paraphrased is {paraphrased}; expected a share of people in [0, 1]")
        self.people = people
        self.attributes = list(TEMPLATES) if attributes is None else list(attributes)
        self.templates = templates
        self.paraphrased = paraphrased
        self.end_of_turn = end_of_turn

    @property
    def settings(self) -> dict[str, Any]:
        own = {"people": self.people, "attributes": self.attributes, "templates": self.templates}
        return {**own, "paraphrased": self.paraphrased, "end_of_turn": self.end_of_turn, **super().settings}

    def make_corpus(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Corpus:
        pairs, fact_ids = [], []
        for number, person in enumerate(islice(_draw(self.seed), self.people)):
            for column, attribute in enumerate(self.attributes):
                for way in range(self._ways(number)):
                    pairs.append(person.pair(attribute, way))
                    fact_ids.append(number * len(self.attributes) + column)
        bits = entropy_bits(SOURCES, self.attributes, self.people)
        repeated = len(set(fact_ids)) < len(fact_ids)
        examples = self._encoded(pairs, tokenizer)
        if len(examples) < len(pairs):
            raise InputError(
                f"biographies: {len(pairs) - len(examples)} of {len(pairs)} questions are the same as others to this "
                "tokenizer; use a backbone whose tokenizer keeps all characters"
            )
        return Corpus("biographies", examples, bits, self.settings, fact_ids if repeated else None)

    def make_held_out(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Corpus | None:
        if self.templates == MOST_TEMPLATES:
            return None
        # The first way that nobody is asked in, so that it is as new to those who are asked in one way alone.
        pairs = [
            person.pair(attribute, self.templates)
            for person in islice(_draw(self.seed), self.people)
            for attribute in self.attributes
        ]
        return Corpus("biographies_held_out", self._encoded(pairs, tokenizer), settings=self.settings)

    def figures(self, scores: TokenScores) -> dict[str, float]:
        """Bits per person in the corpus, and the shares of people and of each attribute's targets that are right.

        Args:
            scores: Of the whole corpus, one row per example, in order.

        Returns:
            `bits_per_person`; `people_exact_match`, the share of people whose every target is right under teacher
            forcing; and `exact_match_` with the name of an attribute, the share of its targets.
        """
        right = metrics.exact_match(scores).double()
        person, column = torch.tensor(
            [
                (number, column)
                for number in range(self.people)
                for column in range(len(self.attributes))
                for _ in range(self._ways(number))
            ]
        ).unbind(dim=1)
        by_person = torch.ones(self.people, dtype=torch.float64).scatter_reduce(0, person, right, "amin")
        bits = entropy_bits(SOURCES, self.attributes, self.people)
        return {"bits_per_person": bits / self.people, "people_exact_match": by_person.mean().item()} | {
            f"exact_match_{name}": right[column == i].mean().item() for i, name in enumerate(self.attributes)
        }

    def _ways(self, number: int) -> int:
        """In how many ways the facts of a person are asked; the paraphrased are spread evenly over the people."""
        share = self.paraphrased
        # Not exactly representable shares must not lose a person: 0.1 * 30 is a hair above 3, 0.29 * 100 below 29.
        before, after = (math.floor(n * share + 1e-9) for n in (number, number + 1))
        return self.templates if after > before else 1

    def _encoded(self, pairs: list[Pair], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
        encoder = self.encoder(tokenizer)
        examples = encode_pairs(pairs, encoder, end_of_turn=self.end_of_turn).examples
        encoder.warn_of_changes("biographies")
        return examples


def _draw(seed: int) -> Iterator[_Person]:
    """People one after another, everything drawn for each whether it is asked for or not."""
    generator = torch.Generator().manual_seed(seed)
    drawn: list[set[tuple[str, ...]]] = [set() for _ in SOURCES]
    for name in unique_names(seed):
        values: dict[str, str] = {}
        for source, before in zip(SOURCES, drawn, strict=True):
            row = source.draw(generator, before)
            before.add(row)
            values.update(zip(source.attributes, row, strict=True))
        # From the same generator, hence independent of the values: a wording says nothing about what it asks for.
        orders = {name: torch.randperm(len(ways), generator=generator).tolist() for name, ways in TEMPLATES.items()}
        yield _Person(name, values, orders)
