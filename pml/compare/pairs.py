"""Which runs of two methods are a pair, and whether they had the same budget."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pml.groups import method_name, setting_of
from pml.records import Record

__all__ = ["TOLERANCE", "LeftOut", "Pair", "find_pairs"]

TOLERANCE = 0.05
"""Largest difference between two budgets, as a share of the larger, at which they count as the same."""

SAME = (
    *("backbone_hash", "dtype", "block", "placement", "init", "rank", "corpus_hash", "seed"),
    "method_settings.matmul_precision",
)


@dataclass(frozen=True)
class Pair:
    """Two finished runs that differ in the method alone.

    Attributes:
        first: Folder of the run of the first method.
        second: Folder of the run of the second.
        text: Hash of the corpus of both.
        seed: Seed of both.
        budgets: How their budgets differ, in words; empty where they are the same.
    """

    first: Path
    second: Path
    text: str
    seed: int
    budgets: str


@dataclass(frozen=True)
class LeftOut:
    """Runs that were not compared, by their folders, and why."""

    runs: tuple[str, ...]
    reason: str


def find_pairs(
    records: Mapping[Path, Record], first: str, second: str, tolerance: float = TOLERANCE
) -> tuple[list[Pair], list[LeftOut]]:
    """Pairs of runs with one backbone, place and initialisation of the adapter, rank, corpus and seed; and the others.

    Args:
        records: Records by the folder of their run; those of other methods are passed over.
        first: A method, as `method_name` writes it.
        second: Another.
        tolerance: Largest difference of equal budgets, as a share of the larger.
    """
    alike: dict[str, tuple[list[Path], list[Path]]] = {}
    left_out = []
    for path, record in sorted(records.items(), key=lambda item: (item[1].target_tokens, item[1].rank, item[0])):
        method = method_name(record)
        if method not in (first, second):
            continue
        if record.status != "finished":
            left_out.append(LeftOut((path.as_posix(),), record.status))
        else:
            setting = repr([setting_of(record, name) for name in SAME])
            alike.setdefault(setting, ([], []))[method == second].append(path)
    pairs = []
    for ones, others in alike.values():
        if len(ones) == len(others) == 1:
            a, b = records[ones[0]], records[others[0]]
            pairs.append(Pair(ones[0], others[0], a.corpus_hash, a.seed, _how_budgets_differ(a, b, tolerance)))
        else:
            same = "with the same rank, corpus and seed"
            reason = (
                f"several runs of one method {same}: which to compare is not clear"
                if ones and others
                else f"no run of the other method {same}"
            )
            left_out.append(LeftOut(tuple(path.as_posix() for path in (*ones, *others)), reason))
    return pairs, left_out


def _how_budgets_differ(a: Record, b: Record, tolerance: float) -> str:
    """Steps that a method skipped, having nothing left to train, were in its budget too."""
    for unit, one, other in (
        ("optimiser steps", a.optimizer_steps + a.skipped_steps, b.optimizer_steps + b.skipped_steps),
        ("target tokens trained on", a.target_tokens_trained, b.target_tokens_trained),
    ):
        if abs(one - other) > tolerance * max(one, other):
            return f"budgets differ: {one:,} and {other:,} {unit}"
    return ""
