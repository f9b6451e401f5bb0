"""The section of a page about one law: its equation with intervals, how well it fits, and its figures."""

from collections.abc import Mapping
from pathlib import Path

from markupsafe import Markup

from pml.figures import agreement_figure, map_figures, reduction_figure, residual_figure
from pml.law import FORMS, Equation, LawFit, law_of_records, saturated
from pml.law.tables import (
    forms_table,
    parameters_table,
    recall_table,
    sentences,
    symbols_sentence,
)
from pml.records import Record
from pml.report.parts import Panel, Section, draw, spans
from pml.tables import count

__all__ = ["law_part"]

MEASURES = (
    "R²: share of the variance of the loss reduction that the law explains; mean error: in percent of the measured "
    "value; RMSE: root mean squared error; AICc: the information criterion, smaller is better."
)


def law_part(records: Mapping[Path, Record], title: str, name: str, of: str) -> tuple[LawFit, Section]:
    """Fit the law to the runs of one group and make its section.

    Args:
        records: Records by run folder, which share backbone, adapter placement, initialisation and method.
        title: Heading of the section.
        name: Prefix of the figures' names.
        of: Whose law it is, for the figures' alternative texts.

    Raises:
        InputError: If the runs do not determine a law.
    """
    fit = law_of_records(records)
    # Set as an equation too, so that its letters look like those above.
    symbols = Markup(Equation(symbols_sentence(fit).replace("^(-1/p)", "^-1/p"))) + "."
    return fit, Section(
        title,
        equation=fit.equation(),
        sentences=[symbols, *(f"{text[0].upper()}{text[1:]}." for text in sentences(fit)), MEASURES],
        warnings=fit.warnings,
        panels=_panels(fit, name, of),
        tables=[parameters_table(fit), forms_table(fit), *([recall_table(fit.recall)] if fit.recall else [])],
    )


def _panels(fit: LawFit, name: str, of: str) -> list[Panel]:
    hollow = " Hollow: saturated runs" if any(map(saturated, fit.observations)) else ""
    hollow += ("." if FORMS[fit.form].saturating else ", which the fit leaves out.") if hollow else ""
    band = "95 % interval of the law's mean"
    ranks, lengths = spans(fit.rank_range), spans(fit.target_tokens_range)
    worst = max(abs(run.loss_reduction - predicted) for run, predicted in fit.used)
    return [
        *draw(
            f"{name}-by-rank",
            "Loss reduction by rank",
            f"Lines are the law, dotted where no run was used; shade: {band}.{hollow}",
            f"{of}: loss reduction against rank {ranks} on logarithmic axes, a line of the law for each length.",
            reduction_figure(fit, "rank"),
        ),
        *draw(
            f"{name}-by-length",
            "Loss reduction by length",
            f"The same against length, a line for each rank; shade: {band}.{hollow}",
            f"{of}: loss reduction against {lengths} target tokens on logarithmic axes, a line of the law for each "
            "rank.",
            reduction_figure(fit, "length"),
        ),
        *draw(
            f"{name}-agreement",
            "Predicted against measured",
            f"On the dashed line both are equal.{hollow}",
            f"{of}: predicted against measured loss reduction of {count(fit.best.observations_used, 'run')}: R squared "
            f"{fit.best.r2:.4f}, mean error {fit.best.mape_percent:.1f} %.",
            agreement_figure(fit),
        ),
        *draw(
            f"{name}-residuals",
            "Residuals",
            "Shade: one root mean squared error on either side. A trend would mean that the law does not hold.",
            f"{of}: measured minus predicted loss reduction by rank and by length; at most {worst:.3g} nats per token.",
            residual_figure(fit),
        ),
        *(
            panel
            for number, (title, figure) in enumerate(map_figures(fit).items(), start=1)
            for panel in draw(
                f"{name}-map-{number}",
                f"{title[0].upper()}{title[1:]}",
                "Mean over the runs of one size; grey: no run.",
                f"{of}: map of the {title} over ranks {ranks} and {lengths} target tokens.",
                figure,
            )
        ),
    ]
