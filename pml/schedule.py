"""Length of a fit in optimiser steps, and the learning rate of each step as a share of the peak."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import Trainer

from pml.errors import InputError

__all__ = ["OPTIMIZER_SETTINGS", "check_optimizer", "learning_rate_factor", "total_steps"]

OPTIMIZER_SETTINGS = ("learning_rate", "weight_decay", "betas", "schedule", "warmup_steps")
"""Names of the settings that `check_optimizer` checks and a record holds."""


def check_optimizer(
    learning_rate: float, weight_decay: float, betas: Sequence[float], schedule: str, warmup_steps: int
) -> None:
    """Check the settings of AdamW and its schedule; see `pml.memorization.Memorization`.

    Raises:
        InputError: If a setting is out of range; names the first.
    """
    if not 0 < learning_rate < math.inf:
        raise InputError(f"learning_rate is {learning_rate}; expected a number above 0")
    if not 0 <= weight_decay < math.inf:
        raise InputError(f"weight_decay is {weight_decay}; expected a number, at least 0")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise InputError(f"betas are {list(betas)}; expected two numbers from 0 to below 1, such as [0.9, 0.999]")
    if schedule not in ("linear", "constant"):
        raise InputError(f"schedule is {schedule!r}; expected linear or constant")
    if warmup_steps < 0:
        raise InputError(f"warmup_steps is {warmup_steps}; expected a number of steps, or 0 for none")


def total_steps(trainer: Trainer, curriculum: Any = None) -> int:
    """Optimiser steps of the whole fit.

    Args:
        trainer: The trainer, set up for the fit.
        curriculum: The fit's curriculum, if any. Its epochs differ in length, which the sampler knows.

    Raises:
        InputError: If the fit has neither a last epoch nor a last step.
    """
    if trainer.max_epochs == -1 and trainer.max_steps == -1:
        raise InputError(
            "schedule linear, and weightings that change over the run such as MemFT's default, need an end; set "
            "trainer.max_epochs or trainer.max_steps"
        )
    # This also sets up the data loader, if nothing has done so before.
    steps = int(trainer.estimated_stepping_batches)
    if curriculum is None or trainer.max_epochs == -1:
        return steps
    # Lightning assumes that all epochs are as long as the first; with a curriculum, later ones are longer.
    loader: Any = trainer.train_dataloader
    batches = map(loader.sampler.batches_in_epoch, range(trainer.max_epochs or 0))
    steps = sum(-(-used_batches(trainer, n) // trainer.accumulate_grad_batches) for n in batches)
    return min(steps, trainer.max_steps) if trainer.max_steps > 0 else steps


def used_batches(trainer: Trainer, batches: int) -> int:
    """Number of an epoch's batches that `limit_train_batches` lets the fit take."""
    limit = trainer.limit_train_batches
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def learning_rate_factor(warmup_steps: int, total: int | None) -> Callable[[int], float]:
    """Share of the peak learning rate by step, counted from 0: it rises linearly to 1, then falls to 0 or stays.

    Args:
        warmup_steps: Number of steps below the peak at the start.
        total: Step at which the share reaches 0; None stays at the peak.

    Example:
        >>> factor = learning_rate_factor(1, 5)
        >>> [factor(step) for step in range(6)]
        [0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        return max(0.0, (total - step) / max(1, total - warmup_steps)) if total else 1.0

    return factor
