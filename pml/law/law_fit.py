"""A fitted law, the content of `law.json`: what was measured, the fit of every form, and predictions from it."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pydantic

from pml.content import Content
from pml.errors import InputError
from pml.law.equation import Equation, equation_of
from pml.law.forms import FORMS, AdapterSize, Array, FormName, Points
from pml.law.observations import LeftOutRun, Observation, saturated
from pml.law.prediction import Predictor
from pml.law.schema import (
    LAW_SCHEMA_VERSION,
    Estimate,
    Factor,
    FormFit,
    RunDraws,
    UnsaturatedFit,
)
from pml.recall_model import RecallModel

__all__ = ["LAW_NAME", "LawFit", "read_law"]

LAW_NAME = "law.json"


class LawFit(Content):
    """The law fitted to runs in every form that they determine.

    Methods that predict take `initial_loss`, the frozen model's loss on the text in nats per target token. Without it
    they use the loss expected at the length, a line in ln l through the law's texts, and its uncertainty.

    Attributes:
        schema_version: Version of this layout.
        form: The chosen form.
        chosen_because: Why it was chosen, in words.
        adapter_size: What the law counts as the adapter's size.
        parameters_per_rank: Effective parameters per rank; None if unknown or different between runs.
        fits: The fits of every form that the runs determine, the chosen one first.
        observations: What was measured, sorted by length, rank and seed, including saturated runs.
        left_out: Runs that no form can use.
        recall: The model from loss to recall; None without enough per-token results (see `fit_recall`).
        setting: What all runs have in common.
        warnings: Reasons to trust the chosen form less than its numbers suggest.
    """

    schema_version: Literal[6] = LAW_SCHEMA_VERSION
    form: FormName
    chosen_because: str
    adapter_size: AdapterSize
    parameters_per_rank: float | None
    fits: list[FormFit]
    observations: list[Observation]
    left_out: list[LeftOutRun]
    recall: RecallModel | None
    setting: dict[str, Any]
    warnings: list[str]

    @pydantic.model_validator(mode="after")
    def _parts_agree(self) -> "LawFit":
        if self.form not in [fit.form for fit in self.fits]:
            raise ValueError(f"form is {self.form}, but fits has {', '.join(fit.form for fit in self.fits) or 'none'}")
        for fit in self.fits:
            if len(fit.predicted) != len(self.observations):
                raise ValueError(f"{fit.form}: {len(fit.predicted)} predictions for {len(self.observations)} runs")
        return self

    @property
    def best(self) -> FormFit:
        """The chosen form's fit."""
        return self.fit_of(self.form)

    def fit_of(self, form: FormName | None) -> FormFit:
        """The fit of a form; None selects the chosen form.

        Raises:
            InputError: If the form was not fitted.
        """
        for fit in self.fits:
            if fit.form == (form or self.form):
                return fit
        names = ", ".join(fit.form for fit in self.fits)
        raise InputError(
            f"form {form} was not fitted; expected one of {names}; it may need more runs or the entropy of the corpus"
        )

    @property
    def parameters(self) -> dict[str, Estimate]:
        """The parameters of the chosen form."""
        return self.best.parameters

    @property
    def factors(self) -> tuple[Factor, Factor]:
        """The two variables of the law: the adapter's size as it counts it, and the length."""
        return self.adapter_size, "target_tokens"

    @property
    def predicts_ranks(self) -> bool:
        """Whether the law can predict from a rank: if it counts parameters, it needs one number of them per rank."""
        counts_parameters = self.adapter_size != "rank" or FORMS[self.form].proportional
        return self.parameters_per_rank is not None or not counts_parameters

    @property
    def bits_per_parameter(self) -> Estimate | None:
        """kappa of the form `stored_bits`; None if that form was not fitted."""
        return next((fit.parameters["bits_per_parameter"] for fit in self.fits if fit.form == "stored_bits"), None)

    @property
    def used(self) -> list[tuple[Observation, float]]:
        """The runs that the chosen form was fitted to, with predicted loss reductions in nats per target token."""
        pairs = zip(self.observations, self.best.predicted, strict=True)
        return [(run, predicted) for run, predicted in pairs if FORMS[self.form].saturating or not saturated(run)]

    @property
    def unsaturated_fit(self) -> UnsaturatedFit:
        """How well the chosen form describes the unsaturated runs alone.

        Saturated runs lie at the ceiling whatever the parameters, so that many of them make any law look good.
        """
        pairs = [(run.loss_reduction, predicted) for run, predicted in self.used if not saturated(run)]
        measured, predicted = np.array(pairs).T
        residual = measured - predicted
        r2 = 1.0 - float(np.sum(residual**2)) / float(np.sum((measured - measured.mean()) ** 2))
        return UnsaturatedFit(r2, 100.0 * float(np.mean(np.abs(residual) / measured)), len(pairs))

    @property
    def left_out_counts(self) -> dict[str, int]:
        """Number of runs that the chosen form was not fitted to, by reason."""
        counts: dict[str, int] = dict(Counter(run.reason for run in self.left_out))
        if not FORMS[self.form].saturating and any(map(saturated, self.observations)):
            counts["saturated"] = sum(map(saturated, self.observations))
        return counts

    @property
    def rank_range(self) -> tuple[int, int]:
        """Smallest and largest measured rank."""
        return min(run.rank for run in self.observations), max(run.rank for run in self.observations)

    @property
    def target_tokens_range(self) -> tuple[int, int]:
        """Smallest and largest measured length."""
        return min(run.target_tokens for run in self.observations), max(run.target_tokens for run in self.observations)

    @property
    def text_spread(self) -> float:
        """Standard deviation of the frozen model's loss among texts of one length, in nats; 0 below 4 texts."""
        return self._predictor.texts.spread

    def equation(self, errors: bool = False, form: FormName | None = None) -> Equation:
        """The equation of a form, with dL in nats per target token.

        For example `dL = 3.21 r^0.47 l^-0.43 - 3.60`, or `dL = min_2.1(135 r^0.75 l^-0.60, L0)`, where 2.1 is the
        sharpness of the soft minimum (see `pml.law.forms`). The size is `r` or `P`, whichever the law counts.

        Args:
            errors: Whether to show standard errors.
            form: The form; None for the chosen one.
        """
        fit = self.fit_of(form)
        values = {name: (estimate.value, estimate.stderr) for name, estimate in fit.parameters.items()}
        return equation_of(fit.form, values, self.adapter_size, errors)

    def initial_loss(self, target_tokens: npt.ArrayLike, given: float | None = None) -> Array:
        """The frozen model's loss in nats per target token: the given one, or the one expected at the length.

        Raises:
            InputError: If the given loss is not a number above 0.
        """
        if given is None:
            return self._predictor.texts.expected_initial_loss(target_tokens)
        if not (math.isfinite(given) and given > 0):
            raise InputError(f"initial loss is {given:g}; expected nats per target token above 0")
        return np.full(np.shape(target_tokens), float(given))

    def entropy(self, target_tokens: npt.ArrayLike) -> Array:
        """Information in the targets in nats per target token, interpolated in ln l; NaN if unknown."""
        known: dict[int, list[float]] = {}
        for run in self.observations:
            if run.entropy_bits is not None:
                known.setdefault(run.target_tokens, []).append(run.entropy_bits * math.log(2) / run.target_tokens)
        if not known:
            return np.full(np.shape(target_tokens), np.nan)
        lengths = sorted(known)
        means = [float(np.mean(known[length])) for length in lengths]
        return np.interp(np.log(np.asarray(target_tokens, dtype=np.float64)), np.log(lengths), means)

    def predict(self, rank: npt.ArrayLike, target_tokens: npt.ArrayLike, *, initial_loss: float | None = None) -> Array:
        """Predicted loss reduction in nats per target token.

        Args:
            rank: LoRA ranks, any shape that broadcasts with `target_tokens`.
            target_tokens: Lengths in target tokens.
            initial_loss: The frozen model's loss on the text, if known.

        Returns:
            An array of the broadcast shape, 0-d for scalars. A form without a ceiling may predict more than the
            frozen model's loss, which no run can reach.

        Raises:
            InputError: If a rank, a length or the loss is not positive, or the form counts parameters and the runs
                differ in parameters per rank.

        Example:
            >>> from pml.law import Observation, fit_law
            >>> grid = [(r, l) for r in (1, 2, 4, 8) for l in (100, 200, 400)]
            >>> runs = [Observation(r, l, 13.0, 13.0 - 20 * r**0.5 / l**0.5, 0, f"r{r}l{l}") for r, l in grid]
            >>> round(float(fit_law(runs).predict(4, 400)), 6)
            2.0
        """
        points, shape = self._points(rank, target_tokens, initial_loss)
        return self._predictor.mean(points).reshape(shape)

    def predict_draws(
        self, rank: npt.ArrayLike, target_tokens: npt.ArrayLike, *, initial_loss: float | None = None
    ) -> Array:
        """Loss reduction by each bootstrapped law, for confidence intervals; takes the arguments of `predict`.

        Returns:
            `(laws, *broadcast shape)`, the same on every call. Deviations from the law are widened by Student's t,
            since the noise is estimated from few runs.
        """
        points, shape = self._points(rank, target_tokens, initial_loss)
        draws = self._predictor.draws(points, initial_loss is not None)
        return draws.reshape(len(draws), *shape)

    def new_run_draws(
        self,
        rank: npt.ArrayLike,
        target_tokens: npt.ArrayLike,
        *,
        initial_loss: float | None = None,
        laws: int | None = None,
        runs: int = 1,
    ) -> RunDraws:
        """Simulate new runs by bootstrapped laws, each with the noise of a run; without `initial_loss`, on a new text.

        Takes the arguments of `predict`, the number of laws (None for all) and of runs per law. Several runs use
        quantiles of the noise, the same for every law, so that a few runs cover rare outcomes.
        """
        points, shape = self._points(rank, target_tokens, initial_loss)
        draws = self._predictor.new_runs(points, initial_loss is not None, laws, runs)
        initial, reduction = (
            values.reshape(*values.shape[:2], *shape) for values in (draws.initial_loss, draws.loss_reduction)
        )
        return RunDraws(initial, reduction)

    def to_json(self) -> dict[str, Any]:
        """The content of `law.json` as plain numbers, strings, lists and dictionaries."""
        return self.model_dump(mode="json")

    @classmethod
    def from_json(cls, content: Mapping[str, Any] | str | bytes) -> "LawFit":
        """Read what `to_json` returned, or the text of a `law.json`.

        Raises:
            InputError: If the content is not JSON, or not a law of this schema version.
        """
        try:
            text = content if isinstance(content, str | bytes) else json.dumps(content)
            return cls.model_validate_json(text)
        except pydantic.ValidationError as error:
            # A file of another version differs in many fields; the version is the problem to report.
            problems = sorted(error.errors(), key=lambda problem: problem["loc"] != ("schema_version",))
            where = ".".join(map(str, problems[0]["loc"])) or "law"
            raise InputError(
                f"not a law of schema version {LAW_SCHEMA_VERSION}: {where}: {problems[0]['msg']}; "
                "fit it again with pml law"
            ) from error

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Copy with some fields replaced; the copy predicts from its own fields."""
        copy = super().model_copy(update=update, deep=deep)
        copy.__dict__.pop("_predictor", None)
        return copy

    @cached_property
    def _predictor(self) -> Predictor:
        return Predictor(self.best, self.observations, self.adapter_size)

    def _points(
        self, rank: npt.ArrayLike, target_tokens: npt.ArrayLike, initial_loss: float | None
    ) -> tuple[Points, tuple[int, ...]]:
        """Flattened points at which to evaluate, and the broadcast shape."""
        ranks, lengths = np.asarray(rank, dtype=np.float64), np.asarray(target_tokens, dtype=np.float64)
        for name, values in (("rank", ranks), ("target_tokens", lengths)):
            if not (values > 0).all():
                raise InputError(f"{name}: expected values above 0, got {values.min():g}; give a positive number")
        if not self.predicts_ranks:
            raise InputError(
                "rank: the runs of this law differ in parameters per rank, so a rank has no one size; "
                "fit the runs of one placement"
            )
        ranks, lengths = np.broadcast_arrays(ranks, lengths)
        shape, ranks, lengths = ranks.shape, ranks.ravel(), lengths.ravel()
        parameters = ranks * (self.parameters_per_rank or math.nan)
        size = ranks if self.adapter_size == "rank" else parameters
        initial = self.initial_loss(lengths, initial_loss)
        return Points(size, lengths, parameters, initial, self.entropy(lengths)), shape


def read_law(path: str | Path) -> LawFit:
    """Read a `law.json`.

    Raises:
        InputError: If the file cannot be read, is not JSON, or does not follow the schema.
    """
    try:
        return LawFit.from_json(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected a {LAW_NAME} from pml law") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
