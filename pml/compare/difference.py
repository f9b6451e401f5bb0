"""Mean difference between two methods over pairs of runs, with an interval and a verdict."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import stats

from pml.compare.outcomes import Outcome

__all__ = ["Difference", "Verdict", "paired_difference"]

Verdict = Literal["better", "worse", "undecided"]


@dataclass(frozen=True)
class Difference:
    """Mean difference within pairs, method minus baseline, in one outcome.

    Attributes:
        method: The method.
        outcome: What is compared; all means and the interval have its unit.
        pairs: Number of pairs of runs.
        samples: Number of independent samples, over which means and interval are taken (see `paired_difference`).
        baseline_mean: Mean of the baseline.
        method_mean: Mean of the method.
        mean: Mean difference.
        interval: Student's t interval of the mean difference; None with one sample, or if all samples differ equally.
        confidence: Level of the interval.
        by_text: Whether each sample is a text; otherwise each is a seed, all on one text.
        alone: Numbers of further pairs in which only the baseline, and only the method, has the outcome, though the
            other took as many steps; only steps to certainty have such pairs.
    """

    method: str
    outcome: Outcome
    pairs: int
    samples: int
    baseline_mean: float
    method_mean: float
    mean: float
    interval: tuple[float, float] | None
    confidence: float
    by_text: bool
    alone: tuple[int, int] = (0, 0)

    @property
    def verdict(self) -> Verdict:
        """Better or worse at this confidence; undecided if the interval contains zero.

        Samples that all differ by the same nonzero amount have no interval: the sign test decides. Nothing is decided
        if most pairs in which only one run got there speak for the other method.
        """
        if self.interval is None:
            decided = self.mean != 0 and 2 * 0.5**self.samples <= 1 - self.confidence
        else:
            decided = not self.interval[0] <= 0 <= self.interval[1]
        better = (self.mean > 0) == (self.outcome.better == "higher")
        baseline_alone, method_alone = self.alone
        against = baseline_alone > method_alone if better else method_alone > baseline_alone
        if not decided or against:
            return "undecided"
        return "better" if better else "worse"

    @property
    def interval_shown(self) -> str:
        """The interval as text; a dash if there is none."""
        return "-" if self.interval is None else " to ".join(self.outcome.show(end, "+") for end in self.interval)


def paired_difference(
    outcome: Outcome,
    baseline: Sequence[float],
    method: Sequence[float],
    samples: Sequence[Hashable] | None = None,
    *,
    name: str = "",
    confidence: float = 0.95,
    by_text: bool = True,
) -> Difference:
    """Mean difference over pairs of values; pairs of the same sample are averaged first and count once.

    Args:
        outcome: What the values measure.
        baseline: Values of the baseline, at least one.
        method: Values of the method, in the same order.
        samples: The sample that each pair belongs to, such as its text; None makes each pair a sample of its own.
        name: Name of the method.
        confidence: Level of the interval.
        by_text: Whether each sample is a text.
    """
    of = range(len(baseline)) if samples is None else samples
    a, b = _by_sample(baseline, of), _by_sample(method, of)
    differences = b - a
    # Equal differences may still vary by rounding, which would give an interval of almost no width.
    rounding = 1e-12 * max(1.0, float(np.abs(a).max()), float(np.abs(b).max()))
    interval = None
    if len(differences) > 1 and differences.std(ddof=1) > rounding:
        low, high = stats.ttest_rel(b, a).confidence_interval(confidence)
        interval = float(low), float(high)
    mean = float(differences.mean())
    return Difference(
        method=name,
        outcome=outcome,
        pairs=len(baseline),
        samples=len(differences),
        baseline_mean=float(a.mean()),
        method_mean=float(b.mean()),
        mean=mean if abs(mean) > rounding else 0.0,
        interval=interval,
        confidence=confidence,
        by_text=by_text,
    )


def _by_sample(values: Sequence[float], samples: Sequence[Hashable]) -> npt.NDArray[np.float64]:
    """Mean value of each sample, in order of first appearance."""
    groups: dict[Hashable, list[float]] = {}
    for value, sample in zip(values, samples, strict=True):
        groups.setdefault(sample, []).append(value)
    return np.array([np.mean(group) for group in groups.values()], dtype=np.float64)
