"""The last score of every target token of a corpus, kept on the device that computes the scores."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from pml.ranks import several_ranks
from pml.token_scores import TokenScores

__all__ = ["LastSeen", "TokenStates", "margins", "shares"]

LOSS, CORRECT, MARGIN, RIVAL, STEP = range(5)


class TokenStates(NamedTuple):
    """The target tokens of a corpus at one look, one entry per token, ordered by example and position.

    Attributes:
        probability: (tokens,) float32; NaN for a token that was never scored.
        correct: (tokens,) bool, whether the target token is the argmax.
        margin: (tokens,) float32, its logit minus that of the best other token; NaN where unknown.
        rival: (tokens,) int32, id of that other token; -1 where unknown.
        first_right: (examples,) int64, step at which every token of a target was first right; -1 if never.
    """

    probability: npt.NDArray[np.float32]
    correct: npt.NDArray[np.bool_]
    margin: npt.NDArray[np.float32]
    rival: npt.NDArray[np.int32]
    first_right: npt.NDArray[np.int64]

    def certain(self, threshold: float = 0.5) -> npt.NDArray[np.bool_]:
        """(tokens,) bool, the tokens that greedy decoding cannot miss."""
        return np.asarray(self.correct & (self.probability > threshold))


class LastSeen:
    """Keeps the last scores of every target token on the device; the host waits only when it reads them.

    The table has one row per token and one more that takes padding: selecting rows by a mask would make the host wait
    for the device at every step. Ids and steps up to 2^24 are exact in float32.

    Args:
        lengths: Target tokens of each example, by example id.
        device: Device that computes the scores.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        sizes = torch.tensor(lengths)
        # The last entry is the row that takes padding.
        self._offsets = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)]).to(device)
        self.table = torch.full((int(sizes.sum()) + 1, 5), torch.nan, dtype=torch.float32, device=device)
        self.table[:, STEP] = -1
        self.first_right = torch.full((len(lengths) + 1,), torch.inf, dtype=torch.float32, device=device)

    def update(self, scores: TokenScores, step: int) -> None:
        """Record the scores of a batch.

        Args:
            scores: Scores on any device.
            step: Optimiser steps taken before they were computed.
        """
        device = self.table.device
        losses, correct, mask, example_id = (t.to(device, non_blocking=True) for t in scores[:4])
        example, token = self._rows(example_id, mask)
        unknown = torch.full_like(losses, torch.nan)
        margin = unknown if scores.margin is None else scores.margin.to(device)
        rival = unknown if scores.rival is None else scores.rival.to(device)
        columns = (losses, correct, margin, rival, torch.full_like(losses, step))
        self.table[token] = torch.stack([column.float() for column in columns], dim=-1)
        whole = (correct | ~mask).all(dim=1)
        first = torch.full_like(whole, step, dtype=torch.float32).where(whole, torch.full((), torch.inf, device=device))
        self.first_right.scatter_reduce_(0, example, first, "amin")

    def _rows(self, example_id: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of examples (B,) in `first_right` and of tokens (B, L) in `table`; padding has the last, unused one."""
        real = example_id >= 0
        example = example_id.where(real, len(self.first_right) - 1)
        token = self._offsets[example][:, None] + torch.arange(mask.shape[1], device=mask.device)
        return example, token.where(mask & real[:, None], len(self.table) - 1)

    def standing(self) -> TokenStates:
        """The latest score of every token over all ranks. A collective: every rank must call it."""
        self._share()
        table, first = self.table[:-1].cpu().numpy(), self.first_right[:-1].cpu().numpy()
        return TokenStates(
            probability=np.exp(-table[:, LOSS]),
            correct=table[:, CORRECT] == 1,
            margin=table[:, MARGIN].copy(),
            rival=np.nan_to_num(table[:, RIVAL], nan=-1).astype(np.int32),
            first_right=np.where(np.isfinite(first), first, -1).astype(np.int64),
        )

    def _share(self) -> None:
        """Merge what the ranks have seen, so that all of them hold the latest scores."""
        if several_ranks():
            everyone = [torch.empty_like(self.table) for _ in range(dist.get_world_size())]
            dist.all_gather(everyone, self.table)
            tables = torch.stack(everyone)
            latest = tables[:, :, STEP].argmax(dim=0)
            # In place: a checkpoint may be saved in validation, where new tensors could not be updated after it.
            self.table.copy_(tables[latest, torch.arange(len(latest), device=latest.device)])
            dist.all_reduce(self.first_right, op=dist.ReduceOp.MIN)

    def state_dict(self) -> dict[str, Tensor]:
        """State of all ranks for a checkpoint. A collective: every rank must call it."""
        self._share()
        return {"table": self.table.cpu(), "first_right": self.first_right.cpu()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        self.table.copy_(state["table"])
        self.first_right.copy_(state["first_right"])


def shares(standing: TokenStates, lengths: Sequence[int], threshold: float = 0.5) -> dict[str, float]:
    """Shares of a corpus that are certain, right without being certain, and wrong.

    Args:
        standing: Last scores of the target tokens.
        lengths: Target tokens of each pair.
        threshold: Probability that a token has to exceed.

    Returns:
        Shares of target tokens (`certain_tokens`, `right_not_certain_tokens`, `wrong_tokens`); shares of pairs, each
        judged by its weakest token (`certain_pairs`, `right_not_certain_pairs`, `failing_pairs`); `once_right_pairs`,
        the share of pairs that were right at some step; and `weakest_probability`. The names sort alphabetically by
        importance.
    """
    certain, right = standing.certain(threshold), standing.correct
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
    pairs_certain, pairs_right = (np.logical_and.reduceat(mark, starts) for mark in (certain, right))
    probability = standing.probability[~np.isnan(standing.probability)]
    values = {
        "certain_pairs": pairs_certain.mean(),
        "certain_tokens": certain.mean(),
        "failing_pairs": 1 - pairs_right.mean(),
        "once_right_pairs": (standing.first_right >= 0).mean(),
        "right_not_certain_pairs": pairs_right.mean() - pairs_certain.mean(),
        "right_not_certain_tokens": (right & ~certain).mean(),
        "weakest_probability": probability.min() if len(probability) else np.nan,
        "wrong_tokens": 1 - right.mean(),
    }
    return {name: float(value) for name, value in values.items()}


def margins(standing: TokenStates) -> dict[str, float]:
    """`median` and `smallest` logit margin over all target tokens; empty if none is known."""
    known = standing.margin[~np.isnan(standing.margin)]
    return {"median": float(np.median(known)), "smallest": float(known.min())} if len(known) else {}
