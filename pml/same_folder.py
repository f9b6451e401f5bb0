"""A resumed fit writes to the folder of its run, where its curves continue."""

import csv
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from pml.errors import InputError
from pml.records import RECORD_NAME, read_record

__all__ = ["keep_rows", "logger_settings", "loggers_of", "run_to_go_on_in"]

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
"""Name of the folder in a run that holds its checkpoints."""

WITH_FOLDERS = (TensorBoardLogger.__name__, CSVLogger.__name__)

GO_ON_BY = {"WandbLogger": "version", "MLFlowLogger": "run_id", "CometLogger": "experiment_key"}
"""Argument by which loggers that keep runs elsewhere resume one; its value is the logger's `version`."""


def run_to_go_on_in(checkpoint: Path) -> Path | None:
    """Folder of the unfinished run that a checkpoint belongs to; None if there is none.

    A finished run keeps its record, and a fit that resumes from it gets its own folder.
    """
    run = checkpoint.parent.parent
    if checkpoint.parent.name != CHECKPOINTS:
        return None
    try:
        ended = (run / RECORD_NAME).exists() and read_record(run / RECORD_NAME).status != "interrupted"
    except InputError:
        ended = True
    return None if ended else run


def loggers_of(trainer: Trainer, run: Path) -> list[dict[str, str]]:
    """Describe a fit's loggers for its checkpoints, so that `logger_settings` can continue them.

    Args:
        trainer: The fit's trainer.
        run: Folder of the run.
    """
    return [
        {
            "class": type(logger).__name__,
            "folder": os.path.relpath(logger.log_dir, run) if isinstance(logger, TensorBoardLogger | CSVLogger) else "",
            "version": str(logger.version),
        }
        for logger in trainer.loggers
    ]


def logger_settings(asked: Any, run: Path, checkpoint: Mapping[str, Any]) -> Any:
    """Settings that make loggers continue where those of a run stopped.

    Args:
        asked: `trainer.logger` of the configuration: nothing, True, one with `class_path`, or a list.
        run: Folder of the run.
        checkpoint: The checkpoint to resume from.
    """
    known = list(checkpoint.get("pml_loggers", []))
    if isinstance(asked, list):
        return [_settings_of_one(one, run, checkpoint, known) for one in asked]
    return _settings_of_one(asked, run, checkpoint, known)


def _settings_of_one(asked: Any, run: Path, checkpoint: Mapping[str, Any], known: list[Mapping[str, Any]]) -> Any:
    """Settings of one logger, which takes the first logger of its class from those that the checkpoint knows."""
    if not asked:
        return asked
    settings: dict[str, Any] = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger"} if asked is True else asked
    kind = str(settings["class_path"]).rpartition(".")[2]
    before = next((one for one in known if one["class"] == kind), None)
    if before is not None:
        known.remove(before)
    arguments: dict[str, Any] = {}
    if kind in WITH_FOLDERS:
        given = (settings.get("init_args") or {}).get("save_dir")
        folder = _folder_of_logger(run, before["folder"], given) if before else run
        arguments = {"save_dir": str(folder.parent), "name": folder.name, "version": ""}
    elif kind in GO_ON_BY and before:
        arguments = {GO_ON_BY[kind]: before["version"]}
    made = {**settings, "init_args": {**(settings.get("init_args") or {}), **arguments}}
    if kind == TensorBoardLogger.__name__:
        # TensorBoard then drops what was logged after the checkpoint, since those steps are logged again.
        made["init_args"].pop("sub_dir", None)
        made["dict_kwargs"] = {**(settings.get("dict_kwargs") or {}), "purge_step": checkpoint["global_step"] + 1}
    return made


def _folder_of_logger(run: Path, name: str, save_dir: str | None) -> Path:
    """The folder that a checkpoint names for a logger.

    A checkpoint may come from anyone. If the folder is neither below the run nor below the logger's `save_dir`, it is
    ignored and the logger goes on in the run's folder.
    """
    folder = Path(os.path.normpath(run / name))
    places = [run] if save_dir is None else [run, Path(save_dir)]
    if any(folder.resolve().is_relative_to(place.resolve()) for place in places):
        return folder
    log.warning("the checkpoint names a logger that wrote to %s, outside of its run; it goes on in %s", folder, run)
    return run


def keep_rows(logger: CSVLogger, last_step: int) -> None:
    """Keep a CSV logger's existing rows up to a step; the logger would delete its old file when it starts."""
    path = Path(logger.log_dir) / "metrics.csv"
    if not path.is_file():
        return
    with path.open(newline="") as file:
        rows = [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
    logger.experiment.metrics.extend(row for row in rows if int(row.get("step", 0)) <= last_step)
    logger.save()
