"""Whether a fit had converged: how fast the training loss still fell when it ended."""

from typing import Any

import torch
from torch import Tensor

from pml.devices import widest_float
from pml.ranks import is_first_rank, summed_over_ranks

__all__ = ["LossHistory"]

MOST_SEGMENTS = 1000
FEWEST_STEPS = 20


class LossHistory:
    """Training loss over the steps of a fit, in a bounded number of equal segments and without waiting for a device.

    Args:
        device: Where the losses are, and where sums over ranks are taken.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = device
        self.steps = 0
        """Steps added."""
        self._length = 1  # steps in a segment
        self._segments: list[Tensor] = []

    def add(self, losses: Tensor, tokens: Tensor) -> None:
        """Add a step.

        Args:
            losses: Sum of the token losses in nats, a scalar.
            tokens: Target tokens that it is over, a scalar.
        """
        entry = torch.stack([values.detach().to(widest_float(losses.device)) for values in (losses, tokens)])
        if self.steps % self._length == 0:
            self._segments.append(entry)
        else:
            self._segments[-1] = self._segments[-1] + entry
        self.steps += 1
        if len(self._segments) == MOST_SEGMENTS and self.steps == MOST_SEGMENTS * self._length:
            pairs = zip(self._segments[::2], self._segments[1::2], strict=True)
            self._segments = [first + second for first, second in pairs]
            self._length *= 2

    def sums(self) -> Tensor:
        """(segments, 2): sums of losses in nats and numbers of target tokens; sums over ranks add up."""
        none = torch.zeros(0, 2, dtype=widest_float(torch.device(self.device)), device=self.device)
        return torch.stack(self._segments) if self._segments else none

    def state_dict(self) -> dict[str, Any]:
        """What has to be in a checkpoint, with the sums of all ranks. Takes all ranks."""
        return {"steps": self.steps, "length": self._length, "sums": summed_over_ranks(self.sums()).cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave; the first rank keeps the sums."""
        self.steps, self._length = state["steps"], state["length"]
        self._segments = list(
            (state["sums"] * is_first_rank()).to(self.device, widest_float(torch.device(self.device)))
        )

    @staticmethod
    def late_drop(sums: Tensor, steps: int) -> float | None:
        """By how much the mean loss fell from the last tenth but one of the steps to the last tenth, in nats per token.

        Args:
            sums: What `sums` gives, added over the ranks.
            steps: Steps that they are over.

        Returns:
            None where there were fewer than 20 steps, or a tenth had no target token.
        """
        if steps < FEWEST_STEPS:
            return None
        tenth = max(1, len(sums) // 10)
        before, last = sums[-2 * tenth : -tenth].sum(0), sums[-tenth:].sum(0)
        if before[1] == 0 or last[1] == 0:
            return None
        return (before[0] / before[1] - last[0] / last[1]).item()
