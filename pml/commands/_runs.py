"""Arguments of the commands that read many runs: where the runs are, and which of them to keep."""

import sys
from pathlib import Path
from typing import Any

import jsonargparse

from pml.escape import say
from pml.records import Record, read_records

__all__ = ["add_runs", "add_where", "chosen_records"]


def add_runs(parser: jsonargparse.ArgumentParser, others: str = "") -> None:
    """Add `runs`, one or more paths to records; `others` names what else the command takes."""
    parser.add_argument(
        "runs",
        nargs="+",
        type=str,
        metavar="RUNS",
        help=f"run folders, folders with runs anywhere below them, or record.json files{others}",
    )


def add_where(parser: jsonargparse.ArgumentParser) -> None:
    """Add `--where`, the values that fields of a record must have."""
    parser.add_argument(
        "--where",
        type=dict[str, Any] | None,
        help="keep only runs whose records have these values, such as --where.method memft or "
        "--where.method_settings.learning_rate 0.1",
    )


def chosen_records(args: jsonargparse.Namespace) -> dict[Path, Record]:
    """Records that `runs` and `--where` select, by run folder.

    Raises:
        InputError: If there is none, a file is not a record, or a record lacks a field of `--where`.
    """
    # Imported here so that --help does not wait seconds for it.
    from pml.groups import select_records
    from pml.run_folder import check_records

    records = select_records(read_records(args.runs), args.where)
    for note in check_records(records):
        say(f"note: {note}", to=sys.stderr)
    return records
