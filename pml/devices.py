"""Which device there is, and what differs between kinds: whether the host runs ahead of it, what it can count in."""

import torch

__all__ = ["best_device", "has_graphs", "runs_ahead", "widest_float"]


def best_device() -> torch.device:
    """The accelerator that is there and can be used; the CPU where there is none. A Trainer chooses in the same way."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def runs_ahead(device: torch.device) -> bool:
    """Whether the host queues work for this device and goes on, so that to look at a result is to wait for all of it.

    A CPU does what it is told at once: there a look is free, and saves work that turns out not to be needed.
    """
    return device.type != "cpu"


def has_graphs(device: torch.device) -> bool:
    """Whether the launches of many kernels can be kept there and replayed as one, as `pml.cuda_graphs` does."""
    return device.type == "cuda"


def widest_float(device: torch.device) -> torch.dtype:
    """The floating-point type for sums and shares: float64, or float32 on devices that have no other (Apple's MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64
