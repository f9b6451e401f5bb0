"""Scores of target tokens under teacher forcing, and the loss at a threshold of probability."""

import math
from typing import NamedTuple

from torch import Tensor

from pml.errors import InputError

__all__ = ["TokenScores", "critical_loss"]


class TokenScores(NamedTuple):
    """Scores of the target tokens of B examples under teacher forcing; column t is the t-th target token.

    Attributes:
        losses: (B, L) float32, negative log-probability of the target token in nats; 0 where there is no token.
        correct: (B, L) bool, whether the target token is the argmax; False where there is no token.
        mask: (B, L) bool, True where there is a target token.
        example_id: (B,) id of the example in each row; -1 for a padding example.
        margin: (B, L) float32, logit of the target token minus that of the best other one; None if not computed.
        rival: (B, L) int64, id of that other token; None if not computed.
    """

    losses: Tensor
    correct: Tensor
    mask: Tensor
    example_id: Tensor
    margin: Tensor | None = None
    rival: Tensor | None = None

    def detach(self) -> "TokenScores":
        """The same scores, detached from the graph."""
        return self._replace(losses=self.losses.detach())


def critical_loss(threshold: float) -> float:
    """L_crit in nats: the loss at which a token's probability equals `threshold` (ln 2 for 0.5).

    Raises:
        InputError: If the threshold is not strictly between 0 and 1.
    """
    if not 0.0 < threshold < 1.0:
        raise InputError(f"threshold is {threshold}; expected a probability strictly between 0 and 1, such as 0.5")
    return -math.log(threshold)
