"""What is measured: pure functions on token scores, and torchmetrics that accumulate them by example.

Shares and means are float64: 3/5 counted here equals 3/5 counted anywhere else.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from pml.weighting import TokenScores

__all__ = [
    "TokenThresholds",
    "VerbatimRecall",
    "below_threshold",
    "exact_match",
    "first_failure",
    "mean_loss",
    "memorized_bits",
    "min_target_probability",
    "sub_threshold_fraction",
    "token_accuracy",
]


def mean_loss(scores: TokenScores) -> Tensor:
    """Mean loss in nats per target token."""
    return (scores.losses * scores.mask).sum(dtype=torch.float64) / scores.mask.sum()


def token_accuracy(scores: TokenScores) -> Tensor:
    """Share of target tokens whose argmax is right under teacher forcing (AccTok)."""
    return scores.correct.sum().double() / scores.mask.sum()


def exact_match(scores: TokenScores) -> Tensor:
    """(B,) bool, whether every target token of an example is right under teacher forcing."""
    return (scores.correct | ~scores.mask).all(dim=1)


def first_failure(scores: TokenScores) -> Tensor:
    """(B,) number of right tokens before the first wrong one; the target's length where none is wrong."""
    # Padding counts as wrong here, so a row without errors stops at its length.
    return scores.correct.long().cumprod(dim=1).sum(dim=1)


def below_threshold(scores: TokenScores, threshold: float = 0.5) -> Tensor:
    """(B, L) bool, target tokens with probability <= threshold: greedy decoding may miss them."""
    return (scores.losses >= -math.log(threshold)) & scores.mask


def sub_threshold_fraction(scores: TokenScores, threshold: float = 0.5) -> Tensor:
    """Share of target tokens with probability <= threshold."""
    return below_threshold(scores, threshold).sum().double() / scores.mask.sum()


def min_target_probability(scores: TokenScores) -> Tensor:
    """Smallest probability of any target token; 1 where there is none."""
    return torch.exp(-(scores.losses * scores.mask).max()) if scores.losses.numel() else torch.ones(())


def memorized_bits(entropy_bits: float, loss: float, target_tokens: int) -> float:
    """Information about the corpus in the adapted model, in bits: entropy minus what is still missing, at least 0.

    Args:
        entropy_bits: Information content of the targets given the queries.
        loss: Mean loss of the adapted model in nats per target token.
        target_tokens: Number of target tokens that the mean was taken over.
    """
    return max(0.0, entropy_bits - loss * target_tokens / math.log(2))


class _ByExample(Metric):
    """Keeps one row of numbers per example, so that an example seen twice (on two ranks, say) counts once."""

    full_state_update = False
    higher_is_better = None
    rows: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def add(self, scores: TokenScores, *columns: Tensor) -> None:
        rows = torch.stack([scores.example_id.double(), *(column.double() for column in columns)], dim=1)
        self.rows.append(rows[scores.example_id >= 0])

    def columns(self) -> tuple[Tensor, ...]:
        """The columns given to `add`, each (examples,), one entry per example id."""
        rows = dim_zero_cat(self.rows)
        _, place = torch.unique(rows[:, 0], return_inverse=True)
        unique = torch.empty(int(place.max()) + 1, rows.shape[1], dtype=rows.dtype, device=rows.device)
        unique[place] = rows
        return unique[:, 1:].unbind(dim=1)


class VerbatimRecall(_ByExample):
    """Teacher-forced recall of a corpus.

    `compute` gives `token_accuracy` (share of target tokens), `exact_match` (share of examples) and `first_failure`
    (right tokens before the first wrong one, mean over examples).
    """

    def update(self, scores: TokenScores) -> None:
        self.add(scores, scores.mask.sum(1), scores.correct.sum(1), first_failure(scores))

    def compute(self) -> dict[str, Tensor]:
        tokens, right, first = self.columns()
        return {
            "token_accuracy": right.sum() / tokens.sum(),
            "exact_match": (right == tokens).double().mean(),
            "first_failure": first.mean(),
        }


class TokenThresholds(_ByExample):
    """Where target tokens stand against the threshold that makes greedy decoding certain.

    `compute` gives `loss` (nats per target token), `sub_threshold_fraction` (share of target tokens) and
    `min_target_probability`.

    Args:
        threshold: Probability that a token has to exceed.
    """

    def __init__(self, threshold: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.threshold = threshold

    def update(self, scores: TokenScores) -> None:
        losses = scores.losses * scores.mask
        below = below_threshold(scores, self.threshold)
        # amax needs at least one column, which a batch of ghosts does not have.
        worst = losses.amax(dim=1) if losses.shape[1] else losses.sum(dim=1)
        self.add(scores, scores.mask.sum(1), below.sum(1), worst, losses.sum(1))

    def compute(self) -> dict[str, Tensor]:
        tokens, below, worst, losses = self.columns()
        return {
            "loss": losses.sum() / tokens.sum(),
            "sub_threshold_fraction": below.sum() / tokens.sum(),
            "min_target_probability": torch.exp(-worst.max()),
        }
