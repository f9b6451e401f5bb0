"""The steps at which a run is looked at, and when a look is due."""

from itertools import islice, takewhile

import pytest

from pml.errors import InputError
from pml.looks import Looks, look_steps


def until(total: int, looks: int) -> list[int]:
    return list(takewhile(lambda step: step <= total, look_steps(total, looks)))


@pytest.mark.parametrize(
    ("total", "looks", "expected"),
    [
        # Ratios between looks: 100^(1/6) = 2.15, then (100 / 2)^(1/5) = 2.19, ...
        (100, 7, [0, 1, 2, 4, 9, 20, 45, 100]),
        (16, 5, [0, 1, 2, 4, 8, 16]),
        (4, 40, [0, 1, 2, 3, 4]),
        (1, 2, [0, 1]),
        (1000, 2, [0, 1, 1000]),
    ],
)
def test_look_steps_are_evenly_spaced_in_their_logarithm(total: int, looks: int, expected: list[int]) -> None:
    assert until(total, looks) == expected


@pytest.mark.parametrize("total", [40, 41, 100, 2000, 10**6])
def test_the_number_of_looks_is_as_requested_including_the_first_and_last_step(total: int) -> None:
    steps = until(total, 40)
    assert steps[:2] == [0, 1]
    assert steps[-1] == total
    assert len(steps) == 41


def test_a_run_of_unknown_length_has_ten_looks_per_factor_of_ten() -> None:
    steps = list(islice(look_steps(None), 60))
    assert steps[:13] == [0, 1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 25]
    assert len([step for step in steps if 100 <= step < 1000]) == 10


def test_looks_continue_if_a_run_goes_on_past_its_planned_end() -> None:
    assert [step for step in islice(look_steps(16, 5), 8) if step > 16] == [20, 25]


def test_each_look_is_due_once_and_a_missed_look_is_due_at_the_next_step() -> None:
    looks = Looks(16, 5)
    assert [step for step in (0, 0, 1, 3, 3, 4, 5, 9, 16) if looks.due(step)] == [0, 1, 3, 4, 9, 16]


def test_a_resumed_run_does_not_repeat_earlier_looks() -> None:
    looks = Looks(16, 5, after=4)
    assert [step for step in range(17) if looks.due(step)] == [8, 16]


def test_a_single_look_is_refused() -> None:
    with pytest.raises(InputError, match="looks is 1; expected at least 2"):
        next(look_steps(10, 1))
