"""The answer to a question about a law, in numbers and in words."""

from pml.content import Content
from pml.law.schema import Interval
from pml.tables import show_percent

__all__ = ["LARGEST_RANK", "Plan", "RankOutcome"]

LARGEST_RANK = 4096
"""The largest rank considered where the model's width is unknown; a larger adapter would not be small."""


class RankOutcome(Content):
    """What an adapter of one rank does with a corpus of one length. Losses are in nats per target token.

    Attributes:
        rank: LoRA rank.
        effective_parameters: Trainable parameters of the adapter; None if the law has no number of them per rank.
        megabytes: Size of the adapter in float32, in 10^6 bytes; None where the number of parameters does not tell it,
            as with a guard, whose saved adapter is larger.
        initial_loss: Loss of the frozen model.
        loss_reduction: Loss reduction predicted by the law, at most the frozen model's loss.
        loss_reduction_confidence_interval: Its 95 % confidence interval.
        loss_reduction_prediction_interval: Its 95 % prediction interval for a single new run.
        final_loss: Initial loss minus loss reduction.
        final_loss_prediction_interval: Its 95 % prediction interval for a single new run.
        token_accuracy: Expected share of right target tokens in a new run; None without a recall model.
        token_accuracy_prediction_interval: 95 % prediction interval of that share, given the loss of a single new run.
        exact_match: Expected share of right targets in a new run; None without a recall model.
        exact_match_prediction_interval: 95 % prediction interval of that share, given the loss of a single new run.
        whole_corpus: Probability that a new run has every target right; None without a recall model.
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
        """The outcome in words, line by line."""
        shown = []
        if self.effective_parameters is not None:
            size = "" if self.megabytes is None else f", {self.megabytes:.3g} MB in float32"
            shown.append(f"adapter of rank {self.rank}: {self.effective_parameters:,} parameters{size}")
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
                low, high = map(show_percent, interval)
                shown.append(f"{name}: {show_percent(value)} % expected (prediction interval {low} to {high} %)")
        if self.whole_corpus is not None:
            shown.append(f"probability that a run has every target right: {show_percent(self.whole_corpus)} %")
        return shown


class Plan(Content):
    """The answer to one question.

    Attributes:
        question: The question in words.
        target_tokens: Length of the corpus.
        pairs: Number of its targets.
        rank: The given rank, or the smallest that is enough; None if none up to `largest_rank` is.
        largest_rank: The largest rank considered: the model's width if the law tells it, otherwise `LARGEST_RANK`.
        rank_confidence_interval: 95 % confidence interval, which includes `rank`; for recall exact to about 3 % above
            rank 50. An end beyond `largest_rank` is None. None as a whole if the rank was given.
        outcome: What that rank does; None without a rank.
        beyond: Sentences about how far the question and its answer lie outside what was measured.
        warnings: The warnings of the law.
    """

    question: str
    target_tokens: int
    pairs: int
    rank: int | None
    largest_rank: int
    rank_confidence_interval: tuple[int | None, int | None] | None
    outcome: RankOutcome | None
    beyond: list[str]
    warnings: list[str]

    def lines(self) -> list[str]:
        """The answer in words, line by line."""
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
            return f"none up to {self.largest_rank}{from_law}"
        ends = f"{low} to {high}" if high is not None else f"{low} to more than {self.largest_rank}"
        return f"{self.rank} (95 % confidence interval {ends}, without the noise of a single run)"


def _range(ends: Interval) -> str:
    return f"{ends[0]:.4g} to {ends[1]:.4g}"
