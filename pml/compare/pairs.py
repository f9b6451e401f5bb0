"""Which runs of two methods form a pair, and whether their budgets are equal."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pml.groups import setting_of
from pml.records import Record
from pml.same_text import texts_of

__all__ = ["TOLERANCE", "LeftOut", "Pair", "find_pairs"]

TOLERANCE = 0.05
"""Largest difference between budgets that count as equal, as a share of the larger."""

SAME = (
    *("backbone_hash", "dtype", "block", "placement", "init", "rank", "corpus_hash", "seed"),
    "method_settings.matmul_precision",
)


@dataclass(frozen=True)
class Pair:
    """Two finished runs of different methods with the same values of the fields in `SAME`.

    Attributes:
        first: Folder of the first method's run.
        second: Folder of the second method's run.
        text: What is evidence of its own: the text of the runs' corpus (see `pml.same_text`).
        seed: Seed of both runs.
        budgets: How their budgets differ, in words; empty if they are equal.
        margins: How the probabilities differ that they had to exceed to count as certain, in words; empty if they are
            equal, or if not both got there.
        alone: The run that alone became certain at every token, 1 or 2, though the other took as many steps; 0 if none.
    """

    first: Path
    second: Path
    text: str
    seed: int
    budgets: str
    margins: str
    alone: int


@dataclass(frozen=True)
class LeftOut:
    """Folders of runs that were not compared, and the reason."""

    runs: tuple[str, ...]
    reason: str


def find_pairs(
    records: Mapping[Path, Record],
    methods: Mapping[Path, str],
    first: str,
    second: str,
    tolerance: float = TOLERANCE,
) -> tuple[list[Pair], list[LeftOut]]:
    """Pairs of runs that agree in backbone, adapter placement, rank, corpus and seed, and the runs left out.

    Args:
        records: Records by run folder; runs of other methods are ignored.
        methods: Name of each run's method.
        first: Name of the first method.
        second: Name of the second method.
        tolerance: Largest difference between budgets that count as equal, as a share of the larger.
    """
    alike: dict[str, tuple[list[Path], list[Path]]] = {}
    left_out = []
    for path, record in sorted(records.items(), key=lambda item: (item[1].target_tokens, item[1].rank, item[0])):
        method = methods[path]
        if method not in (first, second):
            continue
        if record.status != "finished":
            left_out.append(LeftOut((path.as_posix(),), record.status))
        else:
            setting = repr([setting_of(record, name) for name in SAME])
            alike.setdefault(setting, ([], []))[method == second].append(path)
    pairs = []
    texts = texts_of(records.values())
    for ones, others in alike.values():
        if len(ones) == len(others) == 1:
            a, b = records[ones[0]], records[others[0]]
            budgets = _how_budgets_differ(a, b, tolerance)
            pairs.append(
                Pair(ones[0], others[0], texts[a.corpus_hash], a.seed, budgets, _how_margins_differ(a, b), _alone(a, b))
            )
        else:
            same = "with the same rank, corpus and seed"
            reason = (
                f"several runs of one method {same}: it is not clear which to compare"
                if ones and others
                else f"no run of the other method {same}"
            )
            left_out.append(LeftOut(tuple(path.as_posix() for path in (*ones, *others)), reason))
    return pairs, left_out


def _how_budgets_differ(a: Record, b: Record, tolerance: float) -> str:
    """How two budgets differ, in words; steps skipped because nothing was left to train count too."""
    for unit, one, other in (
        ("optimiser steps", a.optimizer_steps + a.skipped_steps, b.optimizer_steps + b.skipped_steps),
        ("target tokens trained on", a.target_tokens_trained, b.target_tokens_trained),
    ):
        if abs(one - other) > tolerance * max(one, other):
            return f"budgets differ: {one:,} and {other:,} {unit}"
    return ""


def _how_margins_differ(a: Record, b: Record) -> str:
    """How the thresholds of two numbers of steps differ, in words; earlier records do not say what theirs is."""
    if None in (a.steps_to_recall, b.steps_to_recall) or a.recall_margin == b.recall_margin:
        return ""
    one, other = ("not recorded" if p is None else f"p > {p:g}" for p in (a.recall_margin, b.recall_margin))
    return f"certain means something else, so steps are not compared: {one} and {other}"


def _alone(a: Record, b: Record) -> int:
    """The only run of two that got there, 1 or 2, if the other took as many steps without getting there; 0 if none."""
    for number, there, other in ((1, a, b), (2, b, a)):
        needed = there.steps_to_recall
        if needed is not None and other.steps_to_recall is None and other.recall_margin == there.recall_margin:
            # A run that skips steps has nothing left to train, so it never gets there.
            return number if other.optimizer_steps + other.skipped_steps >= needed else 0
    return 0
