"""Least squares for one form of the law: starts, descent, covariance, and the profile of the likelihood."""

import math
import warnings
from dataclasses import dataclass, replace

import lmfit
import numpy as np
import numpy.typing as npt
from scipy.optimize import leastsq
from scipy.stats import f as f_distribution

from pml.law.forms import KNEE_RANGE, Array, Form, Points, reduction, slopes

__all__ = ["Data", "Solution", "descend", "descend_many", "profile_intervals", "solve"]

# Knees that descents start from: a wide bend, a narrow one, and none.
KNEES = (2.0, 6.0, 20.0)
STARTS = 4
TOLERANCE = 1e-13
# When many are fitted at once, for a bootstrap: far below the spread of its draws.
MOST_STEPS = 60
SMALLEST_FALL = 1e-7
# Beyond this, parameters are indistinguishable in float64.
LARGEST_CONDITION = 1e12


@dataclass(frozen=True)
class Data:
    """What a form is fitted to, one entry a cell.

    Attributes:
        points: Where the cells lie.
        measured: Loss reduction in nats per target token.
        root_weights: Square roots of the weights of the squared residuals.
        unsaturated: Which cells their size, not the ceiling, has set a limit to.
    """

    points: Points
    measured: Array
    root_weights: Array
    unsaturated: npt.NDArray[np.bool_]

    def at(self, chosen: npt.NDArray[np.bool_]) -> "Data":
        """Some of the cells."""
        return Data(self.points.at(chosen), self.measured[chosen], self.root_weights[chosen], self.unsaturated[chosen])


@dataclass(frozen=True)
class Solution:
    """Where least squares ended.

    Attributes:
        theta: Parameters as `pml.law.forms` takes them.
        free: Indices of those that were fitted; the others are held at a bound.
        squares: Weighted sum of squared residuals.
        converged: Whether the search ended at a minimum.
        covariance: Of the free parameters, for unit noise; None where they have none.
    """

    theta: Array
    free: tuple[int, ...]
    squares: float
    converged: bool
    covariance: Array | None = None


def solve(form: Form, data: Data, near: Array | None = None) -> Solution | None:
    """The best least-squares solution from several starts, with its covariance; None where no start has C > 0.

    Given an exponent pair, C and b are the solution of a linear problem, so starts come from a grid of exponents.

    Args:
        form: The form.
        data: The cells.
        near: The solution for more cells than these, which saves most of the starts.
    """
    every = tuple(range(len(form.parameters)))
    starts = _starts(form, data)
    if near is not None:
        starts = [near, *starts[: len(KNEES) if form.bounded else 1]]
    found = [descend(form, data, start, every) for start in starts]
    if not found:
        return None
    best = min(found, key=lambda solution: solution.squares)
    if form.bounded:
        best = _hold_knee(form, data, best)
    if not math.isfinite(best.squares):
        return None
    return replace(best, covariance=_covariance(form, data, best.theta, best.free))


def descend(form: Form, data: Data, start: Array, free: tuple[int, ...]) -> Solution:
    """A minimum of the weighted squares near a start, by MINPACK's Levenberg-Marquardt.

    Args:
        form: The form.
        data: The cells.
        start: All parameters.
        free: Indices of those to fit.
    """
    shift = _shift(form, data)
    points = data.points.shifted(shift[1], -shift[2])
    theta, index = np.array(start, dtype=np.float64), list(free)
    theta[0] += _unshift(form, theta, shift)

    def residual(values: Array) -> Array:
        theta[index] = values
        return (reduction(form, theta, points) - data.measured) * data.root_weights

    def jacobian(values: Array) -> Array:
        theta[index] = values
        return slopes(form, theta, points)[:, index] * data.root_weights[:, None]

    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        values, _, _, _, code = leastsq(
            residual,
            theta[index],
            Dfun=jacobian,
            full_output=True,
            ftol=TOLERANCE,
            xtol=TOLERANCE,
            gtol=1e-15,
            maxfev=1000,
        )
        squares = float(np.sum(residual(values) ** 2))
    theta[0] -= _unshift(form, theta, shift)
    # Codes 6 to 8 say that no further progress is possible in float64, which is where an exact fit ends.
    converged = code in (1, 2, 3, 4, 6, 7, 8) and bool(np.isfinite(theta).all())
    return Solution(theta.copy(), free, squares if math.isfinite(squares) else math.inf, converged)


def descend_many(form: Form, data: Data, measured: Array, start: Array, free: tuple[int, ...]) -> Array:
    """Minima near one start for many measurements of the same cells at once, by damped Gauss-Newton steps.

    Args:
        form: The form.
        data: The cells; their own measurements are not used.
        measured: Loss reductions in nats per target token, `(draws, cells)`.
        start: All parameters.
        free: Indices of those to fit.

    Returns:
        Parameters, `(draws, parameters)`.
    """
    shift = _shift(form, data)
    points = data.points.shifted(shift[1], -shift[2])
    theta = np.tile(np.asarray(start, dtype=np.float64), (len(measured), 1))
    theta[:, 0] += _unshift(form, theta, shift)
    index, damping = list(free), np.full(len(measured), 1e-3)

    def residuals(at: Array) -> Array:
        return (measured - reduction(form, at, points)) * data.root_weights

    with np.errstate(all="ignore"):
        residual = residuals(theta)
        squares = np.sum(residual**2, axis=-1)
        for _ in range(MOST_STEPS):
            jacobian = slopes(form, theta, points)[..., index] * data.root_weights[:, None]
            gram = np.einsum("dci,dcj->dij", jacobian, jacobian)
            # Damping in proportion to the diagonal, Marquardt's choice, does not depend on the parameters' units.
            diagonal = np.einsum("dii->di", gram)
            damped = gram + np.eye(len(index)) * (damping[:, None] * diagonal + 1e-12)[:, None, :]
            step = np.linalg.solve(damped, np.einsum("dci,dc->di", jacobian, residual)[..., None])[..., 0]
            tried = theta.copy()
            tried[:, index] += np.clip(step, -2.0, 2.0) if form.proportional else step
            next_residual = residuals(tried)
            next_squares = np.sum(next_residual**2, axis=-1)
            better = next_squares <= squares
            fall = np.where(better, 1.0 - next_squares / np.maximum(squares, 1e-300), 0.0)
            theta[better], residual[better] = tried[better], next_residual[better]
            squares = np.where(better, next_squares, squares)
            damping = np.where(better, damping / 10, damping * 10)
            if (better & (fall < SMALLEST_FALL) | (damping > 1e10)).all():
                break
    theta[:, 0] -= _unshift(form, theta, shift)
    return theta


def profile_intervals(
    form: Form, data: Data, theta: Array, free: tuple[int, ...], noise: float, degrees_of_freedom: int
) -> dict[int, tuple[float, float]]:
    """95 % profile-likelihood intervals of the free parameters, by index, where lmfit finds both ends.

    Args:
        form: The form.
        data: The cells.
        theta: The solution.
        free: Indices of the fitted parameters.
        noise: Standard deviation that goes with the covariance of unit noise, in nats.
        degrees_of_freedom: That it rests on, for the F test.
    """
    covariance = _covariance(form, data, theta, free)
    # lmfit needs two parameters, and residuals above the rounding error to compare with.
    exact = noise <= 1e-9 * float(np.abs(data.measured).max())
    if degrees_of_freedom < 1 or len(free) < 2 or covariance is None or exact:
        return {}
    names = list(form.parameters)
    parameters = lmfit.Parameters()
    for i, (name, value) in enumerate(zip(names, theta, strict=True)):
        parameters.add(name, value=float(value), vary=i in free)

    def residual(given: lmfit.Parameters) -> Array:
        values = [given[name].value for name in names]
        return (reduction(form, values, data.points) - data.measured) * data.root_weights

    def jacobian(given: lmfit.Parameters) -> Array:
        values = [given[name].value for name in names]
        vary = [i for i, name in enumerate(names) if given[name].vary]
        return slopes(form, values, data.points)[:, vary] * data.root_weights[:, None]

    def probability(best: lmfit.minimizer.MinimizerResult, other: lmfit.minimizer.MinimizerResult) -> float:
        rise = max(other.chisqr - best.chisqr, 0.0)
        return float(f_distribution.cdf(rise / noise**2, 1, degrees_of_freedom))

    minimizer = lmfit.Minimizer(residual, parameters, max_nfev=2000, Dfun=jacobian)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            best = minimizer.leastsq(parameters)
            for at, i in enumerate(free):
                # The steps that lmfit takes outwards are in units of the standard error.
                best.params[names[i]].stderr = noise * math.sqrt(covariance[at, at])
            found = lmfit.conf_interval(minimizer, best, sigmas=[0.95], prob_func=probability, maxiter=100)
        except (lmfit.minimizer.MinimizerException, ValueError, AttributeError, TypeError, np.linalg.LinAlgError):
            return {}
    ends = {i: (float(found[names[i]][0][1]), float(found[names[i]][-1][1])) for i in free}
    return {i: pair for i, pair in ends.items() if all(map(math.isfinite, pair))}


def _starts(form: Form, data: Data) -> list[Array]:
    """Starts: the exponents of a grid with C and b solved for, the best and the best of each pair of signs."""
    points, measured = data.points, data.measured
    few = data.unsaturated.sum() < 2
    used = np.ones_like(data.unsaturated) if few else data.unsaturated
    points, measured = points.at(used), measured[used]
    if form.offset == "entropy":
        measured = measured - (points.initial_loss - points.entropy)
    knees = [[math.log(knee)] for knee in KNEES] if form.bounded else [[]]
    if form.proportional:
        per_parameter = measured / np.exp(points.log_parameters - points.log_tokens) / math.log(2)
        kappa = float(np.median(per_parameter[per_parameter > 0])) if (per_parameter > 0).any() else 1e-3
        return [np.array([math.log(kappa), *knee]) for knee in knees]
    sizes = np.geomspace(0.03, 3.0, 12)
    steps = np.concatenate([-sizes[::-1], sizes])
    alphas, betas = (grid.ravel() for grid in np.meshgrid(steps, steps, indexing="ij"))
    mean_size, mean_tokens = points.log_size.mean(), points.log_tokens.mean()
    powers = np.exp(
        alphas[:, None] * (points.log_size - mean_size) - betas[:, None] * (points.log_tokens - mean_tokens)
    )
    if form.offset == "fitted":
        centred = powers - powers.mean(axis=1, keepdims=True)
        slope = centred @ measured / np.sum(centred**2, axis=1)
        offsets = measured.mean() - slope * powers.mean(axis=1)
    else:
        slope, offsets = powers @ measured / np.sum(powers**2, axis=1), np.zeros(len(powers))
    squares = np.sum((slope[:, None] * powers + offsets[:, None] - measured) ** 2, axis=1)
    order = [int(i) for i in np.argsort(squares) if slope[i] > 0]
    # The best of each pair of signs too: between them the squares have ridges that a descent does not cross.
    quadrants: dict[tuple[bool, bool], int] = {}
    for i in order:
        quadrants.setdefault((bool(alphas[i] > 0), bool(betas[i] > 0)), i)
    starts = []
    for i in dict.fromkeys([*order[:STARTS], *quadrants.values()]):
        log_c = math.log(slope[i]) - alphas[i] * mean_size + betas[i] * mean_tokens
        b = [offsets[i]] if form.offset == "fitted" else []
        starts += [np.array([log_c, alphas[i], betas[i], *b, *knee]) for knee in knees]
    return starts


def _shift(form: Form, data: Data) -> Array:
    """What dividing sizes and lengths by their geometric means adds to ln C, per ln C, alpha and beta.

    Without it ln C would be all but fixed by the exponents. A form without exponents needs none.
    """
    if form.proportional:
        return np.zeros(3)
    return np.array([0.0, data.points.log_size.mean(), -data.points.log_tokens.mean()])


def _unshift(form: Form, theta: Array, shift: Array) -> Array:
    """ln C in the shifted units minus ln C."""
    return np.asarray(theta[..., :3] @ shift if not form.proportional else 0.0)


def _hold_knee(form: Form, data: Data, solution: Solution) -> Solution:
    """The same, or, where the knee left its range, the solution with the knee at the end of it."""
    low, high = KNEE_RANGE
    knee = float(solution.theta[-1])
    if low < knee < high and math.isfinite(solution.squares):
        return solution
    start = solution.theta.copy()
    start[-1] = low if knee <= low else high
    return descend(form, data, start, tuple(range(len(start) - 1)))


def _covariance(form: Form, data: Data, theta: Array, free: tuple[int, ...]) -> Array | None:
    """Covariance of the free parameters for unit noise; None where they cannot be told apart."""
    whitened = slopes(form, theta, data.points)[:, list(free)] * data.root_weights[:, None]
    size = np.linalg.norm(whitened, axis=0)
    if len(whitened) < len(free) or not (np.isfinite(size).all() and (size > 0).all()):
        return None
    # By the triangle of QR, and with columns of one length: squaring the slopes would lose half of the digits.
    triangle: Array = np.linalg.qr(whitened / size)[1]
    if np.linalg.cond(triangle) > LARGEST_CONDITION:
        return None
    inverse = np.linalg.inv(triangle) / size[:, None]
    return np.asarray(inverse @ inverse.T)
