"""One record per fit: what was run and what came out, beside the adapter and the per-token results."""

import contextlib
import logging
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerFn

from callbacks._corpus import corpus_of
from callbacks._logging import exact_scores, log_everywhere, log_settings
from callbacks.token_thresholds import TokenThresholds
from pml.adapter import adapter_parameters
from pml.convergence import LossHistory
from pml.corpus import Corpus
from pml.corpus_file import CORPUS_NAME, HELD_OUT_NAME, write_corpus
from pml.decoding import plain_decoding
from pml.errors import InputError
from pml.measures import CERTAIN, recall_measures, validation_point
from pml.model_card import model_card
from pml.modules import Memorization
from pml.provenance import git_commit, hardware, run_settings, versions
from pml.ranks import summed_over_ranks
from pml.records import RECORD_NAME, MeasuresForRecord, Record, fault_of_field, write_record
from pml.run_folder import folder_of_loggers, write_configuration
from pml.saved_adapter import save_adapter
from pml.stopping import Stopped
from pml.token_history import HISTORY_NAME
from pml.token_results import TOKENS_NAME, write_tokens
from pml.token_scores import TokenScores, critical_loss

__all__ = ["RunRecord"]

log = logging.getLogger(__name__)

CHECKPOINT_KEY = "pml_run_record"


class RunRecord(Callback):
    """Measures the frozen model before the fit and the adapted one after it, and writes the run's results.

    When the fit starts, it writes `corpus.parquet` into the run's folder: queries and targets as the user wrote them,
    with their token ids. When the fit ends, it writes `record.json` (see `pml.records.Record`), `tokens.parquet` (one
    row per target token) and `adapter/` (as `save_pretrained` does). If the fit fails, it saves only the adapter, once
    a batch was trained on. Other callbacks add measurements to the record through `record_fields`
    (`pml.records.MeasuresForRecord`). All loggers get the settings of the run, and its results as the first and last
    points of the `val/` curves. A `fast_dev_run` writes nothing.

    Args:
        dirpath: The run's folder; None takes that of the loggers, see `pml.run_folder.folder_of_loggers`.
        threshold: Probability up to which the curves count a target token as not certain; None takes that of the last
            `TokenThresholds`, or 0.5. The record always uses 0.5.
        overwrite: Overwrite the record of an earlier run in the same folder.
        extraction_samples: Number of samples at temperature 1 for `extraction_probability`.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        threshold: float | None = None,
        overwrite: bool = False,
        extraction_samples: int = 100,
    ) -> None:
        if threshold is not None:
            critical_loss(threshold)
        if extraction_samples < 1:
            raise InputError(f"extraction_samples is {extraction_samples}; expected at least 1 sample")
        self.dirpath = dirpath
        self.threshold = threshold
        self.overwrite = overwrite
        self.extraction_samples = extraction_samples
        self.record: Record | None = None
        """Record of the last fit; None until it has ended."""
        self.grown_from: Record | None = None
        """Record of the smaller adapter that this one was grown from, if any; its steps and time are added."""
        self.run_folder: Path | None = None
        """The run's folder, which `pml.run_folder.recorded_folder` finds; None before `setup` and in a trial."""
        self._initial: TokenScores | None = None
        self._history = LossHistory()
        self._last_rate = 0.0
        self._has_trained = False
        self._clock = _Clock()
        self._restored: dict[str, Any] = {}
        # A missing package should raise here, not at the end of a long run.
        self._versions = versions()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        # Discard the state of an earlier fit, and of a checkpoint that was evaluated; that of this fit comes later.
        self._initial, self.run_folder, self._restored = None, None, {}
        if _is_trial(trainer):
            return
        if not isinstance(pl_module, Memorization):
            raise InputError(f"RunRecord records SFT and MemFT; the model is a {type(pl_module).__name__}")
        corpus_of(trainer, self)
        # All ranks must ask for the loggers' folder, so it is asked for once, here.
        self.run_folder = Path(self.dirpath) if self.dirpath else folder_of_loggers(trainer)
        if not self.dirpath and not trainer.loggers and self.folder.resolve() == Path.cwd():
            raise InputError(
                "RunRecord would write a corpus, a configuration and an adapter into the working directory, over files "
                "of the same names; give it a dirpath, or the trainer a logger or a default_root_dir"
            )
        path = self.folder / RECORD_NAME
        goes_on = pl_module.resume_folder is not None and pl_module.resume_folder.resolve() == self.folder.resolve()
        may_replace = self.overwrite or goes_on
        if trainer.is_global_zero and path.exists() and not may_replace:
            raise InputError(
                f"{path} is the record of an earlier run; choose another folder "
                "(trainer.logger.init_args.name, or RunRecord's dirpath) or set overwrite: true"
            )

    @property
    def folder(self) -> Path:
        """The run's folder once the fit is set up."""
        assert self.run_folder is not None
        return self.run_folder

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if _is_trial(trainer):
            return
        assert isinstance(pl_module, Memorization)
        if trainer.is_global_zero:
            self._keep_corpus(trainer, pl_module)
        self._initial = exact_scores(trainer, pl_module, frozen=True)
        self.record = None
        self._history, self._last_rate, self._has_trained = LossHistory(pl_module.device), 0.0, False
        self._clock = _Clock()
        if self._restored:
            self._history.load_state_dict(self._restored["history"])
            self._last_rate = self._restored["last_rate"]
            self._clock = _Clock(self._restored["seconds"])
            self._restored = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._initial is None:
            return
        assert isinstance(pl_module, Memorization)
        if trainer.is_global_zero:
            start = validation_point(self._initial, self._threshold(trainer)) if trainer.global_step == 0 else {}
            log_settings(trainer, pl_module, start)
        # Restart the clock: other callbacks may have measured something since `on_fit_start`.
        self._clock.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        scores: TokenScores = outputs["scores"]
        self._has_trained = True
        self._history.add(scores.losses.sum(), scores.mask.sum())
        self._clock.look()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._last_rate = optimizer.param_groups[0]["lr"]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock.look()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Memorization)
        if self._initial is not None:
            self._write(trainer, pl_module, ended=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if trainer.state.fn != TrainerFn.FITTING or self._initial is None or self.record is not None:
            return
        assert isinstance(pl_module, Memorization)
        # The adapter comes first: measuring it may fail too.
        if self._has_trained and trainer.is_global_zero:
            # Saving may fail for the reason that ended the fit.
            with contextlib.suppress(Exception):
                self._save_adapter(pl_module)
        stopped = isinstance(exception, KeyboardInterrupt) or (isinstance(exception, Stopped) and not exception.at_once)
        # At the end of a step all ranks stop together. Elsewhere some may be gone, and measuring takes all of them.
        if stopped and (trainer.world_size == 1 or isinstance(exception, Stopped)):
            self._write(trainer, pl_module, ended=False)

    # Not `state_dict`: with it, Lightning would refuse a second callback of this class beside the default one.
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._initial is not None:
            checkpoint[CHECKPOINT_KEY] = {
                "history": self._history.state_dict(),
                "last_rate": self._last_rate,
                "seconds": self._clock.seconds,
            }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._restored = checkpoint.get(CHECKPOINT_KEY, {})

    # What the hooks do -----------------------------------------------------------------------------------------------

    def _write(self, trainer: Trainer, pl_module: Memorization, ended: bool) -> None:
        # The clock stopped at the last step: other callbacks may have decoded the whole corpus since.
        wall_seconds = self._clock.seconds
        scores = exact_scores(trainer, pl_module)
        trained = summed_over_ranks(torch.tensor(pl_module.tokens_trained, device=pl_module.device))
        history = summed_over_ranks(self._history.sums()).cpu()
        others = [c for c in trainer.callbacks if isinstance(c, MeasuresForRecord)]  # type: ignore[attr-defined]
        measured = [(type(c).__name__, c.record_fields(trainer, pl_module, ended)) for c in others]
        if not trainer.is_global_zero:
            return
        corpus: Corpus = trainer.datamodule.corpus  # type: ignore[attr-defined]
        assert self._initial is not None
        parameters = sum(p.numel() for p in adapter_parameters(pl_module.model).values())
        own = {
            **run_settings(trainer, pl_module, corpus),
            **recall_measures(corpus, self._initial, scores, parameters, samples=self.extraction_samples),
            "corpus_figures": trainer.datamodule.figures(scores),  # type: ignore[attr-defined]
            "target_tokens_trained": int(trained),
            "late_loss_drop": LossHistory.late_drop(history, self._history.steps),
            "learning_rate_left": self._last_rate / pl_module.learning_rate,
            "wall_seconds": wall_seconds,
            "versions": self._versions,
            "hardware": hardware(trainer, pl_module),
            "git_commit": git_commit(),
        }
        status = "interrupted" if not ended else "finished" if math.isfinite(own["final_loss"]) else "diverged"
        record = Record(**_with_measured({"status": status, **own}, measured))
        if self.grown_from is not None:
            record = record.after(self.grown_from)
        self._write_results(trainer, pl_module, record, scores)
        self._say(record, pl_module)

    def _write_results(self, trainer: Trainer, pl_module: Memorization, record: Record, scores: TokenScores) -> None:
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        encoder = datamodule.encoder(pl_module.tokenizer)
        card = model_card(record, datamodule.corpus, encoder, plain_decoding(pl_module.backbone.model))
        # The adapter comes first: it must not be lost to a full disk.
        self._save_adapter(pl_module, card)
        write_tokens(self.folder / TOKENS_NAME, datamodule.corpus, scores)
        # The record comes last: a folder that has one is complete.
        write_record(self.folder, record)
        self.record = record
        log_everywhere(trainer, validation_point(scores, self._threshold(trainer), record.wall_seconds))

    def _save_adapter(self, module: Memorization, card: str | None = None) -> None:
        save_adapter(module.model, self.folder / "adapter", card)
        # An earlier record describes another adapter.
        (self.folder / RECORD_NAME).unlink(missing_ok=True)

    def _threshold(self, trainer: Trainer) -> float:
        """Threshold of the curves, whose points between the first and the last come from `TokenThresholds`."""
        drawn = [c.threshold for c in trainer.callbacks if isinstance(c, TokenThresholds)]  # type: ignore[attr-defined]
        return self.threshold if self.threshold is not None else drawn[-1] if drawn else CERTAIN

    def _say(self, record: Record, module: Memorization) -> None:
        if record.generated_exact_match is not None and record.generated_exact_match != record.exact_match:
            log.info(
                "greedy decoding recalls %.4f of the targets, teacher forcing %.4f: some argmax is nearly a tie",
                record.generated_exact_match,
                record.exact_match,
            )
        status = "" if record.status == "finished" else f" ({record.status})"
        log.info("record: %s%s", self.folder / RECORD_NAME, status)
        if record.status == "diverged":
            log.warning(
                "diverged: the final loss is not a finite number; lower the learning rate of %g, or warm it up",
                module.learning_rate,
            )

    def _keep_corpus(self, trainer: Trainer, pl_module: Memorization) -> None:
        """Write configuration and corpus into the run's folder: the corpus's source may change after the run."""
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        if self.overwrite and not self._restored:
            # They belong to an earlier run, whose corpus is overwritten below.
            for name in (HELD_OUT_NAME, HISTORY_NAME):
                (self.folder / name).unlink(missing_ok=True)
            if self.grown_from is None:
                (self.folder / RECORD_NAME).unlink(missing_ok=True)
        by_command = any(isinstance(callback, SaveConfigCallback) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        write_configuration(self.folder, pl_module, datamodule, replace=self.overwrite and not by_command)
        write_corpus(self.folder / CORPUS_NAME, datamodule.corpus)
        if datamodule.held_out is not None:
            write_corpus(self.folder / HELD_OUT_NAME, datamodule.held_out)


class _Clock:
    """Seconds of training, including those before a fit was resumed, without measurements before and after it."""

    def __init__(self, before: float = 0.0) -> None:
        self._before = before
        self.start()

    def start(self) -> None:
        self._started = self._looked = time.monotonic()

    def look(self) -> None:
        self._looked = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds from the start to the last look, plus those before a fit was resumed."""
        return self._before + self._looked - self._started


def _is_trial(trainer: Trainer) -> bool:
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def _with_measured(own: Mapping[str, Any], measured: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Fields of the record: its own, and those that other callbacks measured, without any that it cannot take."""
    fields = dict(own)
    for callback, found in measured:
        for name, value in found.items():
            known = fields.get(name) if isinstance(fields.get(name), Mapping) else None
            fault = "RunRecord sets it itself" if name in own and known is None else fault_of_field(name, value)
            if fault is not None:
                log.warning("%s: its record field %r is left out of the record: %s", callback, name, fault)
            else:
                fields[name] = value if known is None else {**known, **value}
    return fields
