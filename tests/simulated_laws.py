"""Runs of known laws, to test what a fit concludes from them: noise in nats, per run, grid point or text."""

import itertools
from collections.abc import Iterable
from typing import Any
from unittest import mock

import numpy as np

from pml.law import FORMS, FormName, LawFit, Observation, fit_law

__all__ = [
    "HIGH_LOSS",
    "SATURATING",
    "TRUTH",
    "fit_one",
    "grid",
    "law_of",
    "published",
    "run",
    "runs_with_texts",
    "saturating_runs",
]

HIGH_LOSS = 1000.0
TRUTH = {"C": 40.0, "alpha": 0.5, "beta": 0.6, "b": 0.3}
SATURATING = {"C": 110.0, "alpha": 0.7, "beta": 0.6, "sharpness": 4.0}


def law_of(rank: float, length: float) -> float:
    """The paper's law, in nats."""
    return TRUTH["C"] * rank ** TRUTH["alpha"] / length ** TRUTH["beta"] + TRUTH["b"]


def run(rank: int, length: int, reduction: float, seed: int = 0, initial: float = HIGH_LOSS) -> Observation:
    return Observation(rank, length, initial, initial - reduction, seed, f"r{rank}-l{length}-s{seed}")


def grid(
    noise: np.random.Generator,
    ranks: tuple[int, ...] = (1, 2, 4),
    lengths: tuple[int, ...] = (64, 128, 256),
    seeds: int = 1,
    of_point: float = 0.0,
    of_seed: float = 0.0,
) -> list[Observation]:
    """Runs of the paper's law, with an error per grid point, shared by its seeds, and one per seed, both in nats."""
    runs = []
    for rank, length in itertools.product(ranks, lengths):
        shared = law_of(rank, length) + of_point * noise.normal()
        runs += [run(rank, length, shared + of_seed * noise.normal(), seed) for seed in range(seeds)]
    return runs


def saturating_runs(
    noise: np.random.Generator, spread: float = 0.1, relative: float = 0.0, sharpness: float = 4.0
) -> list[Observation]:
    """Runs of a law with a ceiling of 13 nats; they scatter below the ceiling, but hardly at it."""
    runs = []
    for rank, length in itertools.product((1, 2, 3, 4, 6), (64, 96, 144, 216)):
        power = 110.0 * rank**0.7 / length**0.6 * (1 + relative * noise.normal())
        reduction = (power**-sharpness + 13.0**-sharpness) ** (-1 / sharpness)
        reach = (1 + (power / 13.0) ** sharpness) ** -(1 + 1 / sharpness)
        runs.append(run(rank, length, min(reduction + spread * reach * noise.normal(), 12.99), initial=13.0))
    return runs


def runs_with_texts(noise: np.random.Generator, effect: float, seeds: int = 2) -> list[Observation]:
    """Runs on texts whose frozen losses vary by 0.3 nats, of which every rank learns away the share `effect`."""
    runs = []
    for length, seed in itertools.product((64, 96, 144, 216), range(seeds)):
        excess = 0.3 * noise.normal()
        for rank in (1, 2, 4, 8):
            reduction = law_of(rank, length) + effect * excess + 0.05 * noise.normal()
            runs.append(run(rank, length, reduction, seed, initial=HIGH_LOSS + excess))
    return runs


def fit_one(runs: Iterable[Observation], form: FormName, **options: Any) -> LawFit:
    """A law fitted in one form only, since the other forms would take most of the time of hundreds of fits."""
    with mock.patch("pml.law.fit.FORMS", {form: FORMS[form]}):
        return fit_law(runs, form=form, **options)


def published(runs: Iterable[Observation], **options: Any) -> LawFit:
    """A law fitted in the paper's form."""
    return fit_one(runs, "power_offset", **options)
