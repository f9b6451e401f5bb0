"""Texts of one length differ in how well the frozen model knows them, and with it in how much there is to learn.

The frozen model's loss L0 on a text is compared with what is usual at its length, a straight line in ln l through the
law's texts. Of a nat that lies above it an adapter of given size may take off nothing, so that it is left over, or all
of it. The share is fitted to what the form leaves, text by text, with a normal prior of 0.5 +- 0.5 that lets few texts
say little.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from pml.law.cells import Cell
from pml.law.forms import Array
from pml.law.uncertainty import expansion

__all__ = ["FEWEST_TEXTS", "OTHER_KIND", "Texts", "texts_of"]

OTHER_KIND: Final = 0.1
"""A text on which the frozen model's loss is off by a larger share is of another kind.

Texts of one kind differ by less: random tokens of one length by up to a twentieth.
"""

PRIOR_SHARE, PRIOR_ERROR = 0.5, 0.5
# Residuals of float32 losses are not known better, in nats; keeps the share of an exact law finite.
SMALLEST_RESIDUAL = 1e-6
FEWEST_TEXTS: Final = 4
"""As many say how texts scatter around a line and leave two to spare."""


@dataclass(frozen=True)
class Texts:
    """The texts of a law's cells.

    Attributes:
        log_lengths: ln l of each text, `(texts,)`.
        losses: The frozen model's loss on each in nats per target token, `(texts,)`.
        of_cell: Index of each cell's text, `(cells,)`.
    """

    log_lengths: Array
    losses: Array
    of_cell: npt.NDArray[np.intp]

    @property
    def spread(self) -> float:
        """By how much texts of one length differ in the frozen model's loss, a standard deviation in nats per token.

        0 with fewer than 4 texts, which cannot tell.
        """
        if len(self.losses) < FEWEST_TEXTS:
            return 0.0
        return math.sqrt(float(self.excess @ self.excess) / self._degrees)

    @property
    def widened_spread(self) -> float:
        """The same, as much larger as an interval has to be where it is known from few texts."""
        return self.spread * expansion(self._degrees)

    @property
    def excess(self) -> Array:
        """By how much the loss on each text lies above the line, in nats per target token, `(texts,)`."""
        return self.losses - self._line(self.log_lengths)

    def usual_loss(self, lengths: npt.ArrayLike) -> Array:
        """The frozen model's usual loss on a text of a length, in nats per target token; keeps the shape.

        Beyond the measured lengths as at the end.
        """
        logs = np.log(np.asarray(lengths, dtype=np.float64))
        return self._line(np.clip(logs, self.log_lengths.min(), self.log_lengths.max()))

    def usual_draws(self, log_lengths: Array, normal: Array) -> Array:
        """By how much the line may be off, being known from these texts alone, in nats per target token.

        Args:
            log_lengths: ln l, `(n,)`.
            normal: Standard normal numbers, `(draws, 2)`.

        Returns:
            `(draws, n)`; 0 with fewer than 4 texts, which cannot tell.
        """
        if len(self.losses) < FEWEST_TEXTS:
            return np.zeros((len(normal), len(log_lengths)))
        measured = np.vander(self.log_lengths, self._lines)
        root = np.linalg.inv(np.linalg.qr(measured)[1])
        asked = np.vander(np.clip(log_lengths, self.log_lengths.min(), self.log_lengths.max()), self._lines)
        return np.asarray(self.widened_spread * normal[:, : self._lines] @ (asked @ root).T)

    def share_learnt(
        self, residual: Array, free: Array, chosen: npt.NDArray[np.bool_], own: float
    ) -> tuple[float, float]:
        """What share of a text's excess an adapter takes off too, and its standard error.

        Args:
            residual: Measured minus predicted loss reduction of each cell, in nats per target token, `(cells,)`.
            free: Share of it that would get through to the loss (`pml.law.forms.sensitivity`), `(cells,)`.
            chosen: Cells to learn it from, those that are not saturated, `(cells,)`.
            own: The share that the form has taken off already, 0 or 1.
        """
        of_cell = self.of_cell[chosen]
        cells = np.bincount(of_cell, minlength=len(self.losses))
        known = cells > 0
        left, through = (
            np.bincount(of_cell, values[chosen], len(self.losses))[known] / cells[known] for values in (residual, free)
        )
        expected = through * self.excess[known]
        squares = float(expected @ expected)
        # One for the share, and what the law's own level and length exponent take from as many texts.
        degrees = int(known.sum()) - self._lines - 1
        weight = 1.0 / PRIOR_ERROR**2
        share = PRIOR_SHARE - own
        if degrees > 0 and squares > 0:
            found = float(expected @ left) / squares
            variance = float(np.sum((left - found * expected) ** 2)) / degrees * expansion(degrees) ** 2
            evidence = squares / max(variance, SMALLEST_RESIDUAL**2)
            share = (weight * share + evidence * found) / (weight + evidence)
            weight += evidence
        return own + share, 1.0 / math.sqrt(weight)

    @property
    def _degrees(self) -> int:
        """Texts that the line leaves to spare."""
        return len(self.losses) - self._lines

    @property
    def _lines(self) -> int:
        """Parameters of the line: its level, and its slope where there is more than one length."""
        return 1 + int(np.ptp(self.log_lengths) > 0)

    def _line(self, logs: Array) -> Array:
        line = np.polyfit(self.log_lengths, self.losses, self._lines - 1)
        return np.asarray(np.polyval(line, logs), dtype=np.float64)


def texts_of(cells: Sequence[Cell]) -> Texts:
    """The texts of cells; where a cell does not name its text, by the length and the frozen model's loss."""
    labels: dict[Hashable, int] = {}
    of_cell = np.array([labels.setdefault(cell.text_label, len(labels)) for cell in cells], dtype=np.intp)
    counts = np.bincount(of_cell)
    losses = np.bincount(of_cell, [cell.initial_loss for cell in cells]) / counts
    logs = np.bincount(of_cell, [math.log(cell.target_tokens) for cell in cells]) / counts
    return Texts(logs, losses, of_cell)
