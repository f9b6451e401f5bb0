"""Tables about a fitted law, shared by the command and the report."""

from typing import Final

from pml.law.forms import FORMS
from pml.law.intervals import GroupedBy
from pml.law.law_fit import LawFit
from pml.law.observations import saturated
from pml.law.schema import FACTORS, Factor, FormFit
from pml.law.selection import PUBLISHED
from pml.recall_model import RecallModel
from pml.tables import TextTable, show_interval

__all__ = [
    "SYMBOLS",
    "forms_table",
    "observations_table",
    "parameters_table",
    "recall_table",
    "sentences",
    "symbols_sentence",
]

SYMBOLS: Final = {
    "C": "C (nats)",
    "alpha": "\N{GREEK SMALL LETTER ALPHA}",
    "beta": "\N{GREEK SMALL LETTER BETA}",
    "b": "b (nats)",
    "sharpness": "p",
    "bits_per_parameter": "\N{GREEK SMALL LETTER KAPPA} (bits)",
}
"""Symbols of the parameters with their units."""

TOGETHER: dict[GroupedBy, str] = {"text": "the ranks on one text", "grid_point": "the seeds of one rank and length"}


def parameters_table(law: LawFit, details: bool = True) -> TextTable:
    """Parameters of the chosen form, and in detail of the paper's form too, with 95 % intervals."""
    fits = [law.best, *(fit for fit in law.fits if details and fit.form == PUBLISHED != law.form)]
    groupings: dict[GroupedBy, list[str]] = {}
    for fit in fits:
        groupings.setdefault(fit.grouped_by, []).append(fit.form)
    rows = [
        (
            fit.form,
            SYMBOLS[name],
            f"{estimate.value:.3g}",
            "at its bound" if name in fit.at_bound else "-" if estimate.stderr is None else f"{estimate.stderr:.2g}",
            show_interval(estimate.profile),
            show_interval(estimate.bootstrap),
        )
        for fit in fits
        for name, estimate in fit.parameters.items()
    ]
    return TextTable(
        "Parameters",
        ("form", "parameter", "value", "standard error", "95 %, profile", "95 %, bootstrap"),
        rows,
        words=(0, 1),
        note="p: sharpness of the soft minimum. Profile: from the likelihood. Bootstrap: resamples groups of runs, "
        + " and ".join(
            TOGETHER[grouped_by] + (f" ({', '.join(forms)})" if len(groupings) > 1 else "")
            for grouped_by, forms in groupings.items()
        )
        + " together.",
    )


def forms_table(law: LawFit) -> TextTable:
    """Every form that the runs determine, the chosen one first."""
    size, _ = law.factors
    rows = [
        (
            fit.form,
            law.equation(form=fit.form),
            "-" if fit.aicc is None else f"{fit.aicc:.1f}",
            f"{fit.r2_all:.4f}",
            f"{fit.noise_nats:.3f}",
            _held_out(fit, size),
            _held_out(fit, "target_tokens"),
        )
        for fit in law.fits
    ]
    return TextTable(
        "Forms of the law",
        (
            "form",
            "equation",
            "AICc",
            "R², all",
            "noise (nats)",
            f"largest {FACTORS[size]} held out",
            "largest length held out",
        ),
        rows,
        words=(0, 1),
        note="r: rank, P: adapter parameters, l: target tokens, L0: loss of the frozen model, H: bits (stored) or nats "
        "(loss) in the corpus; the number after min is the sharpness of the soft minimum. R²: over all runs, "
        "predictions capped at L0. AICc: over the unsaturated grid points, smaller is better. Held out: mean error of "
        "the loss reduction of unsaturated runs at the largest size or length, predicted from the runs below it.",
    )


def recall_table(model: RecallModel) -> TextTable:
    """Calibration of the recall model; each run is predicted from the others."""
    rows = [
        (f"{row.low:g} to {row.high:g}", f"{row.targets:,}", f"{row.predicted:.3f}", f"{row.observed:.3f}")
        for row in model.reliability
    ]
    return TextTable(
        "From loss to recall",
        ("probability", "targets", "predicted", "observed"),
        rows,
        note=f"Half of the target tokens are right at a mean loss of {model.half_loss:.3g} nats. Predicted from the "
        f"other runs, token accuracy is off by {100 * model.token_accuracy_error:.1f} points and exact match by "
        f"{100 * model.exact_match_error:.1f} on average; the Brier score is {model.brier:.3f}, against "
        f"{model.brier_reference:.3f} for the mean. Rows: targets by their predicted probability of being right; "
        f"{model.runs} runs, {model.targets:,} targets.",
    )


def observations_table(law: LawFit) -> TextTable:
    """The runs that the chosen form was fitted to, with its predictions."""
    rows = [
        (
            f"{run.target_tokens}",
            f"{run.rank}",
            f"{run.seed}",
            f"{run.loss_reduction:.4f}",
            f"{predicted:.4f}",
            f"{100 * (predicted / run.loss_reduction - 1):+.1f}",
            "saturated" if saturated(run) else "",
        )
        for run, predicted in law.used
    ]
    columns = ("target tokens", "rank", "seed", "measured dL", "predicted dL", "error %", "")
    return TextTable("Runs", columns, rows, words=(6,), note="dL in nats per target token.", small=True)


def sentences(law: LawFit) -> list[str]:
    """The chosen form and why, how well it fits which runs, its held-out errors, and the bits per parameter."""
    best = law.best
    left_out = ", ".join(f"{number} {reason}" for reason, number in sorted(law.left_out_counts.items()))
    without = f" (left out: {left_out})" if left_out else ""
    (low, high), (short, long) = law.rank_range, law.target_tokens_range
    alone = law.unsaturated_fit
    # Saturated runs make any law look good, so the others come first.
    unsaturated = (
        f"R² {alone.r2:.4f}, mean error {alone.mape_percent:.2f} % over the {alone.runs} unsaturated runs; "
        if alone.runs < best.observations_used
        else ""
    )
    found = [
        f"form: {law.form} ({FORMS[law.form].meaning.replace('`', '')}); chosen: {law.chosen_because}",
        f"{unsaturated}R² {best.r2:.4f}, mean error {best.mape_percent:.2f} %, RMSE {best.rmse_nats:.4f} nats per "
        f"target token over the {best.observations_used} runs fitted{without}; ranks {low} to {high}, {short} to "
        f"{long} target tokens",
    ]
    largest = [(factor, held) for factor in law.factors if (held := best.largest(factor)) is not None]
    if largest:
        parts = [
            f"{FACTORS[factor]} >= {held.value} off by {_percent(held.mape_percent)} ({_runs(held.runs)})"
            for factor, held in largest
        ]
        found.append(f"held-out prediction from smaller runs: {', '.join(parts)}")
    if (kappa := law.bits_per_parameter) is not None:
        found.append(f"stored bits per parameter: {kappa.value:.3g} (95 % interval {show_interval(kappa.interval)})")
    return found


def symbols_sentence(law: LawFit) -> str:
    """Explain the symbols of the equation."""
    equation, form = law.equation(), FORMS[law.form]
    meanings = ["dL: loss reduction in nats per target token"]
    meanings += ["r: LoRA rank"] if " r^" in equation else []
    meanings += ["P: effective parameters"] if " P" in equation else []
    meanings += ["l: target tokens"] if " l^" in equation else []
    meanings += ["L0: loss of the frozen model"] if "L0" in equation else []
    meanings += [f"H: {'bits' if form.proportional else 'nats'} in the corpus"] if form.needs_entropy else []
    meanings += ["min_p: soft minimum (x^-p + y^-p)^(-1/p)"] if "min_" in equation else []
    return "; ".join(meanings)


def _held_out(fit: FormFit, factor: Factor) -> str:
    """The held-out error and its number of runs."""
    held = fit.largest(factor)
    return "-" if held is None else f"{_percent(held.mape_percent)} ({_runs(held.runs)})"


def _runs(number: int) -> str:
    return f"{number} run{'s' if number > 1 else ''}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} %"
