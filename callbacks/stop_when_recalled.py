"""Ends a fit once every target is certain to be recalled, so that no further step is spent on it."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from callbacks._corpus import corpus_of
from callbacks._logging import exact_scores
from callbacks._several import last_acting
from pml.certificate import Rounding
from pml.corpus import Example
from pml.errors import InputError
from pml.metrics import above_threshold
from pml.modules import Memorization
from pml.output_rows import tokens_with_equal_rows
from pml.ranks import is_first_rank, summed_over_ranks
from pml.recall import certified, rounding_of_corpus
from pml.token_scores import TokenScores

__all__ = ["StopWhenRecalled"]

log = logging.getLogger(__name__)

CHECKPOINT_KEY = "pml_stop_when_recalled"


class StopWhenRecalled(Callback):
    """Stops the fit when every target token is the argmax and has a probability above `margin`.

    With a margin of 0.5 or more, this certifies that greedy decoding reproduces the whole corpus. Training batches are
    checked by the scores of the step itself, at no cost. Only when an epoch of them looks recalled is the corpus scored
    again, with dropout off and the current weights, and these scores decide.

    If the frozen weights are not float32, rounding moves logits by tenths. Decoding token by token is then compared
    with teacher forcing on the corpus itself, and every target token's logit must also exceed all others by more than
    the largest difference seen.

    A warning before the first step names target tokens that no training can make certain; see `pml.output_rows`.

    Args:
        margin: Probability that every target token must exceed, in [0, 1).
    """

    def __init__(self, margin: float = 0.5) -> None:
        if not 0.0 <= margin < 1.0:
            raise InputError(f"margin is {margin}; expected a probability in [0, 1), such as 0.5")
        self.margin = margin
        self.steps_to_recall: int | None = None
        """Optimiser steps taken when the corpus was certified, without skipped ones; None if it is not certified."""
        self.rounding: Rounding | None = None
        """Last measurement of how far rounding moves margins; None if there was none."""
        self._unsure: Tensor | None = None
        self._seen = 0
        self._restored = (0, 0)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        assert isinstance(pl_module, Memorization)
        # Discard the result of an earlier fit, and of a checkpoint that was evaluated; that of this fit comes later.
        self.steps_to_recall, self.rounding, self._restored = None, None, (0, 0)
        corpus = corpus_of(trainer, self)
        head = pl_module.backbone.model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            return
        equal = tokens_with_equal_rows(head, {token for example in corpus.examples for token in example.target_ids})
        if equal and trainer.is_global_zero:
            names = pl_module.tokenizer.convert_ids_to_tokens
            log.warning(
                "the targets cannot all become certain: some of their tokens always have the same logit as another, so "
                "their probability is at most 0.5 (%s); replace them in the targets",
                ", ".join(f"{names(token)!r} and {names(other)!r}" for token, other in sorted(equal.items())),
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._unsure, self._seen = None, 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        scores = outputs["scores"]
        unsure = (scores.mask & ~above_threshold(scores, self.margin)).sum()
        self._unsure = unsure if self._unsure is None else self._unsure + unsure
        self._seen += batch["target_tokens"]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Memorization)
        if self._unsure is None or not self._is_last(trainer):
            return
        unsure, seen = self._watched().tolist()
        corpus = trainer.datamodule.corpus  # type: ignore[attr-defined]
        # Early epochs of a curriculum, and epochs that drop the last batch, leave out some examples.
        if seen < corpus.target_tokens:
            whole = trainer.is_last_batch and pl_module.curriculum is None
            if trainer.current_epoch == 0 and whole and trainer.is_global_zero:
                log.warning(
                    "StopWhenRecalled never stops this fit: an epoch trains on %d of %d target tokens; leave out "
                    "drop_last and limit_train_batches",
                    seen,
                    corpus.target_tokens,
                )
            return
        before, self.steps_to_recall = self.steps_to_recall, None
        if unsure:
            return
        scores = exact_scores(trainer, pl_module)
        if certified(scores, self.margin) and self._survives_rounding(pl_module, corpus.examples, scores):
            self.steps_to_recall = before or trainer.global_step - pl_module.skipped_steps
            # While `min_epochs` or `min_steps` keep the fit running, recall may be lost again, so no stop is asked for.
            if trainer.fit_loop._can_stop_early:
                trainer.should_stop = True
            if before is None and trainer.is_global_zero:
                log.info(
                    "recalled: all %d target tokens above p = %s after %d steps%s",
                    corpus.target_tokens,
                    self.margin,
                    self.steps_to_recall,
                    f", by more than rounding to {pl_module.dtype_name} ({self.rounding.logits:.2g} in logits at most, "
                    f"seen on {self.rounding.tokens} tokens)"
                    if self.rounding is not None
                    else "",
                )

    def _survives_rounding(self, module: Memorization, examples: Sequence[Example], scores: TokenScores) -> bool:
        """Whether all margins exceed rounding, which is measured again unless its last value already rules that out."""
        if module.dtype_name == "float32":
            return True
        assert scores.margin is not None
        smallest = float(scores.margin[scores.mask].min())
        if self.rounding is None or smallest > self.rounding.logits:
            self.rounding = rounding_of_corpus(module, examples, scores)
        return smallest > self.rounding.logits

    def record_fields(self, trainer: Trainer, pl_module: LightningModule, ended: bool) -> dict[str, Any]:
        """`steps_to_recall`, `recall_margin` and `rounding_logits`; see `pml.records.MeasuresForRecord`."""
        if not self._is_last(trainer):
            return {}
        known = {} if self.rounding is None else {"rounding_logits": self.rounding.logits}
        return {"steps_to_recall": self.steps_to_recall, "recall_margin": self.margin, **known}

    # Not `state_dict`: with it, Lightning would refuse a second callback of this class beside the default one.
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        watched = (0, 0) if self._unsure is None else self._watched().tolist()
        if self._is_last(trainer):
            checkpoint[CHECKPOINT_KEY] = {
                "steps_to_recall": self.steps_to_recall,
                "unsure_and_seen": watched,
                # Plain Python: a NamedTuple is a class, which is never read.
                "rounding": None if self.rounding is None else tuple(self.rounding),
            }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # Checkpoints of earlier versions hold it among Lightning's callback states.
        older = (s for name, s in checkpoint.get("callbacks", {}).items() if name.startswith("StopWhenRecalled"))
        state: dict[str, Any] = checkpoint.get(CHECKPOINT_KEY) or next(older, {})
        self.steps_to_recall = state.get("steps_to_recall")
        self._restored = state.get("unsure_and_seen", (0, 0))
        self.rounding = None if (saved := state.get("rounding")) is None else Rounding(*saved)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        unsure, seen = self._restored if is_first_rank() else (0, 0)
        self._unsure, self._seen = torch.tensor(unsure, device=pl_module.device), seen
        self._restored = (0, 0)

    def _is_last(self, trainer: Trainer) -> bool:
        """Whether this is the last callback of its kind: of several, only that one decides."""
        return last_acting(trainer, StopWhenRecalled) is self

    def _watched(self) -> Tensor:
        """Target tokens in this epoch's batches over all ranks: those not certain, and all. All ranks must call it."""
        assert self._unsure is not None
        return summed_over_ranks(torch.stack([self._unsure, torch.full_like(self._unsure, self._seen)]))
