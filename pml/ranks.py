"""Several processes that train together: whether there are any, and sums over them."""

import torch.distributed as dist
from torch import Tensor

__all__ = ["is_first_rank", "several_ranks", "summed_over_ranks"]


def several_ranks() -> bool:
    """Whether there is anyone to exchange tensors with; collectives are for then, and for all ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first_rank() -> bool:
    """Whether this process is the first of those that train together, or the only one."""
    return not several_ranks() or dist.get_rank() == 0


def summed_over_ranks(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks; the tensor itself where there is one. Takes all ranks."""
    if several_ranks():
        values = values.clone()
        dist.all_reduce(values)
    return values
