"""Predictions of a fitted form at new points: the mean, by bootstrapped laws, and for simulated new runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from scipy.stats import norm

from pml.law.data import make_data
from pml.law.forms import FORMS, AdapterSize, Array, Points
from pml.law.intervals import bootstrap, choose_groups, noise_of, t_over_z
from pml.law.least_squares import Solution, to_natural
from pml.law.observations import Observation
from pml.law.schema import FormFit, RunDraws
from pml.law.texts import MAX_LOSS_DEVIATION, Texts, collect_texts

__all__ = ["Predictor"]

# Fixed seeds make predictions reproducible.
RUN_SEED, LINE_SEED = 1, 2


@dataclass(frozen=True)
class Predictor:
    """A fitted form with the runs of its law.

    Points hold arrays of `(n,)`. If the frozen model's loss on a text is unknown, `points.initial_loss` is the loss
    expected at its length, and draws include its uncertainty.

    Attributes:
        fit: The fit of the form.
        observations: The runs of the law.
        adapter_size: What the law counts as the adapter's size.
    """

    fit: FormFit
    observations: Sequence[Observation]
    adapter_size: AdapterSize

    @cached_property
    def texts(self) -> Texts:
        """The texts of the runs."""
        return collect_texts(self.observations)

    def mean(self, points: Points) -> Array:
        """Loss reduction in nats per target token, `(n,)`."""
        return self._evaluate(self.fit.values, points)

    def draws(self, points: Points, known_text: bool) -> Array:
        """Loss reduction predicted by each bootstrapped law, `(laws, n)`, with deviations widened by Student's t."""
        laws = len(self._laws[0])
        if not known_text:
            points = replace(points, initial_loss=self._initial_loss_draws(points, laws))
        return self._evaluate_draws(laws, points).reshape(laws, -1)

    def new_runs(self, points: Points, known_text: bool, laws: int | None, runs: int) -> RunDraws:
        """Simulate new runs from bootstrapped laws, `(laws, runs, n)`, each with the noise of a run.

        Args:
            points: Where to simulate.
            known_text: Whether `points.initial_loss` is that of the text; otherwise each run has a new text.
            laws: Number of laws; None for all.
            runs: Runs per law. Several runs use quantiles of the noise, the same for every law, so that a few runs
                cover rare outcomes.
        """
        number = len(self._laws[0][:laws])
        noise, text = _standard_normals(number, runs)
        if not known_text:
            of_text = self.texts.spread_at(points.target_tokens) * self.texts.t_over_z * text
            points = replace(points, initial_loss=np.maximum(self._initial_loss_draws(points, number) + of_text, 0.0))
        mean = self._evaluate_draws(number, points)
        reduction = np.minimum(mean + noise * self._noise_scale(points), points.initial_loss)
        shape = (number, runs, points.size.size)
        return RunDraws(np.broadcast_to(points.initial_loss, shape), np.broadcast_to(reduction, shape))

    def _noise_scale(self, points: Points) -> Array:
        """Standard deviation of a run in nats: of the power term where that limits it, else of the ceiling."""
        fit = self.fit
        by_power = FORMS[fit.form].sensitivity(fit.values, points)  # 1 far below the ceiling, 0 at it
        of_power = t_over_z(fit.degrees_of_freedom) * fit.noise_nats
        # Saturated runs are many, so their noise needs no widening.
        of_ceiling = fit.noise_nats if fit.noise_at_ceiling_nats is None else fit.noise_at_ceiling_nats
        return np.hypot(by_power * of_power, (1.0 - by_power) * of_ceiling)

    @cached_property
    def _laws(self) -> tuple[Array, float]:
        """Parameters of bootstrapped laws, `(laws, parameters)`, and the factor that widens their deviations.

        The laws are refitted to the observations without the effect of their texts, since predictions add that of the
        text in question. If texts have an effect, other groups than `fit.grouped_by` may share the remaining errors,
        so the groups are chosen again.
        """
        form, fit = FORMS[self.fit.form], self.fit
        data = make_data(self.observations, self.adapter_size)
        residuals = self.texts.initial_loss_residuals[self.texts.of_run]
        effect = fit.text_effect * form.sensitivity(fit.values, data.points) * residuals
        data = replace(data, measured=data.measured - effect).used_by(form)
        solution = Solution(form, data, fit.values, fit.free)
        grouped_by = fit.grouped_by if fit.text_effect == 0.0 else choose_groups(solution)
        degrees = noise_of(solution.residual, data, grouped_by, len(fit.free)).degrees_of_freedom
        return bootstrap(solution, grouped_by), t_over_z(degrees)

    def _evaluate(self, values: Mapping[str, Any], points: Points) -> Array:
        """Loss reduction at these points, including the effect of the texts."""
        form, text_effect = FORMS[self.fit.form], self.fit.text_effect
        found = form.evaluate(values, points)
        if text_effect == 0.0:
            return found
        expected = self.texts.expected_initial_loss(points.target_tokens)
        residual = np.clip(
            points.initial_loss - expected, -MAX_LOSS_DEVIATION * expected, MAX_LOSS_DEVIATION * expected
        )
        return np.asarray(found + text_effect * form.sensitivity(values, points) * residual)

    def _evaluate_draws(self, laws: int, points: Points) -> Array:
        """Loss reduction by the first `laws` bootstrapped laws, `(laws, runs, n)`, with widened deviations."""
        theta, widening = self._laws
        value = self._evaluate(self.fit.values, points)
        of_laws = self._evaluate(to_natural(FORMS[self.fit.form], theta[:laws, None]), points)
        return np.asarray(value + widening * (of_laws - value))

    def _initial_loss_draws(self, points: Points, laws: int) -> Array:
        """Draws of the expected initial loss, `(laws, 1, n)`."""
        normal = np.random.default_rng(LINE_SEED).normal(size=(laws, 1, 1))
        error = self.texts.standard_error(points.target_tokens)
        return np.maximum(points.initial_loss + self.texts.t_over_z * error * normal, 0.0)


def _standard_normals(laws: int, runs: int) -> tuple[Array, Array]:
    """Standard normal deviates of noise and text, that broadcast to `(laws, runs, n)`.

    All points share them, so that two sizes differ in size alone.
    """
    random = np.random.default_rng(RUN_SEED)
    if runs == 1:
        noise, text = random.normal(size=(2, laws, 1, 1))
        return noise, text
    quantiles = norm.ppf((np.arange(runs) + 0.5) / runs)
    return quantiles[:, None], random.permutation(quantiles)[:, None]
