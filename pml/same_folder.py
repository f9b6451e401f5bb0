"""A fit that goes on does so in the folder of its run, where its curves continue."""

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
"""Folder of a run that its checkpoints are in."""

WITH_FOLDERS = (TensorBoardLogger.__name__, CSVLogger.__name__)

GO_ON_BY = {"WandbLogger": "version", "MLFlowLogger": "run_id", "CometLogger": "experiment_key"}
"""Arguments by which loggers that keep runs elsewhere take one up again: what they call its version."""


def run_to_go_on_in(checkpoint: Path) -> Path | None:
    """The run that a checkpoint lies in and that has not ended; None where there is none.

    A run that has ended keeps its record, and what goes on from it gets a folder of its own.
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
    """What `logger_settings` needs to know of the loggers of a fit, for its checkpoints.

    Args:
        trainer: Of the fit.
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
    """Settings of loggers by which they go on where those of a run were.

    Args:
        asked: `trainer.logger` of the configuration: nothing, True, one with `class_path`, or a list.
        run: Folder of the run.
        checkpoint: What it goes on from.
    """
    if isinstance(asked, list):
        return [logger_settings(one, run, checkpoint) for one in asked]
    if not asked:
        return asked
    settings: dict[str, Any] = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger"} if asked is True else asked
    kind = str(settings["class_path"]).rpartition(".")[2]
    before = next((one for one in checkpoint.get("pml_loggers", []) if one["class"] == kind), None)
    arguments: dict[str, Any] = {}
    if kind in WITH_FOLDERS:
        given = (settings.get("init_args") or {}).get("save_dir")
        folder = _folder_of_logger(run, before["folder"], given) if before else run
        arguments = {"save_dir": str(folder.parent), "name": folder.name, "version": ""}
    elif kind in GO_ON_BY and before:
        arguments = {GO_ON_BY[kind]: before["version"]}
    made = {**settings, "init_args": {**(settings.get("init_args") or {}), **arguments}}
    if kind == TensorBoardLogger.__name__:
        # Readers of its files leave out what was logged after the checkpoint, since it is logged again.
        made["init_args"].pop("sub_dir", None)
        made["dict_kwargs"] = {**(settings.get("dict_kwargs") or {}), "purge_step": checkpoint["global_step"] + 1}
    return made


def _folder_of_logger(run: Path, name: str, save_dir: str | None) -> Path:
    """The folder that a checkpoint names for a logger.

    A checkpoint may be anyone's: a folder that is neither below its run nor below the logger's `save_dir` is not
    believed, and the logger goes on in the run's.
    """
    folder = Path(os.path.normpath(run / name))
    places = [run] if save_dir is None else [run, Path(save_dir)]
    if any(folder.resolve().is_relative_to(place.resolve()) for place in places):
        return folder
    log.warning("the checkpoint has a logger that wrote to %s, outside of its run; it goes on in %s", folder, run)
    return run


def keep_rows(logger: CSVLogger, last_step: int) -> None:
    """Give a CSV logger, which deletes what it finds in its folder, the rows that are there up to a step."""
    path = Path(logger.log_dir) / "metrics.csv"
    if not path.is_file():
        return
    with path.open(newline="") as file:
        rows = [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
    logger.experiment.metrics.extend(row for row in rows if int(row.get("step", 0)) <= last_step)
    logger.save()
