"""Progress of a training run after each epoch, for whoever called `memorize`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from pml.metrics import above_threshold

__all__ = ["Progress", "ProgressReporter"]


@dataclass(frozen=True)
class Progress:
    """Progress of training after an epoch.

    Attributes:
        rank: Rank of this attempt.
        step: Optimiser steps taken in this attempt.
        steps: Most optimiser steps of this attempt.
        certain: Share of target tokens above the margin.
        loss: Mean loss of the epoch in nats per target token.
    """

    rank: int
    step: int
    steps: int
    certain: float
    loss: float


class ProgressReporter(Callback):
    """Reports the progress of training after each epoch.

    Args:
        margin: Probability above which a target token counts as certain.
        rank: Rank of this attempt.
        tell: Called with the progress.
    """

    def __init__(self, margin: float, rank: int, tell: Callable[[Progress], None]) -> None:
        self._margin = margin
        self._rank = rank
        self._tell = tell
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        scores = outputs["scores"]
        self._parts.append((above_threshold(scores, self._margin).sum(), scores.losses.sum(), scores.mask.sum()))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Read once per epoch, so that no step waits for the device.
        certain, loss, tokens = (float(torch.stack(column).sum()) for column in zip(*self._parts, strict=True))
        self._parts.clear()
        steps = int(trainer.estimated_stepping_batches)
        self._tell(Progress(self._rank, trainer.global_step, steps, certain / tokens, loss / tokens))
