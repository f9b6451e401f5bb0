"""What an adapter does to ordinary text outside the corpus: loss on prose, code and chats, frozen and adapted."""

import logging
from statistics import fmean
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from callbacks._before_and_after import BeforeAndAfter
from pml.corpus import Example
from pml.encoding import PromptFormat
from pml.errors import InputError
from pml.modules import Memorization
from pml.ordinary_text import KINDS, shipped_passages, text_examples
from pml.recall import score_examples

__all__ = ["Harm"]

log = logging.getLogger(__name__)


class Harm(BeforeAndAfter):
    """Measures the loss on ordinary text before and after the fit, in nats per token, for each kind of text.

    The text (`texts/harm.jsonl`, see `pml.ordinary_text`) was written for this project and shares nothing with that of
    the guard or the KL penalty. Chats are in the chat template, with the variables and the date of the corpus, or
    without one if it cannot be used; only their answers count. All loggers get the losses `harm/prose`, `harm/code`
    and `harm/chat`, and their mean, `harm/mean`, at the first and the last step.

    Args:
        passages: Number of passages of each kind, 1 to 4, each of at most 128 tokens.

    Raises:
        InputError: If `passages` is out of range.
    """

    tag = "harm"

    def __init__(self, passages: int = 4) -> None:
        super().__init__()
        shipped = {kind: [p for p in shipped_passages("harm") if p.kind == kind] for kind in KINDS}
        most = min(map(len, shipped.values()))
        if not 1 <= passages <= most:
            raise InputError(f"passages is {passages}; expected 1 to {most} of each kind")
        self._passages = [p for kind in KINDS for p in shipped[kind][:passages]]
        self._examples: list[Example] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Memorization)
        # The variables and the date of the template are those of the corpus, its system turn is not.
        known = getattr(trainer.datamodule, "prompt_format", PromptFormat())  # type: ignore[attr-defined]
        self._examples = text_examples(
            self._passages,
            pl_module.tokenizer,
            pl_module.max_positions,
            pl_module.vocab_size,
            PromptFormat(template_kwargs=known.template_kwargs, template_date=known.template_date),
        )
        super().on_fit_start(trainer, pl_module)

    def measure(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        is_new = super().measure(trainer, pl_module)
        if is_new and trainer.is_global_zero and self._after:
            lost = {kind: loss - self._before[kind] for kind, loss in self._after.items()}
            log.info("harm: %+.3f nats a token on other text (%s)", lost.pop("mean"), _listed(lost))
        return is_new

    def tokens(self, name: str) -> int:
        return sum(len(e.target_ids) for e in self._examples if name in ("mean", e.source))

    def losses(self, module: Memorization) -> dict[str, float]:
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
