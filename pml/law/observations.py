"""What a law is fitted to: one observation per run, which runs are replicates, and which cannot be used."""

import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pydantic

from pml.content import Content
from pml.errors import InputError
from pml.groups import shared_setting
from pml.law.forms import AdapterSize
from pml.records import Record
from pml.same_text import texts_of

__all__ = [
    "CRITICAL_LOSS",
    "LeftOutRun",
    "Observation",
    "Reason",
    "numbered",
    "observations_from_records",
    "saturated",
    "unconverged",
    "usable",
]

Reason = Literal["diverged", "without a frozen loss", "interrupted", "not reduced"]

CRITICAL_LOSS = math.log(2)
"""Loss in nats below which a token has p > 0.5, so that greedy decoding must produce it."""

# A run had not converged if the last tenth of its steps still gave this share of its loss reduction: at that pace,
# training twice as long would change dL by a tenth.
LATE_DROP_SHARE = 0.01
# Rounding: a record's stored bits may differ from entropy minus loss by this share of the entropy.
ENTROPY_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Observation:
    """What one run measured; losses in nats per target token.

    Attributes:
        rank: LoRA rank r.
        target_tokens: Length l: supervised tokens over the whole corpus.
        initial_loss: Mean target loss of the frozen model, L0.
        final_loss: Mean target loss with the adapter.
        seed: Seed of the run.
        source: Where the numbers come from, such as the run's folder.
        finished: False for a run that was interrupted or diverged.
        effective_parameters: Trainable parameters of the adapter; None where unknown.
        entropy_bits: Information in the targets given the queries; None where unknown.
        pairs: Number of targets.
        late_loss_drop: By how much the training loss still fell at the end (see `pml.records.Record`).
        text: Identifies the text, such as the hash of its token ids; None where unknown.
        generated_token_accuracy: Share of target tokens that greedy decoding gets right; None where unknown.
        drawn_as: Equal for texts from one seed or source (see `pml.same_text`), of which a longer one may begin with a
            shorter one; None where unknown.

    Raises:
        InputError: If a count is not a whole number of at least 1.
    """

    # Files of earlier versions have further fields.
    __pydantic_config__ = pydantic.ConfigDict(extra="ignore", allow_inf_nan=False)

    rank: int
    target_tokens: int
    initial_loss: float
    final_loss: float
    seed: int
    source: str
    finished: bool = True
    effective_parameters: int | None = None
    entropy_bits: float | None = None
    pairs: int = 1
    late_loss_drop: float | None = None
    text: str | None = None
    generated_token_accuracy: float | None = None
    drawn_as: str | None = None

    def __post_init__(self) -> None:
        # Values from arrays and data frames become plain Python; their missing values (NaN, NA) become None.
        for field in fields(self):
            value = getattr(self, field.name)
            value = value.item() if isinstance(value, np.generic) else value
            if field.default is None and (type(value).__name__ == "NAType" or value != value):
                value = None
            if field.name == "text" and value is not None:
                value = str(value)
            object.__setattr__(self, field.name, value)
        for name in ("rank", "target_tokens", "effective_parameters", "pairs"):
            number = getattr(self, name)
            if number is None:
                continue
            if not (isinstance(number, (int, float)) and number >= 1 and float(number).is_integer()):
                raise InputError(f"{self.source}: {name} is {number!r}; expected a whole number of at least 1")
            object.__setattr__(self, name, int(number))

    @property
    def loss_reduction(self) -> float:
        """dL in nats per target token."""
        return self.initial_loss - self.final_loss

    @property
    def text_label(self) -> tuple[int, str | float]:
        """Equal for runs on one text. Unnamed texts are identified by length and the frozen model's loss."""
        return self.target_tokens, self.text or round(self.initial_loss, 3)

    @property
    def grid_point(self) -> tuple[int, int | None, int]:
        """Rank, effective parameters and length. Runs with the same grid point are replicates."""
        return self.rank, self.effective_parameters, self.target_tokens

    def size(self, adapter_size: AdapterSize) -> int:
        """The adapter's size as a law counts it; 0 if it counts parameters and they are unknown."""
        return self.rank if adapter_size == "rank" else self.effective_parameters or 0

    @property
    def stored_bits(self) -> float | None:
        """Information about the corpus in the adapter, in bits: the entropy minus the remaining loss.

        Negative if the adapted model predicts the targets worse than a uniform guess. None if the entropy is unknown
        or the final loss is not finite.
        """
        if self.entropy_bits is None or not math.isfinite(self.final_loss):
            return None
        return self.entropy_bits - self.final_loss * self.target_tokens / math.log(2)


class LeftOutRun(Content):
    """A run that no form can use, and why."""

    source: str
    reason: Reason


def numbered(labels: Iterable[Hashable]) -> npt.NDArray[np.intp]:
    """The index of each label, counting distinct labels in the order in which they first appear."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(label, len(numbers)) for label in labels], dtype=np.intp)


def saturated(run: Observation) -> bool:
    """Whether the final loss is at most ln 2. The geometric mean of p is then at least 0.5: the text limits the run."""
    return run.final_loss <= CRITICAL_LOSS


def unconverged(run: Observation) -> bool:
    """Whether an unsaturated run still gained over a hundredth of its loss reduction in the last tenth of its steps.

    A smaller gain does not prove convergence: the learning rate may have fallen to 0.
    """
    drop = run.late_loss_drop
    return not saturated(run) and drop is not None and drop > LATE_DROP_SHARE * run.loss_reduction


def usable(runs: Iterable[Observation]) -> tuple[list[Observation], list[LeftOutRun]]:
    """Split runs into those that a law can use, sorted by length, rank and seed, and the others with the reason.

    An interrupted run did not reach what its rank allows. A run whose loss did not fall learned nothing: its loss
    says more about the learning rate than the rank. A run whose final loss is not finite diverged. If only that of the
    frozen model is not, there is nothing to reduce.
    """
    kept, left_out = [], []
    for run in _sorted(runs):
        reason: Reason | None = None
        if not math.isfinite(run.final_loss):
            reason = "diverged"
        elif not math.isfinite(run.initial_loss):
            reason = "without a frozen loss"
        elif not run.finished:
            reason = "interrupted"
        elif run.loss_reduction <= 0:
            reason = "not reduced"
        if reason is None:
            kept.append(run)
        else:
            left_out.append(LeftOutRun(source=run.source, reason=reason))
    return kept, left_out


def observations_from_records(records: Mapping[Path, Record], adapter_size: AdapterSize = "rank") -> list[Observation]:
    """One observation per run, sorted by length, rank and seed; losses in nats per target token.

    Args:
        records: Records by the folder of their run, as `read_records` returns them.
        adapter_size: What the law counts as the adapter's size (see `shared_setting`).

    Raises:
        InputError: If there is no record, or the records do not belong to one law (see `shared_setting`).
    """
    shared_setting(records, adapter_size)
    texts = texts_of(records.values())
    return _sorted(
        Observation(
            rank=record.rank,
            target_tokens=record.target_tokens,
            initial_loss=_number(record.initial_loss),
            final_loss=_number(record.final_loss),
            seed=record.seed,
            source=path.as_posix(),
            finished=record.status == "finished",
            effective_parameters=record.effective_parameters,
            entropy_bits=_entropy_bits(record),
            pairs=record.pairs,
            late_loss_drop=record.late_loss_drop,
            text=record.corpus_hash,
            generated_token_accuracy=record.generated_token_accuracy,
            drawn_as=texts[record.corpus_hash],
        )
        for path, record in records.items()
    )


def _entropy_bits(record: Record) -> float | None:
    """Information in the targets in bits; None if unknown, or if several prompts ask for the same fact.

    The entropy then counts a fact once and the loss every time, so the two do not give the stored bits.
    """
    entropy, stored, loss = record.corpus_entropy_bits, record.memorized_bits, record.final_loss
    if entropy is None or record.corpus_settings.get("templates", 1) != 1:
        return None
    # Settings of a user's own corpus need not say so: compare with the run's own count, unless that is 0.
    if stored and loss is not None:
        missing = loss * record.target_tokens / math.log(2)
        return entropy if abs(entropy - missing - stored) <= ENTROPY_TOLERANCE * entropy else None
    return entropy


def _number(loss: float | None) -> float:
    """A recorded loss; None stands for a loss that is not finite."""
    return math.nan if loss is None else loss


def _sorted(runs: Iterable[Observation]) -> list[Observation]:
    return sorted(runs, key=lambda run: (run.target_tokens, run.rank, run.seed, run.source))
