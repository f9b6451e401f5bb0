"""The device to use, and what differs between kinds: asynchronous execution, CUDA graphs, float64."""

import gc

import torch

from pml.cpu import give_back_memory

__all__ = ["best_device", "free_memory", "has_graphs", "runs_ahead", "widest_float"]


def best_device() -> torch.device:
    """The accelerator if one is available, otherwise the CPU; a Trainer chooses in the same way."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def free_memory() -> None:
    """Free the memory of models that are no longer referred to, on the host and on the accelerator."""
    gc.collect()
    give_back_memory()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def runs_ahead(device: torch.device) -> bool:
    """Whether the host queues work for this device and runs ahead, so that reading a result waits for all of it.

    A CPU computes at once: reading a result there is free, and can save work that turns out to be unnecessary.
    """
    return device.type != "cpu"


def has_graphs(device: torch.device) -> bool:
    """Whether many kernel launches can be captured and replayed as one, as `pml.cuda_graphs` does."""
    return device.type == "cuda"


def widest_float(device: torch.device) -> torch.dtype:
    """Floating-point type for sums and shares: float64, or float32 on devices without float64 (Apple's MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64
