"""LightningCLI for memorising: what `pml fit|validate|test|predict` parse and run, and every cell of a sweep."""

import importlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

import jsonargparse
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only

from pml.errors import InputError
from pml.modules import Memorization
from pml.recall import gather_scores
from pml.run_folder import CONFIG_NAME, folder_of_loggers, use_corpus_of_run
from pml.token_results import PREDICTIONS_NAME, write_predictions

log = logging.getLogger(__name__)

__all__ = ["MemorizationCLI", "ignore_noise", "make_run", "parse_run", "prepare", "reason"]

ROOMS = ("data_modules", "callbacks")
"""Imported by name, so that short class names work on the command line; nothing in `pml` refers to what is in them."""

DEFAULTS: dict[str, Any] = {
    "trainer.logger": {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": "runs", "name": "fit", "default_hp_metric": False},
    },
    "trainer.callbacks": [
        {"class_path": "callbacks.VerbatimRecall"},
        {"class_path": "callbacks.TokenThresholds"},
        {"class_path": "callbacks.StopWhenRecalled"},
        {"class_path": "callbacks.Generalization"},
        {"class_path": "callbacks.Harm"},
        # Short runs need no checkpoint: what they made is in the run folder when they end.
        {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"train_time_interval": "0:15:00", "save_last": True},
        },
        {"class_path": "callbacks.RunRecord"},
    ],
    "trainer.max_epochs": 200,
    "trainer.gradient_clip_val": 1.0,
    # An epoch may be one batch: validating or logging at each would cost as much as training.
    "trainer.check_val_every_n_epoch": 10,
    "trainer.log_every_n_steps": 10,
    "trainer.num_sanity_val_steps": 0,
    "trainer.enable_model_summary": False,
    # The corpus shares itself out among ranks without repeating examples.
    "trainer.use_distributed_sampler": False,
}

NOISE = (
    ".*does not have many workers.*",
    ".*module.s. in eval mode at the start of training.*",
    ".*LightningCLI's args parameter is intended to run from within Python.*",
    ".*smaller than the logging interval.*",
    ".*`isinstance.treespec, LeafSpec.` is deprecated.*",
    ".*It will use the implementation from `LightningModule` instance.*",
    ".*`is_gradient_checkpointing` is deprecated.*",
)
"""Warnings of libraries about things that are meant."""

CHATTER = ("lightning.pytorch", "lightning.fabric")
"""Loggers that greet, advise and tell what every run does."""

ATTEMPTS = re.compile(
    r"(Does not validate against any of the Union subtypes|Subtypes: .*|Errors:|Given value( type)?: .*"
    r"|Expected a <class 'NoneType'>.*)?$"
)
"""Lines in which jsonargparse tells what it tried, not what is wrong."""


class _SaveConfig(SaveConfigCallback):
    """Saves the configuration of fits alone: evaluating in a run's folder leaves the configuration of the run there.

    It goes where the results go. A fit that has neither a logger nor a folder of its own would write into the current
    one.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or self.already_saved:
            return
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        record: Any = next((callback for callback in callbacks if type(callback).__name__ == "RunRecord"), None)
        if trainer.loggers or (record is not None and record.dirpath):
            folder = record.folder if record is not None else folder_of_loggers(trainer)
            if trainer.is_global_zero:
                folder.mkdir(parents=True, exist_ok=True)
                path = str(folder / CONFIG_NAME)
                self.parser.save(self.config, path, skip_none=False, overwrite=True, multifile=self.multifile)
        self.already_saved = True


class MemorizationCLI(LightningCLI):
    """LightningCLI for memorising: any `Memorization`, any corpus, and defaults that leave a complete run folder.

    Args:
        args: What to parse in place of `sys.argv`.
        run: Whether a subcommand is expected and run; otherwise `args` are those of `pml fit`, everything is made, and
            `run_fit` does what is left.
    """

    def __init__(self, args: Sequence[str] | None = None, run: bool = True) -> None:
        self._fit_alone = not run
        # A key that is nearly right is a mistake, not an abbreviation.
        strict: dict[str, Any] = {"exit_on_error": False, "allow_abbrev": False}
        subcommands = {name: dict(strict) for name in LightningCLI.subcommands()}
        super().__init__(
            Memorization,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=42,
            auto_configure_optimizers=False,
            save_config_callback=_SaveConfig,
            # RunRecord refuses the folder of a run; what an unfinished one has left may be written over.
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"prog": "pml", **strict, **subcommands},
            args=None if args is None else list(args),
            run=run,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.set_defaults(DEFAULTS)
        if self._fit_alone:
            # All keys of `pml fit`, so that a configuration that it has printed or saved can be the base of a grid.
            parser.add_method_arguments(Trainer, "fit", skip=LightningCLI.subcommands()["fit"])

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self._names_data = any(str(argument).startswith("--data") for argument in args or ())
        _make_own_classes_importable(args or ())
        try:
            super().parse_arguments(parser, args)
        except jsonargparse.ArgumentError as error:
            raise InputError(reason(error)) from error

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (TypeError, ValueError) as error:
            # Constructors only look at what they are given, so what one refuses is the user's.
            raise InputError(reason(error)) from error

    def make_ready(self) -> None:
        """Load the backbone and make the corpus, so that what is wrong with them shows before a folder is made.

        Raises:
            InputError: If the backbone, the adapter, the corpus or the checkpoint cannot be had.
        """
        checkpoint = self._options.get("ckpt_path")
        if checkpoint == "last":
            raise InputError("ckpt_path is last, and a fit starts in a folder of its own; name the file to go on from")
        _refuse_missing(checkpoint)
        self.model.configure_model()
        self._build()

    def make_ready_to_evaluate(self) -> None:
        """Load what is to be evaluated: the adapter of the run that is named, or a checkpoint.

        Raises:
            InputError: If neither is named, or it cannot be had.
        """
        folder = self._run_folder()
        checkpoint = self._options.get("ckpt_path")
        if checkpoint in ("last", "best") and folder is not None:
            checkpoint = self._options["ckpt_path"] = str(_newest_checkpoint(folder))
        if checkpoint is None and folder is None:
            raise InputError(
                f"nothing to {self.subcommand}: expected a run's folder, as in `pml {self.subcommand} RUN`, its "
                "configuration (--config RUN/config.yaml), or a checkpoint (--ckpt_path FILE)"
            )
        if checkpoint is not None or folder is None:
            _refuse_missing(checkpoint)
            self.model.configure_model()
        else:
            self.model.load_adapter(folder / "adapter")
        if folder is not None and not self._names_data:
            use_corpus_of_run(folder, self.datamodule, self.model)
        else:
            self._build()

    def predict(self, **options: Any) -> None:
        """What `pml predict` does: score every target token, and write a table of them."""
        parts: list[Any] = self.trainer.predict(**options) or []
        scores = gather_scores(parts)
        if self.trainer.is_global_zero:
            folder = self._run_folder() or Path(self.trainer.log_dir or self.trainer.default_root_dir)
            path = _unused(folder / PREDICTIONS_NAME)
            tokenizer = self.model.tokenizer
            write_predictions(path, self.datamodule.corpus, scores, lambda token: str(tokenizer.decode([token])))
            log.info("predictions: %s", path)

    @property
    def _options(self) -> Any:
        return self.config_init.get(str(self.subcommand), self.config_init)

    def _run_folder(self) -> Path | None:
        """The run whose configuration was given; None where there is none beside an adapter."""
        for config in self._options.get("config") or []:
            folder = Path(str(config)).parent
            if (folder / "adapter" / "adapter_config.json").is_file():
                return folder
        return None

    def _build(self) -> None:
        if missing := [name for name in ("build", "corpus", "held_out") if not hasattr(type(self.datamodule), name)]:
            raise InputError(
                f"data is a {type(self.datamodule).__name__}, which has no {' and no '.join(missing)}; derive it from "
                "data_modules.MemorizationDataModule and write make_corpus"
            )
        self.datamodule.build(self.model.tokenizer, self.model.vocab_size, self.model.max_positions)

    def run_fit(self) -> None:
        """What `pml fit` does with what has been made."""
        self.make_ready()
        options = {key: self.config_init[key] for key in ("ckpt_path", "weights_only")}
        self.trainer.fit(self.model, datamodule=self.datamodule, **options)

    before_fit = make_ready
    before_validate = before_test = before_predict = make_ready_to_evaluate


def _make_own_classes_importable(args: Sequence[str]) -> None:
    """Let people name classes of their own that lie in the working directory or beside a configuration."""
    configs = [b if a == "--config" else a.removeprefix("--config=") for a, b in pairwise([*map(str, args), ""])]
    named = [c for c, a in zip(configs, map(str, args), strict=True) if a.startswith("--config")]
    for folder in (Path.cwd(), *(Path(config).resolve().parent for config in named)):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))  # last, so that nothing there hides a package


def _refuse_missing(checkpoint: str | None) -> None:
    if checkpoint not in (None, "best", "hpc", "registry") and not Path(str(checkpoint)).is_file():
        raise InputError(f"ckpt_path is {checkpoint}; expected the file of a checkpoint")


def _newest_checkpoint(folder: Path) -> Path:
    files = list((folder / "checkpoints").glob("*.ckpt"))
    if not files:
        raise InputError(f"{folder}: no checkpoint in it; leave ckpt_path out to take the adapter of the run's end")
    return max(files, key=lambda path: (path.name == "last.ckpt", path.stat().st_mtime))


def _unused(path: Path) -> Path:
    """The path, or where there is a file already one with the first free number."""
    paths = (path, *(path.with_stem(f"{path.stem}_{number}") for number in range(1, 1000)))
    return next(candidate for candidate in paths if not candidate.exists())


class _ParsedRun(MemorizationCLI):
    """Makes what the configuration names, to see whether it can be made, and stops short of a trainer."""

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        return None


def parse_run(args: Sequence[str]) -> jsonargparse.Namespace:
    """The complete configuration that arguments of `pml fit` resolve to; nothing is loaded.

    Raises:
        InputError: If it does not parse, or a class refuses its arguments.
    """
    prepare()
    return _ParsedRun(args, run=False).config


def make_run(args: Sequence[str]) -> tuple[Memorization, Any]:
    """The module and the data module that arguments of `pml fit` name; neither has loaded anything.

    Raises:
        InputError: If they do not parse, or a class refuses its arguments.
    """
    prepare()
    made = _ParsedRun(args, run=False)
    return made.model, made.datamodule


def reason(error: BaseException) -> str:
    """What is wrong, on one line: the InputError behind an exception, else its message without what was tried."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, InputError):
            return " ".join(str(cause).split())
        cause = cause.__cause__ or cause.__context__
    found = re.match(r'(Parser key "[^"]*":)?(.*)', str(error), re.DOTALL)
    where, message = (found[1] or "", found[2]) if found else ("", str(error))
    lines = [line.strip().lstrip("- ") for line in message.splitlines()]
    said = "; ".join(dict.fromkeys(line for line in lines if not ATTEMPTS.match(line)))
    return " ".join(f"{where} {said or message}".replace(":;", ":").split())


def prepare() -> None:
    """What every command needs before a library speaks up: importable rooms, and a quiet stderr with our own lines."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in CHATTER:
        logging.getLogger(name).setLevel(logging.WARNING)
    for room in ("callbacks", "pml"):
        own = logging.getLogger(room)
        if not any(isinstance(handler, _ToStderr) for handler in own.handlers):
            own.setLevel(logging.INFO)
            own.addHandler(_ToStderr())
    ignore_noise()
    for room in ROOMS:
        importlib.import_module(room)


def ignore_noise() -> None:
    """Do not show what libraries warn of and is meant."""
    for message in NOISE:
        warnings.filterwarnings("ignore", message)


class _ToStderr(logging.StreamHandler[TextIO]):
    """Writes each line once, from one rank: cells of a grid, and ranks, all say the same of the machine they are on."""

    def __init__(self) -> None:
        super().__init__()
        self._written: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        if line not in self._written and (getattr(rank_zero_only, "rank", 0) == 0 or record.levelno >= logging.WARNING):
            self._written.add(line)
            super().emit(record)

    # A progress bar puts its own stderr in place while it is drawn.
    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, _: TextIO) -> None:
        pass
