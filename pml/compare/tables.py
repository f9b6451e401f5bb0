"""A comparison as tables, shared by the command and the report page."""

from pml.compare.comparison import Comparison
from pml.compare.outcomes import OUTCOMES
from pml.groups import short_method_names
from pml.tables import TextTable

__all__ = ["differences_tables", "means_table"]


def means_table(comparison: Comparison) -> TextTable:
    """Mean outcomes of each method; outcomes that no run has are left out."""
    methods = comparison.methods
    rows = [("runs", *(f"{method.runs:,}" for method in methods))]
    rows += [("in which everything is certain", *(f"{method.all_certain:,}" for method in methods))]
    rows += [
        (
            outcome.header + comparison.threshold(outcome),
            *(outcome.show(method.means[outcome.name]) for method in methods),
        )
        for outcome in OUTCOMES
        if any(method.means[outcome.name] is not None for method in methods)
    ]
    return TextTable(
        "Means over runs" + "".join(f", {name} {value}" for name, value in comparison.where.items()),
        ("outcome", *short_method_names(method.method for method in methods).values()),
        rows,
        note="Certain: p > 0.5, so greedy decoding cannot miss it; match, accuracy, failure: argmax under teacher "
        "forcing; loss: per target token; steps: over runs that got there.",
    )


def differences_tables(comparison: Comparison) -> list[TextTable]:
    """Each method minus the baseline, with intervals: one table per method, the last with a note on reading them."""
    short = short_method_names(means.method for means in comparison.methods)
    baseline = short.get(comparison.baseline, comparison.baseline)
    samples = "texts" if comparison.by_text else "seeds"
    methods = list(dict.fromkeys(found.method for found in comparison.differences))
    one_text = (
        ""
        if comparison.by_text
        else " All runs are on one text, or on texts from one seed or source: the intervals say nothing about others."
    )
    nested = ", as are those of texts from one seed or source" if comparison.by_text else ""
    note = (
        "Pairs: runs of one rank, text and seed whose optimiser steps and target tokens differ by at most "
        f"{100 * comparison.tolerance:g} %; steps are compared whatever the budget, if both got there. Pairs of one "
        f"{samples[:-1]} are averaged first{nested}. Intervals: Student's t over {samples}, not adjusted for multiple "
        f"comparisons.{one_text}"
    )
    return [
        TextTable(
            f"{method} against {comparison.baseline}",
            (
                "outcome",
                baseline,
                "method",
                "difference",
                f"{100 * comparison.confidence:g} % interval",
                "pairs",
                samples,
                "verdict",
            ),
            [
                (
                    found.outcome.header + comparison.threshold(found.outcome),
                    found.outcome.show(found.baseline_mean),
                    found.outcome.show(found.method_mean),
                    found.outcome.show(found.mean, "+"),
                    found.interval_shown,
                    f"{found.pairs:,}",
                    f"{found.samples:,}" + ("" if found.by_text == comparison.by_text else " seeds"),
                    found.verdict,
                )
                for found in comparison.differences
                if found.method == method
            ],
            words=(0, 7),
            note=note if method == methods[-1] else "",
        )
        for method in methods
    ]
