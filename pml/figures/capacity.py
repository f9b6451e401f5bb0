"""Bits that adapters store: against what they are given, against their parameters, and against what is known."""

from collections.abc import Iterable

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pml.figures.style import (
    INK,
    Looks,
    NothingToShow,
    draw_point,
    hollow_handle,
    legend_below,
    looks_of,
    new_figure,
    plain_log,
)
from pml.law import Observation, saturated

__all__ = ["CAPACITIES", "capacity_figure", "stored_bits_figure"]

CAPACITIES = (
    (3.6, "3.6, trained from scratch (Morris et al.)"),
    (2.0, "2, knowledge (Allen-Zhu & Li)"),
)
"""Bits per parameter that other work found, and where."""


def capacity_figure(runs: Iterable[Observation]) -> Figure:
    """Bits stored per adapter parameter against bits of corpus per parameter, both logarithmic.

    On the diagonal everything is stored; what an adapter can hold is the height at which points leave it.

    Args:
        runs: Observations of one method; those that were not finished are not drawn.

    Raises:
        NothingToShow: If no run has a corpus of known entropy, or none stored anything.
    """
    shown = _with_bits(runs)
    looks = _looks(shown)
    with new_figure(4.6) as (figure, axes):
        offered = [(run.entropy_bits or 0.0) / _parameters(run) for run in shown]
        stored = [_bits(run) / _parameters(run) for run in shown]
        left, right = min(offered) / 1.4, max(offered) * 1.4
        axes.plot([left, right], [left, right], color=INK, linewidth=1.0, linestyle="--", zorder=1)
        for (capacity, name), dashes in zip(CAPACITIES, ("-.", ":"), strict=True):
            axes.axhline(capacity, color=INK, linewidth=1.1, linestyle=dashes, zorder=1)
            at = (0.0, capacity)
            axes.annotate(name, at, (4, 2), ("axes fraction", "data"), "offset points", va="bottom", fontsize=9.5)
        for run, x, y in zip(shown, offered, stored, strict=True):
            draw_point(axes, x, y, looks[run.target_tokens], is_hollow=saturated(run), size=7)
        plain_log(axes, "x")
        plain_log(axes, "y")
        axes.set_xlim(left, right)
        axes.set_ylim(min(stored) / 1.4, 6.0)
        axes.set(xlabel="corpus bits per adapter parameter", ylabel="stored bits per adapter parameter")
        _legend(figure, looks, shown)
    return figure


def stored_bits_figure(runs: Iterable[Observation], bits_per_parameter: float | None = None) -> Figure:
    """Stored bits against adapter parameters, both logarithmic; dotted: all the bits of each length.

    Args:
        runs: Observations of one method; those that were not finished are not drawn.
        bits_per_parameter: That of the law with this one constant, drawn as a line where given.

    Raises:
        NothingToShow: If no run has a corpus of known entropy, or none stored anything.
    """
    shown = _with_bits(runs)
    looks = _looks(shown)
    parameters = sorted({_parameters(run) for run in shown})
    left, right = parameters[0] / 1.25, parameters[-1] * 1.25
    with new_figure(4.6) as (figure, axes):
        for length, (colour, _) in looks.items():
            ceiling = max(run.entropy_bits or 0.0 for run in shown if run.target_tokens == length)
            axes.axhline(ceiling, color=colour, linewidth=1.2, linestyle=":", zorder=1)
        if bits_per_parameter is not None:
            axes.plot(
                [left, right],
                [bits_per_parameter * left, bits_per_parameter * right],
                color=INK,
                linewidth=1.6,
                zorder=2,
            )
        for run in shown:
            look = looks[run.target_tokens]
            draw_point(axes, _parameters(run), _bits(run), look, is_hollow=saturated(run), size=7)
        plain_log(axes, "x")
        plain_log(axes, "y")
        axes.set_xlim(left, right)
        axes.set(xlabel="adapter parameters", ylabel="stored bits")
        lines = []
        if bits_per_parameter is not None:
            lines.append(Line2D([], [], color=INK, label=f"{bits_per_parameter:.3g} bits per parameter"))
        _legend(figure, looks, shown, lines)
    return figure


def _with_bits(runs: Iterable[Observation]) -> list[Observation]:
    """The runs that stored something of a corpus of known entropy; logarithmic axes have no place for the others."""
    finished = [run for run in runs if run.finished]
    if not finished:
        raise NothingToShow("no run was finished")
    known = [run for run in finished if run.entropy_bits is not None and run.effective_parameters is not None]
    if not known:
        raise NothingToShow("the corpus has no known entropy; random tokens and made-up phone books have one")
    shown = [run for run in known if _bits(run) > 0]
    if not shown:
        raise NothingToShow("no run stored anything: every final loss is above that of guessing uniformly")
    return shown


def _bits(run: Observation) -> float:
    return run.stored_bits or 0.0


def _parameters(run: Observation) -> int:
    return run.effective_parameters or 1


def _looks(runs: Iterable[Observation]) -> Looks:
    return looks_of(sorted({run.target_tokens for run in runs}))


def _legend(figure: Figure, looks: Looks, runs: Iterable[Observation], others: Iterable[Line2D] = ()) -> None:
    lines = [
        Line2D([], [], color=colour, marker=marker, markersize=6, linestyle="none", label=f"{length:,}")
        for length, (colour, marker) in looks.items()
    ]
    if any(map(saturated, runs)):
        lines.append(hollow_handle("saturated"))
    legend_below(figure, [*lines, *others], title="target tokens")
