"""Least squares for one form: the lmfit fit from several initial values, and batched fits for the bootstrap."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import lmfit
import numpy as np

from pml.law.data import Data
from pml.law.forms import POSITIVE, SHARPNESS_RANGE, Array, Form

__all__ = [
    "Solution",
    "batched_least_squares",
    "minimize",
    "minimizer",
    "solve",
    "to_natural",
    "to_theta",
]

# Initial sharpness: a wide bend, a narrow bend and almost none.
INITIAL_SHARPNESS = (2.0, 6.0, 20.0)
# Initial values of b, as shares of the smallest loss reduction (above 0) and of the mean (below 0).
OFFSETS_ABOVE, OFFSETS_BELOW = (0.5, 0.9), (0.2, 1.0, 4.0)
STARTS = 3
# Limits of batched fits. The relative fall of the squares at which a draw stops is far below the draws' spread.
MOST_STEPS = 60
SMALLEST_FALL = 1e-7
# The least damping, absolute and as a share of the trace, that keeps every matrix invertible in float64.
SMALLEST_DAMPING, SMALLEST_SHARE = 1e-9, 1e-13
# lmfit squares values with a bound. This limit is far from overflow, and far beyond any law.
LARGEST_START = 1e100


@dataclass(frozen=True, eq=False)
class Solution:
    """A form fitted to data. Compares and hashes by identity.

    Attributes:
        form: The form.
        data: The data it was fitted to.
        values: The fitted parameters by name.
        free: The parameters that vary; the others are held at an end of their range.
        converged: Whether lmfit reached a minimum.
    """

    form: Form
    data: Data
    values: dict[str, float]
    free: tuple[str, ...]
    converged: bool = True

    @property
    def parameters(self) -> lmfit.Parameters:
        """The parameters for lmfit, of which only the free ones vary."""
        found = self.form.parameters(**self.values)
        for name in self.values:
            found[name].vary = name in self.free
        return found

    @cached_property
    def predicted(self) -> Array:
        """Predicted loss reduction of each run, in nats per target token."""
        return self.form.evaluate(self.values, self.data.points)

    @property
    def residual(self) -> Array:
        """Measured minus predicted loss reduction of each run."""
        return self.data.measured - self.predicted

    @cached_property
    def weighted_jacobian(self) -> Array:
        """Weighted derivatives by the free parameters (positive ones: by their logarithm), `(runs, parameters)`."""
        return _weighted_jacobian(self.form, self.data, self.values, self.free)


def _weighted_residuals(form: Form, data: Data, values: Mapping[str, Any], measured: Array) -> Array:
    """Predicted minus measured, weighted. The sign is the reverse of `Solution.residual`, as the Jacobian needs."""
    return (form.evaluate(values, data.points) - measured) * data.root_weights


def _weighted_jacobian(form: Form, data: Data, values: Mapping[str, Any], names: tuple[str, ...]) -> Array:
    """Derivatives of the weighted residuals by these parameters (positive ones: by their logarithm)."""
    return form.gradient(values, data.points, names) * data.root_weights[:, None]


def minimizer(
    form: Form, data: Data, parameters: lmfit.Parameters, noise: float = 1.0, tolerance: float = 1e-13
) -> lmfit.Minimizer:
    """The lmfit problem. Residuals are in units of the noise, so the covariance needs no scaling."""

    def residuals(parameters: lmfit.Parameters) -> Array:
        return _weighted_residuals(form, data, parameters.valuesdict(), data.measured) / noise

    def jacobian(parameters: lmfit.Parameters) -> Array:
        values = parameters.valuesdict()
        names = tuple(name for name, parameter in parameters.items() if parameter.vary)
        scale = np.array([values[name] if name in POSITIVE else 1.0 for name in names])
        return _weighted_jacobian(form, data, values, names) / scale / noise

    return lmfit.Minimizer(
        residuals,
        parameters,
        scale_covar=False,
        nan_policy="propagate",
        max_nfev=2000,
        Dfun=jacobian,
        ftol=tolerance,
        xtol=tolerance,
        gtol=1e-15,
    )


def minimize(
    form: Form, data: Data, parameters: lmfit.Parameters, noise: float = 1.0
) -> lmfit.minimizer.MinimizerResult:
    """Solve by Levenberg-Marquardt from these initial values."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return minimizer(form, data, parameters, noise).leastsq()


def solve(form: Form, data: Data) -> Solution | None:
    """Fit a form by least squares; None if no C > 0 fits.

    `batched_least_squares` takes several starts most of the way, and lmfit polishes the best of them.
    """
    starts = _starts(form, data)
    if not starts:
        return None
    thetas = np.array([to_theta(form, one) for one in starts])
    rough = batched_least_squares(form, data, data.measured[None], thetas, form.fitted)
    with np.errstate(all="ignore"):
        squares = np.sum(_weighted_residuals(form, data, to_natural(form, rough), data.measured) ** 2, axis=-1)
        best_of = int(np.argmin(np.nan_to_num(squares, nan=math.inf)))
    start = {name: float(value[0]) for name, value in to_natural(form, rough[best_of]).items()}
    if not all(abs(value) < LARGEST_START for value in start.values()):
        return None
    free = form.fitted
    low, high = SHARPNESS_RANGE
    if form.saturating and not low < start["sharpness"] < high:
        start["sharpness"] = min(max(start["sharpness"], low), high)
        free = tuple(name for name in free if name != "sharpness")
    best = minimize(form, data, Solution(form, data, start, free).parameters)
    values = {name: float(best.params[name].value) for name in form.fitted}
    if not all(map(math.isfinite, values.values())) or values[form.fitted[0]] <= 0:
        return None
    return Solution(form, data, values, free, bool(best.success))


def _starts(form: Form, data: Data) -> list[dict[str, float]]:
    """Initial values from log-linear fits to the unsaturated runs, for several values of b and of the sharpness."""
    points, measured = data.points.at(data.unsaturated), data.measured[data.unsaturated]
    bends: list[dict[str, float]] = [{"sharpness": p} for p in INITIAL_SHARPNESS] if form.saturating else [{}]
    if form.offset == "known":
        measured = measured - (points.initial_loss - points.entropy)
    if form.proportional:
        per_parameter = measured * points.target_tokens / points.effective_parameters / math.log(2)
        positive = per_parameter[per_parameter > 0]
        return [{"bits_per_parameter": float(np.median(positive)) if len(positive) else 1e-3, **bend} for bend in bends]
    offsets = [0.0]
    if form.offset == "varies":
        offsets += [share * measured.min() for share in OFFSETS_ABOVE]
        offsets += [-share * abs(measured.mean()) for share in OFFSETS_BELOW]
    columns = np.stack([np.ones(len(measured)), np.log(points.size), -np.log(points.target_tokens)], axis=1)
    found: list[tuple[float, dict[str, float]]] = []
    for b in offsets:
        above = measured > b
        if above.sum() < 3:
            continue
        log_c, alpha, beta = np.linalg.lstsq(columns[above], np.log(measured[above] - b), rcond=None)[0].tolist()
        power = np.exp(columns @ [log_c, alpha, beta])
        squares = float(np.sum((power + b - measured) ** 2))
        start = {"C": math.exp(min(max(log_c, -300.0), 300.0)), "alpha": alpha, "beta": beta}
        found.append((squares, start | ({"b": float(b)} if form.offset == "varies" else {})))
    found.sort(key=lambda item: item[0])
    return [start | bend for _, start in found[:STARTS] for bend in bends]


def to_theta(form: Form, values: dict[str, float]) -> Array:
    """The fitted parameters as a vector, in order, positive ones as logarithms."""
    return np.array([math.log(values[name]) if name in POSITIVE else values[name] for name in form.fitted])


def to_natural(form: Form, theta: Array) -> dict[str, Array]:
    """Invert `to_theta` for `(..., parameters)`: arrays by name, each with a last axis for runs."""
    with np.errstate(over="ignore"):
        return {
            name: (np.exp(theta[..., i, None]) if name in POSITIVE else theta[..., i, None])
            for i, name in enumerate(form.fitted)
        }


def batched_least_squares(form: Form, data: Data, measured: Array, start: Array, free: tuple[str, ...]) -> Array:
    """Solve least-squares problems for many sets of measurements, or from many initial values, at once.

    Takes Levenberg-Marquardt steps in coordinates in which the Jacobian at the first start is orthonormal.

    Args:
        form: The form.
        data: The runs; `data.measured` is not used.
        measured: Loss reductions in nats per target token, `(draws or 1, runs)`.
        start: Initial values in the order of `to_theta`, `(draws or 1, parameters)`.
        free: Parameters that vary.

    Returns:
        Solutions in the order of `to_theta`, `(draws, parameters)`.
    """
    index, draws = [form.fitted.index(name) for name in free], max(len(measured), len(start))
    measured = np.broadcast_to(measured, (draws, measured.shape[1]))
    theta = np.broadcast_to(start, (draws, start.shape[1])).copy()

    def jacobian_at(theta: Array) -> Array:
        return _weighted_jacobian(form, data, to_natural(form, theta), free)

    def residuals_at(theta: Array, measured: Array) -> Array:
        return _weighted_residuals(form, data, to_natural(form, theta), measured)

    with np.errstate(all="ignore"):
        basis = np.linalg.pinv(np.linalg.qr(jacobian_at(theta[:1])[0])[1])
        unit = np.eye(len(index))
        # Only draws that have not converged keep moving.
        moving, damping = np.arange(len(measured)), np.full(len(measured), 1e-3)
        residuals = residuals_at(theta, measured)
        squares = np.sum(residuals**2, axis=-1)
        for _ in range(MOST_STEPS):
            jacobian = jacobian_at(theta[moving]) @ basis
            gram = jacobian.swapaxes(1, 2) @ jacobian
            # A draw whose Jacobian has diverged is given up, so that it does not stop the others.
            lost = ~np.isfinite(gram).all(axis=(1, 2))
            gram[lost], damping[moving[lost]] = unit, math.inf
            floor = np.maximum(SMALLEST_SHARE * np.trace(gram, axis1=1, axis2=2), SMALLEST_DAMPING)
            gram += np.where(lost, 0.0, np.maximum(damping[moving], floor))[:, None, None] * unit
            step = np.linalg.solve(gram, jacobian.swapaxes(1, 2) @ residuals[moving, :, None])[..., 0] @ basis.T
            tried = theta[moving]
            tried[:, index] -= step
            tried_residuals = residuals_at(tried, measured[moving])
            tried_squares = np.sum(tried_residuals**2, axis=-1)
            better = tried_squares <= squares[moving]
            fall = 1.0 - tried_squares / np.maximum(squares[moving], 1e-300)
            improved = moving[better]
            theta[improved], residuals[improved] = tried[better], tried_residuals[better]
            squares[improved] = tried_squares[better]
            damping[moving] *= np.where(better, 0.1, 10.0)
            moving = moving[~(better & (fall < SMALLEST_FALL) | (damping[moving] > 1e10))]
            if not len(moving):
                break
    return theta
