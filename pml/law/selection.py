"""Which form: AICc over what all forms describe, and held-out prediction of the largest rank and length."""

import math
from collections.abc import Sequence

import numpy as np

from pml.law.data import Data, data_of
from pml.law.forms import FORMS, AdapterSize, Array, Form, FormName
from pml.law.identifiability import SMALLEST_SPREAD, shortfall
from pml.law.intervals import between_group_squares
from pml.law.least_squares import solve
from pml.law.observations import Observation, saturated
from pml.law.schema import FormFit, HeldOut, factors_of

__all__ = ["PUBLISHED", "aicc", "held_out", "rank_forms"]

PUBLISHED: FormName = "power_offset"
# Forms whose AICc differs by less are chosen by held-out error (Burnham and Anderson's rule of thumb).
CLOSE_AICC = 2.0
# Held-out errors within this factor, or of fewer runs, do not separate forms.
CLOSE_FACTOR = 1.5
FEWEST_HELD_OUT = 4


def aicc(data: Data, predicted: Array, nvarys: int) -> float | None:
    """AICc of normal noise of unknown variance over the means of the unsaturated grid points.

    These are the same for every form. Saturated runs lie at the ceiling whatever the parameters, so their small
    residuals are no evidence of small noise. Seeds of one grid point share the form's error there and count once.
    """
    squares, number = between_group_squares(data.measured - predicted, data, "grid_point")
    parameters = nvarys + 1
    if number - parameters - 1 < 1:
        return None
    variance = max(squares / number, SMALLEST_SPREAD**2)
    return number * math.log(variance) + 2 * parameters + 2 * parameters * (parameters + 1) / (number - parameters - 1)


def held_out(form: Form, data: Data, adapter_size: AdapterSize) -> list[HeldOut]:
    """Mean error in percent at the largest size and at the largest length, each predicted from the smaller ones."""
    found = []
    for factor in factors_of(adapter_size):
        levels = np.array([getattr(run, factor) for run in data.runs])
        known = np.unique(levels[data.unsaturated])
        if len(known) < 3:
            continue
        held = data.at((levels >= known[-1]) & data.unsaturated)
        # A prediction must know nothing of what is held out: neither saturated runs beyond the largest, nor the spread
        # of replicates there, which the weights of the others would be shrunk towards.
        rest = [run for run, level in zip(data.runs, levels, strict=True) if level < known[-1]]
        kept = data_of(rest, adapter_size).used_by(form)
        error = math.nan
        if shortfall(form, kept.runs, adapter_size) is None and (solution := solve(form, kept)) is not None:
            error = 100.0 * float(np.mean(np.abs(form.evaluate(solution.values, held.points) / held.measured - 1.0)))
        mape = error if math.isfinite(error) else None
        found.append(HeldOut(factor=factor, value=int(known[-1]), runs=len(held.runs), mape_percent=mape))
    return found


def rank_forms(fits: list[FormFit], runs: Sequence[Observation]) -> tuple[list[FormFit], str]:
    """The fits, the chosen one first and the others by AICc, and the reason in words.

    Where runs are saturated, only saturating forms are candidates, since the others say nothing about these runs. Of
    the candidates within 2 of the smallest AICc, the simplest is chosen whose held-out error is within 1.5 times the
    smallest; fewer than 4 held-out runs decide nothing.
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
    best = min(map(_held_out_error, close))
    accurate = [fit for fit in close if _held_out_error(fit) <= CLOSE_FACTOR * best]
    first = min(accurate, key=lambda fit: (len(fit.free), _or_infinity(fit.aicc)))
    ranked = sorted(fits, key=lambda fit: (fit is not first, _or_infinity(fit.aicc)))
    error = _held_out_error(first)
    simplest = "the simplest" + (
        f" of those with the smallest held-out error ({error:.1f} %)" if math.isfinite(error) else ""
    )
    if not known:
        return ranked, f"too few grid points for AICc, so {simplest}{among}"
    if len(close) > 1:
        return ranked, f"{simplest}; AICc is within {CLOSE_AICC:.0f} of the smallest{among} for {len(close)} forms"
    others = [value - lowest for name, value in known.items() if name != first.form]
    return ranked, f"smallest AICc{among}" + (f"; the next is {min(others):.1f} larger" if others else "")


def _held_out_error(fit: FormFit) -> float:
    """Held-out error in percent, infinite where too few runs were held out to choose by it."""
    runs = sum(held.runs for held in fit.held_out if held.mape_percent is not None)
    return _or_infinity(fit.held_out_percent) if runs >= FEWEST_HELD_OUT else math.inf


def _or_infinity(value: float | None) -> float:
    return math.inf if value is None else value
