"""The answer to a question that one asks of a law, in numbers and in words."""

from pml.content import Content
from pml.law.schema import Interval

__all__ = ["LARGEST_RANK", "Plan", "RankOutcome"]

LARGEST_RANK = 4096
"""The largest rank considered; a larger adapter is no longer small."""


class RankOutcome(Content):
    """What an adapter of one rank does with a corpus of one length. Losses in nats per target token.

    Attributes:
        rank: LoRA rank.
        effective_parameters: Trainable parameters of the adapter; None where the law's runs do not say.
        megabytes: Its size in float32, in 10^6 bytes.
        initial_loss: Of the frozen model.
        loss_reduction: By the law, and no more than the frozen model's loss.
        loss_reduction_confidence_interval: 95 % confidence interval.
        loss_reduction_prediction_interval: 95 % prediction interval of a single new run.
        final_loss: Initial loss minus loss reduction.
        final_loss_prediction_interval: 95 % prediction interval of a single new run.
        token_accuracy: Expected share of target tokens right in a new run; None without a recall model.
        token_accuracy_prediction_interval: 95 % prediction interval of a single new run's expectation.
        exact_match: Expected share of targets right in a new run.
        exact_match_prediction_interval: 95 % prediction interval of a single new run's expectation.
        whole_corpus: Probability that a new run has every target right.
    """

    rank: int
    effective_parameters: int | None
    megabytes: float | None
    initial_loss: float
    loss_reduction: float
    loss_reduction_confidence_interval: Interval
    loss_reduction_prediction_interval: Interval
    final_loss: float
    final_loss_prediction_interval: Interval
    token_accuracy: float | None = None
    token_accuracy_prediction_interval: Interval | None = None
    exact_match: float | None = None
    exact_match_prediction_interval: Interval | None = None
    whole_corpus: float | None = None

    def lines(self) -> list[str]:
        """The outcome in words, a line each."""
        shown = []
        if self.effective_parameters is not None:
            shown.append(
                f"adapter of rank {self.rank}: {self.effective_parameters:,} parameters, {self.megabytes:.3g} MB in "
                "float32"
            )
        shown.append(
            f"loss reduction: {self.loss_reduction:.4g} nats per target token (95 % intervals: confidence "
            f"{_range(self.loss_reduction_confidence_interval)}, prediction of a new run "
            f"{_range(self.loss_reduction_prediction_interval)})"
        )
        shown.append(
            f"final loss: {self.final_loss:.4g} of {self.initial_loss:.4g} nats (prediction interval "
            f"{_range(self.final_loss_prediction_interval)})"
        )
        for name, value, interval in (
            ("target tokens right", self.token_accuracy, self.token_accuracy_prediction_interval),
            ("targets right word for word", self.exact_match, self.exact_match_prediction_interval),
        ):
            if value is not None and interval is not None:
                low, high = (100 * end for end in interval)
                shown.append(f"{name}: {100 * value:.1f} % expected (prediction interval {low:.1f} to {high:.1f} %)")
        if self.whole_corpus is not None:
            shown.append(f"probability that a run has every target right: {self.whole_corpus:.3f}")
        return shown


class Plan(Content):
    """The answer to one question.

    Attributes:
        question: The question.
        target_tokens: Length of the corpus.
        pairs: Number of its targets.
        rank: The smallest rank that will do; None where none up to `LARGEST_RANK` does.
        rank_confidence_interval: 95 % confidence interval, to 3 % above 50; it includes `rank`. An end is None beyond
            `LARGEST_RANK`.
        outcome: What that rank does.
        beyond: How far the question lies outside what was measured, a sentence each; empty inside.
        warnings: Those of the law.
    """

    question: str
    target_tokens: int
    pairs: int
    rank: int | None
    rank_confidence_interval: tuple[int | None, int | None] | None
    outcome: RankOutcome | None
    beyond: list[str]
    warnings: list[str]

    def lines(self) -> list[str]:
        """The answer in words, a line each."""
        shown = [self.question]
        if self.rank_confidence_interval is not None:
            shown.append(f"rank: {self._rank_in_words(*self.rank_confidence_interval)}")
        if self.outcome is not None:
            shown += self.outcome.lines()
        shown += [f"outside the measured range: {sentence}" for sentence in self.beyond]
        return shown + [f"warning: {sentence}" for sentence in self.warnings]

    def _rank_in_words(self, low: int | None, high: int | None) -> str:
        if self.rank is None:
            from_law = f", though the 95 % confidence interval begins at {low}" if low is not None else ""
            return f"none up to {LARGEST_RANK}{from_law}"
        ends = f"{low} to {high}" if high is not None else f"{low} to more than {LARGEST_RANK}"
        return f"{self.rank} (95 % confidence interval {ends}, without the noise of a single run)"


def _range(ends: Interval) -> str:
    return f"{ends[0]:.4g} to {ends[1]:.4g}"
