"""Facts about synthetic people: attributes drawn from finite sets, their exact information, and questions.

A source draws one or more attributes together, in the same way for every person. Attributes of one source may depend
on each other; those of different sources are independent.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cached_property

import torch

__all__ = ["SOURCES", "TEMPLATES", "Numbers", "Source", "Table", "entropy_bits"]


@dataclass(frozen=True)
class Table:
    """A source that draws a row for each person, independently; attributes in a row may depend on each other.

    Attributes:
        attributes: Names of the columns.
        rows: Distinct rows, one value per attribute.
        weights: Relative frequencies of the rows, as whole numbers.
    """

    attributes: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    weights: Sequence[int]

    @cached_property
    def _draws(self) -> Sequence[int]:
        """Row numbers, each repeated as often as its weight, so that a uniform draw is exact."""
        return [row for row, weight in enumerate(self.weights) for _ in range(weight)]

    def draw(self, generator: torch.Generator, drawn: set[tuple[str, ...]]) -> tuple[str, ...]:
        """Draw one row.

        Args:
            generator: Source of randomness.
            drawn: Rows of earlier people; ignored here.
        """
        return self.rows[self._draws[int(torch.randint(len(self._draws), (), generator=generator))]]

    def entropy_bits(self, attributes: Collection[str], people: int) -> float:
        """Information in some attributes of so many people, in bits: the entropy of their marginal distribution."""
        columns = [i for i, name in enumerate(self.attributes) if name in attributes]
        counts: Counter[tuple[str, ...]] = Counter()
        for row, weight in zip(self.rows, self.weights, strict=True):
            counts[tuple(row[i] for i in columns)] += weight
        total = sum(counts.values())
        return people * math.fsum(n / total * math.log2(total / n) for n in counts.values())


@dataclass(frozen=True)
class Numbers:
    """A source that draws a number for each person, uniformly and without replacement: no two people share one.

    Attributes:
        attributes: Name of the attribute.
        lowest: Smallest number.
        highest: Largest number.
    """

    attributes: tuple[str]
    lowest: int
    highest: int

    @property
    def count(self) -> int:
        """Number of possible numbers, and so the most people."""
        return self.highest - self.lowest + 1

    def draw(self, generator: torch.Generator, drawn: set[tuple[str, ...]]) -> tuple[str, ...]:
        """Draw a number that nobody has.

        Args:
            generator: Source of randomness.
            drawn: Numbers of earlier people; fewer than `count`.
        """
        while True:
            number = (str(int(torch.randint(self.lowest, self.highest + 1, (), generator=generator))),)
            if number not in drawn:
                return number

    def entropy_bits(self, attributes: Collection[str], people: int) -> float:
        """Information in the numbers of so many people, in bits: each has one choice fewer than the last."""
        if self.attributes[0] not in attributes:
            return 0.0
        return math.fsum(math.log2(self.count - taken) for taken in range(people))


Source = Table | Numbers


def entropy_bits(sources: Iterable[Source], attributes: Collection[str], people: int) -> float:
    """Information in some attributes of so many people, in bits; other attributes of the sources do not count."""
    return math.fsum(source.entropy_bits(attributes, people) for source in sources)


def _uniform(attributes: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Table:
    return Table(attributes, rows, [1] * len(rows))


def _group_then_member(attributes: tuple[str, str], groups: dict[str, tuple[str, ...]]) -> Table:
    """A group drawn uniformly, then one of its members uniformly: members of large groups are rarer."""
    whole = math.lcm(*map(len, groups.values()))
    rows = [(group, member) for group, members in groups.items() for member in members]
    return Table(attributes, rows, [whole // len(groups[group]) for group, _ in rows])


FIRST_DAY, LAST_DAY = date(1940, 1, 1), date(1999, 12, 31)

# Not from the calendar module, whose names depend on the locale.
MONTHS = ["January", "February", "March", "April", "May", "June"]
MONTHS += ["July", "August", "September", "October", "November", "December"]

CITIES = {
    "Argentina": ("Buenos Aires", "Córdoba", "Mendoza", "Rosario", "Salta"),
    "Canada": ("Calgary", "Halifax", "Montreal", "Ottawa", "Toronto", "Winnipeg"),
    "Egypt": ("Alexandria", "Aswan", "Cairo"),
    "Finland": ("Helsinki", "Oulu", "Tampere", "Turku"),
    "Ghana": ("Accra", "Kumasi"),
    "Iceland": ("Reykjavik",),
    "India": ("Chennai", "Hyderabad", "Jaipur", "Kolkata", "Mumbai", "Pune"),
    "Italy": ("Bologna", "Genoa", "Naples", "Palermo", "Turin", "Verona"),
    "Japan": ("Fukuoka", "Kyoto", "Nagoya", "Osaka", "Sapporo", "Sendai"),
    "Kenya": ("Kisumu", "Mombasa", "Nairobi"),
    "Mexico": ("Guadalajara", "Mérida", "Monterrey", "Oaxaca", "Puebla"),
    "New Zealand": ("Auckland", "Dunedin", "Wellington"),
    "Poland": ("Gdańsk", "Kraków", "Lublin", "Poznań", "Wrocław"),
    "Portugal": ("Braga", "Coimbra", "Lisbon", "Porto"),
    "South Korea": ("Busan", "Daegu", "Incheon", "Seoul"),
    "Uruguay": ("Montevideo",),
}

OCCUPATIONS = {
    "architecture": ("landscape architect", "stage designer", "urban planner"),
    "chemistry": ("brewer", "dye chemist", "perfumer", "pharmacist"),
    "geology": ("cave surveyor", "mine inspector"),
    "history": ("archivist", "genealogist", "museum curator", "restorer"),
    "linguistics": ("court interpreter", "dictionary editor", "speech therapist"),
    "mathematics": ("actuary", "cryptographer", "statistician", "tide forecaster"),
    "music": ("cellist", "choir conductor", "organ builder", "piano tuner", "violin maker"),
    "zoology": ("beekeeper", "ornithologist", "veterinarian"),
}

EMPLOYERS = {
    "Alder & Finch": "Bristol",
    "Amberline": "Ghent",
    "Bluewater Instruments": "Galway",
    "Brightmoor": "Leeds",
    "Cedar Row": "Portland",
    "Cobalt Harbor": "Rotterdam",
    "Copperfield Mills": "Sheffield",
    "Dunmore Optics": "Jena",
    "Eastgate Press": "Leipzig",
    "Fernhill": "Cork",
    "Glasswing": "Lyon",
    "Graystone": "Basel",
    "Halcyon Freight": "Antwerp",
    "Heron Lane": "Utrecht",
    "Ironbridge Tools": "Sheffield",
    "Juniper Works": "Lyon",
    "Kestrel Rail": "Leipzig",
    "Larkspur": "Utrecht",
    "Lindenau": "Leipzig",
    "Marlow Ceramics": "Delft",
    "Northlight": "Tromsø",
    "Oakhurst": "Bristol",
    "Pinebrook": "Portland",
    "Quarry Street": "Leeds",
    "Redwing Textiles": "Ghent",
    "Saltmarsh": "Galway",
    "Silverbirch": "Basel",
    "Stonecrop": "Cork",
    "Tallow & Wick": "Delft",
    "Thistledown": "Antwerp",
    "Weatherby": "Rotterdam",
    "Windrush": "Tromsø",
}


def _dates() -> list[tuple[str, ...]]:
    days = ((FIRST_DAY + timedelta(n)) for n in range((LAST_DAY - FIRST_DAY).days + 1))
    return [(f"{day.day} {MONTHS[day.month - 1]} {day.year}",) for day in days]


SOURCES: tuple[Source, ...] = (
    _uniform(("birth_date",), _dates()),
    # The city determines the country.
    _uniform(("birth_city", "birth_country"), [(city, country) for country in CITIES for city in CITIES[country]]),
    # The field limits the occupations.
    _group_then_member(("field", "occupation"), OCCUPATIONS),
    # The employer determines the city.
    _uniform(("employer", "employer_city"), list(EMPLOYERS.items())),
    Numbers(("badge_number",), 100_000, 999_999),
)
"""Everything that is drawn for a person; another order would change what a seed draws."""

TEMPLATES = {
    "birth_date": (
        "When was {name} born?",
        "What is the date of birth of {name}?",
        "On which day did {name} come into the world?",
        "Give the birthday of {name} in full.",
    ),
    "birth_city": (
        "In which city was {name} born?",
        "What is the birthplace of {name}?",
        "Where did {name} come into the world?",
        "Name the town that {name} was born in.",
    ),
    "birth_country": (
        "In which country was {name} born?",
        "Which country does {name} come from?",
        "What is the native country of {name}?",
        "Name the land of birth of {name}.",
    ),
    "field": (
        "What did {name} study?",
        "In which subject does {name} have a degree?",
        "Which field was {name} trained in?",
        "Name the discipline that {name} graduated in.",
    ),
    "occupation": (
        "What does {name} do for a living?",
        "What is the occupation of {name}?",
        "Which profession does {name} have?",
        "Name the trade that {name} works in.",
    ),
    "employer": (
        "Who employs {name}?",
        "Which company does {name} work for?",
        "What is the name of the firm where {name} has a job?",
        "Name the employer of {name}.",
    ),
    "employer_city": (
        "In which city does {name} work?",
        "Where is the workplace of {name}?",
        "To which city does {name} go to work?",
        "Name the town where the employer of {name} is based.",
    ),
    "badge_number": (
        "What is the badge number of {name}?",
        "Which number is on the badge of {name}?",
        "How does the badge of {name} read?",
        "Give the number of the badge that {name} wears.",
    ),
}
"""Questions that ask for each attribute, in several wordings."""
