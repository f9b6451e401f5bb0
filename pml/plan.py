"""What a fitted law foretells: what an adapter of some rank will do, and the smallest rank that will do.

A plan goes from rank and length to loss by the law, and from loss to recall by the recall model. Its intervals are
95 %: of the law's mean (confidence), or of a single new run, whose own noise comes on top, and its text's where the law
was not told how well the frozen model knows it. The recall model is taken as it is; how well it is calibrated stands in
`law.json`.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pydantic

from pml.calibration import RecallModel
from pml.errors import InputError
from pml.law import LawFit, RunDraws, percentiles
from pml.law.forms import Array
from pml.law.texts import OTHER_KIND

__all__ = ["LARGEST_RANK", "Outcome", "Plan", "foresee", "rank_for_loss_reduction", "rank_for_recall"]

LARGEST_RANK = 4096
"""The largest rank that is considered; adapters beyond it are no longer small."""

BYTES_PER_PARAMETER = 4
RANKS = np.arange(1.0, LARGEST_RANK + 1)
# For the interval of a rank for recall: bootstrapped laws, runs by each, and ranks, all up to 50 and then 3 % apart.
LAWS, RUNS = 100, 128
# Bounds the memory of their product.
RANKS_AT_ONCE = 45
# Probabilities of runs that are no further apart are the same.
SAME_PROBABILITY = 0.002
# The recall model is asked of losses this many times below the smallest that it has seen, and not further.
FAR_BELOW = 2.0
NEARLY_ALL = 0.99
FEWER_RANKS = np.unique(np.geomspace(1, LARGEST_RANK, 360).round())
Interval = tuple[float, float]


class _Content(pydantic.BaseModel):
    """A part of what `pml plan --json` prints."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Outcome(_Content):
    """What an adapter of one rank does with a corpus of one length. Losses in nats per target token.

    Attributes:
        rank: LoRA rank.
        effective_parameters: Trainable parameters of the adapter; None where runs do not say.
        megabytes: Its size on disk in float32, in 10^6 bytes.
        initial_loss: Of the frozen model.
        loss_reduction: By the law, and no more than the frozen model's loss.
        loss_reduction_confidence: 95 % interval of the law's mean.
        loss_reduction_new_run: 95 % interval of a single new run.
        final_loss: Initial loss minus loss reduction.
        final_loss_new_run: 95 % interval of a single new run.
        token_accuracy: Expected share of target tokens right in a new run; None without a recall model.
        token_accuracy_new_run: 95 % interval of a single new run's expectation.
        exact_match: Expected share of targets right in a new run.
        exact_match_new_run: 95 % interval of a single new run's expectation.
        whole_corpus: Probability that a new run has every target right.
    """

    rank: int
    effective_parameters: int | None
    megabytes: float | None
    initial_loss: float
    loss_reduction: float
    loss_reduction_confidence: Interval
    loss_reduction_new_run: Interval
    final_loss: float
    final_loss_new_run: Interval
    token_accuracy: float | None = None
    token_accuracy_new_run: Interval | None = None
    exact_match: float | None = None
    exact_match_new_run: Interval | None = None
    whole_corpus: float | None = None

    def lines(self) -> list[str]:
        """It for people, a line each."""
        shown = []
        if self.effective_parameters is not None:
            shown.append(
                f"adapter of rank {self.rank}: {self.effective_parameters:,} parameters, {self.megabytes:.3g} MB in "
                "float32"
            )
        shown.append(
            f"loss reduction: {self.loss_reduction:.4g} nats per target token (95 % interval of the mean "
            f"{_range(self.loss_reduction_confidence)}, of a new run {_range(self.loss_reduction_new_run)})"
        )
        shown.append(
            f"final loss: {self.final_loss:.4g} of {self.initial_loss:.4g} nats (a new run "
            f"{_range(self.final_loss_new_run)})"
        )
        for name, value, interval in (
            ("target tokens right", self.token_accuracy, self.token_accuracy_new_run),
            ("targets right word for word", self.exact_match, self.exact_match_new_run),
        ):
            if value is not None and interval is not None:
                low, high = (100 * end for end in interval)
                shown.append(f"{name}: {100 * value:.1f} % expected (a new run {low:.1f} to {high:.1f} %)")
        if self.whole_corpus is not None:
            shown.append(f"probability that a run has every target right: {self.whole_corpus:.3f}")
        return shown


class Plan(_Content):
    """The answer to one question.

    Attributes:
        question: It in words.
        target_tokens: Length of the corpus.
        pairs: Targets that they are shared out among.
        rank: The smallest rank that will do; None where none up to `LARGEST_RANK` does.
        rank_confidence: 95 % interval of it from the law's uncertainty, to 3 % above 50, and never without `rank`
            itself; an end is None beyond `LARGEST_RANK`.
        outcome: What that rank does.
        beyond: How far the question lies outside what was measured, a sentence each; empty inside.
        warnings: Those of the law.
    """

    question: str
    target_tokens: int
    pairs: int
    rank: int | None
    rank_confidence: tuple[int | None, int | None] | None
    outcome: Outcome | None
    beyond: list[str]
    warnings: list[str]

    def to_json(self) -> dict[str, Any]:
        """Numbers, strings, lists and dictionaries only."""
        return self.model_dump(mode="json")

    def lines(self) -> list[str]:
        """The answer for people, a line each."""
        shown = [self.question]
        if self.rank_confidence is not None:
            shown.append(f"rank: {self._rank_in_words(*self.rank_confidence)}")
        if self.outcome is not None:
            shown += self.outcome.lines()
        shown += [f"outside the measured range: {sentence}" for sentence in self.beyond]
        return shown + [f"warning: {sentence}" for sentence in self.warnings]

    def _rank_in_words(self, low: int | None, high: int | None) -> str:
        if self.rank is None:
            from_law = f", though by the law's uncertainty it may be {low} (95 % interval)" if low is not None else ""
            return f"none up to {LARGEST_RANK}{from_law}"
        ends = f"{low} to {high}" if high is not None else f"{low} to more than {LARGEST_RANK}"
        return f"{self.rank} (95 % interval {ends}, from the law's uncertainty; a run's own luck is not in it)"


def foresee(law: LawFit, rank: int, target_tokens: int, pairs: int | None = None) -> Plan:
    """What an adapter of a rank does with a corpus.

    Args:
        law: The fitted law.
        rank: LoRA rank.
        target_tokens: Length of the corpus.
        pairs: Targets that they are shared out among; None is as in the runs of the law.

    Raises:
        InputError: If a number is not positive, or the targets are longer than the corpus.
    """
    pairs = _checked(law, target_tokens, pairs)
    if rank < 1:
        raise InputError(f"rank is {rank}; expected at least 1")
    outcome = _outcome(law, rank, target_tokens, pairs)
    return Plan(
        question=f"what rank {rank} does with {_corpus(target_tokens, pairs)}",
        target_tokens=target_tokens,
        pairs=pairs,
        rank=rank,
        rank_confidence=None,
        outcome=outcome,
        beyond=_beyond(law, outcome, target_tokens, pairs),
        warnings=law.warnings,
    )


def rank_for_loss_reduction(law: LawFit, target_tokens: int, reduction: float, pairs: int | None = None) -> Plan:
    """The smallest rank whose predicted loss reduction is at least so many nats per target token.

    Args:
        law: The fitted law.
        target_tokens: Length of the corpus.
        reduction: The loss reduction wanted.
        pairs: Targets that the tokens are shared out among; None is as in the runs of the law.

    Raises:
        InputError: If a number is not positive, or the loss cannot fall so far.
    """
    pairs = _checked(law, target_tokens, pairs)
    ceiling = float(law.initial_loss(target_tokens))
    if not 0 < reduction < ceiling:
        raise InputError(
            f"loss reduction is {reduction:g} nats; expected above 0 and below the frozen model's loss, {ceiling:.4g} "
            f"nats per target token at {target_tokens} tokens"
        )
    question = f"the smallest rank that lowers the loss of {_corpus(target_tokens, pairs)} by {reduction:g} nats"
    enough = law.predict(RANKS, target_tokens)[None] >= reduction
    of_laws = law.predict_draws(RANKS, target_tokens) >= reduction
    return _smallest(law, target_tokens, pairs, question, _first(enough, RANKS)[0], _first(of_laws, RANKS))


def rank_for_recall(
    law: LawFit, target_tokens: int, share: float = 1.0, pairs: int | None = None, probability: float = 0.5
) -> Plan:
    """The smallest rank at which a new run has at least a share of the targets right, with some probability.

    Args:
        law: The fitted law, with a recall model.
        target_tokens: Length of the corpus.
        share: Share of the targets to be right at every token, 1 for all.
        pairs: Targets that the tokens are shared out among; None is as in the runs of the law.
        probability: How likely a run must be to reach it; 0.5 is the run in the middle.

    Raises:
        InputError: If a number is out of its range, or the law has no recall model.
    """
    pairs = _checked(law, target_tokens, pairs)
    for name, value in (("recall", share), ("probability", probability)):
        if not 0 < value <= 1 or (name == "probability" and value == 1):
            raise InputError(
                f"{name} is {value:g}; expected above 0 and {'at most' if name == 'recall' else 'below'} 1"
            )
    recall = law.recall
    if recall is None:
        raise InputError(
            "this law has no recall model: its runs left no per-token results with wrong tokens; "
            "ask for a loss reduction instead, or fit runs that have tokens.parquet"
        )

    def reached(draws: RunDraws) -> Array:
        return recall.recall_probability(draws.final_loss, target_tokens / pairs, pairs, share)

    which = "all targets" if share == 1 else f"{100 * share:g} % of the targets"
    question = (
        f"the smallest rank at which a run recalls {which} of {_corpus(target_tokens, pairs)} with probability "
        f"{probability:g}"
    )

    def by_law(ranks: Array) -> Array:
        """Probability of it by law and rank: recall is steep in the loss, so it is a mean over runs, which scatter."""
        parts = np.array_split(ranks, math.ceil(len(ranks) / RANKS_AT_ONCE))
        draws = (law.new_run_draws(part, target_tokens, laws=LAWS, runs=RUNS) for part in parts)
        return np.concatenate([reached(draw).mean(axis=1) for draw in draws], axis=1)

    probabilities = by_law(FEWER_RANKS)
    of_laws = _first(probabilities >= probability, FEWER_RANKS)
    likely = probabilities.mean(axis=0)
    rank = float(_first(likely[None] >= probability, FEWER_RANKS)[0])
    if math.isinf(rank):
        enough = FEWER_RANKS[np.argmax(likely >= likely.max() - SAME_PROBABILITY)]
        none = (
            f"no rank up to {LARGEST_RANK} does: from rank {enough:.0f} on the probability stays at "
            f"{likely.max():.3g}, as far as {len(law.cells)} runs and their recall model can tell"
        )
        return _smallest(law, target_tokens, pairs, question, rank, of_laws, none)
    # Between the ranks that were asked, the rank itself.
    below = FEWER_RANKS.compress(rank > FEWER_RANKS).max(initial=0.0)
    between = np.arange(below + 1, rank + 1)
    rank = float(_first(by_law(between).mean(axis=0)[None] >= probability, between)[0])
    return _smallest(law, target_tokens, pairs, question, rank, of_laws)


def _smallest(
    law: LawFit,
    target_tokens: int,
    pairs: int,
    question: str,
    rank: float,
    of_laws: Array,
    none: str = f"no rank up to {LARGEST_RANK} does",
) -> Plan:
    """The answer to the question for a smallest rank.

    Args:
        law: The law.
        target_tokens: Length.
        pairs: Targets.
        question: In words.
        rank: The answer, infinite where no rank will do.
        of_laws: That of each bootstrapped law.
        none: What to say where no rank will do.
    """
    # Ranks themselves, not numbers between two of them.
    ends = np.quantile(of_laws, (0.025, 0.975), method="inverted_cdf").tolist()
    # What few laws in a hundred say still counts in the answer where nearly all runs must succeed.
    low, high = (int(end) if math.isfinite(end) else None for end in (min(ends[0], rank), max(ends[1], rank)))
    found = int(rank) if math.isfinite(rank) else None
    outcome = None if found is None else _outcome(law, found, target_tokens, pairs)
    beyond = ([none] if found is None else []) + _beyond(law, outcome, target_tokens, pairs)
    return Plan(
        question=question,
        target_tokens=target_tokens,
        pairs=pairs,
        rank=found,
        rank_confidence=(low, high),
        outcome=outcome,
        beyond=beyond,
        warnings=law.warnings,
    )


def _first(holds: npt.NDArray[np.bool_], ranks: Array) -> Array:
    """By row, the rank from which on all entries hold; infinite where the last does not."""
    beyond_last_miss = holds.shape[1] - np.argmax(~holds[:, ::-1], axis=1)
    beyond_last_miss[holds.all(axis=1)] = 0
    return np.asarray(np.append(ranks, math.inf)[beyond_last_miss])


def _outcome(law: LawFit, rank: int, target_tokens: int, pairs: int) -> Outcome:
    initial = float(law.initial_loss(target_tokens))
    fallen = min(float(law.predict(rank, target_tokens)), initial)
    mean = np.minimum(law.predict_draws(rank, target_tokens), initial)
    runs = law.new_run_draws(rank, target_tokens)
    parameters = None if law.parameters_per_rank is None else rank * law.parameters_per_rank
    recalled: dict[str, Any] = {}
    if law.recall is not None:
        losses, tokens = runs.final_loss, target_tokens / pairs
        accuracy, exact = law.recall.token_accuracy(losses), law.recall.exact_match(losses, tokens)
        recalled = {
            "token_accuracy": float(accuracy.mean()),
            "token_accuracy_new_run": percentiles(accuracy),
            "exact_match": float(exact.mean()),
            "exact_match_new_run": percentiles(exact),
            "whole_corpus": float(law.recall.recall_probability(losses, tokens, pairs).mean()),
        }
    return Outcome(
        rank=rank,
        effective_parameters=parameters,
        megabytes=None if parameters is None else parameters * BYTES_PER_PARAMETER / 1e6,
        initial_loss=initial,
        loss_reduction=fallen,
        loss_reduction_confidence=percentiles(mean),
        loss_reduction_new_run=percentiles(runs.loss_reduction),
        final_loss=initial - fallen,
        final_loss_new_run=percentiles(runs.final_loss),
        **recalled,
    )


def _range(ends: Interval) -> str:
    return f"{ends[0]:.4g} to {ends[1]:.4g}"


def _checked(law: LawFit, target_tokens: int, pairs: int | None) -> int:
    """The number of pairs, by default as many as the law's runs would have."""
    if target_tokens < 1:
        raise InputError(f"length is {target_tokens}; expected at least 1 target token")
    if pairs is None:
        if all(cell.pairs == 1 for cell in law.cells):
            return 1
        per_target = float(np.median([cell.target_tokens / cell.pairs for cell in law.cells]))
        return max(1, round(target_tokens / per_target))
    if not 1 <= pairs <= target_tokens:
        raise InputError(f"pairs is {pairs}; expected between 1 and the {target_tokens} target tokens")
    return pairs


def _beyond(law: LawFit, outcome: Outcome | None, target_tokens: int, pairs: int) -> list[str]:
    """How far a question and its answer lie outside what the law was fitted to, in words."""
    found = []
    ranges = [("length", target_tokens, law.target_tokens_range)]
    if outcome is not None:
        ranges.insert(0, ("rank", outcome.rank, law.rank_range))
    if law.recall is not None:
        ranges.append(("tokens per target", round(target_tokens / pairs), law.recall.tokens_per_target_range))
    for name, value, (low, high) in ranges:
        if value > high:
            found.append(f"{name} {value} is {value / high:.3g} times the largest measured ({high})")
        elif value < low:
            found.append(f"{name} {value} is below the smallest measured ({low}), {value / low:.2g} times as large")
    loss, measured = float(law.initial_loss(target_tokens)), [cell.initial_loss for cell in law.cells]
    if not min(measured) / (1 + OTHER_KIND) <= loss <= max(measured) * (1 + OTHER_KIND):
        found.append(
            f"the frozen model's loss is {loss:.3g} nats per target token, that of the law's texts "
            f"{min(measured):.3g} to {max(measured):.3g}: this is another kind of text, of which the law says nothing"
        )
    if law.recall is not None and outcome is not None:
        found += _beyond_recall(law.recall, outcome.final_loss)
    return found


def _beyond_recall(recall: RecallModel, final_loss: float) -> list[str]:
    """Why shares of right tokens and targets say less than they look."""
    found = []
    low, high = recall.loss_range
    # Where runs got nearly every token right already, there is nothing below to be wrong about.
    if final_loss < low / FAR_BELOW and recall.token_accuracy(low) < NEARLY_ALL:
        found.append(
            f"a final loss of {final_loss:.3g} nats is below all that recall was learnt from ({low:.3g} to {high:.3g})"
        )
    if recall.brier >= recall.brier_reference:
        found.append(
            f"recall is foretold no better than by always saying the mean (Brier score {recall.brier:.3f}, "
            f"{recall.brier_reference:.3f}): put no trust in the shares of right tokens and targets"
        )
    return found


def _corpus(target_tokens: int, pairs: int) -> str:
    return f"{target_tokens} target tokens" if pairs == 1 else f"{target_tokens} target tokens in {pairs} targets"
