"""Figures of a law against its runs: loss reduction by rank and by length, agreement, residuals, and all in one."""

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
    Styles,
    canvas,
    legend_below,
    literal,
    logarithmic,
    new_figure,
    point,
    styles_of,
)
from pml.law import LawFit, saturated

__all__ = ["agreement_figure", "law_figure", "map_figures", "reduction_figure", "residual_figure"]

By = Literal["rank", "length"]
AXES: dict[By, tuple[str, str]] = {"rank": ("rank", "target_tokens"), "length": ("target_tokens", "rank")}
"""The field of a run on the horizontal axis, and the field that is constant along each line."""
NAMES = {"rank": "LoRA rank", "target_tokens": "target tokens"}


def law_figure(fit: LawFit) -> Figure:
    """The law with its runs in one figure, like Figure 2 of the paper.

    Above: loss reduction in nats per target token against rank and against length. Below: predicted against measured,
    and heat maps of the final loss and of the token accuracy of greedy decoding. Without a grid of runs there are no
    maps, and all panels share one row. Saturated runs are hollow.
    """
    maps = _maps(fit)
    with canvas():
        figure = Figure(figsize=(14, 9.6) if maps else (15, 5.2), dpi=120, layout="constrained", facecolor=PAPER)
        if maps:
            above, below = figure.subfigures(2, 1, squeeze=False)[:, 0]
            by_rank, by_length = above.subplots(1, 2)
            agreement, *cells = below.subplots(1, 1 + len(maps))
        else:
            (by_rank, by_length, agreement), cells = figure.subplots(1, 3), []
        panels: tuple[tuple[Axes, By], ...] = ((by_rank, "rank"), (by_length, "length"))
        for axes, by in panels:
            handles = _draw_reduction(axes, fit, by)
            axes.legend(
                handles=handles,
                title=NAMES[AXES[by][1]],
                loc="center left",
                bbox_to_anchor=(1.0, 0.5),
                ncols=1 + len(handles) // 18,
                frameon=False,
                fontsize=9.5,
                handlelength=1.5,
            )
        _draw_agreement(agreement, fit)
        agreement.set_title(_errors(fit), fontsize=12)
        if fit.predicts_ranks:
            by_rank.set_title("law and 95 % band; dotted where no run was used", fontsize=12)
        for axes, (title, shade, found) in zip(cells, maps, strict=True):
            draw_heat_map(axes, found, title, shade)
        figure.suptitle("\n".join(filter(None, (f"${fit.equation().latex}$", _setting(fit)))), fontsize=13)
    return figure


def _maps(fit: LawFit) -> list[tuple[str, Shade, Values]]:
    """Titles, shades and values of the heat maps whose runs form a grid."""
    runs = fit.observations
    maps: list[tuple[str, Shade, Values]] = [
        ("final loss (nats per target token)", "loss", over_grid(runs, lambda run: run.final_loss)),
        ("token accuracy, greedy decoding", "share", over_grid(runs, lambda run: run.generated_token_accuracy)),
    ]
    return [found for found in maps if is_grid(found[2])]


def map_figures(fit: LawFit) -> dict[str, Figure]:
    """The heat maps of `law_figure` by title, each one page column wide."""
    figures = {}
    for title, shade, values in _maps(fit):
        with new_figure(4.4) as (figure, axes):
            draw_heat_map(axes, values, title, shade)
        figures[title] = figure
    return figures


def agreement_figure(fit: LawFit) -> Figure:
    """Predicted against measured loss reduction in nats per target token; saturated runs are hollow."""
    with new_figure(4.9) as (figure, axes):
        legend_below(figure, _draw_agreement(axes, fit), title=NAMES["target_tokens"])
    return figure


def reduction_figure(fit: LawFit, by: By) -> Figure:
    """Loss reduction in nats per target token against rank or length, on logarithmic axes, with the law and its band.

    There is one line per value of the other variable: solid over the range of the runs that the fit used, dotted
    beyond it. Forms with a ceiling use saturated runs too. If the law cannot predict from a rank, there are no lines
    and the title says so.
    """
    with new_figure(4.4) as (figure, axes):
        legend_below(figure, _draw_reduction(axes, fit, by), title=NAMES[AXES[by][1]])
    return figure


def residual_figure(fit: LawFit) -> Figure:
    """Measured minus predicted loss reduction in nats per target token, by rank and by length.

    The shaded band is one root mean squared error on either side; a law that holds leaves no trend.
    """
    looks = styles_of(sorted({run.target_tokens for run, _ in fit.used}))
    with new_figure(5.2, rows=2, sharey=True) as (figure, panels):
        for axes, field in zip(panels, NAMES, strict=True):
            axes.axhspan(-fit.best.rmse_nats, fit.best.rmse_nats, color="#EEEEEE", zorder=0)
            axes.axhline(0.0, color=INK, linewidth=1.0, zorder=1)
            for run, predicted in fit.used:
                style = point(looks[run.target_tokens], size=6.5)
                axes.plot(getattr(run, field), run.loss_reduction - predicted, **style)
            logarithmic(axes, {getattr(run, field) for run, _ in fit.used})
            axes.set(xlabel=NAMES[field], ylabel="measured - predicted\n(nats per target token)")
    return figure


def _draw_reduction(axes: Axes, fit: LawFit, by: By) -> list[Line2D]:
    """Draw `reduction_figure` and return the legend handles."""
    along, other = AXES[by]
    runs = fit.observations
    looks = styles_of(sorted({getattr(run, other) for run in runs}))
    at = sorted({getattr(run, along) for run in runs})
    everywhere = np.geomspace(at[0], at[-1], 200)
    for value, (colour, _) in looks.items() if fit.predicts_ranks else ():
        predicted = fit.predict(**{along: everywhere, other: value})
        axes.plot(everywhere, predicted, color=colour, linewidth=1.2, ls=":", zorder=1)
        used = [getattr(run, along) for run, _ in fit.used if getattr(run, other) == value]
        if used:
            inside = np.geomspace(min(used), max(used), 100)
            points = {along: inside, other: value}
            axes.plot(inside, fit.predict(**points), color=colour, linewidth=1.8, zorder=2)
            band = np.percentile(fit.predict_draws(**points), (2.5, 97.5), axis=0)
            axes.fill_between(inside, *band, color=colour, alpha=0.15, linewidth=0, zorder=1)
    for run in runs:
        style = point(looks[getattr(run, other)], is_hollow=saturated(run), size=7)
        axes.plot(getattr(run, along), run.loss_reduction, **style)
    logarithmic(axes, at)
    # A line may exceed what any run can reach, the frozen model's loss, so the measured runs set the scale.
    _logarithmic_losses(axes, [run.loss_reduction for run in runs])
    axes.set(xlabel=NAMES[along], ylabel="loss reduction (nats per target token)")
    if not fit.predicts_ranks:
        axes.set_title("no lines: parameters per rank differ", fontsize=12)
    return _handles(fit, looks)


def _handles(fit: LawFit, looks: Styles) -> list[Line2D]:
    """Legend handles: one per value, and one for hollow markers if any run is saturated."""
    lines = [Line2D([], [], color=c, marker=m, markersize=6, label=f"{value:,}") for value, (c, m) in looks.items()]
    hollow = Line2D([], [], **point((INK, "o"), is_hollow=True, size=7))
    return [*lines, hollow] if any(map(saturated, fit.observations)) else lines


def _logarithmic_losses(axes: Axes, measured: list[float]) -> None:
    """Make the vertical axis logarithmic over the measured values, with round numbers as ticks."""
    axes.set_yscale("log")
    low, high = min(measured), max(measured)
    axes.set_ylim(low / (high / low) ** 0.08, high * (high / low) ** 0.08)
    # Within one decade a logarithmic axis is nearly linear, and round numbers in even steps are easier to read.
    even = FixedLocator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high))
    axes.yaxis.set_major_locator(even if high / low < 10 else LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _draw_agreement(axes: Axes, fit: LawFit) -> list[Line2D]:
    """Draw predicted (given each run's own initial loss) against measured, and return the legend handles."""
    looks = styles_of(sorted({run.target_tokens for run in fit.observations}))
    values = [run.loss_reduction for run in fit.observations] + [predicted for _, predicted in fit.used]
    span = max(values) - min(values)
    # Without a ceiling, predictions for saturated runs may be so large that they would squeeze the other points.
    beyond_them = len(fit.used) < len(fit.observations)
    limits = (min(values) - 0.06 * span, max(values) + (0.3 if beyond_them else 0.06) * span)
    edge = limits[1] - 0.03 * span
    for run, predicted in zip(fit.observations, fit.best.predicted, strict=True):
        style = point(looks[run.target_tokens], is_hollow=saturated(run))
        axes.plot(run.loss_reduction, min(predicted, edge), **style)
    axes.plot(limits, limits, color=INK, linewidth=1.2, linestyle="--", zorder=1, label="identity")
    axes.set(xlim=limits, ylim=limits, aspect="equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(7))
    if beyond := sum(predicted > edge for predicted in fit.best.predicted):
        note = f"at the upper edge: {beyond} predicted beyond it"
        axes.text(0.02, 0.96, note, transform=axes.transAxes, fontsize=9.5, verticalalignment="top")
    axes.set(xlabel="measured loss reduction (nats)", ylabel="predicted loss reduction (nats)")
    return _handles(fit, looks)


def _errors(fit: LawFit) -> str:
    """R2 and mean error over the runs fitted, and over the unsaturated ones on a line of their own if both differ."""
    best, alone = fit.best, fit.unsaturated_fit
    lines = [f"$R^2$ = {best.r2:.4f}, MAPE = {best.mape_percent:.1f} %"]
    if alone.runs < best.observations_used:
        lines.append(f"unsaturated runs: $R^2$ = {alone.r2:.4f}, MAPE = {alone.mape_percent:.1f} %")
    return "\n".join(lines)


def _setting(fit: LawFit) -> str:
    """What the runs have in common and the number of warnings, in one line."""
    setting = fit.setting
    caution = f"{len(fit.warnings)} warning{'s' if len(fit.warnings) > 1 else ''} with the fit" if fit.warnings else ""
    if "backbone" not in setting:
        return ", ".join(filter(None, (literal(", ".join(setting.get("files", []))), caution)))
    block = ", ".join(str(index) for index in setting.get("block", ["any"]))
    placement = setting.get("placement", "any placement")
    placement = placement if isinstance(placement, str) else " ".join(placement)
    parts = (f"{', '.join(setting['corpus'])} in {setting['backbone']}, block {block}, {placement}", setting["method"])
    return ", ".join(filter(None, (*map(literal, parts), caution)))
