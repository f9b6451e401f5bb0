"""LightningCLI for memorising: parses and runs `pml fit|validate|test|predict` and the cells of a sweep."""

import importlib
import logging
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import jsonargparse
import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger

from pml.arguments import CONFIG_OPTIONS, check_files, check_template_kwargs, files_given, limit_of, names_data
from pml.atomic import whole_file
from pml.checkpoints import (
    FOLDER_NAME,
    Checkpoints,
    StopsAtSteps,
    newest_checkpoint,
    read_checkpoint,
    with_own_connectors,
)
from pml.disk import DiskError, disk_failure
from pml.errors import InputError, reason
from pml.fit_config import check_configuration
from pml.frozen_layers import move_backbone
from pml.modules import Memorization
from pml.own_classes import check_class_of_checkpoint, make_importable
from pml.parsing import keep_whole_numbers_whole, patch_text_parsing
from pml.progress import FitProgress, SayWhyItEnded, is_interactive
from pml.quiet import keep_quiet
from pml.recall import gather_scores
from pml.run_folder import CONFIG_NAME, folder_of_loggers, recorded_folder, use_corpus_of_run
from pml.same_folder import keep_rows, logger_settings, run_to_go_on_in
from pml.same_model import refuse_other_model
from pml.stopping import Stopped, at_step_ends
from pml.token_results import PREDICTIONS_NAME, write_predictions

log = logging.getLogger(__name__)

__all__ = ["MemorizationCLI", "make_run", "parse_run", "prepare"]

WRONG_SETTINGS = ("Early stopping conditioned on metric", "`val_check_interval`")
"""From Lightning's messages about settings that it can check only once it has batches and metrics."""

CLASS_PACKAGES = ("data_modules", "callbacks")
"""Packages imported by name, so that short class names work on the command line; `pml` itself does not use them."""

DEFAULTS = Path(__file__).with_name("fit_defaults.yaml")


class _SaveConfig(SaveConfigCallback):
    """Saves the configuration of fits only, so that evaluating a run does not overwrite the one in its folder.

    The file goes where the results go. A fit with neither a logger nor a recorded folder saves none, since it would
    land in the working directory.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or self.already_saved:
            return
        own = recorded_folder(trainer)
        if trainer.loggers or own is not None:
            folder = own or folder_of_loggers(trainer)
            if trainer.is_global_zero:
                config = self.config.clone()
                if config.get("ckpt_path") is not None:
                    # A fit of the saved configuration is another run, which starts anew.
                    config["ckpt_path"] = None
                with whole_file(folder / CONFIG_NAME) as file:
                    file.write(self.parser.dump(config, skip_unset=False, skip_validation=True).encode())
        self.already_saved = True


class MemorizationCLI(LightningCLI):
    """LightningCLI for memorising: any `Memorization`, any corpus, and defaults that leave a complete run folder.

    Args:
        args: Arguments to parse; None takes those of `sys.argv`.
        run: Run the subcommand that `args` begin with; otherwise `args` are those of `pml fit`, and `run_fit` fits.
    """

    _parsers: ClassVar[dict[tuple[Any, ...], dict[str, Any]]] = {}
    """Parsers shared by all fits of a process, such as grid cells; making one takes a fifth of the time of parsing."""

    def __init__(self, args: Sequence[str] | None = None, run: bool = True) -> None:
        self._without_subcommand = not run
        self._resumed_from: tuple[Path, dict[str, Any]] | None = None
        asked = str(args[0]) if args else ""
        # Making a parser is slow, so make only the one for the requested subcommand.
        self._commands = {n: skip for n, skip in LightningCLI.subcommands().items() if asked in (n, "")}
        check_files(args or ())
        check_template_kwargs(args or ())
        # An incomplete key is a mistake, not an abbreviation.
        strict: dict[str, Any] = {"exit_on_error": False, "allow_abbrev": False}
        subcommands = {name: dict(strict) for name in self._commands}
        super().__init__(
            Memorization,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=42,
            auto_configure_optimizers=False,
            save_config_callback=_SaveConfig,
            # RunRecord refuses the folder of a finished run; files of an unfinished one may be overwritten.
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"prog": "pml", **strict, **subcommands},
            args=None if args is None else list(args),
            run=run,
        )

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        made = ("parser", "_subcommand_parsers", "_subcommand_method_arguments")
        key = (self._without_subcommand, *self._commands)
        if key not in self._parsers:
            super().setup_parser(*args, **kwargs)
            self._parsers[key] = {name: getattr(self, name) for name in made if hasattr(self, name)}
        vars(self).update(self._parsers[key])

    def _add_instantiators(self) -> None:
        # The cached parser keeps them and outlives this fit, so it must not hold the model.
        LightningCLI._add_instantiators(weakref.proxy(self))

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The requested subcommand, with the arguments that it does not take."""
        return self._commands

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        defaults = yaml.safe_load(DEFAULTS.read_text(encoding="utf-8"))
        parser.set_defaults({f"trainer.{name}": value for name, value in defaults["trainer"].items()})
        if self._without_subcommand:
            # All keys of `pml fit`, so that a configuration that it printed or saved can be the base of a grid.
            parser.add_method_arguments(Trainer, "fit", skip=LightningCLI.subcommands()["fit"])

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self._arguments = list(args or ())
        make_importable([Path.cwd(), *(path.resolve().parent for path in files_given(args or (), CONFIG_OPTIONS))])
        try:
            super().parse_arguments(parser, args)
        except (jsonargparse.ArgumentError, ValueError, TypeError, RecursionError) as error:
            raise InputError(reason(error)) from error
        check_configuration(self._parsed.as_dict(), self.config.get("subcommand"))

    def _parse_ckpt_path(self) -> None:
        """Take the model's settings from a checkpoint, and refuse arguments and files that contradict them."""
        options = self._parsed
        if options.get("weights_only") is False:
            raise InputError("weights_only is false; checkpoints are read as data alone, so no code in them runs")
        if (given := options.get("ckpt_path")) is None:
            return
        if given == "best":
            raise InputError("ckpt_path is best; expected `last`, the newest checkpoint, or a checkpoint file")
        if given == "last":
            folders = self._config_folders()
            with_checkpoints = [folder for folder in folders if (folder / FOLDER_NAME).is_dir()]
            if not folders:
                raise InputError(
                    f"ckpt_path is {given}, but no run is given; expected its configuration too "
                    "(--config RUN/config.yaml), or a checkpoint file"
                )
            options["ckpt_path"] = str(newest_checkpoint((with_checkpoints or folders[-1:])[0]))
        checkpoint = read_checkpoint(Path(options["ckpt_path"]))
        made_with = checkpoint.get("hyper_parameters", {})
        check_class_of_checkpoint(Path(options["ckpt_path"]), made_with, options.get("model.class_path"))
        refuse_other_model(self._arguments, made_with)
        if self.config.get("subcommand") in ("fit", None) and (run := run_to_go_on_in(Path(options["ckpt_path"]))):
            self._resumed_from = run, checkpoint
        super()._parse_ckpt_path()

    def _dump_config(self) -> None:
        # Only model and data, as hyperparameters; Lightning would also dump the trainer and validate everything again.
        if not hasattr(self, "config_dump"):
            made = jsonargparse.Namespace({name: self._parsed[name] for name in ("model", "data")})
            parser = self._parser(self.config.get("subcommand"))
            self.config_dump = yaml.safe_load(parser.dump(made, skip_unset=False, skip_validation=True))

    def instantiate_classes(self) -> None:
        options = self._parsed
        asked = options["trainer.logger"]
        # A cell always has a logger given, but its folder is also the one in which it resumes.
        places = not self._without_subcommand and any(str(a).startswith("--trainer.logger") for a in self._arguments)
        try:
            if self._resumed_from is not None and not places:
                options["trainer.logger"] = logger_settings(_plain(asked), *self._resumed_from)
            super().instantiate_classes()
            if self._resumed_from is not None:
                self.model.resume_folder = self._resumed_from[0]
        except (TypeError, ValueError) as error:
            # Constructors only check their arguments, so an error is the user's.
            raise InputError(reason(error)) from error
        finally:
            # Save the logger as requested: a fit of the saved configuration is another run.
            options["trainer.logger"] = asked

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer, with a progress bar if someone watches, checkpoints, and a final line on why the fit ended."""
        config = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        callbacks = list(config["callbacks"] or [])
        if not is_interactive() and not any(isinstance(callback, ProgressBar) for callback in callbacks):
            config["enable_progress_bar"] = False
        if self.subcommand in ("fit", None):
            # First, so that it prints before other callbacks measure for a while.
            callbacks.insert(0, SayWhyItEnded())
            if config["enable_progress_bar"] in (None, True):
                callbacks.append(FitProgress())
            if config["enable_checkpointing"] is False or config["fast_dev_run"]:
                callbacks.append(StopsAtSteps())
            elif not any(isinstance(callback, Checkpoints) for callback in callbacks):
                callbacks.append(Checkpoints())
        trainer = with_own_connectors(super().instantiate_trainer(**{**config, "callbacks": callbacks}))
        if self._resumed_from is not None and trainer.is_global_zero:
            for logger in trainer.loggers:
                if isinstance(logger, CSVLogger):
                    keep_rows(logger, self._resumed_from[1]["global_step"])
        return trainer

    def make_ready(self) -> None:
        """Load the backbone and make the corpus, so that errors in them appear before a run folder is created.

        Raises:
            InputError: If the backbone, the adapter or the corpus cannot be made.
        """
        # A guard runs text through the model, which is slow on a CPU. With several processes, some have yet to start.
        if self.trainer.world_size == 1:
            move_backbone(self.model, self.trainer.strategy.root_device)
        self.model.configure_model()
        self._build()

    def make_ready_to_evaluate(self) -> None:
        """Load the model to evaluate, with the adapter of the given run or from a checkpoint, and its corpus.

        Raises:
            InputError: If neither is given, or it cannot be loaded.
        """
        limit = limit_of(str(self.subcommand))
        if getattr(self.trainer, limit) == 0:
            raise InputError(f"trainer.{limit} is 0, so nothing is left to {self.subcommand}; raise it")
        folder = self._run_folder()
        checkpoint = self._options.get("ckpt_path")
        if checkpoint is None and folder is None:
            raise InputError(
                f"nothing to {self.subcommand}: expected a run's folder, as in `pml {self.subcommand} RUN`, its "
                "configuration (--config RUN/config.yaml), or a checkpoint (--ckpt_path FILE)"
            )
        if checkpoint is not None or folder is None:
            self.model.configure_model()
        else:
            self.model.load_adapter(folder / "adapter")
        if folder is not None and not names_data(self._arguments, folder):
            use_corpus_of_run(folder, self.datamodule, self.model)
        else:
            self._build()

    def predict(self, **options: Any) -> None:
        """Run `pml predict`: score every target token and write the table."""
        parts: list[Any] = self.trainer.predict(**options) or []
        scores = gather_scores(parts)
        if self.trainer.is_global_zero:
            folder = self._run_folder() or Path(self.trainer.log_dir or self.trainer.default_root_dir)
            path = _unused(folder / PREDICTIONS_NAME)
            tokenizer = self.model.tokenizer
            write_predictions(path, self.datamodule.corpus, scores, lambda token: str(tokenizer.decode([token])))
            log.info("predictions: %s", path)

    @property
    def _parsed(self) -> Any:
        """Keys of the subcommand, or of the fit if there is none, as parsed; `_options` has them with the objects."""
        return self.config.get(str(self.config.get("subcommand")), self.config)

    @property
    def _options(self) -> Any:
        return self.config_init.get(str(self.subcommand), self.config_init)

    def _run_folder(self) -> Path | None:
        """Folder of the run whose configuration was given; None if no configuration lies beside an adapter."""
        return next((f for f in self._config_folders() if (f / "adapter" / "adapter_config.json").is_file()), None)

    def _config_folders(self) -> list[Path]:
        return [Path(str(config)).parent for config in self._parsed.get("config") or []]

    def _build(self) -> None:
        if missing := [name for name in ("build", "corpus", "held_out") if not hasattr(type(self.datamodule), name)]:
            raise InputError(
                f"data is a {type(self.datamodule).__name__}, which has no {' and no '.join(missing)}; derive it from "
                "data_modules.MemorizationDataModule and write make_corpus"
            )
        self.datamodule.build(self.model.tokenizer, self.model.vocab_size, self.model.max_positions)

    def run_fit(self) -> None:
        """Run `pml fit` with the objects that were created."""
        self.make_ready()
        self.fit(model=self.model, datamodule=self.datamodule, ckpt_path=self.config_init["ckpt_path"])

    def fit(self, **options: Any) -> None:
        """Fit. A signal ends it after an optimiser step, with all that is needed to resume.

        Raises:
            Stopped: If a signal ended the fit; has advice on how to go on.
            DiskError: If the disk is full or fails; has the same advice.
            InputError: If the checkpoint's fit had no steps left, or EarlyStopping does not find its metric.
        """
        try:
            with at_step_ends():
                self.trainer.fit(**{**options, "weights_only": True})
            if self.model.resume_state:
                raise FitHadEnded(
                    f"the fit of {options['ckpt_path']} had taken all of its steps, so nothing was trained; raise "
                    "trainer.max_epochs or trainer.max_steps to train longer"
                )
        except Stopped as stop:
            stop.advice = self._how_to_go_on()
            raise
        except Exception as error:
            if any(part in str(error) for part in WRONG_SETTINGS):
                raise InputError(reason(error)) from error
            if (trouble := disk_failure(error)) is None:
                raise
            raise DiskError(f"{trouble}; mend that; {self._how_to_go_on()}") from error

    def _how_to_go_on(self) -> str:
        saved = next((c for c in self.trainer.callbacks if isinstance(c, Checkpoints)), None)  # type: ignore[attr-defined]
        return saved.how_to_go_on() if saved is not None else "it made no checkpoints to go on from"

    before_fit = make_ready
    before_validate = before_test = before_predict = make_ready_to_evaluate


def _plain(value: Any) -> Any:
    """Part of a configuration as plain Python."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.as_dict() if isinstance(value, jsonargparse.Namespace) else value


def _unused(path: Path) -> Path:
    """The path, or if it exists the same path with the first free number."""
    paths = (path, *(path.with_stem(f"{path.stem}_{number}") for number in range(1, 1000)))
    return next(candidate for candidate in paths if not candidate.exists())


class FitHadEnded(InputError):
    """A checkpoint was given to resume from whose fit had taken all of its steps."""


class _ParsedRun(MemorizationCLI):
    """Creates the model and data module of a configuration, but no trainer."""

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        return None


class _CheckedRun(_ParsedRun):
    """A parsed run whose configuration alone is needed."""

    def __init__(self, args: Sequence[str]) -> None:
        # Lightning reads hyperparameters from here. Dumping them would take a quarter of the time to check a cell.
        self.config_dump: dict[str, Any] = {}
        super().__init__(args, run=False)


def parse_run(args: Sequence[str]) -> jsonargparse.Namespace:
    """The complete configuration that arguments of `pml fit` resolve to; nothing is loaded.

    Raises:
        InputError: If the arguments do not parse, or a class refuses its own.
    """
    prepare()
    return _CheckedRun(args).config


def make_run(args: Sequence[str]) -> tuple[Memorization, Any]:
    """The module and the data module that arguments of `pml fit` name; neither has loaded anything.

    Raises:
        InputError: If the arguments do not parse, or a class refuses its own.
    """
    prepare()
    made = _ParsedRun(args, run=False)
    return made.model, made.datamodule


def prepare() -> None:
    """Prepare for parsing: a quiet stderr, short class names, and corrections to jsonargparse."""
    keep_quiet()
    for room in CLASS_PACKAGES:
        importlib.import_module(room)
    patch_text_parsing()
    keep_whole_numbers_whole()
