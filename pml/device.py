"""Where models run outside a Trainer, which chooses for itself in the same way."""

import torch

__all__ = ["best_device"]


def best_device() -> torch.device:
    """The accelerator that is there and can be used, whichever kind it is; the CPU where there is none."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
