"""Any number of methods compared with a baseline method, over pairs of runs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from pml.compare.difference import Difference, paired_difference
from pml.compare.outcomes import OUTCOMES, Outcome, measure_outcomes
from pml.compare.pairs import TOLERANCE, LeftOut, Pair, find_pairs
from pml.errors import InputError
from pml.groups import method_names, setting_of, short_method_names, training_of
from pml.records import Record
from pml.tables import count, setting_order

__all__ = ["Comparison", "MethodMeans", "compare"]

# A record has these settings only if the run used them, so a missing one counts as a difference.
WHERE_USED: Final = {"guard", "kl_penalty"}
VERDICTS: Final = ("better", "worse", "undecided")
Values = Mapping[Path, Mapping[str, float | None]]
"""Outcomes by name, for each run folder."""


@dataclass(frozen=True)
class MethodMeans:
    """Mean outcomes of a method's finished runs.

    Attributes:
        method: The method.
        runs: Number of finished runs.
        all_certain: Number of these in which every target token is certain at the end.
        means: Mean of each outcome over the runs that have it; None if none has.
    """

    method: str
    runs: int
    all_certain: int
    means: dict[str, float | None]


@dataclass(frozen=True)
class Comparison:
    """Each method against the baseline, over pairs of runs.

    Attributes:
        baseline: The method that the others are compared with.
        where: The field that the runs were split by and their value of it; empty if they were not split.
        confidence: Level of all intervals, such as 0.95, not adjusted for multiple comparisons.
        tolerance: Largest difference between budgets that count as equal, as a share of the larger.
        by_text: Whether samples are texts; if all runs are on one text, samples are its seeds. Texts drawn from one
            seed, or cut from one source, count as one.
        recall_margins: Probabilities that every token had to exceed to count as certain in the outcome of steps; empty
            if no record says so.
        methods: Mean outcomes of each method, the baseline first.
        differences: One for each other method and each outcome in which a pair of its runs can be compared.
        settings: Settings other than weighting and curriculum in which the runs of some pair differ, with all values
            as text.
        left_out: Runs that were not compared, or not in all outcomes, with the reason.
    """

    baseline: str
    where: dict[str, Any]
    confidence: float
    tolerance: float
    by_text: bool
    recall_margins: list[float]
    methods: list[MethodMeans]
    differences: list[Difference]
    settings: dict[str, list[str]]
    left_out: list[LeftOut]

    @property
    def verdicts(self) -> list[str]:
        """One sentence per method: what it is better in, worse in, and what is undecided."""
        return [self._verdict(means.method) for means in self.methods if means.method != self.baseline]

    def _verdict(self, method: str) -> str:
        found: dict[str, list[str]] = {}
        for one in self.differences:
            if one.method == method:
                found.setdefault(one.verdict, []).append(self._in_words(one))
        parts = [f"{verdict} in {', '.join(found[verdict])}" for verdict in VERDICTS if verdict in found]
        return f"{method} against {self.baseline}: {'; '.join(parts) or 'no pair of runs to compare'}."

    def _in_words(self, found: Difference) -> str:
        title, alone = found.outcome.title + self.threshold(found.outcome), ""
        if any(found.alone):
            alone = "only {} got there in {}, only {} in {}".format(
                self.baseline, count(found.alone[0], "pair"), found.method, count(found.alone[1], "pair")
            )
        if found.verdict == "undecided":
            return f"{title} ({alone})" if alone else title
        unit = "points" if found.outcome.unit == "%" else found.outcome.unit
        parts = [f"{found.outcome.show(found.mean, '+')} {unit}"]
        if found.interval:
            parts.append(f"{100 * found.confidence:g} % interval {found.interval_shown}")
        return f"{title} ({'; '.join(filter(None, (*parts, alone)))})"

    def threshold(self, outcome: Outcome) -> str:
        """What follows the title of steps: the probability that every token had to exceed; empty where unknown."""
        margins = " or ".join(f"{margin:g}" for margin in self.recall_margins) if outcome.any_budget else ""
        return f", p > {margins}" if margins else ""

    def to_json(self) -> dict[str, Any]:
        """The comparison with its verdicts, as numbers, strings, lists and dictionaries only."""
        content = asdict(self) | {"verdicts": self.verdicts}
        for written, found in zip(content["differences"], self.differences, strict=True):
            written |= {"outcome": found.outcome.name, "unit": found.outcome.unit, "verdict": found.verdict}
        return content


def compare(
    records: Mapping[Path, Record],
    *,
    baseline: str | None = None,
    by: str | None = None,
    tolerance: float = TOLERANCE,
    confidence: float = 0.95,
) -> list[Comparison]:
    """Compare every other method with a baseline: in one comparison, or in one for each value of `by`.

    Only pairs with equal budgets are compared: a method that trains longer is not a better one. Steps to certainty are
    compared whatever the budget, since runs may stop there, but only at one probability that every token must exceed,
    and if both got there; where only one did, the verdict says so. Pairs on one text are averaged first and count once,
    since they are no further evidence about other texts; so are pairs on texts from one seed or source (see
    `pml.same_text`). If all runs are on one text, each of its seeds counts once.

    Args:
        records: Records by run folder.
        baseline: The method that the others are compared with, by its name or short name, in any case; None is SFT if
            there is one, otherwise the first by name.
        by: Field of a record to split the runs by, such as `rank`.
        tolerance: Largest difference between budgets that count as equal, as a share of the larger.
        confidence: Level of the intervals.

    Raises:
        InputError: If there are fewer than two methods, no run has the baseline or the field, no pair can be compared,
            or `tolerance` or `confidence` is out of range.
    """
    if not 0 <= tolerance < 1:
        raise InputError(f"tolerance: expected a share of at least 0 and below 1, got {tolerance:g}; 0.05 is 5 %")
    if not 0.5 <= confidence < 1:
        raise InputError(f"confidence: expected at least 0.5 and below 1, got {confidence:g}; 0.95 is usual")
    methods = method_names(records)
    names = sorted(set(methods.values()))
    if len(names) < 2:
        only = f"all runs are of {names[0]}" if names else "no run"
        raise InputError(f"{only}: expected runs of at least two methods; add the runs of another method")
    first = _baseline(baseline, names)
    if by is not None and all(setting_of(record, by) is None for record in records.values()):
        raise InputError(f"by: no run has a value for {by!r}; expected a field of a record, such as rank")
    parts: dict[str, dict[Path, Record]] = {}
    for path, record in records.items():
        parts.setdefault(repr(setting_of(record, by)) if by else "", {})[path] = record
    values = {path: measure_outcomes(path, record) for path, record in records.items() if record.status == "finished"}
    comparisons = [_comparison(part, methods, values, first, by, tolerance, confidence) for part in parts.values()]
    comparisons.sort(key=lambda comparison: [setting_order(value) for value in comparison.where.values()])
    if not any(comparison.differences for comparison in comparisons):
        reasons = sorted({left.reason for comparison in comparisons for left in comparison.left_out})
        others = f"; and {len(reasons) - 2} more" if len(reasons) > 2 else ""
        raise InputError(
            f"no pair of runs of equal budgets ({'; '.join(reasons[:2])}{others}), and none in which both became "
            "certain: expected runs of two methods with the same rank, corpus, seed, steps and target tokens; train "
            "both equally long, or until they recall (callbacks.StopWhenRecalled), or raise the tolerance"
        )
    return comparisons


def _comparison(
    records: Mapping[Path, Record],
    methods: Mapping[Path, str],
    values: Values,
    baseline: str,
    by: str | None,
    tolerance: float,
    confidence: float,
) -> Comparison:
    runs: dict[str, list[Path]] = {}
    for path in records:
        runs.setdefault(methods[path], []).append(path)
    others = sorted(runs.keys() - {baseline})
    found = {other: find_pairs(records, methods, baseline, other, tolerance) for other in others}
    every = [pair for pairs, _ in found.values() for pair in pairs]
    differences = [
        difference
        for other in others
        for outcome in OUTCOMES
        if (difference := _difference(outcome, other, found[other][0], values, confidence)) is not None
    ]
    left_out = [left for _, several in found.values() for left in several]
    left_out += [
        LeftOut((pair.first.as_posix(), pair.second.as_posix()), reason)
        for pair in every
        for reason in (pair.budgets, pair.margins)
        if reason
    ]
    reached = [record for record in records.values() if record.steps_to_recall is not None]
    return Comparison(
        baseline=baseline,
        where={by: setting_of(next(iter(records.values())), by)} if by else {},
        confidence=confidence,
        tolerance=tolerance,
        by_text=any(difference.by_text for difference in differences),
        recall_margins=sorted({run.recall_margin for run in reached if run.recall_margin is not None}),
        methods=[_means(method, runs[method], values) for method in (baseline, *others) if method in runs],
        differences=differences,
        settings=_other_settings([(records[pair.first], records[pair.second]) for pair in every]),
        # A run of the baseline may be left out once for each other method.
        left_out=list(dict.fromkeys(left_out)),
    )


def _difference(
    outcome: Outcome, method: str, pairs: list[Pair], values: Values, confidence: float
) -> Difference | None:
    """The difference over pairs that have the outcome and, where it matters, equal budgets; None without such pairs."""
    chosen = [
        (pair, one, other)
        for pair in pairs
        if (one := values[pair.first][outcome.name]) is not None
        and (other := values[pair.second][outcome.name]) is not None
        and not (pair.margins if outcome.any_budget else pair.budgets)
    ]
    if not chosen:
        return None
    # With a single text, its seeds are all the evidence there is.
    by_text = len({pair.text for pair, _, _ in chosen}) > 1
    samples = [pair.text if by_text else pair.seed for pair, _, _ in chosen]
    first, second = [one for _, one, _ in chosen], [other for _, _, other in chosen]
    found = paired_difference(outcome, first, second, samples, name=method, confidence=confidence, by_text=by_text)
    alone = [pair.alone for pair in pairs]
    return replace(found, alone=(alone.count(1), alone.count(2))) if outcome.any_budget else found


def _means(method: str, runs: Sequence[Path], values: Values) -> MethodMeans:
    paths = [path for path in runs if path in values]
    known = {o.name: [v for path in paths if (v := values[path][o.name]) is not None] for o in OUTCOMES}
    return MethodMeans(
        method=method,
        runs=len(paths),
        all_certain=sum(values[path]["tokens_certain"] == 100 for path in paths),
        means={name: float(np.mean(numbers)) if numbers else None for name, numbers in known.items()},
    )


def _baseline(asked: str | None, methods: list[str]) -> str:
    if asked is None:
        return "SFT" if "SFT" in methods else methods[0]
    short = short_method_names(methods)
    for method in methods:
        if asked.lower() in (method.lower(), short[method].lower()):
            return method
    raise InputError(f"baseline: no run of {asked!r}; expected one of: {'; '.join(methods)}")


def _other_settings(runs: list[tuple[Record, Record]]) -> dict[str, list[str]]:
    """Settings in which the runs of a pair differ, with all values; weighting and curriculum belong to the method."""
    found: dict[str, set[str]] = {}
    for records in runs:
        first, second = (record.method_settings | training_of(record) for record in records)
        in_both = first.keys() & second.keys()
        compared = (in_both - {"weighting", "curriculum"}) | WHERE_USED
        for name in compared:
            one, other = first.get(name), second.get(name)
            if one != other:
                found.setdefault(name, set()).update((str(one), str(other)))
    return {name: sorted(found[name]) for name in sorted(found)}
