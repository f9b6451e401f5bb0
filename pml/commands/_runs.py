"""What the commands that look at many runs ask for: where the runs are, and which of them to keep."""

import sys
from pathlib import Path
from typing import Any

import jsonargparse

from pml.escape import say
from pml.records import Record, read_records

__all__ = ["add_runs", "add_where", "chosen_records"]


def add_runs(parser: jsonargparse.ArgumentParser, others: str = "") -> None:
    """Add `runs`, one or several places with records, or what `others` describes."""
    parser.add_argument(
        "runs",
        nargs="+",
        type=str,
        metavar="RUNS",
        help=f"folders of runs, folders with runs anywhere below them, or record.json files{others}",
    )


def add_where(parser: jsonargparse.ArgumentParser) -> None:
    """Add `--where`, values that fields of a record must have."""
    parser.add_argument(
        "--where",
        type=dict[str, Any] | None,
        help="which runs to keep by the fields of their records, such as --where.method memft or "
        "--where.method_settings.learning_rate 0.1",
    )


def chosen_records(args: jsonargparse.Namespace) -> dict[Path, Record]:
    """The records that `runs` and `--where` ask for, by folder.

    Raises:
        InputError: If there is none, a file is no record, or a record has no such field.
    """
    # Imported here because it takes seconds, which --help need not wait for.
    from pml.groups import select_records
    from pml.run_folder import check_records

    records = select_records(read_records(args.runs), args.where)
    for note in check_records(records):
        say(f"note: {note}", to=sys.stderr)
    return records
