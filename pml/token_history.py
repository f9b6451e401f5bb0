"""The scores of target tokens at every look of a run, written and read: the data behind TensorBoard's pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pml.errors import InputError
from pml.last_seen import TokenStates
from pml.parquet import one_line_errors, write_table

__all__ = ["HISTORY_NAME", "HISTORY_TOKENS", "History", "HistoryRecorder", "read_history"]

HISTORY_NAME = "history.parquet"
HISTORY_TOKENS = 25_000
"""Maximum number of target tokens kept per look: forty looks are then a million rows, about ten megabytes."""

COLUMNS = ("step", "example_id", "position", "token_id", "probability", "margin", "correct")


@dataclass(frozen=True)
class History:
    """Looks at target tokens, ordered by example and position.

    Attributes:
        step: (looks,) int64, optimiser steps taken.
        example_id: (tokens,) int64.
        position: (tokens,) int64, position in the target, from 0.
        token_id: (tokens,) int64.
        probability: (looks, tokens) float32; NaN if a token had not been scored.
        margin: (looks, tokens) float32, logit minus that of the best other token; NaN where unknown.
        correct: (looks, tokens) bool, whether the token is the argmax.
    """

    step: npt.NDArray[np.int64]
    example_id: npt.NDArray[np.int64]
    position: npt.NDArray[np.int64]
    token_id: npt.NDArray[np.int64]
    probability: npt.NDArray[np.float32]
    margin: npt.NDArray[np.float32]
    correct: npt.NDArray[np.bool_]


class HistoryRecorder:
    """Collects looks in memory and writes them as one file.

    A corpus of more than `limit` target tokens is thinned to every n-th example, with the smallest n that fits. If
    even the first example is longer, its first `limit` tokens are kept.

    Args:
        targets: Token ids of each target, by example id.
        limit: Maximum number of tokens to keep per look.
    """

    def __init__(self, targets: Sequence[Sequence[int]], limit: int = HISTORY_TOKENS) -> None:
        lengths = np.array([len(target) for target in targets])
        starts = np.concatenate([[0], lengths.cumsum()[:-1]])
        chosen = _spread(lengths, limit)
        self._example = np.repeat(chosen, lengths[chosen])[:limit]
        self._position = np.concatenate([np.arange(lengths[i]) for i in chosen])[:limit]
        self._token = np.concatenate([np.asarray(targets[i]) for i in chosen])[:limit]
        self._kept = starts[self._example] + self._position
        self._steps: list[int] = []
        self._looks: list[tuple[npt.NDArray[Any], ...]] = []

    def add(self, step: int, standing: TokenStates) -> None:
        """Add a look; it replaces the last one if that was at the same step."""
        if self._steps and self._steps[-1] == step:
            del self._steps[-1], self._looks[-1]
        self._steps.append(step)
        self._looks.append(tuple(column[self._kept] for column in standing[:3]))

    @property
    def history(self) -> History:
        """The collected looks; needs at least one."""
        probability, correct, margin = (np.stack(column) for column in zip(*self._looks, strict=True))
        step = np.array(self._steps)
        return History(step, self._example, self._position, self._token, probability, margin, correct)

    def write(self, path: Path) -> None:
        """Write all looks atomically, one row per look and token, in that order; without looks, write nothing."""
        if not self._looks:
            return
        history, looks, tokens = self.history, len(self._looks), len(self._kept)
        margin = history.margin.ravel()
        table = {
            "step": pa.array(history.step.repeat(tokens), pa.int32()),
            "example_id": pa.array(np.tile(history.example_id, looks), pa.int32()),
            "position": pa.array(np.tile(history.position, looks), pa.int32()),
            "token_id": pa.array(np.tile(history.token_id, looks), pa.int32()),
            "probability": pa.array(history.probability.ravel(), pa.float32()),
            "margin": pa.array(margin, pa.float32(), mask=np.isnan(margin)),
            "correct": pa.array(history.correct.ravel(), pa.bool_()),
        }
        write_table(path, pa.table(table))

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {"steps": list(self._steps), "looks": [tuple(map(torch.from_numpy, look)) for look in self._looks]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._steps = list(state["steps"])
        self._looks = [tuple(column.numpy() for column in look) for look in state["looks"]]


def read_history(folder: Path) -> History:
    """Read the looks of a run.

    Args:
        folder: The run's folder.

    Raises:
        InputError: If the file is missing or is not as a run writes it.
    """
    path = folder / HISTORY_NAME
    with one_line_errors(path, COLUMNS, "a run with TokenThresholds writes it"):
        table = pq.read_table(path, columns=list(COLUMNS))
        step, example, position, token = (table[name].cast(pa.int64()).to_numpy() for name in COLUMNS[:4])
        probability, margin = (table[name].cast(pa.float32()).to_numpy() for name in COLUMNS[4:6])
        correct = table["correct"].cast(pa.bool_()).to_numpy()
    looks = np.unique(step)
    order = np.lexsort((position, example, step))
    first = order[: len(order) // max(1, len(looks))]
    shape = (len(looks), len(first))
    tokens = ((column[order], np.tile(column[first], len(looks))) for column in (example, position, token))
    at_looks = (step[order], np.repeat(looks, len(first)))
    if not len(step) or not all(np.array_equal(found, expected) for found, expected in (at_looks, *tokens)):
        raise InputError(f"{path}: expected the same tokens at every look; run it again")
    return History(
        step=looks,
        example_id=example[first],
        position=position[first],
        token_id=token[first],
        probability=probability[order].reshape(shape),
        margin=margin[order].reshape(shape),
        correct=correct[order].reshape(shape),
    )


def _spread(lengths: npt.NDArray[np.int64], limit: int) -> npt.NDArray[np.int64]:
    """Every n-th example, with the smallest n whose tokens fit within the limit; at least the first example."""
    every = 1
    while (chosen := np.arange(0, len(lengths), every)).size > 1 and lengths[chosen].sum() > limit:
        every += 1
    return chosen
