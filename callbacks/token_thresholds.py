"""Where target tokens stand against the recall threshold: the share still below it, and the weakest of all."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from callbacks._corpus_metric import CorpusMetricCallback
from pml import metrics
from pml.weighting import critical_loss

__all__ = ["TokenThresholds"]


class TokenThresholds(CorpusMetricCallback):
    """Logs how the corpus stands at every evaluation, and training batches as they are scored for the step.

    Of the corpus: the mean `loss` (nats per target token), `sub_threshold_fraction` (share of target tokens with
    p <= threshold) and `min_target_probability`. Of training batches: `train/sub_threshold_fraction`.

    Args:
        threshold: Probability that a token has to exceed; greedy decoding is certain above 0.5.
    """

    def __init__(self, threshold: float = 0.5) -> None:
        critical_loss(threshold)
        super().__init__(metrics.TokenThresholds(threshold))
        self.threshold = threshold

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        scores = outputs["scores"]
        fraction = metrics.sub_threshold_fraction(scores, self.threshold)
        pl_module.log("train/sub_threshold_fraction", fraction.float(), batch_size=len(scores.losses))
