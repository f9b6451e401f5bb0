"""Whether a fit had converged: how fast its training loss still fell at the end."""

from typing import Any

import torch
from torch import Tensor

from pml.devices import widest_float
from pml.ranks import is_first_rank, summed_over_ranks

__all__ = ["LossHistory"]

MOST_SEGMENTS = 1000
MIN_STEPS = 20


class LossHistory:
    """Training loss over the steps of a fit, in a bounded number of equal segments, without synchronising the device.

    Args:
        device: The device of the losses, on which sums over ranks are taken.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = device
        self.steps = 0
        """Number of steps added."""
        self._length = 1  # steps in a segment
        self._segments: list[Tensor] = []

    def add(self, losses: Tensor, tokens: Tensor) -> None:
        """Add a step.

        Args:
            losses: Sum of the token losses in nats, a scalar.
            tokens: Number of target tokens in that sum, a scalar.
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
        """Sums of losses in nats and numbers of target tokens, `(segments, 2)`; those of several ranks can be added."""
        none = torch.zeros(0, 2, dtype=widest_float(torch.device(self.device)), device=self.device)
        return torch.stack(self._segments) if self._segments else none

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint, with sums over all ranks. All ranks must call it."""
        return {"steps": self.steps, "length": self._length, "sums": summed_over_ranks(self.sums()).cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state; the first rank keeps the sums."""
        self.steps, self._length = state["steps"], state["length"]
        self._segments = list(
            (state["sums"] * is_first_rank()).to(self.device, widest_float(torch.device(self.device)))
        )

    @staticmethod
    def late_drop(sums: Tensor, steps: int) -> float | None:
        """Fall of the mean loss from the second-to-last tenth of the steps to the last tenth, in nats per token.

        Args:
            sums: What `sums` returns, added over the ranks.
            steps: Number of steps in `sums`.

        Returns:
            The fall, or None with fewer than 20 steps or without a target token in one of the tenths.
        """
        if steps < MIN_STEPS:
            return None
        tenth = max(1, len(sums) // 10)
        before, last = sums[-2 * tenth : -tenth].sum(0), sums[-tenth:].sum(0)
        if before[1] == 0 or last[1] == 0:
            return None
        return (before[0] / before[1] - last[0] / last[1]).item()
