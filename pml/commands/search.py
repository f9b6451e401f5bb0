"""Find the best settings for each cell of a grid, such as its learning rate, by successive halving.

The search file is a grid file (see `pml sweep`) that also has the values to try (`search`) and ascending budgets in
epochs (`epochs`). All candidates run with the first budget, the better ones with the next, and the best one with the
last; the final loss decides. Leaves one folder per run, those with the last budget in `out/best`, and `search.json`.
After an interruption the same command resumes. Exit code 1 if a run failed, or every candidate of a cell diverged;
--retry_failed runs the failed ones again.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import jsonargparse

from pml.escape import say, say_json

if TYPE_CHECKING:
    from pml.grid import Cell
    from pml.search import CellResult, SearchGrid
    from pml.tables import TextTable

__all__ = ["configure", "run"]


def configure(parser: jsonargparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "grid", type=Path, metavar="GRID", help="YAML file with `base`, `out`, `grid`, `search` and `epochs`"
    )
    parser.add_argument("--retry_failed", action="store_true", help="run the failed ones again")
    parser.add_argument("--json", action="store_true", help="print the content of search.json, and nothing else")


def run(args: jsonargparse.Namespace) -> int:
    """Search; 0 if every cell has chosen settings and no run failed, else 1."""
    # Imported here so that --help does not wait seconds for it.
    from pml.commands._console import make_console
    from pml.commands.sweep import Progress
    from pml.search import SEARCH_NAME, read_search, run_search
    from pml.stopping import Stopped
    from pml.tables import rich_table

    grid = read_search(args.grid)

    def start(folder: str, cells: "list[Cell]") -> "Progress":
        say(f"{folder}:", to=sys.stderr)
        return Progress(cells)

    try:
        choices = run_search(grid, start, args.retry_failed)
    except Stopped as stop:
        stop.advice = f"go on with: pml search {args.grid}"
        raise
    if args.json:
        say_json(json.loads((grid.out / SEARCH_NAME).read_bytes()))
    else:
        make_console().print(rich_table(_table(grid, choices)))
        for key in grid.search:
            edge = sum(key in choice.at_the_edge for choice in choices)
            if edge:
                say(
                    f"{key}: the best value is the smallest or largest tried in {edge} of {len(choices)} cells; "
                    "try values beyond it",
                    to=sys.stderr,
                )
    failed = [
        (choice, folder)
        for choice in choices
        for candidate in choice.candidates
        for folder in candidate.failed.values()
    ]
    diverged = [choice for choice in choices if not choice.failed and choice.chosen is None]
    for choice in diverged:
        say(
            f"diverged: {json.dumps(choice.cell)}: every candidate ended with a loss that is not a finite number, with "
            f"the last budget or before; search other values (see {choice.folder})",
            to=sys.stderr,
        )
    for choice, folder in failed:
        lost = choice.failed and folder == choice.folder
        so = f"{json.dumps(choice.cell)} has no settings" if lost else "its settings count as the worst"
        say(f"failed: {folder} (see error.txt there), so {so}; --retry_failed runs it again", to=sys.stderr)
    return 1 if failed or diverged else 0


def _table(grid: "SearchGrid", choices: "list[CellResult]") -> "TextTable":
    from pml.tables import TextTable, show_loss

    keys = list(dict.fromkeys(key for part in grid.grid for key in part))
    settings = [key.rsplit(".", 1)[-1] for key in (*keys, *grid.search)]
    rows = [
        (
            *(str(choice.cell.get(key, "-")) for key in keys),
            *(str(choice.candidates[0].settings[key]) for key in grid.search),
            # A runner-up that replaced a diverged best has not run with the budgets in between.
            *(show_loss(choice.candidates[0].final_loss.get(epochs)) for epochs in grid.epochs),
        )
        for choice in choices
    ]
    note = "Final loss of the best settings with each budget in epochs, in nats per target token."
    return TextTable("", (*settings, *(f"{epochs}\nepochs" for epochs in grid.epochs)), rows, words=(), note=note)
