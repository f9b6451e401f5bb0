"""Measurements from any source, read from a CSV file with one run per row."""

import csv
from pathlib import Path
from typing import Annotated, Any

import pydantic

from pml.errors import InputError
from pml.law.observations import Observation

__all__ = ["read_csv"]

Count = Annotated[int, pydantic.Field(ge=1)]


class _Row(pydantic.BaseModel):
    """One row: the columns with their types and ranges."""

    model_config = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)

    rank: Count
    target_tokens: Count
    initial_loss: float = pydantic.Field(gt=0)
    final_loss: float | None = pydantic.Field(default=None, ge=0)
    loss_reduction: float | None = None
    effective_parameters: Count | None = None
    entropy_bits: float | None = pydantic.Field(default=None, gt=0)
    seed: int = 0
    text: str | None = None


# A loss reduction may exceed the initial loss by this share of the initial loss.
ROUNDING = 1e-6
REQUIRED = ("rank", "target_tokens", "initial_loss")


def read_csv(path: str | Path) -> list[Observation]:
    """Read the runs of a CSV file.

    Lines that begin with # are comments. Required columns: rank, target_tokens, initial_loss, and final_loss or
    loss_reduction. Optional columns: effective_parameters, entropy_bits, seed, and text, which identifies the text.
    Losses are in nats per target token. Optional values may be empty. A row needs one of final_loss and
    loss_reduction; if it has both, final_loss is used.

    Raises:
        InputError: If the file cannot be read or a row is invalid. The message names the file, line and column.
    """
    try:
        # Not `splitlines`, which also splits at characters that a text's name may have.
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected a CSV file in UTF-8") from error
    numbered = [(i, line) for i, line in enumerate(lines, start=1) if line.strip() and not line.startswith("#")]
    if len(numbered) < 2:
        raise InputError(f"{path}: no rows; expected a header and one run per line, with {', '.join(REQUIRED)}")
    # Parsed line by line, so that an unclosed quote does not swallow the lines after it.
    try:
        table = [next(csv.reader([line])) for _, line in numbered]
    except csv.Error as error:
        raise InputError(f"{path}: not CSV ({error}); expected one run per line") from error
    header = [name.strip() for name in table[0]]
    _check_header(path, numbered[0][0], header)
    return [
        _observation(path, number, header, values) for (number, _), values in zip(numbered[1:], table[1:], strict=True)
    ]


def _check_header(path: str | Path, line: int, header: list[str]) -> None:
    known = list(_Row.model_fields)
    missing = [name for name in REQUIRED if name not in header]
    if "final_loss" not in header and "loss_reduction" not in header:
        missing.append("final_loss or loss_reduction")
    wrong = [name for name in header if name not in known]
    if missing or wrong or len(set(header)) < len(header):
        said = f"no column {', '.join(missing)}" if missing else f"column {wrong[0]!r}" if wrong else "a column twice"
        raise InputError(f"{path}, line {line}: {said}; expected {', '.join(known)}; got {', '.join(header)}")


def _observation(path: str | Path, line: int, header: list[str], values: list[str]) -> Observation:
    where = f"{path}, line {line}"
    if len(values) != len(header):
        raise InputError(f"{where}: {len(values)} values for {len(header)} columns; write one value per column")
    given: dict[str, Any] = {name: value.strip() for name, value in zip(header, values, strict=True) if value.strip()}
    try:
        row = _Row.model_validate(given)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        column = first["loc"][0]
        got = f"got {given[str(column)]!r}" if column in given else "got nothing"
        raise InputError(f"{where}, column {column}: {first['msg'].lower()}, {got}; correct the value") from error
    final = row.final_loss
    if row.loss_reduction is not None:
        follows = row.initial_loss - row.loss_reduction
        if follows < -ROUNDING * row.initial_loss:
            raise InputError(
                f"{where}, column loss_reduction: expected at most initial_loss = {row.initial_loss:g}, got "
                f"{row.loss_reduction:g}; correct one of the two"
            )
        if final is not None and abs(follows - final) > 0.01 * row.initial_loss:
            raise InputError(
                f"{where}, column loss_reduction: expected initial_loss - final_loss = {row.initial_loss - final:.4g}, "
                f"got {row.loss_reduction:g}; leave one of the two empty"
            )
        final = max(follows, 0.0) if final is None else final
    if final is None:
        raise InputError(f"{where}, column final_loss: expected a number here or in loss_reduction, got nothing")
    others = row.model_dump(exclude={"final_loss", "loss_reduction"})
    return Observation(**others, final_loss=final, source=f"{path}:{line}")
