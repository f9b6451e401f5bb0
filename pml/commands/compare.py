"""Compare methods over pairs of runs of the same cell and seed, with intervals and effect sizes.

Pairs have the same backbone, adapter place, rank, corpus and seed. Losses and shares are compared at the same budget:
pairs whose optimiser steps or target tokens trained on differ by more than the tolerance are not. Steps to recall are
compared whatever the budget, over the pairs in which both recalled. What is left out is listed.
"""

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import jsonargparse
from rich import box
from rich.console import Console
from rich.table import Table

from pml.commands._console import make_console
from pml.commands._runs import add_runs, add_where, chosen_records
from pml.groups import short_method_names

if TYPE_CHECKING:
    from pml.compare import Comparison, Difference, Interval

__all__ = ["configure", "run"]

UNITS = {"nats per token": "nats", "percentage points": "%"}


def configure(parser: jsonargparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_runs(parser)
    parser.add_argument(
        "--baseline", type=str | None, help="method that the others are compared with; SFT where there is one"
    )
    parser.add_argument("--by", type=str | None, help="a comparison for each value of this field, such as rank")
    parser.add_argument(
        "--tolerance", type=float, default=0.05, help="largest difference of budgets, as a share of the larger"
    )
    parser.add_argument("--confidence", type=float, default=0.95, help="level of the intervals")
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap")
    add_where(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object per comparison, and nothing else")


def run(args: jsonargparse.Namespace) -> int:
    """Compare and print.

    Raises:
        InputError: If there are no two methods, or no pair of runs of equal budgets and none that recall can be
            compared of.
    """
    # Imported here because it takes seconds, which --help need not wait for.
    from pml.compare import compare

    comparisons = compare(
        chosen_records(args),
        baseline=args.baseline,
        by=args.by,
        tolerance=args.tolerance,
        confidence=args.confidence,
        seed=args.seed,
    )
    if args.json:
        content = [comparison.to_json() for comparison in comparisons]
        print(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False))
        return 0
    console = make_console(highlight=False, markup=False)
    for i, comparison in enumerate(comparisons):
        if i:
            console.print()
        _print(console, comparison)
    return 0


def _print(console: Console, comparison: "Comparison") -> None:
    def say(line: str) -> None:
        console.print(line, soft_wrap=True)

    where = "".join(f", {name} {value}" for name, value in comparison.where.items())
    say(f"{comparison.second} against {comparison.first}{where}")
    if comparison.pairs:
        say(f"{_evidence(len(comparison.pairs), comparison.texts)}: {_budget(comparison)}")
    recalled = comparison.recalled
    if comparison.differences:
        # One legend is enough for both tables, below the last.
        console.print(_table(comparison, comparison.differences, legend=recalled.steps is None))
    if budgets := comparison.budgets_in_words():
        say(budgets)
    if recalled.steps is not None:
        evidence = _evidence(recalled.steps.pairs, recalled.steps.texts)
        say(f"steps to recall, whatever the budget, where both recalled: {evidence}")
        console.print(_table(comparison, [recalled.steps]))
    say(comparison.recall_in_words())
    for name, (first, second) in comparison.settings.items():
        say(f"warning: {name} differs too: {_values(first)} and {_values(second)}")
    for reason, count in Counter(left.reason for left in comparison.left_out).items():
        example = next(left for left in comparison.left_out if left.reason == reason)
        more = f", and {count - 1} more" if count > 1 else ""
        say(f"left out: {reason} ({', '.join(example.runs)}{more})")


def _table(comparison: "Comparison", differences: "list[Difference]", *, legend: bool = True) -> Table:
    level = f"{100 * comparison.confidence:g} %"
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        caption=(
            "Means over combinations of text and seed, of the mean over the pairs on each; change: "
            f"{comparison.second} minus {comparison.first}. t, bootstrap: {level} intervals of the mean change by "
            "Student's t and by the BCa bootstrap over combinations, not adjusted for their number. d: paired Cohen's "
            "d (mean / standard deviation of the changes). won: share of pairs better minus share worse, -1 to 1 "
            "(Cliff's delta within pairs)."
        )
        if legend
        else None,
        caption_justify="left",
    )
    table.add_column("", no_wrap=True)
    short = short_method_names((comparison.first, comparison.second))
    for name in (*short.values(), "change", "t", "bootstrap", "d", "won", "pairs"):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("verdict", no_wrap=True)
    for found in differences:
        table.add_row(
            found.title if found.unit == "steps" else f"{found.title} ({UNITS[found.unit]})",
            _number(found.first_mean, found),
            _number(found.second_mean, found),
            _signed(found.mean, found),
            _interval(found.t_interval, found),
            _interval(found.bootstrap_interval, found),
            "-" if found.cohens_d is None else f"{found.cohens_d:+.2f}",
            f"{found.dominance:+.2f}",
            str(found.pairs),
            found.verdict,
        )
    return table


def _budget(comparison: "Comparison") -> str:
    """Steps, target tokens and seconds of both methods, from the smallest to the largest."""
    parts = []
    for name, unit in (("optimizer_steps", "steps"), ("target_tokens_trained", "target tokens"), ("wall_seconds", "s")):
        columns = zip(*(getattr(pair, name) for pair in comparison.pairs), strict=True)
        shown = [
            f"{min(column):,.0f}" + (f" to {max(column):,.0f}" if max(column) > min(column) else "")
            for column in columns
        ]
        parts.append(f"{shown[0]} {unit}" if shown[0] == shown[1] else f"{shown[0]} and {shown[1]} {unit}")
    return ", ".join(parts)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _evidence(pairs: int, texts: int) -> str:
    return f"{_count(pairs, 'pair')} on {_count(texts, 'combination')} of text and seed"


def _values(values: list[Any]) -> str:
    return ", ".join(map(str, values))


def _digits(found: "Difference") -> int:
    return {"nats per token": 3, "percentage points": 1, "steps": 1}[found.unit]


def _number(value: float, found: "Difference") -> str:
    return f"{value:.{_digits(found)}f}"


def _signed(value: float, found: "Difference") -> str:
    return f"{value:+.{_digits(found)}f}"


def _interval(interval: "Interval | None", found: "Difference") -> str:
    return "-" if interval is None else f"{_signed(interval.low, found)}, {_signed(interval.high, found)}"
