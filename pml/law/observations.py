"""What a law is fitted to: one observation for each run, which runs belong together, and which cannot be used."""

import json
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

Reason = Literal["diverged", "interrupted", "not reduced"]

CRITICAL_LOSS = math.log(2)
"""Loss in nats below which a token has p > 0.5, so that greedy decoding must produce it."""

# A run had not converged if the last tenth of its steps still gave this share of its loss reduction: at that pace, ten
# more tenths would change dL by a tenth.
LATE_DROP_SHARE = 0.01
# Settings by which corpora of one seed differ in size alone.
SIZES = ("length", "count", "pairs", "people", "size", "target_tokens")
# Stored bits of a record may differ from entropy minus loss by this share of the entropy: rounding.
ENTROPY_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Observation:
    """What one run measured; losses in nats per target token.

    Attributes:
        rank: LoRA rank r.
        target_tokens: Length l, supervised tokens over the whole corpus.
        initial_loss: Mean target loss of the frozen model, L0.
        final_loss: Mean target loss with the adapter.
        seed: Seed of the run.
        source: Where the numbers come from, such as the run's folder.
        finished: False for a run that was stopped from outside, or that diverged.
        effective_parameters: Trainable parameters of the adapter; None where unknown.
        entropy_bits: Information in the targets given the queries; None where unknown.
        pairs: Number of targets.
        late_loss_drop: By how much the training loss still fell at the end (see `pml.records.Record`).
        text: Identifies the text, such as the hash of its token ids; None where unknown.
        generated_token_accuracy: Share of target tokens that greedy decoding puts in their place; None where unknown.
        drawn_as: Equal for texts of which the longer may begin with the shorter, drawn from one seed; None where
            unknown.

    Raises:
        InputError: If a number is none that a run can have measured.
    """

    # Files of earlier versions say more of a run.
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
        # As plain Python, which arrays and data frames are not; a missing value of theirs is not a number.
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
        """Equal for runs on one text. Where texts are not named, equal losses of the frozen model identify them."""
        return self.target_tokens, self.text or round(self.initial_loss, 3)

    @property
    def grid_point(self) -> tuple[int, int | None, int]:
        """Rank, effective parameters and length. Runs at one grid point are replicates."""
        return self.rank, self.effective_parameters, self.target_tokens

    def size(self, adapter_size: AdapterSize) -> int:
        """What a law counts as the adapter's size; 0 where it counts parameters and they are unknown."""
        return self.rank if adapter_size == "rank" else self.effective_parameters or 0

    @property
    def stored_bits(self) -> float | None:
        """Information about the corpus in the adapter, in bits: the entropy minus what is still missing.

        Negative where the adapted model predicts the targets worse than a uniform guess. None where the entropy is
        unknown or the final loss is not finite.
        """
        if self.entropy_bits is None or not math.isfinite(self.final_loss):
            return None
        return self.entropy_bits - self.final_loss * self.target_tokens / math.log(2)


class LeftOutRun(Content):
    """A run that no form can use, and why."""

    source: str
    reason: Reason


def numbered(labels: Iterable[Hashable]) -> npt.NDArray[np.intp]:
    """The number of each label, in the order in which they first appear."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(label, len(numbers)) for label in labels], dtype=np.intp)


def saturated(run: Observation) -> bool:
    """Whether the final loss is at most ln 2: the geometric mean of p is 0.5 or more, so the text limits the run."""
    return run.final_loss <= CRITICAL_LOSS


def unconverged(run: Observation) -> bool:
    """Whether an unsaturated run still gained a hundredth of its loss reduction in the last tenth of its steps.

    One that gained less may have stopped since its learning rate had fallen to 0.
    """
    drop = run.late_loss_drop
    return not saturated(run) and drop is not None and drop > LATE_DROP_SHARE * run.loss_reduction


def usable(runs: Iterable[Observation]) -> tuple[list[Observation], list[LeftOutRun]]:
    """The runs that inform the law, sorted by length, rank and seed, and the others with the reason.

    An interrupted run did not reach what its rank allows. A run whose loss did not fall learned nothing, and its loss
    depends on the learning rate. A run whose loss is not finite diverged.
    """
    kept, left_out = [], []
    for run in _sorted(runs):
        reason: Reason | None = None
        if not all(map(math.isfinite, (run.initial_loss, run.final_loss))):
            reason = "diverged"
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
    """One observation for each run, sorted by length, rank and seed; losses in nats per target token.

    Args:
        records: Records by the folder of their run, as `read_records` gives them.
        adapter_size: What the law counts, see `shared_setting`.

    Raises:
        InputError: If there is no record, or they do not belong to one law (see `shared_setting`).
    """
    shared_setting(records, adapter_size)
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
            drawn_as=_drawn_as(record),
        )
        for path, record in records.items()
    )


def _drawn_as(record: Record) -> str | None:
    """What the corpus was drawn as, whatever its size; None where it was not drawn from a seed."""
    several = record.corpus_settings.get("count", 1) > 1  # of which only the first begins alike at all lengths
    sizes = [name for name in SIZES if not (several and name == "length")]
    settings = {name: value for name, value in record.corpus_settings.items() if name not in sizes}
    return json.dumps([record.corpus, settings], sort_keys=True, default=str) if "seed" in settings else None


def _entropy_bits(record: Record) -> float | None:
    """Information in the targets; None too where facts are asked for in several ways, of which it counts one.

    The loss counts them all, so that what is stored does not follow from the two.
    """
    entropy, stored, loss = record.corpus_entropy_bits, record.memorized_bits, record.final_loss
    if entropy is None or record.corpus_settings.get("templates", 1) > 1:
        return None
    # Facts of a corpus of one's own are told by what the run itself has counted, unless that is nothing.
    if stored and loss is not None:
        missing = loss * record.target_tokens / math.log(2)
        return entropy if abs(entropy - missing - stored) <= ENTROPY_TOLERANCE * entropy else None
    return entropy


def _number(loss: float | None) -> float:
    """A loss of a record, where null stands for a number that is not finite."""
    return math.nan if loss is None else loss


def _sorted(runs: Iterable[Observation]) -> list[Observation]:
    return sorted(runs, key=lambda run: (run.target_tokens, run.rank, run.seed, run.source))
