"""One record per run: what was run and what came out, written atomically and checked against its schema when read."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Protocol, runtime_checkable

import pydantic

from pml.atomic import whole_file
from pml.errors import InputError
from pml.folders import files_below

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = [
    "RECORD_NAME",
    "SCHEMA_VERSION",
    "SET_ASIDE",
    "Measured",
    "MeasuresForRecord",
    "Record",
    "Status",
    "fault_of_field",
    "read_record",
    "read_records",
    "write_json",
    "write_record",
]

RECORD_NAME = "record.json"
SCHEMA_VERSION: Final = 4

SHARES = (
    "token_accuracy",
    "exact_match",
    "generated_exact_match",
    "generated_token_accuracy",
    "sub_threshold_fraction",
    "min_target_probability",
    "generated_edit_similarity",
    "extraction_probability",
)

ROUNDING = 1e-6

SET_ASIDE = ".unfinished-"
"""With a number, the suffix of folders in which a sweep keeps what an earlier attempt left; these are not runs."""

Status = Literal["finished", "diverged", "interrupted"]


def _finite(value: Any) -> Any:
    """The value, but None for a float that is not finite, which JSON cannot express."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


Measured = Annotated[float | None, pydantic.BeforeValidator(_finite)]
"""A loss, or a number that follows from losses; None (null in JSON) if not finite, as after a diverged fit."""


class Record(pydantic.BaseModel):
    """What was run and what came out. Losses are in nats per target token; everything else says its unit.

    Fields of type `Measured`, losses and what follows from them, are null if they are not finite. Shares and counts
    are always numbers: a token whose loss is NaN counts as below the threshold.

    Attributes:
        schema_version: Version of this layout; earlier ones lack some of the fields that have a default here.
        status: `finished` if the fit ended and everything was measured; `diverged` if it did but the final loss is not
            finite; `interrupted` if the fit was stopped from outside.
        backbone: Name, folder or hub id of the backbone as it was loaded.
        backbone_hash: Hash of its weights and configuration.
        dtype: Floating-point type of the frozen weights.
        block: Indices of the adapted decoder blocks.
        placement: `mlp_block`, or the names of the adapted linear layers.
        init: How A was initialised, `published` or `peft`.
        rank: LoRA rank r.
        effective_parameters: Trainable parameters of the adapter.
        corpus: Name of the corpus.
        corpus_hash: Hash of its token ids.
        corpus_encoding: Version of the rules that turned its text into token ids (`pml.encoding.ENCODING_VERSION`).
        corpus_settings: Settings that the corpus was made with.
        pairs: Number of (query, target) pairs.
        target_tokens: Length l, supervised tokens over all pairs.
        corpus_entropy_bits: Information in the targets given the queries, in bits; None if unknown.
        method: `sft` or `memft`.
        method_settings: Weighting, curriculum and optimiser settings; `matmul_precision` if it is not `highest`.
        training: Other settings that may change the result: `batch_size` and `global_batch_size` (in examples, over
            accumulation and ranks), `accumulate_grad_batches`, `max_epochs`, `max_steps`, clipping, precision as run,
            strategy. Empty before schema version 4.
        seed: Seed of the run.
        optimizer_steps: Optimiser steps taken.
        resumed: How often the fit was resumed from a checkpoint.
        grown_from: Ranks of the smaller adapters that it was grown from, whose steps, tokens and time are counted here.
        skipped_steps: Steps not taken because every token had weight 0: MemFT had nothing left to train.
        target_tokens_trained: Target tokens in training batches, counting repetitions.
        initial_loss: Mean target loss of the frozen model.
        final_loss: Mean target loss with the adapter, dropout off; never null if the run finished, always if it
            diverged.
        loss_reduction: `initial_loss - final_loss`.
        token_accuracy: Share of target tokens whose argmax is right under teacher forcing.
        exact_match: Share of targets that are right at every token under teacher forcing.
        generated_exact_match: Share of targets that greedy decoding returns; None if nothing was generated.
        generated_token_accuracy: Share of target tokens that greedy decoding puts in their place; None likewise.
        sub_threshold_fraction: Share of target tokens with p <= 0.5.
        min_target_probability: Smallest probability of any target token.
        first_failure: Mean over targets of the number of right tokens before the first wrong one (the target's length
            if none is wrong).
        memorized_bits: Corpus entropy minus the adapted model's loss in bits, at least 0; None if unknown.
        bits_per_parameter: `memorized_bits / effective_parameters`.
        steps_to_recall: Optimiser steps until every target token was certified; None if that did not happen.
        recall_margin: Probability that every target token must exceed for that; None in earlier records, and if no
            callback looked.
        rounding_logits: Largest change seen between teacher forcing and decoding in the margin of a target token's
            logit over the others; certified margins exceed it. None if not measured, as in float32.
        late_loss_drop: Measure of convergence: mean training loss over the second to last tenth of the steps minus that
            over the last tenth, per target token whatever the weighting; None with fewer than 20 steps.
        learning_rate_left: Learning rate of the last step as a share of the peak. If it is small, a small
            `late_loss_drop` shows that the schedule ended, not that the adapter was full.
        by_kind: Random target tokens apart from the others, if the corpus has both: for `random` and `natural`,
            `target_tokens`, `initial_loss`, `final_loss` and `token_accuracy`.
        corpus_figures: Numbers that only this kind of corpus has or a user's callback measured, units in the names.
        retention: Effect of memorising on text outside the corpus: by name of the text, `target_tokens`, `loss_before`
            and `loss_after`.
        harm: The same for ordinary text, by its kind (`prose`, `code`, `chat`) and for their `mean`.
        generated_edit_similarity: Mean over targets of 1 - edit distance / length between target and greedy decoding,
            in characters; None if nothing was generated.
        extraction_probability: Mean over targets of the probability that at least one of `extraction_samples` samples
            at temperature 1 is the whole target.
        extraction_samples: Number of samples for `extraction_probability`.
        wall_seconds: Duration of the fit, without the measurements before and after it.
        versions: Package versions.
        hardware: Device name and count, threads.
        git_commit: Commit of the working directory, if there is one.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1, 2, 3, 4] = SCHEMA_VERSION
    status: Status
    backbone: str
    backbone_hash: str
    dtype: str
    block: list[int]
    placement: str | list[str]
    init: str
    rank: int = pydantic.Field(ge=1)
    effective_parameters: int = pydantic.Field(ge=1)
    corpus: str
    corpus_hash: str
    corpus_settings: dict[str, Any]
    pairs: int = pydantic.Field(ge=1)
    target_tokens: int = pydantic.Field(ge=1)
    corpus_entropy_bits: float | None
    method: str
    method_settings: dict[str, Any]
    seed: int
    optimizer_steps: int
    target_tokens_trained: int
    initial_loss: Measured
    final_loss: Measured
    loss_reduction: Measured
    token_accuracy: float
    exact_match: float
    generated_exact_match: float | None = None
    generated_token_accuracy: float | None = None
    sub_threshold_fraction: float
    min_target_probability: Measured
    first_failure: float
    memorized_bits: Measured
    bits_per_parameter: Measured
    steps_to_recall: int | None = None
    recall_margin: float | None = None
    rounding_logits: Measured = None
    wall_seconds: float
    versions: dict[str, str]
    hardware: dict[str, Any]
    git_commit: str | None
    late_loss_drop: Measured = None
    learning_rate_left: float | None = None
    by_kind: Mapping[Literal["natural", "random"], Mapping[str, Measured]] = {}
    corpus_figures: Mapping[str, Measured] = {}
    retention: Mapping[str, Mapping[str, Measured]] = {}
    harm: Mapping[str, Mapping[str, Measured]] = {}
    generated_edit_similarity: float | None = None
    extraction_probability: Measured = None
    extraction_samples: int | None = None
    skipped_steps: int = 0
    corpus_encoding: int = 1
    training: Mapping[str, Any] = {}
    resumed: int = 0
    grown_from: list[int] = []

    @pydantic.field_validator("method_settings")
    @classmethod
    def _without_private_names(cls, settings: dict[str, Any]) -> dict[str, Any]:
        # Lightning's command line adds names such as `_class_path`, which are not settings.
        return {name: value for name, value in settings.items() if not name.startswith("_")}

    @pydantic.model_validator(mode="after")
    def _says_whether_it_diverged(self) -> "Record":
        if self.status != "interrupted" and (self.final_loss is None) != (self.status == "diverged"):
            raise ValueError(
                f"status is {self.status} and final_loss is {self.final_loss}; expected the status diverged if and "
                "only if the fit ended with a final loss that is not finite"
            )
        return self

    def after(self, smaller: "Record") -> "Record":
        """This record of a grown adapter, plus the steps, tokens and time spent on the smaller one it started from."""
        spent = ("optimizer_steps", "skipped_steps", "target_tokens_trained", "wall_seconds")
        found = {name: getattr(self, name) + getattr(smaller, name) for name in spent}
        if self.steps_to_recall is not None:
            found["steps_to_recall"] = self.steps_to_recall + smaller.optimizer_steps
        return self.model_copy(update={**found, "grown_from": [*smaller.grown_from, smaller.rank]})

    @property
    def mean_harm(self) -> float | None:
        """Mean rise of the loss on ordinary text, in nats per token; None if it was not measured."""
        mean = self.harm.get("mean", {})
        before, after = mean.get("loss_before"), mean.get("loss_after")
        return None if before is None or after is None else after - before


@runtime_checkable
class MeasuresForRecord(Protocol):
    """A callback that adds measurements to the record; `RunRecord` asks every callback that has the method."""

    def record_fields(self, trainer: "Trainer", pl_module: "LightningModule", ended: bool) -> Mapping[str, Any]:
        """Fields of `Record` measured on the adapter in its present state; called on all ranks.

        Mappings, such as `corpus_figures`, are merged over callbacks. If several callbacks give the same other field,
        the one listed last wins. A field that `Record` does not have, or of another type, is left out with a warning.

        Args:
            trainer: Trainer of the fit.
            pl_module: Module with the adapter.
            ended: Whether the fit ended by itself. If not, return only what is already known: whoever stopped it waits.
        """
        ...


def fault_of_field(name: str, value: Any) -> str | None:
    """Why a record cannot take what a callback measured as a field; None if it can."""
    field = Record.model_fields.get(name)
    if field is None:
        return "there is no such field; give numbers of your own as a mapping, under the name corpus_figures"
    try:
        pydantic.TypeAdapter(field.rebuild_annotation()).validate_python(value)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        return ": ".join([*map(str, first["loc"]), str(first["msg"])])
    return None


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically: whenever the process dies, the file is either whole or as it was before."""
    with whole_file(path) as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n")


def write_record(folder: Path, record: Record) -> Path:
    """Write `record.json` into a run's folder, atomically, and return its path."""
    path = folder / RECORD_NAME
    write_json(path, record.model_dump(mode="json"))
    return path


def read_record(path: Path) -> Record:
    """Read one `record.json`.

    Raises:
        InputError: If it cannot be read, is not JSON, does not follow the schema, or its numbers contradict each other.
    """
    try:
        content = path.read_bytes()
        record = Record.model_validate_json(content)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "file"
        raise InputError(
            f"{path}: not a record of schema version 1 to {SCHEMA_VERSION}: {where}: {first['msg']}; "
            "run it again, or leave this path out"
        ) from error
    if (problem := _twice(content) or _contradiction(record)) is not None:
        raise InputError(f"{path}: damaged, and so no evidence: {problem}; run it again, or leave this path out")
    return record


def _twice(content: bytes) -> str | None:
    """The problem if a JSON file has a key twice, since either value may be meant; None if no key is."""
    found: list[str] = []

    def keep(pairs: list[tuple[str, Any]]) -> None:
        names = [name for name, _ in pairs]
        found.extend(name for name in names if names.count(name) > 1)

    json.loads(content, object_pairs_hook=keep)
    return f"{found[0]} is in it twice" if found else None


def _contradiction(record: Record) -> str | None:
    """Why the numbers of a record cannot be right; None if they can."""
    for name in SHARES:
        share = getattr(record, name)
        # Means of float32 numbers may exceed 1 by rounding.
        if share is not None and not -ROUNDING <= share <= 1 + ROUNDING:
            return f"{name} is {share}; expected a share from 0 to 1"
    for name in ("first_failure", "wall_seconds", "optimizer_steps", "target_tokens_trained", "skipped_steps"):
        if not 0 <= getattr(record, name) < math.inf:
            return f"{name} is {getattr(record, name)}; expected a finite number, at least 0"
    initial, final, reduction = record.initial_loss, record.final_loss, record.loss_reduction
    if initial is None or final is None:
        return None if reduction is None else f"loss_reduction is {reduction} but a loss is missing"
    if reduction is None or abs(initial - final - reduction) > ROUNDING * max(1.0, abs(initial), abs(final)):
        return f"loss_reduction is {reduction}, and initial_loss - final_loss is {initial - final}"
    if (bits := record.memorized_bits) is not None and bits < 0:
        return f"memorized_bits is {bits}; expected at least 0"
    return None


def read_records(paths: str | Path | Iterable[str | Path]) -> dict[Path, Record]:
    """Read the records of many runs, by run folder and sorted by it.

    Args:
        paths: A record file, a run folder, or a folder with run folders anywhere below it; or several of these.
            Folders that a sweep has set aside (`NAME.unfinished-1`) are read only if they are given themselves.

    Raises:
        InputError: If a path does not exist or holds no record, a record is not valid, or two are in one folder.
    """
    found: dict[Path, Record] = {}
    seen: set[Path] = set()
    folders: set[Path] = set()
    for given in map(Path, [paths] if isinstance(paths, str | Path) else paths):
        if not given.exists():
            raise InputError(f"{given}: no such file or folder; expected a run's folder, or one with runs below it")
        files = [given] if given.is_file() else _records_below(given)
        if not files:
            raise InputError(f"{given}: no {RECORD_NAME} in it or below it; a run writes one when it ends")
        for file in files:
            # A run may be given twice, for example by a relative and an absolute path.
            if file.resolve() in seen:
                continue
            if file.parent.resolve() in folders:
                raise InputError(
                    f"{file}: a second record in one folder; expected one; give each run a folder of its own"
                )
            seen.add(file.resolve())
            folders.add(file.parent.resolve())
            found[file.parent] = read_record(file)
    return dict(sorted(found.items()))


def _records_below(folder: Path) -> list[Path]:
    """Record files in a folder and below it, except those that a sweep has set aside there."""
    files = sorted(file for file in files_below(folder) if file.name == RECORD_NAME)
    aside = re.compile(rf"{re.escape(SET_ASIDE)}\d+$")
    return [file for file in files if not any(map(aside.search, file.relative_to(folder).parent.parts))]
