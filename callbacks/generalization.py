"""Recall of the held-out part of a corpus, which is never trained on: has the adapter learnt a rule or a table?"""

import logging
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks._logging import log_evaluation, log_everywhere
from pml import metrics
from pml.corpus import Corpus
from pml.errors import InputError
from pml.modules import Memorization
from pml.recall import greedy_recall, score_examples

__all__ = ["Generalization"]

log = logging.getLogger(__name__)


class Generalization(Callback):
    """Measures recall of the held-out part of a corpus, which is never trained on; does nothing if there is none.

    Validations log `held_out_loss` (nats per target token), `held_out_token_accuracy` (share of target tokens) and
    `held_out_exact_match` (share of targets), all under teacher forcing. At the end of a fit or test,
    greedy decoding adds `held_out_generated_exact_match`.

    Args:
        generate_at_end: Decode greedily at the end of a fit or test.
        batch_size: Number of held-out pairs scored, or prompts decoded, together.
    """

    def __init__(self, generate_at_end: bool = True, batch_size: int = 64) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; expected at least 1 held-out pair")
        self.generate_at_end = generate_at_end
        self.batch_size = batch_size
        self._initial: dict[str, float] = {}
        self._end: dict[str, float] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._initial, self._end = {}, None
        if (held_out := _held_out(trainer)) is not None:
            assert isinstance(pl_module, Memorization)
            with pl_module.frozen():
                self._initial = self._teacher_forced(pl_module, held_out)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._initial and trainer.global_step == 0:
            self._log_start(trainer)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(trainer, pl_module, "val", generate=False)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(trainer, pl_module, "test", generate=self.generate_at_end)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._at_end(trainer, pl_module)

    def record_fields(self, trainer: Trainer, pl_module: LightningModule, ended: bool) -> dict[str, Any]:
        """`corpus_figures`, as returned by `_at_end`; see `pml.records.MeasuresForRecord`."""
        return {"corpus_figures": self._at_end(trainer, pl_module)} if ended else {}

    def _at_end(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Measure the final adapter on the first call after a fit, and return the same later. All ranks must call it.

        Returns:
            The measures that the class logs, with `held_out_pairs` and `held_out_initial_loss` (of the frozen model, in
            nats per target token); empty if nothing is held out.
        """
        held_out = _held_out(trainer)
        if held_out is not None and self._end is None:
            measured = self._measure(pl_module, held_out, self.generate_at_end)
            log_everywhere(trainer, {f"val/{name}": value for name, value in measured.items()})
            if trainer.is_global_zero:
                right = measured.get("held_out_generated_exact_match", measured["held_out_exact_match"])
                log.info("held out: %.4f of %d targets right", right, len(held_out))
            self._end = {
                "held_out_pairs": len(held_out),
                "held_out_initial_loss": self._initial["held_out_loss"],
                **measured,
            }
        return self._end or {}

    def _log_start(self, trainer: Trainer) -> None:
        """Log the frozen model's values as the first points of the curves."""
        start = {f"val/{name}": value for name, value in self._initial.items()}
        if self.generate_at_end:
            # Greedy decoding agrees with teacher forcing except for rounding, so it is not run here.
            start["val/held_out_generated_exact_match"] = self._initial["held_out_exact_match"]
        log_everywhere(trainer, start)

    def _log(self, trainer: Trainer, pl_module: LightningModule, prefix: str, generate: bool) -> None:
        if (held_out := _held_out(trainer)) is not None:
            measured = self._measure(pl_module, held_out, generate)
            log_evaluation(trainer, pl_module, {f"{prefix}/{name}": value for name, value in measured.items()})

    def _measure(self, pl_module: LightningModule, held_out: Corpus, generate: bool) -> dict[str, float]:
        assert isinstance(pl_module, Memorization)
        figures = self._teacher_forced(pl_module, held_out)
        if generate:
            generated = greedy_recall(pl_module, held_out.examples, self.batch_size, to_the_end=False)
            figures["held_out_generated_exact_match"] = sum(g.exact for g in generated) / len(generated)
        return figures

    def _teacher_forced(self, module: Memorization, held_out: Corpus) -> dict[str, float]:
        scores = score_examples(module, held_out.examples, self.batch_size)
        return {
            "held_out_loss": metrics.mean_loss(scores).item(),
            "held_out_token_accuracy": metrics.token_accuracy(scores).item(),
            "held_out_exact_match": metrics.exact_match(scores).double().mean().item(),
        }


def _held_out(trainer: Trainer) -> Corpus | None:
    datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
    return getattr(datamodule, "held_out", None)
