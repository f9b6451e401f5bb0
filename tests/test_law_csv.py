"""Measurements from CSV files, among them the paper's own: what is read, what is refused, and what a fit gives."""

import csv
import math
from pathlib import Path

import jsonargparse
import pytest

from pml.cli import main
from pml.commands import law as command
from pml.errors import InputError
from pml.law import LawFit, fit_law, read_csv, read_law, saturated

FIGURE_2 = Path(__file__).parents[1] / "configs" / "published" / "figure2.csv"


def write(folder: Path, text: str) -> Path:
    path = folder / "runs.csv"
    path.write_text(text, encoding="utf-8")
    return path


class TestReading:
    def test_each_row_becomes_a_run(self, tmp_path: Path) -> None:
        path = write(
            tmp_path,
            "# from elsewhere\n"
            "rank, target_tokens,initial_loss,final_loss,loss_reduction,seed,text,effective_parameters,entropy_bits\n"
            "1,64,13.0,4.0,,7,a,1152,997.4\n"
            "\n"
            "2,64,13.0,,10.5,,,,\n",
        )
        first, second = read_csv(path)
        assert (first.rank, first.target_tokens, first.initial_loss, first.final_loss) == (1, 64, 13.0, 4.0)
        assert (first.seed, first.text, first.effective_parameters, first.entropy_bits) == (7, "a", 1152, 997.4)
        assert first.source == f"{path}:3"
        assert (second.loss_reduction, second.final_loss, second.seed) == (10.5, 2.5, 0)
        assert (second.text, second.effective_parameters, second.source) == (None, None, f"{path}:5")

    def test_final_loss_is_preferred_to_an_agreeing_loss_reduction_and_is_never_negative(self, tmp_path: Path) -> None:
        header = "rank,target_tokens,initial_loss,final_loss,loss_reduction\n"
        path = write(tmp_path, f"{header}1,64,13.0,0.01,12.9\n1,64,13.0,,13.000001\n")
        assert [run.final_loss for run in read_csv(path)] == [0.01, 0.0]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "no rows; expected a header and one run per line, with rank, target_tokens, initial_loss"),
            ("rank,initial_loss,final_loss\n1,2,1\n", "line 1: no column target_tokens; expected rank, target_tokens,"),
            ("rank,target_tokens,initial_loss\n1,2,3\n", "line 1: no column final_loss or loss_reduction; expected"),
            ("rank,target_tokens,initial_loss,final_loss,lr\n1,2,3,1,1\n", "line 1: column 'lr'; expected rank, targ"),
            ("rank,target_tokens,initial_loss,final_loss\n1,2,3\n", "line 2: 3 values for 4 columns"),
            ("rank,target_tokens,initial_loss,final_loss\n# two\n0,2,3,1\n", "line 3, column rank: input should be gr"),
            ("rank,target_tokens,initial_loss,final_loss\n1,2,x,1\n", "line 2, column initial_loss: input should be a"),
            ("rank,target_tokens,initial_loss,final_loss\n1,2,3,nan\n", "line 2, column final_loss: .*got 'nan'"),
            ("rank,target_tokens,initial_loss,final_loss\n1,,3,1\n", "line 2, column target_tokens: .*got nothing"),
            ("rank,target_tokens,initial_loss,final_loss\n1,2,3,\n", "line 2, column final_loss: expected a number h"),
            (
                "rank,target_tokens,initial_loss,loss_reduction\n1,2,3,3.01\n",
                "line 2, column loss_reduction: expected at most initial_loss = 3, got 3.01; correct one of the two",
            ),
            (
                "rank,target_tokens,initial_loss,final_loss,loss_reduction\n1,2,3,1,1\n",
                "line 2, column loss_reduction: expected initial_loss - final_loss = 2, got 1; leave one",
            ),
        ],
    )
    def test_the_error_for_a_malformed_file_says_where_and_what_is_wrong(
        self, tmp_path: Path, text: str, message: str
    ) -> None:
        path = write(tmp_path, text)
        with pytest.raises(InputError, match=message) as caught:
            read_csv(path)
        assert str(caught.value).startswith(str(path))
        assert "\n" not in str(caught.value)

    def test_a_missing_file_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"none\.csv: cannot be read"):
            read_csv(tmp_path / "none.csv")


@pytest.fixture(scope="module")
def law() -> LawFit:
    return fit_law(read_csv(FIGURE_2))


class TestPublishedFigure:
    """Figure 2 of the paper: fits give the values and 95 % intervals that `configs/published/README.md` states."""

    def test_the_file_has_208_runs_of_which_139_are_saturated(self) -> None:
        runs = read_csv(FIGURE_2)
        assert (len(runs), sum(map(saturated, runs))) == (208, 139)
        assert {run.initial_loss for run in runs} == {12.33}
        assert {run.effective_parameters / run.rank for run in runs if run.effective_parameters} == {8192}
        assert runs[0].entropy_bits == pytest.approx(runs[0].target_tokens * math.log2(151936), rel=1e-4)

    @pytest.mark.parametrize(
        ("form", "parameter", "value", "interval"),
        [
            ("ceiling_offset", "alpha", 0.872, (0.84, 0.90)),
            ("ceiling_offset", "beta", 0.749, (0.71, 0.78)),
            ("ceiling_offset", "b", 0.58, None),
            ("ceiling_offset", "sharpness", 6.5, None),
            ("entropy_power", "alpha", 0.83, (0.82, 0.84)),
            ("entropy_power", "beta", 0.714, (0.69, 0.735)),
            ("entropy_power", "sharpness", 7.14, None),
            ("ceiling", "alpha", 0.754, (0.743, 0.765)),
            ("ceiling", "beta", 0.648, (0.625, 0.667)),
            ("ceiling", "sharpness", 8.68, None),
            ("power_offset", "alpha", 0.657, (0.59, 0.73)),
            ("power_offset", "beta", 0.554, (0.50, 0.62)),
            ("power_offset", "b", -0.396, None),
            ("stored_bits", "bits_per_parameter", 0.875, (0.82, 0.934)),
            ("stored_bits", "sharpness", 3.42, None),
        ],
    )
    def test_parameters_and_intervals_have_the_stated_values(
        self, law: LawFit, form: str, parameter: str, value: float, interval: tuple[float, float] | None
    ) -> None:
        found = law.fit_of(form).parameters[parameter]  # type: ignore[arg-type]
        assert found.value == pytest.approx(value, rel=0.005)
        assert found.stderr is not None
        if interval is not None:
            assert found.interval == pytest.approx(interval, abs=0.006)

    @pytest.mark.parametrize(
        ("form", "r2", "aicc", "largest_length"),
        [
            ("ceiling_offset", 0.9996, -330, 1.3),
            ("entropy_power", 0.9995, -326, 1.8),
            ("ceiling", 0.9994, -291, 4.0),
            ("power_offset", 0.9979, -206, 6.2),
            ("stored_bits", 0.9919, -93, 13.2),
        ],
    )
    def test_r2_aicc_and_held_out_error_have_the_stated_values(
        self, law: LawFit, form: str, r2: float, aicc: float, largest_length: float
    ) -> None:
        fit = law.fit_of(form)  # type: ignore[arg-type]
        assert fit.r2_all == pytest.approx(r2, abs=5.1e-5)
        assert fit.aicc == pytest.approx(aicc, abs=0.6)
        held = fit.largest("target_tokens")
        assert held is not None
        assert (held.value, held.runs) == (10_000, 10)
        assert held.mape_percent == pytest.approx(largest_length, abs=0.06)

    def test_the_published_form_has_the_r2_that_the_paper_prints(self, law: LawFit) -> None:
        # The paper prints 0.996. One of the 70 runs in its scatter plot has a final loss below ln 2.
        fit = law.fit_of("power_offset")
        assert fit.observations_used == 69
        assert fit.r2 == pytest.approx(0.9958, abs=5e-5)

    def test_the_saturating_form_with_an_offset_is_chosen(self, law: LawFit) -> None:
        assert law.form == "ceiling_offset"

    def test_bits_per_parameter_of_unsaturated_runs_differ_fourfold(self, law: LawFit) -> None:
        each = [
            (run.stored_bits or 0.0) / (run.effective_parameters or 1) for run in law.observations if not saturated(run)
        ]
        assert (min(each), max(each)) == pytest.approx((0.4, 1.6), abs=0.15)


class TestCommand:
    def test_law_fits_a_csv_file_and_draws_a_figure(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["law", str(FIGURE_2), "--form", "power", "--out", str(tmp_path)]) == 0
        printed = capsys.readouterr().out
        assert printed.startswith("dL = 267 r^0.701 l^-0.590\n")
        assert "stored bits per parameter: 0.875 (95 % interval 0.819 to 0.934)" in printed
        law = read_law(tmp_path / "law.json")
        assert law.setting == {"files": [FIGURE_2.as_posix()]}
        assert (tmp_path / "law.png").read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize("others", [["runs"], ["--where.method", "sft"]])
    def test_a_csv_file_cannot_be_combined_with_records(self, others: list[str]) -> None:
        parser = jsonargparse.ArgumentParser()
        command.configure(parser)
        with pytest.raises(InputError, match=r"figure2\.csv: a CSV file cannot be combined"):
            command.run(parser.parse_args([str(FIGURE_2), *others]))


def test_only_line_breaks_end_a_row_and_an_overlong_field_is_refused(tmp_path: Path) -> None:
    # Code that reads large tables raises this limit.
    csv.field_size_limit(131_072)
    path = tmp_path / "runs.csv"
    path.write_text("rank,target_tokens,initial_loss,final_loss,text\r\n2,8,9,5,one\u2028text\r\n", newline="")
    assert [run.text for run in read_csv(path)] == ["one\u2028text"]
    path.write_text(f"rank,target_tokens,initial_loss,final_loss,text\n2,8,9,5,{'a' * 200_000}\n")
    with pytest.raises(InputError, match="not CSV"):
        read_csv(path)
