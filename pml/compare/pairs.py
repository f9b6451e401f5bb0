"""Which runs of two methods form a pair, and whether their budgets are equal."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pml.groups import drawn_as, setting_of
from pml.records import Record

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
        text: What is evidence of its own: the draw of the runs' corpus, or its hash if it was not drawn from a seed.
        seed: Seed of both runs.
        budgets: How their budgets differ, in words; empty if they are equal.
    """

    first: Path
    second: Path
    text: str
    seed: int
    budgets: str


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
    texts: dict[str, str] = {}
    for ones, others in alike.values():
        if len(ones) == len(others) == 1:
            a, b = records[ones[0]], records[others[0]]
            # One corpus has one draw, even if records name it in two ways, such as by two paths.
            text = texts.setdefault(a.corpus_hash, drawn_as(a) or a.corpus_hash)
            pairs.append(Pair(ones[0], others[0], text, a.seed, _how_budgets_differ(a, b, tolerance)))
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
