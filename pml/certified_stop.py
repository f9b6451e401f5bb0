"""Certificates of all pairs after training, and the callback that lets training end only where they hold."""

import logging
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from pml.certificate import PairCertificate, allow_for_rounding, certify, measure_rounding
from pml.corpus import Corpus
from pml.evaluating import evaluating
from pml.modules import Memorization

__all__ = ["StopsWhereCertified", "certified_pairs"]

log = logging.getLogger(__name__)


def certified_pairs(module: Memorization, corpus: Corpus) -> list[PairCertificate]:
    """Certificates of all pairs; in 16-bit dtypes, they allow for the rounding measured on the pairs."""
    module.backbone.restore()
    with evaluating(module):
        certificates = certify(module.model, corpus.examples)
        if module.dtype_name == "float32":
            return certificates
        rounding = measure_rounding(module.model, corpus.examples, [known.margins for known in certificates])
    return allow_for_rounding(certificates, rounding.logits)


class StopsWhereCertified(Callback):
    """Lets a fit in 16 bits go on where `StopWhenRecalled` would end it and some pair is not certain.

    That callback scores batches through the split model. A certificate reads single rows with the whole model, and in
    16 bits its margins differ by tenths.

    Args:
        stop: The `StopWhenRecalled`, which comes earlier among the callbacks.
    """

    def __init__(self, stop: Any) -> None:
        self._stop = stop

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Memorization)
        if self._stop.steps_to_recall is None or pl_module.dtype_name == "float32":
            return
        known = certified_pairs(pl_module, trainer.datamodule.corpus)  # type: ignore[attr-defined]
        if uncertain := sum(pair.verdict != "certain" for pair in known):
            log.info("read one by one, %d of %d pairs are not certain yet: training goes on", uncertain, len(known))
            self._stop.steps_to_recall, trainer.should_stop = None, False
