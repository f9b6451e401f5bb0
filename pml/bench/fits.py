"""Cost of a fit through the Trainer relative to bare optimiser steps, and time to certified recall."""

import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback

from pml.adapter import adapter_parameters
from pml.bench.steps import Case, pml_loss, timed_steps
from pml.frozen_layers import on_device
from pml.modules import Memorization
from pml.optimizer import make_adamw

__all__ = ["FitCost", "RecallRun", "measure_fit", "measure_recall"]

WATCH = "callbacks.TokenThresholds"


@dataclass(frozen=True)
class FitCost:
    """What the Trainer and its callbacks add to optimiser steps, in one process and on the same batch.

    Attributes:
        case: The batch, which is the whole corpus, so that an epoch is one step.
        bare_seconds: Median optimiser step in a plain loop.
        trainer_seconds: Median time between steps inside `Trainer.fit`, without callbacks.
        watched_seconds: The same with `TokenThresholds`.
        watching_share: Share of the time of a fit of `steps` that the hooks of `TokenThresholds` take, including its
            pictures and its final exact look.
        steps: Optimiser steps of each fit.
    """

    case: Case
    bare_seconds: float
    trainer_seconds: float
    watched_seconds: float
    watching_share: float
    steps: int


def measure_fit(case: Case, steps: int = 100) -> FitCost:
    """Fit one batch through the Trainer without callbacks and with `TokenThresholds`, and time bare steps on it.

    Args:
        case: The batch.
        steps: Optimiser steps of each fit.
    """
    from pml.backbone import shared_backbones

    with shared_backbones(), tempfile.TemporaryDirectory() as folder:
        # A warm-up fit does what happens once per process.
        _, module, _ = _fit(case, [], folder, 3)
        module.release()
        plain, module, batch = _fit(case, [], folder, steps)
        bare = statistics.median(_bare_steps(module, batch, min(steps, 20)))
        module.release()
        watched, module, _ = _fit(case, [WATCH], folder, steps)
        module.release()
    return FitCost(case, bare, plain.step_seconds, watched.step_seconds, watched.hook_seconds / watched.seconds, steps)


@dataclass(frozen=True)
class _Times:
    step_seconds: float
    hook_seconds: float
    seconds: float


class _Clock(Callback):
    """Records when each training batch ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def _fit(case: Case, callbacks: Sequence[str], folder: str, steps: int) -> tuple[_Times, Memorization, dict[str, Any]]:
    """Times of a fit that runs all its steps, with its module and its batch."""
    cli = _cli(
        case.backbone,
        case.rank,
        [
            "--model=pml.modules.SFT",
            f"--model.dtype={case.dtype}",
            f"--model.matmul_precision={case.matmul_precision}",
            *(
                ["--data=data_modules.RandomTokens", f"--data.length={case.size}"]
                if case.corpus == "random_tokens"
                else ["--data=data_modules.PhoneBook", f"--data.pairs={case.size}", f"--data.batch_size={case.size}"]
            ),
            f"--trainer.max_epochs={steps}",
            "--trainer.logger=lightning.pytorch.loggers.TensorBoardLogger",
            f"--trainer.logger.save_dir={folder}",
            f"--trainer.callbacks=[{','.join(callbacks)}]",
        ],
    )
    watching = [c for c in cli.trainer.callbacks if type(c).__name__ == WATCH.rpartition(".")[2]]
    clock = _Clock()
    cli.trainer.callbacks.append(clock)
    started = time.perf_counter()
    with _timed(watching) as spent:
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    seconds = time.perf_counter() - started
    between = [end - start for start, end in zip(clock.ends, clock.ends[1:], strict=False)]
    batch = next(iter(cli.datamodule.val_dataloader()))
    return _Times(statistics.median(between), sum(spent), seconds), cli.model, batch


@contextmanager
def _timed(callbacks: Sequence[Any]) -> Iterator[list[float]]:
    """Time every hook of the callbacks; the list collects the seconds of each call."""
    spent: list[float] = []

    def timing(hook: Any) -> Any:
        def timed(*arguments: Any) -> None:
            started = time.perf_counter()
            hook(*arguments)
            spent.append(time.perf_counter() - started)

        return timed

    for callback in callbacks:
        for name in (name for name in dir(Callback) if name.startswith("on_")):
            setattr(callback, name, timing(getattr(callback, name)))
    yield spent


def _bare_steps(module: Memorization, batch: dict[str, Any], count: int) -> list[float]:
    batch = on_device(batch, module.backbone.model.device)
    module.frozen_layers.replay(module.cuda_graphs)  # as in the fit, which stops replaying when it ends
    optimizer = make_adamw(adapter_parameters(module.model).values(), 1e-3, (0.9, 0.999), 0.0)
    return timed_steps(lambda: pml_loss(module, batch), optimizer, module.matmul_precision, count)


def _cli(backbone: str, rank: int, arguments: Sequence[str]) -> Any:
    """CLI that `pml fit` would build from arguments, on one device, without checkpoints and validation."""
    from pml.lightning_cli import MemorizationCLI, prepare

    prepare()
    return MemorizationCLI(
        [
            *arguments,
            f"--model.backbone={backbone}",
            f"--model.adapter.rank={rank}",
            "--trainer.devices=1",
            "--trainer.enable_checkpointing=false",
            "--trainer.enable_progress_bar=false",
            "--trainer.limit_val_batches=0",
        ],
        run=False,
    )


@dataclass(frozen=True)
class RecallRun:
    """Duration of a fit until its recall was certified.

    Attributes:
        method: `SFT` or `MemFT`.
        settings: Key of `RECALL_SETTINGS`: `published` or `best`.
        steps: Optimiser steps taken.
        seconds: Duration of the fit, certificate included.
        recalled: Whether every target token was certified before the steps ran out.
    """

    method: str
    settings: str
    steps: int
    seconds: float
    recalled: bool


RECALL_SETTINGS = {
    "published": {
        "SFT": ["--model.learning_rate=0.01", "--model.adapter.dropout=0.1"],
        "MemFT": [
            "--model.learning_rate=0.01",
            "--model.adapter.dropout=0.1",
            "--model.weighting=OnlyThreshold",
            "--model.weighting.when_memorized=uniform",
        ],
    },
    "best": {method: ["--model.learning_rate=0.2"] for method in ("SFT", "MemFT")},
}
"""Options of the models by settings and method: the paper's, and those that need the fewest steps here."""


def measure_recall(backbone: str, length: int, rank: int = 4, most_steps: int = 400) -> list[RecallRun]:
    """Fit one random target with each method and each set of settings until its recall is certified.

    Args:
        backbone: Name of the backbone.
        length: Target tokens.
        rank: LoRA rank.
        most_steps: Maximum number of optimiser steps of a fit.
    """
    from pml.backbone import shared_backbones

    runs = []
    with shared_backbones():
        for settings, methods in RECALL_SETTINGS.items():
            for method, arguments in methods.items():
                cli = _cli(
                    backbone,
                    rank,
                    [
                        f"--model=pml.modules.{method}",
                        *arguments,
                        "--data=data_modules.RandomTokens",
                        f"--data.length={length}",
                        f"--trainer.max_epochs={most_steps}",
                        "--trainer.logger=false",
                        "--trainer.callbacks=[callbacks.StopWhenRecalled]",
                    ],
                )
                started = time.perf_counter()
                cli.trainer.fit(cli.model, datamodule=cli.datamodule)
                seconds = time.perf_counter() - started
                steps = cli.trainer.global_step - cli.model.skipped_steps
                runs.append(RecallRun(method, settings, steps, seconds, recalled=cli.trainer.should_stop))
                cli.model.release()
    return runs
