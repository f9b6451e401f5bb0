"""What a page says about one law: its equation with intervals, how well it fits, and its figures."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from pml.calibration import RecallModel, fit_recall, run_tokens
from pml.errors import InputError
from pml.figures import agreement_figure, reduction_figure, residual_figure
from pml.law import FORMS, Cell, Estimate, Factor, FormFit, FormName, LawFit, fit_law, saturated
from pml.report.parts import Panel, TextTable, count, draw, spans
from pml.token_results import TokenResults

__all__ = ["LawPart", "interval_text", "law_part"]

MINUS = "\N{MINUS SIGN}"
SYMBOLS = {
    "kappa": "\N{GREEK SMALL LETTER KAPPA}",
    "knee": "knee",
    "C": "C",
    "alpha": "\N{GREEK SMALL LETTER ALPHA}",
    "beta": "\N{GREEK SMALL LETTER BETA}",
    "b": "b",
}
BAND = "95 % interval of the law's mean"
UNITS = {"kappa": " (bits)", "C": " (nats)", "b": " (nats)"}


PUBLISHED: FormName = "power_offset"
NAMES: dict[FormName, str] = {
    "power": "power",
    "power_offset": "the paper's",
    "ceiling": "power, ceiling",
    "ceiling_offset": "the paper's, ceiling",
    "entropy_power": "power of what is stored",
    "stored_bits": "stored bits",
}


@dataclass(frozen=True)
class LawPart:
    """A fitted law on the page.

    Attributes:
        fit: The law.
        equation: Its chosen form as HTML.
        sentences: Why this form, and how well it fits.
        tables: Parameters with their intervals, the forms beside each other, and how well recall is foretold.
        warnings: In words, why to believe it less than it looks.
        panels: Its figures.
    """

    fit: LawFit
    equation: Markup
    sentences: list[str]
    tables: list[TextTable]
    warnings: list[str]
    panels: list[Panel]


def law_part(
    cells: list[Cell], setting: dict[str, Any], tokens: Iterable[TokenResults], name: str, of: str
) -> LawPart | str:
    """Fit the law to the runs of one group; in place of a law, why there is none.

    Args:
        cells: Runs of one backbone, adapter place, initialisation, corpus and method.
        setting: What they have in common.
        tokens: Per-token results of the finished ones, from which recall is foretold.
        name: What the names of its figures begin with.
        of: Whose law it is, for those who cannot see the figures.
    """
    try:
        fit = fit_law(cells, setting, recall=fit_recall([run_tokens(run) for run in tokens]))
    except InputError as error:
        return str(error)
    recall = [_recall(fit.recall)] if fit.recall is not None else []
    return LawPart(
        fit=fit,
        equation=_html(fit.best, fit),
        sentences=[_choice(fit), _quality(fit)],
        tables=[_parameters(fit), _forms(fit), *recall],
        warnings=list(fit.warnings),
        panels=_panels(fit, cells, name, of),
    )


def interval_text(interval: tuple[float, float] | None) -> str:
    """An interval to three digits, or a dash."""
    return "-" if interval is None else f"{interval[0]:.3g} to {interval[1]:.3g}"


def _html(form: FormFit, fit: LawFit) -> Markup:
    """A form with its numbers as HTML: numbers of our own making, nothing of it from a record."""
    text = re.sub(r"\b([rPlH])\b", r"<i>\1</i>", form.equation(capacity=fit.capacity).replace("-", MINUS))
    text = re.sub(r"\^(\S+?)(?=[ ,)]|$)", r"<sup>\1</sup>", text)
    text = re.sub(r"min_([\d.]+)", r"min<sub>\1</sub>", text)
    return Markup(text.replace("dL", "Δ<i>L</i>").replace("L0", "<i>L</i><sub>0</sub>"))


def _choice(fit: LawFit) -> str:
    meaning = FORMS[fit.form].meaning.replace("`", "")
    return f"Form: {NAMES[fit.form]} ({meaning}). Chosen: {fit.chosen_because}."


def _quality(fit: LawFit) -> str:
    left_out = ", ".join(f"{number:,} {reason}" for reason, number in sorted(fit.cells_left_out.items()))
    return (
        f"R² {fit.r2:.4f}, MAPE {fit.mape_percent:.2f} %, RMSE {fit.rmse_nats:.3f} nats per target token over "
        f"{count(fit.cells_used, 'run')}{f'; left out: {left_out}' if left_out else ''}. Measured: ranks "
        f"{spans(fit.rank_range)}, {spans(fit.target_tokens_range)} target tokens."
    )


def _parameters(fit: LawFit) -> TextTable:
    """The chosen form's parameters, and those of the paper's form where it is another one."""
    rows = []
    for form in [fit.best, *(other for other in fit.fits if other.form == PUBLISHED != fit.form)]:
        for name, estimate in form.parameters.items():
            rows.append(
                (
                    NAMES[form.form],
                    SYMBOLS[name] + UNITS.get(name, ""),
                    f"{estimate.value:.3g}",
                    "at its bound" if name in form.at_bound else _error(estimate),
                    interval_text(estimate.profile),
                    interval_text(estimate.bootstrap),
                )
            )
    return TextTable(
        "Parameters",
        ("form", "parameter", "value", "standard error", "95 %, profile", "95 %, bootstrap"),
        rows,
        words=(0, 1),
        note="Intervals of the profile likelihood, and of the bootstrap over cells, seeds of a cell together.",
    )


def _forms(fit: LawFit) -> TextTable:
    """Every form that the runs determine, the best first."""
    rows = [
        (
            NAMES[form.form],
            _html(form, fit),
            "-" if form.aicc is None else f"{form.aicc:.1f}",
            f"{form.r2_all:.4f}",
            f"{form.noise_nats:.3f}",
            _held_out(form, "rank"),
            _held_out(form, "target_tokens"),
            _percent(form.interpolation_percent),
        )
        for form in fit.fits
    ]
    return TextTable(
        "Forms of the law",
        (
            "form",
            "equation",
            "AICc",
            "R², all runs",
            "noise (nats)",
            "largest rank held out",
            "largest length held out",
            "others held out",
        ),
        rows,
        words=(0, 1),
        note="r: rank, P: adapter parameters, l: target tokens, L0: loss of the frozen model, H: bits (stored) or nats "
        "(loss) in the corpus; a number at min is the knee of a smooth minimum. AICc over the unsaturated sizes, less "
        "is better. Held out: mean error of the loss reduction where unsaturated runs of the largest rank or length, "
        "with everything beyond them left out, or those of each of the others, are foretold from the rest.",
    )


def _recall(model: RecallModel) -> TextTable:
    """How well recall is foretold from the mean loss, each run from the others."""
    rows = [
        (f"{row.low:g} to {row.high:g}", f"{row.targets:,}", f"{row.predicted:.3f}", f"{row.observed:.3f}")
        for row in model.reliability
    ]
    return TextTable(
        "From loss to recall",
        ("probability", "targets", "foretold", "observed"),
        rows,
        note=f"Half of the target tokens are right at a mean loss of {model.half_loss:.3g} nats. Foretold from the "
        f"other runs, token accuracy is off by {100 * model.token_accuracy_error:.1f} points and exact match by "
        f"{100 * model.exact_match_error:.1f} on average; Brier score {model.brier:.3f}, where always saying the mean "
        f"has {model.brier_reference:.3f}. The table has targets by their foretold probability of being right.",
    )


def _error(estimate: Estimate) -> str:
    return "-" if estimate.stderr is None else f"{estimate.stderr:.2g}"


def _held_out(form: FormFit, factor: Factor) -> str:
    """How well the largest is foretold, and of what and how many runs that speaks."""
    held = form.largest(factor)
    if held is None:
        return "-"
    return f"{_percent(held.mape_percent)} (from {held.value:,} on, {count(held.cells, 'run')})"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} %"


def _panels(fit: LawFit, cells: list[Cell], name: str, of: str) -> list[Panel]:
    hollow = " Hollow: saturated runs" if any(map(saturated, fit.cells)) else ""
    hollow += ("." if FORMS[fit.form].bounded else ", which the fit leaves out.") if hollow else ""
    ranks, lengths = spans(fit.rank_range), spans(fit.target_tokens_range)
    worst = max(abs(cell.measured - cell.predicted) for cell in fit.used)
    return [
        draw(
            f"{name}-agreement",
            "Measured against predicted",
            f"On the dashed line both are equal.{hollow}",
            f"{of}: predicted against measured loss reduction of {count(fit.cells_used, 'run')}: R squared "
            f"{fit.r2:.4f}, mean error {fit.mape_percent:.1f} %.",
            lambda: agreement_figure(fit, cells),
        ),
        draw(
            f"{name}-by-rank",
            "Loss reduction by rank",
            f"Lines are the law, dotted where no run was used; shade: {BAND}.{hollow}",
            f"{of}: loss reduction against rank {ranks} on logarithmic axes, a line of the law for each length.",
            lambda: reduction_figure(fit, cells, "rank"),
        ),
        draw(
            f"{name}-by-length",
            "Loss reduction by length",
            f"The same against length, a line for each rank; shade: {BAND}.{hollow}",
            f"{of}: loss reduction against {lengths} target tokens on logarithmic axes, a line of the law for each "
            "rank.",
            lambda: reduction_figure(fit, cells, "length"),
        ),
        draw(
            f"{name}-residuals",
            "What the law misses",
            "Shade: one root mean squared error on either side. A trend would mean that the law does not hold.",
            f"{of}: measured minus predicted loss reduction by rank and by length; at most {worst:.3g} nats per token.",
            lambda: residual_figure(fit),
        ),
    ]
