"""Per-token results of a run, written and read: loss in nats, and whether the target token is the argmax."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from scipy import stats

from pml.corpus import Corpus, Example
from pml.errors import InputError
from pml.parquet import one_line_errors, write_table
from pml.token_scores import TokenScores, critical_loss

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
    """The target tokens of a run under teacher forcing, one entry per token, ordered by example and position.

    Attributes:
        example_id: (tokens,) int64, example that the token belongs to.
        position: (tokens,) int64, position in the target, from 0.
        loss: (tokens,) float64, negative log-probability in nats.
        correct: (tokens,) bool, whether the target token is the argmax.
    """

    example_id: npt.NDArray[np.int64]
    position: npt.NDArray[np.int64]
    loss: npt.NDArray[np.float64]
    correct: npt.NDArray[np.bool_]


class FirstPositions(NamedTuple):
    """Position of each target's first token at or below the threshold, and of its first wrong argmax.

    Both are the target's length if there is no such token. With a threshold of 0.5 or more the first is never larger
    than the second, because a token above p = 0.5 cannot be wrong.

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
    """Rank correlation of the first sub-threshold position and the first failure.

    Attributes:
        rho: Spearman's rank correlation over `targets`.
        rho_of_failing: The same over those that fail; None if fewer than three do, or either position is constant.
        targets: Number of targets with a token at or below the threshold; no other target can fail.
        unfailing: Number of these whose every argmax is right all the same; they count as failing at their end.
    """

    rho: float
    rho_of_failing: float | None
    targets: int
    unfailing: int


def replaced_tokens(examples: Sequence[Example], scores: TokenScores) -> torch.Tensor:
    """(examples, L) bool, target tokens that were replaced at random; `scores` has one row per example, in order."""
    replaced = torch.zeros_like(scores.mask)
    for row, example in zip(replaced, examples, strict=True):
        row[list(example.replaced)] = True
    return replaced


def write_tokens(path: Path, corpus: Corpus, scores: TokenScores) -> None:
    """Write one row per target token, atomically: example_id, position, token_id, loss (nats), correct, replaced.

    Args:
        path: The file.
        corpus: The scored corpus.
        scores: Scores of the whole corpus, one row per example, in order.
    """
    write_table(path, pa.table(_columns(corpus.examples, scores)))


def write_predictions(path: Path, corpus: Corpus, scores: TokenScores, text: Callable[[int], str]) -> None:
    """Write the columns of `write_tokens` together with the query, and the token's text and probability.

    Args:
        path: The file.
        corpus: The scored corpus.
        scores: Scores of the corpus or of some of its examples, one row per example, in order.
        text: Decodes one token id to text.
    """
    examples = [corpus.examples[i] for i in scores.example_id.tolist()]
    columns = _columns(examples, scores)
    losses = columns["loss"].cast(pa.float64()).to_numpy()
    query = [example.query for example in examples for _ in example.target_ids]
    shown = {i: text(i) for i in set(columns["token_id"].to_pylist())}
    readable = {
        "query": pa.array(query, pa.string()),
        "token": pa.array([shown[i] for i in columns["token_id"].to_pylist()], pa.string()),
        "probability": pa.array(np.exp(-losses), pa.float64()),
    }
    write_table(path, pa.table(columns | readable))


def _columns(examples: Sequence[Example], scores: TokenScores) -> dict[str, pa.Array]:
    rows, columns = scores.mask.nonzero(as_tuple=True)
    return {
        "example_id": pa.array(scores.example_id[rows].numpy(), pa.int32()),
        "position": pa.array(columns.numpy(), pa.int32()),
        "token_id": pa.array([i for e in examples for i in e.target_ids], pa.int32()),
        "loss": pa.array(scores.losses[rows, columns].numpy(), pa.float32()),
        "correct": pa.array(scores.correct[rows, columns].tolist(), pa.bool_()),
        "replaced": pa.array(replaced_tokens(examples, scores)[rows, columns].tolist(), pa.bool_()),
    }


def read_tokens(folder: Path) -> TokenResults:
    """Read the per-token results of a run.

    Args:
        folder: The run's folder.

    Raises:
        InputError: If the file is missing or is not as a run writes it.
    """
    path = folder / TOKENS_NAME
    with one_line_errors(path, COLUMNS, "a run writes it beside its record"):
        table = pq.read_table(path, columns=list(COLUMNS))
        example, position = (table[name].cast(pa.int64()).to_numpy() for name in COLUMNS[:2])
        loss, correct = table["loss"].cast(pa.float64()).to_numpy(), table["correct"].cast(pa.bool_()).to_numpy()
    whole = example.dtype == position.dtype == np.int64 and correct.dtype == np.bool_  # missing values change the dtype
    if not whole or not len(loss) or not np.isfinite(loss).all() or (loss < 0).any():
        raise InputError(f"{path}: expected a finite loss >= 0 and a verdict for every token; run it again")
    order = np.lexsort((position, example))
    return TokenResults(example[order], position[order], loss[order], correct[order])


def first_positions(tokens: TokenResults, threshold: float = 0.5) -> FirstPositions:
    """Positions, per example, of the first token with p <= threshold and of the first wrong one.

    Args:
        tokens: Target tokens ordered by example and position, as `read_tokens` returns them.
        threshold: Probability that a token has to exceed.
    """
    _, starts, lengths = np.unique(tokens.example_id, return_index=True, return_counts=True)
    places = np.arange(len(tokens.loss)) - np.repeat(starts, lengths)
    below = tokens.loss >= critical_loss(threshold)

    def first(marked: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        return np.minimum.reduceat(np.where(marked, places, np.repeat(lengths, lengths)), starts)

    return FirstPositions(first(below), first(~tokens.correct), lengths)


def rank_correlation(positions: FirstPositions) -> RankCorrelation | None:
    """Spearman's rank correlation of the first sub-threshold position and the first failure.

    Part of it holds by construction, since the second is never before the first.

    Returns:
        None if fewer than three targets have a sub-threshold token, or either position is the same for all of them.
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
