"""Plans from a fitted law: what an adapter of some rank will do, and the smallest rank that is enough.

A plan goes from rank and length to loss by the law, and from loss to recall by the recall model. Its 95 % confidence
intervals are for the mean of the law. Its 95 % prediction intervals are for a single new run: they add the noise of a
run and, unless the frozen model's loss on the text is given, the variation between texts. Neither includes the
uncertainty of the recall model, whose calibration is in `law.json`.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pml.errors import InputError
from pml.law import MAX_LOSS_DEVIATION, LawFit, percentiles
from pml.law.forms import Array
from pml.plan_answer import LARGEST_RANK, Plan, RankOutcome

__all__ = ["outcome_of_rank", "rank_for_loss_reduction", "rank_for_recall"]

# For recall, LAWS bootstrapped laws simulate RUNS runs each, at all ranks up to about 50 and at FEWER_RANKS in all.
FEWER_RANKS = 360
LAWS, RUNS = 100, 128
# Bounds the memory of ranks x laws x runs.
RANKS_AT_ONCE = 45
# Probabilities that differ by less count as equal.
SAME_PROBABILITY = 0.002
# The recall model applies down to the smallest loss that it was fitted to over FAR_BELOW, and to any smaller loss if
# it expects this share of tokens to be right at the smallest.
FAR_BELOW = 2.0
NEARLY_ALL = 0.99


@dataclass(frozen=True)
class _Corpus:
    """What is to be memorised: its length, its number of targets, and the frozen model's loss on it if known."""

    target_tokens: int
    pairs: int
    initial_loss: float | None

    @classmethod
    def of(cls, law: LawFit, target_tokens: int, pairs: int | None, initial_loss: float | None) -> "_Corpus":
        """Check the values; by default, targets are as long as in the runs of the law."""
        if target_tokens < 1:
            raise InputError(f"length is {target_tokens}; expected at least 1 target token")
        if pairs is None:
            one = all(run.pairs == 1 for run in law.observations)
            per_target = float(np.median([run.target_tokens / run.pairs for run in law.observations]))
            pairs = 1 if one else max(1, round(target_tokens / per_target))
        if not 1 <= pairs <= target_tokens:
            raise InputError(f"pairs is {pairs}; expected between 1 and the {target_tokens} target tokens")
        law.initial_loss(target_tokens, initial_loss)
        return cls(target_tokens, pairs, initial_loss)

    def __str__(self) -> str:
        tokens = f"{self.target_tokens} target tokens"
        return tokens if self.pairs == 1 else f"{tokens} in {self.pairs} targets"


def outcome_of_rank(
    law: LawFit, rank: int, target_tokens: int, pairs: int | None = None, initial_loss: float | None = None
) -> Plan:
    """Plan for a given rank: the loss and recall that its adapter reaches on a corpus.

    Args:
        law: The fitted law.
        rank: LoRA rank.
        target_tokens: Length of the corpus.
        pairs: Number of its targets; None assumes targets as long as in the runs of the law.
        initial_loss: The frozen model's loss on the corpus in nats per target token, if known.

    Raises:
        InputError: If a number is not positive, there are more targets than target tokens, or the rank exceeds the
            model's width.
    """
    corpus = _Corpus.of(law, target_tokens, pairs, initial_loss)
    if rank < 1 or rank != int(rank):
        raise InputError(f"rank is {rank}; expected a whole number of at least 1")
    width = _width(law)
    if width is not None and rank > width:
        raise InputError(f"rank is {rank}; expected at most {width}, the width of the model, which no adapter exceeds")
    return _plan(law, corpus, f"what rank {rank} does with {corpus}", rank)


def rank_for_loss_reduction(
    law: LawFit, target_tokens: int, reduction: float, pairs: int | None = None, initial_loss: float | None = None
) -> Plan:
    """Plan the smallest rank whose predicted loss reduction is at least `reduction` nats per target token.

    Takes the other arguments of `outcome_of_rank`.

    Raises:
        InputError: If a number is not positive, or the reduction is not below the frozen model's loss.
    """
    corpus = _Corpus.of(law, target_tokens, pairs, initial_loss)
    ceiling = float(law.initial_loss(target_tokens, initial_loss))
    if not 0 < reduction < ceiling:
        raise InputError(
            f"loss reduction is {reduction:g} nats; expected above 0 and below the frozen model's loss, {ceiling:.4g} "
            f"nats per target token at {target_tokens} tokens"
        )
    question = f"the smallest rank that reduces the loss of {corpus} by {reduction:g} nats"
    ranks = np.arange(1.0, _largest_rank(law) + 1)
    enough = law.predict(ranks, target_tokens, initial_loss=initial_loss)[None] >= reduction
    of_laws = law.predict_draws(ranks, target_tokens, initial_loss=initial_loss) >= reduction
    return _plan(
        law, corpus, question, float(_smallest_sufficient(enough, ranks)[0]), _smallest_sufficient(of_laws, ranks)
    )


def rank_for_recall(
    law: LawFit,
    target_tokens: int,
    share: float = 1.0,
    pairs: int | None = None,
    probability: float = 0.5,
    initial_loss: float | None = None,
) -> Plan:
    """Plan the smallest rank at which a new run recalls at least a share of the targets with some probability.

    Takes the other arguments of `outcome_of_rank`. `share` is the share of targets to be right at every token, 1 for
    all. `probability` is how likely a run must be to reach it, 0.5 for the median run.

    Raises:
        InputError: If a number is out of range, or the law has no recall model.
    """
    corpus = _Corpus.of(law, target_tokens, pairs, initial_loss)
    if not 0 < share <= 1:
        raise InputError(f"recall is {share:g}; expected above 0 and at most 1")
    if not 0 < probability < 1:
        raise InputError(f"probability is {probability:g}; expected above 0 and below 1")
    recall = law.recall
    if recall is None:
        raise InputError(
            "this law has no recall model: too few of its runs have per-token results with wrong tokens; "
            "ask for a loss reduction instead, or fit more runs that have tokens.parquet"
        )

    def by_law(ranks: Array) -> Array:
        """Probability of enough recall, `(laws, ranks)`: the mean over runs, since recall is steep in the loss."""

        def reached(part: Array) -> Array:
            runs = law.new_run_draws(part, target_tokens, initial_loss=initial_loss, laws=LAWS, runs=RUNS)
            per_target = target_tokens / corpus.pairs
            return recall.recall_probability(runs.final_loss, per_target, corpus.pairs, share).mean(axis=1)

        return np.concatenate([reached(p) for p in np.array_split(ranks, math.ceil(len(ranks) / RANKS_AT_ONCE))], 1)

    which = "all targets" if share == 1 else f"{100 * share:g} % of the targets"
    question = f"the smallest rank at which a run recalls {which} of {corpus} with probability {probability:g}"
    ranks = np.unique(np.geomspace(1, _largest_rank(law), FEWER_RANKS).round())
    probabilities = by_law(ranks)
    of_laws = _smallest_sufficient(probabilities >= probability, ranks)
    likely = probabilities.mean(axis=0)
    rank = float(_smallest_sufficient(likely[None] >= probability, ranks)[0])
    if math.isinf(rank):
        enough = ranks[np.argmax(likely >= likely.max() - SAME_PROBABILITY)]
        none = (
            f"no rank up to {_largest_rank(law)} is enough: from rank {enough:.0f} on the probability stays at "
            f"{likely.max():.3g}, as far as {len(law.observations)} runs and their recall model can tell"
        )
        return _plan(law, corpus, question, rank, of_laws, none)
    # Refine: evaluate the ranks that were skipped below the one found.
    between = np.arange(ranks.compress(rank > ranks).max(initial=0.0) + 1, rank + 1)
    rank = float(_smallest_sufficient(by_law(between).mean(axis=0)[None] >= probability, between)[0])
    return _plan(law, corpus, question, rank, of_laws)


def _plan(
    law: LawFit,
    corpus: _Corpus,
    question: str,
    rank: float,
    of_laws: Array | None = None,
    none: str | None = None,
) -> Plan:
    """The plan for a rank (infinite if none is enough); `of_laws` has the rank that each bootstrapped law needs."""
    largest = _largest_rank(law)

    def known(rank: float) -> int | None:
        return int(rank) if math.isfinite(rank) else None

    interval = None
    if of_laws is not None:
        # Whole ranks, not interpolated ones.
        low, high = np.quantile(of_laws, (0.025, 0.975), method="inverted_cdf").tolist()
        interval = known(min(low, rank)), known(max(high, rank))
    outcome = _outcome(law, int(rank), corpus) if math.isfinite(rank) else None
    return Plan(
        question=question,
        target_tokens=corpus.target_tokens,
        pairs=corpus.pairs,
        rank=known(rank),
        largest_rank=largest,
        rank_confidence_interval=interval,
        outcome=outcome,
        beyond=([none or f"no rank up to {largest} is enough"] if outcome is None else [])
        + _beyond(law, outcome, corpus),
        warnings=law.warnings,
    )


def _width(law: LawFit) -> int | None:
    """The model's width d, from the 2 d parameters that a rank of an unguarded `mlp_block` has; otherwise None."""
    blocks = law.setting.get("block")  # left out of a law of runs in different blocks
    if law.setting.get("placement") != "mlp_block" or law.setting.get("guarded") or not blocks:
        return None
    return None if law.parameters_per_rank is None else int(law.parameters_per_rank / (2 * len(blocks)))


def _largest_rank(law: LawFit) -> int:
    return min(LARGEST_RANK, _width(law) or LARGEST_RANK)


def _smallest_sufficient(holds: npt.NDArray[np.bool_], ranks: Array) -> Array:
    """For each row, the rank from which on all entries hold; infinite if the last does not."""
    beyond_last_miss = holds.shape[1] - np.argmax(~holds[:, ::-1], axis=1)
    beyond_last_miss[holds.all(axis=1)] = 0
    return np.asarray(np.append(ranks, math.inf)[beyond_last_miss])


def _outcome(law: LawFit, rank: int, corpus: _Corpus) -> RankOutcome:
    tokens, given = corpus.target_tokens, corpus.initial_loss
    initial = float(law.initial_loss(tokens, given))
    reduction = min(float(law.predict(rank, tokens, initial_loss=given)), initial)
    mean = np.minimum(law.predict_draws(rank, tokens, initial_loss=given), initial)
    runs = law.new_run_draws(rank, tokens, initial_loss=given)
    parameters = None if law.parameters_per_rank is None else round(rank * law.parameters_per_rank)
    guarded = law.setting.get("guarded", False)
    recalled: dict[str, Any] = {}
    if law.recall is not None:
        losses, per_target = runs.final_loss, tokens / corpus.pairs
        accuracy, exact = law.recall.token_accuracy(losses), law.recall.exact_match(losses, per_target)
        recalled = {
            "token_accuracy": float(accuracy.mean()),
            "token_accuracy_prediction_interval": percentiles(accuracy),
            "exact_match": float(exact.mean()),
            "exact_match_prediction_interval": percentiles(exact),
            "whole_corpus": float(law.recall.recall_probability(losses, per_target, corpus.pairs).mean()),
        }
    return RankOutcome(
        rank=rank,
        effective_parameters=parameters,
        megabytes=parameters * np.dtype(np.float32).itemsize / 1e6 if parameters and not guarded else None,
        initial_loss=initial,
        loss_reduction=reduction,
        loss_reduction_confidence_interval=percentiles(mean),
        loss_reduction_prediction_interval=percentiles(runs.loss_reduction),
        final_loss=initial - reduction,
        final_loss_prediction_interval=percentiles(runs.final_loss),
        **recalled,
    )


def _beyond(law: LawFit, outcome: RankOutcome | None, corpus: _Corpus) -> list[str]:
    """Sentences about how far a question and its answer lie outside what the law was fitted to."""
    found = []
    ranges = [("length", corpus.target_tokens, law.target_tokens_range)]
    if outcome is not None:
        ranges.insert(0, ("rank", outcome.rank, law.rank_range))
    if law.recall is not None:
        per_target = round(corpus.target_tokens / corpus.pairs)
        ranges.append(("tokens per target", per_target, law.recall.tokens_per_target_range))
    for name, value, (low, high) in ranges:
        if value > high:
            found.append(f"{name} {value} is {value / high:.3g} times the largest measured ({high})")
        elif value < low:
            found.append(f"{name} {value} is {value / low:.2g} times the smallest measured ({low})")
    loss = float(law.initial_loss(corpus.target_tokens, corpus.initial_loss))
    measured = [run.initial_loss for run in law.observations]
    if not min(measured) / (1 + MAX_LOSS_DEVIATION) <= loss <= max(measured) * (1 + MAX_LOSS_DEVIATION):
        found.append(
            f"the frozen model's loss is {loss:.3g} nats per target token, but {min(measured):.3g} to "
            f"{max(measured):.3g} on the law's texts: the law does not cover this kind of text"
        )
    recall = law.recall
    if recall is None or outcome is None:
        return found
    low_loss, high_loss = recall.loss_range
    if outcome.final_loss < low_loss / FAR_BELOW and recall.token_accuracy(low_loss) < NEARLY_ALL:
        found.append(
            f"a final loss of {outcome.final_loss:.3g} nats is far below those that the recall model was fitted to "
            f"({low_loss:.3g} to {high_loss:.3g})"
        )
    if recall.brier >= recall.brier_reference:
        found.append(
            f"the recall model predicts no better than the mean (Brier score {recall.brier:.3f} against "
            f"{recall.brier_reference:.3f}): do not trust the shares of right tokens and targets"
        )
    return found
