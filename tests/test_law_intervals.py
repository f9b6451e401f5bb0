"""How far a fitted law can be trusted: its noise, weights, intervals, texts, criteria and held-out errors."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import approx_fprime
from scipy.stats import t
from simulated_laws import (
    HIGH_LOSS,
    TRUTH,
    fit_one,
    grid,
    law_of,
    published,
    run,
    runs_with_texts,
    saturating_runs,
)

from pml.errors import InputError
from pml.figures import law_figure
from pml.law import FORMS, FormName, LawFit, Observation, fit_law, saturated
from pml.law.data import make_data, weights
from pml.law.intervals import Noise, bootstrap, choose_groups, noise_of, standard_errors, t_quantile
from pml.law.least_squares import solve, to_theta
from pml.law.selection import aicc, held_out_error
from pml.law.texts import collect_texts
from pml.plan import outcome_of_rank


class TestNoise:
    """Noise of residuals around a law that predicts 1 nat everywhere."""

    @staticmethod
    def of(by_point: list[list[float]], nvarys: int, saturated_runs: int = 0) -> tuple[float, float, int]:
        runs = [run(i + 1, 64, 1.0 + r, seed) for i, seeds in enumerate(by_point) for seed, r in enumerate(seeds)]
        runs += [Observation(9, 60 + n, 13.0, 0.01, 0, f"s{n}") for n in range(saturated_runs)]
        data = replace(make_data(runs, "rank"), root_weights=np.ones(len(runs)))
        found = noise_of(data.measured - 1.0, data, "grid_point", nvarys)
        return found.of_a_run, found.of_the_fit, found.degrees_of_freedom

    def test_with_one_seed_per_grid_point_noise_is_the_standard_deviation_of_residuals(self) -> None:
        # (1 + 4 + 9 + 16) / (4 - 1) = 10
        found = self.of([[1.0], [-2.0], [3.0], [-4.0]], nvarys=1)
        assert found == pytest.approx((math.sqrt(10), math.sqrt(10), 3))

    def test_with_several_seeds_the_noise_of_the_fit_is_that_of_the_means_of_grid_points(self) -> None:
        # Means 2, -2, 1: 2 (4 + 4 + 1) / (3 - 1) = 9. Within: (2 + 2 + 2) / (6 - 3) = 2. Between: (9 - 2) / 2 = 3.5.
        found = self.of([[1.0, 3.0], [-1.0, -3.0], [0.0, 2.0]], nvarys=1)
        assert found == pytest.approx((math.sqrt(2 + 3.5), 3.0, 2))

    def test_with_no_more_grid_points_than_parameters_noise_is_estimated_from_single_runs(self) -> None:
        # (1 + 1 + 4 + 4) / (4 - 2) = 5
        found = self.of([[1.0, -1.0], [2.0, -2.0]], nvarys=2)
        assert found == pytest.approx((math.sqrt(5), math.sqrt(5), 2))

    def test_saturated_runs_do_not_affect_the_noise(self) -> None:
        points = [[1.0], [-2.0], [3.0], [-4.0]]
        assert self.of(points, nvarys=1, saturated_runs=2) == pytest.approx(self.of(points, nvarys=1))

    def test_the_noise_of_a_saturating_form_is_that_of_runs_below_the_ceiling(self) -> None:
        fit = fit_one(saturating_runs(np.random.default_rng(0)), "ceiling")
        below = [
            run.loss_reduction - predicted
            for run, predicted in zip(fit.observations, fit.best.predicted, strict=True)
            if not saturated(run)
        ]
        assert len(below) < len(fit.observations)
        assert fit.best.degrees_of_freedom == len(below) - 4
        # The noise is that of the power term; the nearer a loss is to the ceiling, the less it shows of it.
        form, points = FORMS["ceiling"], make_data(fit.observations, "rank").points
        shown = form.sensitivity(fit.best.values, points)[[not saturated(run) for run in fit.observations]]
        of_losses = math.sqrt(sum(x * x for x in below) / (len(below) - 4))
        assert fit.best.noise_nats == pytest.approx(of_losses / math.sqrt(np.mean(shown**2)))

    def test_the_noise_of_the_power_term_is_recovered_although_the_ceiling_hides_part_of_it(self) -> None:
        random = np.random.default_rng(0)
        found = [fit_one(saturating_runs(random, spread=0.1), "ceiling").best.noise_nats for _ in range(20)]
        # A standard deviation from some ten runs is accurate to a fifth, the mean of twenty to a twentieth.
        assert np.mean(found) == pytest.approx(0.1, rel=0.1)

    def test_the_noise_at_the_ceiling_excludes_saturated_runs_that_are_still_approaching_it(self) -> None:
        fit = fit_one(saturating_runs(np.random.default_rng(0)), "ceiling")
        reach = FORMS["ceiling"].sensitivity(fit.best.values, make_data(fit.observations, "rank").points)
        pairs = zip(fit.observations, fit.best.predicted, reach, strict=True)
        missed = [(run.loss_reduction - p, f) for run, p, f in pairs if saturated(run)]
        there = [error for error, f in missed if f < 0.05]
        assert 0 < len(there) < len(missed)
        assert fit.best.noise_at_ceiling_nats == pytest.approx(math.sqrt(np.mean(np.square(there))))


class TestWeights:
    def test_replicates_are_weighted_by_their_variance_shrunk_towards_the_pooled_variance(self) -> None:
        # Variances 2 and 8 with 1 degree of freedom, pooled 5: (4 + 1) 5 / (4 * 5 + 2) and (4 + 1) 5 / (4 * 5 + 8).
        runs = [run(1, 64, 5.0), run(1, 64, 7.0, 1), run(2, 64, 9.0), run(2, 64, 13.0, 1), run(4, 64, 20.0)]
        assert weights(runs) == pytest.approx([25 / 22, 25 / 22, 25 / 28, 25 / 28, 1.0])

    def test_a_law_follows_grid_points_more_closely_if_their_seeds_agree(self) -> None:
        # Rank 4 is 0.6 nats above the law. Its seeds agree and those of the others are far apart, or the reverse.
        truth = {
            size: law_of(*size) + (0.6 if size[0] == 4 else 0.0) for size in itertools.product((1, 2, 4), (64, 256))
        }
        missed = []
        for of_rank_4, of_others in ((0.01, 1.0), (1.0, 0.01)):
            spread = {size: of_rank_4 if size[0] == 4 else of_others for size in truth}
            runs = [run(*size, truth[size] + sign * spread[size], sign) for size in truth for sign in (-1, 1)]
            missed.append(np.mean([abs(float(published(runs).predict(*s)) - truth[s]) for s in truth if s[0] == 4]))
        assert missed[0] < 0.8 * missed[1]

    def test_runs_of_one_rank_with_different_numbers_of_parameters_are_not_replicates(self) -> None:
        runs = [replace(run(1, 64, 5.0 + seed, seed), effective_parameters=100 + seed) for seed in range(4)]
        runs += [replace(run(2, 64, 9.0 + 3 * seed, seed), effective_parameters=200 + seed) for seed in range(4)]
        assert weights(runs) == pytest.approx([1.0] * 8)


class TestIntervals:
    def test_identical_seeds_of_a_grid_point_do_not_narrow_the_intervals_of_parameters(self) -> None:
        # The seeds of a grid point share its error and have none of their own, so they add no information.
        one = grid(np.random.default_rng(1), of_point=0.05)
        five = [replace(run, seed=seed) for run in one for seed in range(5)]
        for name in TRUTH:
            alone, replicated = published(one).parameters[name], published(five).parameters[name]
            assert replicated.stderr == pytest.approx(alone.stderr, rel=1e-6)
            # The tolerance of refits is far below the spread of the draws.
            assert replicated.bootstrap == pytest.approx(alone.bootstrap, rel=1e-3)
            assert replicated.profile == pytest.approx(alone.profile, rel=1e-3)

    def test_profile_intervals_equal_those_of_student_s_t_if_the_law_is_nearly_linear(self) -> None:
        # With noise of a few 1e-4 of the reductions the law is nearly linear; nine runs and three parameters.
        fit = fit_one(grid(np.random.default_rng(1), of_point=0.001), "power")
        for name, estimate in fit.parameters.items():
            assert estimate.stderr is not None
            assert estimate.profile is not None, name
            assert np.ptp(estimate.profile) == pytest.approx(2 * t_quantile(9 - 3) * estimate.stderr, rel=0.02)

    def test_doubling_all_weights_does_not_change_the_bootstrap_draws(self) -> None:
        form, data = FORMS["power"], make_data(grid(np.random.default_rng(1), of_point=0.05), "rank")
        solution = solve(form, data)
        assert solution is not None
        heavier = replace(solution, data=replace(data, root_weights=2 * data.root_weights))
        draws, same = (bootstrap(one, "grid_point") for one in (solution, heavier))
        assert draws.std(axis=0).min() > 0
        np.testing.assert_allclose(same, draws, rtol=1e-5, atol=1e-7)

    def test_no_bootstrap_draw_has_a_sharpness_outside_its_range(self) -> None:
        # The bend is so sharp that runs with this much noise hardly determine how sharp.
        form, data = FORMS["ceiling"], make_data(saturating_runs(np.random.default_rng(1), 0.3, sharpness=24.0), "rank")
        solution = solve(form, data)
        assert solution is not None
        sharpness = np.exp(bootstrap(solution, "grid_point")[:, form.fitted.index("sharpness")])
        assert sharpness.min() >= 0.5 * (1 - 1e-9)
        assert sharpness.max() == pytest.approx(32)

    def test_standard_errors_match_those_of_a_finite_difference_jacobian(self) -> None:
        # The parameters are positive, and their standard errors are on the natural scale.
        runs = [
            replace(r, effective_parameters=1000 * r.rank, entropy_bits=13.0 / math.log(2) * r.target_tokens)
            for r in saturating_runs(np.random.default_rng(0))
        ]
        form, data = FORMS["stored_bits"], make_data(runs, "rank")
        solution = solve(form, data)
        assert solution is not None
        result = standard_errors(solution, Noise(0.1, 0.1, 18))
        assert result is not None
        at = np.array([solution.values[name] for name in form.fitted])
        jacobian = approx_fprime(at, lambda v: form.evaluate(dict(zip(form.fitted, v, strict=True)), data.points), 1e-7)
        expected = 0.1 * np.sqrt(np.diag(np.linalg.inv(jacobian.T @ jacobian)))
        assert [result.params[name].stderr for name in form.fitted] == pytest.approx(expected, rel=1e-3)

    def test_the_interval_of_a_new_run_includes_its_noise_but_hardly_any_at_the_ceiling(self) -> None:
        fit = fit_one(saturating_runs(np.random.default_rng(0)), "ceiling")
        ranks, lengths = np.array([1, 64]), 216
        of_the_mean = np.ptp(np.percentile(fit.predict_draws(ranks, lengths), (2.5, 97.5), axis=0), axis=0)
        of_a_run = np.percentile(fit.new_run_draws(ranks, lengths).loss_reduction[:, 0], (2.5, 97.5), axis=0)
        noise = 2 * t_quantile(fit.best.degrees_of_freedom) * fit.best.noise_nats
        # 500 draws give a percentile to within several per cent.
        below, above = np.ptp(of_a_run, axis=0)
        assert below == pytest.approx(math.hypot(noise, of_the_mean[0]), rel=0.1)
        assert above < 0.3 * noise

    def test_the_bootstrap_interval_of_a_sharpness_stays_within_its_range(self) -> None:
        fit = fit_one(saturating_runs(np.random.default_rng(0), spread=0.6), "ceiling")
        interval = fit.parameters["sharpness"].bootstrap
        assert interval is not None
        assert 0.5 * (1 - 1e-9) <= interval[0] < interval[1] <= 32 * (1 + 1e-9)


@pytest.mark.usefixtures("no_profiles")
class TestTexts:
    def test_initial_losses_of_texts_scatter_around_a_line_in_the_logarithm_of_the_length(self) -> None:
        # 13 + 0.5 log2(l / 64), and a pattern (1, -1, -1, 1) that no line through four even steps explains.
        runs = [
            run(rank, 64 * 2**i, 5.0 + rank - i, initial=13.0 + 0.5 * i + 0.2 * sign)
            for rank in (1, 2, 4)
            for i, sign in enumerate((1, -1, -1, 1))
        ]
        law = published(runs)
        # Four residuals of 0.2 with two degrees of freedom.
        assert law.text_spread == pytest.approx(math.sqrt(4 * 0.04 / 2))
        assert law.initial_loss([32, 64, 128, 4096]) == pytest.approx([13.0, 13.0, 13.5, 14.5])

    def test_initial_losses_of_texts_of_one_length_scatter_around_their_mean(self) -> None:
        texts = collect_texts([run(1, 64, 5.0, seed, initial=13.0 + 0.1 * seed) for seed in range(5)])
        assert texts.spread == pytest.approx(math.sqrt(0.1 / 4))
        assert texts.t_over_z == pytest.approx(float(t.ppf(0.975, 4)) / 1.959964)
        assert texts.expected_initial_loss(640) == pytest.approx(13.2)
        # The standard error of a mean of five.
        assert texts.standard_error(640) == pytest.approx(math.sqrt(0.1 / 4 / 5))

    def test_texts_of_one_length_have_no_slope_however_many_runs_each_has(self) -> None:
        # The mean of five times ln 100 is not ln 100 in floats.
        runs = [
            replace(run(r, 100, 5.0, initial=13.0 + 0.1 * i), text=f"{i}") for i in range(4) for r in range(1, 6 - i)
        ]
        assert collect_texts(runs).degrees_of_freedom == 3

    def test_the_standard_error_of_the_line_is_smallest_in_the_middle(self) -> None:
        signs = ((64, 1), (128, -1), (256, -1), (512, 1))
        texts = collect_texts([run(1, length, 5.0, initial=13.0 + 0.2 * sign) for length, sign in signs])
        # Half the spread of four texts in the middle, more at the ends: 1.5 steps away, squared steps sum to 5.
        middle, end, beyond = texts.standard_error([math.sqrt(64 * 512), 512, 4096])
        assert middle == pytest.approx(texts.spread / 2)
        assert end == pytest.approx(texts.spread * math.sqrt(1 / 4 + 1.5**2 / 5))
        assert beyond == pytest.approx(end)

    def test_a_text_is_identified_by_its_hash_or_without_one_by_its_initial_loss(self) -> None:
        same_loss = [run(rank, 64, 5.0, seed, initial=13.0) for rank in (1, 2) for seed in (0, 1)]
        assert collect_texts(same_loss).of_run.tolist() == [0, 0, 0, 0]
        named = [replace(run, text=f"text {run.seed}") for run in same_loss]
        assert collect_texts(named).of_run.tolist() == [0, 1, 0, 1]

    def test_longer_texts_scatter_less_because_their_loss_is_a_mean_over_more_tokens(self) -> None:
        # 0.2 from a flat line at 64 tokens, half of that at 256: lengths times squares sum to 2 * 5.12, of 2 degrees.
        scatter = ((64, 0.2), (64, -0.2), (256, 0.1), (256, -0.1))
        texts = collect_texts([run(1, length, 5.0, i, initial=13.0 + by) for i, (length, by) in enumerate(scatter)])
        # Beyond the longest text the scatter is held constant.
        assert texts.spread_at([16, 64, 256, 1024]) == pytest.approx(np.sqrt(5.12 / np.array([16, 64, 256, 256])))

    def test_a_law_with_a_text_effect_warns_if_longer_texts_begin_with_shorter_ones(self) -> None:
        runs = runs_with_texts(np.random.default_rng(0), effect=1.0)
        independent = [replace(run, drawn_as=f"{run.seed} {run.target_tokens}") for run in runs]
        nested = [replace(run, drawn_as=f"{run.seed}") for run in runs]
        said = "the 8 texts come from 2 seeds or sources, so longer ones begin with shorter ones"
        for these, named in ((runs, False), (independent, False), (nested, True)):
            law = published(these)
            assert law.best.text_effect > 0
            assert any(warning.startswith(said) for warning in law.warnings) is named

    def test_with_three_texts_the_text_effect_is_zero_and_the_law_warns(self) -> None:
        law = published([run(r, 64 * 2**i, 5.0 + r - i, initial=13.0 + i % 2) for r in (1, 2, 4) for i in range(3)])
        assert (law.text_spread, law.best.text_effect) == (0.0, 0.0)
        said = "only 3 texts for 4 parameters: the effect of a text cannot be separated from that of its length"
        assert any(warning.startswith(said) and "--initial_loss" in warning for warning in law.warnings)

    def test_the_effect_of_a_text_is_regressed_on_its_initial_loss_residual(self) -> None:
        # Five texts of one length, -0.2 to 0.2 from the line. Runs show 0.7 of it, half that half-way to the ceiling.
        texts = collect_texts([run(1, 64, 5.0, seed, initial=13.0 + 0.1 * seed) for seed in range(5)])
        reach = np.array([1.0, 0.5, 1.0, 0.5, 1.0])
        assert texts.effect(0.7 * reach * texts.initial_loss_residuals, reach, np.arange(5)) == pytest.approx(0.7)

    def test_a_text_effect_that_is_not_significant_is_zero(self) -> None:
        # (-3, 1, 1, 1) / 4 from the line, slope 0.3: residuals (0, d, -d, 0) have a standard error of d sqrt(1 / 0.75).
        texts = collect_texts([replace(run(1, 64, 5.0, initial=13.0 + min(i, 1)), text=f"text {i}") for i in range(4)])
        pattern = np.array([0.0, 1.0, -1.0, 0.0])
        for size, expected in ((0.3 / 4.4, 0.0), (0.3 / 6.0, 0.3)):
            # Student's t of 2 degrees of freedom is 4.303, and 0.3 / (size / sqrt(0.75)) is 3.8 and 5.2.
            found = texts.effect(0.3 * texts.initial_loss_residuals + size * pattern, np.ones(4), np.arange(4))
            assert found == pytest.approx(expected)

    def test_runs_are_grouped_by_text_if_texts_differ_and_otherwise_by_grid_point(self) -> None:
        noise = np.random.default_rng(0)
        differing = published(runs_with_texts(noise, effect=1.0))
        assert (differing.best.grouped_by, differing.best.degrees_of_freedom) == ("text", 8 - 4)
        off = {size: 0.3 * noise.normal() for size in itertools.product((1, 2, 4, 8), (64, 96, 144, 216))}
        alike = [
            run(*size, law_of(*size) + off[size] + 0.01 * noise.normal(), seed, HIGH_LOSS + 0.01 * seed)
            for size in off
            for seed in range(3)
        ]
        best = published(alike).best
        assert (best.grouped_by, best.degrees_of_freedom) == ("grid_point", 16 - 4)

    @pytest.mark.parametrize(("of_text", "chosen"), [(2.0, "grid_point"), (2.5, "text")])
    def test_runs_are_grouped_by_whichever_gives_the_larger_widened_standard_deviation(
        self, of_text: float, chosen: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Draws have a variance of 2 or 2.5 by text and 1 by grid point, which few degrees of freedom widen by 1.5**2.
        solution = solve(FORMS["power"], make_data(runs_with_texts(np.random.default_rng(0), effect=1.0), "rank"))
        assert solution is not None
        at, step = to_theta(solution.form, solution.values), np.array([1e-6, 0.0, 0.0])
        draws = {"text": math.sqrt(of_text), "grid_point": 1.0}
        monkeypatch.setattr(
            "pml.law.intervals.bootstrap", lambda _, by: np.array([at - draws[by] * step, at + draws[by] * step])
        )
        by_text = noise_of(solution.residual, solution.data, "text", 3).degrees_of_freedom
        monkeypatch.setattr("pml.law.intervals.t_over_z", lambda degrees: 1.0 if degrees == by_text else 1.5)
        assert choose_groups(solution) == chosen

    def test_the_effect_of_a_text_of_another_kind_is_limited(self) -> None:
        fit = published(runs_with_texts(np.random.default_rng(0), effect=1.0))
        law = fit.model_copy(update={"fits": [fit.best.model_copy(update={"text_effect": 0.5})]})
        usual = float(law.initial_loss(64))
        at, further, far = (float(law.predict(4, 64, initial_loss=loss)) for loss in (usual, 0.9 * usual, 0.8 * usual))
        assert further == pytest.approx(at - 0.5 * 0.1 * usual)
        assert far == pytest.approx(further)


@pytest.mark.usefixtures("no_profiles")
class TestCriteria:
    @pytest.mark.parametrize("name", ["power_offset", "ceiling"])
    def test_aicc_counts_only_unsaturated_runs_whether_or_not_the_form_saturates(self, name: FormName) -> None:
        law = fit_law(saturating_runs(np.random.default_rng(0)))
        fit = law.fit_of(name)
        squares = [
            (run.loss_reduction - predicted) ** 2
            for run, predicted in zip(law.observations, fit.predicted, strict=True)
            if not saturated(run)
        ]
        n, p = len(squares), len(fit.free) + 1
        assert n < len(law.observations)
        expected = n * math.log(sum(squares) / n) + 2 * p + 2 * p * (p + 1) / (n - p - 1)
        assert fit.aicc == pytest.approx(expected, rel=1e-9)

    def test_the_aicc_of_a_perfect_fit_assumes_residuals_of_float32_rounding(self) -> None:
        data = make_data(grid(np.random.default_rng(0)), "rank")
        # Nine grid points, three parameters and the variance.
        expected = 9 * math.log(1e-12) + 2 * 4 + 2 * 4 * 5 / (9 - 4 - 1)
        assert aicc(data, data.measured, 3) == pytest.approx(expected)

    def test_identical_seeds_of_a_grid_point_do_not_change_differences_in_aicc(self) -> None:
        # All seeds have the loss of the single seed of the first grid.
        runs = saturating_runs(np.random.default_rng(0))
        once, three_times = fit_law(runs), fit_law([replace(r, seed=seed) for r in runs for seed in range(3)])
        assert {fit.form for fit in once.fits} >= {"power_offset", "ceiling", "ceiling_offset"}
        apart = [
            {fit.form: (fit.aicc or math.nan) - (law.fit_of("ceiling").aicc or math.nan) for fit in law.fits}
            for law in (once, three_times)
        ]
        # With each seed counted all differences would be three times as large.
        assert apart[0] == pytest.approx(apart[1], rel=0.02)

    def test_with_too_few_grid_points_for_aicc_the_simplest_saturating_form_is_chosen(self) -> None:
        noise, form, runs = np.random.default_rng(0), FORMS["stored_bits"], []
        for rank, length, seed in itertools.product((1, 2, 5), (72, 76, 120), range(4)):
            empty = replace(run(rank, length, 0.0, seed, initial=13.0), effective_parameters=1000 * rank)
            empty = replace(empty, entropy_bits=15.0 * length)
            values = {"bits_per_parameter": 0.8, "sharpness": 4.0}
            reduction = float(form.evaluate(values, make_data([empty], "rank").points)[0])
            spread = 0.05 if 13.0 - reduction > math.log(2) else 0.001
            runs.append(replace(empty, final_loss=13.0 - reduction + spread * noise.normal()))
        law = fit_law(runs)
        assert len({r.grid_point for r in runs if not saturated(r)}) == 4
        assert {fit.form for fit in law.fits} >= {"power_offset", "ceiling", "stored_bits"}
        assert all(fit.aicc is None for fit in law.fits)
        assert law.form == "stored_bits"
        assert "too few grid points for AICc" in law.chosen_because

    def test_r2_over_all_runs_caps_predictions_at_the_initial_loss(self) -> None:
        law = fit_law(saturating_runs(np.random.default_rng(0)))
        fit = law.fit_of("power_offset")
        measured = np.array([run.loss_reduction for run in law.observations])
        cut = np.minimum(fit.predicted, 13.0)
        assert (np.array(fit.predicted) > 13.0).any()
        expected = 1 - np.sum((measured - cut) ** 2) / np.sum((measured - measured.mean()) ** 2)
        assert fit.r2_all == pytest.approx(float(expected), rel=1e-9)
        assert fit.r2_all != pytest.approx(fit.r2, rel=1e-6)


@pytest.mark.usefixtures("no_profiles")
class TestHeldOut:
    def test_the_largest_length_is_predicted_from_the_others(self) -> None:
        runs = grid(np.random.default_rng(4), ranks=(1, 2, 4, 8), of_point=0.2)
        fit = published(runs)
        rest = published([run for run in runs if run.target_tokens < 256])
        missed = [abs(float(rest.predict(r.rank, 256)) / r.loss_reduction - 1) for r in runs if r.target_tokens == 256]
        held = fit.best.largest("target_tokens")
        assert held is not None
        assert (held.value, held.runs) == (256, 4)
        assert held.mape_percent == pytest.approx(100 * float(np.mean(missed)), rel=1e-5)
        assert held.mape_percent > 0.5

    def test_no_length_is_held_out_if_there_are_only_two(self) -> None:
        fit = published(grid(np.random.default_rng(4), lengths=(64, 256), of_point=0.2)).best
        assert fit.largest("rank") is not None
        assert fit.largest("target_tokens") is None

    def test_held_out_replicates_do_not_affect_the_weights_of_the_others(self) -> None:
        # The seeds of the largest length are far apart, which would make the others' spreads look alike.
        noise, runs = np.random.default_rng(4), []
        for rank, length in itertools.product((1, 2, 4, 8), (64, 128, 256)):
            spread = 1.0 if length == 256 else 0.2 / rank
            runs += [run(rank, length, law_of(rank, length) + spread * noise.normal(), seed) for seed in range(3)]
        rest = published([run for run in runs if run.target_tokens < 256])
        missed = [abs(float(rest.predict(r.rank, 256)) / r.loss_reduction - 1) for r in runs if r.target_tokens == 256]
        held = published(runs).best.largest("target_tokens")
        assert held is not None
        assert held.mape_percent == pytest.approx(100 * float(np.mean(missed)), rel=1e-5)

    def test_saturated_runs_above_the_largest_unsaturated_rank_are_held_out_with_it(self) -> None:
        runs = [r for r in saturating_runs(np.random.default_rng(0)) if not (r.rank == 6 and r.target_tokens > 144)]
        largest = max(r.rank for r in runs if not saturated(r))
        assert any(r.rank > largest for r in runs)
        held = fit_one(runs, "ceiling").best.largest("rank")
        assert held is not None
        assert held.value == largest
        rest = fit_one([r for r in runs if r.rank < largest], "ceiling")
        there = [r for r in runs if r.rank == largest and not saturated(r)]
        predicted = FORMS["ceiling"].evaluate(rest.best.values, make_data(there, "rank").points)
        missed = np.abs(predicted / [r.loss_reduction for r in there] - 1)
        assert held.runs == len(there)
        assert held.mape_percent == pytest.approx(100 * float(missed.mean()), rel=1e-4)

    def test_the_held_out_error_averages_those_of_rank_and_length_over_their_runs(self) -> None:
        fit = published(grid(np.random.default_rng(4), ranks=(1, 2, 4, 8), of_point=0.2)).best
        by_rank, by_length = fit.largest("rank"), fit.largest("target_tokens")
        assert by_rank is not None
        assert by_length is not None
        assert by_rank.mape_percent is not None
        assert by_length.mape_percent is not None
        expected = (3 * by_rank.mape_percent + 4 * by_length.mape_percent) / 7
        assert held_out_error(fit) == pytest.approx(expected)


@pytest.mark.usefixtures("no_profiles")
class TestByParameters:
    """Laws in the number of parameters, which differs between adapters of one rank in different placements."""

    @staticmethod
    def runs(places: tuple[int, ...], ranks: tuple[int, ...], short: int = 0) -> list[Observation]:
        """Runs whose dL is 2 sqrt(parameters / tokens); adapters with `short` parameters reach a tenth less."""
        noise = np.random.default_rng(0)
        return [
            replace(
                run(
                    rank,
                    length,
                    2 * (per_rank * rank / length) ** 0.5 * (0.9 if per_rank * rank == short else 1.0)
                    + 0.001 * noise.normal(),
                ),
                effective_parameters=per_rank * rank,
                entropy_bits=15.0 * length,
            )
            for per_rank, rank, length in itertools.product(places, ranks, (64, 96, 128, 256))
        ]

    def test_one_rank_in_placements_of_several_sizes_determines_a_law(self) -> None:
        runs = self.runs((1000, 2000, 5000), (1,))
        law = fit_one(runs, "power", adapter_size="effective_parameters")
        assert law.parameters["alpha"].value == pytest.approx(0.5, abs=0.01)
        assert not any("only one" in warning for warning in law.warnings)
        with pytest.raises(InputError, match="only rank 1 among the 12 of 12 runs"):
            fit_law(runs, form="power")

    def test_several_ranks_with_one_number_of_parameters_do_not_determine_a_law(self) -> None:
        runs = self.runs((2000,), (1,)) + self.runs((1000,), (2,))
        with pytest.raises(InputError, match="expected at least 2 adapter sizes; add runs with other adapter sizes"):
            fit_law(runs, form="power", adapter_size="effective_parameters")

    def test_the_largest_number_of_parameters_is_held_out(self) -> None:
        runs = self.runs((1000, 1500), (1, 2, 4), short=6000)
        law = fit_one(runs, "power", adapter_size="effective_parameters")
        held = law.best.largest("effective_parameters")
        assert held is not None
        assert (held.value, held.runs) == (6000, 4)
        # Its runs reach 0.9 of what the others predict: 1 / 0.9 - 1.
        assert held.mape_percent == pytest.approx(100 / 0.9 - 100, abs=0.5)
        assert law.best.largest("rank") is None

    def test_a_form_in_parameters_predicts_no_rank_if_parameters_per_rank_differ(self) -> None:
        # The entropy equals the frozen model's loss, as if that model guessed uniformly.
        bits = HIGH_LOSS / math.log(2)
        runs = [replace(r, entropy_bits=bits * r.target_tokens) for r in self.runs((1000, 1100), (1, 2, 4))]
        by_rank, in_bits = (fit_one(runs, form) for form in ("power", "stored_bits"))
        assert by_rank.parameters_per_rank is in_bits.parameters_per_rank is None
        assert float(by_rank.predict(2, 100)) > 0
        assert (by_rank.predicts_ranks, in_bits.predicts_ranks) == (True, False)
        with pytest.raises(InputError, match="differ in parameters per rank, so a rank has no one size"):
            in_bits.predict(2, 100)
        titles = {axes.get_title() for axes in law_figure(in_bits).axes}
        assert "no lines: parameters per rank differ" in titles

    def test_the_number_of_parameters_per_rank_may_be_fractional(self) -> None:
        runs = [replace(r, effective_parameters=2501 * r.rank // 2) for r in self.runs((1000,), (2, 4, 8))]
        law = fit_one(runs, "power")
        assert law.parameters_per_rank == 1250.5
        assert LawFit.from_json(law.to_json()).parameters_per_rank == 1250.5
        found = outcome_of_rank(law, 3, 100).outcome
        assert found is not None
        assert found.effective_parameters == 3752  # 3751.5

    @pytest.mark.parametrize(
        ("known", "unknown", "missing"),
        [
            ("entropy_power", "effective_parameters", "the number of effective parameters"),
            (None, "entropy_bits", "the corpus entropy"),
        ],
    )
    def test_a_form_needs_only_the_quantities_that_it_uses(
        self, known: FormName | None, unknown: str, missing: str
    ) -> None:
        bits = HIGH_LOSS / math.log(2)
        runs = [replace(r, entropy_bits=bits * r.target_tokens) for r in self.runs((1000,), (1, 2, 4))]
        runs = [replace(r, **{unknown: None}) for r in runs]  # type: ignore[arg-type]
        with pytest.raises(InputError, match=f"form stored_bits: some runs lack {missing}"):
            fit_law(runs, form="stored_bits")
        fits = {fit.form for fit in fit_law(runs).fits}
        assert ("entropy_power" in fits) is (known is not None)
