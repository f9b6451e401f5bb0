"""Names of made-up people."""

from itertools import islice

import pytest
from faker.providers.person.en_US import Provider

from data_modules._names import unique_names
from pml.errors import InputError


def test_names_are_unique_and_determined_by_the_seed() -> None:
    names = list(islice(unique_names(3), 5000))
    assert len(set(names)) == 5000
    assert list(islice(unique_names(3), 50)) == names[:50]
    assert list(islice(unique_names(4), 50)) != names[:50]


def test_running_out_of_names_is_an_error_with_the_number_of_people(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Provider, "first_names", ("Ann", "Bo"))
    monkeypatch.setattr(Provider, "last_names", ("Lee", "Day", "Fox"))
    names = unique_names(1)
    assert sorted(islice(names, 6)) == ["Ann Day", "Ann Fox", "Ann Lee", "Bo Day", "Bo Fox", "Bo Lee"]
    with pytest.raises(InputError, match="no unused name after 6 people; ask for fewer"):
        next(names)
