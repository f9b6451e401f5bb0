"""Comparing methods: which runs are a pair, what a difference is worth, and what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from record_factory import make_record, write_run
from scipy import stats

from pml.cli import main
from pml.compare import MEASURES, STEPS_TO_RECALL, Difference, Interval, Measure, compare, difference
from pml.errors import InputError
from pml.records import Record, write_record

LOSS, ACCURACY, _, _ = MEASURES


def sft(**fields: Any) -> Record:
    return make_record(method="sft", method_settings={"weighting": "Uniform", "learning_rate": 0.05}, **fields)


def memft(**fields: Any) -> Record:
    settings = {"weighting": {"class_path": "pml.weighting.OnlyThreshold"}, "learning_rate": 0.05}
    return make_record(**{"method": "memft", "method_settings": settings, **fields})


def pairs(first: list[float], second: list[float], **fields: Any) -> dict[Path, Record]:
    """Runs of both methods, a seed each, with these final losses."""
    found = {Path(f"sft-{seed}"): sft(seed=seed, final_loss=loss, **fields) for seed, loss in enumerate(first)}
    return found | {
        Path(f"mem-{seed}"): memft(seed=seed, final_loss=loss, **fields) for seed, loss in enumerate(second)
    }


def stopped() -> dict[Path, Record]:
    """Runs that stop when they recall, a seed each: three pairs recall, then one of the methods alone, each once."""
    found = {}
    for seed, (first, second) in enumerate(((150, 100), (160, 90), (170, 80), (120, None), (None, 70))):
        for name, make, steps in (("s", sft, first), ("m", memft, second)):
            found[Path(f"{name}{seed}")] = make(seed=seed, optimizer_steps=steps or 300, steps_to_recall=steps)
    return found


def of_measure(differences: list[Difference], measure: Measure) -> Difference:
    (found,) = [found for found in differences if found.measure == measure.field]
    return found


class TestDifference:
    def test_hand_worked_differences_of_1_2_and_3(self) -> None:
        found = difference(LOSS, [5.0, 5.0, 5.0], [4.0, 3.0, 2.0])
        assert (found.first_mean, found.second_mean, found.mean) == (5.0, 3.0, -2.0)
        # Standard deviation 1, so d = -2; standard error 1 / sqrt 3 and t(0.975, 2) = 4.302653.
        assert found.cohens_d == pytest.approx(-2.0)
        assert found.t_interval is not None
        assert found.t_interval.low == pytest.approx(-2 - 4.302653 / math.sqrt(3), rel=1e-6)
        assert found.t_interval.high == pytest.approx(-2 + 4.302653 / math.sqrt(3), rel=1e-6)
        # All three are lower, which is better; three heads in three throws: 2 / 2^3.
        assert (found.dominance, found.sign_test_p) == (1.0, 0.25)

    def test_intervals_are_scipys(self) -> None:
        rng = np.random.default_rng(3)
        first, second = rng.normal(2.0, 1.0, 20), rng.normal(2.5, 1.0, 20)
        found = difference(LOSS, list(first), list(second), confidence=0.9, seed=4)
        expected = stats.ttest_1samp(second - first, 0.0).confidence_interval(0.9)
        assert found.t_interval is not None
        np.testing.assert_allclose((found.t_interval.low, found.t_interval.high), expected)
        bootstrap = stats.bootstrap(
            (second - first,), np.mean, confidence_level=0.9, method="BCa", rng=np.random.default_rng(4)
        ).confidence_interval
        assert found.bootstrap_interval == Interval(float(bootstrap.low), float(bootstrap.high))

    def test_a_pair_that_wins_and_one_that_loses_cancel_in_the_dominance(self) -> None:
        assert difference(ACCURACY, [50, 50, 50, 50], [60, 40, 70, 50]).dominance == pytest.approx((2 - 1) / 4)
        assert difference(LOSS, [5, 5, 5, 5], [6, 4, 7, 5]).dominance == pytest.approx(-(2 - 1) / 4)

    def test_pairs_on_one_text_are_averaged_and_each_text_counts_once(self) -> None:
        # Differences 1, 3 and 5 on the first text and 1 on the second: 3 and 1, mean 2, standard deviation sqrt 2.
        found = difference(ACCURACY, [0, 0, 0, 10], [1, 3, 5, 11], ["a", "a", "a", "b"])
        assert (found.pairs, found.texts, found.first_mean, found.second_mean, found.mean) == (4, 2, 5, 7, 2)
        assert found.cohens_d == pytest.approx(math.sqrt(2))
        assert found.t_interval is not None
        # Standard error 1 and t(0.975, 1) = 12.7062.
        assert (found.t_interval.low, found.t_interval.high) == pytest.approx((2 - 12.7062, 2 + 12.7062), rel=1e-5)
        # Two texts in two are higher: 2 / 2^2; all four pairs are.
        assert (found.sign_test_p, found.dominance) == (0.5, 1.0)

    def test_copies_of_pairs_are_no_further_evidence(self) -> None:
        first, second = [5.0, 4.0, 6.0], [4.0, 3.5, 4.5]
        once = difference(LOSS, first, second)
        twice = difference(LOSS, first * 2, second * 2, list("abcabc"))
        assert (twice.pairs, twice.texts) == (6, 3)
        same = ("mean", "t_interval", "bootstrap_interval", "cohens_d", "sign_test_p", "dominance")
        assert all(getattr(once, name) == getattr(twice, name) for name in same)

    def test_one_pair_has_no_interval_and_decides_nothing(self) -> None:
        found = difference(LOSS, [5.0], [1.0])
        assert (found.t_interval, found.bootstrap_interval, found.cohens_d) == (None, None, None)
        assert (found.mean, found.verdict) == (-4.0, "undecided")

    def test_two_pairs_have_a_t_interval_alone(self) -> None:
        found = difference(LOSS, [5.0, 5.0], [4.0, 3.0])
        assert found.t_interval is not None
        assert found.bootstrap_interval is None

    @pytest.mark.parametrize("step", [0.0, 0.1])
    def test_equal_differences_have_no_interval_and_no_effect_size(self, step: float) -> None:
        first = [0.1, 0.2, 0.3, 0.7]
        found = difference(LOSS, first, [value + step for value in first])
        assert (found.t_interval, found.bootstrap_interval, found.cohens_d) == (None, None, None)
        assert found.mean == pytest.approx(step)

    @pytest.mark.parametrize(("count", "verdict"), [(5, "undecided"), (6, "better")])
    def test_equal_differences_are_judged_by_the_sign_test(self, count: int, verdict: str) -> None:
        # 2 / 2^5 = 0.0625 and 2 / 2^6 = 0.03125, on either side of 0.05.
        assert difference(ACCURACY, [0.0] * count, [100.0] * count).verdict == verdict

    @pytest.mark.parametrize(("measure", "verdict"), [(LOSS, "worse"), (ACCURACY, "better")])
    def test_whether_more_is_better_depends_on_the_measure(self, measure: Measure, verdict: str) -> None:
        assert difference(measure, [1.0, 2.0, 3.0, 4.0], [2.0, 3.1, 4.0, 5.1]).verdict == verdict

    def test_intervals_around_zero_tell_nothing_apart(self) -> None:
        assert difference(LOSS, [1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 4.0, 3.0]).verdict == "undecided"

    def test_the_same_seed_gives_the_same_bootstrap(self) -> None:
        rng = np.random.default_rng(0)
        first, second = rng.normal(size=20).tolist(), rng.normal(size=20).tolist()
        assert difference(LOSS, first, second, seed=1) == difference(LOSS, first, second, seed=1)
        assert difference(LOSS, first, second, seed=1) != difference(LOSS, first, second, seed=2)


class TestPairs:
    def test_runs_of_the_same_seed_are_paired_and_sft_comes_first(self) -> None:
        (found,) = compare(pairs([5.0, 4.0, 3.0], [4.0, 2.0, 0.0]))
        assert (found.first, found.second) == ("SFT", "MemFT OnlyThreshold")
        assert [(pair.first, pair.second) for pair in found.pairs] == [(f"sft-{n}", f"mem-{n}") for n in range(3)]
        loss = of_measure(found.differences, LOSS)
        # Paired: -1, -2, -3, whatever the runs of a method differ by among themselves.
        assert (loss.mean, loss.pairs) == (-2.0, 3)
        assert loss.cohens_d == pytest.approx(-2.0)

    def test_shares_are_compared_in_percentage_points(self) -> None:
        records = {Path("a"): sft(token_accuracy=0.5), Path("b"): memft(token_accuracy=0.75)}
        (found,) = compare(records)
        assert of_measure(found.differences, ACCURACY).mean == 25.0

    @pytest.mark.parametrize(
        "fields",
        [
            {"rank": 8},
            {"seed": 5},
            {"corpus_hash": "other"},
            {"backbone_hash": "other"},
            {"dtype": "bfloat16"},
            {"block": [3]},
            {"placement": ["down_proj"]},
            {"init": "peft"},
        ],
    )
    def test_what_differs_in_more_than_the_method_is_no_pair(self, fields: dict[str, Any]) -> None:
        records = pairs([5.0], [4.0]) | {Path("s"): sft(seed=9), Path("m"): memft(**{"seed": 9, **fields})}
        (found,) = compare(records)
        assert len(found.pairs) == 1
        reasons = {left.runs: left.reason for left in found.left_out}
        alone = "no run of the other method with the same rank, corpus and seed"
        assert reasons == {("s",): alone, ("m",): alone}

    def test_two_runs_of_one_method_in_a_cell_are_left_out_rather_than_chosen_from(self) -> None:
        records = pairs([5.0], [4.0]) | {Path("s"): sft(seed=9), Path("t"): sft(seed=9), Path("m"): memft(seed=9)}
        (found,) = compare(records)
        assert [left.runs for left in found.left_out] == [("s", "t", "m")]
        assert "several runs of one method" in found.left_out[0].reason

    def test_interrupted_and_diverged_runs_are_left_out(self) -> None:
        records = pairs([5.0, 5.0, 5.0], [4.0, 4.0, 4.0])
        records[Path("mem-1")] = memft(seed=1, status="interrupted")
        records[Path("sft-2")] = sft(seed=2, final_loss=None)
        (found,) = compare(records)
        assert len(found.pairs) == 1
        reasons = {left.runs[0]: left.reason for left in found.left_out}
        assert (reasons["mem-1"], reasons["sft-2"]) == ("interrupted", "diverged")

    def test_by_gives_a_comparison_for_each_value_in_order(self) -> None:
        records = {}
        for rank in (16, 2):
            records |= {Path(f"{rank}{path}"): record for path, record in pairs([5.0], [4.0], rank=rank).items()}
        found = compare(records, by="rank")
        assert [comparison.where for comparison in found] == [{"rank": 2}, {"rank": 16}]
        assert [pair.rank for comparison in found for pair in comparison.pairs] == [2, 16]

    def test_another_baseline_turns_the_difference_round(self) -> None:
        (found,) = compare(pairs([5.0], [4.0]), baseline="memft onlythreshold")
        assert (found.first, of_measure(found.differences, LOSS).mean) == ("MemFT OnlyThreshold", 1.0)

    def test_settings_that_differ_beside_the_method_are_named(self) -> None:
        records = {Path("a"): sft(), Path("b"): memft(method_settings={"weighting": "x", "learning_rate": 0.1})}
        (found,) = compare(records)
        assert found.settings == {"learning_rate": ([0.05], [0.1])}


class TestBudgets:
    @pytest.mark.parametrize(("steps", "kept"), [(200, True), (190, True), (189, False), (211, False)])
    def test_steps_may_differ_by_5_percent_of_the_larger(self, steps: int, kept: bool) -> None:
        records = pairs([5.0], [4.0]) | {Path("s"): sft(seed=9), Path("m"): memft(seed=9, optimizer_steps=steps)}
        (found,) = compare(records)
        assert len(found.pairs) == 1 + kept
        if not kept:
            assert found.left_out[0].runs == ("s", "m")
            assert found.left_out[0].reason == f"budgets differ: 200 and {steps} optimiser steps"

    def test_target_tokens_count_as_much_as_steps(self) -> None:
        records = pairs([5.0], [4.0]) | {Path("s"): sft(seed=9), Path("m"): memft(seed=9, target_tokens_trained=25600)}
        (found,) = compare(records)
        assert found.left_out[0].reason == "budgets differ: 12,800 and 25,600 target tokens trained on"
        (found,) = compare(records, tolerance=0.5)
        assert len(found.pairs) == 2

    def test_steps_that_a_method_had_no_use_for_were_in_its_budget(self) -> None:
        records = {Path("s"): sft(optimizer_steps=200), Path("m"): memft(optimizer_steps=120, skipped_steps=80)}
        (found,) = compare(records)
        assert [pair.optimizer_steps for pair in found.pairs] == [(200, 120)]
        records[Path("m")] = memft(optimizer_steps=120, skipped_steps=60)
        with pytest.raises(InputError, match="budgets differ: 200 and 180 optimiser steps"):
            compare(records)

    def test_skipped_steps_were_given_to_a_run_that_did_not_recall(self) -> None:
        records = {
            Path("s"): sft(optimizer_steps=130, steps_to_recall=130),
            Path("m"): memft(optimizer_steps=100, skipped_steps=60, steps_to_recall=None),
        }
        (found,) = compare(records)
        assert (found.recalled.only_first, found.recalled.neither) == (1, 0)

    def test_a_run_that_nobody_watched_recalled_where_no_token_ended_below_the_threshold(self) -> None:
        records = {Path("s"): sft(sub_threshold_fraction=0.1), Path("m"): memft(sub_threshold_fraction=0.0)}
        (found,) = compare(records)
        assert found.recall_in_words() == (
            "every token certain: both 0, only SFT 0, only MemFT OnlyThreshold 1, neither 0"
        )
        assert found.recalled.steps is None

    def test_without_any_pair_of_equal_budgets_the_comparison_is_refused(self) -> None:
        records = {Path("a"): sft(), Path("b"): memft(optimizer_steps=400)}
        with pytest.raises(
            InputError, match=r"no pair of runs of equal budgets \(budgets differ: 200 and 400 optimiser"
        ):
            compare(records)

    def test_steps_to_recall_are_compared_though_runs_stop_when_they_recall(self) -> None:
        records = pairs([5.0], [4.0]) | {
            Path("s"): sft(seed=9, optimizer_steps=160, steps_to_recall=156),
            Path("m"): memft(seed=9, optimizer_steps=80, steps_to_recall=78),
        }
        (found,) = compare(records)
        assert found.recalled.steps is not None
        assert (found.recalled.steps.measure, found.recalled.steps.mean) == (STEPS_TO_RECALL.field, -78)
        assert [difference.measure for difference in found.differences] == [measure.field for measure in MEASURES]
        assert of_measure(found.differences, LOSS).pairs == 1
        assert (found.recalled.both, found.recalled.neither) == (1, 1)
        assert [left.runs for left in found.other_budgets] == [("s", "m")]
        assert found.left_out == []

    @pytest.mark.parametrize(("steps", "counted"), [(300, 1), (80, 0)])
    def test_who_stopped_before_the_other_recalled_did_not_lose(self, steps: int, counted: int) -> None:
        records = pairs([5.0], [4.0]) | {
            Path("s"): sft(seed=9, optimizer_steps=steps),
            Path("m"): memft(seed=9, optimizer_steps=100, steps_to_recall=100),
        }
        (found,) = compare(records)
        assert found.recalled.only_second == counted
        assert found.recalled.only_first == 0

    def test_where_every_run_stops_at_recall_steps_to_recall_are_all_that_is_compared(self) -> None:
        (found,) = compare(stopped())
        assert (found.pairs, found.differences, found.left_out) == ([], [], [])
        recalled = found.recalled
        assert (recalled.both, recalled.only_first, recalled.only_second, recalled.neither) == (3, 1, 1, 0)
        assert recalled.steps is not None
        # 150, 160 and 170 against 100, 90 and 80 steps; the other pairs have no steps to compare.
        assert (recalled.steps.pairs, recalled.steps.first_mean, recalled.steps.second_mean) == (3, 160, 90)
        assert recalled.steps.verdict == "better"
        assert found.recall_in_words() == (
            "every token certain: both 3, only SFT 1, only MemFT OnlyThreshold 1, neither 0"
        )
        assert found.budgets_in_words() == (
            "no pair has equal budgets; only recall is compared of 5 pairs (budgets differ: 150 and 100 optimiser "
            "steps, for example)"
        )

    def test_one_pair_of_equal_budgets_is_no_reason_to_hide_that_the_others_have_none(self) -> None:
        (found,) = compare(stopped() | {Path("s9"): sft(seed=9), Path("m9"): memft(seed=9)})
        assert of_measure(found.differences, LOSS).pairs == 1
        assert found.recalled.neither == 1
        assert found.budgets_in_words().startswith("only recall is compared of 5 pairs (")

    def test_that_neither_recalls_with_unequal_budgets_says_nothing(self) -> None:
        records = stopped() | {Path("s9"): sft(seed=9), Path("m9"): memft(seed=9, optimizer_steps=900)}
        (found,) = compare(records)
        assert found.recalled.neither == 0
        assert [left.runs for left in found.left_out] == [("s9", "m9")]

    def test_settings_in_which_pairs_of_other_budgets_differ_are_named(self) -> None:
        (found,) = compare(
            {
                Path("a"): sft(optimizer_steps=50, steps_to_recall=50),
                Path("b"): memft(
                    optimizer_steps=20,
                    steps_to_recall=20,
                    method_settings={"weighting": "OnlyThreshold", "learning_rate": 0.1},
                ),
            }
        )
        assert found.settings == {"learning_rate": ([0.05], [0.1])}

    def test_steps_to_recall_of_one_text_at_several_ranks_count_once(self) -> None:
        (found,) = compare(stopped())
        again = {Path(f"{path}-8"): record.model_copy(update={"rank": 8}) for path, record in stopped().items()}
        (twice,) = compare(stopped() | again)
        assert found.recalled.steps is not None
        assert twice.recalled.steps is not None
        assert (twice.recalled.both, twice.recalled.steps.pairs, twice.recalled.steps.texts) == (6, 6, 3)
        assert twice.recalled.steps.t_interval == found.recalled.steps.t_interval


class TestRefusals:
    def test_one_method_is_not_enough(self) -> None:
        with pytest.raises(InputError, match="only SFT in 1 runs: expected runs of at least two methods"):
            compare({Path("a"): sft()})

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"baseline": "adam"}, "no run of 'adam'; there are MemFT OnlyThreshold, SFT"),
            ({"by": "colour"}, "no run has a value for 'colour'"),
            ({"tolerance": -0.1}, "tolerance: expected a share of at least 0"),
            ({"tolerance": math.nan}, "tolerance: expected a share of at least 0"),
            ({"confidence": 95}, "confidence: expected at least 0.5 and below 1, got 95"),
        ],
    )
    def test_wrong_arguments_are_explained(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            compare(pairs([5.0], [4.0]), **arguments)


class TestCommand:
    @pytest.fixture
    def runs(self, tmp_path: Path) -> Path:
        for seed, loss in enumerate((2.5, 2.25, 2.25, 2.0)):
            common = {"seed": seed, "corpus_hash": f"c{seed}"}
            settings = {"weighting": {"class_path": "pml.weighting.OnlyThreshold"}, "learning_rate": 0.05}
            write_run(tmp_path / f"s{seed}", **common, method="sft", method_settings={"learning_rate": 0.05})
            write_run(tmp_path / f"m{seed}", **common, final_loss=loss, method_settings=settings)
        write_run(tmp_path / "long", method="sft", seed=7, method_settings={}, optimizer_steps=900)
        return tmp_path

    def test_the_table_names_both_methods_the_budget_and_the_intervals(
        self, runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "120")
        assert main(["compare", str(runs)]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert out.startswith(
            "MemFT OnlyThreshold against SFT 4 pairs on 4 combinations of text and seed: 200 steps, 12,800 target "
        )
        # 3.1 in all four runs of SFT; 2.25 on average with MemFT.
        assert "final loss (nats) 3.100 2.250 -0.850" in out
        assert "left out: no run of the other method" in out
        assert "neither 4" in out

    def test_where_no_budgets_are_equal_it_says_so_and_compares_steps_to_recall_under_their_own_heading(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "120")
        for path, record in stopped().items():
            write_record(tmp_path / path, record)
        assert main(["compare", str(tmp_path)]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert out.startswith(
            "MemFT OnlyThreshold against SFT no pair has equal budgets; only recall is compared of 5 pairs (budgets "
            "differ: 150 and 100 optimiser steps, for example) steps to recall, whatever the budget, where both "
            "recalled: 3 pairs on 3 combinations of text and seed"
        )
        assert "steps to recall 160.0 90.0 -70.0" in out
        assert "final loss" not in out
        assert "every token certain: both 3, only SFT 1, only MemFT OnlyThreshold 1, neither 0" in out
        assert "left out" not in out
        assert main(["compare", str(tmp_path), "--json"]) == 0
        (content,) = json.loads(capsys.readouterr().out)
        assert (content["pairs"], content["differences"]) == ([], [])
        steps = content["recalled"]["steps"]
        assert (steps["mean"], steps["verdict"], content["recalled"]["both"]) == (-70, "better", 3)

    def test_json_has_the_same_numbers(self, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["compare", str(runs), "--json"]) == 0
        (content,) = json.loads(capsys.readouterr().out)
        loss = content["differences"][0]
        assert (loss["measure"], loss["first_mean"], loss["second_mean"]) == ("final_loss", 3.1, 2.25)
        assert loss["t_interval"]["low"] < loss["mean"] < loss["t_interval"]["high"]
        assert (loss["verdict"], len(content["pairs"])) == ("better", 4)

    def test_runs_of_one_method_are_an_error_of_one_line(self, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["compare", str(runs), "--where.method", "sft"]) == 2
        # Behind a note that these runs of one length are on different texts.
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("pml compare: error: only SFT in 5 runs: expected runs of at least")
