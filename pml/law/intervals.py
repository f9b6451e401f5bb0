"""Uncertainty of a fitted form: noise, standard errors, profile-likelihood intervals and the bootstrap."""

import functools
import math
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import lmfit
import numpy as np
from scipy.stats import f as f_distribution
from scipy.stats import norm, t

from pml.law.data import Data
from pml.law.forms import SHARPNESS_RANGE, Array
from pml.law.least_squares import Solution, batched_least_squares, minimize, minimizer, to_natural, to_theta
from pml.law.observations import Observation, numbered, saturated

__all__ = [
    "GroupedBy",
    "Noise",
    "bootstrap",
    "choose_groups",
    "groups_of",
    "noise_of",
    "profile_intervals",
    "standard_errors",
    "t_over_z",
    "t_quantile",
    "texts_to_spare",
]

GroupedBy = Literal["grid_point", "text"]
DRAWS = 500
BOOTSTRAP_SEED = 0
SPARE_TEXTS = 3
"""With fewer texts beyond the parameters, the effect of a text cannot be separated from that of its length."""
# If the fit leaves less than this share of a group's error in its residual, the residual is rounding.
LEAST_LEFT = 1e-3
# The profile needs chi-squared to a few digits. Fits that take more steps belong to parameters without a bound.
PROFILE_TOLERANCE, PROFILE_STEPS = 1e-6, 150
# If the Jacobian's condition number is larger, float64 cannot tell the parameters apart.
LARGEST_CONDITION = 1e12


@dataclass(frozen=True)
class Noise:
    """Standard deviations around a form, in nats per target token, for a run of weight 1.

    Attributes:
        of_a_run: Standard deviation of a single run.
        of_the_fit: Residual scale for the covariance matrix.
        degrees_of_freedom: Degrees of freedom of `of_the_fit`: groups with unsaturated runs minus fitted parameters.
            With no more groups than parameters, unsaturated runs minus parameters, but at least 1.
    """

    of_a_run: float
    of_the_fit: float
    degrees_of_freedom: int


def groups_of(runs: Sequence[Observation], grouped_by: GroupedBy) -> list[Hashable]:
    """The group of each run. Runs in a group share an error: the seeds of one grid point, or the ranks on one text."""
    return [run.text_label if grouped_by == "text" else run.grid_point for run in runs]


def texts_to_spare(runs: Sequence[Observation], nvarys: int) -> int:
    """Number of texts with unsaturated runs, minus fitted parameters."""
    return len({run.text_label for run in runs if not saturated(run)}) - nvarys


def between_group_squares(residual: Array, data: Data, grouped_by: GroupedBy) -> tuple[float, int]:
    """Weighted sum of squares of the groups' mean residuals, and the number of groups; unsaturated runs only."""
    weights = data.root_weights[data.unsaturated] ** 2
    of_run = numbered(groups_of(data.at(data.unsaturated).runs, grouped_by))
    sums = np.bincount(of_run, weights * residual[data.unsaturated])
    return float(np.sum(sums**2 / np.bincount(of_run, weights))), len(sums)


def noise_of(residual: Array, data: Data, grouped_by: GroupedBy, nvarys: int) -> Noise:
    """The noise of the unsaturated runs around a form; runs at the ceiling say nothing about it.

    Runs of one group share an error, so the number of groups, not of runs, limits how well the parameters are known.
    The covariance is therefore scaled by the mean square between groups, which counts the mean of n runs n times. The
    noise of a run adds the variances between and within groups (a one-way analysis of variance). With no more groups
    than parameters, both are the mean square over runs.

    Args:
        residual: Measured minus predicted loss reduction of each run.
        data: The runs.
        grouped_by: Which runs share an error.
        nvarys: Number of fitted parameters.
    """
    of_means, number = between_group_squares(residual, data, grouped_by)
    runs = int(data.unsaturated.sum())
    squares = float(np.sum((residual * data.root_weights)[data.unsaturated] ** 2))
    if number <= nvarys:
        degrees = max(runs - nvarys, 1)
        return Noise(math.sqrt(squares / degrees), math.sqrt(squares / degrees), degrees)
    between = of_means / (number - nvarys)
    within = max(squares - of_means, 0.0) / max(runs - number, 1)
    # A mean square between groups of n runs has n times the variance of what they share.
    shared = max(between - within, 0.0) * number / runs if runs > number else between
    return Noise(math.sqrt(within + shared), math.sqrt(between), number - nvarys)


def t_quantile(degrees_of_freedom: int) -> float:
    """Quantile of Student's t for a central 95 % interval, with at least one degree of freedom."""
    return float(t.ppf(0.975, max(degrees_of_freedom, 1)))


def t_over_z(degrees_of_freedom: int) -> float:
    """Ratio of the quantile of Student's t to the normal quantile, the factor that widens intervals from few runs."""
    return t_quantile(degrees_of_freedom) / float(norm.ppf(0.975))


def standard_errors(solution: Solution, noise: Noise) -> lmfit.minimizer.MinimizerResult | None:
    """lmfit's result with standard errors and correlations for this noise; None unless they are finite."""
    data, jacobian = solution.data, solution.weighted_jacobian
    scale = np.linalg.norm(jacobian, axis=0)
    if len(jacobian) < len(solution.free) or not (np.isfinite(scale).all() and (scale > 0).all()):
        return None
    if np.linalg.cond(jacobian / scale) > LARGEST_CONDITION:
        return None
    least = 1e-12 * float(np.abs(data.measured).max())
    result = minimize(solution.form, data, solution.parameters, max(noise.of_the_fit, least))
    known = result.errorbars and all(np.isfinite(result.params[name].stderr) for name in solution.free)
    return result if known else None


def profile_intervals(solution: Solution, noise: Noise) -> dict[str, tuple[float, float]]:
    """95 % profile-likelihood intervals from `lmfit.conf_interval`, of the parameters with two finite ends."""
    exact = noise.of_the_fit <= 1e-9 * float(np.abs(solution.data.measured).max())
    result = None if exact or len(solution.free) < 2 else standard_errors(solution, noise)
    if result is None:
        return {}

    def probability(best: lmfit.minimizer.MinimizerResult, other: lmfit.minimizer.MinimizerResult) -> float:
        rise = max(other.chisqr - best.chisqr, 0.0)
        return float(f_distribution.cdf(rise, 1, noise.degrees_of_freedom))

    problem = minimizer(solution.form, solution.data, result.params, noise.of_the_fit, PROFILE_TOLERANCE)
    problem.max_nfev = PROFILE_STEPS
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = lmfit.conf_interval(
                problem, result, p_names=list(solution.free), sigmas=[0.95], prob_func=probability, maxiter=30
            )
        except (lmfit.minimizer.MinimizerException, ValueError, AttributeError, TypeError, np.linalg.LinAlgError):
            return {}
    ends = {name: (float(found[name][0][1]), float(found[name][-1][1])) for name in solution.free}
    return {name: pair for name, pair in ends.items() if all(map(math.isfinite, pair))}


def choose_groups(solution: Solution) -> GroupedBy:
    """Choose whether errors are shared by grid point or by text: the grouping with the wider predictions.

    Text is a candidate only if there are enough texts.
    """
    form, data, nvarys = solution.form, solution.data, len(solution.free)
    if texts_to_spare(data.runs, nvarys) < SPARE_TEXTS:
        return "grid_point"
    below = data.points.at(data.unsaturated)

    def mean_prediction_variance(grouped_by: GroupedBy) -> float:
        draws = form.evaluate(to_natural(form, bootstrap(solution, grouped_by)), below)
        widened = t_over_z(noise_of(solution.residual, data, grouped_by, nvarys).degrees_of_freedom)
        return widened**2 * float(np.mean(np.var(draws, axis=0)))

    return "text" if mean_prediction_variance("text") > mean_prediction_variance("grid_point") else "grid_point"


@functools.lru_cache(maxsize=2)  # choose_groups computes both groupings; one is used afterwards
def bootstrap(solution: Solution, grouped_by: GroupedBy) -> Array:
    """Parameters refitted to resampled noise, `(draws, parameters)`, in the order of `to_theta`.

    A wild cluster bootstrap with normal multipliers: every run stays in the grid, and each draw multiplies the
    residuals of a group by one standard normal factor. Residuals are first corrected for what the fit absorbed (the
    jackknife CR3 of Bell and McCaffrey). With no more groups than parameters, the fit would pass through the groups'
    means, so each run is its own group.
    """
    form, data = solution.form, solution.data
    residual, basis = solution.residual * data.root_weights, np.linalg.qr(solution.weighted_jacobian)[0]
    of_run = numbered(groups_of(data.runs, grouped_by))
    if len(np.unique(of_run[data.unsaturated])) <= len(solution.free):
        of_run = np.arange(len(of_run))
    corrected, number = residual.copy(), int(of_run.max()) + 1
    for i in range(number):
        members = np.flatnonzero(of_run == i)
        eigenvalues, vectors = np.linalg.eigh(np.eye(len(members)) - basis[members] @ basis[members].T)
        # A run that determines a parameter alone has no residual to scale.
        scale = np.where(eigenvalues > LEAST_LEFT, 1.0 / np.maximum(eigenvalues, LEAST_LEFT), 0.0)
        corrected[members] = vectors @ (scale * (vectors.T @ residual[members]))
    factors = np.random.default_rng(BOOTSTRAP_SEED).standard_normal((DRAWS, number))[:, of_run]
    resampled = solution.predicted + factors * corrected / data.root_weights
    draws = batched_least_squares(form, data, resampled, to_theta(form, solution.values)[None], solution.free)
    if form.saturating:
        sharpness = form.fitted.index("sharpness")
        draws[:, sharpness] = np.clip(draws[:, sharpness], *np.log(SHARPNESS_RANGE))
    return draws[np.isfinite(draws).all(axis=1)]
