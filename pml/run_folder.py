"""What a run leaves in its folder besides its results: its configuration, and its corpus as it was trained on."""

import copy
import itertools
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from pml.atomic import whole_file
from pml.corpus import Corpus
from pml.corpus_file import CORPUS_NAME, HELD_OUT_NAME, corpus_hash, read_corpus
from pml.encoding import ENCODING_VERSION
from pml.errors import InputError
from pml.modules import Memorization
from pml.plain import as_plain
from pml.records import RECORD_NAME, Record, read_record

__all__ = [
    "CONFIG_NAME",
    "check_corpus",
    "check_records",
    "folder_of_loggers",
    "folder_of_run",
    "recorded_folder",
    "run_folder",
    "use_corpus_of_run",
    "write_configuration",
]

log = logging.getLogger(__name__)

CONFIG_NAME = "config.yaml"
FROM_PYTHON = "# Of a run that was made from Python.\n"


def run_folder(path: Path) -> Path:
    """The run folder that is meant by it, or by the adapter folder or the record in it."""
    return path.parent if path.name in ("adapter", RECORD_NAME, CONFIG_NAME) else path


def write_configuration(folder: Path, module: Memorization, data: Any, replace: bool = False) -> None:
    """Write what a run made from Python was made with, as the command line does for its own runs.

    Args:
        folder: The run's folder; a configuration that the command line has written stays as it is.
        module: The run's module.
        data: The run's data module.
        replace: Whether it does not, since it is of an earlier run.
    """
    path = folder / CONFIG_NAME
    if path.exists() and not replace and not path.read_text(encoding="utf-8").startswith(FROM_PYTHON):
        return
    made_with = {
        name: {
            "class_path": f"{type(made).__module__}.{type(made).__qualname__}",
            "init_args": as_plain(dict(made.hparams)),
        }
        for name, made in (("model", module), ("data", data))
    }
    try:
        content = yaml.safe_dump(made_with, sort_keys=False)
    except yaml.YAMLError:
        log.warning("%s: made with arguments that YAML has no form for, so commands cannot open this run", folder)
        return
    with whole_file(path) as file:
        file.write((FROM_PYTHON + content).encode())


def recorded_folder(trainer: Trainer) -> Path | None:
    """The folder that a callback of the trainer keeps the run in: the one whose `run_folder` says so, or None."""
    folders = (getattr(callback, "run_folder", None) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    return next((folder for folder in folders if folder is not None), None)


def folder_of_run(trainer: Trainer) -> Path:
    """Where a run's files go: the folder that its record is kept in, or that of the loggers. Takes all ranks."""
    return recorded_folder(trainer) or folder_of_loggers(trainer)


def folder_of_loggers(trainer: Trainer) -> Path:
    """The folder that a run has to itself. Takes all ranks.

    It is that of the first logger which makes one for each run, TensorBoard's or the CSV one, whatever stands before
    it. Loggers that share one folder among runs, such as those of W&B and MLflow, get `NAME/VERSION` below it, as
    Lightning does for their checkpoints. Without a logger it is the trainer's `default_root_dir`.
    """
    folder = _own_folder(trainer) if trainer.is_global_zero else ""
    return Path(trainer.strategy.broadcast(folder))


def _own_folder(trainer: Trainer) -> str:
    for logger in trainer.loggers:
        if isinstance(logger, (TensorBoardLogger, CSVLogger)):
            return str(logger.log_dir)
    if not trainer.loggers:
        return str(trainer.default_root_dir)
    first = trainer.loggers[0]
    # Some loggers have no version until their experiment has begun.
    _ = getattr(first, "experiment", None)
    shared = Path(first.save_dir or trainer.default_root_dir) / str(first.name or "fit")
    if isinstance(first.version, str) and first.version:
        return str(shared / first.version)
    if first.version is not None:
        return str(shared / f"version_{first.version}")
    return str(next(folder for n in itertools.count() if not (folder := shared / f"version_{n}").exists()))


def use_corpus_of_run(folder: Path, data: Any, module: Memorization) -> None:
    """Give a data module the corpus that a run was trained on.

    It comes from the run's own folder, so that a source that was moved or edited changes nothing; a source that is now
    another is said. A run from before runs kept their corpus has it made anew.

    Args:
        folder: The run's folder.
        data: What made the corpus.
        module: The run's module.

    Raises:
        InputError: If the corpus or the backbone is not the one that the record is of.
    """
    record = read_record(folder / RECORD_NAME) if (folder / RECORD_NAME).is_file() else None
    made = (module.tokenizer, module.vocab_size, module.max_positions)
    if (folder / CORPUS_NAME).is_file() and hasattr(data, "use"):
        held_out = folder / HELD_OUT_NAME
        data.use(read_corpus(folder / CORPUS_NAME), read_corpus(held_out) if held_out.is_file() else None)
        if _source_changed(data, made):
            log.warning("%s: the data has changed since this run; what it was trained on is asked for", folder)
    else:
        data.build(*made)
    if record is not None:
        check_corpus(data.corpus, record, folder)
        _check_backbone(module, record, folder)


def check_corpus(corpus: Corpus, record: Record, folder: Path) -> None:
    """Refuse a corpus that is not the one that a record is of.

    Args:
        corpus: What is there now.
        record: The record.
        folder: Where it lies, for the message.

    Raises:
        InputError: If their hashes differ.
    """
    if corpus.content_hash == record.corpus_hash:
        return
    older = (
        f" (text was encoded by other rules then, version {record.corpus_encoding}, now {ENCODING_VERSION})"
        if record.corpus_encoding != ENCODING_VERSION
        else ""
    )
    raise InputError(
        f"{folder}: the data has changed since this run was trained: the corpus {corpus.name!r} now has the hash "
        f"{corpus.content_hash[:12]}, the record {record.corpus_hash[:12]}{older}; restore the data, or run it again "
        "in another folder"
    )


def _check_backbone(module: Memorization, record: Record, folder: Path) -> None:
    """Refuse a backbone that is not the one that a record is of: the adapter was trained on other weights."""
    now = module.backbone.content_hash
    if now != record.backbone_hash:
        raise InputError(
            f"{folder}: this run was trained on {record.backbone} with the hash {record.backbone_hash[:12]}; "
            f"{module.backbone_name} has the hash {now[:12]}; name the backbone that it was trained on, or run it again"
        )


def check_records(records: Mapping[Path, Record]) -> list[str]:
    """Refuse records beside another corpus than their own, and say which runs are of different versions of one corpus.

    Args:
        records: By the folder they are in.

    Returns:
        A sentence for each corpus that was edited between runs.

    Raises:
        InputError: If the corpus in a folder is not the one that its record is of.
    """
    versions: dict[str, dict[str, Path]] = {}
    for folder, record in records.items():
        if (folder / CORPUS_NAME).is_file() and corpus_hash(folder / CORPUS_NAME) != record.corpus_hash:
            raise InputError(
                f"{folder}: {CORPUS_NAME} is not the corpus that its record is of; leave this run out, or run it again"
            )
        if not (record.corpus_settings.get("path") or record.corpus_settings.get("dataset")):
            continue  # made up, and so the same whenever its settings are
        made_with = [record.corpus, record.corpus_settings, record.corpus_encoding, record.backbone_hash]
        version = versions.setdefault(json.dumps(made_with, sort_keys=True, default=str), {})
        version.setdefault(record.corpus_hash, folder)
    return [
        f"the data of {' and '.join(map(str, folders.values()))} was changed between these runs; they are not on the "
        "same corpus"
        for folders in versions.values()
        if len(folders) > 1
    ]


def _source_changed(data: Any, made: tuple[Any, ...]) -> bool:
    """Whether a corpus from files would now be another; one whose files are elsewhere has not changed."""
    if (paths := getattr(data, "path", None)) is None:
        return False
    if not all(Path(path).exists() for path in ([paths] if isinstance(paths, str | Path) else paths)):
        return False
    again = copy.copy(data)
    try:
        return bool(again.build(*made).content_hash != data.corpus.content_hash)
    except InputError:
        return True
