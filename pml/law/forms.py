"""The forms of the law as functions of their parameters: loss reduction in nats per target token, and its slopes.

Every form is an offset plus a power of the adapter's size and the length, and most know a ceiling:

    dL = offset + min_p(C s^alpha l^(-beta), L0 - offset)      min_p(x, c) = (x^-p + c^-p)^(-1/p)

s is the rank or the number of effective parameters, L0 the frozen model's loss, which no run can lower by more than
itself. min_p is a smooth minimum: the power law while x is small, the ceiling when it is large, and the plain minimum
for a knee p without end. The offset is nothing, a fitted b, or L0 - H / l, the frozen model's distance from guessing
uniformly, for a corpus of H nats: what lies above it is information that the adapter holds.

Positive parameters are handled as logarithms, which keeps them positive without a bound.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

__all__ = [
    "FORMS",
    "KNEE_RANGE",
    "SHARPEST_KNEE",
    "Array",
    "CapacityName",
    "Form",
    "FormName",
    "Points",
    "reduction",
    "sensitivity",
    "slopes",
]

Array = npt.NDArray[np.float64]
FormName = Literal["power", "power_offset", "ceiling", "ceiling_offset", "entropy_power", "stored_bits"]
CapacityName = Literal["rank", "effective_parameters"]

SHARPEST_KNEE: Final = 32.0
"""From here on the smooth minimum is the plain one to 2 %, so cells cannot tell larger knees apart."""
SMOOTHEST_KNEE: Final = 0.5
KNEE_RANGE: Final = (math.log(SMOOTHEST_KNEE), math.log(SHARPEST_KNEE))
"""Of ln knee; past its ends a knee makes no difference any more."""
# Bounds the exponent while a start wanders, so that squares of residuals stay finite.
LARGEST_EXPONENT: Final = 300.0


@dataclass(frozen=True)
class Form:
    """One form of the law.

    Attributes:
        name: What it is called in `law.json` and on the command line.
        text: The equation.
        meaning: When it is the right one, in a line.
        offset: What the power is added to: nothing, a fitted `b`, or L0 - H / l of a corpus of H nats.
        bounded: Whether it knows the ceiling, and hence uses saturated cells.
        proportional: Whether both exponents are 1 and the size is the number of effective parameters: one constant,
            `kappa` in bits per effective parameter.
    """

    name: FormName
    text: str
    meaning: str
    offset: Literal["none", "fitted", "entropy"] = "none"
    bounded: bool = False
    proportional: bool = False

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the fitted parameters, in order."""
        power = ("kappa",) if self.proportional else ("C", "alpha", "beta")
        return power + (("b",) if self.offset == "fitted" else ()) + (("knee",) if self.bounded else ())

    @property
    def text_share(self) -> float:
        """Of a nat more that the frozen model loses on one text than on another, how much the form takes off."""
        return 1.0 if self.offset == "entropy" else 0.0

    @property
    def needs_entropy(self) -> bool:
        """Whether the corpus' information has to be known."""
        return self.offset == "entropy"


FORMS: Final[dict[FormName, Form]] = {
    form.name: form
    for form in (
        Form("power", "dL = C s^alpha l^-beta", "far below the ceiling, nothing to take off"),
        Form("power_offset", "dL = C s^alpha l^-beta + b", "the paper's law (Eq. 6), unsaturated cells", "fitted"),
        Form("ceiling", "dL = min(C s^alpha l^-beta, L0)", "as `power`, up to the frozen model's loss", "none", True),
        Form(
            "ceiling_offset",
            "dL = b + min(C s^alpha l^-beta, L0 - b)",
            "the paper's law, up to the frozen model's loss",
            "fitted",
            True,
        ),
        Form(
            "entropy_power",
            "dL = L0 - H/l + min(C s^alpha l^-beta, H/l)",
            "a power of what is stored, once the frozen model's distance from uniform is taken off",
            "entropy",
            True,
        ),
        Form(
            "stored_bits",
            "stored bits = min(kappa P, H)",
            "every effective parameter stores kappa bits, until the corpus is stored",
            "entropy",
            True,
            True,
        ),
    )
}
"""By name, the simplest first."""


@dataclass(frozen=True)
class Points:
    """Where the law is evaluated, one entry a cell (or a prediction).

    Attributes:
        log_size: ln of the rank or of the effective parameters, as the law counts.
        log_tokens: ln of the length in target tokens.
        log_parameters: ln of the effective parameters; NaN where unknown.
        initial_loss: L0 in nats per target token.
        entropy: H / l in nats per target token; NaN where unknown.
    """

    log_size: Array
    log_tokens: Array
    log_parameters: Array
    initial_loss: Array
    entropy: Array

    def shifted(self, log_size: float, log_tokens: float) -> "Points":
        """The same with sizes and lengths in another unit: these logarithms are subtracted."""
        return replace(self, log_size=self.log_size - log_size, log_tokens=self.log_tokens - log_tokens)

    def at(self, chosen: npt.NDArray[np.bool_] | npt.NDArray[np.intp]) -> "Points":
        """Some of the points."""
        return Points(
            self.log_size[chosen],
            self.log_tokens[chosen],
            self.log_parameters[chosen],
            self.initial_loss[chosen],
            self.entropy[chosen],
        )


def reduction(form: Form, theta: Array | Sequence[float], points: Points) -> Array:
    """Loss reduction in nats per target token.

    Args:
        form: The form.
        theta: `(..., parameters)`: the form's parameters in order, ln C, ln kappa and ln knee in place of C, kappa and
            knee.
        points: n points.

    Returns:
        `(..., n)`.
    """
    log_power, offset, values = _terms(form, theta, points)
    if not form.bounded:
        return np.exp(log_power) + offset
    log_ceiling = np.log(np.maximum(points.initial_loss - offset, 1e-9))
    knee = np.exp(values[-1])
    return np.exp(-np.logaddexp(-knee * log_power, -knee * log_ceiling) / knee) + offset


def slopes(form: Form, theta: Array | Sequence[float], points: Points) -> Array:
    """Derivatives of `reduction` with respect to the parameters as they stand in `theta`, `(..., n, parameters)`."""
    log_power, offset, values = _terms(form, theta, points)
    if form.bounded:
        log_ceiling = np.log(np.maximum(points.initial_loss - offset, 1e-9))
        knee = np.exp(values[-1])
        log_sum = np.logaddexp(-knee * log_power, -knee * log_ceiling)
        value = np.exp(-log_sum / knee)
        # The share of the smooth minimum's slope that the power has; the ceiling has the rest.
        share = np.exp(-knee * log_power - log_sum)
        by_power = value * share
        by_offset = 1.0 - value * (1.0 - share) / np.maximum(points.initial_loss - offset, 1e-9)
        by_knee = value * (log_sum / knee + share * log_power + (1.0 - share) * log_ceiling)
    else:
        by_power, by_offset, by_knee = np.exp(log_power), np.ones_like(log_power), np.zeros_like(log_power)
    columns = [by_power]
    if not form.proportional:
        columns += [by_power * points.log_size, -by_power * points.log_tokens]
    if form.offset == "fitted":
        columns.append(by_offset)
    if form.bounded:
        columns.append(by_knee)
    return np.stack(np.broadcast_arrays(*columns), axis=-1)


def sensitivity(form: Form, theta: Array | Sequence[float], points: Points) -> Array:
    """By how much dL changes per change of the power term, `(..., n)`: 1 far below the ceiling, 0 at it.

    It is the share of a run's luck that gets through to its loss: near the ceiling every run ends alike.
    """
    if not form.bounded:
        return np.ones_like(reduction(form, theta, points))
    log_power, offset, values = _terms(form, theta, points)
    log_ceiling = np.log(np.maximum(points.initial_loss - offset, 1e-9))
    knee = np.exp(values[-1])
    return np.exp(-(1.0 + 1.0 / knee) * np.logaddexp(0.0, knee * (log_power - log_ceiling)))


def _terms(form: Form, theta: Array | Sequence[float], points: Points) -> tuple[Array, Array, list[Array]]:
    """Logarithm of the power term, the offset, and the parameters one by one, all ready to broadcast with points."""
    values = np.asarray(theta, dtype=np.float64)
    one_by_one = [values[..., i, None] for i in range(values.shape[-1])]
    if form.proportional:
        # kappa bits per parameter, spread over the target tokens.
        log_power = one_by_one[0] + math.log(math.log(2)) + points.log_parameters - points.log_tokens
    else:
        log_power = one_by_one[0] + one_by_one[1] * points.log_size - one_by_one[2] * points.log_tokens
    log_power = np.clip(log_power, -LARGEST_EXPONENT, LARGEST_EXPONENT)
    if form.offset == "fitted":
        offset = one_by_one[3]
    elif form.offset == "entropy":
        offset = points.initial_loss - points.entropy
    else:
        offset = np.zeros(1)
    return log_power, offset, one_by_one
