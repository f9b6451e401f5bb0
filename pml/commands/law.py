"""Fit the Parametric Memory Law dL = C r^alpha l^(-beta) + b to finished runs; loss in nats per target token.

Fits every form that the runs determine: the paper's, forms with a ceiling (no run can reduce the loss by more than the
frozen model's loss), and a constant number of bits per effective parameter. AICc and the held-out prediction of the
largest rank and length choose one; if a run is saturated, only forms with the ceiling are considered.

Measurements from elsewhere come as a CSV file with one run per row. Columns: rank, target_tokens, initial_loss, and
final_loss or loss_reduction (nats per target token); optional are effective_parameters, entropy_bits, seed, and text,
which identifies the text. Without it, runs of equal length and initial loss count as runs on one text.
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
        help=f"form of the law: {', '.join(get_args(FormName))}; default: chosen by AICc and held-out error",
    )
    parser.add_argument(
        "--by",
        type=AdapterSize,
        default="rank",
        help="measure of the adapter's size; effective_parameters allows mixed blocks and placements",
    )
    parser.add_argument("--out", type=Path | None, help="folder for law.json and law.png; default: write nothing")
    parser.add_argument("--details", action="store_true", help="also print all forms, the recall model and every run")
    parser.add_argument("--json", action="store_true", help="print the content of law.json, and nothing else")
    parser.add_argument("--overwrite", action="store_true", help="replace a law.json with other content")
    add_where(parser)


def run(args: jsonargparse.Namespace) -> int:
    """Fit, print, and write to `--out` if given; 0."""
    # Imported here so that --help does not wait seconds for it.
    from pml.commands._law_screen import fit_and_show

    return fit_and_show(args)
