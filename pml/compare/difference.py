"""By how much one method differs from another over pairs of runs, with an interval and a verdict."""

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
    """A method minus the baseline in one outcome: the mean of the differences within pairs.

    Attributes:
        method: The method.
        outcome: What is compared; its unit is that of all numbers here.
        pairs: Pairs of runs.
        samples: Independent ones among them, over which the means and the interval are taken (see
            `paired_difference`).
        baseline_mean: Mean of the baseline.
        method_mean: Mean of the method.
        mean: Mean difference.
        interval: Student's t interval of the mean difference; None with one sample, or where all differ by the same.
        confidence: Its level.
        by_text: Whether a sample is a text; else it is a seed of the one text that there is.
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

    @property
    def verdict(self) -> Verdict:
        """What is certain of the method at this confidence: undecided where zero lies in the interval.

        Samples that all differ by the same amount have no interval. All of one sign, they are decided by the sign test.
        """
        if self.interval is None:
            decided = self.mean != 0 and 2 * 0.5**self.samples <= 1 - self.confidence
        else:
            decided = not self.interval[0] <= 0 <= self.interval[1]
        if not decided:
            return "undecided"
        return "better" if (self.mean > 0) == (self.outcome.better == "higher") else "worse"

    @property
    def interval_shown(self) -> str:
        """The interval as text, or a dash."""
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
    """The mean difference over pairs of values; pairs of one sample are averaged first and count once.

    Args:
        outcome: What the values are.
        baseline: Values of the baseline, at least one.
        method: Those of the method, in the same order.
        samples: What each pair is a sample of, such as its text; None is one of its own for every pair.
        name: What the method is called.
        confidence: Level of the interval.
        by_text: Whether a sample is a text.
    """
    of = range(len(baseline)) if samples is None else samples
    a, b = _by_sample(baseline, of), _by_sample(method, of)
    differences = b - a
    # Equal differences of floats are equal but for rounding, which would make an interval of no width.
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
    """The mean over the pairs of each sample, in the order in which samples appear."""
    groups: dict[Hashable, list[float]] = {}
    for value, sample in zip(values, samples, strict=True):
        groups.setdefault(sample, []).append(value)
    return np.array([np.mean(group) for group in groups.values()], dtype=np.float64)
