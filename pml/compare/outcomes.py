"""The numbers that runs are compared by: certain recall, actual recall, and their cost."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from pml.errors import InputError
from pml.records import Record
from pml.token_results import TOKENS_NAME, first_positions, read_tokens

__all__ = ["OUTCOMES", "Outcome", "measure_outcomes"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """One number that runs are compared by.

    Attributes:
        name: Its key in JSON.
        title: Its name in words.
        unit: `%`, `nats` (per target token), `tokens` or `steps`.
        better: Whether higher or lower is better.
        of: Computes it from a run's folder, which holds per-token results, and its record; None if not measured.
        any_budget: Whether runs with different budgets may be compared: the outcome is how long they trained.
    """

    name: str
    title: str
    unit: Literal["%", "nats", "tokens", "steps"]
    better: Literal["higher", "lower"]
    of: Callable[[Path, Record], float | None]
    any_budget: bool = False

    @property
    def header(self) -> str:
        """Title with unit."""
        return self.title if self.unit in self.title else f"{self.title} ({self.unit})"

    def show(self, value: float | None, sign: str = "") -> str:
        """A value as text, a dash for None; `sign="+"` shows the sign of a difference."""
        return "-" if value is None else f"{value:{sign}.{3 if self.unit == 'nats' else 1}f}"


def _targets_certain(folder: Path, _: Record) -> float | None:
    """Percentage of targets in which every token is certain."""
    # A record alone only tells when all targets are certain; means over just such runs would be biased.
    if not (folder / TOKENS_NAME).is_file():
        return None
    try:
        positions = first_positions(read_tokens(folder))
    except InputError as error:
        log.warning("%s; how many targets are certain is not known", error)
        return None
    return 100 * float(np.mean(positions.sub_threshold == positions.length))


OUTCOMES = (
    Outcome("targets_certain", "targets certain", "%", "higher", _targets_certain),
    Outcome("tokens_certain", "tokens certain", "%", "higher", lambda _, run: 100 * (1 - run.sub_threshold_fraction)),
    Outcome("exact_match", "exact match", "%", "higher", lambda _, run: 100 * run.exact_match),
    Outcome("token_accuracy", "token accuracy", "%", "higher", lambda _, run: 100 * run.token_accuracy),
    Outcome("final_loss", "final loss", "nats", "lower", lambda _, run: run.final_loss),
    Outcome("first_failure", "tokens before first failure", "tokens", "higher", lambda _, run: run.first_failure),
    Outcome("steps_to_certain", "steps to all certain", "steps", "lower", lambda _, run: run.steps_to_recall, True),
    Outcome("harm", "harm to other text", "nats", "lower", lambda _, run: run.mean_harm),
)
"""Certain: p > 0.5 at every token, so greedy decoding cannot miss it. Right: the argmax under teacher forcing."""


def measure_outcomes(folder: Path, record: Record) -> dict[str, float | None]:
    """Outcomes of a run by the names in `OUTCOMES`; None where not measured."""
    return {outcome.name: outcome.of(folder, record) for outcome in OUTCOMES}
