"""Whether this process is one of several that train together."""

import torch.distributed as dist

__all__ = ["several_ranks"]


def several_ranks() -> bool:
    """Whether there is anyone to exchange tensors with; collectives are for then, and for all ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
