"""Callbacks that accumulate one torchmetric over the corpus in validation and test loops."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torchmetrics import Metric

from callbacks._logging import log_evaluation
from callbacks._several import last_acting


class CorpusMetricCallback(Callback):
    """Feeds the scores of every evaluated batch to one metric and logs the result at the end of the loop.

    Args:
        metric: Its `update` takes `TokenScores`; its `compute` returns values by name.
    """

    def __init__(self, metric: Metric) -> None:
        self.metric = metric

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Only here is the device final: the strategy moves the module after `setup`.
        self.metric.to(pl_module.device).reset()

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *rest: Any) -> None:
        self.metric.update(outputs["scores"])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(trainer, pl_module, "val")

    on_test_epoch_start = on_validation_epoch_start

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *rest: Any) -> None:
        self.metric.update(outputs["scores"])

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(trainer, pl_module, "test")

    def _log(self, trainer: Trainer, pl_module: LightningModule, prefix: str) -> None:
        # Lightning would log the mean of what several callbacks measure under one name.
        kind = type(self.metric)
        if last_acting(trainer, CorpusMetricCallback, lambda other: type(other.metric) is kind) is self:
            # All ranks call `compute`, which gathers from all of them: the values agree and need no further reduction.
            values = {f"{prefix}/{name}": value.float() for name, value in self.metric.compute().items()}
            log_evaluation(trainer, pl_module, values)
