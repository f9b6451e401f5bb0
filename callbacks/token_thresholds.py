"""How target tokens stand against the recall threshold: which are certain, which are only right, which are wrong."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn

from callbacks._corpus_metric import CorpusMetricCallback
from callbacks._logging import exact_scores, log_everywhere
from callbacks._several import last_acting
from callbacks._token_board import show_history, show_look
from pml import metrics
from pml.disk import disk_failure
from pml.errors import InputError
from pml.last_seen import LastSeen, margins, shares
from pml.looks import Looks
from pml.modules import Memorization
from pml.run_folder import recorded_folder
from pml.schedule import total_steps
from pml.token_history import HISTORY_NAME, HistoryRecorder
from pml.token_scores import TokenScores, critical_loss

__all__ = ["TokenThresholds"]

CHECKPOINT_KEY = "pml_token_thresholds"


class TokenThresholds(CorpusMetricCallback):
    """Follows every target token across the threshold, and logs the state of the corpus at every evaluation.

    Evaluations log the mean `loss` (nats per target token), `sub_threshold_fraction` (share of target tokens with
    p <= threshold) and `min_target_probability`; training batches log `train/sub_threshold_fraction`.

    Looks are evenly spaced in the logarithm of the optimiser step. The first and last score the corpus exactly. Those
    in between cost no forward pass: they show each token as last scored, by a validation or by a training batch, with
    dropout on and up to an epoch ago. All loggers get the shares under `corpus/` (see `pml.last_seen.shares`).
    TensorBoard also gets a picture of all tokens, histograms of their probabilities and margins, a table of the most
    stubborn ones, and at the end a picture of the whole run. `history.parquet` in the folder of `RunRecord` keeps the
    looks, for at most `pml.token_history.HISTORY_TOKENS` target tokens: examples spread evenly over a larger corpus.

    Args:
        threshold: Probability that a token must exceed; above 0.5 greedy decoding is certain.
        looks: Number of looks from the first optimiser step to the last; 0 leaves only the evaluations.
    """

    def __init__(self, threshold: float = 0.5, looks: int = 40) -> None:
        critical_loss(threshold)
        if looks < 0 or looks == 1:
            raise InputError(f"looks is {looks}; expected at least 2, the first step and the last, or 0 for none")
        super().__init__(metrics.TokenThresholds(threshold))
        self.threshold = threshold
        self.looks = looks
        self._seen: LastSeen | None = None
        self._restored: dict[str, Any] = {}
        self._before = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            # Discard the state of a checkpoint that was evaluated; that of this fit comes later.
            self._restored = {}

    # Training --------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Memorization)
        self._seen = None
        if self.looks and _has_corpus(trainer) and self._is_last(trainer):
            self._prepare(trainer, pl_module)
            if trainer.global_step == 0:
                self._look_at_the_frozen_model(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._before = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        scores: TokenScores = outputs["scores"]
        if last_acting(trainer, TokenThresholds) is self:
            fraction = metrics.sub_threshold_fraction(scores, self.threshold)
            pl_module.log("train/sub_threshold_fraction", fraction.float(), batch_size=len(scores.losses))
        if self._seen is not None:
            self._seen.update(scores, self._before)
            # The last step is left to `on_train_end`, which scores it exactly.
            if self._looks.due(trainer.global_step) and trainer.global_step != self._total:
                self._look(trainer, pl_module)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *rest: Any) -> None:
        super().on_validation_batch_end(trainer, pl_module, outputs, *rest)
        if self._seen is not None and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._seen.update(outputs["scores"], trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Memorization)
        if self._seen is not None:
            self._seen.update(exact_scores(trainer, pl_module), trainer.global_step)
            self._look(trainer, pl_module)
            self._finish(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # A new look would need all ranks, and some may be gone: write the looks so far.
        if self._seen is not None and disk_failure(exception) is None:
            self._write(trainer)

    # Resuming --------------------------------------------------------------------------------------------------------

    # Not `state_dict`: with it, Lightning would refuse a second callback of this class beside the default one.
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._seen is not None:
            checkpoint[CHECKPOINT_KEY] = {"seen": self._seen.state_dict(), "history": self._history.state_dict()}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._restored = checkpoint.get(CHECKPOINT_KEY, {})

    # What the hooks do -----------------------------------------------------------------------------------------------

    def _is_last(self, trainer: Trainer) -> bool:
        """Whether this is the last callback of its kind that looks: of several, only that one does."""
        return last_acting(trainer, TokenThresholds, lambda one: bool(one.looks)) is self

    def _prepare(self, trainer: Trainer, module: Memorization) -> None:
        examples = trainer.datamodule.corpus.examples  # type: ignore[attr-defined]
        self._targets = [example.target_ids for example in examples]
        self._lengths = [len(target) for target in self._targets]
        self._seen = LastSeen(self._lengths, module.device)
        self._history = HistoryRecorder(self._targets)
        if self._restored:
            self._seen.load_state_dict(self._restored["seen"])
            self._history.load_state_dict(self._restored["history"])
            self._restored = {}
        self._folder = recorded_folder(trainer)
        endless = trainer.max_epochs == -1 and trainer.max_steps == -1
        self._total = None if endless else total_steps(trainer, module.curriculum) or None
        self._looks = Looks(self._total, self.looks, after=trainer.global_step)

    def _look_at_the_frozen_model(self, trainer: Trainer, module: Memorization) -> None:
        """Start every curve at the frozen model, those of training batches included."""
        assert self._seen is not None
        scores = exact_scores(trainer, module, frozen=True)
        self._seen.update(scores, 0)
        below = metrics.sub_threshold_fraction(scores, self.threshold).item()
        start = {"train/loss": metrics.mean_loss(scores).item(), "train/sub_threshold_fraction": below, "epoch": 0.0}
        log_everywhere(trainer, start)
        self._look(trainer, module)

    def _look(self, trainer: Trainer, module: LightningModule) -> None:
        """Gather the last scores from all ranks, then keep, log and show them."""
        assert self._seen is not None
        standing = self._seen.standing()
        if not trainer.is_global_zero:
            return
        step = trainer.global_step
        self._history.add(step, standing)
        values = {f"corpus/{name}": value for name, value in shares(standing, self._lengths, self.threshold).items()}
        values |= {f"logit_margin/{name}": value for name, value in margins(standing).items()}
        log_everywhere(trainer, {**values, "train/learning_rate": trainer.optimizers[0].param_groups[0]["lr"]})
        for board in _boards(trainer):
            show_look(board, standing, self._targets, module.tokenizer, step, self.threshold)  # type: ignore[arg-type]

    def _finish(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero:
            return
        # Lightning logs only every few steps, so it may have missed the last values.
        last = {n: v.item() for n, v in trainer.callback_metrics.items() if n.startswith("train/")}
        log_everywhere(trainer, {**last, "epoch": float(trainer.current_epoch)})
        for board in _boards(trainer):
            show_history(board, self._history.history, self.threshold)
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        if trainer.is_global_zero and self._folder is not None:
            self._history.write(self._folder / HISTORY_NAME)


def _has_corpus(trainer: Trainer) -> bool:
    return hasattr(getattr(trainer, "datamodule", None), "corpus")


def _boards(trainer: Trainer) -> list[TensorBoardLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
