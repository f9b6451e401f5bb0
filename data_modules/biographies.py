"""Biographies of synthetic people: facts with exactly known information, asked for in one or several wordings."""

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
from pml.token_scores import TokenScores

__all__ = ["Biographies"]

MOST_TEMPLATES = min(map(len, TEMPLATES.values()))


@dataclass(frozen=True)
class _Person:
    """A name, a value for each attribute, and the order in which the questions for each are used."""

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
    (six digits, different for all people). Names are all different. Names and wordings are part of the query, so they
    carry no information to memorise. The information in the targets is exact: what one attribute says about another is
    counted once, and so is a fact that is asked in several ways. With the same seed, a larger corpus starts with the
    same people, and their values depend on neither `attributes` nor `templates`.

    The held-out part asks for every fact in a way that it is never trained in; there is none if all ways are used.

    Args:
        people: Number of people.
        attributes: Attributes to ask for; null asks for all.
        templates: Number of ways in which a fact is asked, 1 to 4.
        paraphrased: Share of people whose facts are asked in all these ways; those of the others are asked in one.
        end_of_turn: Make the end-of-turn token part of each target, so that recall includes stopping: one more
            supervised token per pair.
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

    def make_held_out(self, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Corpus | None:
        if self.templates == MOST_TEMPLATES:
            return None
        # The first way that is not trained for anyone, so that it is equally new to people who are asked in one way.
        pairs = [
            person.pair(attribute, self.templates)
            for person in islice(_draw(self.seed), self.people)
            for attribute in self.attributes
        ]
        return Corpus("biographies_held_out", self._encoded(pairs, tokenizer), settings=self.settings)

    def figures(self, scores: TokenScores) -> dict[str, float]:
        """Bits per person, and the shares of people and of each attribute's targets that are right.

        Args:
            scores: Scores of the whole corpus, one row per example, in order.

        Returns:
            `bits_per_person`; `people_exact_match`, the share of people whose targets are all right under teacher
            forcing; and `exact_match_` with the name of an attribute, the share of its targets that are right.
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
        """Number of ways in which a person's facts are asked; the paraphrased people are spread evenly."""
        share = self.paraphrased
        # Rounding must not lose a person: 0.1 * 30 is a hair above 3, 0.29 * 100 below 29.
        before, after = (math.floor(n * share + 1e-9) for n in (number, number + 1))
        return self.templates if after > before else 1

    def _encoded(self, pairs: list[Pair], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
        encoder = self.encoder(tokenizer)
        examples = encode_pairs(pairs, encoder, end_of_turn=self.end_of_turn).examples
        encoder.warn_of_changes("biographies")
        return examples


def _draw(seed: int) -> Iterator[_Person]:
    """Yield people one after another; everything is drawn for each, whether it is asked for or not."""
    generator = torch.Generator().manual_seed(seed)
    drawn: list[set[tuple[str, ...]]] = [set() for _ in SOURCES]
    for name in unique_names(seed):
        values: dict[str, str] = {}
        for source, before in zip(SOURCES, drawn, strict=True):
            row = source.draw(generator, before)
            before.add(row)
            values.update(zip(source.attributes, row, strict=True))
        # Drawn after the values by the same generator, so a wording says nothing about the answer.
        orders = {name: torch.randperm(len(ways), generator=generator).tolist() for name, ways in TEMPLATES.items()}
        yield _Person(name, values, orders)
