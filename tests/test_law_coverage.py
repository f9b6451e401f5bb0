"""How often 95 % intervals cover the truth in simulated grids with noise, saturated runs, replicates and texts."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import t
from simulated_laws import (
    HIGH_LOSS,
    SATURATING,
    TRUTH,
    fit_one,
    grid,
    law_of,
    published,
    run,
    runs_with_texts,
    saturating_runs,
)

from pml.law import FORMS, FormName, Observation, percentiles, saturated
from pml.law.data import make_data
from pml.law.forms import POSITIVE
from pml.law.intervals import (
    GroupedBy,
    bootstrap,
    choose_groups,
    noise_of,
    standard_errors,
    t_over_z,
    t_quantile,
)
from pml.law.least_squares import solve, to_theta


def intervals(
    form: FormName, runs: list[Observation], grouped_by: GroupedBy | None = None
) -> dict[str, tuple[float, float]]:
    """Bootstrap intervals of a form, without the other steps of `fit_law`."""
    kind, data = FORMS[form], make_data(runs, "rank")
    solution = solve(kind, data)
    assert solution is not None
    grouped_by = grouped_by or choose_groups(solution)
    widened = t_over_z(noise_of(solution.residual, data, grouped_by, len(solution.free)).degrees_of_freedom)
    theta, draws = to_theta(kind, solution.values), bootstrap(solution, grouped_by)
    ends = theta + widened * (np.percentile(draws, (2.5, 97.5), axis=0) - theta)
    found = zip(kind.fitted, ends.T.tolist(), strict=True)
    return {name: (math.exp(a), math.exp(b)) if name in POSITIVE else (a, b) for name, (a, b) in found}


@pytest.mark.usefixtures("no_profiles")
class TestCoverage:
    """Intervals of 95 % contain the truth in about 95 % of the simulated grids, up to the noise of the count."""

    def test_intervals_cover_the_parameters_of_saturated_grids_with_2_percent_noise(self) -> None:
        noise, inside = np.random.default_rng(0), dict.fromkeys(("C", "alpha", "beta"), 0)
        for _ in range(100):
            runs = saturating_runs(noise, spread=0.0, relative=0.02)
            assert 3 <= sum(map(saturated, runs)) <= 12
            for name, (low, high) in intervals("ceiling", runs).items():
                if name in inside:
                    inside[name] += low <= SATURATING[name] <= high
        assert all(90 <= count <= 100 for count in inside.values()), inside

    @pytest.mark.slow
    @pytest.mark.parametrize(("of_point", "of_text"), [(0.05, 0.0), (0.0, 0.1)])
    def test_the_interval_of_c_covers_only_if_runs_are_grouped_by_the_noise_they_share(
        self, of_point: float, of_text: float
    ) -> None:
        # Each seed has texts of its own; the runs of a grid point or all ranks on a text share an error.
        noise, inside = np.random.default_rng(0), {"chosen": 0, "grid_point": 0, "text": 0}
        for _ in range(60):
            points = {s: of_point * noise.normal() for s in itertools.product((1, 2, 4, 8), (64, 96, 144, 216))}
            runs = [
                replace(
                    run(rank, length, law_of(rank, length) + shared + points[rank, length] + 0.02 * noise.normal()),
                    text=f"{length}-{seed}",
                    seed=seed,
                )
                for length, seed in itertools.product((64, 96, 144, 216), range(3))
                for shared in [of_text * noise.normal()]
                for rank in (1, 2, 4, 8)
            ]
            for grouped_by in inside:
                low, high = intervals("power_offset", runs, None if grouped_by == "chosen" else grouped_by)["C"]
                inside[grouped_by] += low <= TRUTH["C"] <= high
        # The choice matters: with the wrong grouping, the interval of C covers less than 90 % of the time.
        assert 54 <= inside["chosen"] <= 60, inside
        assert inside["text" if of_point else "grid_point"] < 54, inside

    def test_bootstrap_intervals_and_lmfit_standard_errors_cover_with_replicated_runs(self) -> None:
        noise, kind = np.random.default_rng(0), FORMS["power_offset"]
        by_bootstrap, by_error = dict.fromkeys(TRUTH, 0), dict.fromkeys(TRUTH, 0)
        found: dict[str, list[list[float]]] = {name: [] for name in TRUTH}
        for _ in range(100):
            runs = grid(noise, ranks=(1, 2, 4, 8), seeds=3, of_point=0.05, of_seed=0.03)
            data = make_data(runs, "rank")
            solution = solve(kind, data)
            assert solution is not None
            spread = noise_of(solution.residual, data, "grid_point", 4)
            assert spread.degrees_of_freedom == 12 - 4
            result, ends = standard_errors(solution, spread), intervals("power_offset", runs, "grid_point")
            assert result is not None
            for name, truth in TRUTH.items():
                value, error = solution.values[name], float(result.params[name].stderr)
                by_bootstrap[name] += ends[name][0] <= truth <= ends[name][1]
                by_error[name] += abs(value - truth) < t_quantile(8) * error
                found[name].append([value, np.ptp(ends[name]), 2 * t_quantile(8) * error])
        # 95 are expected, with a standard deviation of 2.2. The distribution of C is skewed, its error symmetric.
        assert all(89 <= count <= 100 for count in (*by_bootstrap.values(), *by_error.values())), (
            by_bootstrap,
            by_error,
        )
        # Nor are they much wider than the estimates scatter, given Student's t of 8 and the jackknife's caution.
        for name, numbers in found.items():
            values, *widths = np.array(numbers).T
            needed = 2 * float(t.ppf(0.975, 8)) * float(np.std(values, ddof=1))
            typical = [float(np.median(width)) for width in widths]
            assert all(0.6 * needed < width < 1.7 * needed for width in typical), (name, needed, typical)

    def test_the_interval_of_a_new_run_covers_its_loss_reduction(self) -> None:
        noise, draws, inside, size, width = np.random.default_rng(2), 60, 0, 0.1, 0.0
        for _ in range(draws):
            fit = published(grid(noise, ranks=(1, 2, 4, 8), of_point=size))
            low, high = percentiles(fit.new_run_draws(3, 100).loss_reduction)
            inside += low <= law_of(3, 100) + size * noise.normal() <= high
            width += (high - low) / draws
        assert 53 <= inside <= 60
        # The run's own scatter times Student's t with 8 degrees of freedom; inside the grid, the law adds little.
        assert width == pytest.approx(2 * float(t.ppf(0.975, 8)) * size, rel=0.3)

    @pytest.mark.slow
    def test_the_interval_of_a_new_run_near_the_ceiling_covers_its_loss_reduction(self) -> None:
        noise, inside, width = np.random.default_rng(3), dict.fromkeys((3, 10, 40), 0), dict.fromkeys((3, 10, 40), 0.0)
        for _ in range(40):
            fit = fit_one(saturating_runs(noise, 0.0, 0.02), "ceiling")
            scatter = 1 + 0.02 * noise.normal()
            for rank in inside:
                low, high = percentiles(fit.new_run_draws(rank, 216).loss_reduction)
                power = 110.0 * rank**0.7 / 216**0.6 * scatter
                inside[rank] += low - 1e-3 <= (power**-4 + 13.0**-4) ** -0.25 <= high + 1e-3
                width[rank] += (high - low) / 40
        assert all(count >= 36 for count in inside.values()), (inside, width)
        assert all(mean < 0.9 for mean in width.values()), width

    @pytest.mark.parametrize("effect", [pytest.param(0.0, marks=pytest.mark.slow), 0.7])
    def test_the_interval_of_a_run_on_a_new_text_covers_with_or_without_its_initial_loss(self, effect: float) -> None:
        noise, draws = np.random.default_rng(3), 60
        inside, width = {"given": 0, "not given": 0}, {"given": 0.0, "not given": 0.0}
        of_the_law = {"beta": 0, "mean": 0}
        for _ in range(draws):
            fit = published(runs_with_texts(noise, effect))
            low, high = fit.parameters["beta"].interval or (math.nan, math.nan)
            of_the_law["beta"] += low <= TRUTH["beta"] <= high
            low, high = percentiles(fit.predict_draws(2, 216))
            of_the_law["mean"] += low <= law_of(2, 216) <= high
            excess = 0.3 * noise.normal()
            left = HIGH_LOSS + (1 - effect) * excess - law_of(3, 100) - 0.05 * noise.normal()
            for name, loss in (("given", HIGH_LOSS + excess), ("not given", None)):
                low, high = np.percentile(fit.new_run_draws(3, 100, initial_loss=loss).final_loss, (2.5, 97.5))
                inside[name] += low <= left <= high
                width[name] += (high - low) / draws
        assert all(53 <= count <= 60 for count in inside.values()), inside
        # Several ranks on one text are not independent evidence about its effect.
        assert all(54 <= count <= 60 for count in of_the_law.values()), of_the_law
        # Given the initial loss, the run's own 0.05 and a little uncertainty; else also what remains of the text's 0.3.
        assert 0.2 < width["given"] < 0.4, width
        of_text = 3.92 * math.hypot(0.3 * (1 - effect), 0.05)
        assert of_text < width["not given"] < 1.8 * of_text, width
