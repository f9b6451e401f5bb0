"""What a run leaves about every target token, written and read back: loss in nats, and whether the argmax is right."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from scipy import stats

from pml.corpus import Corpus
from pml.errors import InputError
from pml.parquet import reading, write_table
from pml.weighting import TokenScores, critical_loss

__all__ = [
    "PREDICTIONS_NAME",
    "TOKENS_NAME",
    "FirstPositions",
    "RankCorrelation",
    "TokenResults",
    "first_positions",
    "rank_correlation",
    "read_tokens",
    "replaced_tokens",
    "write_predictions",
    "write_tokens",
]

TOKENS_NAME = "tokens.parquet"
PREDICTIONS_NAME = "predictions.parquet"
COLUMNS = ("example_id", "position", "loss", "correct")


@dataclass(frozen=True)
class TokenResults:
    """The target tokens of a run under teacher forcing, one entry per token, by example and position.

    Attributes:
        example_id: (tokens,) int64, which example the token belongs to.
        position: (tokens,) int64, its place in the target, from 0.
        loss: (tokens,) float64, negative log-probability in nats.
        correct: (tokens,) bool, whether its argmax is right.
    """

    example_id: npt.NDArray[np.int64]
    position: npt.NDArray[np.int64]
    loss: npt.NDArray[np.float64]
    correct: npt.NDArray[np.bool_]


class FirstPositions(NamedTuple):
    """Where each target first stands at or below the threshold, and where its argmax is first wrong.

    Both are the target's length where there is no such token; the first is never larger than the second, because a
    token above p = 0.5 cannot be wrong.

    Attributes:
        sub_threshold: (examples,) int64.
        failure: (examples,) int64.
        length: (examples,) int64, target tokens.
    """

    sub_threshold: npt.NDArray[np.int64]
    failure: npt.NDArray[np.int64]
    length: npt.NDArray[np.int64]


@dataclass(frozen=True)
class RankCorrelation:
    """How the first sub-threshold position and the first failure go together.

    Attributes:
        rho: Spearman's rank correlation.
        rho_of_failing: The same over the counted targets that do fail; None with fewer than three, or all at one place.
        targets: Targets that it is over: those with a token at or below the threshold; in the others nothing can fail.
        unfailing: Targets among the counted in which all the same every argmax is right; they count as failing at
            their end.
    """

    rho: float
    rho_of_failing: float | None
    targets: int
    unfailing: int


def replaced_tokens(corpus: Corpus, scores: TokenScores) -> torch.Tensor:
    """(examples, L) bool, target tokens that were put in at random."""
    replaced = torch.zeros_like(scores.mask)
    for row, example in zip(replaced, corpus.examples, strict=True):
        row[list(example.replaced)] = True
    return replaced


def write_tokens(path: Path, corpus: Corpus, scores: TokenScores) -> None:
    """One row per target token: example_id, position, token_id, loss (nats), correct, replaced; written atomically.

    Args:
        path: The file.
        corpus: What was scored.
        scores: Of the whole corpus, one row per example, in order.
    """
    write_table(path, pa.table(_columns(corpus, scores)))


def write_predictions(path: Path, corpus: Corpus, scores: TokenScores, text: Callable[[int], str]) -> None:
    """As `write_tokens`, with the query, the token's text and its probability beside it.

    Args:
        path: The file.
        corpus: What was scored.
        scores: Of the whole corpus, one row per example, in order.
        text: The text of one token id.
    """
    columns = _columns(corpus, scores)
    losses = columns["loss"].cast(pa.float64()).to_numpy()
    query = [example.query for example in corpus.examples for _ in example.target_ids]
    shown = {i: text(i) for i in set(columns["token_id"].to_pylist())}
    readable = {
        "query": pa.array(query, pa.string()),
        "token": pa.array([shown[i] for i in columns["token_id"].to_pylist()], pa.string()),
        "probability": pa.array(np.exp(-losses), pa.float64()),
    }
    write_table(path, pa.table(columns | readable))


def _columns(corpus: Corpus, scores: TokenScores) -> dict[str, pa.Array]:
    rows, columns = scores.mask.nonzero(as_tuple=True)
    return {
        "example_id": pa.array(scores.example_id[rows].numpy(), pa.int32()),
        "position": pa.array(columns.numpy(), pa.int32()),
        "token_id": pa.array([i for e in corpus.examples for i in e.target_ids], pa.int32()),
        "loss": pa.array(scores.losses[rows, columns].numpy(), pa.float32()),
        "correct": pa.array(scores.correct[rows, columns].tolist(), pa.bool_()),
        "replaced": pa.array(replaced_tokens(corpus, scores)[rows, columns].tolist(), pa.bool_()),
    }


def read_tokens(folder: Path) -> TokenResults:
    """Read the per-token results of a run.

    Args:
        folder: The run's folder.

    Raises:
        InputError: If there are none, or they are not as a run writes them.
    """
    path = folder / TOKENS_NAME
    with reading(path, COLUMNS, "a run writes it beside its record"):
        table = pq.read_table(path, columns=list(COLUMNS))
        example, position = (table[name].cast(pa.int64()).to_numpy() for name in COLUMNS[:2])
        loss, correct = table["loss"].cast(pa.float64()).to_numpy(), table["correct"].cast(pa.bool_()).to_numpy()
    whole = example.dtype == position.dtype == np.int64 and correct.dtype == np.bool_  # other where values are missing
    if not whole or not len(loss) or not np.isfinite(loss).all() or (loss < 0).any():
        raise InputError(f"{path}: expected a finite loss >= 0 and a verdict for every token; run it again")
    order = np.lexsort((position, example))
    return TokenResults(example[order], position[order], loss[order], correct[order])


def first_positions(tokens: TokenResults, threshold: float = 0.5) -> FirstPositions:
    """The first token with p <= threshold and the first wrong one, per example.

    Args:
        tokens: Target tokens by example and position, as `read_tokens` gives them.
        threshold: Probability that a token has to exceed.
    """
    _, starts, lengths = np.unique(tokens.example_id, return_index=True, return_counts=True)
    places = np.arange(len(tokens.loss)) - np.repeat(starts, lengths)
    below = tokens.loss >= critical_loss(threshold)

    def first(marked: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        return np.minimum.reduceat(np.where(marked, places, np.repeat(lengths, lengths)), starts)

    return FirstPositions(first(below), first(~tokens.correct), lengths)


def rank_correlation(positions: FirstPositions) -> RankCorrelation | None:
    """Spearman's rank correlation of first sub-threshold position and first failure.

    Some of it is there by construction, since the second is never before the first.

    Returns:
        None where fewer than three targets have a sub-threshold token, or all stand at the same position.
    """
    counted = positions.sub_threshold < positions.length
    failing = counted & (positions.failure < positions.length)
    rho = _spearman(positions, counted)
    if rho is None:
        return None
    return RankCorrelation(
        rho=rho,
        rho_of_failing=_spearman(positions, failing),
        targets=int(counted.sum()),
        unfailing=int((counted & ~failing).sum()),
    )


def _spearman(positions: FirstPositions, chosen: npt.NDArray[np.bool_]) -> float | None:
    below, failure = positions.sub_threshold[chosen], positions.failure[chosen]
    if len(below) < 3 or len(np.unique(below)) == 1 or len(np.unique(failure)) == 1:
        return None
    return float(stats.spearmanr(below, failure).statistic)
