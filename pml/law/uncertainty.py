"""How far a fitted form can be trusted: weights from replicates, the noise, and the bootstrap over cells."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from scipy.stats import norm, t

from pml.law.cells import Cell, saturated
from pml.law.forms import KNEE_RANGE, Array, CapacityName, Form, Points, reduction, slopes
from pml.law.search import Data, descend_many

__all__ = [
    "DRAWS",
    "SPARE_TEXTS",
    "GroupedBy",
    "Scatter",
    "bootstrap",
    "bootstrap_groups",
    "data_of",
    "expansion",
    "fitted_cells",
    "groups_of",
    "means_of_sizes",
    "points_of",
    "scatter",
    "sizes_of",
    "student",
    "texts_to_spare",
    "weights_of",
]

DRAWS = 500
GroupedBy = Literal["size", "text"]
GROUPED_BY: Final[tuple[GroupedBy, ...]] = ("size", "text")
SPARE_TEXTS = 3
"""With fewer texts to spare, what is peculiar to a text cannot be told from an effect of its length."""
BOOTSTRAP_SEED = 0
# A spread over two or three seeds is itself a guess: the pooled spread counts as much as this many further seeds.
PRIOR_DEGREES = 4
# Where the fit took up more of a group's residual than this leaves, what is left is rounding.
LEAST_LEFT = 1e-3


@dataclass(frozen=True)
class Scatter:
    """How far cells lie from a form, in nats per target token; the weight of an ordinary cell is 1.

    Attributes:
        of_a_run: Standard deviation of a single run around the form, its size's share of that included.
        of_the_fit: Standard deviation to multiply the covariance of unit noise with.
        degrees_of_freedom: That the latter rests on.
    """

    of_a_run: float
    of_the_fit: float
    degrees_of_freedom: int


def fitted_cells(form: Form, cells: Sequence[Cell]) -> list[Cell]:
    """The cells that a form is fitted to: without a ceiling, those that are not saturated."""
    return [cell for cell in cells if form.bounded or not saturated(cell)]


def groups_of(cells: Sequence[Cell], grouped_by: GroupedBy) -> list[Hashable]:
    """What each cell shares an error with: the other seeds of its size, or the other runs on its text."""
    return [cell.text_label for cell in cells] if grouped_by == "text" else list(sizes_of(cells))


def sizes_of(cells: Sequence[Cell]) -> list[tuple[int, int | None, int]]:
    """The size of each cell: rank, parameters (places differ in them) and length. Cells of one size are replicates."""
    return [(cell.rank, cell.effective_parameters, cell.target_tokens) for cell in cells]


def points_of(cells: Sequence[Cell], capacity: CapacityName) -> Points:
    """Where the cells lie."""
    lengths = np.array([cell.target_tokens for cell in cells], dtype=np.float64)
    parameters = np.array([cell.effective_parameters or math.nan for cell in cells], dtype=np.float64)
    ranks = np.array([cell.rank for cell in cells], dtype=np.float64)
    bits = np.array([math.nan if cell.entropy_bits is None else cell.entropy_bits for cell in cells])
    return Points(
        np.log(ranks if capacity == "rank" else parameters),
        np.log(lengths),
        np.log(parameters),
        np.array([cell.initial_loss for cell in cells]),
        bits * math.log(2) / lengths,
    )


def weights_of(cells: Sequence[Cell]) -> Array:
    """Weights of the squared residuals from the spread of replicates; 1 for a cell of ordinary spread, or of one seed.

    The spread of each (rank, length) over its seeds is drawn towards the spread of all, as empirical Bayes does with
    few replicates. Saturated cells have weight 1: that they agree says nothing.
    """
    weights = np.ones(len(cells))
    groups: dict[Hashable, list[int]] = {}
    for i, (cell, size) in enumerate(zip(cells, sizes_of(cells), strict=True)):
        if not saturated(cell):
            groups.setdefault(size, []).append(i)
    replicated = [members for members in groups.values() if len(members) > 1]
    degrees = [len(members) - 1 for members in replicated]
    spreads = [float(np.var([cells[i].loss_reduction for i in members], ddof=1)) for members in replicated]
    pooled = sum(d * s for d, s in zip(degrees, spreads, strict=True)) / max(sum(degrees), 1)
    # With a single replicated cell there is nothing to compare its spread with.
    if len(replicated) < 2 or pooled <= 0:
        return weights
    for members, degree, spread in zip(replicated, degrees, spreads, strict=True):
        weights[members] = (PRIOR_DEGREES + degree) * pooled / (PRIOR_DEGREES * pooled + degree * spread)
    return weights


def data_of(cells: Sequence[Cell], capacity: CapacityName) -> Data:
    """What a form is fitted to."""
    return Data(
        points_of(cells, capacity),
        np.array([cell.loss_reduction for cell in cells]),
        np.sqrt(weights_of(cells)),
        np.array([not saturated(cell) for cell in cells], dtype=bool),
    )


def scatter(form: Form, theta: Array, data: Data, groups: Sequence[Hashable], fitted: int) -> Scatter:
    """How far the unsaturated cells lie from a form; those at the ceiling say nothing of it.

    The seeds of one size share what the form has wrong there, so a parameter is known as well as there are sizes, not
    runs: the noise of the fit is that of the sizes' means. A run's own noise is what sizes and seeds scatter by,
    together (a one-way analysis of variance). With no more sizes than parameters, where a fit goes through all means,
    only the seeds are left.

    Args:
        form: The form.
        theta: Its solution.
        data: The cells that it was fitted to.
        groups: The size of each cell.
        fitted: Number of fitted parameters.
    """
    predicted = reduction(form, theta, data.points)
    of_means, sizes = means_of_sizes(predicted, data, groups)
    cells = int(data.unsaturated.sum())
    squares = float(np.sum((((data.measured - predicted) * data.root_weights)[data.unsaturated]) ** 2))
    if sizes <= fitted:
        degrees = max(cells - fitted, 1)
        noise = math.sqrt(squares / degrees)
        return Scatter(noise, noise, degrees)
    between = of_means / (sizes - fitted)
    if cells == sizes:
        return Scatter(math.sqrt(between), math.sqrt(between), sizes - fitted)
    within = max(squares - of_means, 0.0) / (cells - sizes)
    of_sizes = max(between - within, 0.0) * sizes / cells
    return Scatter(math.sqrt(within + of_sizes), math.sqrt(between), sizes - fitted)


def means_of_sizes(predicted: Array, data: Data, groups: Sequence[Hashable]) -> tuple[float, int]:
    """Weighted squares of the mean residuals of the sizes with unsaturated cells, and how many sizes there are.

    Args:
        predicted: Loss reduction of each cell.
        data: The cells.
        groups: The size of each.
    """
    chosen = data.unsaturated
    weights = data.root_weights[chosen] ** 2
    sizes = _unsaturated(groups, data)
    labels = {size: i for i, size in enumerate(dict.fromkeys(sizes))}
    of_cell = np.array([labels[size] for size in sizes], dtype=np.intp)
    sums = np.bincount(of_cell, weights * (data.measured - predicted)[chosen])
    return float(np.sum(sums**2 / np.bincount(of_cell, weights))), len(labels)


def student(degrees_of_freedom: int) -> float:
    """Student's t for a 95 % interval; with no degree of freedom left, that of one."""
    return float(t.ppf(0.975, max(degrees_of_freedom, 1)))


def expansion(degrees_of_freedom: int) -> float:
    """By how much a 95 % interval of few cells is wider than the normal distribution has it."""
    return student(degrees_of_freedom) / float(norm.ppf(0.975))


def bootstrap_groups(form: Form, theta: Array, data: Data, cells: Sequence[Cell], free: Sequence[int]) -> GroupedBy:
    """By what the bootstrap has to group the cells.

    The seeds of one size share what the form has wrong there, and the ranks on one text what is peculiar to it. Which
    of the two is the larger the cells say: the grouping that leaves the law less certain of them. Texts can only tell
    where there are enough of them.

    Args:
        form: The form.
        theta: Its solution.
        data: The cells that it was fitted to.
        cells: The same.
        free: Indices of the fitted parameters.
    """
    if texts_to_spare(cells, len(free)) < SPARE_TEXTS:
        return "size"
    points = data.points.at(data.unsaturated)
    doubt: dict[GroupedBy, float] = {}
    for grouped_by in GROUPED_BY:
        groups = groups_of(cells, grouped_by)
        draws = bootstrap(form, theta, data, groups, free)
        widened = expansion(scatter(form, theta, data, groups, len(free)).degrees_of_freedom)
        doubt[grouped_by] = widened**2 * float(np.mean(np.var(reduction(form, draws, points), axis=0)))
    return max(GROUPED_BY, key=lambda grouped_by: doubt[grouped_by])


def texts_to_spare(cells: Sequence[Cell], fitted: int) -> int:
    """How many more texts there are, those of saturated cells left out, than fitted parameters."""
    return len({cell.text_label for cell in cells if not saturated(cell)}) - fitted


def bootstrap(form: Form, theta: Array, data: Data, groups: Sequence[Hashable], free: Sequence[int]) -> Array:
    """Parameters fitted anew to resampled noise, `(draws, parameters)`, every refit from the solution.

    A wild bootstrap: each cell keeps its place in the grid, where dropping cells could leave a grid without a solution,
    and its residual comes back with a random factor. Residuals are first put right for the share that the fit took up:
    each group's becomes what it would be had the fit not seen the group (the jackknife, CR3 of Bell and McCaffrey; with
    few groups the milder CR2 covers the truth too rarely). Cells of one group, the seeds of one rank and length, share
    their factor, since they share the law's own error there. Where there are no more groups with unsaturated cells than
    parameters, the fit goes through the mean of each and what is left is the spread within groups: then each cell has
    its own factor.

    Args:
        form: The form.
        theta: Its solution.
        data: The cells that it was fitted to.
        groups: What each cell belongs to.
        free: Indices of the fitted parameters.
    """
    predicted = reduction(form, theta, data.points)
    residual = (data.measured - predicted) * data.root_weights
    index = list(free)
    whitened = slopes(form, theta, data.points)[:, index] * data.root_weights[:, None]
    basis = np.linalg.qr(whitened)[0]
    if len(set(_unsaturated(groups, data))) <= len(index):
        groups = range(len(groups))
    labels = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    of_cell = np.array([labels[group] for group in groups])
    corrected = residual.copy()
    for i in range(len(labels)):
        members = np.flatnonzero(of_cell == i)
        left = np.eye(len(members)) - basis[members] @ basis[members].T
        values, vectors = np.linalg.eigh(left)
        # A cell that alone decides a parameter has no residual to scale.
        scale = np.where(values > LEAST_LEFT, 1.0 / np.maximum(values, LEAST_LEFT), 0.0)
        corrected[members] = vectors @ (scale * (vectors.T @ residual[members]))
    factors = np.random.default_rng(BOOTSTRAP_SEED).standard_normal((DRAWS, len(labels)))[:, of_cell]
    resampled = predicted + factors * corrected / data.root_weights
    draws = descend_many(form, data, resampled, theta, tuple(free))
    if form.bounded:
        draws[:, -1] = np.clip(draws[:, -1], *KNEE_RANGE)
    return draws[np.isfinite(draws).all(axis=1)]


def _unsaturated(groups: Sequence[Hashable], data: Data) -> list[Hashable]:
    """The groups of the unsaturated cells, one entry a cell."""
    return [group for group, unsaturated in zip(groups, data.unsaturated, strict=True) if unsaturated]
