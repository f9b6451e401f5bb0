"""AdamW for the adapter, and steps that are not taken where no target token has weight."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

__all__ = ["make_adamw", "skip_if_empty", "trained_by"]

FUSED = ("cuda", "mps", "xpu")
"""Devices where AdamW runs as one kernel. A CPU has one too, which rounds otherwise: runs there stay what they were."""


def make_adamw(
    parameters: Iterable[nn.Parameter], learning_rate: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """AdamW, as one kernel where the device has it.

    Args:
        parameters: What is trained, on its device.
        learning_rate: Peak learning rate.
        betas: Averaging coefficients.
        weight_decay: Weight decay.
    """
    trained = list(parameters)
    fused = trained[0].device.type in FUSED or None
    return torch.optim.AdamW(trained, lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=fused)


def trained_by(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters of an optimiser, which are found sooner than in the model."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def skip_if_empty(optimizer: torch.optim.Optimizer, budget: Tensor) -> Tensor | int:
    """Have the coming step leave parameters and momentum alone if the global batch has no weight at all.

    AdamW would move on its momentum. One kernel decides on the device, as it does for gradients that overflow, so that
    nobody waits; elsewhere the number is looked at.

    Args:
        optimizer: An AdamW that is about to step.
        budget: Sum of all weights in the global batch, a scalar, the same on all ranks.

    Returns:
        1 where the step is skipped, else 0.
    """
    if optimizer.param_groups[0].get("fused"):
        empty = (budget == 0).float()
        optimizer.found_inf = empty  # type: ignore[attr-defined]  # read by AdamW.step
        return empty
    if budget.item() != 0:
        return 0
    # Without gradients it leaves parameters and state alone.
    optimizer.zero_grad(set_to_none=True)
    return 1
