"""Fit the Parametric Memory Law dL = C r^alpha l^(-beta) + b to finished runs; loss in nats per target token.

Every form that the runs determine is fitted with lmfit: the paper's, those with the ceiling (no run can reduce the loss
by more than the frozen model's), and a constant number of bits for every effective parameter. AICc and the held-out
prediction of the largest rank and length choose one; where a run is saturated, among the forms with the ceiling.

Measurements from elsewhere come as a CSV file with one run a row: rank, target_tokens, initial_loss, and final_loss or
loss_reduction (nats per target token); optional are effective_parameters, entropy_bits, seed and text, by which runs on
one text are known. Where no text is named, runs of one length and one initial loss are taken to be on one text.
"""

from pathlib import Path
from typing import get_args

import jsonargparse

from pml.commands._runs import add_runs, add_where
from pml.names import AdapterSize, FormName

__all__ = ["configure", "run"]


def configure(parser: jsonargparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_runs(parser, "; or CSV files of measurements")
    parser.add_argument(
        "--form",
        type=FormName | None,
        help=f"the form to choose: {', '.join(get_args(FormName))}; by default AICc and held-out error choose",
    )
    parser.add_argument(
        "--by",
        type=AdapterSize,
        default="rank",
        help="what counts as the adapter's size; by effective_parameters, blocks and placements may be mixed",
    )
    parser.add_argument(
        "--out", type=Path | None, help="folder for law.json and law.png; without it nothing is written"
    )
    parser.add_argument("--details", action="store_true", help="print all forms, the recall model and every run too")
    parser.add_argument("--json", action="store_true", help="print the content of law.json, and nothing else")
    parser.add_argument("--overwrite", action="store_true", help="replace a law.json of other runs")
    add_where(parser)


def run(args: jsonargparse.Namespace) -> int:
    """Fit, print, and write where `--out` says."""
    # Imported here because it takes seconds, which --help need not wait for.
    from pml.commands._law_screen import fit_and_show

    return fit_and_show(args)
