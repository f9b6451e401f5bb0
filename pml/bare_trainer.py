"""The Trainer of fits that belong to something larger and speak for themselves."""

from typing import Any

from lightning.pytorch import Trainer

__all__ = ["bare_trainer"]


def bare_trainer(**options: Any) -> Trainer:
    """A Trainer on one device, whichever is there, that clips gradients at norm 1, logs nothing and shows nothing.

    Args:
        **options: What else it is given, such as its callbacks and how long the fit is.
    """
    return Trainer(
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
