"""Run every cell of a grid, skipping cells that have a record; leaves one run folder per cell.

The grid file has the configuration files that every cell starts from (`base`), the parent of the run folders (`out`),
and a list of values for any key of `pml fit` (`grid`). All cells are checked before the first one runs. Several sweeps
of one grid can run at once, on any machines that share the folder; each cell runs once, on one device. If a cell fails,
the others run on and the exit code is 1; only --retry_failed runs it again. A cell whose loss becomes infinite or NaN
has diverged: it counts as done, since another run would diverge too, and is listed at the end. Ctrl-C, SIGTERM or a
closed terminal saves the running cells; the same command resumes them. With --cluster, jobs outlive a closed terminal.
"""

import signal
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import jsonargparse

from pml.errors import InputError
from pml.escape import say, say_json

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pml.claims import Claims
    from pml.grid import Cell
    from pml.sweep import Outcome
    from pml.workers import Workers

__all__ = ["Progress", "configure", "run"]


def configure(parser: jsonargparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("grid", type=Path, metavar="GRID", help="YAML file with `base`, `out` and `grid`")
    parser.add_argument(
        "--workers",
        type=int,
        help="number of processes that share the cells, each with a GPU or a share of the CPU cores; with --cluster, "
        "number of jobs",
    )
    parser.add_argument("--cluster", choices=["slurm", "local"], help="run the workers as jobs, through submitit")
    parser.add_argument(
        "--cluster_options",
        type=dict[str, Any],
        default={},
        help="options of submitit's executor, such as {slurm_partition: gpu, timeout_min: 600, gpus_per_node: 1}",
    )
    parser.add_argument("--retry_failed", action="store_true", help="run failed cells again")
    parser.add_argument(
        "--status", action="store_true", help="list which cells are done, running, failed or left; run nothing"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object per cell: name, folder, status, error"
    )


def run(args: jsonargparse.Namespace) -> int:
    """Run the grid; 0 if every cell has a valid record, else 1."""
    if args.workers is not None and args.workers < 1:
        raise InputError(f"--workers is {args.workers}; expected at least 1")
    # Imported here so that --help does not wait seconds for it.
    from pml.commands._console import make_console
    from pml.grid import Grid, read_grid, resolve
    from pml.stopping import Stopped
    from pml.sweep import claims_of, known_cells, outcomes_of, run_cells, set_failures_aside
    from pml.tables import records_table, rich_table

    grid: Grid = read_grid(args.grid)
    cells = resolve(grid)
    claims = claims_of(cells)
    if args.status:
        return _status(cells, claims, args.json)
    if args.retry_failed:
        set_failures_aside(cells, claims)
    progress = Progress(cells)
    troubles: list[str] = []
    try:
        if args.workers is None and args.cluster is None:
            outcomes = run_cells(cells, progress)
        else:
            from pml.workers import ClusterWorkers, LocalWorkers

            count, known = args.workers or 1, known_cells(cells)
            workers: Workers = (
                LocalWorkers(args.grid, count, grid.out)
                if args.cluster is None
                else ClusterWorkers(args.grid, count, grid.out, args.cluster, args.cluster_options)
            )
            watch(cells, workers, claims, progress)
            outcomes = outcomes_of(cells, known)
            troubles = workers.failures(all_ran=all(outcome.status != "to run" for outcome in outcomes))
    except Stopped as stop:
        stop.advice = f"{progress.done} of {len(cells)} cells are done; go on with: pml sweep {args.grid}"
        raise
    records = {outcome.cell.folder: outcome.record for outcome in outcomes if outcome.record is not None}
    if records and not args.json:
        make_console().print(rich_table(records_table(records)))
    if args.json:
        say_json([_plain(outcome) for outcome in outcomes])
    for trouble in (*map(_trouble, outcomes), *troubles):
        if trouble:
            say(trouble, to=sys.stderr)
    return 1 if any(outcome.record is None or outcome.error is not None for outcome in outcomes) else 0


def _trouble(outcome: "Outcome") -> str:
    """Why a cell has no usable result, and what to do; empty if it has one."""
    from pml.grid import ERROR_NAME

    name, folder = outcome.cell.name, outcome.cell.folder
    if outcome.error is not None:
        where = f" (see {folder / ERROR_NAME}; --retry_failed runs it again)" if (folder / ERROR_NAME).exists() else ""
        return f"failed: {name}: {outcome.error}{where}"
    if outcome.record is None:
        return f"not run: {name}"
    if outcome.diverged:
        return (
            f"diverged: {name}: its loss is not a finite number; a lower learning rate may help, as another cell "
            f"(see {folder})"
        )
    return ""


def watch(cells: "Sequence[Cell]", workers: "Workers", claims: "Claims", report: "Callable[[Outcome], None]") -> None:
    """Report each cell when it is done, and show the running ones, until all workers have ended.

    Args:
        cells: The cells that the workers share.
        workers: The workers.
        claims: Claims of the workers on cells.
        report: Called with each outcome that was not known before.

    Raises:
        Stopped: If a signal stops the sweep. Whatever is raised, workers that cannot be watched again have then saved
            their cells.
    """
    from contextlib import nullcontext, suppress

    from rich.live import Live

    from pml.commands._console import make_console
    from pml.progress import is_interactive
    from pml.stopping import Stopped
    from pml.sweep import Outcome

    try:
        waiting = [cell for cell in cells if cell.record is None and cell.error is None]
        display: Any = Live(console=make_console(stderr=True), transient=True) if is_interactive() else nullcontext()
        with display:
            while True:
                ended = workers.running() == 0
                for cell in list(waiting):
                    if (record := cell.record) is not None or cell.error is not None:
                        report(Outcome(cell, record, None if record is not None else cell.error))
                        waiting.remove(cell)
                if ended:
                    return
                if isinstance(display, Live):
                    display.update(_running_table(waiting, claims))
                time.sleep(0.5)
    except BaseException as error:
        asked = isinstance(error, Stopped) and error.signum in (signal.SIGINT, signal.SIGTERM)
        if asked or not workers.outlive:
            with suppress(OSError):
                say("stopping: the workers save their cells", to=sys.stderr)
            workers.stop()
        raise


def _running(cells: "Sequence[Cell]", claims: "Claims") -> list[tuple[str, str, str]]:
    """Name, holder of the claim and progress of each running cell."""
    from pml.progress import PROGRESS_NAME

    rows = []
    for cell in cells:
        if (holder := claims.holder(cell.name)) is not None:
            try:
                words = (cell.folder / PROGRESS_NAME).read_text(encoding="utf-8")
            except OSError:
                words = "starting, or measuring"
            rows.append((cell.name, holder, words))
    return rows


def _running_table(cells: "Sequence[Cell]", claims: "Claims") -> Any:
    from pml.tables import TextTable, rich_table

    rows = _running(cells, claims)
    note = f"{len(rows)} running, {len(cells) - len(rows)} to run"
    return rich_table(TextTable("", ("cell", "where", "progress"), rows, words=(0, 1, 2), note=note))


def _status(cells: "Sequence[Cell]", claims: "Claims", as_json: bool) -> int:
    """Print how far a sweep has got; 0."""
    from pml.progress import show_seconds
    from pml.sweep import Outcome

    running = {name: (holder, words) for name, holder, words in _running(cells, claims)}
    outcomes = [Outcome(cell, cell.record, cell.error, skipped=True) for cell in cells]
    if as_json:
        say_json([{**_plain(o), "running": running.get(o.cell.name, (None,))[0]} for o in outcomes])
        return 0
    counts = Counter({"recorded": 0, "failed": 0, "running": 0, "to run": 0})
    for outcome in outcomes:
        name, kind, words = outcome.cell.name, outcome.status, f": {outcome.error}" if outcome.error else ""
        if kind == "to run" and name in running:
            kind, words = "running", ": on {}; {}".format(*running[name])
        counts[kind] += 1
        say(f"{kind:<9}{outcome.cell.folder}{words}")
    summary = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    seconds = [outcome.record.wall_seconds for outcome in outcomes if outcome.record is not None]
    if seconds and (left := counts["running"] + counts["to run"]):
        hands = max(1, len(running))
        summary += f"; about {show_seconds(left * fmean(seconds) / hands)} left with {hands} worker{'s' * (hands > 1)}"
    say(summary)
    return 0


class Progress:
    """Prints a line per finished cell on stderr, with the time left at the mean time per cell so far.

    Args:
        cells: All cells of the sweep.
    """

    def __init__(self, cells: "list[Cell]") -> None:
        self.total = len(cells)
        open_cells = [cell for cell in cells if cell.record is None]
        failed = sum(cell.error is not None for cell in open_cells)
        self.todo = len(open_cells) - failed
        self.done = self.ran = 0
        self.started = time.monotonic()
        words = f"{self.total} cells, {self.total - len(open_cells)} recorded before, {self.todo} to run"
        say(words + (f", {failed} failed before" if failed else ""), to=sys.stderr)

    def __call__(self, outcome: "Outcome") -> None:
        """Print the outcome of a cell, unless it was known before."""
        from pml.progress import show_seconds
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
        rest = f"; about {show_seconds(left)} left" if self.ran < self.todo else ""
        say(f"[{self.ran}/{self.todo}] {outcome.cell.name}: {result}{rest}", to=sys.stderr)


def _plain(outcome: "Outcome") -> dict[str, str | None]:
    cell = outcome.cell
    return {"name": cell.name, "folder": str(cell.folder), "status": outcome.status, "error": outcome.error}
