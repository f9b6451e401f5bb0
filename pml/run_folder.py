"""What a run keeps in its folder besides its results: its configuration, and the corpus that it was trained on."""

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
    """The run folder, given as itself or by its adapter folder, record or configuration."""
    if path.name in (RECORD_NAME, CONFIG_NAME):
        return path.parent
    # A run folder may itself be called adapter.
    is_run = (path / RECORD_NAME).exists() or (path / CONFIG_NAME).exists()
    return path.parent if path.name == "adapter" and not is_run else path


def write_configuration(folder: Path, module: Memorization, data: Any, replace: bool = False) -> None:
    """Write the configuration of a run made from Python, as the command line does for its own runs.

    Args:
        folder: The run's folder; a configuration that the command line wrote there is kept.
        module: The run's module.
        data: The run's data module.
        replace: Overwrite such a configuration, since it belongs to an earlier run.
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
        log.warning("%s: made with arguments that YAML cannot express, so commands cannot open this run", folder)
        return
    with whole_file(path) as file:
        file.write((FROM_PYTHON + content).encode())


def recorded_folder(trainer: Trainer) -> Path | None:
    """The folder that a callback keeps the run in: the first `run_folder` among the callbacks; None without one."""
    folders = (getattr(callback, "run_folder", None) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    return next((folder for folder in folders if folder is not None), None)


def folder_of_run(trainer: Trainer) -> Path:
    """The folder for a run's files: that of its record, otherwise that of its loggers. Takes all ranks."""
    return recorded_folder(trainer) or folder_of_loggers(trainer)


def folder_of_loggers(trainer: Trainer) -> Path:
    """The folder that a run has to itself. Takes all ranks.

    It is that of the first TensorBoard or CSV logger, which make a folder for each run, even if other loggers come
    first. Loggers that share one folder among runs, such as those of W&B and MLflow, get `NAME/VERSION` below it, as
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

    It is read from the run's own folder, so that moving or editing its source changes nothing; a warning says if the
    source was edited. Without a corpus in the folder, the data module builds it.

    Args:
        folder: The run's folder.
        data: The data module that made the corpus.
        module: The run's module.

    Raises:
        InputError: If the corpus or the backbone is not the one in the run's record.
    """
    record = read_record(folder / RECORD_NAME) if (folder / RECORD_NAME).is_file() else None
    made = (module.tokenizer, module.vocab_size, module.max_positions)
    if (folder / CORPUS_NAME).is_file() and hasattr(data, "use"):
        held_out = folder / HELD_OUT_NAME
        data.use(read_corpus(folder / CORPUS_NAME), read_corpus(held_out) if held_out.is_file() else None)
        if _source_changed(data, made):
            log.warning("%s: the data has changed since this run; the corpus that it was trained on is used", folder)
    else:
        data.build(*made)
    if record is not None:
        check_corpus(data.corpus, record, folder)
        _check_backbone(module, record, folder)


def check_corpus(corpus: Corpus, record: Record, folder: Path) -> None:
    """Refuse a corpus that is not the one in a run's record.

    Args:
        corpus: The present corpus.
        record: The run's record.
        folder: The run's folder, for the message.

    Raises:
        InputError: If their hashes differ.
    """
    if corpus.content_hash == record.corpus_hash:
        return
    older = (
        f" (text was then encoded by rules of version {record.corpus_encoding}, now {ENCODING_VERSION})"
        if record.corpus_encoding != ENCODING_VERSION
        else ""
    )
    raise InputError(
        f"{folder}: the data has changed since this run was trained: the corpus {corpus.name!r} now has the hash "
        f"{corpus.content_hash[:12]}, the record {record.corpus_hash[:12]}{older}; restore the data, or run it again "
        "in another folder"
    )


def _check_backbone(module: Memorization, record: Record, folder: Path) -> None:
    """Refuse a backbone that is not the one in the record: the adapter was trained on other weights."""
    now = module.backbone.content_hash
    if now != record.backbone_hash:
        raise InputError(
            f"{folder}: this run was trained on {record.backbone} with the hash {record.backbone_hash[:12]}; "
            f"{module.backbone_name} has the hash {now[:12]}; name the backbone that it was trained on, or run it again"
        )


def check_records(records: Mapping[Path, Record]) -> list[str]:
    """Refuse records beside another corpus than their own, and find runs on different versions of one corpus.

    Args:
        records: Records by run folder.

    Returns:
        One sentence per corpus that was edited between runs.

    Raises:
        InputError: If the corpus in a folder is not the one in its record.
    """
    versions: dict[str, dict[str, Path]] = {}
    for folder, record in records.items():
        if (folder / CORPUS_NAME).is_file() and corpus_hash(folder / CORPUS_NAME) != record.corpus_hash:
            raise InputError(
                f"{folder}: {CORPUS_NAME} is not the corpus that its record names; leave this run out, or run it again"
            )
        if not (record.corpus_settings.get("path") or record.corpus_settings.get("dataset")):
            continue  # generated, so equal settings give an equal corpus
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
    """Whether a corpus from files would differ or fail if built again; with a file missing it counts as unchanged."""
    if (paths := getattr(data, "path", None)) is None:
        return False
    if not all(Path(path).exists() for path in ([paths] if isinstance(paths, str | Path) else paths)):
        return False
    again = copy.copy(data)
    try:
        return bool(again.build(*made).content_hash != data.corpus.content_hash)
    except InputError:
        return True
