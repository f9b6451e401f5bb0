"""Sharing the training budget among examples: which of them an epoch trains on, in which batches, on which rank."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DistributedSampler

from pml.corpus import PADDING_EXAMPLE
from pml.errors import InputError

__all__ = ["CorpusBatchSampler", "PrefixRatio", "active_examples"]


@dataclass
class PrefixRatio:
    """The published curriculum: a growing share of the shuffled corpus, so that a little is learned well before more.

    The corpus is shuffled once; until the first boundary its first `ratios[0]` is trained on, until the second boundary
    its first `ratios[1]`, and so on. The last ratio stays after the last boundary.

    Args:
        ratios: Shares of the corpus that are trained on, one per stage, each in (0, 1].
        boundaries: The epoch at which each stage ends, rising, as many as there are ratios.

    Raises:
        InputError: If the two do not fit together, or a value is out of range.
    """

    ratios: list[float] = field(default_factory=lambda: [0.2, 0.4, 0.6, 0.8, 1.0])
    boundaries: list[int] = field(default_factory=lambda: [20, 40, 60, 80, 300])

    def __post_init__(self) -> None:
        if len(self.ratios) != len(self.boundaries) or not self.ratios:
            raise InputError(
                f"curriculum has {len(self.ratios)} ratios and {len(self.boundaries)} boundaries; expected as many "
                "boundaries as ratios, at least one: each ratio needs the epoch at which its stage ends"
            )
        if not all(0 < ratio <= 1 for ratio in self.ratios):
            raise InputError(f"curriculum ratios {list(self.ratios)}: expected shares of the corpus in (0, 1]")
        if any(end <= start for start, end in zip([0, *self.boundaries], self.boundaries, strict=False)):
            raise InputError(f"curriculum boundaries {list(self.boundaries)}: expected epochs that rise, from 1 on")

    def ratio(self, epoch: int) -> float:
        """Share of the corpus that is trained on in an epoch, counted from 0."""
        stages = zip(self.ratios, self.boundaries, strict=True)
        return next((ratio for ratio, boundary in stages if epoch < boundary), self.ratios[-1])


def active_examples(
    total: int,
    batch_size: int,
    ratios: Sequence[float],
    boundaries: Sequence[int],
    epoch: int,
    seed: int,
    drop_last: bool = True,
) -> list[int]:
    """Indices of the examples that the published curriculum trains on in one epoch, in their one shuffled order.

    Args:
        total: Number of examples N in the corpus.
        batch_size: Examples in a global batch; the active set is rounded down to a multiple of it, at least one.
        ratios: See `PrefixRatio`.
        boundaries: See `PrefixRatio`.
        epoch: Counted from 0.
        seed: Of the one shuffle.
        drop_last: Leave out what does not fill a batch even when the whole corpus is active.

    Example:
        >>> active_examples(10, 2, ratios=[0.5, 1.0], boundaries=[3, 6], epoch=0, seed=42)
        [2, 6, 1, 8]

    Raises:
        InputError: If ratios and boundaries do not fit together.
    """
    count = _active_count(total, batch_size, PrefixRatio(list(ratios), list(boundaries)).ratio(epoch), drop_last)
    return _permutation(total, seed)[:count]


def _active_count(total: int, batch_size: int, ratio: float, drop_last: bool) -> int:
    # int(total * ratio) truncates a floating-point product, and so may lose one example to rounding, as published.
    share = int(total * ratio)
    if share == total and not drop_last:
        return total
    return min(max(share // batch_size, 1) * batch_size, total)


def _permutation(total: int, seed: int) -> list[int]:
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()


class CorpusBatchSampler(DistributedSampler[list[int]]):
    """Batches of example indices for one rank.

    A global batch has `batch_size * world_size` examples; rank k takes the k-th slice of it. So k ranks with batches
    of b walk through the same global batches as one rank with batches of k b. Nothing is repeated to even out the
    ranks: at the end of the corpus a rank's batch may be shorter, or hold only the padding example (index -1, see
    `pml.corpus.PADDING_EXAMPLE`), but every rank gets the same number of batches.

    Give it to a `DataLoader` as `sampler` together with `batch_size=None`, so that the dataset is indexed with a whole
    batch. Lightning then calls `set_epoch` before each epoch. It wraps samplers that are not `DistributedSampler`s when
    a trainer has several ranks, which would share out the batches a second time; hence the base class.

    Args:
        total: Number of examples in the corpus.
        batch_size: Examples per rank and batch.
        seed: Of the curriculum's one shuffle; `seed + epoch` seeds each epoch's order.
        shuffle: Fresh order each epoch; otherwise the corpus' order, or the curriculum's.
        drop_last: Leave out what does not fill a last optimiser step.
        curriculum: Which examples are active in which epoch; None means all, always.
        rank: This process.
        world_size: Number of processes.
        accumulate: Batches that an optimiser step accumulates: what is rounded to whole steps is rounded to as many
            examples, so that k accumulated batches are as one that is k times as large.

    Raises:
        InputError: If `batch_size` is below 1, or `drop_last` leaves no batch.
    """

    def __init__(
        self,
        total: int,
        batch_size: int,
        *,
        seed: int = 42,
        shuffle: bool = True,
        drop_last: bool = False,
        curriculum: PrefixRatio | None = None,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; expected at least 1 example per rank")
        self.total = total
        self.examples_per_rank = batch_size
        self.examples_per_batch = batch_size * world_size
        self.batches_per_step = accumulate
        self.examples_per_step = self.examples_per_batch * accumulate
        self.curriculum = curriculum
        self._position = self._restored = {"epoch": 0, "batches": 0}
        if drop_last and total < self.examples_per_step:
            raise InputError(
                f"drop_last leaves no step: the corpus has {total} examples, a step over {world_size} rank(s) "
                f"{self.examples_per_step}; set drop_last: false or a smaller batch_size"
            )
        indices = range(total)  # only its length is used, by the base class
        super().__init__(indices, world_size, rank, shuffle=shuffle, seed=seed, drop_last=drop_last)  # type: ignore[arg-type]

    def __len__(self) -> int:
        """Number of batches in the current epoch."""
        return self.batches_in_epoch(self.epoch)

    def batches_in_epoch(self, epoch: int) -> int:
        """Number of batches in any epoch; they grow with a curriculum, which a learning-rate schedule has to know."""
        active = self._active_count(epoch)
        if self.drop_last:
            return active // self.examples_per_step * self.batches_per_step
        return math.ceil(active / self.examples_per_batch)

    def __iter__(self) -> Iterator[list[int]]:
        # A generator's body runs at the first `next`: Lightning may call `iter` first and `set_epoch` second.
        order = self._order(self.epoch)
        # Only what is asked for counts: the epoch may be left, and gone on with, anywhere.
        start = self._restored["batches"] if self._restored.get("epoch") == self.epoch else 0
        for batch in range(start, self.batches_in_epoch(self.epoch)):
            self._position = {"epoch": self.epoch, "batches": batch + 1}
            first = batch * self.examples_per_batch + self.rank * self.examples_per_rank
            yield order[first : first + self.examples_per_rank] or [PADDING_EXAMPLE.example_id]

    def state_dict(self) -> dict[str, Any]:
        """How far the epoch is, in batches that were asked for, and what the order of batches depends on."""
        return {**self._position, "order": self._order_settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was called, when that epoch is iterated next.

        Raises:
            InputError: If the epoch had begun, and its batches are others now.
        """
        begun = 0 < state["batches"] < self.batches_in_epoch(state["epoch"])
        now = self._order_settings()
        changed = [
            f"{name} {value} and now {now[name]}" for name, value in state["order"].items() if value != now[name]
        ]
        if begun and changed:
            raise InputError(
                f"this checkpoint stands {state['batches']} batches into an epoch whose batches were others: "
                f"{', '.join(changed)}; go on with the same batches and as many devices, or start anew"
            )
        self._restored = {"epoch": state["epoch"], "batches": state["batches"]}

    def _order_settings(self) -> dict[str, Any]:
        return {
            "examples": self.total,
            "batch_size": self.examples_per_rank,
            "global_batch": self.examples_per_batch,
            "accumulate": self.batches_per_step,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
        }

    def _active_count(self, epoch: int) -> int:
        if self.curriculum is None:
            return self.total
        return _active_count(self.total, self.examples_per_step, self.curriculum.ratio(epoch), self.drop_last)

    def _order(self, epoch: int) -> list[int]:
        active = list(range(self.total)) if self.curriculum is None else _permutation(self.total, self.seed)
        active = active[: self._active_count(epoch)]
        return [active[i] for i in _permutation(len(active), self.seed + epoch)] if self.shuffle else active
