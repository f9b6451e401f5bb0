"""One record per fit: what was run and what came out, beside the adapter and the per-token results."""

import logging
import math
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks._logging import exact_scores, log_everywhere
from callbacks.generalization import Generalization
from callbacks.harm import Harm
from callbacks.retention import Retention
from callbacks.stop_when_recalled import StopWhenRecalled
from callbacks.verbatim_recall import VerbatimRecall
from pml import metrics
from pml.adapter import adapter_parameters
from pml.atomic import whole_file
from pml.convergence import LossHistory
from pml.corpus import Corpus
from pml.corpus_file import CORPUS_NAME, HELD_OUT_NAME, write_corpus
from pml.errors import InputError
from pml.model_card import CARD_NAME, model_card
from pml.modules import Memorization
from pml.recall import Generated
from pml.records import RECORD_NAME, Record, Status, write_record
from pml.run_folder import folder_of_loggers, write_configuration
from pml.token_results import TOKENS_NAME, replaced_tokens, write_tokens
from pml.weighting import TokenScores, critical_loss

__all__ = ["RunRecord"]

log = logging.getLogger(__name__)

PACKAGES = ("pml", "torch", "lightning", "transformers", "peft", "torchmetrics")


class RunRecord(Callback):
    """Measures the frozen model before the fit and the adapted one after it, and writes the run's results.

    When the fit starts, `corpus.parquet` goes into the run's folder: queries and targets as the user wrote them, with
    their token ids. When it ends, so do `record.json` (see `pml.records.Record`), `tokens.parquet` (one row per target
    token) and `adapter/` (as `save_pretrained` writes it). List it after `VerbatimRecall` and `StopWhenRecalled`, whose
    findings it records; those of `Generalization`, `Harm` and `Retention` it asks for. All loggers get the settings of
    the run, and its results as first and last points of the curves of `val/`.

    Args:
        dirpath: The run's folder; None is that of the loggers, see `pml.run_folder.folder_of_loggers`.
        threshold: Probability below which a target token counts as not certain.
        overwrite: Write over the record of an earlier run in the same folder.
        extraction_samples: Number of samples at temperature 1 that `extraction_probability` is about.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        threshold: float = 0.5,
        overwrite: bool = False,
        extraction_samples: int = 100,
    ) -> None:
        critical_loss(threshold)
        if extraction_samples < 1:
            raise InputError(f"extraction_samples is {extraction_samples}; expected at least 1 sample")
        self.dirpath = dirpath
        self.threshold = threshold
        self.overwrite = overwrite
        self.extraction_samples = extraction_samples
        self.record: Record | None = None
        """What the last fit came to; None before."""
        self.folder = Path()
        """Where the run's results go; known once the fit is set up."""
        self._initial: TokenScores | None = None
        self._history = LossHistory()
        self._last_rate = 0.0
        self._started = self._trained = 0.0
        # Found out now rather than when a long run is over.
        self._versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not isinstance(pl_module, Memorization):
            raise InputError(f"RunRecord records SFT and MemFT; the model is a {type(pl_module).__name__}")
        # Asking for the loggers' folder takes all ranks, so it is asked for once, here.
        self.folder = Path(self.dirpath) if self.dirpath else folder_of_loggers(trainer)
        path = self.folder / RECORD_NAME
        if trainer.is_global_zero and path.exists() and not self.overwrite:
            raise InputError(
                f"{path} is the record of an earlier run; choose another folder "
                "(trainer.logger.init_args.name, or RunRecord's dirpath) or set overwrite: true"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Memorization)
        if trainer.is_global_zero:
            self._keep_corpus(trainer, pl_module)
        self._initial = exact_scores(trainer, pl_module, frozen=True)
        self.record = None
        self._history, self._last_rate = LossHistory(), 0.0
        self._started = self._trained = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Memorization)
        assert self._initial is not None
        if trainer.is_global_zero:
            start = self._results(self._initial) if trainer.global_step == 0 else {}
            _log_settings(trainer, pl_module, start)
        # Once more: other callbacks may have measured something of their own before the fit.
        self._started = self._trained = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        scores: TokenScores = outputs["scores"]
        self._history.add(scores.losses.sum(), scores.mask.sum())

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._last_rate = optimizer.param_groups[0]["lr"]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trained = time.monotonic()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Memorization)
        self._write(trainer, pl_module, ended=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, KeyboardInterrupt) or not self._started or self.record is not None:
            return
        assert isinstance(pl_module, Memorization)
        if trainer.world_size == 1:
            self._write(trainer, pl_module, ended=False)
        elif trainer.is_global_zero:
            # Measuring takes all ranks, and some may be gone; what was learnt is kept all the same.
            pl_module.model.save_pretrained(str(self.folder / "adapter"), save_embedding_layers=False)

    def _write(self, trainer: Trainer, pl_module: Memorization, ended: bool) -> None:
        # Up to the last epoch: other callbacks may have decoded the whole corpus since.
        wall_seconds = self._trained - self._started
        scores = exact_scores(trainer, pl_module)
        trained = trainer.strategy.reduce(
            torch.tensor(pl_module.tokens_trained, device=pl_module.device), reduce_op="sum"
        )
        history = trainer.strategy.reduce(self._history.sums().to(pl_module.device), reduce_op="sum").cpu()
        held_out, other_text = self._outside_the_corpus(trainer, pl_module) if ended else ({}, {})
        if not trainer.is_global_zero:
            return
        folder = self.folder
        corpus: Corpus = trainer.datamodule.corpus  # type: ignore[attr-defined]
        self.record = self._record(
            trainer,
            pl_module,
            corpus,
            scores,
            status=_status(scores) if ended else "interrupted",
            target_tokens_trained=int(trained),
            wall_seconds=wall_seconds,
            late_loss_drop=LossHistory.late_drop(history, self._history.steps),
            learning_rate_left=self._last_rate / pl_module.learning_rate,
            corpus_figures=trainer.datamodule.figures(scores) | held_out,  # type: ignore[attr-defined]
            **other_text,
        )
        write_tokens(folder / TOKENS_NAME, corpus, scores)
        pl_module.model.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
        encoder = trainer.datamodule.encoder(pl_module.tokenizer)  # type: ignore[attr-defined]
        # In place of PEFT's, which is blank.
        with whole_file(folder / "adapter" / CARD_NAME) as file:
            file.write(model_card(self.record, corpus, encoder).encode())
        # The record comes last: a folder that has one has everything.
        path = write_record(folder, self.record)
        log_everywhere(trainer, self._results(scores, wall_seconds))
        status = self.record.status
        log.info("record: %s%s", path, "" if status == "finished" else f" ({status})")
        if status == "diverged":
            log.warning(
                "diverged: the final loss is not a finite number; lower the learning rate of %g, or warm it up",
                pl_module.learning_rate,
            )

    def _keep_corpus(self, trainer: Trainer, pl_module: Memorization) -> None:
        """Write what the run memorises into its folder, so that it can be asked for when its source has changed."""
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        write_configuration(self.folder, pl_module, datamodule)
        write_corpus(self.folder / CORPUS_NAME, datamodule.corpus)
        if datamodule.held_out is not None:
            write_corpus(self.folder / HELD_OUT_NAME, datamodule.held_out)

    @staticmethod
    def _outside_the_corpus(
        trainer: Trainer, pl_module: Memorization
    ) -> tuple[dict[str, float], dict[str, dict[str, dict[str, float]]]]:
        """Figures of the held-out part and of other text; the callbacks may stand behind this one. Takes all ranks."""
        held_out: dict[str, float] = {}
        other_text: dict[str, dict[str, dict[str, float]]] = {}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Generalization):
                held_out |= callback.at_end(trainer, pl_module)
            elif isinstance(callback, Retention):
                other_text["retention"] = other_text.get("retention", {}) | callback.at_end(trainer, pl_module)
            elif isinstance(callback, Harm):
                other_text["harm"] = callback.at_end(trainer, pl_module)
        return held_out, other_text

    def _results(self, scores: TokenScores, wall_seconds: float = 0.0) -> dict[str, float]:
        """What the curves of validations begin and end with, by tag, and how long that took."""
        return {
            "val/loss": metrics.mean_loss(scores).item(),
            "val/token_accuracy": metrics.token_accuracy(scores).item(),
            "val/exact_match": metrics.exact_match(scores).double().mean().item(),
            "val/first_failure": metrics.first_failure(scores).double().mean().item(),
            "val/sub_threshold_fraction": metrics.sub_threshold_fraction(scores, self.threshold).item(),
            "val/min_target_probability": metrics.min_target_probability(scores).item(),
            "run/wall_seconds": wall_seconds,
        }

    def _record(
        self,
        trainer: Trainer,
        module: Memorization,
        corpus: Corpus,
        scores: TokenScores,
        **measured: Any,
    ) -> Record:
        """The record of the corpus' scores, with what was measured elsewhere."""
        parameters = sum(p.numel() for p in adapter_parameters(module.model).values())
        assert self._initial is not None
        initial_loss, final_loss = metrics.mean_loss(self._initial).item(), metrics.mean_loss(scores).item()
        bits = _memorized_bits(corpus, scores)
        recall = next((c for c in trainer.callbacks if isinstance(c, VerbatimRecall)), None)  # type: ignore[attr-defined]
        stop = next((c for c in trainer.callbacks if isinstance(c, StopWhenRecalled)), None)  # type: ignore[attr-defined]
        # What an earlier validation decoded says nothing about the weights as they are now.
        current = recall is not None and recall.generated_at_step == trainer.global_step
        generated = recall.shares() if recall is not None and current else {}
        similarity = _edit_similarity(module, recall.generated) if generated and recall is not None else None
        replaced = replaced_tokens(corpus, scores)
        record = Record(
            backbone=module.backbone.name,
            backbone_hash=module.backbone.content_hash,
            dtype=module.dtype_name,
            block=module.adapter.block_indices(len(module.backbone.blocks)),
            placement=module.adapter.placement,
            init=module.adapter.init,
            rank=module.adapter.rank,
            effective_parameters=parameters,
            corpus=corpus.name,
            corpus_hash=corpus.content_hash,
            corpus_encoding=corpus.encoding,
            corpus_settings=corpus.settings,
            pairs=len(corpus),
            target_tokens=corpus.target_tokens,
            corpus_entropy_bits=corpus.entropy_bits,
            method=module.method,
            method_settings=module.settings(),
            seed=module.seed,
            optimizer_steps=trainer.global_step - module.skipped_steps,
            skipped_steps=module.skipped_steps,
            initial_loss=initial_loss,
            final_loss=final_loss,
            loss_reduction=initial_loss - final_loss,
            token_accuracy=metrics.token_accuracy(scores).item(),
            exact_match=metrics.exact_match(scores).double().mean().item(),
            generated_exact_match=generated.get("generated_exact_match"),
            generated_token_accuracy=generated.get("generated_token_accuracy"),
            sub_threshold_fraction=metrics.sub_threshold_fraction(scores, self.threshold).item(),
            min_target_probability=metrics.min_target_probability(scores).item(),
            first_failure=metrics.first_failure(scores).double().mean().item(),
            by_kind=metrics.by_kind(replaced, self._initial, scores),
            generated_edit_similarity=similarity,
            extraction_probability=metrics.extraction_probability(scores, self.extraction_samples).mean().item(),
            extraction_samples=self.extraction_samples,
            memorized_bits=bits,
            bits_per_parameter=bits / parameters if bits is not None else None,
            steps_to_recall=stop.steps_to_recall if stop is not None else None,
            versions=self._versions,
            hardware=_hardware(trainer, module),
            git_commit=_git_commit(),
            **measured,
        )
        if record.generated_exact_match is not None and record.generated_exact_match != record.exact_match:
            log.info(
                "greedy decoding recalls %.4f of the targets, teacher forcing %.4f: some argmax is all but a tie",
                record.generated_exact_match,
                record.exact_match,
            )
        return record


def _status(scores: TokenScores) -> Status:
    """What a fit that ended with these scores is called."""
    return "finished" if math.isfinite(metrics.mean_loss(scores).item()) else "diverged"


def _memorized_bits(corpus: Corpus, scores: TokenScores) -> float | None:
    """See `pml.metrics.memorized_bits`; None where the corpus' information is unknown."""
    if corpus.entropy_bits is None:
        return None
    if corpus.fact_ids is None:
        loss = metrics.mean_loss(scores).item()
    else:
        loss = metrics.facts_loss(scores, corpus.fact_ids).item() / corpus.target_tokens
    return metrics.memorized_bits(corpus.entropy_bits, loss, corpus.target_tokens)


def _edit_similarity(module: Memorization, generated: Sequence[Generated] | None) -> float:
    """Mean over targets of the similarity in characters of greedy decoding and target, special tokens left out."""
    assert generated

    def text(ids: tuple[int, ...]) -> str:
        return str(module.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    return fmean(metrics.edit_similarity(text(g.token_ids), text(g.example.target_ids)) for g in generated)


SHOWN_RESULTS = ("val/exact_match", "val/token_accuracy", "val/loss", "val/sub_threshold_fraction", "run/wall_seconds")
"""Curves whose last points stand beside the settings."""

VARIED_FIRST = ("method", "rank", "target_tokens", "learning_rate", "seed")
"""Settings in TensorBoard's table: of more than five it shows the first by the alphabet.
The others are in the run's configuration and its record."""


def _log_settings(trainer: Trainer, module: Memorization, start: dict[str, float]) -> None:
    """Give all loggers the settings of the run, what people vary first, and the first points of its curves.

    TensorBoard takes the names of results with the first call only, and shows the last point of each.
    """
    corpus: Corpus = trainer.datamodule.corpus  # type: ignore[attr-defined]
    settings = {
        "method": module.method,
        "rank": module.adapter.rank,
        "target_tokens": corpus.target_tokens,
        "learning_rate": module.learning_rate,
        "seed": module.seed,
        "pairs": len(corpus),
        "corpus": corpus.name,
        "placement": str(module.adapter.placement),
        "init": module.adapter.init,
        "dropout": module.adapter.dropout,
        "schedule": module.schedule,
        "dtype": module.dtype_name,
        "effective_parameters": sum(p.numel() for p in adapter_parameters(module.model).values()),
    }
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and start:
            shown = {tag: start[tag] for tag in SHOWN_RESULTS}
            logger.log_hyperparams({name: settings[name] for name in VARIED_FIRST}, shown, step=trainer.global_step)
            logger.log_metrics({tag: value for tag, value in start.items() if tag not in shown}, trainer.global_step)
        else:
            logger.log_hyperparams(settings)
            if start:
                logger.log_metrics(dict(start), trainer.global_step)


def _hardware(trainer: Trainer, module: Memorization) -> dict[str, Any]:
    device = module.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": device.type,
        "name": name,
        "devices": trainer.world_size,
        "threads": torch.get_num_threads(),
        "cpu_choice": asdict(module.cpu_choice) if module.cpu_choice is not None else None,
    }


def _git_commit() -> str | None:
    """Commit of the working directory, with `+` where it has changes; None outside a repository."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
