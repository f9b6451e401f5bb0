"""A grid of runs, run: each cell once, by one worker or many, each in its own folder, and gone on with where it was."""

import gc
import itertools
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pml.atomic import whole_file
from pml.backbone import load_config, load_tokenizer, shared_backbones
from pml.checkpoints import newest_checkpoint
from pml.claims import FOLDER_NAME, Claims
from pml.corpus import Corpus
from pml.disk import DiskError, disk_trouble
from pml.errors import InputError
from pml.grid import ERROR_NAME, Cell
from pml.lightning_cli import MemorizationCLI, make_run
from pml.modules import Memorization
from pml.progress import ProgressFile
from pml.records import RECORD_NAME, SET_ASIDE, Record, read_record
from pml.run_folder import check_corpus
from pml.same_folder import run_to_go_on_in
from pml.stopping import Stopped, requested

__all__ = ["Outcome", "claims_of", "known_cells", "outcomes_of", "run_cells", "set_failures_aside"]

SECONDS_BETWEEN_LOOKS = 1.0
"""How often a worker looks whether cells that others run are done."""


@dataclass(frozen=True)
class Outcome:
    """What became of a cell: its record, or the error it failed with; `skipped` where that was known before."""

    cell: Cell
    record: Record | None = None
    error: str | None = None
    skipped: bool = False

    @property
    def diverged(self) -> bool:
        """Whether it ended with a loss that is not a finite number."""
        return self.record is not None and self.record.status == "diverged"

    @property
    def status(self) -> str:
        """`failed`, `to run`, `diverged`, `recorded` if that was known before, or `finished`."""
        if self.error is not None or self.record is None:
            return "to run" if self.error is None else "failed"
        return "diverged" if self.diverged else "recorded" if self.skipped else "finished"


def claims_of(cells: Sequence[Cell]) -> Claims:
    """The claims on the cells of a grid, beside their folders."""
    return Claims(cells[0].folder.parent / FOLDER_NAME)


def run_cells(cells: Sequence[Cell], report: Callable[[Outcome], None]) -> list[Outcome]:
    """Run the cells that nobody has run, with every backbone loaded once; others may do the same at the same time.

    Each cell is claimed, run and recorded by one worker; what others have claimed is waited for. A worker stays with
    one corpus as long as it can, since its frozen layers are then computed once. A cell that fails leaves `error.txt`
    in its folder and the others go on. A cell that was run on other data than its configuration gives now has failed
    too; its record stays as it is. An unfinished attempt is gone on with from its checkpoint; without one, what it left
    is moved aside, never deleted.

    Args:
        cells: What to run, in this order.
        report: Called with the outcome of each cell as soon as it is known.

    Returns:
        What became of each cell, in the order of `cells`.

    Raises:
        Stopped: If a signal has ended it; the cell that was running is saved.
        DiskError: If the disk is full or fails.
    """
    outcomes: dict[str, Outcome] = {}
    claims, corpora = claims_of(cells), dict[str, Corpus]()
    before = known_cells(cells)
    waiting, data = list(cells), ""
    with shared_backbones():
        while waiting:
            for cell in _in_order(waiting, data, claims):
                outcome = _attempt(cell, claims, corpora, known=cell.name in before)
                if outcome is not None:
                    break
            else:
                time.sleep(SECONDS_BETWEEN_LOOKS)
                continue
            waiting.remove(cell)
            data = data if outcome.skipped else cell.data
            outcomes[cell.name] = outcome
            report(outcome)
            if (signum := requested()) is not None:
                # The cell has just come to its end by itself.
                raise Stopped(signum, at_once=False)
    return [outcomes[cell.name] for cell in cells]


def known_cells(cells: Iterable[Cell]) -> set[str]:
    """Names of the cells of which it is known now what has become."""
    return {cell.name for cell in cells if cell.record is not None or cell.error is not None}


def outcomes_of(cells: Iterable[Cell], known: Collection[str]) -> list[Outcome]:
    """What has become of cells that others have run, checked against the data that their configurations give now.

    Args:
        cells: Which.
        known: Names of those of which it was known when the sweep began.
    """
    corpora: dict[str, Corpus] = {}
    return [_outcome_of(cell, corpora, cell.name in known) or Outcome(cell) for cell in cells]


def set_failures_aside(cells: Iterable[Cell], claims: Claims) -> None:
    """Move what failed attempts have left aside, so that their cells are run again."""
    for cell in cells:
        if cell.error is not None and claims.take(cell.name):
            if cell.error is not None:
                _set_aside(cell.folder)
            claims.release(cell.name)


def _in_order(waiting: Sequence[Cell], data: str, claims: Claims) -> list[Cell]:
    """Cells of the same corpus first, then those of corpora that nobody works on."""
    taken = {cell.data for cell in waiting if cell.data != data and claims.holder(cell.name) is not None}
    return sorted(waiting, key=lambda cell: (cell.data != data, cell.data in taken))


def _attempt(cell: Cell, claims: Claims, corpora: dict[str, Corpus], known: bool) -> Outcome | None:
    """What becomes of a cell; None while another worker has it.

    Args:
        cell: Which.
        claims: Who has what.
        corpora: Corpora made so far.
        known: Whether what became of it was known when the sweep began.
    """
    if (outcome := _outcome_of(cell, corpora, known)) is not None:
        return outcome
    if not claims.take(cell.name):
        return None
    try:
        # Another worker may have come to its end since.
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
    """What a cell came to that has been run before; an error where its data is no longer what it was run on."""
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
    module: Memorization | None = None
    try:
        going_on = () if checkpoint is None else (f"--ckpt_path={checkpoint}",)
        cli = MemorizationCLI([*cell.arguments, *going_on], run=False)
        module = cli.model
        cli.trainer.callbacks.append(ProgressFile(cell.folder))  # type: ignore[attr-defined]
        cli.run_fit()
        return Outcome(cell, read_record(cell.folder / RECORD_NAME))
    except Exception as error:
        return _failed(cell, error)
    finally:
        if module is not None:
            module.release()
        gc.collect()


def _failed(cell: Cell, error: Exception) -> Outcome:
    """Keep what a cell failed with in its folder; not where the disk did, which is no fault of the cell."""
    trouble = disk_trouble(error)
    if trouble is None:
        summary = " ".join(f"{type(error).__name__}: {error}".split())
        try:
            with whole_file(cell.folder / ERROR_NAME) as file:
                file.write(f"{summary}\n\n{traceback.format_exc()}".encode())
            return Outcome(cell, error=summary)
        except OSError as unwritten:
            trouble = f"{unwritten.filename}: {unwritten.strerror}"
    raise DiskError(f"{trouble}; cells that are done stay done; mend that, and go on with the same command") from error


def _checkpoint(folder: Path) -> Path | None:
    """What a cell goes on from in its folder; None where it starts anew, after what is there was set aside."""
    try:
        checkpoint = newest_checkpoint(folder)
        if run_to_go_on_in(checkpoint) is not None:
            return checkpoint
    except InputError:
        pass
    _set_aside(folder)
    return None


def _set_aside(folder: Path) -> None:
    """Move what an attempt has left aside, if there is anything."""
    if folder.exists():
        names = (folder.with_name(f"{folder.name}{SET_ASIDE}{n}") for n in itertools.count(1))
        folder.rename(next(name for name in names if not name.exists()))
