"""Names of made-up people, all different."""

from collections.abc import Iterator

from faker import Faker

from pml.errors import InputError

__all__ = ["unique_names"]

MAX_REDRAWS = 10_000  # draws of one name before names count as used up


def unique_names(seed: int) -> Iterator[str]:
    """Yield first and last names without end, all different; the same seed gives the same names in the same order.

    Raises:
        InputError: If names are used up.
    """
    fake = Faker("en_US")
    fake.seed_instance(seed)
    names: set[str] = set()
    while True:
        drawn = (f"{fake.first_name()} {fake.last_name()}" for _ in range(MAX_REDRAWS))
        name = next((candidate for candidate in drawn if candidate not in names), None)
        if name is None:
            raise InputError(f"no unused name after {len(names)} people; ask for fewer")
        names.add(name)
        yield name
