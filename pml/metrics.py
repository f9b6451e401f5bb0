"""Metrics: pure functions of token scores, and torchmetrics that accumulate them by example.

Shares and means are float64, so that 3/5 here equals 3/5 counted anywhere else; devices without float64 use float32.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from pml.devices import widest_float
from pml.token_scores import TokenScores

__all__ = [
    "TokenThresholds",
    "VerbatimRecall",
    "above_threshold",
    "below_threshold",
    "by_kind",
    "edit_similarity",
    "exact_match",
    "extraction_probability",
    "facts_loss",
    "first_failure",
    "mean_loss",
    "memorized_bits",
    "min_target_probability",
    "sub_threshold_fraction",
    "token_accuracy",
]


def mean_loss(scores: TokenScores) -> Tensor:
    """Mean loss per target token, in nats."""
    return (scores.losses * scores.mask).sum(dtype=widest_float(scores.mask.device)) / scores.mask.sum()


def token_accuracy(scores: TokenScores) -> Tensor:
    """Share of target tokens that are the argmax under teacher forcing (AccTok)."""
    return _wide(scores.correct.sum()) / scores.mask.sum()


def exact_match(scores: TokenScores) -> Tensor:
    """(B,) bool, whether every target token of an example is right under teacher forcing."""
    return (scores.correct | ~scores.mask).all(dim=1)


def first_failure(scores: TokenScores) -> Tensor:
    """(B,) number of right tokens before the first wrong one; the target's length if none is wrong.

    This is the longest correct prefix of greedy decoding, which sees the true prefix up to its first mistake.
    """
    # Padding counts as wrong here, so a row without errors stops at its length.
    return scores.correct.long().cumprod(dim=1).sum(dim=1)


def above_threshold(scores: TokenScores, threshold: float = 0.5) -> Tensor:
    """(B, L) bool, target tokens that are the argmax and have a probability above the threshold."""
    return scores.correct & (torch.exp(-scores.losses) > threshold) & scores.mask


def below_threshold(scores: TokenScores, threshold: float = 0.5) -> Tensor:
    """(B, L) bool, target tokens with probability <= threshold: greedy decoding may miss them.

    A token whose loss is NaN counts as one of them.
    """
    return ~(scores.losses < -math.log(threshold)) & scores.mask


def sub_threshold_fraction(scores: TokenScores, threshold: float = 0.5) -> Tensor:
    """Share of target tokens with probability <= threshold."""
    return _wide(below_threshold(scores, threshold).sum()) / scores.mask.sum()


def min_target_probability(scores: TokenScores) -> Tensor:
    """Smallest probability of any target token; 1 if there are none."""
    return torch.exp(-(scores.losses * scores.mask).max()) if scores.losses.numel() else torch.ones(())


def memorized_bits(entropy_bits: float, loss: float, target_tokens: int) -> float:
    """Information about the corpus in the adapted model, in bits: entropy minus the remaining loss, at least 0.

    NaN if the loss is NaN.

    Args:
        entropy_bits: Information content of the targets given the queries.
        loss: Mean loss of the adapted model, in nats per target token.
        target_tokens: Number of target tokens in that mean.
    """
    stored = entropy_bits - loss * target_tokens / math.log(2)
    return stored if math.isnan(stored) else max(0.0, stored)


def facts_loss(scores: TokenScores, fact_ids: Sequence[int]) -> Tensor:
    """Sum of losses in nats that counts each fact once, with the mean over the examples that ask for it.

    Args:
        scores: Scores of B examples.
        fact_ids: For each of the B examples, the id of the fact that it asks for.
    """
    losses = (scores.losses * scores.mask).sum(dim=1, dtype=widest_float(scores.mask.device))
    _, place, asked = torch.unique(torch.as_tensor(fact_ids), return_inverse=True, return_counts=True)
    return (losses / asked[place].to(losses.device)).sum()


def by_kind(
    replaced: Tensor, before: TokenScores, after: TokenScores
) -> dict[Literal["natural", "random"], dict[str, float]]:
    """Measures of natural and of randomly replaced target tokens, separately; empty if all are of one kind.

    Args:
        replaced: (B, L) bool, target tokens that were replaced at random.
        before: Scores of the frozen model.
        after: Scores of the adapted model.

    Returns:
        For `natural` and `random`: `target_tokens`, `initial_loss` and `final_loss` (nats per target token), and
        `token_accuracy` (share of target tokens).
    """
    masks: dict[Literal["natural", "random"], Tensor] = {
        "natural": after.mask & ~replaced,
        "random": after.mask & replaced,
    }
    if not all(mask.any() for mask in masks.values()):
        return {}
    return {
        kind: {
            "target_tokens": int(mask.sum()),
            "initial_loss": mean_loss(before._replace(mask=mask)).item(),
            "final_loss": mean_loss(after._replace(mask=mask)).item(),
            "token_accuracy": token_accuracy(after._replace(mask=mask, correct=after.correct & mask)).item(),
        }
        for kind, mask in masks.items()
    }


def edit_similarity(text: str, reference: str) -> float:
    """1 - Levenshtein distance / length of the longer text, in characters: 1 for equal texts."""
    return Levenshtein.normalized_similarity(text, reference)


def extraction_probability(scores: TokenScores, samples: int) -> Tensor:
    """(B,) float64, the probability that at least one of n samples at temperature 1 is the whole target.

    1 - (1 - p)^n, where p is the product of an example's target probabilities (Hayes et al., arXiv 2410.19482). It is
    computed from log p, because 1 - p rounds to 1 for a tiny p and to 0 for a p close to 1.

    Args:
        scores: Scores of B examples under teacher forcing.
        samples: Number of samples n, at least 1.
    """
    # Rounding may leave a certain token with a loss slightly below 0.
    log_p = -(scores.losses * scores.mask).sum(dim=1, dtype=torch.float64).clamp(min=0)
    # log(1 - p) from log p, by the form that keeps precision on each side of p = 1/2.
    log_miss = torch.where(log_p > -math.log(2), torch.log(-torch.expm1(log_p)), torch.log1p(-torch.exp(log_p)))
    return -torch.expm1(samples * log_miss)


def _wide(counts: Tensor) -> Tensor:
    return counts.to(widest_float(counts.device))


class _ByExample(Metric):
    """Keeps one row of numbers per example, so that an example seen twice, for example on two ranks, counts once."""

    full_state_update = False
    higher_is_better = None
    rows: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def add(self, scores: TokenScores, *columns: Tensor) -> None:
        rows = torch.stack([_wide(column) for column in (scores.example_id, *columns)], dim=1)
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

    `compute` returns `token_accuracy` (share of target tokens), `exact_match` (share of examples) and `first_failure`
    (mean number of right tokens before the first wrong one).
    """

    def update(self, scores: TokenScores) -> None:
        self.add(scores, scores.mask.sum(1), scores.correct.sum(1), first_failure(scores))

    def compute(self) -> dict[str, Tensor]:
        tokens, right, first = self.columns()
        return {
            "token_accuracy": right.sum() / tokens.sum(),
            "exact_match": (right == tokens).to(right.dtype).mean(),
            "first_failure": first.mean(),
        }


class TokenThresholds(_ByExample):
    """Target tokens relative to the probability threshold that makes greedy decoding certain.

    `compute` returns `loss` (nats per target token), `sub_threshold_fraction` (share of target tokens) and
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
        # amax needs at least one column, and a batch of padding examples has none.
        worst = losses.amax(dim=1) if losses.shape[1] else losses.sum(dim=1)
        self.add(scores, scores.mask.sum(1), below.sum(1), worst, losses.sum(1))

    def compute(self) -> dict[str, Tensor]:
        tokens, below, worst, losses = self.columns()
        return {
            "loss": losses.sum() / tokens.sum(),
            "sub_threshold_fraction": below.sum() / tokens.sum(),
            "min_target_probability": torch.exp(-worst.max()),
        }
