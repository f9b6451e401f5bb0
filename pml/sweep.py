"""Running a grid: each cell once, in its own folder, by one or many workers; unfinished cells are resumed."""

import gc
import itertools
import logging
import os
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pml.atomic import whole_file
from pml.backbone import load_config, load_tokenizer, shared_backbones
from pml.checkpoints import newest_checkpoint
from pml.claims import FOLDER_NAME, Claims
from pml.corpus import Corpus
from pml.disk import DiskError, disk_failure
from pml.errors import InputError
from pml.grid import ERROR_NAME, Cell
from pml.lightning_cli import FitHadEnded, MemorizationCLI, make_run
from pml.modules import Memorization
from pml.progress import ProgressFile
from pml.records import RECORD_NAME, SET_ASIDE, Record, read_record
from pml.run_folder import check_corpus
from pml.same_folder import run_to_go_on_in
from pml.stopping import Stopped, requested

__all__ = ["Outcome", "claims_of", "known_cells", "outcomes_of", "run_cells", "set_failures_aside"]

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LOOKS = 1.0
"""Interval at which a worker checks whether cells that others run are done."""


@dataclass(frozen=True)
class Outcome:
    """Outcome of a cell: its record, or the error it failed with; `skipped` if that was known before the sweep."""

    cell: Cell
    record: Record | None = None
    error: str | None = None
    skipped: bool = False

    @property
    def diverged(self) -> bool:
        """Whether the run ended with a loss that is not finite."""
        return self.record is not None and self.record.status == "diverged"

    @property
    def status(self) -> str:
        """`failed`, `to run`, `diverged`, `recorded` if that was known before, or `finished`."""
        if self.error is not None or self.record is None:
            return "to run" if self.error is None else "failed"
        return "diverged" if self.diverged else "recorded" if self.skipped else "finished"


def claims_of(cells: Sequence[Cell]) -> Claims:
    """The claims on the cells of a grid, kept beside the cells' folders."""
    return Claims(cells[0].folder.parent / FOLDER_NAME)


def run_cells(cells: Sequence[Cell], report: Callable[[Outcome], None]) -> list[Outcome]:
    """Run the cells that have no outcome yet, loading every backbone once; other workers may do so at the same time.

    Each cell is claimed, run and recorded by one worker; this one waits for cells that others have claimed. It stays
    with one corpus as long as possible, so that the frozen layers are computed once for it. A cell that fails leaves
    `error.txt` in its folder, and the sweep goes on. A cell whose record is of other data than its configuration gives
    counts as failed; the record is kept. An unfinished attempt resumes from its checkpoint; without one, its files are
    moved aside, never deleted.

    Args:
        cells: The cells, in the preferred order.
        report: Called with the outcome of each cell as soon as it is known.

    Returns:
        The outcome of each cell, in the order of `cells`.

    Raises:
        Stopped: If a signal has stopped the sweep; the running cell is saved.
        DiskError: If the disk is full or fails.
    """
    outcomes: dict[str, Outcome] = {}
    claims, corpora = claims_of(cells), dict[str, Corpus]()
    before = known_cells(cells)
    waiting, data, named = list(cells), "", set[str]()
    with shared_backbones():
        while waiting:
            for cell in _in_order(waiting, data, claims):
                outcome = _attempt(cell, claims, corpora, known=cell.name in before)
                if outcome is not None:
                    break
            else:
                for name in [cell.name for cell in waiting if cell.name not in named]:
                    named.add(name)
                    holder = claims.holder(name) or "a worker that has ended"
                    log.info("waiting for %s, claimed by %s (%s)", name, holder, claims.path(name))
                time.sleep(SECONDS_BETWEEN_LOOKS)
                continue
            waiting.remove(cell)
            data = data if outcome.skipped else cell.data
            outcomes[cell.name] = outcome
            report(outcome)
            if (signum := requested()) is not None:
                # The cell has just ended by itself.
                raise Stopped(signum, at_once=False)
    return [outcomes[cell.name] for cell in cells]


def known_cells(cells: Iterable[Cell]) -> set[str]:
    """Names of the cells that have a record or an error."""
    return {cell.name for cell in cells if cell.record is not None or cell.error is not None}


def outcomes_of(cells: Iterable[Cell], known: Collection[str]) -> list[Outcome]:
    """Outcomes of cells that other workers have run; records from before the sweep are checked against their data.

    Args:
        cells: The cells.
        known: Names of the cells whose outcome was known when the sweep began.
    """
    corpora: dict[str, Corpus] = {}
    return [_outcome_of(cell, corpora, cell.name in known) or Outcome(cell) for cell in cells]


def set_failures_aside(cells: Iterable[Cell], claims: Claims) -> None:
    """Move the folders of failed cells aside, so that the cells run again."""
    for cell in cells:
        if cell.error is not None and claims.take(cell.name):
            if cell.error is not None:
                _set_aside(cell.folder)
            claims.release(cell.name)


def _in_order(waiting: Sequence[Cell], data: str, claims: Claims) -> list[Cell]:
    """Sort cells: those of this worker's corpus first, then those of corpora that nobody works on."""
    taken = {cell.data for cell in waiting if cell.data != data and claims.holder(cell.name) is not None}
    return sorted(waiting, key=lambda cell: (cell.data != data, cell.data in taken))


def _attempt(cell: Cell, claims: Claims, corpora: dict[str, Corpus], known: bool) -> Outcome | None:
    """Outcome of a cell, which is run if nobody has run it; None while another worker holds it.

    Args:
        cell: The cell.
        claims: The claims of all workers.
        corpora: Corpora built so far, by `Cell.data`.
        known: Whether its outcome was known when the sweep began.
    """
    if (outcome := _outcome_of(cell, corpora, known)) is not None:
        return outcome
    if not claims.take(cell.name):
        return None
    try:
        # Another worker may have finished the cell since. NFS may remember for a minute that a file does not exist, but
        # looks again in a folder that is opened.
        for folder in (cell.folder.parent, cell.folder):
            with suppress(OSError):
                os.listdir(folder)
        outcome = _outcome_of(cell, corpora, known)
        return outcome if outcome is not None else _run_cell(cell, _checkpoint(cell.folder))
    finally:
        claims.release(cell.name)


def _outcome_of(cell: Cell, corpora: dict[str, Corpus], known: bool) -> Outcome | None:
    if (record := cell.record) is not None:
        return _recorded(cell, record, corpora) if known else Outcome(cell, record)
    if (error := cell.error) is not None:
        return Outcome(cell, error=error, skipped=known)
    return None


def _recorded(cell: Cell, record: Record, corpora: dict[str, Corpus]) -> Outcome:
    """Outcome of a cell that has a record; an error if its configuration gives other data than it was run on."""
    try:
        if cell.data not in corpora:
            module, data = make_run(cell.arguments)
            if not hasattr(data, "build"):
                return Outcome(cell, record, skipped=True)
            config = load_config(module.backbone_name)
            corpora[cell.data] = data.build(load_tokenizer(module.backbone_name), int(config.vocab_size))
        check_corpus(corpora[cell.data], record, cell.folder)
    except InputError as error:
        return Outcome(cell, error=str(error), skipped=True)
    return Outcome(cell, record, skipped=True)


def _run_cell(cell: Cell, checkpoint: Path | None = None) -> Outcome:
    """Run a cell, and anew if its checkpoint is that of a finished run, whose record was deleted."""
    try:
        return _fit_cell(cell, checkpoint)
    except FitHadEnded:
        _set_aside(cell.folder)
        return _fit_cell(cell)


def _fit_cell(cell: Cell, checkpoint: Path | None = None) -> Outcome:
    module: Memorization | None = None
    try:
        going_on = () if checkpoint is None else (f"--ckpt_path={checkpoint}",)
        cli = MemorizationCLI([*cell.arguments, *going_on], run=False)
        module = cli.model
        cli.trainer.callbacks.append(ProgressFile(cell.folder))  # type: ignore[attr-defined]
        cli.run_fit()
        return Outcome(cell, read_record(cell.folder / RECORD_NAME))
    except FitHadEnded:
        raise
    except Exception as error:
        if (record := cell.record) is not None and disk_failure(error) is None:
            log.warning("%s: an error after the run had ended: %s: %s", cell.name, type(error).__name__, error)
            return Outcome(cell, record)
        return _failed(cell, error)
    finally:
        if module is not None:
            module.release()
        gc.collect()


def _failed(cell: Cell, error: Exception) -> Outcome:
    """Write the error of a cell to its folder; raise `DiskError` if the disk failed, which is no fault of the cell."""
    trouble = disk_failure(error)
    if trouble is None:
        summary = " ".join(f"{type(error).__name__}: {error}".split())
        try:
            with whole_file(cell.folder / ERROR_NAME) as file:
                # The name of a file in a message need not be valid text.
                file.write(f"{summary}\n\n{traceback.format_exc()}".encode(errors="backslashreplace"))
            return Outcome(cell, error=summary)
        except OSError as unwritten:
            trouble = f"{unwritten.filename}: {unwritten.strerror}"
    raise DiskError(f"{trouble}; finished cells are kept; fix the disk, then run the same command again") from error


def _checkpoint(folder: Path) -> Path | None:
    """Checkpoint to resume a cell from; None to start anew, after moving aside what is in its folder."""
    try:
        checkpoint = newest_checkpoint(folder)
        if run_to_go_on_in(checkpoint) is not None:
            return checkpoint
    except InputError:
        pass
    _set_aside(folder)
    return None


def _set_aside(folder: Path) -> None:
    """Move aside the folder of an attempt, if there is one."""
    if folder.exists():
        names = (folder.with_name(f"{folder.name}{SET_ASIDE}{n}") for n in itertools.count(1))
        folder.rename(next(name for name in names if not name.exists()))
