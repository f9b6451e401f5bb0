"""What a fit leaves: every form of the law with what it rests on, as objects and as `law.json`."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import pydantic
from scipy.stats import norm, qmc
from uncertainties import ufloat

from pml.calibration import RecallModel
from pml.errors import InputError
from pml.law.cells import Cell, LeftOutCell, saturated
from pml.law.forms import FORMS, SHARPEST_KNEE, Array, CapacityName, FormName, Points, reduction, sensitivity
from pml.law.texts import OTHER_KIND, Texts, texts_of
from pml.law.uncertainty import (
    GroupedBy,
    bootstrap,
    bootstrap_groups,
    data_of,
    expansion,
    fitted_cells,
    groups_of,
    scatter,
)

__all__ = [
    "FACTORS",
    "LAW_NAME",
    "Estimate",
    "Factor",
    "FormFit",
    "HeldOut",
    "LawCell",
    "LawFit",
    "Misfit",
    "Prediction",
    "RunDraws",
    "factors_of",
    "percentiles",
    "read_law",
]

LAW_NAME = "law.json"
LAW_SCHEMA_VERSION: Final = 4
LOGARITHMIC = ("C", "kappa", "knee")
Factor = Literal["rank", "effective_parameters", "target_tokens"]
FACTORS: Final[dict[Factor, str]] = {
    "rank": "rank",
    "effective_parameters": "adapter size",
    "target_tokens": "length",
}
"""What cells differ in: fields of a cell, with what people call them. A law counts one of the first two."""
# Noise of predictions for a new run; any fixed seed makes the same law say the same thing twice.
NOISE_SEED, SHARE_SEED, LINE_SEED = 1, 2, 3


class _Content(pydantic.BaseModel):
    """A part of `law.json`: no unknown keys, no changes, no infinities or NaN."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Estimate(_Content):
    """A parameter and how far it can be trusted; None where there is no such thing at the solution.

    Attributes:
        value: Its value.
        stderr: Standard error, from the covariance at the solution.
        standard: 95 % interval from the standard error and Student's t, of the logarithm where that was fitted.
        profile: 95 % interval from the profile likelihood.
        bootstrap: 95 % interval from the bootstrap over cells.
    """

    value: float
    stderr: float | None = None
    standard: tuple[float, float] | None = None
    profile: tuple[float, float] | None = None
    bootstrap: tuple[float, float] | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval to quote: the bootstrap's, as it allows for noise that grows with dL, or the profile's."""
        return self.bootstrap or self.profile


class HeldOut(_Content):
    """How well a form foretells cells that it was not fitted to: all of one rank, or of one length.

    Attributes:
        factor: What was held out by.
        value: The rank, number of parameters or length that was held out.
        extrapolates: Whether it was the largest with unsaturated cells. Saturated cells beyond it are held out too.
        cells: Unsaturated cells held out.
        mape_percent: Mean error of their loss reduction, in percent; None where the others do not determine the form.
    """

    factor: Factor
    value: int
    extrapolates: bool
    cells: int
    mape_percent: float | None


class Misfit(_Content):
    """A rank or length at which a form is off in one direction by more than its noise explains.

    Attributes:
        factor: Rank, number of parameters or length.
        value: Which.
        cells: Unsaturated cells there.
        excess_percent: Measured over predicted loss reduction - 1, mean over these cells, in percent; what texts differ
            by is taken off.
    """

    factor: Factor
    value: int
    cells: int
    excess_percent: float


class FormFit(_Content):
    """One form of the law, fitted.

    Attributes:
        form: Which.
        parameters: By name. `C` and `b` are in nats per target token, `kappa` in bits per effective parameter, the
            others without a unit. C is the power at size 1 and one token.
        at_bound: Parameters that ended at the end of their range and were held there: a knee of 32 is the plain
            minimum. They have no interval and are not counted as fitted.
        correlation: Rows and columns in the order of `parameters` without those in `at_bound`, of logarithms for C,
            kappa and knee; None where the fit has no covariance.
        determined: False where a logarithm describes the cells as well, so that C and b have no end.
        converged: Whether the search ended at a minimum.
        cells_used: How many cells it was fitted to: the unsaturated ones, and the saturated too where it is bounded.
        grouped_by: What cells share errors by: the seeds of one size what the form has wrong there, the ranks on one
            text what is peculiar to it; the one that leaves the form less certain.
        degrees_of_freedom: Of the noise: unsaturated sizes, a rank and a length each, or texts, minus fitted
            parameters. Saturated cells say nothing about the noise.
        noise_nats: Standard deviation of a run around the law, in nats per target token, far below the ceiling.
        noise_beyond_text_nats: What is left of it once a text's share in it is taken off.
        text_share: Of a nat that the frozen model's loss on a text lies above what is usual at its length, how much an
            adapter takes off too, far below the ceiling (see `pml.law.texts`), and its standard error.
        noise_at_ceiling_nats: The same at the ceiling, from the saturated cells that no longer feel their size (all
            saturated ones where there is none such); None where none is saturated.
        noise_at_knee_nats: What runs scatter by beyond these half-way between power and ceiling, where the form is
            least sure. Where a share f of a run's luck gets through, the variance is 4 f (1 - f) times its square.
        r2: Share of the variance of the used cells' loss reduction that it explains.
        r2_all: The same over all cells, whether it was fitted to them or not, so that forms can be compared: what an
            unbounded form says of saturated ones is cut at the frozen model's loss.
        mape_percent: Mean absolute error relative to the measured loss reduction, in percent, over the used cells.
        rmse_nats: Root of the mean squared error in nats per target token, over the used cells.
        aicc: Akaike's criterion, corrected for few sizes, over the means of the unsaturated sizes, which every form
            describes. The smaller the better; None with too few sizes. A bounded form had to describe the saturated
            ones as well, which can only raise it.
        held_out: By rank and by length, how well the other cells foretell it.
        misfits: Where it is systematically off.
        predicted: Loss reduction in nats per target token for each of the law's cells.
    """

    form: FormName
    parameters: dict[str, Estimate]
    at_bound: list[str]
    correlation: list[list[float]] | None
    determined: bool
    converged: bool
    cells_used: int
    grouped_by: GroupedBy
    degrees_of_freedom: int
    noise_nats: float
    noise_beyond_text_nats: float
    text_share: tuple[float, float]
    noise_at_ceiling_nats: float | None
    noise_at_knee_nats: float
    r2: float
    r2_all: float
    mape_percent: float
    rmse_nats: float
    aicc: float | None
    held_out: list[HeldOut]
    misfits: list[Misfit]
    predicted: list[float]

    @pydantic.model_validator(mode="after")
    def _parts_agree(self) -> "FormFit":
        expected = FORMS[self.form].parameters
        if tuple(self.parameters) != expected:
            raise ValueError(
                f"{self.form}: expected the parameters {', '.join(expected)}; {', '.join(self.parameters)}"
            )
        free = len(self.free)
        if self.correlation is not None and [len(row) for row in self.correlation] != [free] * free:
            raise ValueError(f"{self.form}: correlation: expected {free} rows of {free} numbers")
        return self

    @property
    def theta(self) -> list[float]:
        """The parameters as `pml.law.forms` takes them."""
        return [math.log(e.value) if name in LOGARITHMIC else e.value for name, e in self.parameters.items()]

    @property
    def free(self) -> list[str]:
        """Names of the fitted parameters, those held at a bound left out."""
        return [name for name in self.parameters if name not in self.at_bound]

    def largest(self, factor: Factor) -> HeldOut | None:
        """The largest rank or length, foretold from the smaller ones; None where there are fewer than three."""
        return next((held for held in self.held_out if held.factor == factor and held.extrapolates), None)

    @property
    def extrapolation_percent(self) -> float | None:
        """Mean error in percent of the cells of the largest rank and length, foretold; None if neither could be."""
        return _mean_error(held for held in self.held_out if held.extrapolates)

    @property
    def interpolation_percent(self) -> float | None:
        """Mean error in percent of the cells of all other ranks and lengths, each foretold from the rest."""
        return _mean_error(held for held in self.held_out if not held.extrapolates)

    def equation(self, errors: bool = False, capacity: CapacityName = "rank") -> str:
        """The form as text, such as `dL = 3.21 r^0.47 l^-0.43 - 3.60`, or `dL = min_2.1(135 r^0.75 l^-0.60, L0)`.

        The number behind `min` is the knee of the smooth minimum (see `pml.law.forms`).

        Args:
            errors: Put the standard error behind every number.
            capacity: What the law counts: the size is `r`, or `P`.
        """
        form, show = FORMS[self.form], _with_error if errors else _number
        ceiling, least = "L0", self._minimum
        if form.proportional:
            return f"stored bits = {least}({show(self.parameters['kappa'])} P, H)"
        c, alpha, beta = (self.parameters[name] for name in ("C", "alpha", "beta"))
        flipped = Estimate(value=-beta.value, stderr=beta.stderr)
        power = f"{show(c)} {'r' if capacity == 'rank' else 'P'}^{show(alpha)} l^{show(flipped)}"
        if form.offset == "entropy":
            return f"dL = L0 - H/l + {least}({power}, H/l)"
        if form.offset == "none":
            return f"dL = {least}({power}, {ceiling})" if form.bounded else f"dL = {power}"
        b = self.parameters["b"]
        size = show(Estimate(value=abs(b.value), stderr=b.stderr))
        sign, other = ("-", "+") if b.value < 0 else ("+", "-")
        return (
            f"dL = {least}({power}, {ceiling} {other} {size}) {sign} {size}"
            if form.bounded
            else f"dL = {power} {sign} {size}"
        )

    @property
    def _minimum(self) -> str:
        """The smooth minimum with its knee, such as `min_2.1`; at the sharpest knee it is the plain one."""
        knee = self.parameters.get("knee")
        return "min" if knee is None or round(knee.value) >= SHARPEST_KNEE else f"min_{knee.value:.2g}"


class LawCell(_Content):
    """A cell with what the chosen form says of it; loss reductions in nats per target token."""

    source: str
    rank: int
    target_tokens: int
    seed: int
    measured: float
    predicted: float
    saturated: bool


class Prediction(_Content):
    """Loss reduction of a run, in nats per target token.

    Attributes:
        loss_reduction: The law's value.
        confidence: 95 % interval of that value: of the mean of many runs.
        new_run: 95 % interval of a single new run, whose own noise and text come on top.
    """

    loss_reduction: float
    confidence: tuple[float, float]
    new_run: tuple[float, float]


@dataclass(frozen=True)
class RunDraws:
    """Single new runs as a law foretells them, `(laws, runs, ...)`, in nats per target token.

    Attributes:
        initial_loss: The frozen model's, of each run's text.
        loss_reduction: No more than that.
    """

    initial_loss: Array
    loss_reduction: Array

    @property
    def final_loss(self) -> Array:
        """What is left."""
        return self.initial_loss - self.loss_reduction


class LawFit(_Content):
    """The law fitted to runs in every form that they determine.

    Attributes:
        schema_version: Version of this layout.
        form: The chosen form.
        chosen_because: Why this one, in words.
        capacity: What the law counts as the adapter's size: the rank or the effective parameters.
        parameters_per_rank: Effective parameters of rank 1; None where they are unknown or differ between runs.
        fits: Every form that the cells determine, the best first.
        cells: What was measured, by length, rank and seed: the saturated cells too.
        left_out: Cells that no form can use.
        recall: From loss to recall; None where no run left its per-token results.
        setting: What all runs have in common, so that a law can be told from another.
        warnings: In words, why the chosen form should be believed less than its numbers look.
    """

    schema_version: Literal[4] = LAW_SCHEMA_VERSION
    form: FormName
    chosen_because: str
    capacity: CapacityName
    parameters_per_rank: int | None
    fits: list[FormFit]
    cells: list[Cell]
    left_out: list[LeftOutCell]
    recall: RecallModel | None
    setting: dict[str, Any]
    warnings: list[str]
    _text_loss: float | None = pydantic.PrivateAttr(default=None)

    @pydantic.model_validator(mode="after")
    def _parts_agree(self) -> "LawFit":
        if self.form not in [fit.form for fit in self.fits]:
            raise ValueError(f"form is {self.form}, but fits has {', '.join(fit.form for fit in self.fits) or 'none'}")
        for fit in self.fits:
            if len(fit.predicted) != len(self.cells):
                raise ValueError(f"{fit.form}: {len(fit.predicted)} predictions for {len(self.cells)} cells")
        return self

    @property
    def best(self) -> FormFit:
        """The chosen form's fit."""
        return self.fit_of(self.form)

    def fit_of(self, form: FormName) -> FormFit:
        """The fit of a form.

        Raises:
            InputError: If the cells do not determine it.
        """
        for fit in self.fits:
            if fit.form == form:
                return fit
        names = ", ".join(fit.form for fit in self.fits)
        raise InputError(
            f"form {form} was not fitted; expected one of {names}; it may need more cells or the corpus' entropy"
        )

    @property
    def parameters(self) -> dict[str, Estimate]:
        """Parameters of the chosen form."""
        return self.best.parameters

    @property
    def factors(self) -> tuple[Factor, Factor]:
        """What the law's cells differ in: what it counts as the adapter's size, and the length."""
        return factors_of(self.capacity)

    @property
    def knows_ranks(self) -> bool:
        """Whether a rank says something: False where the law counts parameters, and ranks differ in how many."""
        return self.capacity == "rank" or self.parameters_per_rank is not None

    @property
    def kappa(self) -> Estimate | None:
        """Bits per effective parameter, of the law of one constant; None where the corpus has no known entropy."""
        return next((fit.parameters["kappa"] for fit in self.fits if fit.form == "stored_bits"), None)

    @property
    def r2(self) -> float:
        """Of the chosen form."""
        return self.best.r2

    @property
    def mape_percent(self) -> float:
        """Of the chosen form."""
        return self.best.mape_percent

    @property
    def rmse_nats(self) -> float:
        """Of the chosen form."""
        return self.best.rmse_nats

    @property
    def used(self) -> list[LawCell]:
        """The cells that the chosen form was fitted to, with its predictions."""
        bounded = FORMS[self.form].bounded
        return [
            LawCell(
                source=cell.source,
                rank=cell.rank,
                target_tokens=cell.target_tokens,
                seed=cell.seed,
                measured=cell.loss_reduction,
                predicted=predicted,
                saturated=saturated(cell),
            )
            for cell, predicted in zip(self.cells, self.best.predicted, strict=True)
            if bounded or not saturated(cell)
        ]

    @property
    def cells_used(self) -> int:
        """How many cells the chosen form was fitted to."""
        return self.best.cells_used

    @property
    def cells_left_out(self) -> dict[str, int]:
        """How many cells the chosen form was not fitted to, by reason.

        `saturated` where it is unbounded: final loss <= ln 2. `diverged`: a loss that is not finite, or that training
        did not lower. `interrupted`: stopped from outside.
        """
        counts: dict[str, int] = dict(Counter(cell.reason for cell in self.left_out))
        if not FORMS[self.form].bounded and any(map(saturated, self.cells)):
            counts["saturated"] = sum(map(saturated, self.cells))
        return counts

    @property
    def rank_range(self) -> tuple[int, int]:
        """Smallest and largest measured rank."""
        ranks = [cell.rank for cell in self.cells]
        return min(ranks), max(ranks)

    @property
    def target_tokens_range(self) -> tuple[int, int]:
        """Smallest and largest measured length."""
        lengths = [cell.target_tokens for cell in self.cells]
        return min(lengths), max(lengths)

    def about_text(self, initial_loss: float) -> "LawFit":
        """The same law, asked about one text on which the frozen model's loss is known, in nats per target token.

        Texts of one length differ in that loss by some tenths of a nat, which is more than what is left of it after a
        fit; without it, the law speaks of its own texts' mean. How much of the difference is learnt away is fitted.

        Raises:
            InputError: If the loss is not a number above 0.
        """
        if not (math.isfinite(initial_loss) and initial_loss > 0):
            raise InputError(f"initial loss is {initial_loss:g}; expected nats per target token above 0")
        other = self.model_copy()
        other._text_loss = initial_loss
        return other

    @property
    def text_spread(self) -> float:
        """By how much texts of one length differ in the frozen model's loss, a standard deviation in nats per token.

        0 with fewer than 4 texts, which cannot tell.
        """
        return self._texts.spread

    def initial_loss(self, target_tokens: npt.ArrayLike) -> Array:
        """The frozen model's loss in nats per target token: the text's own where `about_text` was told it.

        Otherwise by a straight line in ln l through the law's texts, beyond the measured lengths as at the end.
        """
        if self._text_loss is not None:
            return np.full(np.shape(target_tokens), self._text_loss)
        return self._texts.usual_loss(target_tokens)

    def entropy(self, target_tokens: npt.ArrayLike) -> Array:
        """Information in the targets, in nats per target token; NaN where it is unknown.

        Interpolated in ln l, beyond the measured lengths as at the end.
        """
        known = [
            (cell.target_tokens, cell.entropy_bits * math.log(2) / cell.target_tokens)
            for cell in self.cells
            if cell.entropy_bits is not None
        ]
        if not known:
            return np.full(np.shape(target_tokens), np.nan)
        return _between(known, target_tokens)

    def predict(self, rank: npt.ArrayLike, target_tokens: npt.ArrayLike, form: FormName | None = None) -> Array:
        """Predicted loss reduction in nats per target token.

        Args:
            rank: LoRA ranks, any shape that broadcasts with `target_tokens`.
            target_tokens: Lengths in target tokens.
            form: Of which form; None is the chosen one.

        Returns:
            An array of the broadcast shape, of no dimension for two numbers. An unbounded form goes on rising past the
            frozen model's loss, which no run can exceed.

        Raises:
            InputError: If a rank or a length is not positive, or the form counts parameters and the law's runs differ
                in how many a rank has.

        Example:
            >>> from pml.law import Cell, fit_law
            >>> grid = [(r, l) for r in (1, 2, 4, 8) for l in (100, 200, 400)]
            >>> cells = [Cell(r, l, 13.0, 13.0 - 20 * r**0.5 / l**0.5, 0, f"r{r}l{l}") for r, l in grid]
            >>> round(float(fit_law(cells).predict(4, 400)), 6)
            2.0
        """
        fit = self.best if form is None else self.fit_of(form)
        points, shape = self._points(rank, target_tokens, fit.form)
        return self._foretold(fit, fit.theta, points).reshape(shape)

    def predict_draws(self, rank: npt.ArrayLike, target_tokens: npt.ArrayLike, form: FormName | None = None) -> Array:
        """Loss reduction in nats per target token as bootstrapped laws predict it; percentiles of it are intervals.

        The cells in `law.json` are all it takes, so the draws are made anew, and the same every time.

        Args:
            rank: LoRA ranks, any shape that broadcasts with `target_tokens`.
            target_tokens: Lengths in target tokens.
            form: Of which form; None is the chosen one.

        Returns:
            (laws, *broadcast shape). Deviations from the law's own value are widened by Student's t over the normal's
            percentile, since the noise is estimated from few cells.

        Raises:
            InputError: As `predict` does.
        """
        fit = self.best if form is None else self.fit_of(form)
        points, shape = self._points(rank, target_tokens, fit.form)
        draws = self._draws[fit.form]
        usual = np.maximum(points.initial_loss + self._line_draws(points, len(draws.theta)), 0.0)
        shares = self._shares(fit, len(draws.theta))[:, None]
        found = self._widened(fit, draws, replace(points, initial_loss=usual), shares)
        return found.reshape(len(found), *shape)

    def new_run_draws(
        self,
        rank: npt.ArrayLike,
        target_tokens: npt.ArrayLike,
        form: FormName | None = None,
        *,
        laws: int | None = None,
        runs: int = 1,
    ) -> "RunDraws":
        """Single new runs by bootstrapped laws, each with a run's noise, on a text that is drawn too.

        Texts of one length differ in the frozen model's loss (`text_spread`), except where `about_text` was told it.

        Args:
            rank: LoRA ranks, any shape that broadcasts with `target_tokens`.
            target_tokens: Lengths in target tokens.
            form: Of which form; None is the chosen one.
            laws: How many bootstrapped laws; None is all of them.
            runs: How many runs by each. Several are spread evenly over what can happen, a power of 2 of them best, and
                are the same for every law.

        Raises:
            InputError: As `predict` does.
        """
        fit = self.best if form is None else self.fit_of(form)
        points, shape = self._points(rank, target_tokens, fit.form)
        draws = self._draws[fit.form].some(laws)
        number = len(draws.theta)
        # The same luck and the same text for all points, so that what runs of two sizes differ in is their size.
        luck, text = _normal_pairs(number, runs)
        usual = points.initial_loss + self._line_draws(points, number)[:, None]
        initial = np.maximum(usual + self._unknown_spread * text, 0.0)
        points = replace(points, initial_loss=initial)
        free = sensitivity(FORMS[fit.form], fit.theta, points)
        shares, below = (of_law[:, None, None] for of_law in self._shares_and_noise(fit, number))
        # The noise at the ceiling is known from all the cells there, and needs no widening.
        at_ceiling = fit.noise_nats if fit.noise_at_ceiling_nats is None else fit.noise_at_ceiling_nats
        ends = np.hypot(free * below, (1.0 - free) * at_ceiling)
        noise = luck * np.hypot(ends, 2.0 * np.sqrt(free * (1.0 - free)) * fit.noise_at_knee_nats)
        fallen = self._widened(fit, replace(draws, theta=draws.theta[:, None]), points, shares) + noise
        whole = (number, runs, *shape)
        initial = np.broadcast_to(initial, fallen.shape)
        return RunDraws(initial.reshape(whole), np.minimum(fallen, initial).reshape(whole))

    def predict_interval(self, rank: int, target_tokens: int, form: FormName | None = None) -> Prediction:
        """What the law says of one rank and length, with 95 % intervals.

        Raises:
            InputError: As `predict` does.
        """
        of_the_mean = self.predict_draws(rank, target_tokens, form)
        of_a_run = self.new_run_draws(rank, target_tokens, form).loss_reduction
        return Prediction(
            loss_reduction=float(self.predict(rank, target_tokens, form)),
            confidence=percentiles(of_the_mean),
            new_run=percentiles(of_a_run),
        )

    def equation(self, errors: bool = False) -> str:
        """The chosen form as text, dL in nats per target token, such as `dL = 3.21 r^0.47 l^-0.43 - 3.60`.

        Args:
            errors: Put the standard error behind every number.
        """
        return self.best.equation(errors, self.capacity)

    def latex(self, form: FormName | None = None) -> str:
        """A form's equation as mathematical text of TeX, without dollar signs; None is the chosen form."""
        text = (self.best if form is None else self.fit_of(form)).equation(capacity=self.capacity)
        for plain, tex in (
            ("stored bits", r"\mathrm{stored\ bits}"),
            ("dL", r"\Delta L"),
            ("L0", "L_0"),
        ):
            text = text.replace(plain, tex)
        # As a word, since under an operator the knee would touch the line below.
        text = re.sub(r"min_([\d.]+)", r"\\mathrm{min}_{\1}", text).replace("min(", r"\min(")
        text = re.sub(r"\^([^ ,]+)", r"^{\1}", re.sub(r"\bl\b", r"\\ell", text))
        text = re.sub(r" (?=(?:[rP]|\\ell)\^|P\b)", r"\\,", text)
        return re.sub(r"e\+?(-?)0*(\d+)", r" \\times 10^{\1\2}", text)

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

    def _excess(self, points: Points) -> Array:
        """By how much the frozen model's loss lies above what is usual at each length."""
        usual = self._texts.usual_loss(np.exp(points.log_tokens))
        # Of a text beyond that the share says nothing; only that it has no more to lose than it has.
        return np.clip(points.initial_loss - usual, -OTHER_KIND * usual, OTHER_KIND * usual)

    def _foretold(self, fit: FormFit, theta: Array | list[float], points: Points) -> Array:
        """Loss reduction on texts of which the frozen model's loss is known, with what it takes off of their excess."""
        form = FORMS[fit.form]
        share = fit.text_share[0] - form.text_share
        return reduction(form, theta, points) + share * sensitivity(form, theta, points) * self._excess(points)

    def _widened(self, fit: FormFit, draws: "_Laws", points: Points, shares: Array) -> Array:
        """The same by bootstrapped laws, whose distance from the law's own value is that of few cells, and shares."""
        value = self._foretold(fit, fit.theta, points)
        of_laws = draws.expansion * (self._foretold(fit, draws.theta, points) - value)
        through = sensitivity(FORMS[fit.form], fit.theta, points) * self._excess(points)
        # The error of a share is that of few texts already.
        return value + of_laws + (shares - fit.text_share[0]) * through

    def _line_draws(self, points: Points, laws: int) -> Array:
        """By how much the usual loss may be off, `(laws, n)`; nothing where the text's own was told."""
        if self._text_loss is not None:
            return np.zeros((laws, 1))
        return self._texts.usual_draws(points.log_tokens, np.random.default_rng(LINE_SEED).normal(size=(laws, 2)))

    def _shares(self, fit: FormFit, laws: int) -> Array:
        """What of a text's excess is taken off, as uncertain as it is, one for each bootstrapped law."""
        share, error = fit.text_share
        return share + error * np.random.default_rng(SHARE_SEED).normal(size=laws)

    def _shares_and_noise(self, fit: FormFit, laws: int) -> tuple[Array, Array]:
        """By bootstrapped law what is taken off of a text's excess, and a run's noise in nats beside it, `(laws,)`.

        Of a text whose loss is not known the excess is a part of the noise, which is known without it: no larger, and
        what is left belongs to the run.
        """
        shares, widened = self._shares(fit, laws), expansion(fit.degrees_of_freedom)
        if self._unknown_spread == 0.0:
            noise = fit.noise_nats if self._text_loss is None else fit.noise_beyond_text_nats
            return shares, np.full(laws, widened * noise)
        own, most = FORMS[fit.form].text_share, widened * fit.noise_nats / self._unknown_spread
        shares = np.clip(shares, own - most, own + most)
        of_text = (shares - own) * self.text_spread
        return shares, widened * np.sqrt(np.maximum(fit.noise_nats**2 - of_text**2, 0.0))

    @property
    def _unknown_spread(self) -> float:
        """By how much the frozen model's loss on a new text may differ from the usual; 0 where it was told."""
        return self._texts.widened_spread if self._text_loss is None else 0.0

    @cached_property
    def _draws(self) -> "_Draws":
        return _Draws(self)

    @cached_property
    def _texts(self) -> Texts:
        return texts_of(self.cells)

    def _points(
        self, rank: npt.ArrayLike, target_tokens: npt.ArrayLike, form: FormName
    ) -> tuple[Points, tuple[int, ...]]:
        ranks, lengths = np.asarray(rank, dtype=np.float64), np.asarray(target_tokens, dtype=np.float64)
        for name, values in (("rank", ranks), ("target_tokens", lengths)):
            if not (values > 0).all():
                raise InputError(f"{name}: expected values above 0, got {values.min():g}; give a positive number")
        if self.parameters_per_rank is None and (self.capacity != "rank" or FORMS[form].proportional):
            raise InputError(
                "rank: the runs of this law differ in parameters per rank, so a rank says nothing; "
                "fit the runs of one placement"
            )
        ranks, lengths = np.broadcast_arrays(ranks, lengths)
        shape, ranks, lengths = ranks.shape, ranks.ravel(), lengths.ravel()
        parameters = ranks * (self.parameters_per_rank or math.nan)
        return (
            Points(
                np.log(ranks if self.capacity == "rank" else parameters),
                np.log(lengths),
                np.log(parameters),
                self.initial_loss(lengths),
                self.entropy(lengths),
            ),
            shape,
        )


@dataclass(frozen=True)
class _Laws:
    """A form as bootstrapped laws have it.

    Attributes:
        theta: Their parameters, `(laws, parameters)`.
        expansion: By how much their distance from the law's own value has to be widened.
    """

    theta: Array
    expansion: float

    def some(self, laws: int | None) -> "_Laws":
        """The first of them; all for None."""
        return replace(self, theta=self.theta[:laws])


class _Draws(dict[FormName, _Laws]):
    """Bootstrapped laws of each form, made when first asked for.

    What texts differ by is taken off first: a prediction is for a text of known loss, or for the usual one, whose doubt
    is added there. The intervals of the parameters leave it in.
    """

    def __init__(self, law: LawFit) -> None:
        super().__init__()
        self.law = law

    def __missing__(self, name: FormName) -> _Laws:
        form, fit = FORMS[name], self.law.fit_of(name)
        cells, theta = fitted_cells(form, self.law.cells), np.array(fit.theta)
        free = [form.parameters.index(parameter) for parameter in fit.free]
        data = data_of(cells, self.law.capacity)
        of_texts = (fit.text_share[0] - form.text_share) * sensitivity(form, theta, data.points)
        excess = np.array([cell.initial_loss for cell in cells]) - self.law._texts.usual_loss(
            [cell.target_tokens for cell in cells]
        )
        data = replace(data, measured=data.measured - of_texts * excess)
        groups = groups_of(cells, bootstrap_groups(form, theta, data, cells, free))
        degrees = scatter(form, theta, data, groups, len(free)).degrees_of_freedom
        self[name] = _Laws(bootstrap(form, theta, data, groups, free), expansion(degrees))
        return self[name]


def factors_of(capacity: CapacityName) -> tuple[Factor, Factor]:
    """What cells differ in, where the adapter's size is counted so."""
    return capacity, "target_tokens"


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


def _between(pairs: list[tuple[int, float]], lengths: npt.ArrayLike) -> Array:
    """Means by length, interpolated in ln l."""
    known = sorted({length for length, _ in pairs})
    means = [float(np.mean([value for length, value in pairs if length == at])) for at in known]
    return np.interp(np.log(np.asarray(lengths, dtype=np.float64)), np.log(known), means)


def _normal_pairs(laws: int, runs: int) -> Array:
    """Independent standard normal numbers for luck and text, `(2, laws or 1, runs, 1)`."""
    if runs == 1:
        return np.random.default_rng(NOISE_SEED).normal(size=(2, laws, 1, 1))
    # Few runs have to show what happens once in a hundred: a Sobol sequence has no clusters and no gaps.
    uniform = qmc.Sobol(2, rng=np.random.default_rng(NOISE_SEED)).random(runs)
    return np.asarray(norm.ppf(uniform.T)[:, None, :, None])


def percentiles(draws: Array) -> tuple[float, float]:
    """The 95 % interval that draws span."""
    low, high = np.percentile(draws, (2.5, 97.5)).tolist()
    return low, high


def _mean_error(held: Iterable[HeldOut]) -> float | None:
    """Mean error in percent over the cells of all that could be foretold."""
    known = [(part.cells, part.mape_percent) for part in held if part.mape_percent is not None]
    return sum(cells * error for cells, error in known) / sum(cells for cells, _ in known) if known else None


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
