"""The law against what was measured: loss reduction by rank and by length, agreement, residuals, and all in one."""

import math
from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from pml.figures.heat_map import Shade, Values, draw_heat_map, is_grid, over_grid
from pml.figures.style import (
    INK,
    PAPER,
    Looks,
    canvas,
    draw_point,
    hollow_handle,
    legend_below,
    literal,
    logarithmic,
    looks_of,
    new_figure,
    tidy,
)
from pml.law import FORMS, LawFit, Observation, saturated
from pml.law.forms import Array

__all__ = ["agreement_figure", "law_figure", "reduction_figure", "residual_figure"]

REDUCTION = "loss reduction (nats per target token)"


def law_figure(fit: LawFit, runs: Iterable[Observation], token_accuracy: Mapping[str, float] | None = None) -> Figure:
    """What Figure 2 of the paper shows, of these runs: the law above, what it comes to over ranks and lengths below.

    Above, loss reduction in nats per target token against rank and against length, and predicted against measured.
    Below, heat maps of the final loss and of the token accuracy of free decoding, where runs are a grid. Saturated runs
    are hollow; diverged and interrupted ones are not drawn.

    Args:
        fit: The law.
        runs: All runs, those that the fit left out too.
        token_accuracy: Share of target tokens that greedy decoding puts in their place, by the source of a run.
    """
    every = list(runs)
    filled, hollow = _shown(fit, every)
    maps = [(title, shade, found) for title, shade, found in _maps(every, token_accuracy or {}) if is_grid(found)]
    with canvas():
        figure = Figure(figsize=(14, 9.6) if maps else (15, 5.2), dpi=120, layout="constrained", facecolor=PAPER)
        if maps:
            above, below = figure.subfigures(2, 1, squeeze=False)[:, 0]
            by_rank, by_length = above.subplots(1, 2)
            agreement, *cells = below.subplots(1, 1 + len(maps))
        else:
            (by_rank, by_length, agreement), cells = figure.subplots(1, 3), []
        panels: tuple[tuple[Axes, Literal["rank", "length"]], ...] = ((by_rank, "rank"), (by_length, "length"))
        for axes, by in panels:
            tidy(axes)
            looks = looks_of(sorted({_other(run, by) for run in filled + hollow}))
            _draw_reduction(axes, fit, filled, hollow, looks, by)
            handles = _handles(looks, hollow if by == "rank" else [])
            title = "target tokens" if by == "rank" else "LoRA rank"
            axes.legend(
                handles=handles,
                title=title,
                loc="center left",
                bbox_to_anchor=(1.0, 0.5),
                ncols=1 + len(handles) // 18,
                frameon=False,
                fontsize=9.5,
                handlelength=1.5,
            )
        tidy(agreement)
        _draw_agreement(agreement, fit, filled, hollow, _looks(filled + hollow))
        agreement.set_title(f"$R^2$ = {fit.best.r2:.4f}, MAPE = {fit.best.mape_percent:.1f} %", fontsize=12)
        if fit.predicts_ranks:
            by_rank.set_title("law and 95 % band; dotted where no run was used", fontsize=12)
        for axes, (title, shade, found) in zip(cells, maps, strict=True):
            draw_heat_map(axes, found, title, shade)
        figure.suptitle("\n".join(filter(None, (f"${fit.equation().latex}$", _setting(fit)))), fontsize=13)
    return figure


def _maps(runs: list[Observation], token_accuracy: Mapping[str, float]) -> list[tuple[str, Shade, Values]]:
    finished = [run for run in runs if run.finished and math.isfinite(run.final_loss)]
    decoded = [run for run in finished if run.source in token_accuracy]
    return [
        ("final loss (nats per target token)", "loss", over_grid(finished, lambda run: run.final_loss)),
        ("token accuracy, free decoding", "share", over_grid(decoded, lambda run: token_accuracy[run.source])),
    ]


def agreement_figure(fit: LawFit, runs: Iterable[Observation]) -> Figure:
    """Predicted against measured loss reduction in nats per target token; saturated runs hollow."""
    filled, hollow = _shown(fit, runs)
    looks = _looks(filled + hollow)
    with new_figure(4.9) as (figure, axes):
        _draw_agreement(axes, fit, filled, hollow, looks)
        legend_below(figure, _handles(looks, hollow), title="target tokens")
    return figure


def reduction_figure(fit: LawFit, runs: Iterable[Observation], by: Literal["rank", "length"]) -> Figure:
    """Loss reduction in nats per target token against rank or length, both logarithmic, with the fit and its band.

    There is a line for each value of the other one, solid over the runs that the fit used (the saturated ones too
    where the form knows the ceiling) and dotted beyond them. A law that does not know ranks has no lines, and the title
    says so.

    Args:
        fit: The law.
        runs: All runs, those that the fit left out too.
        by: What the horizontal axis is.
    """
    filled, hollow = _shown(fit, runs)
    looks = looks_of(sorted({_other(run, by) for run in filled + hollow}))
    with new_figure(4.4) as (figure, axes):
        _draw_reduction(axes, fit, filled, hollow, looks, by)
        legend_below(figure, _handles(looks, hollow), title="target tokens" if by == "rank" else "LoRA rank")
    return figure


def residual_figure(fit: LawFit) -> Figure:
    """Measured minus predicted loss reduction in nats per target token, by rank and by length.

    The shade is one root mean squared error on either side; a law that holds leaves no trend.
    """
    looks = looks_of(sorted({run.target_tokens for run, _ in fit.used}))
    with new_figure(5.2, rows=2, sharey=True) as (figure, (by_rank, by_length)):
        for axes in (by_rank, by_length):
            axes.axhspan(-fit.best.rmse_nats, fit.best.rmse_nats, color="#EEEEEE", zorder=0)
            axes.axhline(0.0, color=INK, linewidth=1.0, zorder=1)
            axes.set_ylabel("measured - predicted\n(nats per target token)")
        for run, predicted in fit.used:
            look = looks[run.target_tokens]
            draw_point(by_rank, run.rank, run.loss_reduction - predicted, look, size=6.5)
            draw_point(by_length, run.target_tokens, run.loss_reduction - predicted, look, size=6.5)
        logarithmic(by_rank, "x", {run.rank for run, _ in fit.used})
        logarithmic(by_length, "x", {run.target_tokens for run, _ in fit.used})
        by_rank.set_xlabel("LoRA rank")
        by_length.set_xlabel("target tokens")
    return figure


def _shown(fit: LawFit, runs: Iterable[Observation]) -> tuple[list[Observation], list[Observation]]:
    """The runs that the fit used, and the saturated ones."""
    used = {_key(run) for run, _ in fit.used}
    filled, hollow = [], []
    for run in runs:
        if run.finished and 0 < run.loss_reduction < math.inf and saturated(run):
            hollow.append(run)
        elif _key(run) in used:
            filled.append(run)
    return filled, hollow


def _key(run: Observation) -> tuple[str, int, int, int]:
    return run.source, run.rank, run.target_tokens, run.seed


def _looks(runs: Iterable[Observation]) -> Looks:
    return looks_of(sorted({run.target_tokens for run in runs}))


def _handles(looks: Looks, hollow: list[Observation]) -> list[Line2D]:
    """Lines with their markers, and what hollow means where something is."""
    lines = [Line2D([], [], color=c, marker=m, markersize=6, label=f"{value:,}") for value, (c, m) in looks.items()]
    return [*lines, hollow_handle("saturated")] if hollow else lines


def _draw_reduction(
    axes: Axes,
    fit: LawFit,
    filled: list[Observation],
    hollow: list[Observation],
    looks: Looks,
    by: Literal["rank", "length"],
) -> None:
    """Loss reduction against rank or length, with a line of the fit and its band for each value of the other one."""
    runs = filled + hollow
    in_fit = runs if FORMS[fit.form].saturating else filled
    at = sorted({_along(run, by) for run in runs})
    everywhere = np.geomspace(at[0], at[-1], 200)
    for value, (colour, _) in looks.items() if fit.predicts_ranks else ():
        axes.plot(everywhere, fit.predict(*_at(everywhere, value, by)), color=colour, linewidth=1.2, ls=":", zorder=1)
        used = [_along(run, by) for run in in_fit if _other(run, by) == value]
        if used:
            inside = np.geomspace(min(used), max(used), 100)
            axes.plot(inside, fit.predict(*_at(inside, value, by)), color=colour, linewidth=1.8, zorder=2)
            band = np.percentile(fit.predict_draws(*_at(inside, value, by)), (2.5, 97.5), axis=0)
            axes.fill_between(inside, *band, color=colour, alpha=0.15, linewidth=0, zorder=1)
    for group in (hollow, filled):
        for run in group:
            look = looks[_other(run, by)]
            draw_point(axes, _along(run, by), run.loss_reduction, look, is_hollow=group is hollow, size=7)
    logarithmic(axes, "x", at)
    # A line may climb past what any run can reach, the frozen model's loss; the measured runs set the scale.
    _logarithmic_losses(axes, [run.loss_reduction for run in runs])
    axes.set(xlabel="LoRA rank" if by == "rank" else "target tokens", ylabel=REDUCTION)
    if not fit.predicts_ranks:
        axes.set_title("no lines: parameters per rank differ", fontsize=12)


def _along(run: Observation, by: str) -> int:
    return run.rank if by == "rank" else run.target_tokens


def _other(run: Observation, by: str) -> int:
    return run.target_tokens if by == "rank" else run.rank


def _at(along: Array, other: int, by: str) -> tuple[Array, Array]:
    """Ranks and lengths along one of them."""
    others = np.full_like(along, other)
    return (along, others) if by == "rank" else (others, along)


def _logarithmic_losses(axes: Axes, measured: list[float]) -> None:
    """A logarithmic axis over the measured values, with numbers that people read at a glance."""
    axes.set_yscale("log")
    low, high = min(measured), max(measured)
    axes.set_ylim(low / (high / low) ** 0.08, high * (high / low) ** 0.08)
    # Within a decade a logarithmic axis is nearly even: round numbers in even steps are easier to read.
    even = FixedLocator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high))
    axes.yaxis.set_major_locator(even if high / low < 10 else LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _draw_agreement(
    axes: Axes, fit: LawFit, filled: list[Observation], hollow: list[Observation], looks: Looks
) -> None:
    """Predicted against measured."""
    values = [run.loss_reduction for run in (*hollow, *filled)] + [predicted for _, predicted in fit.used]
    span = max(values) - min(values)
    # Without a ceiling, what the law says of saturated runs may be so large that the others would be squeezed.
    beyond_them = hollow and not FORMS[fit.form].saturating
    limits = (min(values) - 0.06 * span, max(values) + (0.3 if beyond_them else 0.06) * span)
    edge, beyond = limits[1] - 0.03 * span, 0
    # Given each run's own initial loss, as for every other error.
    by_run = dict(zip(map(_key, fit.observations), fit.best.predicted, strict=True))
    for run in (*hollow, *filled):
        predicted = by_run.get(_key(run))
        if predicted is None:
            predicted = float(fit.predict(run.rank, run.target_tokens))
        beyond += predicted > edge
        shown = min(predicted, edge)
        draw_point(axes, run.loss_reduction, shown, looks[run.target_tokens], is_hollow=run in hollow)
    axes.plot(limits, limits, color=INK, linewidth=1.2, linestyle="--", zorder=1, label="identity")
    axes.set(xlim=limits, ylim=limits, aspect="equal")
    axes.yaxis.set_major_locator(MaxNLocator(7))
    axes.xaxis.set_major_locator(MaxNLocator(7))
    if beyond:
        note = f"at the upper edge: {beyond} predicted beyond it"
        axes.text(0.02, 0.96, note, transform=axes.transAxes, fontsize=9.5, verticalalignment="top")
    axes.set(xlabel="measured loss reduction (nats)", ylabel="predicted loss reduction (nats)")


def _setting(fit: LawFit) -> str:
    """What the runs have in common and how many warnings the fit has, in one line."""
    setting = fit.setting
    caution = f"{len(fit.warnings)} warning{'s' if len(fit.warnings) > 1 else ''} with the fit" if fit.warnings else ""
    if "backbone" not in setting:
        return ", ".join(filter(None, (literal(", ".join(setting.get("files", []))), caution)))
    block = ", ".join(str(index) for index in setting.get("block", ["any"]))
    placement = setting.get("placement", "any placement")
    placement = placement if isinstance(placement, str) else " ".join(placement)
    parts = (f"{', '.join(setting['corpus'])} in {setting['backbone']}, block {block}, {placement}", setting["method"])
    return ", ".join(filter(None, (*map(literal, parts), caution)))
