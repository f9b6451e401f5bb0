"""A grid of runs: expanded and checked before anything is run, resumed where it was, each cell in its own folder."""

import gc
import hashlib
import itertools
import json
import re
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

from pml.backbone import load_config, load_tokenizer, shared_backbones
from pml.checkpoints import newest_checkpoint
from pml.corpus import Corpus
from pml.errors import InputError
from pml.lightning_cli import MemorizationCLI, make_run, parse_run
from pml.modules import Memorization
from pml.records import RECORD_NAME, Record, read_record
from pml.run_folder import check_corpus
from pml.stopping import Stopped, requested

__all__ = ["Cell", "Grid", "Outcome", "expand", "read_grid", "resolve", "run_cells"]


ERROR_NAME = "error.txt"


class Grid(pydantic.BaseModel):
    """What a grid file says.

    Attributes:
        base: Configuration files of `pml fit` that every cell starts from, relative to the grid file.
        out: Folder for the cells' run folders, relative to the working directory.
        grid: For any key of `pml fit`, the values it takes; every combination is a cell. A list of such mappings is
            the union of their cells.
    """

    model_config = pydantic.ConfigDict(extra="forbid")

    base: list[Path] = pydantic.Field(min_length=1)
    out: Path
    grid: list[dict[str, list[Any]]] = pydantic.Field(min_length=1)

    @pydantic.field_validator("base", "grid", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return value if isinstance(value, list) else [value]


AnyGrid = TypeVar("AnyGrid", bound=Grid)


@dataclass(frozen=True)
class Cell:
    """One run of a grid.

    Attributes:
        name: Name of its folder: what sets it apart from the other cells, and a hash of its whole configuration, so
            that a cell whose configuration has changed is another cell.
        folder: Its run folder.
        arguments: What `pml fit` would be given to run it.
        data: Backbone and settings of the data, as JSON: cells with the same have the same corpus.
    """

    name: str
    folder: Path
    arguments: tuple[str, ...]
    data: str = ""

    @property
    def record(self) -> Record | None:
        """Its record where it has been run to its end, diverged or not: to run it again would give the same."""
        path = self.folder / RECORD_NAME
        record = read_record(path) if path.exists() else None
        return None if record is None or record.status == "interrupted" else record


@dataclass(frozen=True)
class Outcome:
    """What became of a cell: its record, or the error it failed with; `skipped` where it had been recorded before."""

    cell: Cell
    record: Record | None = None
    error: str | None = None
    skipped: bool = False

    @property
    def diverged(self) -> bool:
        """Whether it ended with a loss that is not a finite number."""
        return self.record is not None and self.record.status == "diverged"


def read_grid(path: Path, kind: type[AnyGrid] = Grid) -> AnyGrid:  # type: ignore[assignment]
    """Read and check a grid file.

    Args:
        path: The file.
        kind: What it has to say.

    Raises:
        InputError: If it cannot be read, is not YAML, or does not say what a grid needs.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML: {error}") from error
    try:
        grid = kind.model_validate(content)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise InputError(f"{path}: {where}: {first['msg']}; a grid has `base`, `out` and `grid`") from error
    for key, values in ((key, values) for part in grid.grid for key, values in part.items()):
        if not values:
            raise InputError(f"{path}: grid key {key} has no values")
    bases = [path.parent / base for base in grid.base]
    for base in bases:
        if not base.is_file():
            raise InputError(f"{path}: base {base}: no such file; paths are relative to the grid file")
    return grid.model_copy(update={"base": bases})


def expand(grid: Sequence[dict[str, list[Any]]]) -> list[dict[str, Any]]:
    """Every combination of values of every part of a grid, the last key varying fastest.

    Example:
        >>> expand([{"rank": [1, 2], "seed": [7]}])
        [{'rank': 1, 'seed': 7}, {'rank': 2, 'seed': 7}]
    """
    return [dict(zip(part, values, strict=True)) for part in grid for values in itertools.product(*part.values())]


def resolve(grid: Grid) -> list[Cell]:
    """The cells of a grid, each of them parsed as `pml fit` would.

    Raises:
        InputError: If a key does not exist or a value does not fit, naming the cell; or two cells are the same run.
    """
    settings = expand(grid.grid)
    varying = [key for key in dict.fromkeys(k for s in settings for k in s) if _varies(key, settings)]
    base = tuple(itertools.chain.from_iterable(("--config", str(path)) for path in grid.base))
    cells = []
    for setting in settings:
        own = tuple(
            f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in setting.items()
        )
        try:
            config = parse_run([*base, *own])
        except InputError as error:
            raise InputError(f"cell {_label(setting, list(setting))}: {error}") from error
        digest = hashlib.sha256(json.dumps(_without_places(config), sort_keys=True, default=str).encode()).hexdigest()
        label = _label(setting, varying)
        name = f"{label}-{digest[:8]}" if label else digest[:8]
        cells.append(Cell(name, grid.out / name, (*base, *own, *_place(grid.out, name)), _data_of(config)))
    if len({cell.name for cell in cells}) < len(cells):
        twice = next(cell.name for cell in cells if sum(cell.name == other.name for other in cells) > 1)
        raise InputError(f"the grid has the same cell twice: {twice}; write each combination once")
    return cells


def run_cells(cells: Sequence[Cell], report: Callable[[Outcome], None]) -> list[Outcome]:
    """Run the cells that have no record of a fit that ended, in this process, with every backbone loaded once.

    A cell that fails leaves `error.txt` in its folder and the others go on. A cell that was run on other data than its
    configuration gives now has failed too; its record stays as it is. What an earlier, unfinished attempt left is
    moved aside, never deleted, and gone on from where it has a checkpoint.

    Args:
        cells: What to run, in this order.
        report: Called with the outcome of each cell as soon as it is known.

    Raises:
        Stopped: If a signal has ended it; the cell that was running is saved.
    """
    outcomes = []
    corpora: dict[str, Corpus] = {}
    with shared_backbones():
        for cell in cells:
            if (record := cell.record) is not None:
                outcome = _recorded(cell, record, corpora)
            else:
                outcome = _run_cell(cell, _checkpoint_in(_set_aside(cell.folder)))
            outcomes.append(outcome)
            report(outcome)
            if (signum := requested()) is not None:
                # The cell has just come to its end by itself.
                raise Stopped(signum, at_once=False)
    return outcomes


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


def _data_of(config: Any) -> str:
    plain = config.as_dict()
    return json.dumps([plain["model"]["init_args"].get("backbone"), plain["data"]], sort_keys=True, default=str)


def _run_cell(cell: Cell, checkpoint: Path | None = None) -> Outcome:
    module: Memorization | None = None
    try:
        going_on = () if checkpoint is None else (f"--ckpt_path={checkpoint}",)
        cli = MemorizationCLI([*cell.arguments, *going_on], run=False)
        module = cli.model
        cli.run_fit()
        return Outcome(cell, read_record(cell.folder / RECORD_NAME))
    except Exception as error:
        cell.folder.mkdir(parents=True, exist_ok=True)
        (cell.folder / ERROR_NAME).write_text(traceback.format_exc(), encoding="utf-8")
        return Outcome(cell, error=" ".join(f"{type(error).__name__}: {error}".split()))
    finally:
        if module is not None:
            module.release()
        gc.collect()


def _place(out: Path, name: str) -> tuple[str, ...]:
    """Where a cell logs to: its own folder, whatever its configuration says."""
    return (
        "--trainer.logger=lightning.pytorch.loggers.TensorBoardLogger",
        f"--trainer.logger.save_dir={out}",
        f"--trainer.logger.name={name}",
        "--trainer.logger.version=",
        "--trainer.logger.default_hp_metric=false",
        "--trainer.enable_progress_bar=false",
    )


def _without_places(config: Any) -> Any:
    """A configuration without what does not change the result: where it is written and what is shown."""
    plain = config.as_dict()
    plain.pop("config", None)
    for key in ("logger", "enable_progress_bar", "default_root_dir"):
        plain["trainer"].pop(key, None)
    return plain


def _varies(key: str, settings: Sequence[dict[str, Any]]) -> bool:
    return len({json.dumps(setting.get(key), sort_keys=True) for setting in settings}) > 1


def _label(setting: dict[str, Any], keys: Sequence[str]) -> str:
    """Short, readable and fit for a file name: `rank=4,length=64`."""
    parts = []
    for key in keys:
        if key in setting:
            value = setting[key]
            if isinstance(value, dict):
                value = value.get("class_path", json.dumps(value))
            text = value.rsplit(".", 1)[-1] if isinstance(value, str) and "/" not in value else str(value)
            parts.append(f"{key.rsplit('.', 1)[-1]}={text}")
    return re.sub(r"[^\w=.,+-]+", "_", ",".join(parts))[:120]


def _set_aside(folder: Path) -> Path | None:
    """Move what an unfinished attempt has left aside; returns where it is now, None where there was nothing."""
    if not folder.exists():
        return None
    attempt = next(n for n in itertools.count(1) if not folder.with_name(f"{folder.name}.unfinished-{n}").exists())
    return folder.rename(folder.with_name(f"{folder.name}.unfinished-{attempt}"))


def _checkpoint_in(folder: Path | None) -> Path | None:
    """What an attempt can be gone on from; None where there is nothing, or it failed by itself."""
    if folder is None or (folder / ERROR_NAME).exists():
        return None
    try:
        return newest_checkpoint(folder)
    except InputError:
        return None
