"""Exchange between the ranks of a distributed run: sums, gathered values, and shares of work."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

__all__ = ["from_all_ranks", "is_first_rank", "keep_buffers", "own_part", "several_ranks", "summed_over_ranks"]

T = TypeVar("T")


def several_ranks() -> bool:
    """Whether there are other ranks; call collectives only then, and on every rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first_rank() -> bool:
    """Whether this process is rank 0 or the only one."""
    return not several_ranks() or dist.get_rank() == 0


def summed_over_ranks(values: Tensor) -> Tensor:
    """Sum of a tensor over all ranks; the tensor itself if there is only one. A collective."""
    if several_ranks():
        values = values.clone()
        dist.all_reduce(values)
    return values


def keep_buffers(model: Any) -> None:
    """Send a model's buffers to the other ranks no more: they are equal from the start, and a guard's are large."""
    if isinstance(model, DistributedDataParallel):
        model.broadcast_buffers = False


def own_part(items: Sequence[T]) -> Sequence[T]:
    """This rank's part of shared work: every n-th item, for n ranks."""
    return items[dist.get_rank() :: dist.get_world_size()] if several_ranks() else items


def from_all_ranks(value: T) -> list[T]:
    """The values of all ranks, in rank order. A collective."""
    if not several_ranks():
        return [value]
    everyone = [value] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone
