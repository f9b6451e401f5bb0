"""The forms of the law: hand-worked values, slopes against finite differences, and recovery from noise-free cells."""

import itertools
import math

import numpy as np
import pytest
from scipy.optimize import approx_fprime

from pml.law import FORMS, Cell, FormName, LawFit, fit_law, saturated
from pml.law.forms import Form, Points, reduction, sensitivity, slopes

BOUNDED = [form for form in FORMS.values() if form.bounded]
PARAMETERS_PER_RANK = 1000


def points(rank: float, length: float, initial: float = 12.0, bits: float | None = None) -> Points:
    """One point; a corpus without known information has 15 bits a token."""
    entropy = (15.0 * length if bits is None else bits) * math.log(2) / length
    return Points(*np.log([[rank], [length], [PARAMETERS_PER_RANK * rank]]), np.array([initial]), np.array([entropy]))


def theta_of(form: Form, **values: float) -> np.ndarray:
    """Parameters as the functions take them, from those that people read."""
    return np.array([math.log(values[n]) if n in ("C", "kappa", "knee") else values[n] for n in form.parameters])


class TestValues:
    def test_the_power_law_by_hand(self) -> None:
        # 40 sqrt(4) / sqrt(100) = 8, and 1 on top
        truth = {"C": 40.0, "alpha": 0.5, "beta": 0.5, "b": 1.0}
        assert reduction(FORMS["power"], theta_of(FORMS["power"], **truth), points(4, 100)) == pytest.approx(8.0)
        form = FORMS["power_offset"]
        assert reduction(form, theta_of(form, **truth), points(4, 100)) == pytest.approx(9.0)

    def test_a_knee_of_1_is_half_of_the_harmonic_mean(self) -> None:
        form = FORMS["ceiling"]
        theta = theta_of(form, C=40.0, alpha=0.5, beta=0.5, knee=1.0)
        # 8 and a ceiling of 12: 1 / (1/8 + 1/12) = 4.8
        assert reduction(form, theta, points(4, 100)) == pytest.approx(4.8)

    def test_the_ceiling_is_what_lies_above_the_offset(self) -> None:
        form = FORMS["ceiling_offset"]
        theta = theta_of(form, C=40.0, alpha=0.5, beta=0.5, b=-4.0, knee=1.0)
        # 8 and a ceiling of 12 + 4: 1 / (1/8 + 1/16) = 16/3, 4 below
        assert reduction(form, theta, points(4, 100)) == pytest.approx(16 / 3 - 4)

    def test_stored_bits_are_bits(self) -> None:
        form = FORMS["stored_bits"]
        theta = theta_of(form, kappa=0.8, knee=32.0)
        # 1000 parameters store 800 of 3000 bits; 2200 bits over 200 tokens are 11 bits, or 7.6246 nats, a token.
        at = points(1, 200, initial=13.0)
        assert reduction(form, theta, at) == pytest.approx(13.0 - 11.0 * math.log(2), rel=1e-9)
        # 8000 of 3000 bits: everything.
        assert reduction(form, theta, points(10, 200, initial=13.0)) == pytest.approx(13.0, rel=1e-6)

    @pytest.mark.parametrize("form", BOUNDED, ids=lambda form: form.name)
    def test_no_form_with_a_ceiling_lowers_the_loss_by_more_than_there_is(self, form: Form) -> None:
        theta = theta_of(form, C=40.0, alpha=0.9, beta=0.5, b=-2.0, kappa=0.8, knee=3.0)
        for rank in (1, 10, 1e3, 1e6):
            assert reduction(form, theta, points(rank, 100)) <= 12.0


class TestSlopes:
    @pytest.mark.parametrize("form", FORMS.values(), ids=lambda form: form.name)
    @pytest.mark.parametrize("rank", [1.0, 4.0, 40.0])
    def test_slopes_are_those_of_finite_differences(self, form: Form, rank: float) -> None:
        theta = theta_of(form, C=40.0, alpha=0.6, beta=0.5, b=-2.0, kappa=0.8, knee=2.5)
        at = points(rank, 150)
        expected = approx_fprime(theta, lambda t: float(reduction(form, t, at)[0]), 1e-7)
        # Forward differences of step 1e-7 are good to about as much.
        np.testing.assert_allclose(slopes(form, theta, at)[0], expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("form", BOUNDED, ids=lambda form: form.name)
    @pytest.mark.parametrize("rank", [1.0, 4.0, 40.0])
    def test_the_sensitivity_is_the_slope_by_the_power(self, form: Form, rank: float) -> None:
        theta = theta_of(form, C=40.0, alpha=0.6, beta=0.5, b=-2.0, kappa=0.8, knee=2.5)
        at = points(rank, 150)
        # d dL / d ln C = power * d dL / d power, and C and kappa come first.
        power = float(reduction(FORMS["power"], theta_of(FORMS["power"], C=40.0, alpha=0.6, beta=0.5), at)[0])
        if form.proportional:
            power = 0.8 * math.log(2) * PARAMETERS_PER_RANK * rank / 150
        assert sensitivity(form, theta, at) * power == pytest.approx(slopes(form, theta, at)[0, :1], rel=1e-9)


def cells_of(form: Form, **truth: float) -> list[Cell]:
    """Noise-free cells of 15 bits a token, on texts that the frozen model knows differently well."""
    cells = []
    for rank, length in itertools.product((1, 2, 3, 4, 6), (64, 96, 144, 216)):
        initial = 12.5 + 0.3 * math.sin(length)
        fallen = float(reduction(form, theta_of(form, **truth), points(rank, length, initial))[0])
        known = {"effective_parameters": PARAMETERS_PER_RANK * rank, "entropy_bits": 15.0 * length}
        cells.append(Cell(rank, length, initial, initial - fallen, 0, f"r{rank}-l{length}", **known))  # type: ignore[arg-type]
    return cells


class TestRecovery:
    @pytest.mark.parametrize(
        ("name", "truth"),
        [
            ("ceiling", {"C": 110.0, "alpha": 0.7, "beta": 0.6, "knee": 4.0}),
            ("ceiling_offset", {"C": 110.0, "alpha": 0.7, "beta": 0.55, "b": -2.0, "knee": 3.0}),
            ("entropy_power", {"C": 500.0, "alpha": 1.1, "beta": 1.0, "knee": 2.0}),
            ("stored_bits", {"kappa": 0.8, "knee": 2.0}),
        ],
    )
    def test_forms_with_a_ceiling_are_recovered_from_all_cells(self, name: FormName, truth: dict[str, float]) -> None:
        cells = cells_of(FORMS[name], **truth)
        assert 2 <= sum(map(saturated, cells)) < len(cells) - 5
        fit = fit_law(cells, form=name, compare=False)
        assert {key: fit.parameters[key].value for key in truth} == pytest.approx(truth, rel=1e-6)
        assert fit.r2 == pytest.approx(1.0, abs=1e-12)

    def test_without_being_told_the_right_form_is_chosen(self) -> None:
        noise = np.random.default_rng(0)
        cells = cells_of(FORMS["stored_bits"], kappa=0.8, knee=3.0)
        cells = [
            Cell(**{**vars(cell), "final_loss": cell.final_loss + 0.02 * float(noise.normal())})
            if not saturated(cell)
            else cell
            for cell in cells
        ]
        fit = fit_law(cells)
        assert fit.form == "stored_bits"
        assert fit.kappa is not None
        assert fit.kappa.value == pytest.approx(0.8, abs=0.02)


class TestWords:
    @pytest.fixture
    def fit(self) -> LawFit:
        return fit_law(cells_of(FORMS["stored_bits"], kappa=0.8, knee=2.1), form="stored_bits", compare=False)

    def test_the_knee_stands_at_the_minimum(self, fit: LawFit) -> None:
        assert fit.equation() == "stored bits = min_2.1(0.800 P, H)"
        assert fit.latex() == r"\mathrm{stored\ bits} = \mathrm{min}_{2.1}(0.800\,P, H)"

    def test_a_minimum_without_a_bend_has_none(self) -> None:
        fit = fit_law(cells_of(FORMS["stored_bits"], kappa=0.8, knee=33.0), form="stored_bits", compare=False)
        assert fit.best.at_bound == ["knee"]
        assert fit.equation() == "stored bits = min(0.800 P, H)"
