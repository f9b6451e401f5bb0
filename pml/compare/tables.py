"""A comparison as tables, made once for the command and for the page."""

from pml.compare.comparison import Comparison
from pml.compare.outcomes import OUTCOMES
from pml.groups import short_method_names
from pml.tables import TextTable

__all__ = ["differences_table", "means_table"]


def means_table(comparison: Comparison) -> TextTable:
    """What the runs of each method came to; what none has measured is left out."""
    methods = comparison.methods
    rows = [("runs", *(f"{method.runs:,}" for method in methods))]
    rows += [("in which everything is certain", *(f"{method.all_certain:,}" for method in methods))]
    rows += [
        (outcome.header, *(outcome.show(method.means[outcome.name]) for method in methods))
        for outcome in OUTCOMES
        if any(method.means[outcome.name] is not None for method in methods)
    ]
    return TextTable(
        "Means over runs" + "".join(f", {name} {value}" for name, value in comparison.where.items()),
        ("outcome", *short_method_names(method.method for method in methods).values()),
        rows,
        note="Certain: p > 0.5, which greedy decoding cannot miss; match, accuracy, failure: argmax under teacher "
        "forcing; loss per target token; steps: of the runs that got there.",
    )


def differences_table(comparison: Comparison) -> TextTable:
    """Each method minus the baseline, with intervals."""
    methods = [means.method for means in comparison.methods]
    short = short_method_names(methods)
    several = len(methods) > 2
    rows = [
        (
            *((short[found.method],) if several else ()),
            found.outcome.header,
            found.outcome.show(found.baseline_mean),
            found.outcome.show(found.method_mean),
            found.outcome.show(found.mean, "+"),
            found.interval_shown,
            f"{found.pairs:,}",
            f"{found.samples:,}",
            found.verdict,
        )
        for found in comparison.differences
    ]
    samples = "texts" if comparison.by_text else "seeds"
    own = "method" if several else short[methods[-1]]
    columns = ("outcome", short.get(comparison.baseline, comparison.baseline), own, "difference")
    level = f"{100 * comparison.confidence:g} % interval"
    columns = (*(("method",) if several else ()), *columns, level, "pairs", samples, "verdict")
    one_text = "" if comparison.by_text else " All are on one text: of other texts the intervals say nothing."
    return TextTable(
        f"Differences from {comparison.baseline}",
        columns,
        rows,
        words=(0, 1, len(columns) - 1) if several else (0, len(columns) - 1),
        note="Pairs: runs of one rank, text and seed whose optimiser steps and target tokens differ by at most "
        f"{100 * comparison.tolerance:g} %; steps are compared whatever the budget, where both got there. Pairs of one "
        f"{samples[:-1]} are averaged first. Intervals: Student's t over {samples}, not adjusted for their number."
        f"{one_text}",
    )
