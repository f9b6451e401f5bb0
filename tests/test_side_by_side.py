"""Several laws beside each other: in which form they are compared, and what the page says of them."""

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
    """The law of 12 runs that follow dL = min(60 r^alpha l^-beta, 13.6), the first of them still `moving`."""
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
    def test_it_is_one_that_all_laws_have_with_the_smallest_total_of_aicc(self, laws: dict[str, LawFit]) -> None:
        name = common_form(laws)
        assert name is not None
        totals = {
            fit.form: sum(law.fit_of(fit.form).aicc or math.inf for law in laws.values())
            for fit in laws["50 steps"].fits
            if "alpha" in fit.parameters
        }
        assert totals[name] == min(totals.values())

    def test_a_form_that_one_of_them_lacks_is_not_used(self, laws: dict[str, LawFit]) -> None:
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

    def test_one_law_has_nothing_beside_it(self, laws: dict[str, LawFit]) -> None:
        assert side_by_side({"50 steps": laws["50 steps"]}) is None
        assert side_by_side({}) is None


class TestTable:
    def test_it_has_the_exponents_of_the_common_form_with_their_intervals(self, laws: dict[str, LawFit]) -> None:
        found = side_by_side(laws)
        form = common_form(laws)
        assert found is not None
        assert form is not None
        for row, (label, fitted) in zip(found.tables[0].rows, laws.items(), strict=True):
            alpha = fitted.fit_of(form).parameters["alpha"]
            assert alpha.interval is not None
            assert row[0] == label
            assert row[1] == f"{alpha.value:.3g} ({alpha.interval[0]:.3g} to {alpha.interval[1]:.3g})"
        # A change of the exponent from 0.4 to 0.6 is far outside what noise of 1 % leaves open.
        assert [float(row[1].split()[0]) for row in found.tables[0].rows] == pytest.approx([0.4, 0.6], abs=0.05)

    def test_the_form_is_an_equation_whose_letters_are_explained(self, laws: dict[str, LawFit]) -> None:
        found = side_by_side(laws)
        assert found is not None
        assert found.equation is not None
        assert "s<sup>\N{GREEK SMALL LETTER ALPHA}</sup>" in found.equation.__html__()
        for letter in ("dL:", "s:", "l:", "\N{GREEK SMALL LETTER KAPPA}:"):
            assert letter in found.sentences[0]

    def test_it_counts_runs_that_had_not_converged(self, laws: dict[str, LawFit]) -> None:
        found = side_by_side(laws)
        assert found is not None
        assert [row[-1] for row in found.tables[0].rows] == ["3", "0"]

    def test_capacity_is_a_dash_where_the_bits_are_unknown(self, laws: dict[str, LawFit]) -> None:
        found = side_by_side({**laws, "unknown bits": law(0.4, 0.5, entropy=False)})
        assert found is not None
        assert [row[3] == "-" for row in found.tables[0].rows] == [False, False, True]


@pytest.mark.usefixtures("no_figures", "no_profiles")
def test_sweeps_with_other_budgets_are_laws_of_their_own_named_by_what_differs(tmp_path: Path) -> None:
    for steps in (50, 100):
        for rank in (1, 2, 3):
            for length in (128, 256):
                folder = tmp_path / f"steps-{steps}-rank-{rank}-length-{length}"
                write_simulated_run(folder, rank, length, optimizer_steps=steps)
    studies = make_studies(group_runs(read_records([tmp_path]), ["optimizer_steps"]))
    # By size, not by the alphabet.
    assert list(laws_by_name(studies)) == ["optimizer_steps 50", "optimizer_steps 100"]


@pytest.mark.usefixtures("no_figures", "no_profiles")
def test_a_list_of_layers_is_one_name(tmp_path: Path) -> None:
    for placement in (["q_proj"], ["q_proj", "v_proj"]):
        for rank in (1, 2, 4):
            for length in (128, 256):
                folder = tmp_path / f"{len(placement)}-rank-{rank}-length-{length}"
                write_simulated_run(folder, rank, length, placement=placement)
    studies = make_studies(group_runs(read_records([tmp_path])))
    assert list(laws_by_name(studies)) == ["placement q_proj", "placement q_proj, v_proj"]
