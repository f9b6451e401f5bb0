"""The parts of a fitted law: parameters, held-out errors, the fit of one form, and simulated runs."""

from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import numpy as np
import pydantic

from pml.content import Content
from pml.law.forms import FORMS, Array, FormName
from pml.law.intervals import GroupedBy

__all__ = [
    "FACTORS",
    "LAW_SCHEMA_VERSION",
    "Estimate",
    "Factor",
    "FormFit",
    "HeldOut",
    "Interval",
    "RunDraws",
    "UnsaturatedFit",
    "percentiles",
]

LAW_SCHEMA_VERSION: Final = 6
Factor = Literal["rank", "effective_parameters", "target_tokens"]
FACTORS: Final[dict[Factor, str]] = {
    "rank": "rank",
    "effective_parameters": "adapter size",
    "target_tokens": "length",
}
"""The variables of a law with their names in text. A law counts one of the first two as the adapter's size."""
Interval = tuple[float, float]


class Estimate(Content):
    """A parameter with its uncertainty; None where the solution has none.

    Attributes:
        value: The fitted value.
        stderr: Standard error from lmfit.
        profile: 95 % interval from the profile likelihood.
        bootstrap: 95 % interval from the bootstrap over groups of runs.
    """

    value: float
    stderr: float | None = None
    profile: Interval | None = None
    bootstrap: Interval | None = None

    @property
    def interval(self) -> Interval | None:
        """The 95 % interval to quote: from the bootstrap, which allows for noise that grows with dL, or the profile."""
        return self.bootstrap or self.profile


class HeldOut(Content):
    """Held-out prediction of the largest rank or length from the smaller ones.

    Attributes:
        factor: The variable whose largest value was held out.
        value: That value: the largest rank, number of parameters or length with unsaturated runs.
        runs: Number of unsaturated runs held out. Saturated runs at this value or above are held out too.
        mape_percent: Mean absolute error of their loss reduction in percent; None if the rest determine no form.
    """

    factor: Factor
    value: int
    runs: int
    mape_percent: float | None


class FormFit(Content):
    """One fitted form of the law.

    Attributes:
        form: Name of the form.
        parameters: Estimates by name. `C` and `b` are in nats per target token, `bits_per_parameter` in bits per
            effective parameter; the others have no unit. C is the power term at size 1 and one token.
        at_bound: Parameters held at an end of their range, such as a sharpness of 32, the plain minimum. They have no
            interval and do not count as fitted.
        correlation: Correlation matrix of the other parameters; None if there is no covariance.
        determined: False if a logarithm describes the runs as well, so that C and b have no limit.
        converged: Whether lmfit reached a minimum.
        observations_used: Number of runs that it was fitted to: all for a saturating form, else the unsaturated ones.
        grouped_by: Which runs share an error in the intervals: the seeds of one grid point, or the ranks on one text.
        degrees_of_freedom: Groups with unsaturated runs minus fitted parameters; with too few groups see `Noise`.
        noise_nats: Standard deviation of a run around the law far below the ceiling, in nats per target token: seed
            noise and the form's own error together.
        noise_at_ceiling_nats: RMS residual of saturated runs; None if the form was fitted to none.
        text_effect: Slope of residuals on the initial-loss residual; 0 unless significant (see `Texts.effect`).
        r2: R2 of the loss reduction over the used runs.
        r2_all: R2 over all runs, to compare forms; predictions are capped at the frozen model's loss.
        mape_percent: Mean absolute error relative to the measured loss reduction, in percent, over the used runs.
        rmse_nats: Root mean squared error in nats per target token, over the used runs.
        aicc: Akaike's criterion with the small-sample correction, over the means of the grid points with unsaturated
            runs, which every form describes; None with too few grid points.
        held_out: Held-out predictions of the largest size and the largest length.
        predicted: Predicted loss reduction in nats per target token, for each observation of the law.
    """

    form: FormName
    parameters: dict[str, Estimate]
    at_bound: list[str]
    correlation: list[list[float]] | None
    determined: bool
    converged: bool
    observations_used: int
    grouped_by: GroupedBy
    degrees_of_freedom: int
    noise_nats: float
    noise_at_ceiling_nats: float | None
    text_effect: float
    r2: float
    r2_all: float
    mape_percent: float
    rmse_nats: float
    aicc: float | None
    held_out: list[HeldOut]
    predicted: list[float]

    @pydantic.model_validator(mode="after")
    def _parts_agree(self) -> "FormFit":
        expected = FORMS[self.form].fitted
        if tuple(self.parameters) != expected:
            raise ValueError(
                f"{self.form}: expected the parameters {', '.join(expected)}; got {', '.join(self.parameters)}"
            )
        free = len(self.free)
        if self.correlation is not None and [len(row) for row in self.correlation] != [free] * free:
            raise ValueError(f"{self.form}: correlation: expected {free} rows of {free} numbers")
        return self

    @property
    def values(self) -> dict[str, float]:
        """The values of the parameters by name."""
        return {name: estimate.value for name, estimate in self.parameters.items()}

    @property
    def free(self) -> tuple[str, ...]:
        """Names of the parameters that are not at a bound."""
        return tuple(name for name in self.parameters if name not in self.at_bound)

    def largest(self, factor: Factor) -> HeldOut | None:
        """The held-out prediction of the largest size or length; None with fewer than three of them."""
        return next((held for held in self.held_out if held.factor == factor), None)


class UnsaturatedFit(NamedTuple):
    """How well a form describes the unsaturated runs.

    Attributes:
        r2: R2 of the loss reduction over these runs.
        mape_percent: Mean absolute error relative to the measured loss reduction, in percent.
        runs: Number of these runs.
    """

    r2: float
    mape_percent: float
    runs: int


@dataclass(frozen=True)
class RunDraws:
    """Simulated new runs, `(laws, runs, ...)`, in nats per target token.

    Attributes:
        initial_loss: The frozen model's loss on the text of each run.
        loss_reduction: Loss reduction, at most `initial_loss`.
    """

    initial_loss: Array
    loss_reduction: Array

    @property
    def final_loss(self) -> Array:
        """Initial loss minus loss reduction."""
        return self.initial_loss - self.loss_reduction


def percentiles(draws: Array) -> tuple[float, float]:
    """The central 95 % interval of the draws."""
    low, high = np.percentile(draws, (2.5, 97.5)).tolist()
    return low, high
