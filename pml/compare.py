"""Methods compared at the same budget, and by the steps they take to recall; with intervals and effect sizes.

Two runs are a pair where everything but the method is the same: backbone, place and initialisation of the adapter,
rank, corpus (by the hash of its tokens) and seed. Losses and shares are compared only where both were given the same
number of optimiser steps and of target tokens, within a tolerance: a method that trains longer is not a better one.
Steps that a method skips, having nothing left to train, were given to it too. Steps to recall are compared whatever the
budget: where runs stop as soon as they recall, how long they trained is the outcome.

Pairs on the same text and seed, such as those of several ranks, share what is peculiar to it and are no further
evidence of how methods differ elsewhere: they are averaged first, and each (corpus, seed) counts once.
"""

import math
import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import stats

from pml.errors import InputError
from pml.groups import method_name, setting_of
from pml.records import Record

__all__ = [
    "MEASURES",
    "STEPS_TO_RECALL",
    "TOLERANCE",
    "Comparison",
    "Difference",
    "Interval",
    "LeftOut",
    "Measure",
    "Pair",
    "Recalled",
    "compare",
    "difference",
]

TOLERANCE = 0.05
"""Largest difference between two budgets, as a share of the larger, at which they count as the same."""

RESAMPLES = 9999
SAME = ("backbone_hash", "dtype", "block", "placement", "init", "rank", "corpus_hash", "seed")


@dataclass(frozen=True)
class Measure:
    """What is compared.

    Attributes:
        field: Field of a record.
        title: Its name in words.
        unit: `nats per token`, `percentage points` (shares are multiplied by 100) or `steps`.
        better: Whether higher or lower is better.
    """

    field: str
    title: str
    unit: str
    better: Literal["higher", "lower"]

    def of(self, record: Record) -> float:
        """The value of a run, in the measure's unit."""
        value = float(getattr(record, self.field))
        return 100 * value if self.unit == "percentage points" else value


MEASURES = (
    Measure("final_loss", "final loss", "nats per token", "lower"),
    Measure("token_accuracy", "token accuracy", "percentage points", "higher"),
    Measure("exact_match", "exact match", "percentage points", "higher"),
    Measure("sub_threshold_fraction", "sub-threshold", "percentage points", "lower"),
)
"""What is compared at the same budget."""

STEPS_TO_RECALL = Measure("steps_to_recall", "steps to recall", "steps", "lower")
"""What is compared whatever the budget, over pairs in which both recalled."""


@dataclass(frozen=True)
class Pair:
    """Two runs of the same cell and seed, by their folders; budgets as (first, second).

    Attributes:
        first: Folder of the run with the first method.
        second: Folder of the run with the second.
        rank: LoRA rank.
        target_tokens: Length in target tokens.
        seed: Seed of both runs.
        optimizer_steps: Steps taken; those skipped are in the budget all the same.
        target_tokens_trained: Target tokens in training batches, repetitions counted.
        wall_seconds: Duration of the fits.
    """

    first: str
    second: str
    rank: int
    target_tokens: int
    seed: int
    optimizer_steps: tuple[int, int]
    target_tokens_trained: tuple[int, int]
    wall_seconds: tuple[float, float]


@dataclass(frozen=True)
class LeftOut:
    """Runs that were not compared, by their folders, and why."""

    runs: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Interval:
    """Bounds of a confidence interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """By how much the second method differs from the first in one measure, over texts: means of the pairs on each.

    Attributes:
        measure: Field of the records.
        title: Its name in words.
        unit: Unit of the means, the difference and its intervals.
        better: Whether higher or lower is better.
        pairs: Pairs that it is over.
        texts: Different (corpus, seed) that they are on, n of all that follows.
        first_mean: Mean over texts of the first method.
        second_mean: Mean of the second.
        mean: Mean of second - first.
        t_interval: Interval of that mean by Student's t; None with fewer than two texts, or where all texts differ by
            the same, which says nothing about how much the next one would.
        bootstrap_interval: The same by the bias-corrected and accelerated bootstrap over texts; None likewise, and with
            two texts.
        cohens_d: Paired Cohen's d (d_z): mean over standard deviation of the texts' differences; None likewise.
        dominance: Share of pairs in which the second is better minus the share in which it is worse, -1 to 1 (Cliff's
            delta within pairs).
        sign_test_p: Two-sided p value of the exact sign test over the texts that differ; 1 where none does.
    """

    measure: str
    title: str
    unit: str
    better: Literal["higher", "lower"]
    pairs: int
    texts: int
    first_mean: float
    second_mean: float
    mean: float
    t_interval: Interval | None
    bootstrap_interval: Interval | None
    cohens_d: float | None
    dominance: float
    sign_test_p: float
    confidence: float

    @property
    def verdict(self) -> Literal["better", "worse", "undecided"]:
        """What is certain of the second method at this confidence.

        Decided only where every interval leaves zero out; where there is none, by the sign test.
        """
        intervals = [i for i in (self.t_interval, self.bootstrap_interval) if i is not None]
        doubtful = any(i.low <= 0 <= i.high for i in intervals) if intervals else self.sign_test_p > 1 - self.confidence
        if doubtful:
            return "undecided"
        return "better" if (self.mean > 0) == (self.better == "higher") else "worse"


@dataclass(frozen=True)
class Recalled:
    """In how many pairs every target token became certain, whatever the budgets, and after how many steps.

    A run that stopped before the other one recalled says nothing, nor do two of different budgets of which neither
    recalled: such pairs are not counted.

    Attributes:
        both: Pairs in which both recalled.
        only_first: Pairs in which only the first method did.
        only_second: Pairs in which only the second did.
        neither: Pairs of equal budgets in which neither did.
        steps: Steps to recall over the pairs in which both were watched for it (`callbacks.StopWhenRecalled`) and
            recalled; None where there is none.
    """

    both: int
    only_first: int
    only_second: int
    neither: int
    steps: Difference | None


@dataclass(frozen=True)
class Comparison:
    """Two methods over pairs of runs.

    Attributes:
        first: The method that the other is compared with.
        second: The other.
        where: What the pairs have in common beside their setting, when they were split.
        confidence: Level of all intervals, such as 0.95; they are not adjusted for how many there are.
        tolerance: Largest difference of budgets, as a share of the larger.
        pairs: The pairs of equal budgets.
        texts: How many different (corpus, seed) they are on.
        differences: One for each measure over these pairs; empty where no budgets are equal.
        recalled: Who recalled and when, over these pairs and those of `other_budgets`.
        settings: Settings in which the pairs' runs differ beside the weighting and the curriculum, with the values of
            the first and the second method.
        other_budgets: Pairs that only recall is compared of, because their budgets differ.
        left_out: Runs that were not compared.
    """

    first: str
    second: str
    where: dict[str, Any]
    confidence: float
    tolerance: float
    pairs: list[Pair]
    texts: int
    differences: list[Difference]
    recalled: Recalled
    settings: dict[str, tuple[list[Any], list[Any]]]
    other_budgets: list[LeftOut]
    left_out: list[LeftOut]

    def budgets_in_words(self) -> str:
        """What is compared of pairs whose budgets differ; empty where there is none."""
        if not self.other_budgets:
            return ""
        number = len(self.other_budgets)
        pairs = f"{number:,} pair{'' if number == 1 else 's'}"
        example = self.other_budgets[0].reason
        alone = "" if self.pairs else "no pair has equal budgets; "
        return f"{alone}only recall is compared of {pairs} ({example}{', for example' if number > 1 else ''})"

    def recall_in_words(self) -> str:
        """In how many pairs every target token became certain."""
        found = self.recalled
        return (
            f"every token certain: both {found.both}, only {self.first} {found.only_first}, only {self.second} "
            f"{found.only_second}, neither {found.neither}"
        )

    def to_json(self) -> dict[str, Any]:
        """Numbers, strings, lists and dictionaries only, with the verdict of each difference."""
        content = asdict(self)
        for written, found in zip(content["differences"], self.differences, strict=True):
            written["verdict"] = found.verdict
        if self.recalled.steps is not None:
            content["recalled"]["steps"]["verdict"] = self.recalled.steps.verdict
        return content


def compare(
    records: Mapping[Path, Record],
    *,
    baseline: str | None = None,
    by: str | None = None,
    tolerance: float = TOLERANCE,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[Comparison]:
    """Compare every method with one of them.

    Args:
        records: Records by the folder of their run.
        baseline: The method that the others are compared with, as `method_name` writes it, capitals or not; None is SFT
            where there is one, otherwise the first by name.
        by: Field of a record, such as `rank`, for each of whose values there is a comparison of its own.
        tolerance: Largest difference between the budgets of a pair, as a share of the larger.
        confidence: Level of the intervals.
        seed: Seed of the bootstrap.

    Raises:
        InputError: If there are fewer than two methods, no such method or field, no pair of equal budgets nor one that
            recall can be compared of, or a number that is out of range.
    """
    if not 0 <= tolerance < 1:
        raise InputError(f"tolerance: expected a share of at least 0 and below 1, got {tolerance:g}; 0.05 is 5 %")
    if not 0.5 <= confidence < 1:
        raise InputError(f"confidence: expected at least 0.5 and below 1, got {confidence:g}; 0.95 is usual")
    names = {path: method_name(record) for path, record in records.items()}
    methods = sorted(set(names.values()))
    if len(methods) < 2:
        only = f"only {methods[0]} in {len(records)} runs" if methods else "no run"
        raise InputError(f"{only}: expected runs of at least two methods; add the runs of another method")
    first = _baseline(baseline, methods)
    if by is not None and all(setting_of(record, by) is None for record in records.values()):
        raise InputError(f"by: no run has a value for {by!r}; expected a field of a record, such as rank")

    parts: dict[str, dict[Path, Record]] = {}
    for path, record in records.items():
        parts.setdefault(repr(setting_of(record, by)) if by else "", {})[path] = record
    comparisons = []
    for second in methods:
        if second == first:
            continue
        for part in sorted(parts.values(), key=lambda part: _order(part, by)):
            where = {by: setting_of(next(iter(part.values())), by)} if by else {}
            chosen = {path: record for path, record in part.items() if names[path] in (first, second)}
            comparisons.append(_compare_two(chosen, first, second, where, tolerance, confidence, seed))
    if not any(comparison.pairs or comparison.other_budgets for comparison in comparisons):
        reasons = sorted({left.reason for comparison in comparisons for left in comparison.left_out})
        others = f"; and {len(reasons) - 2} more" if len(reasons) > 2 else ""
        raise InputError(
            f"no pair of runs of equal budgets ({'; '.join(reasons[:2])}{others}), and none of which one recalled: "
            "expected runs of two methods with the same rank, corpus and seed, steps and target tokens; train both for "
            "as long, or until they recall (callbacks.StopWhenRecalled), or raise the tolerance"
        )
    return comparisons


def difference(
    measure: Measure,
    first: Sequence[float],
    second: Sequence[float],
    texts: Sequence[Hashable] | None = None,
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> Difference:
    """What two methods differ by over pairs of values, averaged by text.

    Args:
        measure: What the values are, in its unit.
        first: Values of the first method, at least one.
        second: Those of the second, in the same order.
        texts: What text each pair is on; None is a text of its own for every pair.
        confidence: Level of the intervals.
        seed: Seed of the bootstrap.
    """
    gains = np.subtract(second, first) if measure.better == "higher" else np.subtract(first, second)
    a, b = (_by_text(values, range(len(values)) if texts is None else texts) for values in (first, second))
    differences = b - a
    # Equal differences of floats are equal but for rounding, which would make an effect of any size.
    spread = float(differences.std(ddof=1)) if len(differences) > 1 else 0.0
    varies = spread > 1e-12 * max(1.0, float(np.abs(a).max()), float(np.abs(b).max()))
    mean = float(differences.mean())
    t_interval = None
    if varies:
        low, high = stats.ttest_rel(b, a).confidence_interval(confidence)
        t_interval = Interval(float(low), float(high))
    higher, lower = int((differences > 0).sum()), int((differences < 0).sum())
    return Difference(
        measure=measure.field,
        title=measure.title,
        unit=measure.unit,
        better=measure.better,
        pairs=len(gains),
        texts=len(differences),
        first_mean=float(a.mean()),
        second_mean=float(b.mean()),
        mean=mean,
        t_interval=t_interval,
        bootstrap_interval=_bootstrap(differences, confidence, seed) if varies and len(differences) > 2 else None,
        cohens_d=mean / spread if varies else None,
        dominance=float(np.mean(np.sign(gains))),
        sign_test_p=float(stats.binomtest(higher, higher + lower).pvalue) if higher + lower else 1.0,
        confidence=confidence,
    )


def _by_text(values: Sequence[float], texts: Sequence[Hashable]) -> npt.NDArray[np.float64]:
    """The mean over the pairs of each text, in the order in which texts appear."""
    groups: dict[Hashable, list[float]] = {}
    for value, text in zip(values, texts, strict=True):
        groups.setdefault(text, []).append(value)
    return np.array([np.mean(group) for group in groups.values()], dtype=np.float64)


def _bootstrap(differences: npt.NDArray[np.float64], confidence: float, seed: int) -> Interval | None:
    """The bootstrap interval of a mean; None where scipy finds none."""
    with warnings.catch_warnings():
        # Nearly equal differences have no acceleration; scipy then warns and answers with nan.
        warnings.simplefilter("ignore")
        found = stats.bootstrap(
            (differences,),
            np.mean,
            n_resamples=RESAMPLES,
            confidence_level=confidence,
            method="BCa",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    low, high = float(found.low), float(found.high)
    return Interval(low, high) if math.isfinite(low) and math.isfinite(high) else None


def _baseline(asked: str | None, methods: list[str]) -> str:
    if asked is None:
        return "SFT" if "SFT" in methods else methods[0]
    for method in methods:
        if method.lower() == asked.lower():
            return method
    raise InputError(f"baseline: no run of {asked!r}; there are {', '.join(methods)}; name one of them")


def _order(part: dict[Path, Record], by: str | None) -> tuple[float, str]:
    """Parts by number where they are numbers, by their text otherwise."""
    value = setting_of(next(iter(part.values())), by) if by else None
    return (float(value), "") if isinstance(value, int | float) else (math.inf, str(value))


def _compare_two(
    records: dict[Path, Record],
    first: str,
    second: str,
    where: dict[str, Any],
    tolerance: float,
    confidence: float,
    seed: int,
) -> Comparison:
    couples, left_out = _couples(records, first)
    matched: list[tuple[Path, Path]] = []
    unequal: list[LeftOut] = []
    other_budgets: list[LeftOut] = []
    compared, asked = [], []
    for couple in couples:
        runs = records[couple[0]], records[couple[1]]
        reason = _unequal(runs, tolerance)
        says_who_recalls = _says_who_recalls(*runs, equal=reason is None)
        if reason is None:
            matched.append(couple)
        else:
            left = LeftOut(tuple(path.as_posix() for path in couple), reason)
            (other_budgets if says_who_recalls else unequal).append(left)
        if says_who_recalls:
            asked.append(runs)
        if reason is None or says_who_recalls:
            compared.append(runs)

    same_budget = [(records[a], records[b]) for a, b in matched]
    return Comparison(
        first=first,
        second=second,
        where=where,
        confidence=confidence,
        tolerance=tolerance,
        pairs=[_pair(path_a, path_b, records) for path_a, path_b in matched],
        texts=len(set(_texts(same_budget))),
        differences=[_over(measure, same_budget, confidence, seed) for measure in MEASURES if same_budget],
        recalled=_recalled(asked, confidence, seed),
        settings=_other_settings(compared),
        other_budgets=other_budgets,
        left_out=[*unequal, *left_out],
    )


def _couples(records: dict[Path, Record], first: str) -> tuple[list[tuple[Path, Path]], list[LeftOut]]:
    """Pairs of finished runs of the same cell and seed, and the runs that have no single partner."""
    cells: dict[str, tuple[list[Path], list[Path]]] = {}
    left_out = []
    for path, record in sorted(records.items(), key=_by_cell):
        if record.status != "finished":
            left_out.append(LeftOut((path.as_posix(),), record.status))
        else:
            cell = cells.setdefault(repr([getattr(record, name) for name in SAME]), ([], []))
            cell[0 if method_name(record) == first else 1].append(path)
    couples = []
    for ones, others in cells.values():
        if len(ones) == len(others) == 1:
            couples.append((ones[0], others[0]))
        else:
            alone = not ones or not others
            reason = (
                "no run of the other method with the same rank, corpus and seed"
                if alone
                else ("several runs of one method with the same rank, corpus and seed: which to compare is not clear")
            )
            left_out.append(LeftOut(tuple(path.as_posix() for path in (*ones, *others)), reason))
    return couples, left_out


def _by_cell(item: tuple[Path, Record]) -> tuple[int, int, int, Path]:
    path, record = item
    return record.target_tokens, record.rank, record.seed, path


def _unequal(couple: Sequence[Record], tolerance: float) -> str | None:
    """Why the budgets of two runs are not the same, or None."""
    steps = [_given_steps(record) for record in couple]
    tokens = [record.target_tokens_trained for record in couple]
    for (first, second), noun in ((steps, "optimiser steps"), (tokens, "target tokens trained on")):
        if abs(first - second) > tolerance * max(first, second):
            return f"budgets differ: {first:,} and {second:,} {noun}"
    return None


def _says_who_recalls(first: Record, second: Record, *, equal: bool) -> bool:
    """Whether it is known of both whether they recall with what the other needed; `equal`: whether budgets are."""
    needed = [record.steps_to_recall for record in (first, second)]
    if needed[0] is None and needed[1] is not None:
        return _given_steps(first) >= needed[1]
    if needed[1] is None and needed[0] is not None:
        return _given_steps(second) >= needed[0]
    return equal or needed[0] is not None


def _given_steps(record: Record) -> int:
    """Steps in a run's budget: those that its method had no use for, too, since it got there with less."""
    return record.optimizer_steps + record.skipped_steps


def _certain(record: Record) -> bool:
    """Whether every target token became certain, by the run's own watch or by where it ended."""
    return record.steps_to_recall is not None or record.sub_threshold_fraction == 0


def _recalled(couples: list[tuple[Record, Record]], confidence: float, seed: int) -> Recalled:
    found = [(_certain(a), _certain(b)) for a, b in couples]
    timed = [(a, b) for a, b in couples if a.steps_to_recall is not None and b.steps_to_recall is not None]
    return Recalled(
        both=found.count((True, True)),
        only_first=found.count((True, False)),
        only_second=found.count((False, True)),
        neither=found.count((False, False)),
        steps=_over(STEPS_TO_RECALL, timed, confidence, seed) if timed else None,
    )


def _over(measure: Measure, couples: list[tuple[Record, Record]], confidence: float, seed: int) -> Difference:
    first, second = ([measure.of(run) for run in column] for column in zip(*couples, strict=True))
    return difference(measure, first, second, _texts(couples), confidence=confidence, seed=seed)


def _texts(couples: list[tuple[Record, Record]]) -> list[tuple[str, int]]:
    """The (corpus, seed) that each pair is on."""
    return [(a.corpus_hash, a.seed) for a, _ in couples]


def _other_settings(runs: list[tuple[Record, Record]]) -> dict[str, tuple[list[Any], list[Any]]]:
    """Method settings, weighting and curriculum apart, in which some pair's runs differ."""
    names = {name for couple in runs for record in couple for name in record.method_settings}
    found = {}
    for name in sorted(names - {"weighting", "curriculum"}):
        values = [(a.method_settings.get(name), b.method_settings.get(name)) for a, b in runs]
        if any(a != b for a, b in values):
            found[name] = (_distinct(a for a, _ in values), _distinct(b for _, b in values))
    return found


def _distinct(values: Iterable[Any]) -> list[Any]:
    """Each value once; values may be lists, which no set takes."""
    return [value for _, value in sorted({repr(value): value for value in values}.items())]


def _pair(first: Path, second: Path, records: dict[Path, Record]) -> Pair:
    a, b = records[first], records[second]
    return Pair(
        first=first.as_posix(),
        second=second.as_posix(),
        rank=a.rank,
        target_tokens=a.target_tokens,
        seed=a.seed,
        optimizer_steps=(a.optimizer_steps, b.optimizer_steps),
        target_tokens_trained=(a.target_tokens_trained, b.target_tokens_trained),
        wall_seconds=(a.wall_seconds, b.wall_seconds),
    )
