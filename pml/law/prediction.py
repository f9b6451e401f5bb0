"""What a fitted form predicts at new points: its mean, by bootstrapped laws, and for simulated new runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from scipy.stats import norm

from pml.law.data import data_of
from pml.law.forms import FORMS, AdapterSize, Array, Points
from pml.law.intervals import bootstrap, choose_groups, noise_of, t_over_z
from pml.law.least_squares import Solution, to_natural
from pml.law.observations import Observation
from pml.law.schema import FormFit, RunDraws
from pml.law.texts import OTHER_KIND, Texts, texts_of

__all__ = ["Predictor"]

# Any fixed seed makes a law give the same prediction twice.
RUN_SEED, LINE_SEED = 1, 2


@dataclass(frozen=True)
class Predictor:
    """A form with the runs that it was fitted to.

    Points have arrays of `(n,)`. Where the frozen model's loss on a text is not known, `points.initial_loss` is the one
    that is expected at its length, and draws have its uncertainty.

    Attributes:
        fit: The form's fit.
        observations: The law's runs.
        adapter_size: What the law counts.
    """

    fit: FormFit
    observations: Sequence[Observation]
    adapter_size: AdapterSize

    @cached_property
    def texts(self) -> Texts:
        """The texts of the runs."""
        return texts_of(self.observations)

    def mean(self, points: Points) -> Array:
        """Loss reduction in nats per target token, `(n,)`."""
        return self._evaluate(self.fit.values, points)

    def draws(self, points: Points, known_text: bool) -> Array:
        """Loss reduction by each bootstrapped law, `(laws, n)`, with deviations widened by Student's t."""
        laws = len(self._laws[0])
        if not known_text:
            points = replace(points, initial_loss=self._initial_loss_draws(points, laws))
        return self._evaluate_draws(laws, points).reshape(laws, -1)

    def new_runs(self, points: Points, known_text: bool, laws: int | None, runs: int) -> RunDraws:
        """New runs by bootstrapped laws, `(laws, runs, n)`, each with a run's noise, and on a new text if not known.

        Args:
            points: Where.
            known_text: Whether `points.initial_loss` is that of the text.
            laws: How many; None is all of them.
            runs: By each law. Several are quantiles of the noise, the same for every law, so that few of them show rare
                outcomes.
        """
        fit = self.fit
        number, random = len(self._laws[0][:laws]), np.random.default_rng(RUN_SEED)
        # All points share noise and text, so that two sizes differ in nothing but size.
        if runs == 1:
            noise, text = random.normal(size=(2, number, 1, 1))
        else:
            quantiles = norm.ppf((np.arange(runs) + 0.5) / runs)
            noise, text = quantiles[:, None], random.permutation(quantiles)[:, None]
        if not known_text:
            of_text = self.texts.spread_at(points.target_tokens) * self.texts.t_over_z * text
            points = replace(points, initial_loss=np.maximum(self._initial_loss_draws(points, number) + of_text, 0.0))
        sensitivity = FORMS[fit.form].sensitivity(fit.values, points)
        # Noise in the power term reaches the loss by its sensitivity, noise at the ceiling by what is left of it.
        # Saturated runs are many, so the latter needs no widening.
        at_ceiling = fit.noise_nats if fit.noise_at_ceiling_nats is None else fit.noise_at_ceiling_nats
        below = t_over_z(fit.degrees_of_freedom) * fit.noise_nats
        scale = np.hypot(sensitivity * below, (1.0 - sensitivity) * at_ceiling)
        reduction = np.minimum(self._evaluate_draws(number, points) + noise * scale, points.initial_loss)
        shape = (number, runs, points.size.size)
        return RunDraws(np.broadcast_to(points.initial_loss, shape), np.broadcast_to(reduction, shape))

    @cached_property
    def _laws(self) -> tuple[Array, float]:
        """Parameters of bootstrapped laws, `(laws, parameters)`, and by how much their deviations are to be widened.

        They are refitted to the observations. The effect of texts is removed first, since predictions add it for the
        text in question. Where there is one, what is left may be shared by other groups than `fit.grouped_by`, to which
        the parameters' intervals belong, and the groups are chosen anew.
        """
        form, fit = FORMS[self.fit.form], self.fit
        data = data_of(self.observations, self.adapter_size)
        residuals = self.texts.initial_loss_residuals[self.texts.of_run]
        effect = fit.text_effect * form.sensitivity(fit.values, data.points) * residuals
        data = replace(data, measured=data.measured - effect).used_by(form)
        solution = Solution(form, data, fit.values, fit.free)
        grouped_by = fit.grouped_by if fit.text_effect == 0.0 else choose_groups(solution)
        degrees = noise_of(solution.residual, data, grouped_by, len(fit.free)).degrees_of_freedom
        return bootstrap(solution, grouped_by), t_over_z(degrees)

    def _evaluate(self, values: Mapping[str, Any], points: Points) -> Array:
        """Loss reduction at these points, with the effect of the texts."""
        form, text_effect = FORMS[self.fit.form], self.fit.text_effect
        found = form.evaluate(values, points)
        if text_effect == 0.0:
            return found
        expected = self.texts.expected_initial_loss(points.target_tokens)
        residual = np.clip(points.initial_loss - expected, -OTHER_KIND * expected, OTHER_KIND * expected)
        return np.asarray(found + text_effect * form.sensitivity(values, points) * residual)

    def _evaluate_draws(self, laws: int, points: Points) -> Array:
        """The same by so many bootstrapped laws, `(laws, runs, n)`, with widened deviations."""
        theta, widening = self._laws
        value = self._evaluate(self.fit.values, points)
        of_laws = self._evaluate(to_natural(FORMS[self.fit.form], theta[:laws, None]), points)
        return np.asarray(value + widening * (of_laws - value))

    def _initial_loss_draws(self, points: Points, laws: int) -> Array:
        """The expected initial loss with its uncertainty, `(laws, 1, n)`."""
        normal = np.random.default_rng(LINE_SEED).normal(size=(laws, 1, 1))
        error = self.texts.standard_error(points.target_tokens)
        return np.maximum(points.initial_loss + self.texts.t_over_z * error * normal, 0.0)
