"""Which forms the runs determine, and which to choose: by AICc and held-out prediction of the largest sizes."""

import math
from collections.abc import Sequence

import numpy as np

from pml.law.data import Data, make_data
from pml.law.forms import FORMS, AdapterSize, Array, Form, FormName
from pml.law.intervals import between_group_squares
from pml.law.least_squares import solve
from pml.law.observations import Observation, saturated
from pml.law.schema import FACTORS, Factor, FormFit, HeldOut

__all__ = ["PUBLISHED", "aicc", "held_out", "held_out_error", "rank_forms", "why_undetermined"]

PUBLISHED: FormName = "power_offset"
# Smallest spread of the loss reduction, in nats, that float32 losses can show.
SMALLEST_SPREAD = 1e-6
# One more than the four parameters of the published law, so that the residuals show the noise. `stored_bits` has two
# parameters, and needs two more.
FEWEST_RUNS, FEWEST_RUNS_IN_BITS = 5, 4
# Held-out error decides between forms whose AICc differs by less (Burnham and Anderson's rule of thumb).
CLOSE_AICC = 2.0
# Held-out errors within this factor, or over fewer runs, do not separate forms.
CLOSE_FACTOR = 1.5
FEWEST_HELD_OUT = 4


def why_undetermined(
    form: Form, runs: Sequence[Observation], adapter_size: AdapterSize, context: str = ""
) -> str | None:
    """Why runs do not determine a form (a number is unknown, or they are too few or too alike), and what to do.

    Args:
        form: The form.
        runs: The runs.
        adapter_size: What the law counts as the adapter's size.
        context: How many runs there are and why others are left out, for the message.

    Returns:
        The reason, or None if the runs determine the form.
    """
    unknown = []
    if form.needs_entropy and any(run.entropy_bits is None for run in runs):
        unknown.append("the corpus entropy")
    if form.proportional and any(run.effective_parameters is None for run in runs):
        unknown.append("the number of effective parameters")
    if unknown:
        return f"form {form.name}: some runs lack {' and '.join(unknown)}; leave them out, or choose another form"
    used = [run for run in runs if not saturated(run)]
    fewest = FEWEST_RUNS_IN_BITS if form.proportional else FEWEST_RUNS
    if len(used) < fewest:
        return (
            f"{len(used)} {context} can be used (saturated: final loss <= ln 2); expected at least {fewest}; "
            "add runs with longer targets or lower ranks"
        )
    reductions = [run.loss_reduction for run in used]
    if max(reductions) - min(reductions) < SMALLEST_SPREAD:
        return (
            f"the loss reduction is {reductions[0]:.6g} nats in all {len(used)} runs; expected it to vary with rank "
            "and length; check that the runs differ"
        )
    if form.proportional:
        return None
    grid = {(run.size(adapter_size), run.target_tokens) for run in used}
    size, length = FACTORS[adapter_size], FACTORS["target_tokens"]
    for noun, values in ((size, {point[0] for point in grid}), (length, {point[1] for point in grid})):
        if len(values) < 2:
            return (
                f"only {noun} {min(values)} among the {len(used)} {context} that can be used; expected at least 2 "
                f"{noun}s; add runs with other {noun}s"
            )
    logs = np.array([[1.0, math.log(s), math.log(tokens)] for s, tokens in grid])
    if len(grid) < 4 or np.linalg.matrix_rank(logs, tol=1e-9 * len(grid)) < 3:
        return (
            f"the {len(grid)} ({size}, length) pairs of the {len(used)} {context} that can be used cannot separate the "
            f"effect of {size} from that of length; expected at least 4 different pairs, not all on one line; add runs "
            f"that change the {size} at the same length"
        )
    return None


def aicc(data: Data, predicted: Array, nvarys: int) -> float | None:
    """AICc over the means of the unsaturated grid points, for normal noise of unknown variance.

    These points are the same for every form. Forms with a ceiling are also fitted to saturated runs, so their AICc is,
    if anything, too high. Saturated runs lie at the ceiling whatever the parameters, so their small residuals are no
    evidence of small noise. Seeds of one grid point share the form's error there and count once.
    """
    squares, number = between_group_squares(data.measured - predicted, data, "grid_point")
    parameters = nvarys + 1
    if number - parameters - 1 < 1:
        return None
    variance = max(squares / number, SMALLEST_SPREAD**2)
    return number * math.log(variance) + 2 * parameters + 2 * parameters * (parameters + 1) / (number - parameters - 1)


def held_out(form: Form, data: Data, adapter_size: AdapterSize) -> list[HeldOut]:
    """Held-out errors at the largest size and at the largest length, each predicted from the smaller ones."""
    found = []
    factors: tuple[Factor, Factor] = (adapter_size, "target_tokens")
    for factor in factors:
        levels = np.array([getattr(run, factor) for run in data.runs])
        known = np.unique(levels[data.unsaturated])
        if len(known) < 3:
            continue
        held = data.at((levels >= known[-1]) & data.unsaturated)
        # Nothing held out may leak into the prediction: neither saturated runs at the largest level or beyond, nor the
        # spread of replicates there, towards which the weights of the others would be shrunk.
        rest = [run for run, level in zip(data.runs, levels, strict=True) if level < known[-1]]
        kept = make_data(rest, adapter_size).used_by(form)
        error = math.nan
        if why_undetermined(form, kept.runs, adapter_size) is None and (solution := solve(form, kept)) is not None:
            error = 100.0 * float(np.mean(np.abs(form.evaluate(solution.values, held.points) / held.measured - 1.0)))
        mape = error if math.isfinite(error) else None
        found.append(HeldOut(factor=factor, value=int(known[-1]), runs=len(held.runs), mape_percent=mape))
    return found


def rank_forms(fits: list[FormFit], runs: Sequence[Observation]) -> tuple[list[FormFit], str]:
    """Sort fits, the chosen one first and the others by AICc, and give the reason in words.

    If some runs are saturated, only saturating forms are candidates, since the others do not describe these runs. Of
    the candidates within 2 of the smallest AICc, those with a held-out error within 1.5 times the smallest remain, and
    the simplest of them is chosen. Fewer than 4 held-out runs decide nothing.
    """
    saturating = [fit for fit in fits if FORMS[fit.form].saturating] if any(map(saturated, runs)) else []
    candidates = saturating or fits
    among = " of the saturating forms" if saturating and len(saturating) < len(fits) else ""
    known = {fit.form: fit.aicc for fit in candidates if fit.aicc is not None}
    if not known and not saturating:
        first = next((fit for fit in fits if fit.form == PUBLISHED), fits[0])
        reason = "too few grid points for AICc to choose another than the published form"
        return sorted(fits, key=lambda fit: fit is not first), reason
    lowest = min(known.values(), default=math.inf)
    close = [fit for fit in candidates if known.get(fit.form, math.inf) - lowest < CLOSE_AICC] or candidates
    best = min(map(held_out_error, close))
    accurate = [fit for fit in close if held_out_error(fit) <= CLOSE_FACTOR * best]
    first = min(accurate, key=lambda fit: (len(fit.free), _or_infinity(fit.aicc)))
    ranked = sorted(fits, key=lambda fit: (fit is not first, _or_infinity(fit.aicc)))
    error = held_out_error(first)
    simplest = "the simplest" + (
        f" of those with the smallest held-out error ({error:.1f} %)" if math.isfinite(error) else ""
    )
    if not known:
        return ranked, f"too few grid points for AICc, so {simplest}{among}"
    if len(close) > 1:
        return ranked, f"{simplest}; AICc is within {CLOSE_AICC:.0f} of the smallest{among} for {len(close)} forms"
    others = [value - lowest for name, value in known.items() if name != first.form]
    return ranked, f"smallest AICc{among}" + (f"; the next is {min(others):.1f} larger" if others else "")


def held_out_error(fit: FormFit) -> float:
    """Mean error in percent over all held-out runs; infinite if they are too few to choose by."""
    known = [(held.runs, held.mape_percent) for held in fit.held_out if held.mape_percent is not None]
    runs = sum(runs for runs, _ in known)
    return sum(runs * error for runs, error in known) / runs if runs >= FEWEST_HELD_OUT else math.inf


def _or_infinity(value: float | None) -> float:
    return math.inf if value is None else value
