"""Write an HTML page about runs: the law, recall, the threshold, capacity, and every run, with figures.

report.html is self-contained and needs no network; figures/ has its figures as PNG files. One report can cover runs of
several settings and methods.
"""

from pathlib import Path

import jsonargparse

from pml.commands._runs import add_runs, add_where, chosen_records
from pml.escape import say

__all__ = ["configure", "run"]


def configure(parser: jsonargparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_runs(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for report.html and figures/")
    parser.add_argument("--title", type=str, default="What the adapters remember", help="heading of the page")
    parser.add_argument("--overwrite", action="store_true", help="replace another report and its figures")
    add_where(parser)
    parser.add_argument(
        "--by",
        nargs="+",
        type=str,
        default=[],
        metavar="FIELD",
        help="record fields that also separate laws, besides backbone, block, placement, init, corpus and method; "
        "settings are dotted, such as method_settings.learning_rate; folder separates sweeps",
    )
    parser.add_argument(
        "--join_corpora",
        action="store_true",
        help="fit one law across corpora of different names, such as files of several lengths",
    )


def run(args: jsonargparse.Namespace) -> int:
    """Make the page and write it; 0.

    Raises:
        InputError: If there is no run, or `--out` holds another report or cannot be written.
    """
    # Imported here so that --help does not wait seconds for it.
    from pml.report import make_report, write_report

    report = make_report(chosen_records(args), title=args.title, by=args.by, join_corpora=args.join_corpora)
    path = write_report(report, args.out, overwrite=args.overwrite)
    size, figures = f"{len(report.html) / 1e6:.1f} MB", path.parent / "figures"
    say(f"written: {path} ({size}) and {len(report.figures)} figures in {figures}")
    return 0
