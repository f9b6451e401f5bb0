"""Fit every form of the law that the runs determine, and choose one."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lmfit
import numpy as np

from pml.errors import InputError
from pml.groups import shared_setting
from pml.law.data import Data, make_data
from pml.law.diagnostics import warnings_of
from pml.law.forms import FORMS, POSITIVE, SHARPNESS_RANGE, AdapterSize, Array, FormName
from pml.law.intervals import (
    GroupedBy,
    Noise,
    bootstrap,
    choose_groups,
    noise_of,
    profile_intervals,
    standard_errors,
    t_over_z,
)
from pml.law.law_fit import LawFit
from pml.law.least_squares import Solution, solve, to_theta
from pml.law.observations import Observation, observations_from_records, saturated, usable
from pml.law.schema import Estimate, FormFit, percentiles
from pml.law.selection import PUBLISHED, aicc, held_out, rank_forms, why_undetermined
from pml.law.texts import collect_texts
from pml.recall_model import RecallModel, fit_recall_from_folders
from pml.records import Record

__all__ = ["fit_law", "law_of_records"]

# If both exponents are this small, x^alpha equals 1 + alpha ln x to 0.1 % over a factor of 10, so dL = a0 + a1 ln s -
# a2 ln l describes the runs as well. Towards this limit C grows and b falls without bound, so the values at which the
# search stops mean nothing.
SMALL_EXPONENT = 0.02
# A run is at the ceiling if less than this share of a deviation in the power term reaches its loss.
AT_CEILING = 0.05
# Limits for the logarithm of an interval's ends, so that the ends are finite floats above 0.
LOG_ENDS = (-300.0, 300.0)


def fit_law(
    runs: Iterable[Observation],
    setting: Mapping[str, Any] | None = None,
    *,
    form: FormName | None = None,
    adapter_size: AdapterSize = "rank",
    recall: RecallModel | None = None,
) -> LawFit:
    """Fit the law by weighted least squares in every form that the runs determine, and choose one form.

    Runs that diverged, were interrupted or learned nothing are left out. As in the paper, forms without a ceiling also
    leave out saturated runs (final loss <= ln 2). Replicates are weighted by the inverse of their variance.
    `rank_forms` makes the choice.

    Args:
        runs: What the runs measured.
        setting: What the runs have in common (see `shared_setting`); kept with the fit.
        form: The form to choose; None chooses by AICc and held-out error.
        adapter_size: What the law counts as the adapter's size.
        recall: The model from loss to recall (see `pml.recall_model`); kept with the fit.

    Raises:
        InputError: If the runs cannot determine a law: too few are unsaturated, they have fewer than two ranks or
            lengths, ranks and lengths rise together, or the loss reduction does not vary.
    """
    if form is not None and form not in FORMS:
        raise InputError(f"form is {form!r}; expected one of {', '.join(FORMS)}")
    kept, left_out = usable(runs)
    if adapter_size == "effective_parameters" and any(run.effective_parameters is None for run in kept):
        raise InputError("by effective_parameters: some runs do not say how many they have; count by rank instead")
    counts = Counter[str](run.reason for run in left_out) + Counter({"saturated": sum(map(saturated, kept))})
    others = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items())) or "none left out"
    context = f"of {len(kept) + len(left_out)} runs ({others})"
    missing = {name: why_undetermined(kind, kept, adapter_size, context) for name, kind in FORMS.items()}
    possible = [name for name, reason in missing.items() if reason is None]
    if not possible or (form is not None and form not in possible):
        raise InputError(missing[form or PUBLISHED] or "")
    data = make_data(kept, adapter_size)
    solutions = {
        name: found for name in possible if (found := solve(FORMS[name], data.used_by(FORMS[name]))) is not None
    }
    if not solutions or (form is not None and form not in solutions):
        raise InputError(f"no C above 0 fits {form or 'any form'}; check what the runs trained on, or change --form")
    fits, reason = rank_forms([_form_fit(found, data, adapter_size) for found in solutions.values()], kept)
    if form is not None:
        fits, reason = sorted(fits, key=lambda fit: fit.form != form), "requested"
    elif len(fits) == 1 and missing[PUBLISHED] is not None:
        reason = f"the others are not determined: {missing[PUBLISHED]}"
    fits = [_with_profiles(fit, solutions[fit.form]) if fit.form in (fits[0].form, PUBLISHED) else fit for fit in fits]
    per_rank = {run.effective_parameters / run.rank if run.effective_parameters else None for run in kept}
    law = LawFit(
        form=fits[0].form,
        chosen_because=reason,
        adapter_size=adapter_size,
        parameters_per_rank=per_rank.pop() if len(per_rank) == 1 else None,
        fits=fits,
        observations=kept,
        left_out=left_out,
        recall=recall,
        setting=dict(setting or {}),
        warnings=[],
    )
    return law.model_copy(update={"warnings": warnings_of(law)})


def law_of_records(
    records: Mapping[Path, Record], *, form: FormName | None = None, adapter_size: AdapterSize = "rank"
) -> LawFit:
    """Fit the law to records, with the recall model of the finished runs; damaged token files give a warning.

    Takes the arguments of `fit_law` and `observations_from_records`.
    """
    recall, damaged = fit_recall_from_folders(path for path, record in records.items() if record.status == "finished")
    runs, setting = observations_from_records(records, adapter_size), shared_setting(records, adapter_size)
    law = fit_law(runs, setting, form=form, adapter_size=adapter_size, recall=recall)
    return law.model_copy(update={"warnings": [*law.warnings, *damaged]})


def _form_fit(solution: Solution, everything: Data, adapter_size: AdapterSize) -> FormFit:
    """A solution with all that is reported about it except the profile intervals."""
    form, data, residual, nvarys = solution.form, solution.data, solution.residual, len(solution.free)
    predicted = form.evaluate(solution.values, everything.points)
    grouped_by = choose_groups(solution)
    noise = noise_of(residual, data, grouped_by, nvarys)
    is_power = form.offset != "varies" or any(abs(solution.values[x]) >= SMALL_EXPONENT for x in ("alpha", "beta"))
    text_effect, noise_nats, noise_at_ceiling_nats = _run_noise(solution, everything, grouped_by)
    result = standard_errors(solution, noise) if is_power else None
    draws = bootstrap(solution, grouped_by) if is_power else None
    return FormFit(
        form=form.name,
        parameters=_estimates(solution, noise, result, draws),
        at_bound=[name for name in form.fitted if name not in solution.free],
        correlation=None if result is None else _correlation(result),
        determined=is_power,
        converged=solution.converged,
        observations_used=len(data.runs),
        grouped_by=grouped_by,
        degrees_of_freedom=noise.degrees_of_freedom,
        noise_nats=noise_nats,
        noise_at_ceiling_nats=noise_at_ceiling_nats,
        text_effect=text_effect,
        r2=_r2(data.measured, solution.predicted),
        r2_all=_r2(everything.measured, np.minimum(predicted, everything.points.initial_loss)),
        mape_percent=100.0 * float(np.mean(np.abs(residual) / data.measured)),
        rmse_nats=math.sqrt(np.mean(residual**2)),
        aicc=aicc(everything, predicted, nvarys),
        held_out=held_out(form, everything, adapter_size),
        predicted=predicted.tolist(),
    )


def _run_noise(solution: Solution, everything: Data, grouped_by: GroupedBy) -> tuple[float, float, float | None]:
    """What makes single runs differ: the effect of a text, and noise in nats in the power term and at the ceiling.

    The last is None if no run is saturated.
    """
    form, data, residual = solution.form, solution.data, solution.residual
    texts, sensitivity = collect_texts(everything.runs), form.sensitivity(solution.values, data.points)
    unsaturated, of_run = data.unsaturated, texts.of_run[everything.unsaturated | form.saturating]
    effect = texts.effect(residual[unsaturated], sensitivity[unsaturated], of_run[unsaturated])
    beyond_text = residual - effect * sensitivity * texts.initial_loss_residuals[of_run]
    # Residuals are in the loss; noise in the power term reaches the loss scaled by the sensitivity.
    reach = max(math.sqrt(np.mean(sensitivity[unsaturated] ** 2)), AT_CEILING)
    noise = noise_of(beyond_text, data, grouped_by, len(solution.free)).of_a_run / reach
    return effect, noise, _noise_at_ceiling(residual[~unsaturated], sensitivity[~unsaturated])


def _noise_at_ceiling(residual: Array, sensitivity: Array) -> float | None:
    """Root mean square residual in nats of the saturated runs that have reached the ceiling, or of all if none has.

    Those that still approach it scatter more. None without saturated runs.
    """
    reached = sensitivity < AT_CEILING
    chosen = residual[reached] if reached.any() else residual
    return math.sqrt(np.mean(chosen**2)) if len(chosen) else None


def _estimates(
    solution: Solution, noise: Noise, result: lmfit.minimizer.MinimizerResult | None, draws: Array | None
) -> dict[str, Estimate]:
    """Parameters with lmfit's standard errors and bootstrap intervals, widened for few degrees of freedom."""
    theta, estimates = to_theta(solution.form, solution.values), {}
    for i, (name, value) in enumerate(solution.values.items()):
        if name not in solution.free:
            estimates[name] = Estimate(value=value)
            continue
        interval = None
        if draws is not None:
            ends = theta[i] + t_over_z(noise.degrees_of_freedom) * (np.array(percentiles(draws[:, i])) - theta[i])
            if name in POSITIVE:
                ends = np.exp(np.clip(ends, *LOG_ENDS))
            if name == "sharpness":
                ends = np.clip(ends, *SHARPNESS_RANGE)
            interval = (float(ends[0]), float(ends[1]))
        error = None if result is None else float(result.params[name].stderr)
        estimates[name] = Estimate(value=value, stderr=error, bootstrap=interval)
    return estimates


def _with_profiles(fit: FormFit, solution: Solution) -> FormFit:
    """Add profile-likelihood intervals, which take longer than the rest of the fit."""
    noise = noise_of(solution.residual, solution.data, fit.grouped_by, len(fit.free))
    profiles = profile_intervals(solution, noise) if fit.determined else {}
    parameters = {
        name: estimate.model_copy(update={"profile": profiles.get(name)}) for name, estimate in fit.parameters.items()
    }
    return fit.model_copy(update={"parameters": parameters})


def _correlation(result: lmfit.minimizer.MinimizerResult) -> list[list[float]]:
    """Correlation matrix of the parameters that vary, in order."""
    names = result.var_names
    return [[1.0 if a == b else float(result.params[a].correl[b]) for b in names] for a in names]


def _r2(measured: Array, predicted: Array) -> float:
    return 1.0 - float(np.sum((measured - predicted) ** 2)) / float(np.sum((measured - measured.mean()) ** 2))
