"""The Trainer for fits that are part of a larger command, which does its own reporting."""

from typing import Any

from lightning.pytorch import Trainer

from pml.checkpoints import with_own_connectors

__all__ = ["bare_trainer"]


def bare_trainer(**options: Any) -> Trainer:
    """A Trainer on one device of any kind, with gradients clipped at norm 1 and without logging or progress bar.

    Args:
        **options: Further arguments of the Trainer, such as callbacks and the length of the fit.
    """
    trainer = Trainer(
        devices=1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    return with_own_connectors(trainer)
