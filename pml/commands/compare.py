"""Compare methods over pairs of runs: certain and right targets, loss and steps, with intervals.

A pair is two runs with the same backbone, adapter placement, rank, corpus and seed, and the same budget: their
optimiser steps and target tokens trained on differ by at most the tolerance. Steps until everything is certain are
compared whatever the budget. Runs that are left out are listed with the reason.
"""

from collections import Counter
from typing import TYPE_CHECKING

import jsonargparse
from rich.console import Console

from pml.commands._console import make_console
from pml.commands._runs import add_runs, add_where, chosen_records
from pml.escape import say_json

if TYPE_CHECKING:
    from pml.compare import Comparison

__all__ = ["configure", "run"]


def configure(parser: jsonargparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_runs(parser)
    parser.add_argument(
        "--baseline", type=str | None, help="method to compare the others with; default: SFT if there is one"
    )
    parser.add_argument("--by", type=str | None, help="make one comparison per value of this field, such as rank")
    parser.add_argument(
        "--tolerance", type=float, default=0.05, help="largest difference between two budgets, as a share of the larger"
    )
    parser.add_argument("--confidence", type=float, default=0.95, help="confidence level of the intervals")
    add_where(parser)
    parser.add_argument(
        "--json", action="store_true", help="print a JSON array with one object per comparison, and nothing else"
    )


def run(args: jsonargparse.Namespace) -> int:
    """Compare and print; 0.

    Raises:
        InputError: If the runs have fewer than two methods, or no pair can be compared.
    """
    # Imported here so that --help does not wait seconds for it.
    from pml.compare import compare

    comparisons = compare(
        chosen_records(args),
        baseline=args.baseline,
        by=args.by,
        tolerance=args.tolerance,
        confidence=args.confidence,
    )
    if args.json:
        say_json([comparison.to_json() for comparison in comparisons])
        return 0
    console = make_console()
    for comparison in comparisons:
        _print(console, comparison)
    return 0


def _print(console: Console, comparison: "Comparison") -> None:
    from pml.compare import differences_tables, means_table
    from pml.tables import PAPER_WIDTH, rich_table

    width = min(console.width, PAPER_WIDTH)
    for table in (means_table(comparison), *differences_tables(comparison)):
        console.print(rich_table(table), width=width)
        console.print()
    lines = list(comparison.verdicts)
    lines += [f"warning: {name} differs too: {', '.join(values)}" for name, values in comparison.settings.items()]
    for reason, count in Counter(left.reason for left in comparison.left_out).items():
        example = next(left for left in comparison.left_out if left.reason == reason)
        more = f", and {count - 1} more" if count > 1 else ""
        lines.append(f"left out: {reason} ({', '.join(example.runs)}{more})")
    for line in lines:
        console.print(line, soft_wrap=True)
