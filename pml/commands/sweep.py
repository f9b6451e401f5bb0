"""Run every cell of a grid of runs, skipping those that have a record; leaves one run folder per cell.

The grid file names the configurations that every cell starts from (`base`), the folder for the run folders (`out`) and,
for any key of `pml fit`, the values it takes (`grid`). All cells are checked before the first one runs. A cell that
fails does not stop the others; the exit code is then 1. A cell whose loss became infinite or not a number has diverged:
it counts as done, since to run it again would give the same, and is named at the end. Ctrl-C or SIGTERM saves the cell
that is running; the same command goes on with it.
"""

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import jsonargparse

if TYPE_CHECKING:
    from pml.sweep import Cell, Outcome

__all__ = ["Progress", "configure", "run"]


def configure(parser: jsonargparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("grid", type=Path, metavar="GRID", help="YAML file with `base`, `out` and `grid`")
    parser.add_argument("--list", action="store_true", help="say which cells there are and which are done, run none")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object per cell: name, folder, status, error"
    )


def run(args: jsonargparse.Namespace) -> int:
    """Run the grid; 0 when every cell has a record, 1 when some failed."""
    # Imported here because it takes seconds, which --help need not wait for.
    from pml.commands._console import make_console
    from pml.stopping import Stopped
    from pml.sweep import Outcome, read_grid, resolve, run_cells
    from pml.tables import records_table

    cells = resolve(read_grid(args.grid))
    if args.list:
        records_of = [(cell, cell.record) for cell in cells]
        outcomes = [Outcome(cell, record, skipped=record is not None) for cell, record in records_of]
        for outcome in outcomes:
            if not args.json:
                print(f"{'done' if outcome.skipped else 'to run':<8}{outcome.cell.folder}")
    else:
        progress = Progress(cells)
        try:
            outcomes = run_cells(cells, progress)
        except Stopped as stop:
            stop.advice = f"{progress.done} of {len(cells)} cells are done; go on with: pml sweep {args.grid}"
            raise
        records = {outcome.cell.folder: outcome.record for outcome in outcomes if outcome.record is not None}
        if records and not args.json:
            make_console().print(records_table(records))
    if args.json:
        print(json.dumps([_plain(outcome) for outcome in outcomes], indent=2))
    for outcome in outcomes:
        if outcome.diverged:
            print(
                f"diverged: {outcome.cell.name}: its loss is not a finite number; a lower learning rate, which is "
                f"another cell, may help (see {outcome.cell.folder})",
                file=sys.stderr,
            )
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    for outcome in failed:
        where = "" if outcome.skipped else f" (see {outcome.cell.folder / 'error.txt'})"
        print(f"failed: {outcome.cell.name}: {outcome.error}{where}", file=sys.stderr)
    return 1 if failed else 0


class Progress:
    """A line per finished cell on stderr, with the time that the rest will take if it takes as long per cell.

    Args:
        cells: All cells that will be reported.
    """

    def __init__(self, cells: "list[Cell]") -> None:
        self.total = len(cells)
        self.todo = sum(cell.record is None for cell in cells)
        self.done = self.ran = 0
        self.started = time.monotonic()
        skipped = self.total - self.todo
        print(f"{self.total} cells, {skipped} recorded before, {self.todo} to run", file=sys.stderr)

    def __call__(self, outcome: "Outcome") -> None:
        """Say what became of a cell."""
        from pml.tables import show_loss

        self.done += 1
        if outcome.skipped:
            return
        self.ran += 1
        left = (time.monotonic() - self.started) / self.ran * (self.todo - self.ran)
        record = outcome.record
        if record is None:
            result = f"FAILED {outcome.error}"
        elif record.final_loss is None:
            result = f"DIVERGED, {record.optimizer_steps} steps, {record.wall_seconds:.0f} s"
        else:
            result = (
                f"loss {show_loss(record.initial_loss)} -> {record.final_loss:.3f} nats, "
                f"exact match {record.exact_match:.2f}, {record.optimizer_steps} steps, {record.wall_seconds:.0f} s"
            )
        rest = f"; about {_duration(left)} left" if self.ran < self.todo else ""
        print(f"[{self.ran}/{self.todo}] {outcome.cell.name}: {result}{rest}", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _plain(outcome: "Outcome") -> dict[str, str | None]:
    if outcome.error is not None:
        status = "failed"
    elif outcome.diverged:
        status = "diverged"
    elif outcome.skipped:
        status = "recorded"
    else:
        status = "finished" if outcome.record is not None else "to run"
    return {
        "name": outcome.cell.name,
        "folder": str(outcome.cell.folder),
        "status": status,
        "error": outcome.error,
    }
