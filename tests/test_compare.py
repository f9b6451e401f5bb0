"""Comparing methods: which runs form a pair, how a difference is judged, and what is refused."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from record_factory import make_record, write_run
from scipy import stats
from simulated_runs import write_simulated_run

from pml.cli import main
from pml.compare import (
    OUTCOMES,
    Comparison,
    Difference,
    Outcome,
    compare,
    differences_tables,
    means_table,
    paired_difference,
)
from pml.compare.outcomes import measure_outcomes
from pml.errors import InputError
from pml.records import Record, read_record, write_record

BY_NAME = {outcome.name: outcome for outcome in OUTCOMES}
LOSS, ACCURACY = BY_NAME["final_loss"], BY_NAME["token_accuracy"]


def sft(**fields: Any) -> Record:
    return make_record(method="sft", method_settings={"weighting": "Uniform", "learning_rate": 0.05}, **fields)


def memft(weighting: str = "OnlyThreshold", **fields: Any) -> Record:
    settings = {"weighting": {"class_path": f"pml.weighting.{weighting}"}, "learning_rate": 0.05}
    return make_record(**{"method": "memft", "method_settings": settings, **fields})


def pairs(first: list[float], second: list[float], **fields: Any) -> dict[Path, Record]:
    """Runs of SFT and MemFT with these final losses, one pair per seed."""
    found = {Path(f"sft-{seed}"): sft(seed=seed, final_loss=loss, **fields) for seed, loss in enumerate(first)}
    return found | {
        Path(f"mem-{seed}"): memft(seed=seed, final_loss=loss, **fields) for seed, loss in enumerate(second)
    }


def stopped() -> dict[Path, Record]:
    """Runs that stop once all tokens are certain, one pair per seed: three pairs do, then only one run of each pair."""
    found = {}
    for seed, (first, second) in enumerate(((150, 100), (160, 90), (170, 80), (120, None), (None, 70))):
        for name, make, steps in (("s", sft, first), ("m", memft, second)):
            found[Path(f"{name}{seed}")] = make(seed=seed, optimizer_steps=steps or 300, steps_to_recall=steps)
    return found


def in_outcome(comparison: Comparison, name: str) -> Difference:
    (found,) = [found for found in comparison.differences if found.outcome.name == name]
    return found


class TestDifference:
    def test_the_mean_difference_and_its_interval_equal_hand_worked_values(self) -> None:
        found = paired_difference(LOSS, [5.0, 5.0, 5.0], [4.0, 3.0, 2.0])
        assert (found.baseline_mean, found.method_mean, found.mean) == (5.0, 3.0, -2.0)
        # Standard deviation 1, so the standard error is 1 / sqrt 3; t(0.975, 2) = 4.302653.
        half = 4.302653 / math.sqrt(3)
        assert found.interval == pytest.approx((-2 - half, -2 + half), rel=1e-6)

    def test_the_interval_equals_that_of_scipy(self) -> None:
        rng = np.random.default_rng(3)
        first, second = rng.normal(2.0, 1.0, 20), rng.normal(2.5, 1.0, 20)
        found = paired_difference(LOSS, list(first), list(second), confidence=0.9)
        expected = stats.ttest_1samp(second - first, 0.0).confidence_interval(0.9)
        assert found.interval == pytest.approx((expected.low, expected.high))

    def test_pairs_of_one_sample_are_averaged_and_each_sample_counts_once(self) -> None:
        # Differences 1, 3 and 5 on the first text and 1 on the second: 3 and 1, mean 2, standard error 1.
        found = paired_difference(ACCURACY, [0, 0, 0, 10], [1, 3, 5, 11], ["a", "a", "a", "b"])
        assert (found.pairs, found.samples, found.baseline_mean, found.method_mean, found.mean) == (4, 2, 5, 7, 2)
        # t(0.975, 1) = 12.7062.
        assert found.interval == pytest.approx((2 - 12.7062, 2 + 12.7062), rel=1e-5)

    def test_repeated_pairs_of_a_sample_do_not_change_the_interval(self) -> None:
        first, second = [5.0, 4.0, 6.0], [4.0, 3.5, 4.5]
        once = paired_difference(LOSS, first, second)
        twice = paired_difference(LOSS, first * 2, second * 2, list("abcabc"))
        assert (twice.pairs, twice.samples) == (6, 3)
        assert (once.mean, once.interval) == (twice.mean, twice.interval)

    def test_a_single_pair_has_no_interval_and_is_undecided(self) -> None:
        found = paired_difference(LOSS, [5.0], [1.0])
        assert (found.mean, found.interval, found.verdict) == (-4.0, None, "undecided")

    @pytest.mark.parametrize("step", [0.0, 0.1])
    def test_equal_differences_have_no_interval(self, step: float) -> None:
        first = [0.1, 0.2, 0.3, 0.7]
        found = paired_difference(LOSS, first, [value + step for value in first])
        assert found.interval is None
        assert found.mean == pytest.approx(step)

    @pytest.mark.parametrize(("count", "verdict"), [(5, "undecided"), (6, "better")])
    def test_equal_differences_are_decided_by_the_sign_test(self, count: int, verdict: str) -> None:
        # 2 / 2^5 = 0.0625 and 2 / 2^6 = 0.03125, on either side of 0.05.
        assert paired_difference(ACCURACY, [0.0] * count, [100.0] * count).verdict == verdict

    def test_pairs_without_any_difference_are_undecided(self) -> None:
        assert paired_difference(ACCURACY, [100.0] * 9, [100.0] * 9).verdict == "undecided"

    @pytest.mark.parametrize(("outcome", "verdict"), [(LOSS, "worse"), (ACCURACY, "better")])
    def test_whether_higher_is_better_depends_on_the_outcome(self, outcome: Outcome, verdict: str) -> None:
        assert paired_difference(outcome, [1.0, 2.0, 3.0, 4.0], [2.0, 3.1, 4.0, 5.1]).verdict == verdict

    def test_an_interval_that_contains_zero_is_undecided(self) -> None:
        assert paired_difference(LOSS, [1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 4.0, 3.0]).verdict == "undecided"

    @pytest.mark.parametrize("interval", [(0.0, 2.0), (-2.0, 0.0)])
    def test_an_interval_that_ends_at_zero_is_undecided(self, interval: tuple[float, float]) -> None:
        found = paired_difference(LOSS, [1.0, 2.0, 3.0, 4.0], [2.0, 3.1, 4.0, 5.1])
        assert replace(found, interval=interval).verdict == "undecided"


class TestOutcomes:
    def test_outcomes_of_a_run_measure_both_certain_and_actual_recall(self, tmp_path: Path) -> None:
        # Four targets of 16 tokens.
        folder = write_simulated_run(tmp_path, 6, 64, pairs=4, sub_threshold_fraction=0.25, steps_to_recall=9)
        found = measure_outcomes(folder, read_record(folder / "record.json"))
        assert (found["tokens_certain"], found["steps_to_certain"], found["first_failure"]) == (75.0, 9.0, 12.0)
        assert found["harm"] is None

    def test_a_target_is_certain_only_if_all_of_its_tokens_are(self, tmp_path: Path) -> None:
        # Four targets: certain; doubtful at the end; doubtful at the beginning; certain.
        tokens = [(0, 0, 0.9), (0, 1, 0.8), (1, 0, 0.9), (1, 1, 0.4), (2, 0, 0.3), (2, 1, 0.9), (3, 0, 0.6)]
        examples, positions, probabilities = zip(*tokens, strict=True)
        columns = {"example_id": examples, "position": positions, "loss": [-math.log(p) for p in probabilities]}
        pq.write_table(pa.table({**columns, "correct": [p > 0.5 for p in probabilities]}), tmp_path / "tokens.parquet")
        assert measure_outcomes(tmp_path, sft(pairs=4, target_tokens=7))["targets_certain"] == 50.0

    def test_the_share_of_certain_targets_is_unknown_without_per_token_results(self) -> None:
        assert measure_outcomes(Path("gone"), sft())["targets_certain"] is None
        # Counting such a run as 100 % would bias the mean towards runs in which all tokens are certain.
        assert measure_outcomes(Path("gone"), sft(sub_threshold_fraction=0.0))["targets_certain"] is None

    def test_damaged_per_token_results_are_logged_with_their_path(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder = write_simulated_run(tmp_path, 6, 64, pairs=4, sub_threshold_fraction=0.25)
        (folder / "tokens.parquet").write_bytes(b"no table")
        assert measure_outcomes(folder, read_record(folder / "record.json"))["targets_certain"] is None
        assert f"{folder / 'tokens.parquet'}: " in caplog.text
        assert "how many targets are certain is not known" in caplog.text

    @pytest.mark.parametrize(("after", "nats"), [(3.25, 0.25), (None, None)])
    def test_harm_is_the_increase_of_the_mean_loss_on_ordinary_text(
        self, after: float | None, nats: float | None
    ) -> None:
        record = sft(harm={"prose": {"loss_after": 9.0}, "mean": {"loss_before": 3.0, "loss_after": after}})
        assert measure_outcomes(Path("gone"), record)["harm"] == nats


class TestPairs:
    def test_runs_of_the_same_rank_and_seed_are_paired_with_sft_as_the_baseline(self) -> None:
        (found,) = compare(pairs([5.0, 4.0, 3.0], [4.0, 2.0, 0.0]))
        assert [means.method for means in found.methods] == ["SFT", "MemFT OnlyThreshold"]
        loss = in_outcome(found, "final_loss")
        # Paired differences: -1, -2 and -3, however much the runs of one method differ among themselves.
        assert (loss.mean, loss.pairs) == (-2.0, 3)

    def test_each_of_several_methods_is_compared_with_the_baseline(self) -> None:
        records = pairs([5.0, 4.0], [4.0, 2.0])
        records |= {Path(f"slide-{seed}"): memft("SlidingWindow", seed=seed, final_loss=6.0) for seed in (0, 1)}
        (found,) = compare(records)
        losses = {d.method: d.mean for d in found.differences if d.outcome is LOSS}
        assert losses == {"MemFT OnlyThreshold": -1.5, "MemFT SlidingWindow": 1.5}
        assert [verdict.split(":")[0] for verdict in found.verdicts] == [
            "MemFT OnlyThreshold against SFT",
            "MemFT SlidingWindow against SFT",
        ]
        assert means_table(found).columns == ("outcome", "SFT", "OnlyThreshold", "SlidingWindow")
        (found,) = compare(records, baseline="memft slidingwindow")
        assert compare(records, baseline="slidingwindow")[0].baseline == found.baseline
        assert {d.method: d.mean for d in found.differences if d.outcome is LOSS} == {
            "MemFT OnlyThreshold": -3.0,
            "SFT": -1.5,
        }

    def test_pairs_without_a_difference_give_an_undecided_verdict(self) -> None:
        (found,) = compare(pairs([3.0, 2.0], [3.0, 2.0]))
        (verdict,) = found.verdicts
        assert verdict.startswith("MemFT OnlyThreshold against SFT: undecided in ")
        assert "final loss" in verdict
        assert ";" not in verdict

    def test_seeds_stay_the_samples_if_no_pair_on_another_text_can_be_compared(self) -> None:
        records = pairs([5.0, 4.0, 3.0], [4.0, 2.5, 0.5], corpus_hash="a")
        (alone,) = compare(records)
        # On another text one method took twice the steps.
        other = pairs([5.0, 4.0], [4.0, 2.0], corpus_hash="b")
        records |= {
            Path(f"b{p}"): r.model_copy(update={"optimizer_steps": 400}) if r.method == "memft" else r
            for p, r in other.items()
        }
        (found,) = compare(records)
        loss = in_outcome(found, "final_loss")
        assert (loss.samples, loss.by_text) == (3, False)
        assert loss.interval == in_outcome(alone, "final_loss").interval is not None

    def test_samples_are_texts_if_there_are_several_and_otherwise_seeds(self) -> None:
        (of_seeds,) = compare(pairs([5.0, 4.0, 3.0], [4.0, 2.0, 0.0]))
        assert (of_seeds.by_text, in_outcome(of_seeds, "final_loss").samples) == (False, 3)
        # Two seeds on each of two texts: -1 and -2, -3 and -4.
        records = pairs([5.0, 5.0], [4.0, 3.0], corpus_hash="a")
        other = pairs([5.0, 5.0], [2.0, 1.0], corpus_hash="b", corpus_settings={"length": 64, "seed": 1})
        records |= {Path(f"b{p}"): r for p, r in other.items()}
        (of_texts,) = compare(records)
        loss = in_outcome(of_texts, "final_loss")
        assert (of_texts.by_text, loss.pairs, loss.samples, loss.mean) == (True, 4, 2, -2.5)
        # -1.5 and -3.5: standard error 1.
        assert loss.interval == pytest.approx((-2.5 - 12.7062, -2.5 + 12.7062), rel=1e-5)

    def test_texts_drawn_from_one_seed_are_one_sample_as_longer_ones_begin_with_shorter_ones(self) -> None:
        records = {}
        for length, seed, loss in ((64, 0, 4.0), (96, 0, 3.0), (64, 1, 2.0), (96, 1, 1.0)):
            fields = {"corpus_hash": f"{length} {seed}", "corpus_settings": {"length": length, "seed": seed}}
            made = pairs([5.0], [loss], target_tokens=length, **fields)
            records |= {path / f"{length}-{seed}": record for path, record in made.items()}
        (found,) = compare(records)
        loss_difference = in_outcome(found, "final_loss")
        # -1.5 and -3.5: the mean is -2.5, its standard error 1, and Student's t with 1 degree of freedom 12.706.
        assert (found.by_text, loss_difference.pairs, loss_difference.samples) == (True, 4, 2)
        assert loss_difference.interval == pytest.approx((-2.5 - 12.706, -2.5 + 12.706), abs=1e-3)

    def test_replacing_a_few_tokens_of_one_text_with_several_seeds_gives_one_text(self) -> None:
        records = {}
        for seed in range(3):
            text = {"length": 512, "skip_tokens": 0, "random_ratio": 0.05, "seed": seed}
            fields = {"corpus": "natural_text", "corpus_hash": f"draw {seed}", "corpus_settings": text}
            for make, loss in ((sft, 5.0), (memft, 4.0 - seed)):
                records[Path(f"{make.__name__}{seed}")] = make(seed=seed, final_loss=loss, **fields)
        loss_difference = in_outcome(compare(records)[0], "final_loss")
        assert (loss_difference.by_text, loss_difference.samples) == (False, 3)

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
            {"method_settings": {"weighting": "OnlyThreshold", "matmul_precision": "medium"}},
        ],
    )
    def test_runs_that_differ_in_more_than_the_method_are_not_paired(self, fields: dict[str, Any]) -> None:
        records = pairs([5.0], [4.0]) | {Path("s"): sft(seed=9), Path("m"): memft(**{"seed": 9, **fields})}
        (found,) = compare(records)
        assert in_outcome(found, "final_loss").pairs == 1
        reasons = {left.runs: left.reason for left in found.left_out}
        alone = "no run of the other method with the same rank, corpus and seed"
        assert reasons == {("s",): alone, ("m",): alone}

    def test_two_settings_of_one_weighting_are_two_methods(self) -> None:
        def only(threshold: float, seed: int, loss: float) -> Record:
            weighting = {"class_path": "pml.weighting.OnlyThreshold", "init_args": {"threshold": threshold}}
            return memft(seed=seed, final_loss=loss, method_settings={"weighting": weighting})

        records = {Path(f"s{seed}"): sft(seed=seed, final_loss=5.0) for seed in (0, 1)}
        records |= {Path(f"a{seed}"): only(0.5, seed, 4.0) for seed in (0, 1)}
        records |= {Path(f"b{seed}"): only(0.7, seed, 3.0) for seed in (0, 1)}
        (found,) = compare(records)
        losses = {d.method: (d.mean, d.pairs) for d in found.differences if d.outcome is LOSS}
        assert losses == {
            "MemFT OnlyThreshold (threshold 0.5)": (-1.0, 2),
            "MemFT OnlyThreshold (threshold 0.7)": (-2.0, 2),
        }
        assert found.left_out == []

    def test_duplicate_runs_of_a_method_are_left_out_rather_than_chosen_from(self) -> None:
        records = pairs([5.0], [4.0]) | {Path("s"): sft(seed=9), Path("t"): sft(seed=9), Path("m"): memft(seed=9)}
        (found,) = compare(records)
        assert [left.runs for left in found.left_out] == [("s", "t", "m")]
        assert "several runs of one method" in found.left_out[0].reason

    def test_a_baseline_run_without_a_pair_in_any_method_is_left_out_only_once(self) -> None:
        records = pairs([5.0], [4.0]) | {Path("slide"): memft("SlidingWindow", final_loss=6.0), Path("s"): sft(seed=9)}
        (found,) = compare(records)
        assert len({difference.method for difference in found.differences}) == 2
        assert [left.runs for left in found.left_out] == [("s",)]

    def test_interrupted_and_diverged_runs_are_left_out(self) -> None:
        records = pairs([5.0, 5.0, 5.0], [4.0, 4.0, 4.0])
        records[Path("mem-1")] = memft(seed=1, status="interrupted")
        records[Path("sft-2")] = sft(seed=2, final_loss=None)
        (found,) = compare(records)
        assert in_outcome(found, "final_loss").pairs == 1
        assert [means.runs for means in found.methods] == [2, 2]
        reasons = {left.runs[0]: left.reason for left in found.left_out}
        assert (reasons["mem-1"], reasons["sft-2"]) == ("interrupted", "diverged")

    def test_by_gives_one_comparison_per_value_in_ascending_order(self) -> None:
        records = {}
        for rank in (16, 2):
            records |= {Path(f"{rank}{path}"): record for path, record in pairs([5.0], [4.0], rank=rank).items()}
        found = compare(records, by="rank")
        assert [comparison.where for comparison in found] == [{"rank": 2}, {"rank": 16}]
        assert [[means.runs for means in comparison.methods] for comparison in found] == [[1, 1], [1, 1]]

    def test_settings_that_differ_besides_the_method_are_listed(self) -> None:
        settings = {"weighting": "x", "learning_rate": 0.1, "_class_path": "pml.modules.MemFT", "alpha": 2}
        (found,) = compare({Path("a"): sft(), Path("b"): memft(method_settings=settings)})
        assert found.settings == {"learning_rate": ["0.05", "0.1"]}
        # The class of a method is not one of its settings.
        of_one_s_own = settings | {"weighting": "y", "_class_path": "mine.MySFT"}
        first = make_record(method="sft", method_settings=of_one_s_own)
        (found,) = compare({Path("a"): first, Path("b"): memft(method_settings=settings)})
        assert found.settings == {}

    @pytest.mark.parametrize(
        ("guard", "training", "expected"),
        [
            ({"rank": 8}, {}, {"guard": ["None", "{'rank': 8}"]}),
            (None, {"global_batch_size": 4, "precision": "32-true"}, {"global_batch_size": ["4", "8"]}),
            (None, {"gradient_clip_val": 1.0}, {"gradient_clip_val": ["1.0", "None"]}),
        ],
    )
    def test_differences_in_the_guard_and_in_trainer_settings_are_listed(
        self, guard: Any, training: dict[str, Any], expected: dict[str, list[str]]
    ) -> None:
        settings = {"weighting": "x", "learning_rate": 0.05} | ({"guard": guard} if guard else {})
        plain = {"global_batch_size": 8, "precision": "32-true", "gradient_clip_val": None, "strategy": "ddp"}
        runs = {Path("a"): sft(training=plain), Path("b"): memft(method_settings=settings, training=training)}
        (found,) = compare(runs)
        assert found.settings == expected


class TestBudgets:
    @pytest.mark.parametrize(("steps", "kept"), [(200, True), (190, True), (189, False), (211, False)])
    def test_steps_may_differ_by_5_percent_of_the_larger(self, steps: int, kept: bool) -> None:
        records = pairs([5.0], [4.0]) | {Path("s"): sft(seed=9), Path("m"): memft(seed=9, optimizer_steps=steps)}
        (found,) = compare(records)
        assert in_outcome(found, "final_loss").pairs == 1 + kept
        if not kept:
            (left,) = found.left_out
            assert (left.runs, left.reason) == (("s", "m"), f"budgets differ: 200 and {steps} optimiser steps")

    def test_budgets_must_also_agree_in_target_tokens(self) -> None:
        records = pairs([5.0], [4.0]) | {Path("s"): sft(seed=9), Path("m"): memft(seed=9, target_tokens_trained=25600)}
        (found,) = compare(records)
        assert found.left_out[0].reason == "budgets differ: 12,800 and 25,600 target tokens trained on"
        (found,) = compare(records, tolerance=0.5)
        assert in_outcome(found, "final_loss").pairs == 2

    def test_skipped_steps_count_towards_the_budget(self) -> None:
        records = {Path("s"): sft(optimizer_steps=200), Path("m"): memft(optimizer_steps=120, skipped_steps=80)}
        (found,) = compare(records)
        assert in_outcome(found, "final_loss").pairs == 1
        records[Path("m")] = memft(optimizer_steps=120, skipped_steps=60)
        with pytest.raises(InputError, match="budgets differ: 200 and 180 optimiser steps"):
            compare(records)

    def test_runs_that_stop_once_all_tokens_are_certain_are_compared_only_by_their_steps(self) -> None:
        (found,) = compare(stopped())
        (steps,) = found.differences
        # 150, 160 and 170 against 100, 90 and 80 steps; the other pairs have no steps to compare.
        assert (steps.outcome.name, steps.pairs, steps.baseline_mean, steps.method_mean) == (
            "steps_to_certain",
            3,
            160,
            90,
        )
        # -50, -70 and -90: standard deviation 20, t(0.975, 2) = 4.302653.
        half = 20 / math.sqrt(3) * 4.302653
        assert found.verdicts == [
            "MemFT OnlyThreshold against SFT: better in steps to all certain (-70.0 steps; 95 % interval "
            f"{-70 - half:.1f} to {-70 + half:.1f}; only SFT got there in 1 pair, only MemFT OnlyThreshold in 1 pair)."
        ]
        assert len(found.left_out) == 5


class TestStepsToCertain:
    @staticmethod
    def runs(steps: list[tuple[int | None, int | None]], budget: int = 300, **of_memft: Any) -> dict[Path, Record]:
        """A pair of each seed with these steps until everything is certain above p = 0.9; None did not get there."""
        found = {}
        for seed, pair in enumerate(steps):
            for make, needed, fields in ((sft, pair[0], {}), (memft, pair[1], of_memft)):
                made = make(**{"seed": seed, "steps_to_recall": needed, "recall_margin": 0.9, **fields})
                found[Path(f"{made.method}{seed}")] = made.model_copy(update={"optimizer_steps": needed or budget})
        return found

    def test_a_method_that_often_does_not_get_there_is_not_better_in_steps(self) -> None:
        quick = [(150, 100), (160, 105), (170, 120), (180, 135)]
        (found,) = compare(self.runs([*quick, *[(200, None)] * 4]))
        steps = in_outcome(found, "steps_to_certain")
        assert (steps.pairs, steps.alone, steps.verdict) == (4, (4, 0), "undecided")
        assert steps.interval is not None
        assert steps.interval[1] < 0
        assert found.verdicts == [
            "MemFT OnlyThreshold against SFT: undecided in steps to all certain, p > 0.9 (only SFT got there in 4 "
            "pairs, only MemFT OnlyThreshold in 0 pairs)."
        ]
        (found,) = compare(self.runs([*quick, *[(None, 200)] * 4]))
        steps = in_outcome(found, "steps_to_certain")
        assert (steps.alone, steps.verdict) == ((0, 4), "better")

    def test_a_run_that_stopped_before_the_other_got_there_is_no_evidence(self) -> None:
        pairs = [(150, 100), (160, 90), (170, 80), (200, None)]
        assert in_outcome(compare(self.runs(pairs, budget=200))[0], "steps_to_certain").alone == (1, 0)
        assert in_outcome(compare(self.runs(pairs, budget=199))[0], "steps_to_certain").alone == (0, 0)

    def test_steps_until_different_probabilities_are_not_compared(self) -> None:
        pairs = [(150, 100), (160, 90)]
        for margin, said in ((0.5, "p > 0.9 and p > 0.5"), (None, "p > 0.9 and not recorded")):
            records = self.runs(pairs, recall_margin=margin) | {Path("s"): sft(seed=9), Path("m"): memft(seed=9)}
            (found,) = compare(records)
            assert not [one for one in found.differences if one.outcome.name == "steps_to_certain"]
            reasons = {left.reason for left in found.left_out if "certain means something else" in left.reason}
            assert reasons == {f"certain means something else, so steps are not compared: {said}"}

    def test_tables_say_which_probability_every_token_had_to_exceed(self) -> None:
        (found,) = compare(self.runs([(150, 100), (160, 90)]))
        assert found.recall_margins == [0.9]
        (differences,) = differences_tables(found)
        for table in (means_table(found), differences):
            assert "steps to all certain, p > 0.9" in [row[0] for row in table.rows]


class TestRefusals:
    def test_runs_of_a_single_method_are_refused(self) -> None:
        with pytest.raises(InputError, match="all runs are of SFT: expected runs of at least two methods"):
            compare({Path("a"): sft()})

    def test_runs_without_a_comparable_pair_are_refused_with_the_reason(self) -> None:
        records = {Path("a"): sft(), Path("b"): memft(optimizer_steps=400)}
        with pytest.raises(
            InputError, match=r"no pair of runs of equal budgets \(budgets differ: 200 and 400 optimiser"
        ):
            compare(records)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"baseline": "adam"}, "no run of 'adam'; expected one of: MemFT OnlyThreshold; SFT"),
            ({"by": "colour"}, "no run has a value for 'colour'"),
            ({"tolerance": -0.1}, "tolerance: expected a share of at least 0"),
            ({"tolerance": math.nan}, "tolerance: expected a share of at least 0"),
            ({"confidence": 95}, "confidence: expected at least 0.5 and below 1, got 95"),
        ],
    )
    def test_an_invalid_argument_is_refused_with_what_is_expected(
        self, arguments: dict[str, Any], message: str
    ) -> None:
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

    def test_means_and_differences_are_printed_in_100_columns_with_a_verdict(
        self, runs: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["compare", str(runs)]) == 0
        lines = capsys.readouterr().out.splitlines()
        out = " ".join(" ".join(lines).split())
        assert "runs 5 4" in out
        # 3.1 in all runs of SFT; 2.25 on average with MemFT.
        assert "final loss (nats) 3.100 2.250 -0.850 -1.175 to -0.525 4 4 better" in out
        assert "MemFT OnlyThreshold against SFT: better in final loss (-0.850 nats; 95 % interval -1.175 to" in out
        assert "left out: no run of the other method" in out
        assert max(len(line) for line in lines if " against " not in line and "left out" not in line) <= 100

    def test_runs_that_stop_once_all_tokens_are_certain_are_compared_by_their_steps(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for path, record in stopped().items():
            write_record(tmp_path / path, record)
        assert main(["compare", str(tmp_path)]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert "steps to all certain 160.0 90.0 -70.0" in out
        assert "the intervals say nothing about others" in out
        assert main(["compare", str(tmp_path), "--json"]) == 0
        (content,) = json.loads(capsys.readouterr().out)
        (steps,) = content["differences"]
        assert (steps["outcome"], steps["mean"], steps["verdict"]) == ("steps_to_certain", -70, "better")

    def test_json_output_has_the_same_numbers(self, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["compare", str(runs), "--json"]) == 0
        (content,) = json.loads(capsys.readouterr().out)
        (loss,) = [found for found in content["differences"] if found["outcome"] == "final_loss"]
        assert (loss["unit"], loss["baseline_mean"], loss["method_mean"], loss["pairs"]) == ("nats", 3.1, 2.25, 4)
        assert loss["interval"][0] < loss["mean"] < loss["interval"][1]
        assert (loss["verdict"], content["verdicts"][0].split(" (")[0]) == (
            "better",
            "MemFT OnlyThreshold against SFT: better in final loss",
        )

    def test_runs_of_a_single_method_are_an_error(self, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["compare", str(runs), "--where.method", "sft"]) == 2
        # A note comes first: these runs have the same length but different texts.
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("pml compare: error: all runs are of SFT: expected runs of at least")
