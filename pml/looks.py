"""Steps at which to look at a run: evenly spaced in their logarithm, since most changes early."""

from collections.abc import Iterator

from pml.errors import InputError

__all__ = ["Looks", "look_steps"]

OPEN_RATIO = 10**0.1
"""Ratio between looks of a run without a known end: ten looks for each factor of ten."""


def look_steps(total: int | None, looks: int = 40) -> Iterator[int]:
    """Steps at which to look: 0, 1, ..., `total`, evenly spaced in their logarithm, then on at a fixed ratio for ever.

    Steps are whole numbers, so the first ones are further apart than even spacing would put them. Later looks close
    up to make `looks` of them from step 1 to `total`; a run with fewer steps has one look per step.

    Args:
        total: Steps of the run; None if unknown.
        looks: Number of looks from step 1 to `total`, at least 2.

    Example:
        >>> from itertools import takewhile
        >>> list(takewhile(lambda step: step <= 100, look_steps(100, looks=7)))
        [0, 1, 2, 4, 9, 20, 45, 100]
    """
    if looks < 2:
        raise InputError(f"looks is {looks}; expected at least 2: the first step and the last")
    yield 0
    step, left = 1, looks - 1
    yield step
    while True:
        if total is not None and step < total and left > 0:
            following = round(step * (total / step) ** (1 / left))
            left -= 1
        else:
            following = round(step * OPEN_RATIO)
        step = max(step + 1, following)
        yield step


class Looks:
    """Tells at each step whether a look is due.

    Args:
        total: Steps of the run; None if unknown.
        looks: See `look_steps`.
        after: Steps that a resumed run has already done.
    """

    def __init__(self, total: int | None, looks: int = 40, after: int = -1) -> None:
        self._steps = look_steps(total, looks)
        self._next = next(self._steps)
        self._pass(after)

    def due(self, step: int) -> bool:
        """Whether a look is due at this step or was missed since the last call; False when asked again at a step."""
        if step < self._next:
            return False
        self._pass(step)
        return True

    def _pass(self, step: int) -> None:
        while self._next <= step:
            self._next = next(self._steps)
