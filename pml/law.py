"""The Parametric Memory Law: by how much a LoRA adapter of a given rank lowers the loss on a given number of tokens.

    dL(r, l) = C r^alpha l^(-beta) + b                                                     (Eq. 6)

dL is the loss reduction in nats per target token, r the LoRA rank, l the number of target tokens to memorise, summed
over the corpus. The law holds while the adapter is short of room: a run that memorised everything (`saturated`) says
nothing about the adapter's capacity and is left out of the fit.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import lmfit
import numpy as np
import numpy.typing as npt
import pydantic
from uncertainties import ufloat

from pml.errors import InputError
from pml.records import Record

__all__ = [
    "CRITICAL_LOSS",
    "LAW_NAME",
    "PARAMETERS",
    "Cell",
    "Estimate",
    "LawFit",
    "LeftOutCell",
    "Name",
    "Reason",
    "UsedCell",
    "cells_from_records",
    "fit_law",
    "read_law",
    "saturated",
    "select_records",
    "shared_setting",
]

Array = npt.NDArray[np.float64]
Name = Literal["C", "alpha", "beta", "b"]
Reason = Literal["interrupted", "diverged", "saturated"]

LAW_NAME = "law.json"
LAW_SCHEMA_VERSION: Final = 1
CRITICAL_LOSS = math.log(2)
"""Loss in nats below which a token has p > 0.5, so that greedy decoding must produce it."""

PARAMETERS: tuple[Name, ...] = ("C", "alpha", "beta", "b")

# One more than the law's four parameters, so that the residuals say something about the noise.
FEWEST_CELLS = 5
# Below this many cells the standard errors themselves are guesses: they rest on fewer than four degrees of freedom.
FEW_CELLS = 8
STRONG_CORRELATION = 0.98
LARGE_MAPE_PERCENT = 10.0
SMALL_R2 = 0.9
# Exponents measured so far are between 0.4 and 1.1; at 5, doubling the rank would multiply the reduction by 32.
STEEP_EXPONENT = 5.0
# Smallest spread of the loss reduction, in nats, that float32 losses can show.
SMALLEST_SPREAD = 1e-6
# Bounds the exponent while a start wanders, so that squares of residuals stay finite.
LARGEST_EXPONENT = 300.0
# What must be the same in all runs of one law, and what the message about it shows.
SETTING = ("backbone_hash", "block", "placement", "init", "method")


@dataclass(frozen=True)
class Cell:
    """What one run says about the law; losses in nats per target token.

    Attributes:
        rank: LoRA rank r.
        target_tokens: Length l, supervised tokens over the whole corpus.
        initial_loss: Mean target loss of the frozen model.
        final_loss: Mean target loss with the adapter.
        seed: Seed of the run.
        source: Where the numbers come from, such as the run's folder.
        finished: False for a run that was stopped from outside before its training ended.
    """

    rank: int
    target_tokens: int
    initial_loss: float
    final_loss: float
    seed: int
    source: str
    finished: bool = True

    @property
    def loss_reduction(self) -> float:
        """dL in nats per target token."""
        return self.initial_loss - self.final_loss


class _Content(pydantic.BaseModel):
    """A part of `law.json`: no unknown keys, no changes, no infinities or NaN."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Estimate(_Content):
    """A parameter's value and standard error; None where the fit has no covariance at its solution."""

    value: float
    stderr: float | None


class UsedCell(_Content):
    """A cell that the fit used; measured and predicted loss reduction in nats per target token."""

    source: str
    rank: int
    target_tokens: int
    seed: int
    measured: float
    predicted: float


class LeftOutCell(_Content):
    """A cell that the fit did not use, and why; a loss that is not finite is None."""

    source: str
    rank: int
    target_tokens: int
    seed: int
    initial_loss: float | None
    final_loss: float | None
    reason: Reason


class LawFit(_Content):
    """dL(r, l) = C r^alpha l^(-beta) + b in nats per target token (Eq. 6), fitted, with what it rests on.

    Attributes:
        schema_version: Version of this layout.
        form: The fitted form.
        parameters: `C` and `b` in nats per target token, `alpha` and `beta` without a unit. C is the law's first term
            at rank 1 and one token; its standard error is the one of ln C times C (delta method).
        correlation: Rows and columns in the order C, alpha, beta, b; None where the fit has no covariance.
        r2: Share of the variance of the used cells' loss reduction that the law explains.
        mape_percent: Mean absolute error relative to the measured loss reduction, in percent, over the used cells.
        rmse_nats: Root of the mean squared error in nats per target token, over the used cells.
        rank_range: Smallest and largest rank among the used cells.
        target_tokens_range: Smallest and largest length among the used cells.
        cells_used: How many cells the fit used.
        cells_left_out: How many it left out, by reason: `saturated` (final loss <= ln 2), `diverged` (a loss that is
            not finite, or that training did not lower), `interrupted`.
        used: The used cells, by length, rank and seed.
        left_out: The others.
        setting: What all runs have in common, so that a law can be told from another.
        warnings: In words, why the numbers above should be believed less than they look.
    """

    schema_version: Literal[1] = LAW_SCHEMA_VERSION
    form: Literal["C * rank**alpha * target_tokens**-beta + b"] = "C * rank**alpha * target_tokens**-beta + b"
    parameters: dict[Name, Estimate]
    correlation: list[list[float]] | None
    r2: float
    mape_percent: float
    rmse_nats: float
    rank_range: tuple[int, int]
    target_tokens_range: tuple[int, int]
    cells_used: int
    cells_left_out: dict[Reason, int]
    used: list[UsedCell]
    left_out: list[LeftOutCell]
    setting: dict[str, Any]
    warnings: list[str]

    @pydantic.model_validator(mode="after")
    def _parts_agree(self) -> "LawFit":
        missing = [name for name in PARAMETERS if name not in self.parameters]
        if missing:
            raise ValueError(f"parameters: expected {', '.join(PARAMETERS)}; missing {', '.join(missing)}")
        if self.cells_used != len(self.used):
            raise ValueError(f"cells_used is {self.cells_used}, but used lists {len(self.used)} cells")
        listed = dict(Counter(cell.reason for cell in self.left_out))
        if self.cells_left_out != listed:
            raise ValueError(f"cells_left_out is {self.cells_left_out}, but left_out lists {listed}")
        if self.correlation is not None and [len(row) for row in self.correlation] != [4] * 4:
            raise ValueError("correlation: expected 4 rows of 4 numbers, in the order C, alpha, beta, b")
        return self

    def predict(self, rank: npt.ArrayLike, target_tokens: npt.ArrayLike) -> Array:
        """Predicted loss reduction in nats per target token.

        Args:
            rank: LoRA ranks, any shape that broadcasts with `target_tokens`.
            target_tokens: Lengths in target tokens.

        Returns:
            An array of the broadcast shape, of no dimension for two numbers. Nothing keeps it below the frozen model's
            loss, which no run can exceed: compare the two before reading much into a large value.

        Raises:
            InputError: If a rank or a length is not positive.

        Example:
            >>> import math
            >>> from pml.law import Cell, fit_law
            >>> grid = [(r, l) for r in (1, 2, 4, 8) for l in (100, 200, 400)]
            >>> cells = [Cell(r, l, 13.0, 13.0 - 20 * r**0.5 / l**0.5, 0, f"r{r}l{l}") for r, l in grid]
            >>> round(float(fit_law(cells).predict(4, 400)), 6)
            2.0
        """
        ranks, lengths = np.asarray(rank, dtype=np.float64), np.asarray(target_tokens, dtype=np.float64)
        for name, values in (("rank", ranks), ("target_tokens", lengths)):
            if not (values > 0).all():
                raise InputError(f"{name}: expected values above 0, got {values.min():g}; give a positive number")
        c, alpha, beta, b = (self.parameters[name].value for name in PARAMETERS)
        return np.asarray(np.exp(np.log(c) + alpha * np.log(ranks) - beta * np.log(lengths)) + b)

    def equation(self, errors: bool = False) -> str:
        """The law as text, dL in nats per target token, such as `dL = 3.21 r^0.47 l^-0.43 - 3.60`.

        Args:
            errors: Put the standard error behind every number.
        """
        show = _with_error if errors else _number
        c, alpha, beta, b = (self.parameters[name] for name in PARAMETERS)
        flipped = Estimate(value=-beta.value, stderr=beta.stderr)
        size = Estimate(value=abs(b.value), stderr=b.stderr)
        return f"dL = {show(c)} r^{show(alpha)} l^{show(flipped)} {'-' if b.value < 0 else '+'} {show(size)}"

    def to_json(self) -> dict[str, Any]:
        """The content of `law.json`: numbers, strings, lists and dictionaries only."""
        return self.model_dump(mode="json")

    @classmethod
    def from_json(cls, content: Mapping[str, Any] | str | bytes) -> "LawFit":
        """Read what `to_json` made, as a mapping or as the text of the file.

        Raises:
            InputError: If it is not JSON or not a law of this schema version.
        """
        try:
            text = content if isinstance(content, str | bytes) else json.dumps(content)
            return cls.model_validate_json(text)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "law"
            raise InputError(
                f"not a law of schema version {LAW_SCHEMA_VERSION}: {where}: {first['msg']}; fit it again with pml law"
            ) from error


def read_law(path: str | Path) -> LawFit:
    """Read a `law.json`.

    Raises:
        InputError: If it cannot be read, is not JSON, or does not follow the schema.
    """
    try:
        return LawFit.from_json(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected a {LAW_NAME} from pml law") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def select_records(records: Mapping[Path, Record], where: Mapping[str, Any] | None = None) -> dict[Path, Record]:
    """The records whose fields have the values that `where` names; all of them without `where`.

    Args:
        records: Records by the folder of their run.
        where: Fields of a record and the value to keep. A list of one, such as `block`, may be given as its element.

    Raises:
        InputError: If a field does not exist, or no record is left.
    """
    kept = dict(records)
    for name, value in (where or {}).items():
        if name not in Record.model_fields:
            raise InputError(f"where: a record has no field {name!r}; its fields are {', '.join(Record.model_fields)}")
        before = kept
        kept = {path: record for path, record in before.items() if getattr(record, name) in (value, [value])}
        if before and not kept:
            present = _counted(str(getattr(record, name)) for record in before.values())
            raise InputError(f"where: no record has {name} {value!r}; there are {present}; choose one of these")
    return kept


def shared_setting(records: Mapping[Path, Record]) -> dict[str, Any]:
    """What the runs of one law have in common: backbone, block, placement, initialisation and method.

    `corpus` lists the names of all corpora, which may differ: files of several lengths can belong to one law.

    Raises:
        InputError: If there is no record, or the runs differ in one of these, since a law belongs to one of each.
    """
    if not records:
        raise InputError("no record: expected the records of at least 5 runs; give folders with finished runs")
    for name in SETTING:
        values = [
            f"{record.backbone_hash} of {record.backbone}" if name == "backbone_hash" else str(getattr(record, name))
            for record in records.values()
        ]
        if len({str(getattr(record, name)) for record in records.values()}) > 1:
            raise InputError(
                f"records of different {name}: {_counted(values)}; a law belongs to one of them: "
                f"keep one (--where.{name} VALUE), or give only its runs"
            )
    first = next(iter(records.values()))
    shared = {name: getattr(first, name) for name in ("backbone", *SETTING)}
    return shared | {"corpus": sorted({record.corpus for record in records.values()})}


def cells_from_records(records: Mapping[Path, Record], where: Mapping[str, Any] | None = None) -> list[Cell]:
    """One cell per run, sorted by length, rank and seed; losses in nats per target token.

    Args:
        records: Records by the folder of their run, as `read_records` gives them.
        where: Which to keep, see `select_records`.

    Raises:
        InputError: If no record is left, or they do not belong to one law (see `shared_setting`).
    """
    kept = select_records(records, where)
    shared_setting(kept)
    cells = [
        Cell(
            rank=record.rank,
            target_tokens=record.target_tokens,
            initial_loss=record.initial_loss,
            final_loss=record.final_loss,
            seed=record.seed,
            source=path.as_posix(),
            finished=record.status == "finished",
        )
        for path, record in kept.items()
    ]
    return _sorted(cells)


def saturated(cell: Cell) -> bool:
    """Whether the final loss is at most ln 2: on average p >= 0.5, so the text, not the adapter, set the limit."""
    return cell.final_loss <= CRITICAL_LOSS


def fit_law(cells: Iterable[Cell], setting: Mapping[str, Any] | None = None) -> LawFit:
    """Fit dL(r, l) = C r^alpha l^(-beta) + b in nats per target token (Eq. 6) by least squares.

    Saturated, diverged and interrupted cells are left out and counted. r and l are divided by their geometric means,
    and ln C takes the place of C: that keeps C positive without a bound, at which standard errors would mean nothing.
    Starts come from a grid of (alpha, beta), where the best C and b are the solution of a linear problem. Standard
    errors come from the covariance at the solution, scaled by the residual variance, and go back to C by the delta
    method.

    Args:
        cells: What the runs measured.
        setting: What the runs have in common (see `shared_setting`); kept with the fit.

    Raises:
        InputError: If the cells cannot determine a law: too few that are not saturated, fewer than two ranks or
            lengths, ranks and lengths that rise together, or a loss reduction that does not vary.
    """
    used, left_out = [], []
    for cell in _sorted(cells):
        reason = _reason_to_leave_out(cell)
        if reason is None:
            used.append(cell)
        else:
            left_out.append((cell, reason))
    counts = Counter(reason for _, reason in left_out)
    _check_determined(used, counts)

    log_r = np.log(np.array([cell.rank for cell in used], dtype=np.float64))
    log_l = np.log(np.array([cell.target_tokens for cell in used], dtype=np.float64))
    measured = np.array([cell.loss_reduction for cell in used], dtype=np.float64)
    # Dividing by the geometric mean is subtracting the mean logarithm.
    shift_r, shift_l = float(log_r.mean()), float(log_l.mean())
    solution = _best_of_starts(log_r - shift_r, log_l - shift_l, measured)
    endless = _runs_away(solution.squares, log_r, log_l, measured)

    # C multiplies r^alpha l^-beta, so in logarithms undoing the scale is linear in the parameters.
    jacobian = np.eye(4)
    jacobian[0, 1:3] = -shift_r, shift_l
    log_c, alpha, beta, b = (jacobian @ solution.values).tolist()
    c = math.exp(np.clip(log_c, -LARGEST_EXPONENT, LARGEST_EXPONENT))
    stderrs: list[float | None] = [None] * 4
    correlation = None
    if solution.covariance is not None and not endless:
        covariance = jacobian @ solution.covariance @ jacobian.T
        spread = np.sqrt(np.diag(covariance))
        correlation = np.clip(covariance / np.outer(spread, spread), -1.0, 1.0).tolist()
        noise = math.sqrt(solution.squares / (len(used) - len(PARAMETERS)))
        stderrs = (noise * spread * np.array([c, 1.0, 1.0, 1.0])).tolist()
    values = (c, alpha, beta, b)
    estimates = {name: Estimate(value=v, stderr=s) for name, v, s in zip(PARAMETERS, values, stderrs, strict=True)}

    predicted = _law(jacobian @ solution.values, log_r, log_l)
    residual = measured - predicted
    ranks, lengths = [cell.rank for cell in used], [cell.target_tokens for cell in used]
    fit = LawFit(
        parameters=estimates,
        correlation=correlation,
        r2=1.0 - float(residual @ residual) / float(np.sum((measured - measured.mean()) ** 2)),
        mape_percent=100.0 * float(np.mean(np.abs(residual) / np.abs(measured))),
        rmse_nats=math.sqrt(float(np.mean(residual**2))),
        rank_range=(min(ranks), max(ranks)),
        target_tokens_range=(min(lengths), max(lengths)),
        cells_used=len(used),
        cells_left_out=dict(counts),
        used=[
            UsedCell(
                source=cell.source,
                rank=cell.rank,
                target_tokens=cell.target_tokens,
                seed=cell.seed,
                measured=cell.loss_reduction,
                predicted=float(value),
            )
            for cell, value in zip(used, predicted, strict=True)
        ],
        left_out=[
            LeftOutCell(
                source=cell.source,
                rank=cell.rank,
                target_tokens=cell.target_tokens,
                seed=cell.seed,
                initial_loss=_finite(cell.initial_loss),
                final_loss=_finite(cell.final_loss),
                reason=reason,
            )
            for cell, reason in left_out
        ],
        setting=dict(setting or {}),
        warnings=[],
    )
    return fit.model_copy(update={"warnings": _warnings(fit, endless=endless, converged=solution.converged)})


@dataclass(frozen=True)
class _Solution:
    """Where the least squares ended: (ln C, alpha, beta, b), their covariance for unit noise, and the squares."""

    values: Array
    covariance: Array | None
    squares: float
    converged: bool


def _law(values: Array | Sequence[float], log_r: Array, log_l: Array) -> Array:
    """Eq. 6 from (ln C, alpha, beta, b) and the logarithms of r and l."""
    log_c, alpha, beta, b = values
    return np.exp(np.clip(log_c + alpha * log_r - beta * log_l, -LARGEST_EXPONENT, LARGEST_EXPONENT)) + b


def _residual(parameters: lmfit.Parameters, log_r: Array, log_l: Array, measured: Array) -> Array:
    return _law(tuple(parameters.valuesdict().values()), log_r, log_l) - measured


def _jacobian(parameters: lmfit.Parameters, log_r: Array, log_l: Array, measured: Array) -> Array:
    values = tuple(parameters.valuesdict().values())
    power = _law((*values[:3], 0.0), log_r, log_l)
    return np.stack([power, power * log_r, -power * log_l, np.ones_like(measured)], axis=1)


def _best_of_starts(log_r: Array, log_l: Array, measured: Array) -> _Solution:
    """The least-squares solution from several starts, for centred logarithms of r and l."""
    best = None
    for start in _starts(log_r, log_l, measured):
        parameters = lmfit.Parameters()
        for name, value in zip(("log_c", "alpha", "beta", "b"), start, strict=True):
            parameters.add(name, value=value)
        # The covariance stays unscaled so that correlations exist even where the residuals are exactly zero.
        result = lmfit.minimize(
            _residual,
            parameters,
            args=(log_r, log_l, measured),
            method="leastsq",
            scale_covar=False,
            max_nfev=1000,
            Dfun=_jacobian,
            ftol=1e-13,
            xtol=1e-13,
            gtol=1e-15,
        )
        if best is None or result.chisqr < best.chisqr:
            best = result
    if best is None:
        raise InputError("loss reduction depends on neither rank nor length; check what the runs trained on")
    values = np.array(list(best.params.valuesdict().values()))
    # lmfit puts a floor of 1e-250 under chisqr; the sum itself may be zero.
    squares = float(np.sum((_law(values, log_r, log_l) - measured) ** 2))
    covariance = getattr(best, "covar", None)
    usable = covariance is not None and bool(np.isfinite(covariance).all() and (np.diag(covariance) > 0).all())
    # MINPACK's codes 6 to 8 say that no further progress is possible in float64, which is where an exact fit ends.
    converged = bool(best.success) or getattr(best, "ier", 0) in (6, 7, 8)
    return _Solution(values, covariance if usable else None, squares, converged)


def _starts(log_r: Array, log_l: Array, measured: Array) -> list[tuple[float, float, float, float]]:
    """Starts (ln C, alpha, beta, b): a grid of exponents, with C and b solved for, those with C > 0, the best first."""
    sizes = np.geomspace(0.03, 3.0, 12)
    steps = np.concatenate([-sizes[::-1], sizes])
    alphas, betas = (grid.ravel() for grid in np.meshgrid(steps, steps, indexing="ij"))
    powers = np.exp(alphas[:, None] * log_r - betas[:, None] * log_l)
    centred = powers - powers.mean(axis=1, keepdims=True)
    slopes = centred @ measured / np.sum(centred**2, axis=1)
    offsets = measured.mean() - slopes * powers.mean(axis=1)
    squares = np.sum((slopes[:, None] * powers + offsets[:, None] - measured) ** 2, axis=1)
    order = [int(i) for i in np.argsort(squares) if slopes[i] > 0]
    # The best of each pair of signs too: between them the squares have ridges that a descent does not cross.
    quadrants: dict[tuple[bool, bool], int] = {}
    for i in order:
        quadrants.setdefault((bool(alphas[i] > 0), bool(betas[i] > 0)), i)
    chosen = dict.fromkeys([*order[:3], *quadrants.values()])
    return [(math.log(slopes[i]), float(alphas[i]), float(betas[i]), float(offsets[i])) for i in chosen]


def _runs_away(squares: float, log_r: Array, log_l: Array, measured: Array) -> bool:
    """Whether dL = p + q ln r - s ln l, the limit of the law as alpha, beta -> 0, describes the cells as well.

    Then C grows and b falls without end, and the place where the search stopped means nothing.
    """
    columns = np.stack([np.ones_like(log_r), log_r, log_l], axis=1)
    residual = measured - columns @ np.linalg.lstsq(columns, measured, rcond=None)[0]
    return float(residual @ residual) <= squares * (1.0 + 1e-6)


def _reason_to_leave_out(cell: Cell) -> Reason | None:
    """Why a cell says nothing about the law, or None.

    A run that was cut short did not reach what its rank allows; one whose loss did not fall did not train at all, and
    its loss is about the learning rate. Neither belongs to the law, and neither is near saturation.
    """
    if not cell.finished:
        return "interrupted"
    if not (math.isfinite(cell.initial_loss) and math.isfinite(cell.final_loss)) or cell.loss_reduction <= 0:
        return "diverged"
    return "saturated" if saturated(cell) else None


def _check_determined(used: Sequence[Cell], left_out: Mapping[Reason, int]) -> None:
    """Raise an InputError unless the cells can determine four parameters."""
    total = len(used) + sum(left_out.values())
    if total == 0:
        raise InputError("no cell: expected at least 5 runs that are not saturated; give folders with finished runs")
    others = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "none left out"
    if len(used) < FEWEST_CELLS:
        raise InputError(
            f"{len(used)} of {total} cells can be used ({others}; saturated: final loss <= ln 2): expected at least "
            f"{FEWEST_CELLS}; add runs with longer targets or lower ranks"
        )
    ranks, lengths = sorted({cell.rank for cell in used}), sorted({cell.target_tokens for cell in used})
    grid = {(cell.rank, cell.target_tokens) for cell in used}
    context = f"among the {len(used)} of {total} cells that can be used ({others})"
    if len(ranks) < 2:
        raise InputError(f"only rank {ranks[0]} {context}: expected at least 2 ranks; add runs with other ranks")
    if len(lengths) < 2:
        raise InputError(
            f"only length {lengths[0]} {context}: expected at least 2 lengths; add runs with other target lengths"
        )
    logs = np.array([[1.0, math.log(rank), math.log(length)] for rank, length in grid])
    if len(grid) < len(PARAMETERS) or np.linalg.matrix_rank(logs, tol=1e-9 * len(grid)) < 3:
        pairs = ", ".join(f"({rank}, {length})" for rank, length in sorted(grid))
        raise InputError(
            f"the (rank, length) pairs {pairs} {context} cannot tell the effect of rank from that of length: expected "
            "at least 4 different pairs, not all on one line; add runs that change the rank at the same length"
        )
    reductions = [cell.loss_reduction for cell in used]
    if max(reductions) - min(reductions) < SMALLEST_SPREAD:
        raise InputError(
            f"the loss reduction is {reductions[0]:.6g} nats in all {len(used)} cells: expected it to vary with rank "
            "and length; check that the runs really differ"
        )


def _warnings(fit: LawFit, *, endless: bool, converged: bool) -> list[str]:
    """Why the fit should be believed less than its R2 suggests, in words."""
    found = []
    if endless:
        found.append(
            "C and b are not determined: dL = p + q ln r - s ln l, the limit of the law for alpha and beta near 0, "
            "describes the cells as well; add smaller ranks and longer targets before reading the parameters"
        )
    elif not converged or fit.correlation is None:
        found.append("the fit did not settle on one solution, so there are no trustworthy standard errors; add cells")
    if fit.cells_used < FEW_CELLS:
        found.append(
            f"only {fit.cells_used} cells for 4 parameters: the standard errors are themselves uncertain; "
            f"{FEW_CELLS} or more are better"
        )
    if fit.correlation is not None:
        with_b = dict(zip(PARAMETERS[:3], (row[3] for row in fit.correlation), strict=False))
        strong = [f"{name} {value:+.3f}" for name, value in with_b.items() if abs(value) > STRONG_CORRELATION]
        if strong:
            found.append(
                f"b trades off against other parameters (correlation with {', '.join(strong)}): other values fit "
                "almost as well, so trust predictions inside the measured range more than the parameters"
            )
    for name in PARAMETERS:
        value, stderr = fit.parameters[name].value, fit.parameters[name].stderr
        if stderr is not None and stderr > abs(value):
            found.append(
                f"{name} is not determined: its standard error ({stderr:.2g}) is larger than its value ({value:.2g})"
            )
    meanings: dict[Name, str] = {"alpha": "falls as the rank rises", "beta": "rises with the length"}
    for name, meaning in meanings.items():
        if fit.parameters[name].value <= 0 and not endless:
            found.append(
                f"{name} is not positive: the fitted loss reduction {meaning}, which the law does not mean; "
                "the larger cells may not have trained long enough"
            )
    for name in meanings:
        if abs(fit.parameters[name].value) > STEEP_EXPONENT:
            found.append(
                f"{name} is {fit.parameters[name].value:.3g}: the loss reduction jumps between two ranks or lengths "
                "rather than following a power; look at those runs"
            )
    ranks, lengths = {cell.rank for cell in fit.used}, {cell.target_tokens for cell in fit.used}
    for number, noun in ((len(ranks), "ranks"), (len(lengths), "lengths")):
        if number == 2:
            found.append(f"only 2 {noun}: how the law bends between them cannot be checked")
    if fit.r2 < SMALL_R2:
        found.append(
            f"the law explains only part of how the loss reduction varies (R2 {fit.r2:.2f}): it may not hold here, or "
            "the runs differ in more than rank and length"
        )
    if fit.mape_percent > LARGE_MAPE_PERCENT:
        found.append(
            f"the law misses the measured loss reduction by {fit.mape_percent:.1f} % on average: it may not hold here, "
            "or some runs had not converged"
        )
    corpora = fit.setting.get("corpus", [])
    if len(corpora) > 1:
        found.append(
            f"the runs are of different corpora ({', '.join(corpora)}): a law belongs to one kind of text, "
            "keep one of them (--where.corpus NAME) unless they are"
        )
    return found


def _sorted(cells: Iterable[Cell]) -> list[Cell]:
    return sorted(cells, key=lambda cell: (cell.target_tokens, cell.rank, cell.seed, cell.source))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _counted(values: Iterable[str]) -> str:
    """Values with how often they occur, such as `memft (8 runs), sft (1 run)`."""
    return ", ".join(
        f"{value} ({count} run{'s' if count > 1 else ''})" for value, count in sorted(Counter(values).items())
    )


def _number(estimate: Estimate) -> str:
    """Three significant digits, without an exponent where that is readable."""
    # Rounded first, so that 0.9996 counts as the 1.00 that it becomes.
    value = float(f"{estimate.value:.3g}")
    if value == 0 or not 1e-5 <= abs(value) < 1e5:
        return f"{value:.2e}" if value else "0"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def _with_error(estimate: Estimate) -> str:
    """Value and standard error in brackets, both to two digits of the error where that is not too many."""
    if estimate.stderr is None:
        return f"({_number(estimate)} ± ?)"
    if estimate.stderr < 1e-4 * abs(estimate.value):
        return f"({_number(estimate)} ± {estimate.stderr:.1e})"
    shown = f"{ufloat(estimate.value, estimate.stderr):.2u}".replace("+/-", " ± ")
    return shown if shown.startswith("(") else f"({shown})"
