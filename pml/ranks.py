"""Several processes that train together: whether there are any, sums over them, and what each of them has."""

from collections.abc import Sequence
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

__all__ = ["from_all_ranks", "is_first_rank", "own_part", "several_ranks", "summed_over_ranks"]

T = TypeVar("T")


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


def own_part(items: Sequence[T]) -> Sequence[T]:
    """This rank's part of work that the ranks share: every so-many-th item."""
    return items[dist.get_rank() :: dist.get_world_size()] if several_ranks() else items


def from_all_ranks(value: T) -> list[T]:
    """What each rank has, in their order. Takes all ranks."""
    if not several_ranks():
        return [value]
    everyone = [value] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone
