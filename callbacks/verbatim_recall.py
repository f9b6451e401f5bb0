"""Verbatim recall: under teacher forcing at every evaluation, by greedy decoding on request and when the fit ends."""

import logging
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from callbacks._corpus import corpus_of
from callbacks._corpus_metric import CorpusMetricCallback
from callbacks._logging import exact_scores, log_evaluation, log_everywhere
from pml import metrics
from pml.errors import InputError
from pml.modules import Memorization
from pml.recall import Generated, greedy_recall

__all__ = ["VerbatimRecall"]

log = logging.getLogger(__name__)

CHECKPOINT_KEY = "pml_verbatim_recall"
GENERATED_AT_ENDS = ("generated_exact_match",)


class VerbatimRecall(CorpusMetricCallback):
    """Logs `token_accuracy` and `exact_match` (shares) and `first_failure` (tokens), all under teacher forcing.

    Greedy decoding with the KV cache adds `generated_exact_match` and `generated_token_accuracy`. It agrees with
    teacher forcing except for rounding; `RunRecord` logs a message if the two differ.

    Args:
        generate_every: Decode greedily at every n-th validation; 0 turns this off.
        generate_at_end: Decode greedily at the end of a fit or test.
        generate_batch_size: Number of prompts decoded together.
    """

    def __init__(self, generate_every: int = 0, generate_at_end: bool = True, generate_batch_size: int = 64) -> None:
        super().__init__(metrics.VerbatimRecall())
        if generate_every < 0:
            raise InputError(f"generate_every is {generate_every}; expected a number of validations, or 0 for never")
        if generate_batch_size < 1:
            raise InputError(f"generate_batch_size is {generate_batch_size}; expected at least 1 prompt")
        self.generate_every = generate_every
        self.generate_at_end = generate_at_end
        self.generate_batch_size = generate_batch_size
        self.generated: list[Generated] | None = None
        """Result of the last greedy decoding; None before the first."""
        self.generated_at_step: int | None = None
        """The trainer's `global_step` at that time."""
        self._validations = self._restored = 0
        self._ended = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            # Discard the state of a checkpoint that was evaluated; that of this fit comes later.
            self._restored = 0
            if self.generate_at_end or self.generate_every:
                corpus_of(trainer, self)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_epoch_end(trainer, pl_module)
        if trainer.sanity_checking:
            return
        self._validations += 1
        if self.generate_every and self._validations % self.generate_every == 0:
            self._generate(trainer, pl_module)
            log_evaluation(trainer, pl_module, {f"val/{name}": value for name, value in self.shares().items()})

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_test_epoch_end(trainer, pl_module)
        if self.generate_at_end:
            self._generate(trainer, pl_module)
            log_evaluation(trainer, pl_module, {f"test/{name}": value for name, value in self.shares().items()})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ended, self._validations, self._restored = False, self._restored, 0
        self.generated = self.generated_at_step = None
        if trainer.global_step == 0 and (self.generate_at_end or self.generate_every):
            self._log_start(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._generate_at_end(trainer, pl_module)

    # Not `state_dict`: with it, Lightning would refuse a second callback of this class beside the default one.
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[CHECKPOINT_KEY] = self._validations

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._restored = checkpoint.get(CHECKPOINT_KEY, 0)

    def record_fields(self, trainer: Trainer, pl_module: LightningModule, ended: bool) -> dict[str, Any]:
        """Measures by greedy decoding, if the current weights were decoded; see `pml.records.MeasuresForRecord`."""
        assert isinstance(pl_module, Memorization)
        if ended:
            self._generate_at_end(trainer, pl_module)
        # An earlier validation decoded with other weights.
        if not self.generated or self.generated_at_step != trainer.global_step:
            return {}
        return {**self.shares(), "generated_edit_similarity": _edit_similarity(pl_module, self.generated)}

    def shares(self) -> dict[str, float]:
        """`generated_exact_match` (share of examples) and `generated_token_accuracy` (share of target tokens)."""
        if not self.generated:
            return {}
        tokens = sum(len(g.example.target_ids) for g in self.generated)
        return {
            "generated_exact_match": sum(g.exact for g in self.generated) / len(self.generated),
            "generated_token_accuracy": sum(g.right_tokens for g in self.generated) / tokens,
        }

    def _generate_at_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decode once when the fit ends, for this callback or the record, whichever comes first."""
        if self.generate_at_end and not self._ended:
            self._ended = True
            self._generate(trainer, pl_module)
            self._log_curves(trainer)

    def _log_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what the frozen model recalls as the first points of the greedy-decoding curves."""
        assert isinstance(pl_module, Memorization)
        if self.generate_every:
            with pl_module.frozen():
                self._generate(trainer, pl_module)
            self._log_curves(trainer)
        else:
            # Greedy decoding agrees with teacher forcing except for rounding, so it is not run here.
            exact = metrics.exact_match(exact_scores(trainer, pl_module, frozen=True)).double().mean().item()
            log_everywhere(trainer, {"val/generated_exact_match": exact})

    def _log_curves(self, trainer: Trainer) -> None:
        # Decoded only at the end, token accuracy would be a single point; the record has it.
        curves = ("generated_exact_match", "generated_token_accuracy") if self.generate_every else GENERATED_AT_ENDS
        log_everywhere(trainer, {f"val/{name}": value for name, value in self.shares().items() if name in curves})

    def _generate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Memorization)
        examples = corpus_of(trainer, self).examples
        if trainer.is_global_zero and len(examples) > 4 * self.generate_batch_size:
            log.info("decoding %d targets greedily", len(examples))
        self.generated = greedy_recall(pl_module, examples, self.generate_batch_size)
        self.generated_at_step = trainer.global_step


def _edit_similarity(module: Memorization, generated: Sequence[Generated]) -> float:
    """Mean edit similarity of greedy decodings and their targets, in characters, special tokens left out."""

    def text(ids: tuple[int, ...]) -> str:
        return str(module.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    return fmean(metrics.edit_similarity(text(g.token_ids), text(g.example.target_ids)) for g in generated)
