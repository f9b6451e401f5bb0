"""When to look at a run: at steps spaced evenly in the logarithm, since what is learnt early is learnt fast."""

from collections.abc import Iterator

from pml.errors import InputError

__all__ = ["Looks", "look_steps"]

OPEN_RATIO = 10**0.1
"""From one look to the next where nobody knows when the run ends: ten looks for each factor of ten."""


def look_steps(total: int | None, looks: int = 40) -> Iterator[int]:
    """Steps at which to look: 0, 1, ..., `total`, evenly spaced in their logarithm, then further apart for ever.

    Small steps are whole numbers, hence further apart than the logarithm would have them; the looks saved there are
    given to the rest, so that there are `looks` of them from step 1 to `total`, or one a step in a shorter run.

    Args:
        total: Steps of the run; None where unknown.
        looks: Looks from step 1 to the last, at least 2.

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
    """Says at each step whether it is one to look at, once for each step.

    Args:
        total: Steps of the run; None where unknown.
        looks: See `look_steps`.
        after: Steps already done, by a run that goes on.
    """

    def __init__(self, total: int | None, looks: int = 40, after: int = -1) -> None:
        self._steps = look_steps(total, looks)
        self._next = next(self._steps)
        self._pass(after)

    def due(self, step: int) -> bool:
        """Whether to look now; a look that was missed is made up for by the next step."""
        if step < self._next:
            return False
        self._pass(step)
        return True

    def _pass(self, step: int) -> None:
        while self._next <= step:
            self._next = next(self._steps)
