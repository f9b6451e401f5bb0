"""The law as one function and its forms: hand-worked values, derivatives, and recovery from noise-free runs."""

import itertools
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.optimize import approx_fprime
from simulated_laws import fit_one

from pml.errors import InputError
from pml.law import FORMS, Equation, FormName, LawFit, Observation, fit_law, loss_reduction, saturated
from pml.law.data import make_data
from pml.law.forms import POSITIVE, Form, Points, gradient
from pml.law.intervals import Noise, standard_errors
from pml.law.least_squares import batched_least_squares, solve, to_natural, to_theta

SATURATING = [form for form in FORMS.values() if form.saturating]
PARAMETERS_PER_RANK = 1000
LAW = {"C": 40.0, "alpha": 0.6, "beta": 0.5, "b": -2.0, "sharpness": 2.5}


def points(rank: float, length: float, initial: float = 12.0) -> Points:
    """One point; the corpus has 15 bits per token."""
    values = rank, length, PARAMETERS_PER_RANK * rank, initial, 15.0 * math.log(2)
    return Points(*(np.array([value]) for value in values))


def values_of(form: Form, **values: float) -> dict[str, float]:
    return {name: values[name] for name in form.fitted}


class TestValues:
    def test_the_power_law_matches_values_worked_out_by_hand(self) -> None:
        # 40 sqrt(4) / sqrt(100) = 8, and 1 on top
        assert loss_reduction(4, 100, C=40, alpha=0.5, beta=0.5) == pytest.approx(8.0)
        assert loss_reduction(4, 100, C=40, alpha=0.5, beta=0.5, b=1) == pytest.approx(9.0)

    def test_a_sharpness_of_1_gives_half_of_the_harmonic_mean(self) -> None:
        # 8 and a ceiling of 12: 1 / (1/8 + 1/12) = 4.8
        assert loss_reduction(4, 100, 12, C=40, alpha=0.5, beta=0.5, sharpness=1) == pytest.approx(4.8)

    def test_the_ceiling_is_the_initial_loss_above_the_offset(self) -> None:
        # 8 and a ceiling of 12 + 4: 1 / (1/8 + 1/16) = 16/3, 4 below
        found = loss_reduction(4, 100, 12, C=40, alpha=0.5, beta=0.5, b=-4, sharpness=1)
        assert found == pytest.approx(16 / 3 - 4)

    def test_an_infinite_sharpness_gives_the_plain_minimum(self) -> None:
        assert loss_reduction([4, 400], 100, 12, C=40, alpha=0.5, beta=0.5) == pytest.approx([8.0, 12.0])
        assert gradient([4, 400], 100, 12, C=40, alpha=0.5, beta=0.5)["power"].tolist() == [1.0, 0.0]

    def test_a_plain_and_a_soft_minimum_broadcast_together(self) -> None:
        where = ([4, 400], 100, 12)
        for function in (
            loss_reduction,
            lambda *a, **k: gradient(*a, **k)["power"],
            lambda *a, **k: gradient(*a, **k)["sharpness"],
        ):
            both = function(*where, C=40, alpha=0.5, beta=0.5, sharpness=[[1.0], [math.inf]])
            apart = [function(*where, C=40, alpha=0.5, beta=0.5, sharpness=p) for p in (1.0, math.inf)]
            np.testing.assert_array_equal(both, apart)

    def test_the_derivative_by_the_power_term_vanishes_when_it_exceeds_the_ceiling(self) -> None:
        # A power term of 8 under ceilings far above, at, and far below it; at the ceiling: 2^-(1 + 1/sharpness).
        found = gradient(4, 100, [8e6, 8.0, 8e-6], C=40, alpha=0.5, beta=0.5, sharpness=2.0)
        assert found["power"] == pytest.approx([1.0, 2**-1.5, 0.0], abs=1e-6)

    def test_stored_bits_are_converted_to_nats_per_token(self) -> None:
        # 1000 parameters store 800 of 3000 bits; 2200 bits over 200 tokens are 11 bits, or 7.6246 nats, a token.
        form, values = FORMS["stored_bits"], {"bits_per_parameter": 0.8, "sharpness": 32.0}
        assert form.evaluate(values, points(1, 200, 13.0)) == pytest.approx(13.0 - 11.0 * math.log(2), rel=1e-9)
        # Room for 8000 bits stores all 3000.
        assert form.evaluate(values, points(10, 200, 13.0)) == pytest.approx(13.0, rel=1e-6)

    @pytest.mark.parametrize("form", SATURATING, ids=lambda form: form.name)
    def test_no_saturating_form_reduces_the_loss_by_more_than_the_initial_loss(self, form: Form) -> None:
        values = values_of(form, **LAW, bits_per_parameter=0.8)
        for rank in (1, 10, 1e3, 1e6):
            assert form.evaluate(values, points(rank, 100)) <= 12.0


class TestDerivatives:
    @pytest.mark.parametrize("rank", [1.0, 4.0, 40.0])
    @pytest.mark.parametrize("sharpness", [2.5, math.inf])
    @pytest.mark.parametrize("initial", [12.0, math.inf])
    def test_derivatives_match_finite_differences(self, rank: float, sharpness: float, initial: float) -> None:
        names = ["C", "alpha", "beta", "b"] + ["sharpness"] * math.isfinite(sharpness)
        at = np.array([LAW[name] if name not in POSITIVE else math.log(LAW[name]) for name in names])

        def arguments(theta: np.ndarray) -> dict[str, Any]:
            pairs = zip(names, theta, strict=True)
            return {name: math.exp(value) if name in POSITIVE else value for name, value in pairs}

        expected = approx_fprime(at, lambda t: float(loss_reduction(rank, 150.0, initial, **arguments(t))), 1e-7)
        found = gradient(rank, 150.0, initial, **arguments(at))
        # Forward differences with a step of 1e-7 have an error of about the same size.
        np.testing.assert_allclose([found[name] for name in names], expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("rank", [1.0, 4.0, 40.0])
    def test_the_derivative_by_the_power_is_that_by_its_logarithm_divided_by_the_power(self, rank: float) -> None:
        power = loss_reduction(rank, 150, C=40, alpha=0.6, beta=0.5)
        found = gradient(rank, 150, 12, **LAW)
        assert found["power"] * power == pytest.approx(found["C"], rel=1e-9)


class TestParameters:
    def test_each_form_states_which_parameters_are_fitted_and_which_are_fixed(self) -> None:
        free = {name: form.fitted for name, form in FORMS.items()}
        assert free == {
            "power": ("C", "alpha", "beta"),
            "power_offset": ("C", "alpha", "beta", "b"),
            "ceiling": ("C", "alpha", "beta", "sharpness"),
            "ceiling_offset": ("C", "alpha", "beta", "b", "sharpness"),
            "entropy_power": ("C", "alpha", "beta", "sharpness"),
            "stored_bits": ("bits_per_parameter", "sharpness"),
        }
        fixed = FORMS["ceiling"].parameters(C=3.0)["b"]
        assert (fixed.value, fixed.vary) == (0.0, False)
        assert (FORMS["power"].parameters()["C"].min, FORMS["ceiling"].parameters()["sharpness"].max) == (0.0, 32.0)

    @pytest.mark.parametrize("name", list(FORMS))
    def test_evaluating_a_form_equals_calling_the_function_with_its_lmfit_parameters(self, name: FormName) -> None:
        form = FORMS[name]
        values = values_of(form, **LAW, bits_per_parameter=0.8)
        at = points(3, 150)
        arguments = form.parameters(**values).valuesdict()
        if form.offset == "known":
            arguments["b"] = 12.0 - 15 * math.log(2)
        if form.proportional:
            # Each parameter stores the same number of bits at every length.
            arguments |= {"C": arguments.pop("bits_per_parameter") * math.log(2), "alpha": 1.0, "beta": 1.0}
        rank = 3 * PARAMETERS_PER_RANK if form.proportional else 3
        expected = loss_reduction(rank, 150, 12.0 if form.saturating else math.inf, **arguments)
        assert form.evaluate(values, at) == pytest.approx(np.atleast_1d(expected), rel=1e-12)


def runs_of(form: Form, noise: float = 0.0, **truth: float) -> list[Observation]:
    """Runs on texts of 15 bits per token, on which the frozen model has different losses."""
    runs, random = [], np.random.default_rng(0)
    for rank, length in itertools.product((1, 2, 3, 4, 6), (64, 96, 144, 216)):
        initial = 12.5 + 0.3 * math.sin(length)
        reduction = float(form.evaluate(truth, points(rank, length, initial))[0]) + noise * float(random.normal())
        known = {"effective_parameters": PARAMETERS_PER_RANK * rank, "entropy_bits": 15.0 * length}
        runs.append(Observation(rank, length, initial, initial - reduction, 0, f"r{rank}-l{length}", **known))  # type: ignore[arg-type]
    return runs


class TestRecovery:
    @pytest.mark.parametrize(
        ("name", "truth"),
        [
            ("ceiling", {"C": 110.0, "alpha": 0.7, "beta": 0.6, "sharpness": 4.0}),
            ("ceiling_offset", {"C": 110.0, "alpha": 0.7, "beta": 0.55, "b": -2.0, "sharpness": 3.0}),
            ("entropy_power", {"C": 500.0, "alpha": 1.1, "beta": 1.0, "sharpness": 2.0}),
            ("stored_bits", {"bits_per_parameter": 0.8, "sharpness": 2.0}),
        ],
    )
    def test_parameters_of_saturating_forms_are_recovered_from_all_runs(
        self, name: FormName, truth: dict[str, float]
    ) -> None:
        runs = runs_of(FORMS[name], **truth)
        assert 2 <= sum(map(saturated, runs)) < len(runs) - 5
        fit = fit_one(runs, name)
        assert {key: fit.parameters[key].value for key in truth} == pytest.approx(truth, rel=1e-6)
        assert fit.best.r2 == pytest.approx(1.0, abs=1e-12)

    def test_the_form_that_generated_the_runs_is_chosen(self) -> None:
        fit = fit_law(runs_of(FORMS["stored_bits"], 0.02, bits_per_parameter=0.8, sharpness=3.0))
        assert fit.form == "stored_bits"
        assert fit.bits_per_parameter is not None
        assert fit.bits_per_parameter.value == pytest.approx(0.8, abs=0.02)

    @pytest.mark.parametrize("name", ["power_offset", "ceiling_offset", "stored_bits"])
    def test_batched_least_squares_agrees_with_lmfit(self, name: FormName) -> None:
        form, truth = FORMS[name], {"C": 110.0, "alpha": 0.7, "beta": 0.55, "b": -2.0, "sharpness": 3.0}
        values = values_of(form, **truth, bits_per_parameter=0.8)
        data = make_data(runs_of(form, 0.05, **values), "rank")
        solution = solve(form, data)
        assert solution is not None
        noise = 0.05 * np.random.default_rng(1).normal(size=(5, len(data.measured)))
        start = to_theta(form, solution.values)[None]
        draws = batched_least_squares(form, data, data.measured + noise, start, solution.free)
        for draw, moved in zip(draws, noise, strict=True):
            again = solve(form, replace(data, measured=data.measured + moved))
            assert again is not None
            found = {key: float(value[0]) for key, value in to_natural(form, draw).items()}
            # Batched fits stop at errors far below the spread of the draws.
            assert found == pytest.approx(again.values, rel=2e-3)


class TestEquation:
    @pytest.fixture
    def fit(self) -> LawFit:
        return fit_one(runs_of(FORMS["stored_bits"], bits_per_parameter=0.8, sharpness=2.1), "stored_bits")

    def test_the_sharpness_is_the_subscript_of_the_minimum(self, fit: LawFit) -> None:
        assert fit.equation() == "stored bits = min_2.1(0.800 P, H)"
        assert fit.equation().latex == r"\mathrm{stored\ bits} = \mathrm{min}_{2.1}(0.800\,P, H)"

    def test_a_plain_minimum_has_no_subscript(self) -> None:
        runs = runs_of(FORMS["stored_bits"], bits_per_parameter=0.8, sharpness=33.0)
        fit = fit_one(runs, "stored_bits")
        assert fit.best.at_bound == ["sharpness"]
        assert fit.equation() == "stored bits = min(0.800 P, H)"

    def test_an_equation_has_an_html_representation(self) -> None:
        equation = Equation("dL = min_2.1(135 r^0.75 l^-0.60, L0)")
        assert equation.__html__() == (
            "Δ<i>L</i> = min<sub>2.1</sub>(135 <i>r</i><sup>0.75</sup> <i>l</i><sup>\N{MINUS SIGN}0.60</sup>, "
            "<i>L</i><sub>0</sub>)"
        )


def runs_with_losses(losses: Iterable[tuple[int, int, float, float]]) -> list[Observation]:
    """Runs from (rank, length, initial loss, final loss), with 1152 parameters per rank and 15.6 bits per token."""
    return [
        Observation(
            rank, length, initial, final, 0, f"run {i}", effective_parameters=1152 * rank, entropy_bits=15.6 * length
        )
        for i, (rank, length, initial, final) in enumerate(losses)
    ]


class TestRunsThatHardlyDetermineAForm:
    def test_diverging_draws_do_not_change_the_others(self) -> None:
        form = FORMS["power_offset"]
        data = make_data(runs_of(FORMS["power"], C=40.0, alpha=0.5, beta=0.6), "rank")
        start = to_theta(form, {"C": 30.0, "alpha": 0.4, "beta": 0.5, "b": 0.0})
        alone = batched_least_squares(form, data, data.measured[None], start[None], form.fitted)
        # C up to e^300 gives squared derivatives up to 1e260, beside which 1e-9 is lost.
        others = [[log_c, 0.0, 0.0, 0.0] for log_c in np.linspace(20.0, 300.0, 100)]
        found = batched_least_squares(form, data, data.measured[None], np.array([start, *others]), form.fitted)
        np.testing.assert_allclose(found[0], alone[0], rtol=1e-9)

    def test_a_rough_solution_out_of_the_range_of_floats_is_refused(self) -> None:
        losses = [(8, 64, 6.3, 6.27), (256, 1, 6.1, 2.3), (1, 1000, 6.3, 4.6), (8, 1000, 6.1, 5.8), (2, 256, 6.2, 4.5)]
        with pytest.raises(InputError, match="no C above 0 fits power_offset"):
            fit_one(runs_with_losses(losses), "power_offset")

    def test_no_standard_errors_are_returned_if_one_is_infinite(self, monkeypatch: pytest.MonkeyPatch) -> None:
        form = FORMS["power"]
        data = make_data(runs_of(form, C=40.0, alpha=0.5, beta=0.6), "rank")
        solution = solve(form, data)
        assert solution is not None
        noise = Noise(0.1, 0.1, 17)
        result = standard_errors(solution, noise)
        assert result is not None
        result.params["beta"].stderr = math.inf
        monkeypatch.setattr("pml.law.intervals.minimize", lambda *_: result)
        assert standard_errors(solution, noise) is None

    def test_a_bootstrap_with_a_diverging_draw_terminates(self) -> None:
        losses = [(1, 2000, 1.699, 0.971), (8, 4000, 1.678, 0.888), (8, 2000, 1.7, 0.786)]
        losses += [(4, 4000, 1.711, 0.929), (4, 2000, 1.696, 0.869), (3, 2000, 1.711, 0.0)]
        law = fit_one(runs_with_losses(losses), "ceiling_offset")
        assert all(math.isfinite(estimate.value) for estimate in law.parameters.values())
