"""A grid file: read, expanded to cells, and every cell checked before anything runs."""

import errno
import hashlib
import itertools
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from pml.errors import InputError
from pml.lightning_cli import parse_run
from pml.own_classes import class_of
from pml.records import RECORD_NAME, Record, read_record
from pml.yaml_file import read_yaml

__all__ = ["ERROR_NAME", "Cell", "Grid", "expand", "read_grid", "resolve"]

log = logging.getLogger(__name__)

ERROR_NAME = "error.txt"


class Grid(pydantic.BaseModel):
    """Content of a grid file.

    Attributes:
        base: Configuration files of `pml fit` that every cell starts from, relative to the grid file.
        out: Parent of the cells' run folders, relative to the working directory.
        grid: Maps keys of `pml fit` to lists of values; every combination is a cell. A list of such mappings gives
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

    @pydantic.field_validator("grid")
    @classmethod
    def _days_are_text(cls, grid: list[dict[str, list[Any]]]) -> list[dict[str, list[Any]]]:
        # YAML reads 2026-01-31 as a date, but cells pass it on as a command-line argument.
        return [{key: _without_dates(values) for key, values in part.items()} for part in grid]


def _without_dates(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_dates(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_dates(item) for item in value]
    return value.isoformat() if isinstance(value, date) else value


AnyGrid = TypeVar("AnyGrid", bound=Grid)


@dataclass(frozen=True)
class Cell:
    """One run of a grid.

    Attributes:
        name: Name of its folder: the values that set it apart from the other cells, and a hash of its whole
            configuration, so that a cell with a changed configuration is a new cell. A folder with the same hash keeps
            its name, even if it comes from a version of the grid in which other keys varied.
        folder: Its run folder.
        arguments: Arguments of `pml fit` that run it.
        data: Backbone and data settings as JSON; cells with equal `data` have the same corpus.
    """

    name: str
    folder: Path
    arguments: tuple[str, ...]
    data: str = ""

    @property
    def record(self) -> Record | None:
        """The record of a run that has ended, diverged or not: running the cell again would give the same.

        A damaged record is reported in a warning and counts as none.
        """
        path = self.folder / RECORD_NAME
        try:
            record = read_record(path) if path.exists() else None
        except InputError as error:
            log.warning("%s; the cell counts as not done", error)
            return None
        return None if record is None or record.status == "interrupted" else record

    @property
    def error(self) -> str | None:
        """Error of a failed attempt in one line; None if none has failed."""
        try:
            return (self.folder / ERROR_NAME).read_text(encoding="utf-8").partition("\n")[0]
        except OSError as error:
            # Over NFS, another worker may have moved the folder aside while the file was being read.
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
                return None
            raise


def read_grid(path: Path, kind: type[AnyGrid] = Grid) -> AnyGrid:  # type: ignore[assignment]
    """Read and check a grid file.

    Args:
        path: The file.
        kind: Model that its content has to fit.

    Raises:
        InputError: If it cannot be read, is not YAML, or does not fit `kind`.
    """
    try:
        grid = kind.model_validate(read_yaml(path))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        expected = ", ".join(f"`{name}`" for name in kind.model_fields)
        message = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{path}: {where}: {message}; the file has the keys {expected}") from error
    for key, values in ((key, values) for part in grid.grid for key, values in part.items()):
        if not values:
            raise InputError(f"{path}: grid key {key} has no values")
    bases = [path.parent / base for base in grid.base]
    for base in bases:
        if not base.is_file():
            raise InputError(f"{path}: base {base}: no such file; paths are relative to the grid file")
    # Expanded as loggers do, so that both name the same folder.
    out = Path(os.path.expandvars(grid.out.expanduser()))
    return grid.model_copy(update={"base": bases, "out": out})


def expand(grid: Sequence[dict[str, list[Any]]]) -> list[dict[str, Any]]:
    """Every combination of values in each part of a grid; the last key varies fastest.

    Example:
        >>> expand([{"rank": [1, 2], "seed": [7]}])
        [{'rank': 1, 'seed': 7}, {'rank': 2, 'seed': 7}]
    """
    return [dict(zip(part, values, strict=True)) for part in grid for values in itertools.product(*part.values())]


def resolve(grid: Grid) -> list[Cell]:
    """Resolve a grid to its cells, each parsed as `pml fit` would parse it.

    Raises:
        InputError: If a cell, which the message names, has an unknown key or a bad value, or two cells are the same.
    """
    settings = expand(grid.grid)
    varying = [key for key in dict.fromkeys(k for s in settings for k in s) if _varies(key, settings)]
    folders = _folders(grid.out)
    base = tuple(itertools.chain.from_iterable(("--config", str(path)) for path in grid.base))
    cells: dict[str, Cell] = {}
    for setting in settings:
        try:
            own = tuple(_options(_with_whole_variables(setting, base)))
            config = parse_run([*base, *own])
            _check_record(config)
            _check_devices(config.trainer)
            for key, value in setting.items():
                _check_text(key, value, config)
        except InputError as error:
            raise InputError(f"cell {_label(setting, list(setting))}: {error}") from error
        digest = _digest(config)
        if digest in cells:
            raise InputError(f"the grid has the same cell twice: {cells[digest].name}; write each combination once")
        name = "-".join(filter(None, (_label(setting, varying), digest)))
        known = folders.get(digest, [])
        if known and name not in known:
            name = known[0]
        place = _place(grid.out, name, config.trainer)
        cells[digest] = Cell(name, grid.out / name, (*base, *own, *place), _data_of(config))
    return list(cells.values())


def _options(setting: Mapping[str, Any]) -> list[str]:
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in setting.items()]


def _check_record(config: Any) -> None:
    """Refuse a cell that would train and then leave no record in its own folder."""
    given = config.trainer.get("callbacks") or []
    given = given if isinstance(given, list) else [given]
    kind = import_module("callbacks").RunRecord
    recorders = [one.get("init_args") or {} for one in given if issubclass(class_of(one.class_path) or object, kind)]
    if not recorders:
        raise InputError(
            "trainer.callbacks has no callbacks.RunRecord, so the cell would leave no record and no adapter; expected "
            "one, since a list of callbacks replaces the default one"
        )
    if (folder := next((a["dirpath"] for a in recorders if a.get("dirpath") is not None), None)) is not None:
        raise InputError(f"RunRecord has dirpath {folder}; expected none, since each cell has a folder of its own")


def _check_devices(trainer: Any) -> None:
    """Refuse a cell of several processes, since Lightning starts them by running the command, a whole sweep, again."""
    devices = trainer.get("devices")
    nodes = trainer.get("num_nodes", 1)
    several = len(devices) > 1 if isinstance(devices, list) else devices not in (None, "auto", 1, "1")
    if several or nodes != 1:
        raise InputError(
            f"trainer.devices is {devices}, num_nodes {nodes}; expected one device for each cell: leave both out and "
            "use --workers, which runs a cell on each device, or train on several devices with pml fit"
        )


def _check_text(key: str, value: Any, config: Any) -> None:
    """Refuse a value that becomes another one, since a cell passes it on as a command-line argument."""
    node: Any = config
    try:
        for part in key.split("."):
            node = node[part] if part in node else node["init_args"][part]
    except (KeyError, TypeError):  # a part of a value that stands for the whole, such as a class
        return
    is_other_text = isinstance(node, str) and not isinstance(value, (str, list, dict))
    if is_other_text or (isinstance(value, str) and node is None):
        raise InputError(f"{key}: {value!r} would become {node!r}; expected text in quotes that reads as nothing else")


def _with_whole_variables(setting: Mapping[str, Any], base: Sequence[str]) -> Mapping[str, Any]:
    """A cell's values, with single chat-template variables merged into the mapping of all its template variables."""
    single = {key: value for key, value in setting.items() if ".template_kwargs." in key}
    if not single:
        return setting
    others = {key: value for key, value in setting.items() if key not in single}
    known = parse_run([*base, *_options(others)]).data.init_args.get("template_kwargs") or {}
    mapping = next(iter(single)).rpartition(".")[0]
    return {**others, mapping: {**known, **{key.rpartition(".")[2]: value for key, value in single.items()}}}


def _folders(out: Path) -> dict[str, list[str]]:
    """Names of the existing folders of cells, sorted, by the hash that they end with."""
    found: dict[str, list[str]] = {}
    for path in sorted(out.iterdir()) if out.is_dir() else []:
        if path.is_dir():
            found.setdefault(path.name.rpartition("-")[2], []).append(path.name)
    return found


def _data_of(config: Any) -> str:
    plain = config.as_dict()
    return json.dumps([plain["model"]["init_args"].get("backbone"), plain["data"]], sort_keys=True, default=str)


def _place(out: Path, name: str, trainer: Any) -> tuple[str, ...]:
    """Arguments that make a cell log to its own folder, whatever its configuration says, and take a single device."""
    # Left to itself, Lightning takes every GPU of the machine.
    one_device = () if isinstance(trainer.get("devices"), list) else ("--trainer.devices=1",)
    return (
        *one_device,
        "--trainer.logger=lightning.pytorch.loggers.TensorBoardLogger",
        f"--trainer.logger.save_dir={out}",
        f"--trainer.logger.name={name}",
        "--trainer.logger.version=",
        "--trainer.logger.default_hp_metric=false",
        "--trainer.enable_progress_bar=false",
    )


def _digest(config: Any) -> str:
    """Hash of the settings that can change the result: all but output paths and the progress bar."""
    plain = config.as_dict()
    plain.pop("config", None)
    for key in ("logger", "enable_progress_bar", "default_root_dir"):
        plain["trainer"].pop(key, None)
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:8]


def _varies(key: str, settings: Sequence[dict[str, Any]]) -> bool:
    return len({json.dumps(setting.get(key), sort_keys=True) for setting in settings}) > 1


def _label(setting: dict[str, Any], keys: Sequence[str]) -> str:
    """Short label of a cell that is valid as a file name, such as `rank=4,length=64`."""
    parts = []
    for key in keys:
        if key in setting:
            value = setting[key]
            if isinstance(value, dict):
                value = value.get("class_path", json.dumps(value))
            # A class is named by the last part of its path.
            text = re.sub(r"^(?:\w+\.)+(?=[A-Z]\w*$)", "", str(value))
            parts.append(f"{key.rsplit('.', 1)[-1]}={text}")
    # File systems limit the length of names in bytes.
    return re.sub(r"[^\w=.,+-]+", "_", ",".join(parts)).encode()[:120].decode(errors="ignore")
