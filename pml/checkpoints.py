"""Checkpoints from which a fit resumes exactly: saving them, stopping a fit at a step, and finding the newest one."""

import io
import logging
import os
import pickle
import shlex
import time
import zipfile
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from pml.atomic import whole_file
from pml.errors import InputError
from pml.modules import Memorization
from pml.own_classes import folders_of_own_classes
from pml.ranks import several_ranks
from pml.run_folder import folder_of_run
from pml.same_folder import CHECKPOINTS as FOLDER_NAME
from pml.same_folder import loggers_of
from pml.stopping import Stopped, is_listening, request, requested

__all__ = ["FOLDER_NAME", "Checkpoints", "StopsAtSteps", "newest_checkpoint", "read_checkpoint", "with_own_connectors"]

log = logging.getLogger(__name__)

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"


class StopsAtSteps(Callback):
    """Ends a fit at the end of an optimiser step when a signal has asked for it, on all ranks at the same step.

    Where validation follows a step, it waits for that, and after an epoch's last step for the epoch's end: Lightning
    would not make up for a validation that it missed.
    """

    def __init__(self) -> None:
        self._waits_for_validation = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Memorization)
        # Not between two micro-batches of a step. After an epoch's last batch, on_train_epoch_end follows.
        if not pl_module.global_batch.is_open and not trainer.is_last_batch:
            if _is_validated_now(trainer):
                self._waits_for_validation = True
            else:
                self._at_step_end(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._waits_for_validation:
            self._waits_for_validation = False
            self._at_step_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._at_step_end(trainer, pl_module)

    def _at_step_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        signum = _agreed(requested(), pl_module.device)
        # After its last step the fit ends by itself, with all its measurements.
        if signum is not None and not _is_last_step(trainer):
            self.save(trainer)
            raise Stopped(signum, at_once=False)

    def save(self, trainer: Trainer) -> None:
        """Save the state to resume from; this class saves nothing. All ranks must call it."""


class SignalsLeftToSteps(_SignalConnector):
    """Passes SIGTERM on to processes that the launcher started, and leaves the rest to `StopsAtSteps`.

    Lightning's own handler would end a fit in the middle of validation or of a global batch, save nothing and exit with
    code 0. It would also broadcast between ranks from within the handler.

    Under Slurm, the signal for requeueing (SIGUSR1) stops a fit in the same way. Lightning would save `hpc_ckpt_1.ckpt`
    from within the handler, wherever the fit is, and requeue the job. Without that file the requeued job, which is the
    same command, would begin a new run, so nothing is requeued here.
    """

    @property
    def received_sigterm(self) -> bool:
        return False

    @received_sigterm.setter
    def received_sigterm(self, value: bool) -> None:
        pass

    def _sigterm_notifier_fn(self, signum: Any, _: FrameType) -> None:
        if (launcher := self.trainer.strategy.launcher) is not None:
            launcher.kill(signum)

    def _slurm_sigusr_handler_fn(self, signum: Any, frame: FrameType) -> None:
        request(int(signum), frame)


class GivenCheckpoints(_CheckpointConnector):
    """Loads the checkpoint that `ckpt_path` names and no other.

    Under Slurm, Lightning would load any `hpc_ckpt_1.ckpt` of the working directory if there is no `ckpt_path`.
    """

    _hpc_resume_path = None


def with_own_connectors(trainer: Trainer) -> Trainer:
    """The trainer, which then leaves signals to `pml.stopping`, if that listens, and loads no checkpoint unasked.

    Within `pml.stopping.at_step_ends`, a signal then ends a fit only after a step, if it has a `StopsAtSteps` callback.
    """
    trainer._checkpoint_connector = GivenCheckpoints(trainer)
    if is_listening():
        trainer._signal_connector = SignalsLeftToSteps(trainer)
    return trainer


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its final path and moves it there; Lightning's own I/O uses the temporary folder."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        content = io.BytesIO()
        torch.save(checkpoint, content)
        with whole_file(Path(path)) as file:
            file.write(content.getbuffer())


class Checkpoints(StopsAtSteps, Checkpoint):
    """Saves a checkpoint every few minutes, when a signal ends the fit, and when the fit ends by itself.

    In the run's folder, `checkpoints/last.ckpt` is the newest checkpoint and `previous.ckpt` the one before it, in case
    the newest is damaged. Checkpoints are saved at the end of an optimiser step.

    Args:
        minutes: Training time between two checkpoints.
    """

    def __init__(self, minutes: float = 5.0) -> None:
        if not minutes > 0:
            raise InputError(f"minutes is {minutes}; expected a time above 0 between two checkpoints, such as 5")
        super().__init__()
        self.minutes = minutes
        self.folder = Path()
        """Folder of the checkpoints; set when the fit is set up."""
        self._saved_at = 0.0
        self._saved_step = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.folder = folder_of_run(trainer) / FOLDER_NAME
            trainer.strategy.checkpoint_io = WholeCheckpoints()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step

    def _at_step_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super()._at_step_end(trainer, pl_module)
        if _is_last_step(trainer):
            # on_train_end saves, after the record is written: without a record, there would be nothing to resume.
            return
        # Clocks differ between ranks, and all ranks must save together.
        if trainer.strategy.broadcast(time.monotonic() - self._saved_at >= 60 * self.minutes):
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._saved_step != trainer.global_step:
            self.save(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["pml_loggers"] = loggers_of(trainer, self.folder.parent)

    def how_to_go_on(self) -> str:
        """Advice on how to resume: the command for the newest checkpoint, or that there is none."""
        if not any(self.folder.glob("*.ckpt")):
            return "there is no checkpoint to go on from yet"
        config = self.folder.parent / "config.yaml"
        if config.is_file():
            python_path = os.pathsep.join(map(str, folders_of_own_classes()))
            where = f"PYTHONPATH={shlex.quote(python_path)} " if python_path else ""
            return f"go on with: {where}pml fit --config {shlex.quote(str(config))} --ckpt_path last"
        return f"go on with --ckpt_path {shlex.quote(str(self.folder / LAST))}"

    def save(self, trainer: Trainer) -> None:
        """Save a checkpoint, keeping the one before; a `fast_dev_run` saves none. All ranks must call it."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        partial = self.folder / f".{LAST}.partial"
        trainer.save_checkpoint(partial)
        if trainer.is_global_zero:
            if (last := self.folder / LAST).exists():
                last.replace(self.folder / PREVIOUS)
            partial.replace(last)
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step


def newest_checkpoint(run: Path) -> Path:
    """Path of the newest undamaged checkpoint of a run; newer ones that were skipped are named in warnings.

    Checkpoints that hold only weights, as a user's own ModelCheckpoint may save, and those that pml did not write are
    skipped too.

    Raises:
        InputError: If there is no checkpoint to resume from.
    """
    # In a copied run, the one before the newest may have the later time.
    by_age = sorted((run / FOLDER_NAME).glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    files = sorted(by_age, key=lambda path: path.name == PREVIOUS)
    for path in files:
        if not _is_whole(path):
            log.warning("%s: damaged, so the checkpoint before it is taken", path)
            continue
        try:
            content = read_checkpoint(path)
        except InputError as error:
            log.warning("%s; the checkpoint before it is taken", error)
            continue
        if "optimizer_states" in content:
            return path
        log.warning("%s: holds only weights, so it is skipped", path)
    found = f"none of its {len(files)} checkpoints can be resumed" if files else "no checkpoint in it"
    raise InputError(f"{run}: {found}, so there is nothing to go on from; leave ckpt_path out")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of tensors and plain Python, without running any code in it.

    Raises:
        InputError: If it cannot be read, is damaged, holds anything else, or was not written by a fit of pml.
    """
    if not path.is_file():
        raise InputError(f"ckpt_path is {path}; expected an existing checkpoint file")
    try:
        whole = _is_whole(path)
        content = torch.load(path, map_location="cpu", weights_only=True) if whole else None
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: holds more than tensors and plain Python, which is never read since it could run code; "
            "expected a checkpoint written by `pml fit`"
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise InputError(f"{path}: cannot be read as a checkpoint ({' '.join(str(error).split())[:100]})") from error
    if content is None:
        raise InputError(f"{path}: damaged, or not a checkpoint; expected one written by `pml fit`")
    if not isinstance(content, dict) or not {"state_dict", "pml"} <= content.keys():
        raise InputError(f"{path}: not a checkpoint of pml; expected one written by `pml fit`")
    return content


def _is_whole(path: Path) -> bool:
    """Whether a checkpoint, which is a zip file, passes the checks of its checksums."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (OSError, zipfile.BadZipFile, EOFError, ValueError, NotImplementedError):
        return False


def _is_validated_now(trainer: Trainer) -> bool:
    """Whether Lightning validates after the batch that has just ended."""
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def _is_last_step(trainer: Trainer) -> bool:
    """Whether the step just taken is the last one of the fit."""
    # min_epochs or min_steps may keep the fit running in spite of should_stop.
    ends_early = trainer.should_stop and trainer.fit_loop._can_stop_early
    by_steps = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
    by_epochs = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= (trainer.max_epochs or 0)
    return by_steps or ends_early or (trainer.is_last_batch and by_epochs)


def _agreed(signum: int | None, device: torch.device) -> int | None:
    """The signal that any rank has received, or None. All ranks must call it."""
    if not several_ranks():
        return signum
    signums = torch.tensor(signum or 0, device=device)
    torch.distributed.all_reduce(signums, op=torch.distributed.ReduceOp.MAX)
    return int(signums) or None
