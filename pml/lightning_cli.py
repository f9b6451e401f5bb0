"""LightningCLI for memorising: what `pml fit|validate|test|predict` parse and run, and what every cell of a sweep does."""

import importlib
import os
import warnings
from collections.abc import Sequence
from typing import Any

import jsonargparse
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from pml.errors import InputError
from pml.modules import Memorization

__all__ = ["MemorizationCLI", "one_line", "parse_run", "prepare"]

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


class MemorizationCLI(LightningCLI):
    """LightningCLI for memorising: any `Memorization`, any corpus, and defaults that leave a complete run folder.

    Args:
        args: What to parse in place of `sys.argv`.
        run: Whether a subcommand is expected and run; otherwise everything is made and nothing is run.
    """

    def __init__(self, args: Sequence[str] | None = None, run: bool = True) -> None:
        subcommands = {name: {"exit_on_error": False} for name in LightningCLI.subcommands()}
        super().__init__(
            Memorization,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=42,
            auto_configure_optimizers=False,
            parser_kwargs={"prog": "pml", "exit_on_error": False, **subcommands},
            args=None if args is None else list(args),
            run=run,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.set_defaults(DEFAULTS)


class _ParsedRun(MemorizationCLI):
    """Stops where classes would be made."""

    def instantiate_classes(self) -> None:
        pass


def parse_run(args: Sequence[str]) -> jsonargparse.Namespace:
    """The complete configuration that arguments of `pml fit` resolve to; nothing is made, nothing is loaded.

    Raises:
        InputError: If it does not parse.
    """
    prepare()
    try:
        return _ParsedRun(args, run=False).config
    except jsonargparse.ArgumentError as error:
        raise InputError(one_line(error)) from error


def one_line(error: BaseException) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split())


def prepare() -> None:
    """What every command needs before a library speaks up."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for message in NOISE:
        warnings.filterwarnings("ignore", message)
    for room in ROOMS:
        importlib.import_module(room)
