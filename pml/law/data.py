"""What a form is fitted to: runs as arrays, and the weights of their residuals."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pml.law.forms import AdapterSize, Array, Form, Points
from pml.law.observations import Observation, saturated

__all__ = ["Data", "make_data", "weights"]

# Losses are float32, so a smaller variance among replicates (in nats squared) is rounding.
SMALLEST_VARIANCE = 1e-12
# The variance over two or three seeds is itself uncertain: the pooled variance counts as this many further seeds.
PRIOR_DEGREES = 4


@dataclass(frozen=True)
class Data:
    """What a form is fitted to, with one entry per run.

    Attributes:
        runs: The runs.
        points: The size, length and losses of each run, at which a form is evaluated.
        measured: Loss reduction in nats per target token.
        root_weights: Square roots of the weights of the squared residuals.
        unsaturated: Whether the adapter limits the run, not the text.
    """

    runs: Sequence[Observation]
    points: Points
    measured: Array
    root_weights: Array
    unsaturated: npt.NDArray[np.bool_]

    def at(self, chosen: npt.NDArray[np.bool_]) -> "Data":
        """The runs that a mask selects."""
        runs = [run for run, keep in zip(self.runs, chosen, strict=True) if keep]
        return Data(
            runs, self.points.at(chosen), self.measured[chosen], self.root_weights[chosen], self.unsaturated[chosen]
        )

    def used_by(self, form: Form) -> "Data":
        """The runs that a form is fitted to: all of them for a saturating form, otherwise the unsaturated ones."""
        return self if form.saturating else self.at(self.unsaturated)


def make_data(runs: Sequence[Observation], adapter_size: AdapterSize) -> Data:
    """Convert runs to arrays."""
    tokens = np.array([run.target_tokens for run in runs], dtype=np.float64)
    parameters = np.array([run.effective_parameters or math.nan for run in runs], dtype=np.float64)
    bits = np.array([math.nan if run.entropy_bits is None else run.entropy_bits for run in runs])
    size = parameters if adapter_size == "effective_parameters" else np.array([float(run.rank) for run in runs])
    initial = np.array([run.initial_loss for run in runs])
    return Data(
        runs,
        Points(size, tokens, parameters, initial, bits * math.log(2) / tokens),
        np.array([run.loss_reduction for run in runs]),
        np.sqrt(weights(runs)),
        np.array([not saturated(run) for run in runs], dtype=bool),
    )


def weights(runs: Sequence[Observation]) -> Array:
    """Weights of the squared residuals: pooled variance over the variance of a run's replicates; 1 without replicates.

    The variance of each grid point over its seeds is first shrunk towards the pooled variance (empirical Bayes).
    Saturated runs have weight 1, since their agreement says nothing about the noise.
    """
    found = np.ones(len(runs))
    groups: dict[Hashable, list[int]] = {}
    for i, run in enumerate(runs):
        if not saturated(run):
            groups.setdefault(run.grid_point, []).append(i)
    replicated = [members for members in groups.values() if len(members) > 1]
    degrees = np.array([len(members) - 1 for members in replicated], dtype=np.float64)
    variances = np.array([np.var([runs[i].loss_reduction for i in members], ddof=1) for members in replicated])
    pooled = float(degrees @ variances) / max(degrees.sum(), 1.0)
    # The spread of a single replicated grid point has nothing to be compared with.
    if len(replicated) < 2 or pooled <= SMALLEST_VARIANCE:
        return found
    for members, degree, variance in zip(replicated, degrees, variances, strict=True):
        found[members] = (PRIOR_DEGREES + degree) * pooled / (PRIOR_DEGREES * pooled + degree * variance)
    return found
