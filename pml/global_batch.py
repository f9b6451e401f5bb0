"""Sums of weights and weighted losses over a global batch: all ranks and all accumulated micro-batches."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pml.ranks import several_ranks

__all__ = ["GlobalBatch"]


class GlobalBatch:
    """Normalises the loss of one optimiser step over its global batch.

    The loss is sum(w L) / sum(w) over the global batch (Eq. 8). Each micro-batch adds the gradient of sum(w L); `close`
    divides the accumulated gradient by the sum of weights over all ranks and micro-batches. So k accumulated
    micro-batches, or k ranks, give the gradient of one batch k times as large, whatever the weights.

    Args:
        uniform_when_memorized: Train on the plain mean if no token of the global batch has weight.
    """

    def __init__(self, uniform_when_memorized: bool = False) -> None:
        self.uniform_when_memorized = uniform_when_memorized
        self._sums: Tensor | None = None
        self._any_active: Tensor | None = None

    @property
    def is_open(self) -> bool:
        """Whether micro-batches have been added since the last step."""
        return self._sums is not None

    def add(self, weights: Tensor, losses: Tensor, mask: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Add a micro-batch; returns the weights (B, L) to train with. All ranks must call it.

        Args:
            weights: (B, L) weights from the weighting.
            losses: (B, L) token losses in nats.
            mask: (B, L), True where there is a target token.
            parameters: Trained parameters, with the gradients of the micro-batches so far.
        """
        if self.uniform_when_memorized:
            weights = self._fall_back(weights, mask, parameters)
        sums = torch.stack([weights.sum(), (weights * losses.detach()).sum()])
        self._sums = sums if self._sums is None else self._sums + sums
        return weights

    def close(self, parameters: Iterable[nn.Parameter]) -> tuple[Tensor, Tensor]:
        """Divide the gradients by the sum of weights over all micro-batches and ranks. All ranks must call it.

        Args:
            parameters: Trained parameters, whose gradients DDP has averaged over the ranks.

        Returns:
            The sum of all weights, and the loss of the global batch in nats; both are the same on all ranks, and 0 if
            no token has weight.
        """
        assert self._sums is not None
        sums, ranks = self._sums, 1
        self._sums = self._any_active = None
        if several_ranks():
            ranks = dist.get_world_size()
            dist.all_reduce(sums)
        # Without weight the gradients are 0 and stay so.
        budget = sums[0].where(sums[0] > 0, torch.ones_like(sums[0]))
        _scale(parameters, ranks / budget)
        return sums[0], sums[1] / budget

    def _fall_back(self, weights: Tensor, mask: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Weight 1 for all tokens as long as no token of the global batch has weight.

        Micro-batches arrive one by one. Until one holds a token with weight, all train on the plain mean; when one
        does, the gradients and sums of the earlier ones are set to 0.
        """
        active = (weights > 0).any().float()
        if several_ranks():
            dist.all_reduce(active, op=dist.ReduceOp.MAX)
        before = self._any_active
        self._any_active = active if before is None else torch.maximum(active, before)
        if before is not None:
            # As a factor: reading the value would make the host wait for the device.
            is_first_with_weight = self._any_active - before
            assert self._sums is not None
            self._sums = self._sums * (1 - is_first_with_weight)
            _scale(parameters, 1 - is_first_with_weight)
        return torch.where(self._any_active > 0, weights, mask.to(weights.dtype))

    def state_dict(self) -> dict[str, Any]:
        """State that a checkpoint must hold between two micro-batches of a step."""
        return {"sums": self._sums, "any_active": self._any_active}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore what `state_dict` returned.

        Args:
            state: The state.
            device: Device on which training resumes.
        """
        self._sums, self._any_active = (
            None if state[name] is None else state[name].to(device) for name in ("sums", "any_active")
        )


def _scale(parameters: Iterable[nn.Parameter], factor: Tensor) -> None:
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(factor)
