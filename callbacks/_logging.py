"""Logging the same values to every logger of a trainer, and scoring the corpus once for several callbacks."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from pml.adapter import adapter_parameters
from pml.corpus import Corpus
from pml.modules import Memorization
from pml.recall import score_corpus
from pml.token_scores import TokenScores

__all__ = ["exact_scores", "log_evaluation", "log_everywhere", "log_settings"]

# The datamodule leads to its trainer and so to the module: a strong reference would keep the key alive.
_latest: WeakKeyDictionary[Memorization, tuple[ReferenceType[Any], tuple[Any, ...], TokenScores]] = WeakKeyDictionary()


def log_everywhere(trainer: Trainer, values: Mapping[str, float | Tensor], step: int | None = None) -> None:
    """Log values to all loggers at once, without waiting for Lightning's logging interval.

    Args:
        trainer: The trainer whose loggers are used.
        values: Values by tag.
        step: Optimiser steps taken; None takes the trainer's current step.
    """
    if trainer.is_global_zero and trainer.loggers:
        numbers = {tag: float(value) for tag, value in values.items()}
        for logger in trainer.loggers:
            logger.log_metrics(dict(numbers), step=trainer.global_step if step is None else step)


def log_evaluation(trainer: Trainer, module: LightningModule, values: Mapping[str, float | Tensor]) -> None:
    """Log what a validation or test loop has measured; for use in hooks at the end of its epoch.

    In a fit, Lightning counts a step only after the validation that follows it, and would draw every point one step
    early. There it only keeps the values, for callbacks that monitor them.

    Args:
        trainer: The trainer that runs the loop.
        module: The module that is evaluated.
        values: Values by tag, the same on all ranks.
    """
    in_fit = trainer.state.fn == TrainerFn.FITTING
    for tag, value in values.items():
        module.log(tag, value, logger=False if in_fit else None, rank_zero_only=True)
    if in_fit and not trainer.sanity_checking:
        log_everywhere(trainer, {**values, "epoch": trainer.current_epoch})


def exact_scores(trainer: Trainer, module: Memorization, frozen: bool = False) -> TokenScores:
    """Score the corpus with the current weights and dropout off; see `pml.recall.score_corpus`.

    Several callbacks ask for them at the start and end of a fit, so the latest are cached. All ranks must call it.

    Args:
        trainer: The trainer whose datamodule has the corpus.
        module: The module to score.
        frozen: Score the frozen model, without the adapter.
    """
    datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
    versions = (p._version for p in adapter_parameters(module.model).values())
    state = ("frozen",) if frozen else (trainer.global_step, *versions)
    if module in _latest:
        known_data, known_state, scores = _latest[module]
        if known_data() is datamodule and known_state == state:
            return scores
    with module.frozen() if frozen else nullcontext():
        if module.backbone.streamed is not None:
            module.frozen_layers.keep(datamodule.corpus.examples)  # all at once rather than batch by batch
        scores = score_corpus(module, datamodule.val_dataloader())
    _latest[module] = (ref(datamodule), state, scores)
    return scores


SHOWN_RESULTS = ("val/exact_match", "val/token_accuracy", "val/loss", "val/sub_threshold_fraction", "run/wall_seconds")
"""Results that TensorBoard shows beside the settings."""

VARIED_FIRST = ("method", "rank", "target_tokens", "learning_rate", "seed")
"""Settings in TensorBoard's table, which shows only the first five in alphabetical order.
The run's configuration and its record have the others."""


def log_settings(trainer: Trainer, module: Memorization, start: dict[str, float]) -> None:
    """Log the settings of the run to all loggers, with the first points of its curves in `start`, by tag.

    TensorBoard takes the names of results from the first call only, and shows the last point of each.
    """
    corpus: Corpus = trainer.datamodule.corpus  # type: ignore[attr-defined]
    settings = {
        "method": module.method,
        "rank": module.adapter.rank,
        "target_tokens": corpus.target_tokens,
        "learning_rate": module.learning_rate,
        "seed": module.seed,
        "pairs": len(corpus),
        "corpus": corpus.name,
        "placement": str(module.adapter.placement),
        "init": module.adapter.init,
        "dropout": module.adapter.dropout,
        "schedule": module.schedule,
        "dtype": module.dtype_name,
        "effective_parameters": sum(p.numel() for p in adapter_parameters(module.model).values()),
    }
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and start:
            shown = {tag: start[tag] for tag in SHOWN_RESULTS}
            logger.log_hyperparams({name: settings[name] for name in VARIED_FIRST}, shown, step=trainer.global_step)
            logger.log_metrics({tag: value for tag, value in start.items() if tag not in shown}, trainer.global_step)
        else:
            logger.log_hyperparams(settings)
            if start:
                logger.log_metrics(dict(start), trainer.global_step)
