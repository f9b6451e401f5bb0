"""How texts of one length differ in the frozen model's loss, and so in how much a run can learn.

A straight line in ln l through all texts of a law gives the expected initial loss. The frozen model's loss on a text
minus this line is the text's initial-loss residual.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy.stats import linregress

from pml.law.forms import Array
from pml.law.intervals import t_over_z, t_quantile
from pml.law.observations import Observation, numbered

__all__ = ["FEWEST_TEXTS", "MAX_LOSS_DEVIATION", "Texts", "collect_texts"]

MAX_LOSS_DEVIATION: Final = 0.1
"""A text is of another kind if the frozen model's loss differs from the expected one by a larger share.

Texts of one kind differ by less: texts of random tokens of one length by up to 5 %.
"""
FEWEST_TEXTS: Final = 4
"""With fewer texts the scatter around the line is unknown."""


@dataclass(frozen=True)
class Texts:
    """The texts of a law's runs.

    Attributes:
        log_lengths: ln l of each text, `(texts,)`.
        losses: The frozen model's loss on each text in nats per target token, `(texts,)`.
        of_run: Index of each run's text, `(runs,)`.
    """

    log_lengths: Array
    losses: Array
    of_run: npt.NDArray[np.intp]

    @property
    def degrees_of_freedom(self) -> int:
        """Number of texts minus the parameters of the line: its level, and its slope with several lengths."""
        return len(self.losses) - self._order - 1

    @property
    def spread(self) -> float:
        """Standard deviation of the frozen model's loss around the line, in nats; 0 with fewer than 4 texts."""
        if len(self.losses) < FEWEST_TEXTS:
            return 0.0
        residuals = self.initial_loss_residuals
        return math.sqrt(float(residuals @ residuals) / self.degrees_of_freedom)

    def spread_at(self, lengths: npt.ArrayLike) -> Array:
        """Standard deviation of a new text's loss around the line at these lengths, in nats.

        A mean over l tokens scatters as 1 / sqrt(l). Beyond the longest text the scatter is held constant, since
        longer texts may be of several kinds.
        """
        if len(self.losses) < FEWEST_TEXTS:
            return np.zeros(np.shape(lengths))
        of_texts = np.exp(self.log_lengths)
        squares = float(of_texts @ self.initial_loss_residuals**2)
        shortened = np.minimum(np.asarray(lengths, dtype=np.float64), of_texts.max())
        return np.asarray(np.sqrt(squares / self.degrees_of_freedom / shortened))

    @property
    def initial_loss_residuals(self) -> Array:
        """The frozen model's loss on each text minus the line, in nats per target token, `(texts,)`."""
        return self.losses - self.expected_initial_loss(np.exp(self.log_lengths))

    def expected_initial_loss(self, lengths: npt.ArrayLike) -> Array:
        """The line at these lengths, in nats per target token, constant beyond the measured lengths."""
        slope = linregress(self.log_lengths, self.losses).slope if self._order else 0.0
        return np.asarray(self.losses.mean() + slope * self._from_mean(lengths))

    def standard_error(self, lengths: npt.ArrayLike) -> Array:
        """Standard error of the line at these lengths, in nats; 0 with fewer than 4 texts."""
        sum_of_squares = float(np.sum((self.log_lengths - self.log_lengths.mean()) ** 2)) if self._order else math.inf
        return np.asarray(self.spread * np.sqrt(1 / len(self.losses) + self._from_mean(lengths) ** 2 / sum_of_squares))

    def effect(self, residual: Array, sensitivity: Array, of_run: npt.NDArray[np.intp]) -> float:
        """Slope of the texts' mean residuals on their initial-loss residuals, through 0; 0 unless significant (95 %).

        For each nat of its text's residual, a run's loss falls by this many nats more than the form predicts.

        Args:
            residual: Measured minus predicted loss reduction of unsaturated runs in nats per target token, `(runs,)`.
            sensitivity: Derivative of each run's loss reduction by the power term, `(runs,)`.
            of_run: Index of each run's text, `(runs,)`.
        """
        present, of_run, number = np.unique(of_run, return_inverse=True, return_counts=True)
        left, reach = (np.bincount(of_run, values) / number for values in (residual, sensitivity))
        expected = reach * self.initial_loss_residuals[present]
        squares = float(expected @ expected)
        # The law's level and length exponent take as many degrees of freedom as the line.
        degrees = len(present) - self._order - 2
        if degrees < 2 or squares <= 0:
            return 0.0
        found = float(expected @ left) / squares
        error = math.sqrt(float(np.sum((left - found * expected) ** 2)) / degrees / squares)
        return found if abs(found) > t_quantile(degrees) * error else 0.0

    @property
    def t_over_z(self) -> float:
        """Factor that widens an interval whose spread is estimated from few texts."""
        return t_over_z(self.degrees_of_freedom)

    @property
    def _order(self) -> int:
        return int(np.ptp(self.log_lengths) > 0)

    def _from_mean(self, lengths: npt.ArrayLike) -> Array:
        logs = np.log(np.asarray(lengths, dtype=np.float64))
        return np.asarray(np.clip(logs, self.log_lengths.min(), self.log_lengths.max()) - self.log_lengths.mean())


def collect_texts(runs: Sequence[Observation]) -> Texts:
    """Collect the texts of runs."""
    labels = [run.text_label for run in runs]
    of_run = numbered(labels)
    losses = np.bincount(of_run, [run.initial_loss for run in runs]) / np.bincount(of_run)
    # Taken from the labels: rounding in a mean over runs could make one length look like several.
    logs = np.log([float(length) for length, _ in dict.fromkeys(labels)])
    return Texts(logs, losses, of_run)
