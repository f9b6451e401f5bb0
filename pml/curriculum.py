"""Which examples an epoch trains on, in which batches, and on which rank."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DistributedSampler

from pml.corpus import PADDING_EXAMPLE
from pml.errors import InputError
from pml.plain import as_plain

__all__ = ["CorpusBatchSampler", "PrefixRatio", "active_examples"]


@dataclass
class PrefixRatio:
    """The published curriculum: train on a growing share of the corpus, to learn a little well before more.

    The corpus is shuffled once. Epochs before the first boundary train on its first `ratios[0]`, those before the
    second on its first `ratios[1]`, and so on. The last ratio stays in force after the last boundary.

    Args:
        ratios: Shares of the corpus that are trained on, one per stage, each in (0, 1].
        boundaries: The epoch at which each stage ends, increasing, one per ratio.

    Raises:
        InputError: If their numbers differ, or a value is out of range.
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
            raise InputError(f"curriculum boundaries {list(self.boundaries)}: expected increasing epochs, from 1 on")

    def ratio(self, epoch: int) -> float:
        """Share of the corpus that an epoch trains on; epochs count from 0."""
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
    """Indices of the examples that the published curriculum trains on in one epoch, in shuffled order.

    Args:
        total: Number of examples N in the corpus.
        batch_size: Examples in a global batch; the active set is rounded down to whole batches, at least one.
        ratios: See `PrefixRatio`.
        boundaries: See `PrefixRatio`.
        epoch: Epoch, counted from 0.
        seed: Seed of the shuffle.
        drop_last: Drop an incomplete last batch even when the whole corpus is active.

    Example:
        >>> active_examples(10, 2, ratios=[0.5, 1.0], boundaries=[3, 6], epoch=0, seed=42)
        [2, 6, 1, 8]

    Raises:
        InputError: See `PrefixRatio`.
    """
    count = _active_count(total, batch_size, PrefixRatio(list(ratios), list(boundaries)).ratio(epoch), drop_last)
    return _permutation(total, seed)[:count]


def _active_count(total: int, batch_size: int, ratio: float, drop_last: bool) -> int:
    # As published, int() truncates a floating-point product, which may lose one example to rounding.
    share = int(total * ratio)
    if share == total and not drop_last:
        return total
    return min(max(share // batch_size, 1) * batch_size, total)


def _permutation(total: int, seed: int) -> list[int]:
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()


class CorpusBatchSampler(DistributedSampler[list[int]]):
    """Batches of example indices for one rank.

    A global batch has `batch_size * world_size` examples, of which rank k takes the k-th slice. So k ranks with batches
    of b examples see the same global batches as one rank with batches of k b. No example is repeated to even out the
    ranks: at the end of the corpus a rank's batch may be shorter, or hold only the padding example (index -1, see
    `pml.corpus.PADDING_EXAMPLE`), but every rank gets the same number of batches.

    Pass it to a `DataLoader` as `sampler`, with `batch_size=None`, so that the dataset is indexed with a whole batch.
    Lightning then calls `set_epoch` before each epoch. With several ranks, Lightning wraps samplers that are not a
    `DistributedSampler`, which would split the batches a second time; hence the base class.

    Args:
        total: Number of examples in the corpus.
        batch_size: Examples per rank and batch.
        seed: Seed of the curriculum's shuffle; `seed + epoch` seeds the order of each epoch.
        shuffle: Draw a new order each epoch; otherwise keep the order of the corpus, or of the curriculum.
        drop_last: Drop the examples that do not fill a last optimiser step.
        curriculum: Which examples are active in which epoch; None takes all in every epoch.
        rank: Rank of this process.
        world_size: Number of processes.
        accumulate: Batches per optimiser step. The curriculum and `drop_last` round to whole steps, so that k
            accumulated batches train on the same examples as one batch k times as large.

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
                f"takes {self.examples_per_step}; set drop_last: false or a smaller batch_size"
            )
        indices = range(total)  # only its length is used, by the base class
        super().__init__(indices, world_size, rank, shuffle=shuffle, seed=seed, drop_last=drop_last)  # type: ignore[arg-type]

    def __len__(self) -> int:
        """Number of batches in the current epoch."""
        return self.batches_in_epoch(self.epoch)

    def batches_in_epoch(self, epoch: int) -> int:
        """Number of batches in an epoch; with a curriculum, later epochs have more."""
        active = self._active_count(epoch)
        if self.drop_last:
            return active // self.examples_per_step * self.batches_per_step
        return math.ceil(active / self.examples_per_batch)

    def __iter__(self) -> Iterator[list[int]]:
        # Lightning may call `iter` before `set_epoch`; a generator reads the epoch only at the first `next`.
        order = self._order(self.epoch)
        # The position counts batches as they are drawn, so an epoch can be left and resumed at any batch.
        start = self._restored["batches"] if self._restored.get("epoch") == self.epoch else 0
        for batch in range(start, self.batches_in_epoch(self.epoch)):
            self._position = {"epoch": self.epoch, "batches": batch + 1}
            first = batch * self.examples_per_batch + self.rank * self.examples_per_rank
            yield order[first : first + self.examples_per_rank] or [PADDING_EXAMPLE.example_id]

    def state_dict(self) -> dict[str, Any]:
        """Number of batches drawn in this epoch, and the sampler settings that fix its batches."""
        batches = self.batches_in_epoch(self._position["epoch"])
        return {**self._position, "of": batches, "order": self._order_settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume at the position of `state_dict` when its epoch is iterated next.

        Raises:
            InputError: If that epoch had begun, and other settings would change its batches.
        """
        # Other settings may give the epoch another number of batches; older checkpoints do not have their own.
        begun = 0 < state["batches"] < state.get("of", self.batches_in_epoch(state["epoch"]))
        now = self._order_settings()
        changed = [
            f"{name} was {value}, is now {now[name]}" for name, value in state["order"].items() if value != now[name]
        ]
        if begun and changed:
            raise InputError(
                f"this checkpoint is {state['batches']} batches into an epoch that was batched otherwise: "
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
            "curriculum": as_plain(self.curriculum),
        }

    def _active_count(self, epoch: int) -> int:
        if self.curriculum is None:
            return self.total
        return _active_count(self.total, self.examples_per_step, self.curriculum.ratio(epoch), self.drop_last)

    def _order(self, epoch: int) -> list[int]:
        active = list(range(self.total)) if self.curriculum is None else _permutation(self.total, self.seed)
        active = active[: self._active_count(epoch)]
        return [active[i] for i in _permutation(len(active), self.seed + epoch)] if self.shuffle else active
