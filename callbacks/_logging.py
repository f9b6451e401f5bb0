"""How callbacks reach every logger of a trainer with the same values, and score a corpus once however many ask."""

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from lightning.pytorch import Trainer

from pml.adapter import adapter_parameters
from pml.modules import Memorization
from pml.recall import score_corpus
from pml.weighting import TokenScores

__all__ = ["exact_scores", "log_everywhere"]

_latest: WeakKeyDictionary[Memorization, tuple[Any, tuple[Any, ...], TokenScores]] = WeakKeyDictionary()


def log_everywhere(trainer: Trainer, values: Mapping[str, float], step: int | None = None) -> None:
    """Give values to all loggers, past Lightning's own rhythm.

    Args:
        trainer: Whose loggers.
        values: By tag.
        step: Optimiser steps taken; None is now.
    """
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            logger.log_metrics(dict(values), step=trainer.global_step if step is None else step)


def exact_scores(trainer: Trainer, module: Memorization, frozen: bool = False) -> TokenScores:
    """Scores of the corpus with the weights as they are and dropout off; see `pml.recall.score_corpus`.

    Several callbacks ask at the start and at the end of a fit: the second is given what the first was. Takes all ranks.

    Args:
        trainer: Whose datamodule has the corpus.
        module: What is scored.
        frozen: Score the frozen model, without its adapter.
    """
    datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
    versions = () if frozen else tuple(p._version for p in adapter_parameters(module.model).values())
    state = (frozen, trainer.global_step if not frozen else 0, *versions)
    if module in _latest:
        known_data, known_state, scores = _latest[module]
        if known_data is datamodule and known_state == state:
            return scores
    if frozen:
        with module.frozen():
            scores = score_corpus(module, datamodule.val_dataloader())
    else:
        scores = score_corpus(module, datamodule.val_dataloader())
    _latest[module] = (datamodule, state, scores)
    return scores
