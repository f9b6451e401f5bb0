"""Progress of a fit: one bar over all of it in a terminal, and everywhere a line on why it ended early."""

import logging
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ProgressBar, Timer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from torch import Tensor

from pml.atomic import whole_file
from pml.errors import InputError
from pml.metrics import above_threshold
from pml.modules import Memorization
from pml.ranks import is_first_rank
from pml.schedule import total_steps

__all__ = [
    "PROGRESS_NAME",
    "FitProgress",
    "ProgressFile",
    "SayWhyItEnded",
    "is_interactive",
    "seconds_left",
    "show_seconds",
]

log = logging.getLogger(__name__)

PROGRESS_NAME = "progress.txt"


def is_interactive() -> bool:
    """Whether stderr is a terminal that someone watches: not one of a CI job, and not a dumb one."""
    return sys.stderr.isatty() and not os.environ.get("CI") and os.environ.get("TERM") != "dumb"


def seconds_left(steps: int, total: int | None, seconds: float, time_left: float | None) -> float | None:
    """Seconds until a fit ends by its steps or by its time, whichever comes first; None if neither is known.

    Args:
        steps: Steps taken by this process.
        total: Steps that this process takes in all; None if there is no limit.
        seconds: Time that the steps took.
        time_left: Seconds of `max_time` that are left; None if there is no limit.

    Example:
        >>> seconds_left(steps=10, total=40, seconds=5.0, time_left=None)
        15.0
        >>> seconds_left(steps=10, total=40, seconds=5.0, time_left=8.0)
        8.0
    """
    by_steps = (total - steps) * seconds / steps if total is not None and steps > 0 else None
    known = [left for left in (by_steps, time_left) if left is not None]
    return max(0.0, min(known)) if known else None


def show_seconds(seconds: float) -> str:
    """A duration in words, in at most two units.

    Example:
        >>> [show_seconds(s) for s in (4.2, 75, 3725)]
        ['4 s', '1 min 15 s', '1 h 02 min']
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class FitProgress(ProgressBar):
    """One bar over the whole fit, on stderr: steps, loss, share of certain target tokens, time left.

    The share is over the batches of the epoch so far, in training mode (with dropout).

    Args:
        console: Console to draw on; None is stderr.
    """

    seconds_between_looks = 0.5
    """Minimum seconds between updates, since each makes the host wait for the device."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self._console = console
        self._bar: Progress | None = None
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._total = _steps_of(trainer, pl_module)
        self._first, self._started, self._looked = trainer.global_step, time.monotonic(), -math.inf
        self._sums: Tensor | None = None
        self._certain: float | None = None
        self._start(trainer)

    def _start(self, trainer: Trainer) -> None:
        if self._enabled and is_first_rank():
            columns = (TextColumn("fit"), BarColumn(bar_width=None), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=self._console or Console(stderr=True), transient=True)
            self._task = self._bar.add_task(self._words(trainer, None), total=1.0 if self._ends(trainer) else None)
            self._bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._shows:
            return
        scores = outputs["scores"]
        sums = torch.stack([above_threshold(scores).sum(), scores.mask.sum()])
        self._sums = sums if self._sums is None else self._sums + sums
        if time.monotonic() - self._looked >= self.seconds_between_looks:
            self._look(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._sums = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    @property
    def _shows(self) -> bool:
        return self._bar is not None

    def _look(self, trainer: Trainer) -> None:
        self._looked = time.monotonic()
        if self._sums is not None:
            certain, tokens = self._sums.tolist()
            self._certain = certain / tokens if tokens else self._certain
        left = self._seconds_left(trainer)
        self._show(self._words(trainer, left), left)

    def _show(self, words: str, left: float | None) -> None:
        assert self._bar is not None
        seconds = self._looked - self._started
        done = None if left is None else seconds / (seconds + left) if seconds + left else 0.0
        self._bar.update(self._task, completed=done, description=words)

    def _words(self, trainer: Trainer, left: float | None) -> str:
        steps = f"{trainer.global_step}" + (f"/{self._total}" if self._total is not None else "")
        words = [f"step {steps}"]
        if (loss := trainer.callback_metrics.get("train/loss")) is not None:
            words.append(f"loss {loss.item():.3f}")
        if self._certain is not None:
            words.append(f"{100 * self._certain:.1f} % certain")
        if left is not None:
            words.append(f"{show_seconds(left)} left")
        return ", ".join(words)

    def _ends(self, trainer: Trainer) -> bool:
        return self._total is not None or _time_left(trainer) is not None

    def _seconds_left(self, trainer: Trainer) -> float | None:
        total = None if self._total is None else self._total - self._first
        steps, seconds = trainer.global_step - self._first, time.monotonic() - self._started
        return seconds_left(steps, total, seconds, _time_left(trainer))


class ProgressFile(FitProgress):
    """Writes the same words to a file in the run's folder while the fit runs, for other processes to read.

    Args:
        folder: The run's folder.
    """

    seconds_between_looks = 2.0

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = folder / PROGRESS_NAME

    @property
    def _shows(self) -> bool:
        return is_first_rank()

    def _start(self, trainer: Trainer) -> None:
        pass

    def _show(self, words: str, left: float | None) -> None:
        with whole_file(self.path) as file:
            file.write(words.encode())

    def _stop(self) -> None:
        if self._shows:
            self.path.unlink(missing_ok=True)


class SayWhyItEnded(Callback):
    """Logs in one line what ended a fit before its last step."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and (reason := _why_it_ended(trainer)) is not None:
            total = _steps_of(trainer, pl_module)
            log.info("stopped after %d%s steps: %s", trainer.global_step, f" of {total}" if total else "", reason)


def _why_it_ended(trainer: Trainer) -> str | None:
    """What set `should_stop`; None if nothing did, or if it has logged that itself."""
    if not trainer.should_stop:
        return None
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, Timer) and (left := callback.time_remaining()) is not None and left <= 0:
            return f"its time is over ({show_seconds(callback.time_elapsed())})"
        if isinstance(callback, EarlyStopping) and callback.stopping_reason_message is not None:
            return f"EarlyStopping: {callback.stopping_reason_message.partition(' Signaling')[0].rstrip('.')}"
    if any(getattr(callback, "steps_to_recall", None) is not None for callback in callbacks):
        return None  # StopWhenRecalled has logged it
    return "a callback asked for it"


def _steps_of(trainer: Trainer, module: LightningModule) -> int | None:
    try:
        return total_steps(trainer, module.curriculum if isinstance(module, Memorization) else None)
    except (InputError, OverflowError):
        return None


def _time_left(trainer: Trainer) -> float | None:
    limits = [c.time_remaining() for c in trainer.callbacks if isinstance(c, Timer)]  # type: ignore[attr-defined]
    return min((limit for limit in limits if limit is not None), default=None)
