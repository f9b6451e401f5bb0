"""Figures and tables: what they show, what they leave out, and that they are written whole."""

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from record_factory import make_record
from rich.console import Console

from pml.law import Cell, LawFit, fit_law, saturated
from pml.records import Record
from pml.report import law_figure, records_table, save_figure

RANKS = (1, 2, 4, 6)
LENGTHS = (64, 128, 256)


def law_cells() -> list[Cell]:
    """Cells of dL = 60 r^0.5 l^-0.5 + 0.5 with 13.6 nats to lose: 3 are saturated; one more diverged."""
    cells = []
    for rank in RANKS:
        for length in LENGTHS:
            reduction = 60 * (rank / length) ** 0.5 + 0.5
            cells.append(Cell(rank, length, 13.6, max(13.6 - reduction, 0.05), 0, f"r{rank}-l{length}"))
    return [*cells, Cell(2, 128, 13.6, 40.0, 1, "diverged")]


@pytest.fixture(scope="module")
def fit() -> LawFit:
    return fit_law(law_cells())


@pytest.fixture(scope="module")
def figure(fit: LawFit) -> Figure:
    return law_figure(fit, law_cells())


def points(axes: Axes, label: str) -> list[Line2D]:
    return [line for line in axes.lines if line.get_label() == label]


def positions(lines: list[Line2D]) -> list[tuple[float, float]]:
    return sorted((float(np.asarray(line.get_xdata())[0]), float(np.asarray(line.get_ydata())[0])) for line in lines)


def printed(records: dict[Path, Record], width: int = 100) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(records_table(records))
    return console.export_text()


class TestLawFigure:
    def test_it_has_two_panels_whose_axes_say_their_units(self, figure: Figure) -> None:
        left, right = figure.axes
        assert left.get_xlabel() == "measured loss reduction (nats per target token)"
        assert left.get_ylabel() == "predicted loss reduction (nats per target token)"
        assert right.get_xlabel() == "LoRA rank (logarithmic)"
        assert right.get_ylabel() == "loss reduction (nats per target token)"

    def test_the_title_has_the_equation_and_r2(self, figure: Figure, fit: LawFit) -> None:
        assert r"\Delta L = 60.0\,r^{0.500}\,\ell^{-0.500} + 0.500" in figure.get_suptitle()
        assert f"= {fit.r2:.4f}, MAPE" in figure.axes[0].get_title()

    def test_every_used_cell_is_drawn_filled_where_it_was_measured(self, figure: Figure, fit: LawFit) -> None:
        left, right = figure.axes
        used = points(left, "used")
        np.testing.assert_allclose(positions(used), sorted((c.measured, c.predicted) for c in fit.used))
        np.testing.assert_allclose(positions(points(right, "used")), sorted((c.rank, c.measured) for c in fit.used))
        assert all(to_hex(line.get_markerfacecolor()) != "#ffffff" for line in used)

    def test_saturated_cells_are_drawn_hollow_in_both_panels(self, figure: Figure) -> None:
        expected = sorted((c.rank, c.loss_reduction) for c in law_cells() if saturated(c))
        assert len(expected) == 3
        for axes in figure.axes:
            hollow = points(axes, "saturated")
            assert len(hollow) == 3
            assert all(to_hex(line.get_markerfacecolor()) == "#ffffff" for line in hollow)
            assert all(to_hex(line.get_markeredgecolor()) != "#ffffff" for line in hollow)
        np.testing.assert_allclose(positions(points(figure.axes[1], "saturated")), expected)

    def test_diverged_cells_are_not_drawn(self, figure: Figure) -> None:
        for axes in figure.axes:
            assert len(points(axes, "used") + points(axes, "saturated")) == len(RANKS) * len(LENGTHS)

    def test_the_identity_line_is_drawn(self, figure: Figure) -> None:
        (line,) = points(figure.axes[0], "identity")
        np.testing.assert_array_equal(line.get_xdata(), line.get_ydata())

    def test_all_points_lie_inside_the_axes(self, figure: Figure) -> None:
        for axes in figure.axes:
            (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
            assert all(x0 <= x <= x1 and y0 <= y <= y1 for x, y in positions([*points(axes, "used")]))
            assert all(x0 <= x <= x1 and y0 <= y <= y1 for x, y in positions([*points(axes, "saturated")]))

    def test_predictions_beyond_the_upper_edge_are_said_to_be_there(self, fit: LawFit, figure: Figure) -> None:
        far = Cell(500, 64, 13.6, 0.05, 0, "far")
        # 60 (6 / 64)^0.5 + 0.5 = 18.9 nats are beyond it already; rank 500 adds one with 168 nats.
        assert [text.get_text() for text in figure.axes[0].texts] == ["at the upper edge: 1 predicted beyond it"]
        squeezed = law_figure(fit, [*law_cells(), far])
        assert [text.get_text() for text in squeezed.axes[0].texts] == ["at the upper edge: 2 predicted beyond it"]
        assert squeezed.axes[0].get_ylim() == figure.axes[0].get_ylim()

    def test_the_rank_axis_is_logarithmic_and_ticked_at_the_ranks(self, figure: Figure) -> None:
        right = figure.axes[1]
        assert right.get_xscale() == "log"
        assert list(right.get_xticks()) == list(RANKS)
        assert [tick.get_text() for tick in right.get_xticklabels()] == ["1", "2", "4", "6"]
        assert list(right.get_xticks(minor=True)) == []

    def test_close_ranks_keep_their_ticks_but_not_labels_that_would_touch(self) -> None:
        cells = [Cell(r, n, 99.0, 99 - (9 * (r / n) ** 0.5 + 0.5), 0, "") for r in (1, 2, 15, 16, 128) for n in LENGTHS]
        right = law_figure(fit_law(cells), cells).axes[1]
        assert list(right.get_xticks()) == [1, 2, 15, 16, 128]
        assert [tick.get_text() for tick in right.get_xticklabels()] == ["1", "2", "15", "", "128"]

    def test_each_length_has_a_solid_line_of_the_law_over_the_ranks_that_were_used(
        self, figure: Figure, fit: LawFit
    ) -> None:
        lines = [line for line in figure.axes[1].lines if line.get_linestyle() == "-"]
        assert len(lines) == len(LENGTHS)
        for line, length in zip(lines, LENGTHS, strict=True):
            ranks = [cell.rank for cell in fit.used if cell.target_tokens == length]
            x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
            assert (x[0], x[-1]) == pytest.approx((min(ranks), max(ranks)))
            np.testing.assert_allclose(y, 60 * (x / length) ** 0.5 + 0.5, rtol=1e-6)

    def test_the_legend_names_every_length_and_what_hollow_means(self, figure: Figure) -> None:
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == [
            "64 tokens",
            "128 tokens",
            "256 tokens",
            "hollow: saturated,\nnot used in the fit",
        ]

    @pytest.mark.parametrize("count", [3, 7, 8, 12])
    def test_lengths_differ_in_colour_and_neighbours_in_marker(self, count: int) -> None:
        lengths = [100 * (n + 1) for n in range(count)]
        cells = [Cell(r, n, 99.0, 99 - (9 * (r / n) ** 0.5 + 0.5), 0, "") for r in (1, 2, 4) for n in lengths]
        (legend,) = law_figure(fit_law(cells), cells).legends
        handles = [handle for handle in legend.get_lines() if handle.get_linestyle() != "None"]
        assert len({str(handle.get_color()) for handle in handles}) == count
        assert all(a.get_marker() != b.get_marker() for a, b in itertools.pairwise(handles))
        assert len(legend.get_texts()) == count, "without saturated cells, nothing is said about them"

    def test_the_title_says_what_the_law_is_about_and_that_there_are_warnings(self) -> None:
        setting = {"backbone": "m", "block": [20], "placement": ["a", "b"], "method": "sft", "corpus": ["x", "y"]}
        law = fit_law(law_cells(), setting)
        assert len(law.warnings) == 2
        title = law_figure(law, law_cells()).get_suptitle()
        assert title.endswith("\nx, y in m, block 20, a b, sft, 2 warnings with the fit")

    def test_large_numbers_are_written_as_powers_of_ten(self) -> None:
        cells = [Cell(r, n, 99.0, 99 - (2e6 * r**0.5 * n**-1.6 + 1), 0, "") for r in RANKS for n in (4000, 8000, 16000)]
        title = law_figure(fit_law(cells), cells).get_suptitle()
        assert title.startswith(r"$\Delta L = 2.00 \times 10^{6}\,r^{0.500}\,\ell^{-1.60} + 1.00$")


class TestSaveFigure:
    def test_the_suffix_says_the_format(self, figure: Figure, tmp_path: Path) -> None:
        assert save_figure(figure, tmp_path / "new" / "law.png").read_bytes().startswith(b"\x89PNG")
        assert save_figure(figure, tmp_path / "law.svg").read_bytes().startswith(b"<?xml")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["law.svg", "new"]

    def test_a_failure_leaves_the_former_figure_and_nothing_else(
        self, figure: Figure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = save_figure(figure, tmp_path / "law.png")
        before = path.read_bytes()

        def half(self: Figure, file: object, **options: object) -> None:
            file.write(b"half")  # type: ignore[attr-defined]
            raise RuntimeError("stopped")

        monkeypatch.setattr(Figure, "savefig", half)
        with pytest.raises(RuntimeError, match="stopped"):
            save_figure(figure, path)
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]


class TestRecordsTable:
    def test_rows_are_sorted_by_corpus_length_rank_and_method(self) -> None:
        records = {
            Path("a"): make_record(rank=8),
            Path("b"): make_record(rank=2),
            Path("c"): make_record(rank=2, method="sft"),
            Path("d"): make_record(rank=16, target_tokens=32),
            Path("e"): make_record(corpus="phonebook"),
        }
        rows = [line.split()[0] for line in printed(records).splitlines() if line[:1] in set("abcde")]
        assert rows == ["e", "d", "b", "c", "a"]

    def test_a_row_says_what_the_record_says(self) -> None:
        record = make_record(
            rank=8,
            pairs=17,
            method="sft",
            target_tokens=640,
            corpus="phonebook",
            initial_loss=13.6,
            final_loss=0.0421,
            token_accuracy=0.975,
            exact_match=0.5,
            generated_exact_match=0.25,
            sub_threshold_fraction=0.0625,
            optimizer_steps=321,
            steps_to_recall=123,
            wall_seconds=45.6,
        )
        lines = printed({Path("x/one"): record, Path("x/two"): make_record()}).splitlines()
        (row,) = [line.split() for line in lines if line.startswith("one")]
        assert " ".join(row) == "one phonebook 17 640 8 sft 13.60 0.042 97.5 50.0 25.0 6.2 321 123 46"

    def test_settings_that_all_runs_share_stand_in_the_caption(self) -> None:
        text = printed({Path("a"): make_record(rank=1), Path("b"): make_record(rank=2)})
        assert "All runs: corpus random_tokens, pairs 1, target tokens 64, method memft." in " ".join(text.split())
        header = text.splitlines()[1]
        assert "rank" in header
        assert "method" not in header

    def test_results_that_no_run_has_stand_in_the_caption(self) -> None:
        text = " ".join(printed({Path("a"): make_record(generated_exact_match=None)}).split())
        assert "None of the runs has: generated, recall after." in text
        assert "Recall after: steps until" not in text

    def test_what_one_run_lacks_is_a_dash(self) -> None:
        text = printed({Path("a"): make_record(steps_to_recall=None), Path("b"): make_record(steps_to_recall=9)})
        (row,) = [line.split() for line in text.splitlines() if line.startswith("a ")]
        assert row[-2] == "-"
        assert "Recall after: steps until every target token was certified." in " ".join(text.split())

    @pytest.mark.parametrize(
        ("share", "shown"), [(1.0, "100.0"), (0.9999, ">99.9"), (0.0, "0.0"), (0.0001, "<0.1"), (0.123, "12.3")]
    )
    def test_only_a_whole_share_reads_100_and_only_none_reads_0(self, share: float, shown: str) -> None:
        (row,) = [line.split() for line in printed({Path("a"): make_record(token_accuracy=share)}).splitlines()[3:4]]
        assert row[3] == shown

    def test_numbers_are_aligned_on_the_right(self) -> None:
        lines = printed({Path("a"): make_record(optimizer_steps=7), Path("b"): make_record(optimizer_steps=12345)})
        rows = [line for line in lines.splitlines() if line[:2] in ("a ", "b ")]
        assert rows[0].index(" 7 ") + 1 == rows[1].index("12345") + 4

    def test_folders_of_the_same_name_are_told_apart(self) -> None:
        text = printed({Path("sft/seed-0"): make_record(), Path("memft/seed-0"): make_record()})
        assert "sft/seed-0" in text
        assert "memft/seed-0" in text

    def test_an_interrupted_run_says_so(self) -> None:
        assert "a (interrupted)" in printed({Path("a"): make_record(status="interrupted")})

    def test_even_the_widest_table_fits_100_columns_with_every_number_whole(self) -> None:
        long = make_record(
            corpus="random_tokens",
            pairs=10000,
            target_tokens=320000,
            rank=1024,
            optimizer_steps=12345,
            steps_to_recall=123456,
            wall_seconds=9876,
        )
        text = printed(
            {Path("phonebook_memft_rank-4_seed-0"): long, Path("b"): make_record(method="sft", corpus="phonebook")}
        )
        assert max(len(line.rstrip()) for line in text.splitlines()) <= 100
        assert "…" not in text
        (row,) = [line.split() for line in text.splitlines() if "320000" in line]
        assert " ".join(row[2:]) == "10000 320000 1024 memft 13.60 3.100 75.0 0.0 0.0 30.0 12345 123456 9876"

    def test_without_records_the_table_is_empty(self) -> None:
        assert records_table({}).row_count == 0
