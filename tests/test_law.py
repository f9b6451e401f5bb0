"""The Parametric Memory Law: what a fit recovers, refuses and warns about, choice of form, records and command."""

import itertools
import json
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonargparse
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from record_factory import make_record, write_run
from scipy.optimize import curve_fit
from simulated_laws import fit_one, saturating_runs

from pml.commands import law as command
from pml.errors import InputError
from pml.figures import law_figure
from pml.groups import select_records
from pml.law import (
    CRITICAL_LOSS,
    FORMS,
    Estimate,
    FormFit,
    FormName,
    HeldOut,
    LawFit,
    Observation,
    fit_law,
    observations_from_records,
    read_law,
    saturated,
    shared_setting,
)
from pml.law.diagnostics import warnings_of
from pml.law.observations import unconverged
from pml.law.selection import rank_forms
from pml.law.tables import sentences

PARAMETERS = FORMS["power_offset"].fitted
RANKS = (1, 2, 4, 8)
LENGTHS = (64, 128, 256, 512)
TRUTH = {"C": 40.0, "alpha": 0.5, "beta": 0.6, "b": 0.3}
# Far above every reduction used here, so that nothing saturates unless a test wants it.
HIGH_LOSS = 1000.0


def reduction(rank: float, length: float, C: float, alpha: float, beta: float, b: float) -> float:
    return C * rank**alpha * length**-beta + b


def grid(
    ranks: tuple[int, ...] = RANKS, lengths: tuple[int, ...] = LENGTHS, initial: float = HIGH_LOSS, **truth: float
) -> list[Observation]:
    """Noise-free runs of a known law; a reduction above the initial loss leaves a saturated final loss of 0.01 nats."""
    values = TRUTH | truth
    return [
        Observation(r, n, initial, max(initial - reduction(r, n, **values), 0.01), seed=0, source=f"r{r}-l{n}")
        for r, n in itertools.product(ranks, lengths)
    ]


def law_grid(truth: dict[str, float], initial: float = HIGH_LOSS) -> list[Observation]:
    return grid(RANKS, LENGTHS, initial, **truth)


def shifted(runs: list[Observation], noise: np.ndarray) -> list[Observation]:
    """The runs, with noise in nats added to their loss reductions."""
    return [
        Observation(c.rank, c.target_tokens, c.initial_loss, c.final_loss - float(e), c.seed, c.source)
        for c, e in zip(runs, noise, strict=True)
    ]


def published(runs: Iterable[Observation], setting: dict[str, Any] | None = None) -> LawFit:
    """A fit of the paper's form."""
    return fit_one(runs, "power_offset", setting=setting)


def values(fit: LawFit) -> dict[str, float]:
    return {name: fit.parameters[name].value for name in PARAMETERS}


def stderrs(fit: LawFit) -> dict[str, float]:
    found = {name: fit.parameters[name].stderr for name in PARAMETERS}
    assert all(stderr is not None for stderr in found.values())
    return {name: float(stderr) for name, stderr in found.items() if stderr is not None}


class TestSaturation:
    @pytest.mark.parametrize(
        ("final", "expected"), [(0.0, True), (math.log(2), True), (0.6932, False), (0.7, False), (math.nan, False)]
    )
    def test_a_run_is_saturated_if_its_final_loss_is_at_most_ln_2(self, final: float, expected: bool) -> None:
        assert saturated(Observation(1, 64, 13.6, final, 0, "x")) is expected

    def test_the_critical_loss_is_the_loss_of_a_token_with_probability_one_half(self) -> None:
        assert pytest.approx(-math.log(0.5), abs=0) == CRITICAL_LOSS

    def test_the_loss_reduction_is_initial_minus_final_loss(self) -> None:
        assert Observation(1, 64, 13.5, 3.25, 0, "x").loss_reduction == 10.25


class TestConvergence:
    @pytest.mark.parametrize(
        ("final", "drop", "expected"),
        [
            # A hundredth of its loss reduction of 12 nats is 0.12 nats.
            (1.0, 0.13, True),
            (1.0, 0.11, False),
            (1.0, None, False),
            # A saturated run is limited by its text.
            (0.5, 1.0, False),
        ],
    )
    def test_a_run_whose_late_loss_drop_exceeds_a_hundredth_of_its_reduction_had_not_converged(
        self, final: float, drop: float | None, expected: bool
    ) -> None:
        assert unconverged(Observation(1, 64, 13.0, final, 0, "x", late_loss_drop=drop)) is expected


class TestRecovery:
    @pytest.mark.parametrize(
        "truth",
        [
            {},
            {"b": 0.0},
            {"C": 60.0, "alpha": 0.47, "beta": 0.43, "b": -3.0},
            {"C": 300.0, "alpha": 1.1, "beta": 1.02, "b": 0.5},
            {"C": 2.0, "alpha": 0.1, "beta": 0.15, "b": 4.0},
        ],
    )
    def test_a_fit_of_a_noise_free_grid_recovers_its_parameters(self, truth: dict[str, float]) -> None:
        fit = published(law_grid(truth))
        assert values(fit) == pytest.approx(TRUTH | truth, rel=1e-9, abs=1e-9)
        assert fit.best.r2 == pytest.approx(1.0, abs=1e-14)
        assert fit.best.mape_percent < 1e-9
        assert fit.best.rmse_nats < 1e-10

    # alpha and beta stay well away from 0, where C and b cannot be told apart and digits are lost.
    @settings(max_examples=25, deadline=None)
    @given(size=st.floats(3.0, 20.0), alpha=st.floats(0.25, 1.5), beta=st.floats(0.25, 1.3), b=st.floats(-2.0, 2.0))
    def test_any_law_is_recovered_from_noise_free_runs(self, size: float, alpha: float, beta: float, b: float) -> None:
        truth = {"C": size * 64**beta, "alpha": alpha, "beta": beta, "b": b}
        assume(reduction(1, 512, **truth) > 0.01)
        assert values(published(law_grid(truth))) == pytest.approx(truth, rel=1e-7, abs=1e-7)

    def test_the_truth_lies_within_3_standard_errors_under_2_percent_noise(self) -> None:
        runs = grid()
        noise = 0.02 * np.array([c.loss_reduction for c in runs]) * np.random.default_rng(5).normal(size=16)
        fit = published(shifted(runs, noise))
        for name, error in stderrs(fit).items():
            assert abs(fit.parameters[name].value - TRUTH[name]) < 3 * error
        assert 0.99 < fit.best.r2 < 1
        # Noise of 2 % standard deviation has a mean absolute error of 1.6 %, part of which the four parameters absorb.
        assert 0.8 < fit.best.mape_percent < 2.4

    @pytest.mark.usefixtures("no_profiles")
    def test_intervals_from_standard_errors_cover_the_truth_as_often_as_they_claim(self) -> None:
        runs, generator, draws = grid(), np.random.default_rng(0), 100
        inside = dict.fromkeys(PARAMETERS, 0)
        for _ in range(draws):
            fit = published(shifted(runs, generator.normal(scale=0.05, size=16)))
            for name, error in stderrs(fit).items():
                inside[name] += abs(fit.parameters[name].value - TRUTH[name]) < 2.179 * error
        # 2.179 is Student's 97.5 % point for 12 degrees of freedom. 95 are expected, with a standard deviation of 2.2.
        assert all(88 <= count <= 100 for count in inside.values()), inside

    @pytest.mark.usefixtures("no_profiles")
    def test_bootstrap_intervals_cover_the_truth_under_noise_that_grows_with_the_reduction(self) -> None:
        runs, generator, draws = grid((1, 2, 3, 4, 6, 8), (64, 96, 128, 256, 512)), np.random.default_rng(0), 100
        size = 0.02 * np.array([c.loss_reduction for c in runs])
        inside = dict.fromkeys(PARAMETERS, 0)
        for _ in range(draws):
            fit = published(shifted(runs, size * generator.normal(size=len(runs))))
            for name in PARAMETERS:
                interval = fit.parameters[name].bootstrap
                assert interval is not None
                inside[name] += interval[0] <= TRUTH[name] <= interval[1]
        # 95 are expected, with a standard deviation of 2.2.
        assert all(89 <= count <= 100 for count in inside.values()), inside

    def test_seeds_give_bootstrap_intervals_if_there_are_as_many_parameters_as_grid_points(self) -> None:
        # The fit passes through the mean of both seeds of each grid point, so no grid point has a residual to resample.
        first = grid((1, 2), (64, 128))
        noise = np.array([0.04, -0.03, 0.05, -0.02])
        fit = published([*shifted(first, noise), *(replace(c, seed=1) for c in shifted(first, -noise))])
        for name in PARAMETERS:
            interval = fit.parameters[name].bootstrap
            assert interval is not None
            assert interval[1] - interval[0] > 0.01 * abs(TRUTH[name])

    @pytest.mark.usefixtures("no_profiles")
    def test_saturated_runs_change_only_the_counts_of_the_published_form(self) -> None:
        # With an initial loss of 13.6 nats, high ranks would reduce the loss on short targets by more than that.
        truth = {"C": 90.0, "alpha": 0.5, "beta": 0.6}
        mixed = law_grid(truth, initial=13.6)
        without = [run for run in mixed if not saturated(run)]
        assert len(mixed) - len(without) == 3
        fit, clean = published(mixed), published(without)
        assert values(fit) == pytest.approx(TRUTH | truth, rel=1e-9)
        assert fit.parameters == clean.parameters
        assert fit.left_out_counts == {"saturated": 3}
        assert clean.left_out_counts == {}
        assert fit.best.observations_used == clean.best.observations_used == 13

    @pytest.mark.usefixtures("no_profiles")
    def test_including_saturated_runs_would_bias_the_published_form(self) -> None:
        mixed = grid(initial=13.6, C=90.0)
        # The same reductions, but nothing marks the runs at the ceiling as saturated.
        unmarked = [Observation(c.rank, c.target_tokens, 20.0, 20.0 - c.loss_reduction, 0, c.source) for c in mixed]
        assert abs(published(unmarked).parameters["alpha"].value - 0.5) > 0.05

    def test_another_unit_of_length_changes_only_c(self) -> None:
        noise = np.random.default_rng(1).normal(scale=0.05, size=16)
        fit = published(shifted(grid(), noise))
        runs = [
            Observation(c.rank, c.target_tokens * 1000, c.initial_loss, c.final_loss, 0, c.source)
            for c in shifted(grid(), noise)
        ]
        scaled = published(runs)
        for name in ("alpha", "beta", "b"):
            assert scaled.parameters[name].value == pytest.approx(fit.parameters[name].value, rel=1e-8)
            assert stderrs(scaled)[name] == pytest.approx(stderrs(fit)[name], rel=1e-6)
        factor = 1000 ** fit.parameters["beta"].value
        assert scaled.parameters["C"].value == pytest.approx(fit.parameters["C"].value * factor, rel=1e-7)
        assert scaled.best.r2 == pytest.approx(fit.best.r2, rel=1e-12)

    def test_the_order_of_the_runs_does_not_matter(self) -> None:
        runs = shifted(grid(), np.random.default_rng(1).normal(scale=0.05, size=16))
        assert published(reversed(runs)).to_json() == published(runs).to_json()

    def test_scipy_finds_the_same_parameters_standard_errors_and_correlations(self) -> None:
        runs = shifted(grid(), np.random.default_rng(3).normal(scale=0.05, size=16))
        fit = published(runs)
        r, n = (np.array([getattr(c, name) for c in runs], dtype=float) for name in ("rank", "target_tokens"))
        y = np.array([c.loss_reduction for c in runs])

        def jacobian(x: Any, c: float, alpha: float, beta: float, b: float) -> np.ndarray:
            power = r**alpha * n**-beta
            return np.stack([power, c * power * np.log(r), -c * power * np.log(n), np.ones_like(r)], axis=1)

        expected, covariance = curve_fit(
            lambda x, c, alpha, beta, b: c * r**alpha * n**-beta + b,
            np.arange(16),
            y,
            p0=list(TRUTH.values()),
            jac=jacobian,
            xtol=1e-14,
            ftol=1e-14,
            gtol=1e-14,
        )
        deviations = np.sqrt(np.diag(covariance))
        assert list(values(fit).values()) == pytest.approx(expected, rel=1e-6)
        assert list(stderrs(fit).values()) == pytest.approx(deviations, rel=1e-5)
        assert fit.best.correlation is not None
        np.testing.assert_allclose(fit.best.correlation, covariance / np.outer(deviations, deviations), atol=1e-5)

    def test_r2_mape_and_rmse_follow_from_the_listed_runs(self) -> None:
        fit = published(shifted(grid(), np.random.default_rng(2).normal(scale=0.1, size=16)))
        y, p = (np.array(column) for column in zip(*((c.loss_reduction, p) for c, p in fit.used), strict=True))
        assert fit.best.r2 == pytest.approx(1 - ((y - p) ** 2).sum() / ((y - y.mean()) ** 2).sum(), rel=1e-12)
        assert fit.best.mape_percent == pytest.approx(100 * (abs(y - p) / y).mean(), rel=1e-12)
        assert fit.best.rmse_nats == pytest.approx(math.sqrt(((y - p) ** 2).mean()), rel=1e-12)
        assert p == pytest.approx(fit.predict([c.rank for c, _ in fit.used], [c.target_tokens for c, _ in fit.used]))

    def test_the_measured_range_includes_saturated_runs_but_no_unusable_ones(self) -> None:
        saturated_run, diverged = Observation(64, 32, 13.6, 0.1, 0, "far"), Observation(128, 16, 13.6, 20.0, 0, "worse")
        fit = published([*grid(), saturated_run, diverged])
        assert (fit.rank_range, fit.target_tokens_range) == ((1, 64), (32, 512))


class TestPrediction:
    def test_a_prediction_matches_the_value_worked_out_by_hand(self) -> None:
        fit = published(grid(C=40.0, alpha=0.5, beta=0.5, b=1.0))
        # 40 * sqrt(4) / sqrt(100) + 1 = 9
        assert float(fit.predict(4, 100)) == pytest.approx(9.0, rel=1e-9)

    def test_a_changed_copy_predicts_from_its_own_parameters(self) -> None:
        fit, other = (published(grid(C=40.0, alpha=0.5, beta=0.5, b=b)) for b in (1.0, 2.0))
        # One prediction first, so that there is a cache that the copy could keep.
        before = float(fit.predict_draws(4, 100).mean())
        changed = fit.model_copy(update={"fits": other.fits, "observations": other.observations})
        assert float(changed.predict_draws(4, 100).mean()) == pytest.approx(before + 1.0)
        assert float(fit.predict(4, 100)) == pytest.approx(9.0)

    def test_predictions_broadcast_over_arrays(self) -> None:
        fit = published(grid(C=40.0, alpha=0.5, beta=0.5, b=1.0))
        table = fit.predict(np.array([[1], [4]]), np.array([100, 400, 1600]))
        np.testing.assert_allclose(table, [[5.0, 3.0, 2.0], [9.0, 5.0, 3.0]], rtol=1e-9)
        assert table.dtype == np.float64

    @pytest.mark.parametrize(("rank", "length", "name"), [(0, 64, "rank"), (4, [64, -1], "target_tokens")])
    def test_predicting_for_a_non_positive_rank_or_length_is_refused(self, rank: Any, length: Any, name: str) -> None:
        with pytest.raises(InputError, match=f"{name}: expected values above 0"):
            published(grid()).predict(rank, length)

    @pytest.mark.parametrize(
        ("truth", "text"),
        [
            ({}, "dL = 40.0 r^0.500 l^-0.600 + 0.300"),
            ({"C": 60.0, "alpha": 0.47, "beta": 0.43, "b": -3.0}, "dL = 60.0 r^0.470 l^-0.430 - 3.00"),
            ({"C": 2e6, "alpha": 0.5, "beta": 1.75}, "dL = 2.00e+06 r^0.500 l^-1.75 + 0.300"),
        ],
    )
    def test_the_equation_has_three_digits_per_number_and_the_sign_of_b(
        self, truth: dict[str, float], text: str
    ) -> None:
        assert published(law_grid(truth)).equation() == text

    def test_the_equation_with_errors_rounds_numbers_to_two_digits_of_the_error(self) -> None:
        content = published(grid()).to_json()
        numbers = {"C": (3.2123, 0.4), "alpha": (0.4712, 0.021), "beta": (0.43, 0.02), "b": (-3.6, 4.1)}
        content["fits"][0]["parameters"] = {name: {"value": v, "stderr": s} for name, (v, s) in numbers.items()}
        assert LawFit.from_json(content).equation(errors=True) == (
            "dL = (3.21 ± 0.40) r^(0.471 ± 0.021) l^(-0.430 ± 0.020) - (3.6 ± 4.1)"
        )


@pytest.mark.usefixtures("no_profiles")
class TestChoiceOfForm:
    @staticmethod
    def ranked(*forms: tuple[FormName, float, float], held: int = 4, saturated: int = 0) -> list[str]:
        """Names in order of choice, from (form, AICc, held-out error in percent at the largest rank)."""
        fits = []
        for form, aicc, error in forms:
            out = HeldOut(factor="rank", value=8, runs=held, mape_percent=error)
            parameters = dict.fromkeys(FORMS[form].fitted, Estimate(value=1.0))
            fits.append(
                FormFit.model_construct(form=form, parameters=parameters, at_bound=[], aicc=aicc, held_out=[out])
            )
        runs = [*grid(), *[Observation(9, 64, 13.0, 0.1, seed, "saturated") for seed in range(saturated)]]
        return [fit.form for fit in rank_forms(fits, runs)[0]]

    def test_a_form_with_an_aicc_smaller_by_over_2_is_chosen_whatever_its_held_out_error(self) -> None:
        assert self.ranked(("power", -60.0, 1.0), ("ceiling_offset", -62.5, 9.0)) == ["ceiling_offset", "power"]

    def test_the_smaller_held_out_error_decides_between_forms_with_an_aicc_within_2(self) -> None:
        assert self.ranked(("ceiling", -62.0, 3.0), ("ceiling_offset", -60.5, 1.9)) == ["ceiling_offset", "ceiling"]

    def test_the_simpler_form_is_chosen_if_held_out_errors_are_similar(self) -> None:
        assert self.ranked(("ceiling_offset", -62.0, 0.6), ("ceiling", -60.5, 0.8)) == ["ceiling", "ceiling_offset"]

    def test_three_held_out_runs_are_too_few_to_choose_a_form(self) -> None:
        forms: tuple[tuple[FormName, float, float], ...] = (("ceiling", -62.0, 3.0), ("ceiling_offset", -60.5, 1.0))
        assert self.ranked(*forms, held=4) == ["ceiling_offset", "ceiling"]
        assert self.ranked(*forms, held=3) == ["ceiling", "ceiling_offset"]

    def test_only_saturating_forms_are_candidates_if_some_runs_are_saturated(self) -> None:
        forms: tuple[tuple[FormName, float, float], ...] = (("power", -70.0, 1.0), ("ceiling", -60.0, 3.0))
        assert self.ranked(*forms) == ["power", "ceiling"]
        assert self.ranked(*forms, saturated=1) == ["ceiling", "power"]


@pytest.mark.usefixtures("no_profiles")
class TestRunsLeftOut:
    def test_each_unusable_run_is_left_out_with_its_reason(self) -> None:
        odd = [
            Observation(2, 96, 13.6, 0.2, 0, "learned all"),
            Observation(2, 96, 13.6, 15.0, 0, "got worse"),
            Observation(2, 96, 13.6, 13.6, 0, "did not move"),
            Observation(2, 96, 13.6, math.nan, 0, "not a number"),
            Observation(2, 96, math.nan, 3.1, 0, "frozen model not a number"),
            Observation(2, 96, 13.6, 0.1, 0, "stopped early", finished=False),
        ]
        fit = published([*grid(), *odd])
        assert {run.source: run.reason for run in fit.left_out} == {
            "got worse": "not reduced",
            "did not move": "not reduced",
            "not a number": "diverged",
            "frozen model not a number": "without a frozen loss",
            "stopped early": "interrupted",
        }
        assert fit.left_out_counts == {
            "saturated": 1,
            "diverged": 1,
            "without a frozen loss": 1,
            "interrupted": 1,
            "not reduced": 2,
        }
        assert values(fit) == pytest.approx(TRUTH, rel=1e-9)


class TestRefusals:
    def refused(self, runs: list[Observation]) -> str:
        with pytest.raises(InputError) as caught:
            published(runs)
        message = str(caught.value)
        assert "\n" not in message
        return message

    def test_a_fit_without_runs_is_refused(self) -> None:
        assert self.refused([]) == (
            "0 of 0 runs (none left out) can be used (saturated: final loss <= ln 2); expected at least 5; "
            "add runs with longer targets or lower ranks"
        )

    def test_fewer_than_5_unsaturated_runs_are_refused(self) -> None:
        runs = [*grid((1, 2), (64, 128)), Observation(8, 64, 13.6, 0.1, 0, "a"), Observation(8, 32, 13.6, 20.0, 0, "b")]
        assert self.refused(runs) == (
            "4 of 6 runs (1 not reduced, 1 saturated) can be used (saturated: final loss <= ln 2); "
            "expected at least 5; add runs with longer targets or lower ranks"
        )

    def test_runs_of_a_single_rank_are_refused(self) -> None:
        message = self.refused(grid((4,), (64, 96, 128, 192, 256)))
        assert message.startswith("only rank 4 among the 5 of 5 runs (none left out) that can be used")

    def test_unsaturated_runs_of_a_single_length_are_refused(self) -> None:
        message = self.refused([*grid((1, 2, 4, 8, 16), (64,)), Observation(4, 32, 13.6, 0.1, 0, "s")])
        assert message.startswith("only length 64 among the 5 of 6 runs (1 saturated) that can be used")

    def test_ranks_and_lengths_that_rise_together_are_refused(self) -> None:
        runs = [run for n in range(5) for run in grid((2**n,), (64 * 2**n,))]
        assert "cannot separate the effect of rank from that of length" in self.refused(runs)

    def test_fewer_pairs_of_rank_and_length_than_parameters_are_refused(self) -> None:
        runs = [run for run in grid((1, 2), (64, 128)) if run.source != "r2-l128"]
        assert "expected at least 4 different pairs" in self.refused(runs * 3)

    def test_a_loss_reduction_that_does_not_vary_is_refused(self) -> None:
        runs = [Observation(c.rank, c.target_tokens, 13.6, 11.1, 0, c.source) for c in grid()]
        assert self.refused(runs).startswith("the loss reduction is 2.5 nats in all 16 runs")


class TestWarnings:
    def test_a_good_fit_has_no_warnings_unless_there_are_too_few_texts(self) -> None:
        runs = shifted(grid(), np.random.default_rng(0).normal(scale=0.02, size=16))
        # With a text for each run, the effect of a text cannot be mistaken for an effect of length.
        assert published(replace(run, text=run.source) for run in runs).warnings == []
        (only,) = published(runs).warnings
        assert only.startswith(
            "only 4 texts for 4 parameters: the effect of a text cannot be separated from that of its length"
        )

    def test_a_fit_of_runs_that_follow_a_logarithm_has_no_standard_errors_and_no_intervals(self) -> None:
        # A logarithm is the limit of the law for small exponents: a smaller alpha with a larger C always fits better.
        runs = [
            Observation(
                c.rank, c.target_tokens, 20.0, 12.0 - 1.5 * math.log(c.rank) + 1.0 * math.log(c.target_tokens), 0, ""
            )
            for c in grid()
        ]
        fit = published(runs)
        assert fit.warnings[0].startswith("C and b are not determined: dL = a0 + a1 ln r - a2 ln l")
        assert [fit.parameters[name].stderr for name in PARAMETERS] == [None] * 4
        assert [fit.parameters[name].interval for name in PARAMETERS] == [None] * 4
        assert fit.best.correlation is None
        assert "± ?" in fit.equation(errors=True)
        assert float(fit.predict(4, 128)) == pytest.approx(8 + 1.5 * math.log(4) - math.log(128), abs=0.05)
        assert LawFit.from_json(fit.to_json()) == fit

    def test_few_runs_for_the_number_of_parameters_cause_a_warning(self) -> None:
        runs = grid((1, 2, 4), (64, 128))
        assert any(w.startswith("only 6 unsaturated runs for 4 parameters") for w in published(runs).warnings)
        assert not any("runs for 4 parameters" in w for w in published(grid((1, 2, 4, 8), (64, 128))).warnings)

    def test_runs_of_only_two_lengths_cause_a_warning(self) -> None:
        found = published(grid((1, 2, 4, 8), (64, 128))).warnings
        assert any(w.startswith("only 2 lengths") for w in found)
        assert not any(w.startswith("only 2 ranks") for w in found)

    def test_parameters_that_trade_off_cause_a_warning(self) -> None:
        # A flat law on a narrow grid: the curvature that separates alpha from b hardly shows.
        noise = np.random.default_rng(0).normal(scale=0.005, size=9)
        fit = published(shifted(grid((2, 3, 4), (100, 150, 200), C=20.0, alpha=0.3, beta=0.3), noise))
        assert fit.best.correlation is not None
        alpha_b = fit.best.correlation[1][3]
        assert abs(alpha_b) > 0.98
        assert any("b trades off" in w and f"alpha {alpha_b:+.3f}" in w for w in fit.warnings)

    def test_a_standard_error_larger_than_the_value_causes_a_warning(self) -> None:
        noise = np.random.default_rng(0).normal(scale=0.1, size=16)
        # This noise puts b 0.108 nats too high; a standard error is 0.09.
        fit = published(shifted(grid(b=-0.1), noise))
        assert stderrs(fit)["b"] > abs(fit.parameters["b"].value)
        assert any(w.startswith("b is not determined") for w in fit.warnings)

    @pytest.mark.usefixtures("no_profiles")
    def test_runs_that_follow_no_law_cause_warnings(self) -> None:
        noise = np.random.default_rng(0).normal(scale=1.0, size=16)
        found = published(shifted(grid(C=0.001, b=5.0), noise)).warnings
        assert any("explains only part of the variation" in w for w in found)
        assert any("misses the measured loss reduction by" in w for w in found)

    def test_many_saturated_runs_do_not_hide_that_the_law_misses_the_others(self) -> None:
        fit = fit_law(saturating_runs(np.random.default_rng(0)), form="ceiling")
        full = [Observation(8 + i, 64, 13.0, 0.1, 0, f"full {i}") for i in range(40)]
        others = [Observation(1, 64 + 4 * i, 13.0, 13.0 - fallen, 0, f"{i}") for i, fallen in enumerate((4, 6) * 4)]
        # 0.4 % off where saturated, 20 % off elsewhere.
        predicted = [1.004 * one.loss_reduction for one in full] + [1.2 * one.loss_reduction for one in others]
        best = fit.best.model_copy(update={"predicted": predicted, "observations_used": 48, "mape_percent": 11.2 / 3})
        law = fit.model_copy(update={"fits": [best], "observations": [*full, *others]})
        # Mean 5: squared errors of 0.8 and 1.2 against deviations of 1.
        assert law.unsaturated_fit == pytest.approx((1 - (0.8**2 + 1.2**2) / 2, 20.0, 8))
        warnings = warnings_of(law)
        assert any("variation of the loss reduction (R2 -0.04 over the 8 unsaturated runs)" in w for w in warnings)
        assert any("by 20.0 % on average over the 8 unsaturated runs" in w for w in warnings)
        assert sentences(law)[1].startswith("R² -0.0400, mean error 20.00 % over the 8 unsaturated runs; R² ")
        titles = [axes.get_title() for axes in law_figure(law).axes]
        assert any("unsaturated runs: $R^2$ = -0.0400, MAPE = 20.0 %" in title for title in titles)

    def test_an_exponent_of_the_wrong_sign_causes_a_warning(self) -> None:
        found = published(grid(alpha=-0.5, beta=0.6)).warnings
        assert any(w.startswith("alpha is not positive") for w in found)
        assert not any(w.startswith("beta is not positive") for w in found)

    @pytest.mark.usefixtures("no_profiles")
    def test_a_jump_between_two_ranks_causes_a_warning(self) -> None:
        runs = [Observation(c.rank, c.target_tokens, 20.0, 14.0 if c.rank == 8 else 18.0, 0, c.source) for c in grid()]
        assert any("jumps between two ranks or lengths" in w for w in published(runs).warnings)
        assert not any("jumps" in w for w in published(grid()).warnings)

    def test_runs_on_several_corpora_cause_a_warning(self) -> None:
        fit = published(grid(), {"corpus": ["phonebook", "random_tokens"]})
        assert any("different corpora (phonebook, random_tokens)" in w for w in fit.warnings)


class TestJson:
    def test_a_fit_survives_a_round_trip_through_json(self) -> None:
        fit = published(
            [
                *shifted(grid(), np.random.default_rng(0).normal(scale=0.05, size=16)),
                Observation(2, 64, 9.0, math.nan, 1, "n"),
            ],
            {"backbone": "smollm2-135m", "block": [20]},
        )
        text = json.dumps(fit.to_json(), allow_nan=False)
        again = LawFit.from_json(text)
        assert again == fit == LawFit.from_json(fit.to_json())
        assert again.predict(3, 100) == fit.predict(3, 100)

    def test_the_content_lists_form_parameters_observations_and_runs_left_out(self) -> None:
        content = published([*grid(), Observation(8, 32, 13.6, 20.0, 3, "runs/s")]).to_json()
        assert content["schema_version"] == 6
        (form,) = content["fits"]
        assert form["form"] == content["form"] == "power_offset"
        assert form["parameters"]["alpha"]["value"] == pytest.approx(0.5)
        assert form["observations_used"] == len(form["predicted"]) == len(content["observations"]) == 16
        (left_out,) = content["left_out"]
        assert left_out == {"source": "runs/s", "reason": "not reduced"}

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"schema_version": 1}, "schema_version"),
            ({"schema_version": 4, "cells": [], "capacity": "rank"}, "schema_version: Input should be 6; fit it again"),
            ({"surprise": 1}, "surprise"),
            ({"form": "stored_bits"}, "form is stored_bits, but fits has power_offset"),
            ({"observations": []}, "power_offset: 16 predictions for 0 runs"),
        ],
    )
    def test_the_error_for_an_invalid_law_names_the_invalid_part(self, change: dict[str, Any], named: str) -> None:
        with pytest.raises(InputError, match="not a law of schema version 6") as caught:
            LawFit.from_json(published(grid()).to_json() | change)
        assert named in str(caught.value)

    def test_a_field_of_observations_that_earlier_versions_wrote_is_ignored(self) -> None:
        content = published(grid()).to_json()
        content["observations"][0]["learning_rate_left"] = 0.005
        assert LawFit.from_json(content) == published(grid())

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"r2": "high"}, "r2"),
            ({"parameters": {"C": {"value": 1.0}}}, "expected the parameters C, alpha, beta, b; got C"),
            ({"correlation": [[1.0]]}, "correlation: expected 4 rows of 4 numbers"),
        ],
    )
    def test_the_error_for_an_invalid_form_names_the_invalid_part(self, change: dict[str, Any], named: str) -> None:
        content = published(grid()).to_json()
        content["fits"][0] |= change
        with pytest.raises(InputError, match="not a law of schema version 6") as caught:
            LawFit.from_json(content)
        assert named in str(caught.value)

    def test_the_error_for_an_unreadable_file_names_it(self, tmp_path: Path) -> None:
        (tmp_path / "law.json").write_text("{")
        with pytest.raises(InputError, match=r"law\.json: not a law of schema version 6"):
            read_law(tmp_path / "law.json")
        with pytest.raises(InputError, match=r"none\.json: cannot be read \(No such file"):
            read_law(tmp_path / "none.json")


class TestNotebooks:
    def test_numpy_numbers_are_kept_as_plain_python_values(self) -> None:
        grid = [(r, tokens) for r in (1, 2, 4, 8) for tokens in (100, 200, 400)]
        runs = [
            Observation(
                np.int64(r),  # type: ignore[arg-type]
                float(tokens),  # type: ignore[arg-type]
                np.float64(13.0),
                np.float32(13.0 - 20 * r**0.5 / tokens**0.5),  # type: ignore[arg-type]
                0,
                f"r{r}l{tokens}",
                entropy_bits=math.nan,
                text=np.float64(tokens),  # type: ignore[arg-type]
            )
            for r, tokens in grid
        ]
        assert (runs[0].entropy_bits, runs[0].text) == (None, "100.0")
        law = fit_law(runs)
        assert LawFit.from_json(json.dumps(law.to_json())).observations == law.observations

    @pytest.mark.parametrize(
        "fields", [{"rank": 0}, {"rank": math.nan}, {"target_tokens": 2.5}, {"effective_parameters": -1}], ids=str
    )
    def test_a_size_that_is_not_a_positive_whole_number_is_refused(self, fields: dict[str, Any]) -> None:
        known = {"rank": 1, "target_tokens": 64, "initial_loss": 13.0, "final_loss": 1.0, "seed": 0, "source": "here"}
        (name,) = fields
        with pytest.raises(InputError, match=f"here: {name} is .*; expected a whole number of at least 1"):
            Observation(**{**known, **fields})  # type: ignore[arg-type]

    def test_an_unknown_form_is_refused(self) -> None:
        with pytest.raises(InputError, match="form is 'cubic'; expected one of power, power_offset"):
            fit_law([], form="cubic")  # type: ignore[arg-type]


class TestRecords:
    def test_observations_have_the_values_of_their_records(self) -> None:
        record = make_record(rank=2, target_tokens=96, initial_loss=13.0, final_loss=4.0, seed=7, status="interrupted")
        runs = observations_from_records({Path("runs/a"): record, Path("runs/b"): make_record(target_tokens=32)})
        assert runs[1] == Observation(
            2,
            96,
            13.0,
            4.0,
            7,
            "runs/a",
            finished=False,
            effective_parameters=4608,
            entropy_bits=997.4,
            text="0f1e2d3c",
            generated_token_accuracy=record.generated_token_accuracy,
            drawn_as='["random_tokens", {"seed": 0}]',
        )
        assert runs[0].finished

    @pytest.mark.parametrize(
        ("field", "other", "shown"),
        [
            ("method", "sft", "records of different method: memft (2 runs), sft (1 run)"),
            ("placement", ["down_proj"], "different placement: ['down_proj'] (1 run), mlp_block (2 runs)"),
            ("block", [24], "different block: [20] (2 runs), [24] (1 run)"),
            ("init", "peft", "different init: peft (1 run), published (2 runs)"),
            ("backbone_hash", "ffff", "b179c952 of smollm2-135m (2 runs), ffff of smollm2-135m (1 run)"),
        ],
    )
    def test_records_of_different_settings_are_refused_until_one_setting_is_selected(
        self, field: str, other: Any, shown: str
    ) -> None:
        records = {Path("a"): make_record(), Path("b"): make_record(), Path("c"): make_record(**{field: other})}
        with pytest.raises(InputError) as caught:
            observations_from_records(records)
        assert shown in str(caught.value)
        assert f"--where.{field} VALUE" in str(caught.value)
        assert len(observations_from_records(select_records(records, {field: other}))) == 1

    def test_the_same_backbone_under_two_names_is_one_backbone(self) -> None:
        records = {Path("a"): make_record(), Path("b"): make_record(backbone="models/smollm2")}
        assert len(observations_from_records(records)) == 2

    def test_the_setting_of_a_law_is_what_its_runs_share(self) -> None:
        records = {Path("a"): make_record(corpus="z"), Path("b"): make_record(rank=1, corpus="a")}
        assert shared_setting(records) == {
            "backbone": "smollm2-135m",
            "backbone_hash": "b179c952",
            "block": [20],
            "placement": "mlp_block",
            "init": "published",
            "method": "memft",
            "corpus": ["a", "z"],
        }

    @pytest.mark.parametrize(
        ("fields", "known"),
        [
            ({}, True),
            ({"corpus_settings": {"templates": 1}}, True),
            ({"corpus_settings": {"templates": 2}}, False),
            ({"corpus_settings": {"templates": ["Who is {name}?", "{name}?"]}}, False),
            ({"corpus_settings": {"templates": None}}, False),
            # 1000 bits minus 1 bit for each of 100 tokens.
            ({"memorized_bits": 900.5}, True),
            ({"memorized_bits": 901.5}, False),
            ({"memorized_bits": 0.0}, True),
            ({"memorized_bits": None}, True),
        ],
    )
    def test_stored_bits_are_unknown_if_several_prompts_ask_for_the_same_fact(
        self, fields: dict[str, Any], known: bool
    ) -> None:
        record = make_record(corpus_entropy_bits=1000.0, target_tokens=100, final_loss=math.log(2), **fields)
        (run,) = observations_from_records({Path("a"): record})
        assert run.stored_bits == (pytest.approx(900.0) if known else None)

    def test_an_empty_set_of_records_is_refused(self) -> None:
        with pytest.raises(InputError, match="no record: expected the records of at least 5 runs"):
            observations_from_records({})

    def test_where_selects_by_field_and_its_errors_list_the_existing_fields_and_values(self) -> None:
        records = {Path("a"): make_record(), Path("b"): make_record(block=[24])}
        assert list(select_records(records, {"block": 24})) == [Path("b")]
        assert list(select_records(records)) == [Path("a"), Path("b")]
        with pytest.raises(InputError, match=r"where: a record has no field 'blok'; its fields are .*block"):
            select_records(records, {"blok.x": 24})
        with pytest.raises(InputError, match=r"no record has block 3; there are \[20\] \(1 run\), \[24\] \(1 run\)"):
            select_records(records, {"block": 3})

    def test_where_selects_by_the_dotted_name_of_a_setting(self) -> None:
        records = {Path(str(r)): make_record(method_settings={"learning_rate": r}) for r in (0.1, 0.2)}
        assert list(select_records(records, {"method_settings.learning_rate": 0.2})) == [Path("0.2")]
        with pytest.raises(InputError, match=r"no record has method_settings.learning_rate 3; there are 0.1 \(1 run\)"):
            select_records(records, {"method_settings.learning_rate": 3})
        missing = (
            r"no record has a setting 'method_settings.lr'; those of method_settings are method_settings.learning_ra"
        )
        with pytest.raises(InputError, match=missing):
            select_records(records, {"method_settings.lr": 3})

    def test_the_setting_of_a_law_lists_pooled_settings_other_than_the_size(self) -> None:
        settings = [{"learning_rate": 0.1}, {"learning_rate": 0.2}]
        records = {Path(str(i)): make_record(method_settings=settings[i], block=[i]) for i in range(2)}
        # The blocks of a law by effective parameters are meant to differ.
        shared = shared_setting(records, "effective_parameters")
        assert shared["pooled"] == {"method_settings.learning_rate": [0.1, 0.2]}
        alike = {path: make_record(rank=i + 1) for i, path in enumerate(records)}
        assert "pooled" not in shared_setting(alike)
        corpora = {path: make_record(corpus=str(path), corpus_settings={"x": str(path)}) for path in records}
        assert "pooled" not in shared_setting(corpora)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder of 16 runs, 3 of them saturated, with 1 % noise."""
    generator = np.random.default_rng(0)
    for run in grid(initial=13.6, C=90.0):
        final = run.final_loss if saturated(run) else run.final_loss + 0.01 * generator.normal()
        write_run(
            tmp_path / "runs" / run.source,
            rank=run.rank,
            target_tokens=run.target_tokens,
            initial_loss=13.6,
            final_loss=final,
            corpus_hash=run.source,
            corpus_settings={"length": run.target_tokens, "seed": run.rank},
        )
    return tmp_path / "runs"


def law(*arguments: object) -> int:
    """`pml law` with these arguments, through the command's own functions."""
    parser = jsonargparse.ArgumentParser()
    command.configure(parser)
    return command.run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.mark.usefixtures("no_profiles")
class TestCommand:
    def test_law_prints_the_law_and_writes_it_with_a_figure(
        self, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert law(runs, "--form", "power_offset", "--out", tmp_path / "out") == 0
        fit = read_law(tmp_path / "out" / "law.json")
        printed = capsys.readouterr().out
        assert printed.startswith(fit.equation() + "\n")
        assert fit.equation(errors=True).removeprefix("dL = ") in printed
        assert f"R² {fit.best.r2:.4f}, mean error {fit.best.mape_percent:.2f} %" in printed
        assert "over the 13 runs fitted (left out: 3 saturated)" in printed
        assert f"{tmp_path / 'out' / 'law.json'}, {tmp_path / 'out' / 'law.png'}" in printed
        assert (tmp_path / "out" / "law.png").read_bytes().startswith(b"\x89PNG")
        assert fit.setting["method"] == "memft"
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["law.json", "law.png"]

    def test_runs_of_different_placements_have_one_law_by_effective_parameters(self, tmp_path: Path) -> None:
        for placement, per_rank in ("mlp_block", 1152), (["down_proj"], 2112):
            for rank in (1, 2, 3):
                for length in (256, 512):
                    left = 13.6 - 0.2 * (per_rank * rank) ** 0.5 * (256 / length) ** 0.5
                    fields = {"placement": placement, "effective_parameters": per_rank * rank, "final_loss": left}
                    name = f"{per_rank}-{rank}-{length}"
                    write_run(tmp_path / "runs" / name, rank=rank, target_tokens=length, initial_loss=13.6, **fields)
        assert law(tmp_path / "runs", "--by", "effective_parameters", "--out", tmp_path / "out") == 0
        assert read_law(tmp_path / "out" / "law.json").parameters_per_rank is None
        assert (tmp_path / "out" / "law.png").read_bytes().startswith(b"\x89PNG")

    def test_warnings_are_printed(self, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
        law(runs, "--where.corpus", "random_tokens")
        assert "warning:" not in capsys.readouterr().out
        write_run(runs / "other", corpus="phonebook", rank=2, target_tokens=96, final_loss=4.0)
        law(runs)
        assert "warning: the runs used different corpora" in capsys.readouterr().out

    def test_a_run_with_damaged_per_token_results_is_named_and_left_out_of_the_recall_model(
        self, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        damaged = runs / "r1-l64" / "tokens.parquet"
        damaged.write_bytes(b"no table")
        assert law(runs, "--out", tmp_path / "out") == 0
        said = f"the recall model leaves out a run: {damaged}: "
        assert f"warning: {said}" in capsys.readouterr().out
        assert [warning for warning in read_law(tmp_path / "out" / "law.json").warnings if warning.startswith(said)]

    def test_runs_of_several_learning_rates_cause_a_warning_until_one_is_selected(
        self, runs: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        settings = make_record().method_settings
        other = {"rank": 2, "target_tokens": 96, "final_loss": 4.0, "method_settings": {**settings, "lr": 0.5}}
        write_run(runs / "other", **other)
        law(runs)
        warning = "warning: the runs differ in more than rank, length and seed: method_settings.lr (0.1, 0.5); "
        printed = capsys.readouterr().out
        assert warning in printed
        assert "(--where.method_settings.lr VALUE)" in printed
        law(runs, "--where.method_settings.lr", 0.1)
        assert "differ in more than" not in capsys.readouterr().out

    def test_the_output_fits_on_one_screen_and_details_adds_forms_and_runs(
        self, runs: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        law(runs)
        short = capsys.readouterr().out
        assert len(short.splitlines()) <= 24
        assert "held-out prediction from smaller runs: rank >= 8 off by" in short
        assert "length >= 512 off by" in short
        law(runs, "--form", "power_offset", "--details")
        printed = capsys.readouterr().out
        assert "Forms of the law" in printed
        observed = [line.split() for line in printed.splitlines() if line.split()[:3] == ["64", "1", "0"]]
        # dL = 90 * 64^-0.6 + 0.3 with 1 % noise
        assert float(observed[0][3]) == pytest.approx(90 * 64**-0.6 + 0.3, abs=0.05)
        assert float(observed[0][4]) == pytest.approx(90 * 64**-0.6 + 0.3, abs=0.05)

    def test_nothing_is_written_without_out(
        self, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        before = sorted(tmp_path.rglob("*"))
        assert law(runs) == 0
        assert sorted(tmp_path.rglob("*")) == before
        assert "written" not in capsys.readouterr().out

    def test_json_prints_only_the_file_and_another_law_is_overwritten_only_with_overwrite(
        self, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "out"
        assert law(runs, "--out", out) == 0
        capsys.readouterr()
        assert law(runs, "--out", out, "--json") == 0
        captured = capsys.readouterr()
        assert captured.out == (out / "law.json").read_text(encoding="utf-8")
        assert captured.err == ""
        before = {path: path.read_bytes() for path in out.iterdir()}
        write_run(runs / "more", rank=2, target_tokens=96, final_loss=4.0)
        with pytest.raises(InputError, match=r"law\.json: holds another law; give another --out, or --overwrite"):
            law(runs, "--out", out)
        assert {path: path.read_bytes() for path in out.iterdir()} == before
        assert law(runs, "--out", out, "--overwrite") == 0
        assert len(read_law(out / "law.json").observations) == 17

    def test_where_selects_the_runs(self, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write_run(runs / "sft", method="sft")
        with pytest.raises(InputError, match="records of different method"):
            law(runs)
        assert law(runs, "--where.method", "memft", "--json") == 0
        assert len(json.loads(capsys.readouterr().out)["observations"]) == 16

    def test_an_out_that_is_a_file_is_refused(self, runs: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        with pytest.raises(InputError, match=r"--out .*file: cannot be written .*choose another folder"):
            law(runs, "--out", tmp_path / "file")

    def test_nothing_is_written_for_too_few_runs(self, runs: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"1 of 1 runs \(none left out\) can be used"):
            law(runs / "r1-l64", "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists()
