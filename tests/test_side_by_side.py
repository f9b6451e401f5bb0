"""Laws side by side: the form in which they are compared, and what the report says about them."""

import math
from pathlib import Path

import pytest
from simulated_runs import write_simulated_run

from pml.groups import group_runs
from pml.law import LawFit, Observation, fit_law
from pml.records import read_records
from pml.report.side_by_side import common_form, side_by_side
from pml.report.studies import laws_by_name, make_studies


def law(alpha: float, beta: float, entropy: bool = True, moving: int = 0) -> LawFit:
    """The law of 12 runs that follow dL = min(60 r^alpha l^-beta, 13.6); the first `moving` have not converged."""
    runs = []
    for i, (rank, length) in enumerate((r, n) for r in (1, 2, 3, 4) for n in (64, 128, 256)):
        noise = math.exp(0.01 * math.sin(17.0 * i))
        left = max(13.6 - 60 * rank**alpha * length**-beta * noise, 0.05)
        bits = length * math.log2(49152) if entropy else None
        late = 1.0 if i < moving else 0.0
        runs.append(Observation(rank, length, 13.6, left, 0, f"{i}", True, 1152 * rank, bits, late_loss_drop=late))
    return fit_law(runs)


@pytest.fixture(scope="module")
def laws() -> dict[str, LawFit]:
    return {"50 steps": law(0.4, 0.5, moving=3), "200 steps": law(0.6, 0.6)}


class TestForm:
    def test_the_common_form_has_the_smallest_total_aicc(self, laws: dict[str, LawFit]) -> None:
        name = common_form(laws)
        assert name is not None
        totals = {
            fit.form: sum(law.fit_of(fit.form).aicc or math.inf for law in laws.values())
            for fit in laws["50 steps"].fits
            if "alpha" in fit.parameters
        }
        assert totals[name] == min(totals.values())

    def test_a_form_that_one_law_lacks_is_not_used(self, laws: dict[str, LawFit]) -> None:
        without = law(0.4, 0.5, entropy=False)
        assert "entropy_power" not in [fit.form for fit in without.fits]
        assert common_form({**laws, "unknown bits": without}) in [fit.form for fit in without.fits]

    def test_laws_that_determine_no_exponent_are_compared_by_bits_per_parameter(self, laws: dict[str, LawFit]) -> None:
        in_bits = {
            label: law.model_copy(update={"fits": [law.fit_of("stored_bits")], "form": "stored_bits"})
            for label, law in laws.items()
        }
        assert common_form(in_bits) == "stored_bits"
        found = side_by_side(in_bits)
        assert found is not None
        assert found.tables[0].columns[1].endswith("(bits) (95 %)")
        exact = laws["50 steps"].fit_of("ceiling").model_copy(update={"determined": False})
        undetermined = laws["50 steps"].model_copy(update={"fits": [exact], "form": "ceiling"})
        assert common_form({**laws, "undetermined": undetermined}) is None

    def test_fewer_than_two_laws_give_no_section(self, laws: dict[str, LawFit]) -> None:
        assert side_by_side({"50 steps": laws["50 steps"]}) is None
        assert side_by_side({}) is None


class TestTable:
    def test_each_row_has_alpha_of_the_common_form_with_its_interval(self, laws: dict[str, LawFit]) -> None:
        found = side_by_side(laws)
        form = common_form(laws)
        assert found is not None
        assert form is not None
        for row, (label, fitted) in zip(found.tables[0].rows, laws.items(), strict=True):
            alpha = fitted.fit_of(form).parameters["alpha"]
            assert alpha.interval is not None
            assert row[0] == label
            assert row[1] == f"{alpha.value:.3g} ({alpha.interval[0]:.3g} to {alpha.interval[1]:.3g})"
        # Noise of 1 % is far too small to blur the difference between exponents of 0.4 and 0.6.
        assert [float(row[1].split()[0]) for row in found.tables[0].rows] == pytest.approx([0.4, 0.6], abs=0.05)

    def test_the_form_is_an_equation_whose_symbols_are_explained(self, laws: dict[str, LawFit]) -> None:
        found = side_by_side(laws)
        assert found is not None
        assert found.equation is not None
        assert "s<sup>\N{GREEK SMALL LETTER ALPHA}</sup>" in found.equation.__html__()
        for letter in ("dL:", "s:", "l:", "\N{GREEK SMALL LETTER KAPPA}:"):
            assert letter in found.sentences[0]

    def test_each_row_counts_the_runs_that_have_not_converged(self, laws: dict[str, LawFit]) -> None:
        found = side_by_side(laws)
        assert found is not None
        assert [row[-1] for row in found.tables[0].rows] == ["3", "0"]

    def test_bits_per_parameter_are_a_dash_if_the_entropy_is_unknown(self, laws: dict[str, LawFit]) -> None:
        found = side_by_side({**laws, "unknown bits": law(0.4, 0.5, entropy=False)})
        assert found is not None
        assert [row[3] == "-" for row in found.tables[0].rows] == [False, False, True]


@pytest.mark.usefixtures("no_figures", "no_profiles")
def test_sweeps_with_different_budgets_give_separate_laws_named_by_the_budget(tmp_path: Path) -> None:
    for steps in (50, 100):
        for rank in (1, 2, 3):
            for length in (128, 256):
                folder = tmp_path / f"steps-{steps}-rank-{rank}-length-{length}"
                write_simulated_run(folder, rank, length, optimizer_steps=steps)
    studies = make_studies(group_runs(read_records([tmp_path]), ["optimizer_steps"]))
    # Sorted by number, not alphabetically.
    assert list(laws_by_name(studies)) == ["optimizer_steps 50", "optimizer_steps 100"]


@pytest.mark.usefixtures("no_figures", "no_profiles")
def test_a_law_is_named_by_its_whole_list_of_target_modules(tmp_path: Path) -> None:
    for placement in (["q_proj"], ["q_proj", "v_proj"]):
        for rank in (1, 2, 4):
            for length in (128, 256):
                folder = tmp_path / f"{len(placement)}-rank-{rank}-length-{length}"
                write_simulated_run(folder, rank, length, placement=placement)
    studies = make_studies(group_runs(read_records([tmp_path])))
    assert list(laws_by_name(studies)) == ["placement q_proj", "placement q_proj, v_proj"]
