"""What an adapter does to ordinary text outside the corpus: loss on prose, code and chats, frozen and adapted."""

import logging
from statistics import fmean
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks._logging import log_everywhere
from pml.corpus import Example
from pml.errors import InputError
from pml.modules import Memorization
from pml.ordinary_text import KINDS, shipped_passages, text_examples
from pml.recall import score_examples

__all__ = ["Harm"]

log = logging.getLogger(__name__)


class Harm(Callback):
    """Measures the loss on ordinary text before and after the fit, in nats per token, for each kind of text.

    The text (`texts/harm.jsonl`, see `pml.ordinary_text`) was written for this project and shares nothing with that of
    the guard or the KL penalty. In chats only the answers count. All loggers get the losses `harm/prose`, `harm/code`
    and `harm/chat`, and their mean, `harm/mean`, at the first and the last step.

    Args:
        passages: Number of passages of each kind, 1 to 4, each of at most 128 tokens.

    Raises:
        InputError: If `passages` is out of range.
    """

    def __init__(self, passages: int = 4) -> None:
        shipped = {kind: [p for p in shipped_passages("harm") if p.kind == kind] for kind in KINDS}
        most = min(map(len, shipped.values()))
        if not 1 <= passages <= most:
            raise InputError(f"passages is {passages}; expected 1 to {most} of each kind")
        self._passages = [p for kind in KINDS for p in shipped[kind][:passages]]
        self._examples: list[Example] = []
        self._before: dict[str, float] = {}
        self._end: dict[str, dict[str, float]] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Memorization)
        self._examples = text_examples(
            self._passages, pl_module.tokenizer, pl_module.max_positions, pl_module.vocab_size
        )
        self._end = None
        with pl_module.frozen():
            self._before = self._losses(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:
            log_everywhere(trainer, {f"harm/{kind}": loss for kind, loss in self._before.items()})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._at_end(trainer, pl_module)

    def record_fields(self, trainer: Trainer, pl_module: LightningModule, ended: bool) -> dict[str, Any]:
        """`harm`, as returned by `_at_end`; see `pml.records.MeasuresForRecord`."""
        return {"harm": self._at_end(trainer, pl_module)} if ended else {}

    def _at_end(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, dict[str, float]]:
        """For each kind and their `mean`: `target_tokens`, and `loss_before` and `loss_after` in nats per token.

        The first call after a fit measures the final adapter; later calls return the same. Empty if no passage fits
        into the backbone's context. All ranks must call it.
        """
        if self._end is None:
            assert isinstance(pl_module, Memorization)
            after = self._losses(pl_module)
            log_everywhere(trainer, {f"harm/{kind}": loss for kind, loss in after.items()})
            self._end = {
                kind: {
                    "target_tokens": self._tokens(kind),
                    "loss_before": self._before[kind],
                    "loss_after": loss,
                }
                for kind, loss in after.items()
            }
            if trainer.is_global_zero and after:
                lost = {kind: loss - self._before[kind] for kind, loss in after.items()}
                log.info("harm: %+.3f nats a token on other text (%s)", lost.pop("mean"), _listed(lost))
        return self._end

    def _tokens(self, kind: str) -> int:
        return sum(len(e.target_ids) for e in self._examples if kind in ("mean", e.source))

    def _losses(self, module: Memorization) -> dict[str, float]:
        """Mean loss of each kind in nats per token, and the mean over kinds."""
        if not self._examples:
            return {}
        # The frozen-layer cache keeps these, so that measuring again runs only the layers above the cut.
        scores = score_examples(module, self._examples, keep=True)
        kinds = [e.source for e in sorted(self._examples, key=lambda e: e.example_id)]
        losses: dict[str, Any] = {}
        for kind in dict.fromkeys(kinds):
            rows = [row for row, other in enumerate(kinds) if other == kind]
            losses[kind] = float(scores.losses[rows][scores.mask[rows]].mean())
        return {**losses, "mean": fmean(losses.values())}


def _listed(lost: dict[str, float]) -> str:
    return ", ".join(f"{kind} {nats:+.3f}" for kind, nats in lost.items())
