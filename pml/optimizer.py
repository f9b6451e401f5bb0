"""AdamW for the adapter, and how it skips a step when no target token has weight."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["make_adamw", "skip_step_without_weight", "trained_by"]

FUSED = ("cuda", "xpu")
"""Device types that run AdamW as one fused kernel. Those of others are not used: the CPU's rounds differently from the
default, and that of MPS cannot skip a step before torch 2.13."""


def make_adamw(
    parameters: Iterable[nn.Parameter], learning_rate: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """AdamW, fused on device types in `FUSED`.

    Args:
        parameters: Trainable parameters, already on their device.
        learning_rate: Peak learning rate.
        betas: Averaging coefficients.
        weight_decay: Weight decay.
    """
    trained = list(parameters)
    fused = trained[0].device.type in FUSED or None
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=fused)
    optimizer.register_load_state_dict_pre_hook(_keep_kernel)
    return optimizer


def _keep_kernel(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's state, but fused only if the optimiser is: the checkpoint may be from another type of device."""
    fused = optimizer.param_groups[0]["fused"]
    return {**state, "param_groups": [{**group, "fused": fused} for group in state["param_groups"]]}


def trained_by(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Parameters of an optimiser; faster than searching the model for them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def skip_step_without_weight(optimizer: torch.optim.Optimizer, budget: Tensor) -> Tensor | int:
    """Make the next optimiser step leave parameters and momentum unchanged if no token of the global batch has weight.

    With zero gradients, AdamW would still move the parameters by its momentum. The fused kernel can skip a step on the
    device, as it does when gradients overflow, so the host does not wait; without it, the host reads `budget`.

    Args:
        optimizer: An AdamW that is about to step.
        budget: Scalar sum of all weights in the global batch, the same on all ranks.

    Returns:
        1 if the step is skipped, else 0; a tensor on the device where AdamW is fused.
    """
    if optimizer.param_groups[0].get("fused"):
        empty = (budget == 0).float()
        optimizer.found_inf = empty  # type: ignore[attr-defined]  # read by AdamW.step
        return empty
    if budget.item() != 0:
        return 0
    # AdamW ignores parameters without a gradient.
    optimizer.zero_grad(set_to_none=True)
    return 1
