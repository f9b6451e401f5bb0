"""The Parametric Memory Law as one function of named parameters, and its forms as `lmfit.Parameters` for it.

    dL(r, l) = b + min_p(C r^alpha l^(-beta), L0 - b)            min_p(x, c) = (x^-p + c^-p)^(-1/p)

Every form is this equation with some parameters fixed (`Form.parameters`) or computed from the run (`Form.arguments`).
Without the minimum it is the paper's law (Eq. 6). `stored_bits` is `entropy_power` with C = kappa ln 2, both exponents
1 and effective parameters as the size: dL = L0 - H/l + min_p(kappa ln 2 P / l, H/l).
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Final, Literal

import lmfit
import numpy as np
import numpy.typing as npt

from pml.names import AdapterSize, FormName

__all__ = [
    "FORMS",
    "POSITIVE",
    "SHARPNESS_RANGE",
    "AdapterSize",
    "Array",
    "Form",
    "FormName",
    "Points",
    "gradient",
    "loss_reduction",
]

Array = npt.NDArray[np.float64]

SHARPNESS_RANGE: Final = (0.5, 32.0)
"""At 32 the soft minimum is within about 2 % of the plain one, so runs cannot distinguish larger values."""
POSITIVE: Final = ("C", "bits_per_parameter", "sharpness")
"""Parameters above 0. The bootstrap fits their logarithms, and their intervals are widened in the logarithm."""
# Stands in for an infinite ceiling, and keeps squared residuals finite while a fit tries extreme exponents.
LARGEST_LOG: Final = 300.0
SMALLEST_CEILING: Final = 1e-9
# Stands in for an infinite sharpness. Scaling by a power of 2 and back does not round the logarithms.
PLAIN_MINIMUM: Final = 2.0**40


def loss_reduction(
    rank: npt.ArrayLike,
    target_tokens: npt.ArrayLike,
    initial_loss: npt.ArrayLike = math.inf,
    *,
    C: npt.ArrayLike,
    alpha: npt.ArrayLike,
    beta: npt.ArrayLike,
    b: npt.ArrayLike = 0.0,
    sharpness: npt.ArrayLike = math.inf,
) -> Array:
    """Loss reduction in nats per target token, dL = b + min_p(C r^alpha l^(-beta), L0 - b).

    The arguments broadcast.

    Args:
        rank: LoRA rank r, or the number of effective parameters, whichever the law counts as the adapter's size.
        target_tokens: Length l.
        initial_loss: Loss of the frozen model L0, the most that a run can reduce it by. If infinite, the power law has
            no ceiling.
        C: Power term at size 1 and one target token, in nats.
        alpha: Exponent of the size.
        beta: Exponent of the length.
        b: Offset in nats.
        sharpness: p of the soft minimum; infinite for the plain minimum.

    Example:
        >>> round(float(loss_reduction(4, 100, C=40, alpha=0.5, beta=0.5, b=1)), 9)  # 40 * 2 / 10 + 1
        9.0
        >>> round(float(loss_reduction(4, 100, 12, C=40, alpha=0.5, beta=0.5, sharpness=1)), 9)  # 1 / (1/8 + 1/12)
        4.8
    """
    log_power, log_ceiling = _log_terms(rank, target_tokens, initial_loss, C=C, alpha=alpha, beta=beta, b=b)
    p = np.minimum(sharpness, PLAIN_MINIMUM)
    return np.asarray(b + np.exp(-np.logaddexp(-p * log_power, -p * log_ceiling) / p))


def gradient(
    rank: npt.ArrayLike,
    target_tokens: npt.ArrayLike,
    initial_loss: npt.ArrayLike = math.inf,
    *,
    sharpness: npt.ArrayLike = math.inf,
    names: Collection[str] = ("b", "sharpness"),
    **parameters: npt.ArrayLike,
) -> dict[str, Array]:
    """Derivatives of `loss_reduction` by ln C, alpha, beta, b and ln sharpness, keyed by the parameters' names.

    `power` is the derivative by the power term itself, the factor by which noise in that term is attenuated. It falls
    from 1 to 0 as the term rises past the ceiling, and is 2^-(1 + 1/p) where the two are equal.

    The derivatives by b and ln sharpness double the cost, and are computed only if `names` lists them.
    """
    log_power, log_ceiling = _log_terms(rank, target_tokens, initial_loss, **parameters)
    gap, p = log_power - log_ceiling, np.minimum(sharpness, PLAIN_MINIMUM)
    by_power = _by_power(gap, p)
    by_log_power = np.exp(log_power) * by_power
    found = {
        "power": by_power,
        "C": by_log_power,
        "alpha": by_log_power * np.log(rank),
        "beta": -by_log_power * np.log(target_tokens),
    }
    if "b" in names:
        found["b"] = 1.0 - _by_power(-gap, p)
    if "sharpness" in names:
        log_sum = np.logaddexp(-p * log_power, -p * log_ceiling)
        share = np.exp(-p * log_power - log_sum)
        found["sharpness"] = np.exp(-log_sum / p) * (log_sum / p + log_ceiling + share * gap)
    return found


def _log_terms(
    rank: Any, target_tokens: Any, initial_loss: Any = math.inf, *, C: Any, alpha: Any, beta: Any, b: Any = 0.0
) -> tuple[Array, Array]:
    """Logarithms of the two arguments of the soft minimum."""
    with np.errstate(divide="ignore"):
        log_power = np.log(C) + alpha * np.log(rank) - beta * np.log(target_tokens)
    ceiling = np.maximum(np.subtract(initial_loss, b), SMALLEST_CEILING)
    return np.clip(log_power, -LARGEST_LOG, LARGEST_LOG), np.minimum(np.log(ceiling), LARGEST_LOG)


def _by_power(gap: Array, p: Any) -> Array:
    """Derivative of min_p(x, c) with respect to x, where `gap` is ln(x / c)."""
    return np.asarray(np.exp(-(1.0 + 1.0 / p) * np.logaddexp(0.0, p * gap)))


@dataclass(frozen=True)
class Points:
    """Where a law is evaluated: arrays that broadcast, with one entry per run.

    Attributes:
        size: Rank or effective parameters, whichever the law counts as the adapter's size.
        target_tokens: Length in target tokens.
        effective_parameters: Trainable parameters of the adapter; NaN where unknown.
        initial_loss: Loss of the frozen model in nats per target token.
        entropy: Information in the targets in nats per target token; NaN where unknown.
    """

    size: Array
    target_tokens: Array
    effective_parameters: Array
    initial_loss: Array
    entropy: Array

    def at(self, chosen: npt.NDArray[np.bool_]) -> "Points":
        """The points that a mask selects."""
        return Points(*(getattr(self, field.name)[chosen] for field in fields(self)))


@dataclass(frozen=True)
class Form:
    """One form of the law.

    Attributes:
        name: Its name in `law.json` and on the command line.
        text: The equation, with s for the adapter's size.
        meaning: What it describes.
        offset: What b is: zero, a parameter that varies, or a known value for each run, L0 - H / l: by how much the
            frozen model is worse than a uniform guess over a corpus of H nats.
        saturating: Whether it has the ceiling L0, and so also describes saturated runs.
        proportional: Whether the power term is `bits_per_parameter` times the effective parameters, in bits.
    """

    name: FormName
    text: str
    meaning: str
    offset: Literal["zero", "varies", "known"] = "zero"
    saturating: bool = False
    proportional: bool = False

    def parameters(self, **values: float) -> lmfit.Parameters:
        """The form as `lmfit.Parameters`: which vary, which are fixed, and their bounds; see `arguments` for the rest.

        Args:
            values: Initial values that replace the defaults.
        """
        found = lmfit.Parameters()
        if self.proportional:
            found.add("bits_per_parameter", 1.0, min=0.0)
        else:
            found.add("C", 1.0, min=0.0)
            found.add("alpha", 0.5)
            found.add("beta", 0.5)
        if self.offset != "known":
            found.add("b", 0.0, vary=self.offset == "varies")
        if self.saturating:
            low, high = SHARPNESS_RANGE
            found.add("sharpness", 6.0, min=low, max=high)
        for name, value in values.items():
            found[name].value = value
        return found

    @cached_property
    def fitted(self) -> tuple[str, ...]:
        """Names of the parameters that vary, in order."""
        return tuple(name for name, parameter in self.parameters().items() if parameter.vary)

    @property
    def needs_entropy(self) -> bool:
        """Whether the information in the corpus must be known."""
        return self.offset == "known"

    def arguments(self, values: Mapping[str, Any], points: Points) -> dict[str, Any]:
        """Arguments of `loss_reduction` at values of the fitted parameters, which may be arrays that broadcast."""
        if self.proportional:
            power = {"C": math.log(2) * values["bits_per_parameter"], "alpha": 1.0, "beta": 1.0}
        else:
            power = {name: values[name] for name in ("C", "alpha", "beta")}
        return power | {
            "rank": points.effective_parameters if self.proportional else points.size,
            "target_tokens": points.target_tokens,
            "initial_loss": points.initial_loss if self.saturating else math.inf,
            "b": points.initial_loss - points.entropy if self.offset == "known" else values.get("b", 0.0),
            "sharpness": values.get("sharpness", math.inf),
        }

    def evaluate(self, values: Mapping[str, Any], points: Points) -> Array:
        """Loss reduction in nats per target token at these points."""
        return loss_reduction(**self.arguments(values, points))

    def sensitivity(self, values: Mapping[str, Any], points: Points) -> Array:
        """Derivative of the loss reduction by its power term, `(runs,)`; see `gradient`."""
        return gradient(**self.arguments(values, points), names=())["power"]

    def gradient(self, values: Mapping[str, Any], points: Points, names: tuple[str, ...]) -> Array:
        """Derivatives by these parameters (by the logarithm of those in `POSITIVE`), stacked along the last axis."""
        by_name = gradient(**self.arguments(values, points), names=names)
        by_name["bits_per_parameter"] = by_name["C"]
        return np.stack(np.broadcast_arrays(*(by_name[name] for name in names)), axis=-1)


FORMS: Final[dict[FormName, Form]] = {
    form.name: form
    for form in (
        Form("power", "dL = C s^alpha l^-beta", "runs far below the ceiling, without offset"),
        Form("power_offset", "dL = C s^alpha l^-beta + b", "the paper's law (Eq. 6), unsaturated runs", "varies"),
        Form("ceiling", "dL = min(C s^alpha l^-beta, L0)", "`power` up to the frozen model's loss", "zero", True),
        Form(
            "ceiling_offset",
            "dL = b + min(C s^alpha l^-beta, L0 - b)",
            "the paper's law up to the frozen model's loss",
            "varies",
            True,
        ),
        Form(
            "entropy_power",
            "dL = L0 - H/l + min(C s^alpha l^-beta, H/l)",
            "stored information as a power law, after the frozen model's distance from uniform",
            "known",
            True,
        ),
        Form(
            "stored_bits",
            "stored bits = min(kappa P, H)",
            "every effective parameter stores kappa bits until the corpus is stored",
            "known",
            True,
            True,
        ),
    )
}
"""The forms of the law by name."""
