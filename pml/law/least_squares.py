"""Least squares for one form: weights, initial values, the lmfit fit, and many refits at once for the bootstrap."""

import math
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import lmfit
import numpy as np
import numpy.typing as npt

from pml.law.forms import POSITIVE, SHARPNESS_RANGE, AdapterSize, Array, Form, Points
from pml.law.observations import Observation, saturated

__all__ = [
    "Data",
    "Solution",
    "data_of",
    "minimize",
    "minimizer",
    "refit_many",
    "residuals",
    "solve",
    "to_natural",
    "to_theta",
    "weights",
]

# Initial sharpness values: a wide bend, a narrow one, and none.
INITIAL_SHARPNESS = (2.0, 6.0, 20.0)
# Initial values of b, as shares of the smallest loss reduction (above 0) and of the mean (below 0).
OFFSETS_ABOVE, OFFSETS_BELOW = (0.5, 0.9), (0.2, 1.0, 4.0)
STARTS = 3
# For refits, far below the spread of a bootstrap's draws.
MOST_STEPS = 60
SMALLEST_FALL = 1e-7
# Losses are float32: a smaller variance of replicates, in nats squared, is rounding.
SMALLEST_VARIANCE = 1e-12
# The spread over two or three seeds is itself uncertain: the pooled spread counts as this many further seeds.
PRIOR_DEGREES = 4


@dataclass(frozen=True)
class Data:
    """What a form is fitted to, one entry for each run.

    Attributes:
        runs: The runs.
        points: Where the runs lie.
        measured: Loss reduction in nats per target token.
        root_weights: Square roots of the weights of the squared residuals.
        unsaturated: Runs that the adapter limits, not the text.
    """

    runs: Sequence[Observation]
    points: Points
    measured: Array
    root_weights: Array
    unsaturated: npt.NDArray[np.bool_]

    def at(self, chosen: npt.NDArray[np.bool_]) -> "Data":
        """Some of the runs."""
        runs = [run for run, keep in zip(self.runs, chosen, strict=True) if keep]
        return Data(
            runs, self.points.at(chosen), self.measured[chosen], self.root_weights[chosen], self.unsaturated[chosen]
        )

    def used_by(self, form: Form) -> "Data":
        """The runs that a form is fitted to: all of them if it is saturating, the unsaturated ones otherwise."""
        return self if form.saturating else self.at(self.unsaturated)


@dataclass(frozen=True)
class Solution:
    """A form fitted to data.

    Attributes:
        form: The form.
        data: What it was fitted to.
        values: The fitted parameters by name.
        free: Those that vary; the others are held at the end of their range.
        squares: Weighted sum of squared residuals, chi-squared in lmfit's words; NaN where it was not kept.
        converged: Whether lmfit reached a minimum.
    """

    form: Form
    data: Data
    values: dict[str, float]
    free: tuple[str, ...]
    squares: float = math.nan
    converged: bool = True

    @property
    def parameters(self) -> lmfit.Parameters:
        """The same for lmfit."""
        found = self.form.parameters(**self.values)
        for name in self.values:
            found[name].vary = name in self.free
        return found

    @cached_property
    def predicted(self) -> Array:
        """Loss reduction of each run by the form, in nats per target token."""
        return self.form.evaluate(self.values, self.data.points)

    @property
    def residual(self) -> Array:
        """Measured minus predicted loss reduction of each run."""
        return self.data.measured - self.predicted

    @cached_property
    def whitened(self) -> Array:
        """Weighted derivatives of the prediction by the free parameters, `(runs, parameters)`."""
        return self.form.gradient(self.values, self.data.points, self.free) * self.data.root_weights[:, None]


def data_of(runs: Sequence[Observation], adapter_size: AdapterSize) -> Data:
    """The runs as arrays."""
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
    """Weights of the squared residuals from the spread of replicates; 1 for a run without replicates.

    The variance of each grid point over its seeds is shrunk towards the pooled variance, an empirical Bayes estimate.
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
    # A single replicated grid point has nothing to compare its spread with.
    if len(replicated) < 2 or pooled <= SMALLEST_VARIANCE:
        return found
    for members, degree, variance in zip(replicated, degrees, variances, strict=True):
        found[members] = (PRIOR_DEGREES + degree) * pooled / (PRIOR_DEGREES * pooled + degree * variance)
    return found


def residuals(parameters: lmfit.Parameters, form: Form, data: Data, noise: float = 1.0) -> Array:
    """Weighted residuals in units of the noise, the function that lmfit minimises: predicted minus measured.

    Everywhere else a residual is measured minus predicted; their squares do not care.
    """
    return (form.evaluate(parameters.valuesdict(), data.points) - data.measured) * data.root_weights / noise


def _jacobian(parameters: lmfit.Parameters, form: Form, data: Data, noise: float = 1.0) -> Array:
    """Derivatives of `residuals` by the parameters that vary."""
    values = parameters.valuesdict()
    names = tuple(name for name, parameter in parameters.items() if parameter.vary)
    scale = np.array([values[name] if name in POSITIVE else 1.0 for name in names])
    return form.gradient(values, data.points, names) / scale * data.root_weights[:, None] / noise


def minimizer(
    form: Form, data: Data, parameters: lmfit.Parameters, noise: float = 1.0, tolerance: float = 1e-13
) -> lmfit.Minimizer:
    """The problem for lmfit, unsolved. In units of the noise the covariance needs no scaling by the residuals."""
    return lmfit.Minimizer(
        residuals,
        parameters,
        fcn_args=(form, data, noise),
        scale_covar=False,
        nan_policy="propagate",
        max_nfev=2000,
        Dfun=_jacobian,
        ftol=tolerance,
        xtol=tolerance,
        gtol=1e-15,
    )


def minimize(
    form: Form, data: Data, parameters: lmfit.Parameters, noise: float = 1.0
) -> lmfit.minimizer.MinimizerResult:
    """The least-squares solution near these initial values, by Levenberg-Marquardt."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return minimizer(form, data, parameters, noise).leastsq()


def solve(form: Form, data: Data) -> Solution | None:
    """The least-squares solution; None where C > 0 cannot be fitted.

    From several initial values `refit_many` goes most of the way; lmfit ends what came out best.
    """
    starts = _starts(form, data)
    if not starts:
        return None
    thetas = np.array([to_theta(form, one) for one in starts])
    rough = refit_many(form, data, data.measured[None], thetas, form.fitted)
    with np.errstate(all="ignore"):
        missed = (form.evaluate(to_natural(form, rough), data.points) - data.measured) * data.root_weights
        best_of = int(np.argmin(np.nan_to_num(np.sum(missed**2, axis=-1), nan=math.inf)))
    start = {name: float(value[0]) for name, value in to_natural(form, rough[best_of]).items()}
    if not all(map(math.isfinite, start.values())):
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
    return Solution(form, data, values, free, float(best.chisqr), bool(best.success))


def _starts(form: Form, data: Data) -> list[dict[str, float]]:
    """Initial values from the log-linear solution of the unsaturated runs, for several b and sharpness."""
    few = data.unsaturated.sum() < 2
    chosen = data if few else data.at(data.unsaturated)
    points, measured = chosen.points, chosen.measured
    bends: list[dict[str, float]] = [{"sharpness": p} for p in INITIAL_SHARPNESS] if form.saturating else [{}]
    if form.offset == "known":
        measured = measured - (points.initial_loss - points.entropy)
    if form.proportional:
        per_parameter = measured * points.target_tokens / points.effective_parameters / math.log(2)
        positive = per_parameter[per_parameter > 0]
        return [{"bits_per_parameter": float(np.median(positive)) if len(positive) else 1e-3, **bend} for bend in bends]
    offsets = [0.0]
    if form.offset == "fitted":
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
        found.append((squares, start | ({"b": float(b)} if form.offset == "fitted" else {})))
    found.sort(key=lambda item: item[0])
    return [start | bend for _, start in found[:STARTS] for bend in bends]


def to_theta(form: Form, values: dict[str, float]) -> Array:
    """The fitted parameters in order, positive ones as logarithms."""
    return np.array([math.log(values[name]) if name in POSITIVE else values[name] for name in form.fitted])


def to_natural(form: Form, theta: Array) -> dict[str, Array]:
    """The reverse for `(..., parameters)`, each parameter with an axis for runs."""
    with np.errstate(over="ignore"):
        return {
            name: (np.exp(theta[..., i, None]) if name in POSITIVE else theta[..., i, None])
            for i, name in enumerate(form.fitted)
        }


def refit_many(form: Form, data: Data, measured: Array, start: Array, free: tuple[str, ...]) -> Array:
    """Least-squares solutions for many sets of measurements, or from many initial values, at once.

    Damped Gauss-Newton steps in coordinates in which the Jacobian at the first start is orthonormal.

    Args:
        form: The form.
        data: The runs; their own measurements are not used.
        measured: Loss reductions in nats per target token, `(draws or 1, runs)`.
        start: Initial values as `to_theta` orders them, `(draws or 1, parameters)`.
        free: Parameters that vary.

    Returns:
        `(draws, parameters)`.
    """
    index, draws = [form.fitted.index(name) for name in free], max(len(measured), len(start))
    measured, theta = np.broadcast_to(measured, (draws, measured.shape[1])), np.resize(start, (draws, start.shape[1]))

    def slopes(at: Array) -> Array:
        return form.gradient(to_natural(form, at), data.points, free) * data.root_weights[:, None]

    def residual(at: Array, to: Array) -> Array:
        return (to - form.evaluate(to_natural(form, at), data.points)) * data.root_weights

    with np.errstate(all="ignore"):
        basis = np.linalg.pinv(np.linalg.qr(slopes(theta[:1])[0])[1])
        # Draws that have converged are left alone.
        moving, damping = np.arange(len(measured)), np.full(len(measured), 1e-3)
        left = residual(theta, measured)
        squares = np.sum(left**2, axis=-1)
        for _ in range(MOST_STEPS):
            jacobian = slopes(theta[moving]) @ basis
            gram = jacobian.swapaxes(1, 2) @ jacobian + np.maximum(damping[moving, None, None], 1e-9) * np.eye(
                len(index)
            )
            step = np.linalg.solve(gram, jacobian.swapaxes(1, 2) @ left[moving, :, None])[..., 0] @ basis.T
            tried = theta[moving]
            tried[:, index] += step
            tried_left = residual(tried, measured[moving])
            tried_squares = np.sum(tried_left**2, axis=-1)
            better = tried_squares <= squares[moving]
            fall = 1.0 - tried_squares / np.maximum(squares[moving], 1e-300)
            improved = moving[better]
            theta[improved], left[improved], squares[improved] = (
                tried[better],
                tried_left[better],
                tried_squares[better],
            )
            damping[moving] *= np.where(better, 0.1, 10.0)
            moving = moving[~(better & (fall < SMALLEST_FALL) | (damping[moving] > 1e10))]
            if not len(moving):
                break
    return theta
