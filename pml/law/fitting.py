"""Fitting every form of the law that the cells determine, and choosing one."""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import t

from pml.calibration import RecallModel
from pml.errors import InputError
from pml.law import findings
from pml.law.cells import Cell, LeftOutCell, divide, saturated
from pml.law.content import FACTORS, LOGARITHMIC, Estimate, FormFit, HeldOut, LawFit, Misfit, factors_of
from pml.law.forms import (
    FORMS,
    KNEE_RANGE,
    Array,
    CapacityName,
    Form,
    FormName,
    reduction,
    sensitivity,
)
from pml.law.search import Data, Solution, profile_intervals, solve
from pml.law.texts import texts_of
from pml.law.uncertainty import (
    Scatter,
    bootstrap,
    bootstrap_groups,
    data_of,
    expansion,
    fitted_cells,
    groups_of,
    means_of_sizes,
    scatter,
    sizes_of,
    student,
)

__all__ = ["fit_law"]

PUBLISHED: FormName = "power_offset"
# One more than the four parameters of the published law, so that the residuals say something about the noise.
FEWEST_CELLS = 5
# Two more than the two of the law in bits, which would fit two cells whatever they are.
FEWEST_CELLS_IN_BITS = 4
# Smallest spread of the loss reduction, in nats, that float32 losses can show.
SMALLEST_SPREAD = 1e-6
# Where both exponents are this small, x^alpha is 1 + alpha ln x to 0.1 %: a logarithm.
SMALL_EXPONENT = 0.02
# Forms whose AICc differs by less are told apart by how well they extrapolate (Burnham and Anderson's rule of thumb).
CLOSE_AICC = 2.0
# Held-out errors within this factor, or of fewer cells, tell nothing apart.
CLOSE_FACTOR = 1.5
FEWEST_HELD_OUT = 4
# With fewer sizes, a rank and a length each, a difference in AICc is little more than that of the penalties.
FEWEST_FOR_A_GAP = 10
# A cell is at the ceiling where less than this share of a run's luck gets through to its loss.
AT_CEILING = 0.05
# An interval of a positive parameter that is wider than this factor says nothing of it.
WIDEST = 1e6
# A size or length is called off with this chance of a false alarm in all of them together.
MISFIT_ALARM = 0.05
MISFIT_PERCENT = 3.0
FEWEST_FOR_A_MISFIT = 3


def fit_law(
    cells: Iterable[Cell],
    setting: Mapping[str, Any] | None = None,
    *,
    form: FormName | None = None,
    compare: bool = True,
    capacity: CapacityName = "rank",
    recall: RecallModel | None = None,
) -> LawFit:
    """Fit the law in every form that the cells determine, by weighted least squares, and choose one.

    Diverged and interrupted cells are left out. Saturated ones (final loss <= ln 2) are left out of the forms without a
    ceiling, as published, and used by the others. Where seeds are repeated, cells count by the spread of theirs.

    The chosen form has the smallest AICc over the unsaturated sizes, which all forms describe; among those within 2 of
    it, the simplest of those that foretell the largest rank and the largest length from the other cells with an error
    of up to 1.5 times the smallest; where these are fewer than 4 cells, the simplest. Where there are saturated cells,
    it is one of the forms that know the ceiling: the others say nothing of these cells. With too few sizes for AICc it
    is the published one, or with saturated cells chosen from all of those likewise.

    Args:
        cells: What the runs measured.
        setting: What the runs have in common (see `shared_setting`); kept with the fit.
        form: The form to choose; None leaves it to AICc and held-out error.
        compare: Fit the other forms too where `form` is given.
        capacity: What the law counts as the adapter's size.
        recall: From loss to recall (see `pml.calibration`); kept with the fit.

    Raises:
        InputError: If the cells cannot determine a law: too few that are not saturated, fewer than two ranks or
            lengths, ranks and lengths that rise together, or a loss reduction that does not vary.
    """
    sound, left_out = divide(cells)
    if capacity == "effective_parameters" and any(cell.effective_parameters is None for cell in sound):
        raise InputError("by effective_parameters: some cells do not say how many they have; count by rank")
    why_not = {name: _undetermined(kind, sound, left_out, capacity) for name, kind in FORMS.items()}
    wanted = form or PUBLISHED
    possible = [name for name, reason in why_not.items() if reason is None]
    if not possible or (form is not None and form not in possible):
        raise InputError(why_not[wanted] or "")
    if form is not None and not compare:
        possible = [form]
    fits = [fit for name in possible if (fit := _fit_form(FORMS[name], sound, capacity)) is not None]
    if not fits:
        raise InputError("loss reduction depends on neither size nor length; check what the runs trained on")
    if form is not None and form not in [fit.form for fit in fits]:
        raise InputError(f"form {form}: no C above 0 fits; leave --form out to see which forms do")
    fits, reason = _ranked(fits, sound)
    if len(fits) == 1 and why_not[PUBLISHED] is not None:
        reason = f"the others are not determined: {why_not[PUBLISHED]}"
    if form is not None:
        reason = "asked for"
        fits.sort(key=lambda fit: fit.form != form)
    fits = [_with_profiles(fit, sound, capacity) if fit.form in (fits[0].form, PUBLISHED) else fit for fit in fits]
    per_rank = {(cell.effective_parameters or 0) / cell.rank for cell in sound}
    one = per_rank.pop() if len(per_rank) == 1 else 0.0
    law = LawFit(
        form=fits[0].form,
        chosen_because=reason,
        capacity=capacity,
        parameters_per_rank=int(one) or None,
        fits=fits,
        cells=sound,
        left_out=left_out,
        recall=recall,
        setting=dict(setting or {}),
        warnings=[],
    )
    return law.model_copy(update={"warnings": findings.warnings_of(law)})


def _fit_form(form: Form, cells: Sequence[Cell], capacity: CapacityName) -> FormFit | None:
    """One form fitted, with everything that is said of it; None where no C above 0 fits."""
    everything = data_of(cells, capacity)
    used = np.ones(len(cells), dtype=bool) if form.bounded else everything.unsaturated
    data = everything.at(used)
    solution = solve(form, data)
    if solution is None or not math.isfinite(solution.squares):
        return None
    free, there = solution.free, fitted_cells(form, cells)
    grouped_by = bootstrap_groups(form, solution.theta, data, there, free)
    groups = groups_of(there, grouped_by)
    spread = scatter(form, solution.theta, data, groups, len(free))
    of_a_run = scatter(form, solution.theta, data, sizes_of(there), len(free)).of_a_run
    determined = not (form.offset == "fitted" and _is_logarithm(form, solution, data))

    predicted = reduction(form, solution.theta, everything.points)
    residual = data.measured - predicted[used]
    gets_through = sensitivity(form, solution.theta, data.points)
    at_ceiling, at_knee = _noise_near_the_ceiling(gets_through, residual, data.unsaturated, of_a_run)
    share, beyond_text = _text_share(form, there, residual, gets_through, data.unsaturated)
    draws = bootstrap(form, solution.theta, data, groups, free)
    texts = texts_of(cells)
    of_texts = (share[0] - form.text_share) * sensitivity(form, solution.theta, everything.points)
    usual = everything.measured - of_texts * texts.excess[texts.of_cell]
    return FormFit(
        form=form.name,
        parameters=_estimates(form, solution, draws, spread, determined),
        at_bound=[name for i, name in enumerate(form.parameters) if i not in free],
        correlation=_correlation(solution) if determined else None,
        determined=determined,
        converged=solution.converged,
        cells_used=int(used.sum()),
        grouped_by=grouped_by,
        degrees_of_freedom=spread.degrees_of_freedom,
        noise_nats=of_a_run,
        noise_beyond_text_nats=of_a_run * beyond_text,
        text_share=share,
        noise_at_ceiling_nats=at_ceiling,
        noise_at_knee_nats=at_knee,
        r2=_r2(data.measured, predicted[used]),
        r2_all=_r2(everything.measured, np.minimum(predicted, everything.points.initial_loss)),
        mape_percent=100.0 * float(np.mean(np.abs(residual) / data.measured)),
        rmse_nats=math.sqrt(float(np.mean(residual**2))),
        aicc=_aicc(everything, predicted, len(free), sizes_of(cells)),
        held_out=_held_out(form, cells, everything, solution.theta, capacity),
        misfits=_misfits(cells, 100.0 * (usual / predicted - 1.0), everything.unsaturated, capacity),
        predicted=predicted.tolist(),
    )


def _estimates(form: Form, solution: Solution, draws: Array, spread: Scatter, determined: bool) -> dict[str, Estimate]:
    """The parameters with their intervals; logarithms are turned back into C, kappa and knee."""
    estimates: dict[str, Estimate] = {}
    for i, name in enumerate(form.parameters):
        value = float(solution.theta[i])
        back = _exponential if name in LOGARITHMIC else float
        if i not in solution.free:
            estimates[name] = Estimate(value=back(value))
            continue
        error = standard = None
        if determined and solution.covariance is not None:
            at = solution.free.index(i)
            of_value = spread.of_the_fit * math.sqrt(solution.covariance[at, at])
            reach = student(spread.degrees_of_freedom) * of_value
            # The delta method: the standard error of C is the one of ln C times C.
            error = of_value * back(value) if name in LOGARITHMIC else of_value
            standard = _said(name, back(value - reach), back(value + reach))
        ends = value + expansion(spread.degrees_of_freedom) * (np.percentile(draws[:, i], (2.5, 97.5)) - value)
        if name == "knee":
            ends = np.clip(ends, *KNEE_RANGE)
        low, high = (back(float(end)) for end in ends)
        estimates[name] = Estimate(
            value=back(value),
            stderr=error,
            standard=standard,
            # Without a place where the search would have to stop, draws around the place where it did say nothing.
            bootstrap=_said(name, low, high) if determined else None,
        )
    return estimates


def _with_profiles(fit: FormFit, cells: Sequence[Cell], capacity: CapacityName) -> FormFit:
    """The fit with profile-likelihood intervals where there are any; they take longer than all the rest."""
    form = FORMS[fit.form]
    used = fitted_cells(form, cells)
    data, theta = data_of(used, capacity), np.array(fit.theta)
    free = tuple(form.parameters.index(name) for name in fit.free)
    spread = scatter(form, theta, data, groups_of(used, fit.grouped_by), len(free))
    profiles = profile_intervals(form, data, theta, free, spread.of_the_fit, spread.degrees_of_freedom)
    parameters = dict(fit.parameters)
    for i, ends in profiles.items() if fit.determined else ():
        name = form.parameters[i]
        low, high = (_exponential(end) if name in LOGARITHMIC else end for end in ends)
        parameters[name] = parameters[name].model_copy(update={"profile": _said(name, low, high)})
    return fit.model_copy(update={"parameters": parameters})


def _correlation(solution: Solution) -> list[list[float]] | None:
    if solution.covariance is None:
        return None
    spread = np.sqrt(np.diag(solution.covariance))
    correlation: list[list[float]] = np.clip(solution.covariance / np.outer(spread, spread), -1.0, 1.0).tolist()
    return correlation


def _r2(measured: Array, predicted: Array) -> float:
    return 1.0 - float(np.sum((measured - predicted) ** 2)) / float(np.sum((measured - measured.mean()) ** 2))


def _aicc(data: Data, predicted: Array, fitted: int, groups: Sequence[Hashable]) -> float | None:
    """AICc of normal noise of unknown size over the means of the unsaturated sizes, the same ones for every form.

    Saturated cells lie where they must whatever the parameters are, and their small residuals are no evidence of how
    small the noise is. A bounded form has been fitted to them as well and pays for it here, if it pays at all. The
    seeds of a size share what the form has wrong there, so they count once.
    """
    squares, sizes = means_of_sizes(predicted, data, groups)
    parameters = fitted + 1
    if sizes - parameters - 1 < 1:
        return None
    # An exact fit would be -infinity; float32 losses are not known better than this.
    variance = max(squares / sizes, SMALLEST_SPREAD**2)
    return sizes * math.log(variance) + 2 * parameters + 2 * parameters * (parameters + 1) / (sizes - parameters - 1)


def _held_out(form: Form, cells: Sequence[Cell], data: Data, theta: Array, capacity: CapacityName) -> list[HeldOut]:
    """Each size and each length foretold from the others, by the mean error of its unsaturated cells in percent."""
    found = []
    for factor in factors_of(capacity):
        values = np.array([getattr(cell, factor) for cell in cells])
        levels = np.unique(values[data.unsaturated]).tolist()
        for level in levels if len(levels) > 2 else []:
            extrapolates = level == levels[-1]
            # Beyond the largest there may be saturated cells: to foretell is to know nothing of them either.
            away = values >= level if extrapolates else values == level
            held = away & data.unsaturated
            error = _foretold(form, cells, data, theta, ~away & (data.unsaturated | form.bounded), held, capacity)
            found.append(
                HeldOut(
                    factor=factor,
                    value=int(level),
                    extrapolates=extrapolates,
                    cells=int(held.sum()),
                    mape_percent=error,
                )
            )
    return found


def _foretold(
    form: Form,
    cells: Sequence[Cell],
    data: Data,
    theta: Array,
    kept: npt.NDArray[np.bool_],
    held: npt.NDArray[np.bool_],
    capacity: CapacityName,
) -> float | None:
    """Mean error in percent of the held cells' loss reduction, by the kept ones; None where they determine no form."""
    rest = [cell for cell, keep in zip(cells, kept, strict=True) if keep]
    if (
        _shortfall(form, rest, capacity, len(rest)) is not None
        or (solution := solve(form, data.at(kept), theta)) is None
    ):
        return None
    with np.errstate(all="ignore"):
        predicted = reduction(form, solution.theta, data.points.at(held))
    missed = 100.0 * float(np.mean(np.abs(predicted / data.measured[held] - 1.0)))
    return missed if math.isfinite(missed) else None


def _misfits(
    cells: Sequence[Cell], excess: Array, unsaturated: npt.NDArray[np.bool_], capacity: CapacityName
) -> list[Misfit]:
    """Sizes and lengths whose unsaturated cells lie on one side of the form, beyond what their scatter explains.

    Args:
        cells: All of them.
        excess: Measured over predicted loss reduction - 1 in percent, what is peculiar to the text taken off.
        unsaturated: Which are not saturated.
        capacity: What the law counts.
    """
    levels = []
    for factor in factors_of(capacity):
        values = np.array([getattr(cell, factor) for cell in cells])
        for level in np.unique(values[unsaturated]).tolist():
            here = excess[(values == level) & unsaturated]
            if len(here) >= FEWEST_FOR_A_MISFIT:
                levels.append((factor, int(level), here))
    found = []
    for factor, level, here in levels:
        # Student's t of both sides, and of as many levels as are asked: three cells may agree by chance.
        certain = float(t.ppf(1.0 - MISFIT_ALARM / (2 * len(levels)), len(here) - 1))
        error = float(np.std(here, ddof=1)) / math.sqrt(len(here))
        if abs(here.mean()) > max(MISFIT_PERCENT, certain * error):
            found.append(Misfit(factor=factor, value=level, cells=len(here), excess_percent=float(here.mean())))
    return found


def _ranked(fits: list[FormFit], cells: Sequence[Cell]) -> tuple[list[FormFit], str]:
    """The fits, the chosen one first and the others by AICc, and why in words."""
    unsaturated = [cell for cell in cells if not saturated(cell)]
    # A power that is cut off at the ceiling is one of these too, a knee without end.
    knowing = [fit for fit in fits if FORMS[fit.form].bounded] if len(unsaturated) < len(cells) else []
    pool = knowing or fits
    known = [fit for fit in pool if fit.aicc is not None]
    if not known and not knowing:
        first = next((fit for fit in fits if fit.form == PUBLISHED), fits[0])
        reason = (
            "the only one that so few cells can tell anything of"
            if len(fits) == 1
            else "as published; too few sizes for AICc to choose"
        )
        return sorted(fits, key=lambda fit: fit is not first), reason
    lowest = min((fit.aicc for fit in known if fit.aicc is not None), default=math.inf)
    close = [fit for fit in known if fit.aicc is not None and fit.aicc - lowest < CLOSE_AICC] or pool
    best = min(map(_decisive_error, close))
    foretelling = [fit for fit in close if _decisive_error(fit) <= CLOSE_FACTOR * best]
    first = min(foretelling, key=lambda fit: (len(fit.free), _or_infinity(fit.aicc)))
    ranked = sorted(fits, key=lambda fit: (fit is not first, _or_infinity(fit.aicc)))
    among = " of the forms that know the ceiling" if knowing and len(knowing) < len(fits) else ""
    error = _decisive_error(first)
    foretold = (
        f"the simplest of the best at foretelling the largest rank and length ({error:.1f} % off)"
        if math.isfinite(error)
        else "the simplest"
    )
    if not known:
        return ranked, f"{foretold}{among}; too few sizes for AICc to choose"
    if len(close) > 1:
        within = f"AICc within {CLOSE_AICC:.0f} of the smallest{among} ({len(close)} forms)"
        return ranked, f"{within}, and of these {foretold}"
    rest = [fit.aicc - lowest for fit in known if fit is not first and fit.aicc is not None]
    behind = f"; the next is {min(rest):.1f} behind" if rest else ""
    if rest and (sizes := len(set(sizes_of(unsaturated)))) < FEWEST_FOR_A_GAP:
        behind = f", mostly for having few parameters: {sizes} unsaturated sizes tell forms hardly apart"
    return ranked, f"smallest AICc{among}{behind}"


def _decisive_error(fit: FormFit) -> float:
    """Error of extrapolation in percent, infinite where too few cells were held out to choose by it."""
    cells = sum(held.cells for held in fit.held_out if held.extrapolates and held.mape_percent is not None)
    return _or_infinity(fit.extrapolation_percent) if cells >= FEWEST_HELD_OUT else math.inf


def _is_logarithm(form: Form, solution: Solution, data: Data) -> bool:
    """Whether dL = p + q ln s - u ln l, the limit of the law as alpha, beta -> 0, describes the cells as well.

    Then C grows and b falls without end, and the place where the search stopped means nothing.
    """
    if form.bounded:
        return bool((np.abs(solution.theta[1:3]) < SMALL_EXPONENT).all())
    columns = np.stack([np.ones_like(data.measured), data.points.log_size, data.points.log_tokens], axis=1)
    weighted = columns * data.root_weights[:, None]
    measured = data.measured * data.root_weights
    residual = measured - weighted @ np.linalg.lstsq(weighted, measured, rcond=None)[0]
    return float(residual @ residual) <= solution.squares * (1.0 + 1e-6)


def _undetermined(
    form: Form, cells: Sequence[Cell], left_out: Sequence[LeftOutCell], capacity: CapacityName
) -> str | None:
    """Why the cells cannot determine a form, and what to do; None where they can."""
    used = [cell for cell in cells if not saturated(cell)]
    total = len(cells) + len(left_out)
    counts = {"saturated": len(cells) - len(used)}
    for cell in left_out:
        counts[cell.reason] = counts.get(cell.reason, 0) + 1
    others = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()) if count) or "none left out"
    if form.needs_entropy and any(cell.entropy_bits is None or cell.effective_parameters is None for cell in cells):
        return (
            f"form {form.name}: some runs do not know how much information their corpus has; leave them out, or choose "
            "another form"
        )
    return _shortfall(form, used, capacity, total, others)


def _shortfall(
    form: Form, cells: Sequence[Cell], capacity: CapacityName, total: int = 0, others: str = ""
) -> str | None:
    """Why cells, the saturated ones left out, are too few or too alike for a form; None where they are not."""
    used = [cell for cell in cells if not saturated(cell)]
    if total == 0 and not used:
        return "no cell: expected at least 5 runs that are not saturated; give folders with finished runs"
    fewest = FEWEST_CELLS_IN_BITS if form.proportional else FEWEST_CELLS
    if len(used) < fewest:
        return (
            f"{len(used)} of {total} cells can be used ({others}; saturated: final loss <= ln 2): expected at least "
            f"{fewest}; add runs with longer targets or lower ranks"
        )
    reductions = [cell.loss_reduction for cell in used]
    if max(reductions) - min(reductions) < SMALLEST_SPREAD:
        return (
            f"the loss reduction is {reductions[0]:.6g} nats in all {len(used)} cells: expected it to vary with rank "
            "and length; check that the runs really differ"
        )
    return None if form.proportional else _alike(used, capacity, total, others)


def _alike(used: Sequence[Cell], capacity: CapacityName, total: int, others: str) -> str | None:
    """Why cells cannot tell the effect of the adapter's size from that of length; None where they can."""
    grid = {(cell.size(capacity), cell.target_tokens) for cell in used}
    context = f"among the {len(used)} of {total} cells that can be used ({others})"
    nouns = [FACTORS[factor] for factor in factors_of(capacity)]
    hints = [f"other {nouns[0]}s", "other target lengths"]
    for noun, hint, values in zip(nouns, hints, map(set, zip(*grid, strict=True)), strict=True):
        if len(values) < 2:
            return f"only {noun} {min(values)} {context}: expected at least 2 {noun}s; add runs with {hint}"
    logs = np.array([[1.0, math.log(size), math.log(length)] for size, length in grid])
    if len(grid) < 4 or np.linalg.matrix_rank(logs, tol=1e-9 * len(grid)) < 3:
        pairs = ", ".join(f"({size}, {length})" for size, length in sorted(grid))
        size = nouns[0]
        return (
            f"the ({size}, length) pairs {pairs} {context} cannot tell the effect of {size} from that of length: "
            f"expected at least 4 different pairs, not all on one line; add runs that change the {size} at the same "
            "length"
        )
    return None


def _noise_near_the_ceiling(
    free: Array, residual: Array, unsaturated: npt.NDArray[np.bool_], noise: float
) -> tuple[float | None, float]:
    """Noise at the ceiling and the excess of it half-way there, in nats (see `FormFit`).

    Args:
        free: Share of a run's luck that gets through to its loss, by cell.
        residual: Measured minus predicted.
        unsaturated: Which cells are not saturated.
        noise: Of a run far below the ceiling.
    """
    there = ~unsaturated & (free < AT_CEILING)
    # Where no cell is at the ceiling, those on the way to it are all that is known.
    at_ceiling = _root_mean_square(residual[there if there.any() else ~unsaturated])
    between = (free >= AT_CEILING) & (free <= 1.0 - AT_CEILING)
    explained = (free * noise) ** 2 + ((1.0 - free) * (at_ceiling or 0.0)) ** 2
    excess = float(np.sum((residual**2 - explained)[between]))
    weight = float(np.sum((4.0 * free * (1.0 - free))[between]))
    return at_ceiling, math.sqrt(max(excess, 0.0) / weight) if weight > 0 else 0.0


def _text_share(
    form: Form, cells: Sequence[Cell], residual: Array, free: Array, chosen: npt.NDArray[np.bool_]
) -> tuple[tuple[float, float], float]:
    """How much of a text's excess is taken off with its standard error, and what share of the noise that leaves.

    Args:
        form: The form.
        cells: Those that it was fitted to.
        residual: Measured minus predicted, by cell.
        free: Share of a run's luck that gets through to its loss, by cell.
        chosen: Which are not saturated.
    """
    texts = texts_of(cells)
    share, error = texts.share_learnt(residual, free, chosen, form.text_share)
    left = residual - (share - form.text_share) * free * texts.excess[texts.of_cell]
    # Each cell alike: seeds may be far apart, and weigh little, just because their texts are.
    before, after = (float(np.sum(values[chosen] ** 2)) for values in (residual, left))
    # Where texts cannot tell, the prior may leave more than there was; a run is not luckier for it.
    return (share, error), min(math.sqrt(after / before), 1.0) if before > 0 else 1.0


def _root_mean_square(values: Array) -> float | None:
    return math.sqrt(float(np.mean(values**2))) if len(values) else None


def _said(name: str, low: float, high: float) -> tuple[float, float] | None:
    """An interval, unless it is one of a positive parameter that could as well be anything."""
    return None if name in LOGARITHMIC and high > WIDEST * low else (low, high)


def _exponential(value: float) -> float:
    """Of a logarithm that may be out of any measure, without leaving float64."""
    return math.exp(min(max(value, -300.0), 300.0))


def _or_infinity(value: float | None) -> float:
    return math.inf if value is None else value
