"""What a page says about one law: its equation with intervals, how well it fits, and its figures."""

from collections.abc import Mapping
from pathlib import Path

from markupsafe import Markup

from pml.figures import agreement_figure, heat_map_figure, over_grid, reduction_figure, residual_figure
from pml.law import FORMS, Equation, LawFit, Observation, fit_law, saturated, shared_setting
from pml.law.tables import (
    forms_table,
    parameters_table,
    recall_table,
    sentences,
    symbols_sentence,
)
from pml.recall_model import recall_of
from pml.records import Record
from pml.report.parts import Panel, Section, count, draw, spans

__all__ = ["law_part"]

MEASURES = (
    "R²: share of the variance of the loss reduction that the law explains; mean error: in percent of the measured "
    "value; RMSE: root of the mean squared error; AICc: the information criterion, smaller is better."
)


def law_part(
    records: Mapping[Path, Record], runs: list[Observation], title: str, name: str, of: str
) -> tuple[LawFit, Section]:
    """Fit the law to the runs of one group.

    Args:
        records: Records by folder: one backbone, adapter place, initialisation, corpus and method.
        runs: What they measured.
        title: Heading of the section.
        name: What the names of its figures begin with.
        of: Whose law it is, for those who cannot see the figures.

    Raises:
        InputError: If the runs do not determine a law.
    """
    recall, damaged = recall_of(path for path, record in records.items() if record.status == "finished")
    fit = fit_law(runs, shared_setting(records), recall=recall)
    accuracy = {path.as_posix(): record.generated_token_accuracy for path, record in records.items()}
    decoded = {source: share for source, share in accuracy.items() if share is not None}
    # An equation too, so that its letters are set like those above it.
    symbols = Markup(Equation(symbols_sentence(fit).replace("^(-1/p)", "^-1/p"))) + "."
    return fit, Section(
        title,
        equation=fit.equation(),
        sentences=[symbols, *(f"{text[0].upper()}{text[1:]}." for text in sentences(fit)), MEASURES],
        warnings=[*fit.warnings, *damaged],
        panels=_panels(fit, runs, decoded, name, of),
        tables=[parameters_table(fit), forms_table(fit), *([recall_table(fit.recall)] if fit.recall else [])],
    )


def _panels(
    fit: LawFit, runs: list[Observation], token_accuracy: Mapping[str, float], name: str, of: str
) -> list[Panel]:
    hollow = " Hollow: saturated runs" if any(map(saturated, fit.observations)) else ""
    hollow += ("." if FORMS[fit.form].saturating else ", which the fit leaves out.") if hollow else ""
    band = "95 % interval of the law's mean"
    ranks, lengths = spans(fit.rank_range), spans(fit.target_tokens_range)
    worst = max(abs(run.loss_reduction - predicted) for run, predicted in fit.used)
    finished = [run for run in runs if run.finished]
    decoded = [run for run in finished if run.source in token_accuracy]
    return [
        *draw(
            f"{name}-by-rank",
            "Loss reduction by rank",
            f"Lines are the law, dotted where no run was used; shade: {band}.{hollow}",
            f"{of}: loss reduction against rank {ranks} on logarithmic axes, a line of the law for each length.",
            lambda: reduction_figure(fit, runs, "rank"),
        ),
        *draw(
            f"{name}-by-length",
            "Loss reduction by length",
            f"The same against length, a line for each rank; shade: {band}.{hollow}",
            f"{of}: loss reduction against {lengths} target tokens on logarithmic axes, a line of the law for each "
            "rank.",
            lambda: reduction_figure(fit, runs, "length"),
        ),
        *draw(
            f"{name}-agreement",
            "Predicted against measured",
            f"On the dashed line both are equal.{hollow}",
            f"{of}: predicted against measured loss reduction of {count(fit.best.observations_used, 'run')}: R squared "
            f"{fit.best.r2:.4f}, mean error {fit.best.mape_percent:.1f} %.",
            lambda: agreement_figure(fit, runs),
        ),
        *draw(
            f"{name}-residuals",
            "Residuals",
            "Shade: one root mean squared error on either side. A trend would mean that the law does not hold.",
            f"{of}: measured minus predicted loss reduction by rank and by length; at most {worst:.3g} nats per token.",
            lambda: residual_figure(fit),
        ),
        *draw(
            f"{name}-final-loss",
            "Final loss over the grid",
            "Mean loss of the target tokens with the adapter, in nats; grey: no run.",
            f"{of}: map of the final loss over ranks {ranks} and {lengths} target tokens.",
            lambda: heat_map_figure(over_grid(finished, lambda run: run.final_loss), "nats per target token", "loss"),
        ),
        *draw(
            f"{name}-free-decoding",
            "Token accuracy of free decoding",
            "Percentage of target tokens that greedy decoding, left to itself, puts in their place.",
            f"{of}: map of the token accuracy of greedy decoding over ranks {ranks} and {lengths} target tokens.",
            lambda: heat_map_figure(
                over_grid(decoded, lambda run: token_accuracy[run.source]), "percent of target tokens", "share"
            ),
        ),
    ]
