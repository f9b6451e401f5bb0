"""What a page says about one law: its equation with intervals, how well it fits, and its figures."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pml.errors import InputError
from pml.figures import agreement_figure, reduction_figure, residual_figure
from pml.law import FORMS, Equation, LawFit, Observation, fit_law, saturated
from pml.law.tables import (
    choice_sentence,
    forms_table,
    held_out_sentence,
    parameters_table,
    quality_sentence,
    recall_table,
)
from pml.recall_model import fit_recall, run_tokens
from pml.report.parts import Panel, count, draw, spans
from pml.tables import TextTable
from pml.token_results import TokenResults

__all__ = ["LawPart", "law_part"]

BAND = "95 % interval of the law's mean"


@dataclass(frozen=True)
class LawPart:
    """A fitted law on the page.

    Attributes:
        fit: The law.
        equation: Its chosen form; the page shows it as HTML.
        sentences: Why this form, how well it fits, and its held-out errors.
        tables: Parameters with their intervals, the forms beside each other, and the recall model's calibration.
        warnings: In words, why to trust it less than its numbers suggest.
        panels: Its figures.
    """

    fit: LawFit
    equation: Equation
    sentences: list[str]
    tables: list[TextTable]
    warnings: list[str]
    panels: list[Panel]


def law_part(
    runs: list[Observation], setting: dict[str, Any], tokens: Iterable[TokenResults], name: str, of: str
) -> LawPart | str:
    """Fit the law to the runs of one group; in place of a law, why there is none.

    Args:
        runs: Runs of one backbone, adapter place, initialisation, corpus and method.
        setting: What they have in common.
        tokens: Per-token results of the finished ones, to which the recall model is fitted.
        name: What the names of its figures begin with.
        of: Whose law it is, for those who cannot see the figures.
    """
    try:
        fit = fit_law(runs, setting, recall=fit_recall([run_tokens(results) for results in tokens]))
    except InputError as error:
        return str(error)
    recall = [recall_table(fit.recall)] if fit.recall is not None else []
    sentences = [choice_sentence(fit), quality_sentence(fit), held_out_sentence(fit)]
    return LawPart(
        fit=fit,
        equation=fit.equation(),
        sentences=[f"{text[0].upper()}{text[1:]}." for text in sentences if text],
        tables=[parameters_table(fit), forms_table(fit), *recall],
        warnings=list(fit.warnings),
        panels=_panels(fit, runs, name, of),
    )


def _panels(fit: LawFit, runs: list[Observation], name: str, of: str) -> list[Panel]:
    hollow = " Hollow: saturated runs" if any(map(saturated, fit.observations)) else ""
    hollow += ("." if FORMS[fit.form].saturating else ", which the fit leaves out.") if hollow else ""
    ranks, lengths = spans(fit.rank_range), spans(fit.target_tokens_range)
    worst = max(abs(run.loss_reduction - predicted) for run, predicted in fit.used)
    return [
        draw(
            f"{name}-agreement",
            "Measured against predicted",
            f"On the dashed line both are equal.{hollow}",
            f"{of}: predicted against measured loss reduction of {count(fit.best.observations_used, 'run')}: R squared "
            f"{fit.best.r2:.4f}, mean error {fit.best.mape_percent:.1f} %.",
            lambda: agreement_figure(fit, runs),
        ),
        draw(
            f"{name}-by-rank",
            "Loss reduction by rank",
            f"Lines are the law, dotted where no run was used; shade: {BAND}.{hollow}",
            f"{of}: loss reduction against rank {ranks} on logarithmic axes, a line of the law for each length.",
            lambda: reduction_figure(fit, runs, "rank"),
        ),
        draw(
            f"{name}-by-length",
            "Loss reduction by length",
            f"The same against length, a line for each rank; shade: {BAND}.{hollow}",
            f"{of}: loss reduction against {lengths} target tokens on logarithmic axes, a line of the law for each "
            "rank.",
            lambda: reduction_figure(fit, runs, "length"),
        ),
        draw(
            f"{name}-residuals",
            "What the law misses",
            "Shade: one root mean squared error on either side. A trend would mean that the law does not hold.",
            f"{of}: measured minus predicted loss reduction by rank and by length; at most {worst:.3g} nats per token.",
            lambda: residual_figure(fit),
        ),
    ]
