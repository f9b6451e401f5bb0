"""Checks of a fit's configuration that run before anything is loaded."""

import inspect
import math
from collections.abc import Iterator, Mapping
from datetime import timedelta
from functools import cache
from types import NoneType
from typing import Any, get_args, get_type_hints

from pml.errors import InputError
from pml.own_classes import class_of

__all__ = ["check_configuration", "check_precision", "check_trainer"]

MOST_SEEDS = 2**32 - 1

SHARDED = ("fsdp", "deepspeed", "modelparallel", "model_parallel")

FULL = ("32", "32-true")


def check_configuration(config: Mapping[str, Any], command: str | None) -> None:
    """Refuse values that make no sense or would train nothing.

    Args:
        config: All keys of a subcommand, as plain Python.
        command: The subcommand; None counts as `fit`.

    Raises:
        InputError: If a value is invalid. The message names the key, what was expected, and what to do.
    """
    for key, leaf in _leaves(config):
        if isinstance(leaf, float) and not math.isfinite(leaf):
            raise InputError(f"{key} is {leaf}; expected a finite number")
    _check_nulls(config)
    seed = config.get("seed_everything")
    if isinstance(seed, int) and not isinstance(seed, bool) and not 0 <= seed <= MOST_SEEDS:
        raise InputError(f"seed_everything is {seed}; expected a number from 0 to {MOST_SEEDS}")
    trainer = config.get("trainer") or {}
    check_precision(trainer.get("precision"))
    _check_strategy(trainer.get("strategy"))
    for name in ("model", "data"):
        seed = ((config.get(name) or {}).get("init_args") or {}).get("seed")
        if isinstance(seed, int) and not -(2**63) <= seed < 2**63:
            raise InputError(f"{name}.seed is {seed}; expected a number that fits into 64 bits")
    if trainer.get("devices") in (0, "0", []):
        raise InputError("trainer.devices is 0; expected at least 1 device, or auto")
    if command in ("fit", None):
        _check_training(trainer)


def _check_nulls(value: Any, key: str = "") -> None:
    """Refuse null for an argument of a class that does not take it, which jsonargparse lets through."""
    if isinstance(value, (list, tuple)):
        for item in value:
            _check_nulls(item, key)
    if not isinstance(value, Mapping):
        return
    for name, item in value.items():
        _check_nulls(item, key if name == "init_args" else f"{key}.{name}".lstrip("."))
    arguments = value.get("init_args")
    if not isinstance(value.get("class_path"), str) or not isinstance(arguments, Mapping):
        return
    cls = class_of(value["class_path"])
    for argument, given in arguments.items():
        if given is None and cls is not None and not _takes_null(cls, argument):
            raise InputError(
                f"{key}.{argument} is null, which {cls.__name__} does not take; leave it out for the default"
            )


@cache
def _takes_null(cls: type, argument: str) -> bool:
    """Whether an argument of a class, or of the base to which it is passed on, may be None; True if that is unknown."""
    for own in filter(None, (vars(base).get("__init__") for base in cls.__mro__)):
        if not inspect.isfunction(own) or (known := inspect.signature(own).parameters.get(argument)) is None:
            continue
        try:
            hint = get_type_hints(own).get(argument, Any)
        except (NameError, AttributeError, TypeError):  # such as a name that is imported for type checkers alone
            return True
        accepted = (hint, *get_args(hint))
        return known.default is None or any(one in (None, NoneType, Any, object) for one in accepted)
    return True


def _check_training(trainer: Mapping[str, Any]) -> None:
    nothing = "so nothing would be trained"
    for name, unit in (("max_epochs", "epoch"), ("max_steps", "step")):
        value = trainer.get(name)
        if value is not None and (value == 0 or value < -1):
            raise InputError(
                f"trainer.{name} is {value}, {nothing}; expected at least 1 {unit}, or -1 for no limit"
                if value == 0
                else f"trainer.{name} is {value}; expected at least 1 {unit}, or -1 for no limit"
            )
    batches = trainer.get("limit_train_batches")
    if batches is not None and (batches <= 0 or (isinstance(batches, float) and batches > 1)):
        raise InputError(
            f"trainer.limit_train_batches is {batches}{f', {nothing}' if batches == 0 else ''}; expected a number of "
            "batches, at least 1, or a share above 0 and up to 1.0"
        )
    for name in ("limit_val_batches", "limit_test_batches", "limit_predict_batches"):
        batches = trainer.get(name)
        if batches is not None and (batches < 0 or (isinstance(batches, float) and batches > 1)):
            raise InputError(f"trainer.{name} is {batches}; expected a number of batches, or a share up to 1.0")
    _check_overfitting(trainer.get("overfit_batches"))
    _check_time(trainer.get("max_time"), nothing)
    for name, least in (
        ("accumulate_grad_batches", 1),
        ("num_nodes", 1),
        ("check_val_every_n_epoch", 1),
        ("log_every_n_steps", 0),
        ("num_sanity_val_steps", -1),
        ("min_epochs", 0),
        ("min_steps", 0),
        ("fast_dev_run", 0),
        ("reload_dataloaders_every_n_epochs", 0),
    ):
        value = trainer.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value < least:
            raise InputError(f"trainer.{name} is {value}; expected at least {least}")
    clip = trainer.get("gradient_clip_val")
    if clip is not None and clip < 0:
        raise InputError(f"trainer.gradient_clip_val is {clip}; expected a number above 0, or null not to clip")
    for unit in ("epochs", "steps"):
        fewest, most = trainer.get(f"min_{unit}"), trainer.get(f"max_{unit}")
        if fewest is not None and most not in (None, -1) and fewest > most:
            raise InputError(f"trainer.min_{unit} is {fewest}, above trainer.max_{unit}, {most}; lower it")


def _check_time(limit: Any, nothing: str) -> None:
    if limit is None:
        return
    if isinstance(limit, Mapping):
        try:
            seconds = timedelta(**limit).total_seconds()
        except (TypeError, OverflowError) as error:
            raise InputError(f"trainer.max_time is {dict(limit)}; expected one like {{minutes: 30}}") from error
    elif isinstance(limit, timedelta):
        seconds = limit.total_seconds()
    else:
        parts = str(limit).split(":")
        if len(parts) != 4 or not all(part.strip().isdecimal() for part in parts):
            raise InputError(f"trainer.max_time is {str(limit)!r}; expected days:hours:minutes:seconds (00:00:30:00)")
        seconds = 0.0 + sum(int(part) * size for part, size in zip(parts, (86400, 3600, 60, 1), strict=True))
    if seconds <= 0:
        raise InputError(f"trainer.max_time is {limit}, {nothing}; expected a time above 0, such as 00:00:30:00")


def check_trainer(trainer: Any) -> None:
    """Refuse a trainer made in Python whose settings the command line refuses, where a fit with them would go wrong.

    Args:
        trainer: The Lightning trainer.

    Raises:
        InputError: If its precision is not float32, or it overfits batches.
    """
    check_precision(trainer.precision)
    _check_overfitting(trainer.overfit_batches)


def _check_overfitting(batches: Any) -> None:
    if batches:
        raise InputError(
            f"trainer.overfit_batches is {batches}; a corpus is memorised as a whole, so there is nothing to overfit; "
            "take a smaller corpus, or trainer.limit_train_batches"
        )


def check_precision(precision: Any) -> None:
    """Refuse precisions other than float32: training, measuring and decoding would round differently.

    Args:
        precision: `trainer.precision`.

    Raises:
        InputError: If it is another one. The message names the options to use instead.
    """
    if precision is not None and str(precision) not in FULL:
        raise InputError(
            f"trainer.precision is {precision}; expected 32-true, since the adapter and all losses are float32; for "
            "16-bit frozen weights give --model.dtype bfloat16, for faster float32 matrix products "
            "--model.matmul_precision medium"
        )


def _check_strategy(strategy: Any) -> None:
    name = str(strategy.get("class_path", "") if isinstance(strategy, Mapping) else strategy).lower()
    if any(kind in name.replace("_", "") for kind in (kind.replace("_", "") for kind in SHARDED)):
        shown = strategy.get("class_path") if isinstance(strategy, Mapping) else strategy
        raise InputError(
            f"trainer.strategy is {shown}, which shards weights that are frozen here; take --trainer.devices 1 with "
            "--model.frozen_prefix.release true, which frees the layers below the adapter, or --trainer.strategy ddp"
        )


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _leaves(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _leaves(item, f"{key}[{number}]")
    else:
        yield key, value
