"""Figures: what they show, what they omit, and that they are saved whole or not at all."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from record_factory import make_record

from pml.figures import (
    Curves,
    agreement_figure,
    first_failure_figure,
    law_figure,
    learning_figure,
    map_figures,
    phases_figure,
    png_bytes,
    recall_figure,
    reduction_figure,
    residual_figure,
    save_figure,
    svg_data_uri,
)
from pml.figures.heat_map import draw_heat_map, is_grid, over_grid
from pml.figures.style import FEW_COLOURS, literal, styles_of
from pml.law import FormName, LawFit, Observation, fit_law, saturated
from pml.records import Record
from pml.token_results import FirstPositions, rank_correlation

RANKS = (1, 2, 4, 6)
LENGTHS = (64, 128, 256)


def law_runs() -> list[Observation]:
    """Runs of dL = 60 r^0.5 l^-0.5 + 0.5 with an initial loss of 13.6 nats: 3 are saturated, and one more diverged."""
    runs = []
    for rank in RANKS:
        for length in LENGTHS:
            reduction = 60 * (rank / length) ** 0.5 + 0.5
            runs.append(Observation(rank, length, 13.6, max(13.6 - reduction, 0.05), 0, f"r{rank}-l{length}"))
    return [*runs, Observation(2, 128, 13.6, 40.0, 1, "diverged")]


def noisy_runs(factor: float = 60) -> list[Observation]:
    """Runs of dL = factor r^0.5 l^-0.5 + 0.5 with 2 % noise and 13.6 nats of initial loss; at 20 none saturates."""
    noise = np.random.default_rng(0)
    reductions = {(r, n): (factor * (r / n) ** 0.5 + 0.5) * noise.normal(1, 0.02) for r in RANKS for n in LENGTHS}
    return [Observation(r, n, 13.6, max(13.6 - fell, 0.05), 0, f"{r}-{n}") for (r, n), fell in reductions.items()]


@pytest.fixture(scope="module")
def fit() -> LawFit:
    # A form without a ceiling, which predicts more than saturated runs can reach and is fitted without them.
    return fit_law(law_runs(), form="power_offset")


@pytest.fixture(scope="module")
def figure(fit: LawFit) -> Figure:
    return law_figure(fit)


def panels(figure: Figure) -> list[Axes]:
    """Return the axes of loss reduction by rank, by length, and predicted against measured."""
    return figure.axes[:3]


def points(axes: Axes, label: str) -> list[Line2D]:
    return [line for line in axes.lines if line.get_label() == label]


def positions(lines: list[Line2D]) -> list[tuple[float, float]]:
    return sorted((float(np.asarray(line.get_xdata())[0]), float(np.asarray(line.get_ydata())[0])) for line in lines)


class TestLawFigure:
    def test_panels_are_labelled_with_quantity_and_unit(self) -> None:
        runs = [replace(run, generated_token_accuracy=0.25) for run in law_runs()]
        drawn = law_figure(fit_law(runs, form="power_offset"))
        by_rank, by_length, agreement, loss, accuracy = [axes for axes in drawn.axes if axes.get_xlabel()]
        assert (by_rank.get_xlabel(), by_length.get_xlabel()) == ("LoRA rank", "target tokens")
        assert by_rank.get_ylabel() == by_length.get_ylabel() == "loss reduction (nats per target token)"
        assert agreement.get_xlabel() == "measured loss reduction (nats)"
        assert agreement.get_ylabel() == "predicted loss reduction (nats)"
        assert (loss.get_title(), accuracy.get_title()) == (
            "final loss (nats per target token)",
            "token accuracy, greedy decoding",
        )

    def test_without_greedy_decoding_there_is_no_map_of_token_accuracy(self, figure: Figure) -> None:
        assert [axes.get_title() for axes in figure.axes if "token" in axes.get_title()] == [
            "final loss (nats per target token)"
        ]

    def test_the_titles_have_the_equation_and_r_squared(self, figure: Figure, fit: LawFit) -> None:
        assert r"\Delta L = 60.0\,r^{0.500}\,\ell^{-0.500} + 0.500" in figure.get_suptitle()
        assert f"= {fit.best.r2:.4f}, MAPE" in panels(figure)[2].get_title()

    def test_every_fitted_run_is_a_filled_marker_at_its_measured_value(self, figure: Figure, fit: LawFit) -> None:
        right, by_length, left = panels(figure)
        assert len(points(by_length, "unsaturated")) == len(fit.used)
        used = points(left, "unsaturated")
        np.testing.assert_allclose(positions(used), sorted((c.loss_reduction, p) for c, p in fit.used))
        np.testing.assert_allclose(
            positions(points(right, "unsaturated")), sorted((c.rank, c.loss_reduction) for c, _ in fit.used)
        )
        assert all(to_hex(line.get_markerfacecolor()) != "#ffffff" for line in used)

    def test_saturated_runs_are_drawn_as_hollow_markers(self, figure: Figure) -> None:
        expected = sorted((c.rank, c.loss_reduction) for c in law_runs() if saturated(c))
        assert len(expected) == 3
        for axes in panels(figure):
            hollow = points(axes, "saturated")
            assert len(hollow) == 3
            assert all(to_hex(line.get_markerfacecolor()) == "#ffffff" for line in hollow)
            assert all(to_hex(line.get_markeredgecolor()) != "#ffffff" for line in hollow)
        np.testing.assert_allclose(positions(points(figure.axes[0], "saturated")), expected)

    def test_diverged_runs_are_not_drawn(self, figure: Figure) -> None:
        for axes in panels(figure):
            assert len(points(axes, "unsaturated") + points(axes, "saturated")) == len(RANKS) * len(LENGTHS)

    def test_the_identity_line_is_drawn(self, figure: Figure) -> None:
        (line,) = points(panels(figure)[2], "identity")
        np.testing.assert_array_equal(line.get_xdata(), line.get_ydata())

    def test_all_points_lie_inside_the_axes(self, figure: Figure) -> None:
        for axes in panels(figure):
            (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
            assert all(x0 <= x <= x1 and y0 <= y <= y1 for x, y in positions([*points(axes, "unsaturated")]))
            assert all(x0 <= x <= x1 and y0 <= y <= y1 for x, y in positions([*points(axes, "saturated")]))

    def test_the_number_of_predictions_beyond_the_upper_edge_is_written_in_the_panel(self, figure: Figure) -> None:
        far = Observation(500, 64, 13.6, 0.05, 0, "far")
        # Rank 6 at length 64 is beyond it, with 60 (6 / 64)^0.5 + 0.5 = 18.9 nats; rank 500 adds another, with 168.
        assert [text.get_text() for text in panels(figure)[2].texts] == ["at the upper edge: 1 predicted beyond it"]
        squeezed = law_figure(fit_law([*law_runs(), far], form="power_offset"))
        assert [text.get_text() for text in panels(squeezed)[2].texts] == ["at the upper edge: 2 predicted beyond it"]
        assert panels(squeezed)[2].get_ylim() == panels(figure)[2].get_ylim()

    def test_the_rank_axis_is_logarithmic_with_ticks_at_the_ranks(self, figure: Figure) -> None:
        right = figure.axes[0]
        assert right.get_xscale() == "log"
        assert list(right.get_xticks()) == list(RANKS)
        assert [tick.get_text() for tick in right.get_xticklabels()] == ["1", "2", "4", "6"]
        assert list(right.get_xticks(minor=True)) == []

    def test_close_ranks_keep_their_ticks_but_lose_labels_that_would_overlap(self) -> None:
        runs = [
            Observation(r, n, 99.0, 99 - (9 * (r / n) ** 0.5 + 0.5), 0, "")
            for r in (1, 2, 15, 16, 128)
            for n in LENGTHS
        ]
        right = law_figure(fit_law(runs)).axes[0]
        assert list(right.get_xticks()) == [1, 2, 15, 16, 128]
        assert [tick.get_text() for tick in right.get_xticklabels()] == ["1", "2", "15", "", "128"]

    def test_each_length_has_a_solid_line_of_the_law_over_its_fitted_ranks(self, figure: Figure, fit: LawFit) -> None:
        lines = [line for line in figure.axes[0].lines if line.get_linestyle() == "-"]
        assert len(lines) == len(LENGTHS)
        for line, length in zip(lines, LENGTHS, strict=True):
            ranks = [run.rank for run, _ in fit.used if run.target_tokens == length]
            x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
            assert (x[0], x[-1]) == pytest.approx((min(ranks), max(ranks)))
            np.testing.assert_allclose(y, 60 * (x / length) ** 0.5 + 0.5, rtol=1e-6)

    def test_the_legends_list_every_length_and_rank_and_explain_hollow_markers(self, figure: Figure) -> None:
        legends = [axes.get_legend() for axes in panels(figure)[:2]]
        assert [[text.get_text() for text in legend.get_texts()] for legend in legends if legend] == [
            ["64", "128", "256", "saturated"],
            ["1", "2", "4", "6", "saturated"],
        ]

    @pytest.mark.parametrize("count", [3, 7, 8, 12])
    def test_lengths_differ_in_colour_and_adjacent_ones_in_marker(self, count: int) -> None:
        lengths = [100 * (n + 1) for n in range(count)]
        runs = [Observation(r, n, 99.0, 99 - (9 * (r / n) ** 0.5 + 0.5), 0, "") for r in (1, 2, 4) for n in lengths]
        legend = law_figure(fit_law(runs)).axes[0].get_legend()
        assert legend is not None
        handles = [handle for handle in legend.get_lines() if handle.get_linestyle() != "None"]
        assert len({str(handle.get_color()) for handle in handles}) == count
        assert all(a.get_marker() != b.get_marker() for a, b in itertools.pairwise(handles))
        assert len(legend.get_texts()) == count, "without saturated runs, nothing is said about them"

    def test_the_title_states_the_setting_and_the_number_of_warnings(self) -> None:
        setting = {"backbone": "m", "block": [20], "placement": ["a", "b"], "method": "sft", "corpus": ["x", "y"]}
        law = fit_law(law_runs(), setting, form="power_offset")
        assert len(law.warnings) == 3
        title = law_figure(law).get_suptitle()
        assert title.endswith("\nx, y in m, block 20, a b, sft, 3 warnings with the fit")

    def test_large_numbers_are_written_in_scientific_notation(self) -> None:
        runs = [
            Observation(r, n, 99.0, 99 - (2e6 * r**0.5 * n**-1.6 + 1), 0, "")
            for r in RANKS
            for n in (4000, 8000, 16000)
        ]
        title = law_figure(fit_law(runs)).get_suptitle()
        assert title.startswith(r"$\Delta L = 2.00 \times 10^{6}\,r^{0.500}\,\ell^{-1.60} + 1.00$")


class TestSaveFigure:
    def test_the_suffix_selects_the_format(self, figure: Figure, tmp_path: Path) -> None:
        assert save_figure(figure, tmp_path / "new" / "law.png").read_bytes().startswith(b"\x89PNG")
        assert save_figure(figure, tmp_path / "law.svg").read_bytes().startswith(b"<?xml")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["law.svg", "new"]

    def test_a_failed_save_keeps_the_previous_figure_and_leaves_no_other_file(
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


class TestReductionFigure:
    @pytest.mark.parametrize(("by", "label"), [("rank", "LoRA rank"), ("length", "target tokens")])
    def test_both_axes_are_logarithmic_with_ticks_at_the_ranks_or_lengths_of_the_runs(
        self, fit: LawFit, by: str, label: str
    ) -> None:
        (axes,) = reduction_figure(fit, by).axes  # type: ignore[arg-type]
        assert (axes.get_xscale(), axes.get_yscale(), axes.get_xlabel()) == ("log", "log", label)
        assert list(axes.get_xticks()) == list(RANKS if by == "rank" else LENGTHS)
        assert axes.get_ylabel() == "loss reduction (nats per target token)"

    def test_fitted_runs_are_at_their_measured_values_and_saturated_ones_are_labelled(self, fit: LawFit) -> None:
        (axes,) = reduction_figure(fit, "length").axes
        used = sorted((run.target_tokens, run.loss_reduction) for run, _ in fit.used)
        np.testing.assert_allclose(positions(points(axes, "unsaturated")), used)
        assert len(points(axes, "saturated")) == 3

    def test_by_length_each_rank_has_a_line_of_the_law(self, fit: LawFit) -> None:
        (axes,) = reduction_figure(fit, "length").axes
        lines = [line for line in axes.lines if line.get_linestyle() == "-"]
        for line, rank in zip(lines, (rank for rank in RANKS), strict=True):
            x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
            np.testing.assert_allclose(y, 60 * (rank / x) ** 0.5 + 0.5, rtol=1e-6)

    def test_a_law_of_noisy_runs_has_a_band_around_each_line(self) -> None:
        runs = noisy_runs(20)
        law = fit_law(runs)
        (axes,) = reduction_figure(law, "rank").axes
        assert len(axes.collections) == len(LENGTHS)
        for band, length in zip(axes.collections, LENGTHS, strict=True):
            (path,) = band.get_paths()
            low, high = path.vertices[:, 1].min(), path.vertices[:, 1].max()
            assert low < float(law.predict(RANKS[0], length)) < float(law.predict(RANKS[-1], length)) < high

    @pytest.mark.parametrize("form", ["power_offset", "ceiling"])
    def test_by_rank_the_figure_equals_the_first_panel_of_the_law_figure(self, form: FormName) -> None:
        law, runs = fit_law(noisy_runs(), form=form), noisy_runs()
        (alone,), beside = reduction_figure(law, "rank").axes, law_figure(law).axes[0]
        assert any(map(saturated, runs))
        styles = [[line.get_linestyle() for line in axes.lines] for axes in (alone, beside)]
        assert styles[0] == styles[1]
        assert {"-", ":"} <= set(styles[0])
        for one, other in zip(alone.lines, beside.lines, strict=True):
            np.testing.assert_array_equal(one.get_xydata(), other.get_xydata())
            assert one.get_color() == other.get_color()
        assert len(alone.collections) == len(LENGTHS)
        for band, same in zip(alone.collections, beside.collections, strict=True):
            np.testing.assert_array_equal(band.get_paths()[0].vertices, same.get_paths()[0].vertices)
        assert (alone.get_ylim(), alone.get_yscale()) == (beside.get_ylim(), beside.get_yscale())

    def test_a_line_above_the_largest_possible_reduction_does_not_extend_the_axis(self) -> None:
        far = Observation(500, 64, 13.6, 0.05, 0, "far")
        law = fit_law([*law_runs(), far], form="power_offset")
        for axes in (reduction_figure(law, "rank").axes[0], law_figure(law).axes[0]):
            assert max(np.asarray(line.get_ydata()).max() for line in axes.lines) > 160
            assert axes.get_ylim()[1] < 20

    def test_a_law_that_cannot_predict_ranks_has_no_lines_and_says_why(self) -> None:
        runs = [
            replace(run, effective_parameters=1152 * run.rank * (1 + (run.target_tokens > 64))) for run in law_runs()
        ]
        law = fit_law(runs, adapter_size="effective_parameters")
        assert not law.predicts_ranks
        by_rank, by_length = (reduction_figure(law, by).axes[0] for by in ("rank", "length"))
        for axes in (by_rank, by_length, law_figure(law).axes[0]):
            assert axes.get_title() == "no lines: parameters per rank differ"
            assert len(axes.lines) == len(RANKS) * len(LENGTHS)
            assert not axes.collections

    def test_a_saturated_run_whose_loss_did_not_fall_is_not_drawn(self) -> None:
        knew_it = Observation(4, 64, 0.2, 0.3, 0, "knew-it")
        law = fit_law([*law_runs(), knew_it], form="power_offset")
        for figure in (reduction_figure(law, "rank"), law_figure(law)):
            for axes in panels(figure):
                assert len(points(axes, "saturated")) == 3


class TestHeatMap:
    def test_a_cell_is_the_mean_over_seeds_and_missing_cells_are_grey(self) -> None:
        runs = [Observation(1, 64, 13.6, 2.0, 0, "a"), Observation(1, 64, 13.6, 4.0, 1, "b")]
        runs += [Observation(2, 64, 13.6, 1.0, 0, "c"), Observation(2, 128, 13.6, 5.0, 0, "d")]
        values = over_grid(runs, lambda run: run.final_loss)
        assert values == {(1, 64): 3.0, (2, 64): 1.0, (2, 128): 5.0}
        axes = Figure().subplots()
        draw_heat_map(axes, values, "final loss", "loss")
        (mesh,) = axes.collections
        # Lengths from bottom to top, ranks from left to right.
        assert np.ma.asarray(mesh.get_array()).tolist() == [[3.0, 1.0], [None, 5.0]]
        assert [text.get_text() for text in axes.texts] == ["3", "1", "5"]
        assert to_hex(mesh.to_rgba(np.ma.masked_invalid([np.nan]))[0]) == "#dddddd"

    def test_a_share_is_100_percent_only_if_it_is_exactly_that(self) -> None:
        axes = Figure().subplots()
        draw_heat_map(axes, {(1, 64): 1.0, (2, 64): 0.996, (1, 128): 0.004, (2, 128): 0.5}, "right", "share")
        assert sorted(text.get_text() for text in axes.texts) == ["0", "100", "50", "99"]

    @pytest.mark.parametrize("values", [{}, {(1, 64): 1.0, (2, 64): 2.0}, {(1, 64): 1.0, (1, 128): 2.0}])
    def test_values_of_a_single_rank_or_length_are_not_a_grid(self, values: dict[tuple[int, int], float]) -> None:
        assert not is_grid(values)


class TestOtherLawFigures:
    def test_separate_maps_equal_those_of_the_law_figure(self, figure: Figure, fit: LawFit) -> None:
        ((title, alone),) = map_figures(fit).items()
        beside = next(axes for axes in figure.axes if axes.get_title() == title)
        assert title == "final loss (nats per target token)"
        np.testing.assert_array_equal(alone.axes[0].collections[0].get_array(), beside.collections[0].get_array())

    def test_the_agreement_figure_has_the_fitted_runs_and_the_identity_line(self, fit: LawFit) -> None:
        (axes,) = agreement_figure(fit).axes
        (line,) = points(axes, "identity")
        np.testing.assert_array_equal(line.get_xdata(), line.get_ydata())
        np.testing.assert_allclose(
            positions(points(axes, "unsaturated")), sorted((c.loss_reduction, p) for c, p in fit.used)
        )

    def test_residuals_are_drawn_by_rank_and_by_length(self, fit: LawFit) -> None:
        by_rank, by_length = residual_figure(fit).axes
        expected = sorted((c.rank, c.loss_reduction - p) for c, p in fit.used)
        np.testing.assert_allclose(positions(points(by_rank, "unsaturated")), expected)
        assert (by_rank.get_xlabel(), by_length.get_xlabel()) == ("LoRA rank", "target tokens")


def run(rank: int, seed: int = 0, **fields: float) -> Record:
    return make_record(rank=rank, seed=seed, effective_parameters=1152 * rank, **fields)


class TestRecallFigure:
    def test_lines_join_the_means_over_seeds_and_error_bars_span_the_extremes(self) -> None:
        runs = [run(1, 0, token_accuracy=0.2), run(1, 1, token_accuracy=0.6), run(2, 0, token_accuracy=0.9)]
        (axes,) = recall_figure({"SFT": runs}, "token_accuracy").axes
        (container,) = axes.containers
        line, _, (bars,) = container.lines
        np.testing.assert_allclose(line.get_xydata(), [(1, 0.4), (2, 0.9)])
        np.testing.assert_allclose(bars.get_segments()[0], [(1, 0.2), (1, 0.6)])

    def test_each_length_has_a_panel_with_a_line_for_each_method(self) -> None:
        runs = [run(rank, target_tokens=length) for rank in (1, 2) for length in (8, 16, 32)]
        figure = recall_figure({"SFT": runs, "MemFT": runs}, "exact_match")
        panels = [axes for axes in figure.axes if axes.axison]
        assert [axes.get_title() for axes in panels] == ["8 tokens", "16 tokens", "32 tokens"]
        looks = [
            {
                (str(c.lines[0].get_color()), c.lines[0].get_marker(), c.lines[0].get_linestyle())
                for c in axes.containers
            }
            for axes in panels
        ]
        assert all(len(look) == 2 for look in looks)
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == ["SFT", "MemFT"]
        # The second column has no panel in the last row, so its panel in the first row has the label.
        assert [axes.get_xlabel() for axes in panels] == ["", "LoRA rank", "LoRA rank"]

    def test_the_share_of_certain_tokens_is_one_minus_the_sub_threshold_fraction(self) -> None:
        runs = [run(1, sub_threshold_fraction=0.75), run(2, sub_threshold_fraction=0.25)]
        (axes,) = recall_figure({"SFT": runs}, "tokens_certain").axes
        (container,) = axes.containers
        np.testing.assert_allclose(container.lines[0].get_xydata(), [(1, 0.25), (2, 0.75)])

    @pytest.mark.parametrize("runs", [[], [run(4), run(4, seed=1)]])
    def test_runs_of_fewer_than_two_ranks_give_no_figure(self, runs: list[Record]) -> None:
        assert recall_figure({"SFT": runs}, "exact_match") is None


class TestFirstFailureFigure:
    def test_positions_are_counted_from_1_and_targets_that_cannot_fail_are_omitted(self) -> None:
        found = FirstPositions(np.array([0, 2, 2, 4, 9]), np.array([0, 5, 5, 6, 9]), np.array([9, 9, 9, 9, 9]))
        correlation = rank_correlation(found)
        assert correlation is not None
        (axes,) = first_failure_figure(found, correlation).axes
        (scatter,) = axes.collections
        np.testing.assert_array_equal(scatter.get_offsets(), [(1, 1), (3, 6), (5, 7)])
        assert np.argmax(scatter.get_sizes()) == 1
        assert axes.get_title().endswith("4 targets")


def curves(certain: list[float], right: list[float]) -> Curves:
    steps = np.array([0, 1, 10, 100])
    return Curves(steps, np.array(certain), np.array(right), np.linspace(4, 0, 4))


class TestTrainingFigures:
    def test_phases_are_stacked_from_certain_to_wrong(self) -> None:
        run = curves([0.0, 0.1, 0.5, 1.0], [0.2, 0.2, 0.3, 0.0])
        figure = phases_figure({"SFT": run, "MemFT": run})
        assert [axes.get_title() for axes in figure.axes] == ["SFT", "MemFT"]
        certain, right, wrong = figure.axes[0].collections
        at_10 = [max(y for x, y in band.get_paths()[0].vertices if x == 10) for band in (certain, right, wrong)]
        assert at_10 == pytest.approx([0.5, 0.8, 1.0])
        assert figure.axes[-1].get_xlabel() == "optimiser steps"

    def test_learning_curves_have_a_line_for_each_run_and_a_colour_for_each_group(self) -> None:
        run = curves([0.0, 0.1, 0.5, 1.0], [0.0] * 4)
        figure = learning_figure({"SFT": [run, run], "MemFT": [run]}, "method")
        loss, certain = figure.axes
        assert len(loss.lines) == len(certain.lines) == 3
        assert len({str(line.get_color()) for line in loss.lines}) == 2
        np.testing.assert_array_equal(certain.lines[0].get_ydata(), run.certain)
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["SFT", "MemFT"]

    @pytest.mark.parametrize(
        ("names", "columns"),
        [
            (["SFT", "OnlyThreshold", "WholeTargets", "ExpectedRecall"], 3),
            (["SFT", "OnlyThreshold + PrefixRatio"], 2),
            (["SFT", "WholeTargets (last_share 0.0)", "WholeTargets (last_share 0.1)"], 1),
        ],
    )
    def test_a_legend_has_as_many_columns_as_fit_into_the_figure(self, names: list[str], columns: int) -> None:
        run = curves([0.0, 0.1, 0.5, 1.0], [0.0] * 4)
        figure = learning_figure({name: [run] for name in names}, "method")
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        (legend,) = figure.legends
        extent = legend.get_window_extent(canvas.get_renderer())
        assert legend._ncols == columns
        assert 0 <= extent.x0 < extent.x1 <= figure.bbox.width

    def test_the_step_axis_is_symmetric_logarithmic_from_0_to_the_last_step(self) -> None:
        (axes,) = phases_figure({"SFT": curves([0, 0, 0, 1], [0, 0, 0, 0])}).axes
        assert (axes.get_xscale(), axes.get_xlim()) == ("symlog", (0, 100))

    def test_all_panels_reach_the_last_step_of_the_longest_run(self) -> None:
        long = curves([0.0, 0.1, 0.5, 1.0], [0.0] * 4)
        short = Curves(long.step // 10, long.certain, long.right, long.loss)
        for runs in ({"SFT": long, "MemFT": short}, {"MemFT": short, "SFT": long}):
            assert [axes.get_xlim() for axes in phases_figure(runs).axes] == [(0, 100), (0, 100)]

    def test_without_a_history_there_is_no_figure(self) -> None:
        assert phases_figure({}) is None
        assert learning_figure({}, "method") is None


def dichromatic(colour: str, kind: str) -> np.ndarray:
    """Return a colour in CIELAB as seen without one kind of cone (Vienot, Brettel and Mollon 1999)."""
    matrices = {
        "protanopia": [[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]],
        "deuteranopia": [[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]],
        "none": np.eye(3).tolist(),
    }
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(matrices[kind]) @ linear, 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = np.array(to_xyz) @ seen / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


class TestStyle:
    @pytest.mark.parametrize("kind", ["none", "protanopia", "deuteranopia"])
    def test_the_colours_of_few_lines_can_be_told_apart_even_with_colour_blindness(self, kind: str) -> None:
        seen = [dichromatic(colour, kind) for colour in FEW_COLOURS]
        distances = [float(np.linalg.norm(a - b)) for a, b in itertools.combinations(seen, 2)]
        # A difference of 2.3 is just noticeable; for thin lines side by side, 10 is comfortable.
        assert min(distances) > 10

    def test_the_colours_of_many_lines_get_steadily_lighter(self) -> None:
        for kind in ("none", "protanopia", "deuteranopia"):
            lightness = [dichromatic(colour, kind)[0] for colour, _ in styles_of(range(12)).values()]
            assert all(b > a for a, b in itertools.pairwise(lightness))

    def test_dollar_signs_in_names_are_not_rendered_as_mathematics(self) -> None:
        assert literal("a$x^2$\nb") == r"a\$x^2\$ b"
        setting = {"backbone": r"$\frac{$", "block": [20], "placement": "$", "method": "sft", "corpus": ["$x$"]}
        assert png_bytes(law_figure(fit_law(law_runs(), setting))).startswith(b"\x89PNG")

    def test_the_same_figure_is_always_written_as_the_same_bytes(self, fit: LawFit) -> None:
        first, second = (residual_figure(fit) for _ in range(2))
        assert png_bytes(first) == png_bytes(second)
        assert svg_data_uri(first) == svg_data_uri(second)
        assert svg_data_uri(first).startswith("data:image/svg+xml;base64,")
