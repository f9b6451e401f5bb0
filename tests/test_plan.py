"""Plans: ranks and outcomes worked by hand, their intervals, and what is said outside the measured range."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm
from simulated_laws import fit_one

from pml.cli import main
from pml.errors import InputError
from pml.law import LAW_NAME, LawFit, Observation
from pml.plan import _Corpus, _plan, outcome_of_rank, rank_for_loss_reduction, rank_for_recall
from pml.plan_answer import LARGEST_RANK, Plan
from pml.recall_model import RecallModel
from pml.records import write_json

INITIAL = 13.0


def reduction(rank: float, length: float) -> float:
    return 40 * rank**0.5 / length**0.5 + 1


# Half of the tokens are right at a final loss of 2.1 nats, which is a loss reduction of 10.9.
RECALL = RecallModel(
    half_loss=2.1,
    steepness=10.0,
    concentration=1e9,
    runs=4,
    targets=4,
    tokens=4,
    loss_range=(0.0, 5.0),
    tokens_per_target_range=(1, 1),
    token_accuracy_error=0.0,
    exact_match_error=0.0,
    brier=0.0,
    brier_reference=1.0,
    reliability=[],
)


@pytest.fixture(scope="module")
def law() -> LawFit:
    runs = [
        Observation(r, n, INITIAL, INITIAL - reduction(r, n), 0, f"r{r}-l{n}", effective_parameters=100 * r)
        for r in (1, 2, 4, 8)
        for n in (256, 400, 1024, 2048)
    ]
    return fit_one(runs, "power_offset", recall=RECALL)


def test_a_text_whose_frozen_loss_is_far_from_those_of_the_law_is_reported(law: LawFit) -> None:
    within, beyond = (outcome_of_rank(law, 400, 4, initial_loss=loss).beyond for loss in (12.0, 2.3))
    assert not any("kind of text" in sentence for sentence in within)
    # The frozen losses of the law's texts are 13 nats; up to a factor of 1.1 either way is near enough.
    for loss, said in ((13 / 1.1 + 0.01, False), (13 / 1.1 - 0.01, True), (14.29, False), (14.31, True)):
        sentences = outcome_of_rank(law, 400, 4, initial_loss=loss).beyond
        assert any("kind of text" in sentence for sentence in sentences) is said, loss
    assert beyond[-1] == (
        "the frozen model's loss is 2.3 nats per target token, but 13 to 13 on the law's texts: the law does not "
        "cover this kind of text"
    )


def test_the_smallest_rank_for_a_loss_reduction_equals_a_hand_worked_one(law: LawFit) -> None:
    # 40 sqrt(r) / sqrt(400) + 1 = 2 sqrt(r) + 1 >= 6 from r = 6.25 on
    plan = rank_for_loss_reduction(law, 400, 6.0)
    assert (plan.rank, plan.rank_confidence_interval) == (7, (7, 7))
    assert plan.outcome is not None
    assert plan.outcome.loss_reduction == pytest.approx(2 * 7**0.5 + 1)
    assert plan.outcome.final_loss == pytest.approx(INITIAL - 2 * 7**0.5 - 1)
    assert (plan.outcome.effective_parameters, plan.outcome.megabytes) == (700, 0.0028)
    # The recall model has seen targets of one token only.
    assert plan.beyond == ["tokens per target 400 is 400 times the largest measured (1)"]


def test_targets_are_by_default_as_long_as_those_of_the_law(law: LawFit) -> None:
    assert outcome_of_rank(law, 1, 10**6).pairs == 1
    # Targets have 64, 100, 256 and 512 tokens, with a median of 178.
    four = law.model_copy(update={"observations": [replace(run, pairs=4) for run in law.observations]})
    assert [outcome_of_rank(four, 1, tokens).pairs for tokens in (10, 356, 1780)] == [1, 2, 10]


def test_the_interval_of_a_rank_contains_the_rank_and_ends_at_ranks_of_fitted_laws(law: LawFit) -> None:
    corpus = _Corpus.of(law, 400, None, None)

    def interval(rank: float, *of_laws: float) -> tuple[int | None, int | None] | None:
        return _plan(law, corpus, "", rank, np.array(of_laws)).rank_confidence_interval

    # Of 40 laws, one needs rank 3 and one more than any rank.
    assert interval(7.0, 3.0, *[8.0] * 38, math.inf) == (3, 8)
    assert interval(7.0, *[8.0] * 40) == (7, 8)
    assert interval(9.0, *[8.0] * 40) == (8, 9)
    assert interval(math.inf, *[8.0] * 40) == (8, None)


def test_the_smallest_rank_for_recall_equals_a_hand_worked_one(law: LawFit) -> None:
    # With one token per target, half of them are right at 2.1 nats: 2 sqrt(r) + 1 >= 10.9 from r = 24.5 on.
    plan = rank_for_recall(law, 400, share=0.5, pairs=400)
    assert plan.rank == 25
    assert plan.beyond == ["rank 25 is 3.12 times the largest measured (8)"]
    below = outcome_of_rank(law, 24, 400, pairs=400).outcome
    assert below is not None
    assert below.token_accuracy is not None
    assert below.token_accuracy < 0.5


def test_a_plan_says_if_no_rank_is_enough(law: LawFit) -> None:
    # 40 * 64 / sqrt(10^8) + 1 = 1.256 at the largest rank that is considered
    plan = rank_for_loss_reduction(law, 10**8, 1.3)
    assert (plan.rank, plan.outcome) == (None, None)
    assert plan.beyond[0] == f"no rank up to {LARGEST_RANK} is enough"
    assert plan.lines()[1] == f"rank: none up to {LARGEST_RANK}"


@pytest.mark.parametrize(
    ("setting", "largest"),
    [
        # 100 parameters per rank: 50 in A and 50 in B, or 25 and 25 in each of two blocks.
        ({"placement": "mlp_block", "block": [20]}, 50),
        ({"placement": "mlp_block", "block": [20, 21]}, 25),
        # Several layers of unknown shapes, or an A that is trained in fewer dimensions than it has.
        ({"placement": ["q_proj", "v_proj"], "block": [20]}, 4096),
        ({"placement": "mlp_block", "block": [20], "guarded": True}, 4096),
        ({"placement": "mlp_block"}, 4096),
    ],
)
def test_no_rank_above_the_models_width_is_planned(law: LawFit, setting: dict[str, Any], largest: int) -> None:
    law = law.model_copy(update={"setting": setting})
    for plan in (rank_for_loss_reduction(law, 10**8, 1.3), rank_for_recall(law, 10**8, share=1.0)):
        assert (plan.rank, plan.largest_rank) == (None, largest)
        assert plan.beyond[0].startswith(f"no rank up to {largest} is enough")
    assert outcome_of_rank(law, min(largest, 50), 400).rank == min(largest, 50)
    if largest < LARGEST_RANK:
        with pytest.raises(InputError, match=f"rank is {largest + 1}; expected at most {largest}, the width of the mo"):
            outcome_of_rank(law, largest + 1, 400)


def test_the_size_of_a_guarded_adapter_is_not_derived_from_its_trainable_parameters(law: LawFit) -> None:
    guarded = outcome_of_rank(law.model_copy(update={"setting": {"guarded": True}}), 7, 400)
    assert guarded.outcome is not None
    assert (guarded.outcome.effective_parameters, guarded.outcome.megabytes) == (700, None)
    assert "adapter of rank 7: 700 parameters" in guarded.lines()


def test_a_rank_is_shown_with_its_interval_even_if_an_end_exceeds_the_largest_rank(law: LawFit) -> None:
    plan = rank_for_loss_reduction(law, 10**8, 1.3).model_copy(update={"rank_confidence_interval": (3000, None)})
    assert plan.lines()[1] == ("rank: none up to 4096, though the 95 % confidence interval begins at 3000")
    found = rank_for_loss_reduction(law, 400, 6.0)
    assert found.lines()[1] == "rank: 7 (95 % confidence interval 7 to 7, without the noise of a single run)"
    endless = found.model_copy(update={"rank_confidence_interval": (7, None)})
    assert "(95 % confidence interval 7 to more than 4096, " in endless.lines()[1]


def test_a_plan_says_if_the_probability_of_recall_stops_rising_with_the_rank(law: LawFit) -> None:
    # With hardly any steepness, half of the tokens are wrong at any loss, so no rank recalls a whole target.
    doubtful = RecallModel.model_construct(
        **{**vars(RECALL), "half_loss": 1.0, "steepness": 1e-3, "concentration": 1e9}
    )
    plan = rank_for_recall(law.model_copy(update={"recall": doubtful}), 400, pairs=2, probability=0.99)
    assert (plan.rank, plan.outcome) == (None, None)
    assert "no rank up to 4096 is enough: from rank " in plan.beyond[0]
    assert "on the probability stays at " in plan.beyond[0]
    assert "as far as 16 runs and their recall model can tell" in plan.beyond[0]
    assert not any(sentence.startswith("rank 4096 is") for sentence in plan.beyond)


def test_a_plan_says_if_the_recall_model_does_not_apply_or_does_not_predict(law: LawFit) -> None:
    # 2 sqrt(24) + 1 = 10.8, so the final loss is 2.2 nats.
    changed = {"loss_range": (5.0, 9.0), "brier": 0.2, "brier_reference": 0.1}
    worse = law.model_copy(update={"recall": RECALL.model_copy(update=changed)})
    found, usual = (outcome_of_rank(which, 24, 400, pairs=400).beyond for which in (worse, law))
    assert "a final loss of 2.2 nats is far below those that the recall model was fitted to (5 to 9)" in found
    assert any("recall model predicts no better than the mean (Brier score 0.200 against 0.100)" in s for s in found)
    assert not any("recall model" in sentence for sentence in usual)
    # An equal Brier score is no better than the mean.
    equal = law.model_copy(update={"recall": RECALL.model_copy(update={"brier": 0.1, "brier_reference": 0.1})})
    assert any("no better than the mean" in sentence for sentence in outcome_of_rank(equal, 24, 400).beyond)
    # More than half of the smallest loss that was measured is near enough.
    near = law.model_copy(update={"recall": RECALL.model_copy(update={"loss_range": (4.0, 9.0)})})
    assert not any("recall" in sentence for sentence in outcome_of_rank(near, 24, 400, pairs=400).beyond)
    # All tokens are right at 0.5 nats already, so they are at any smaller loss.
    all_right = law.model_copy(update={"recall": RECALL.model_copy(update={"loss_range": (0.5, 9.0)})})
    assert not any("recall" in sentence for sentence in outcome_of_rank(all_right, 100, 400, pairs=400).beyond)


def test_a_plan_for_recall_is_reproducible_and_its_rank_recalls_enough(noisy: LawFit) -> None:
    plans = [rank_for_recall(noisy, 2048, share=0.5, pairs=200, probability=0.9) for _ in range(2)]
    assert plans[0] == plans[1]
    assert plans[0].rank is not None
    # Above rank 50, ranks are first tried 3 % apart, then one by one.
    assert plans[0].rank > 60

    def right(rank: int) -> float:
        outcome = outcome_of_rank(noisy, rank, 2048, pairs=200).outcome
        assert outcome is not None
        assert outcome.exact_match is not None
        return outcome.exact_match

    assert right(plans[0].rank) > 0.5


def test_the_loss_reduction_is_at_most_the_frozen_loss_of_the_text(law: LawFit) -> None:
    assert float(law.initial_loss(400, 4.0)) == 4.0
    assert float(law.initial_loss(400)) == INITIAL
    outcome = outcome_of_rank(law, 8, 400, initial_loss=4.0).outcome
    assert outcome is not None
    # 2 sqrt(8) + 1 = 6.66 is more than the 4 nats that can be removed.
    assert (outcome.initial_loss, outcome.loss_reduction, outcome.final_loss) == (4.0, 4.0, 0.0)
    assert outcome.final_loss_prediction_interval == (0.0, 0.0)
    assert outcome.loss_reduction_confidence_interval == (4.0, 4.0)


@pytest.fixture(scope="module")
def noisy() -> LawFit:
    """A law whose runs scatter by 0.15 nats, on texts whose frozen losses differ by as much."""
    noise = np.random.default_rng(0)
    runs = []
    for n, initial in zip((256, 400, 1024, 2048), (13.2, 12.9, 12.8, 13.1), strict=True):
        for r in (1, 2, 4, 8):
            fallen = reduction(r, n) + 0.15 * float(noise.normal())
            runs.append(Observation(r, n, initial, initial - fallen, 0, f"r{r}-l{n}"))
    return fit_one(runs, "power_offset", recall=RECALL)


@pytest.mark.slow
@pytest.mark.usefixtures("no_profiles")
def test_the_interval_of_a_rank_covers_the_true_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    # All ranks up to 80 instead of 360 up to 4096, to save time.
    monkeypatch.setattr("pml.plan.LARGEST_RANK", 80)
    monkeypatch.setattr("pml.plan.FEWER_RANKS", 2000)
    noise = norm.ppf((np.arange(1000) + 0.5) / 1000)
    left = INITIAL - np.array([reduction(rank, 400) for rank in range(1, 129)])[:, None] - 0.15 * noise
    likely = RECALL.recall_probability(left, 10.0, 40, 0.5).mean(axis=1)
    needed = {probability: 1 + int(np.argmax(likely >= probability)) for probability in (0.5, 0.95)}

    noise, draws = np.random.default_rng(5), 24
    inside, width = dict.fromkeys(needed, 0), dict.fromkeys(needed, 0.0)
    for _ in range(draws):
        runs = [
            Observation(r, n, INITIAL, INITIAL - reduction(r, n) - 0.15 * float(noise.normal()), 0, f"r{r}-l{n}")
            for r in (1, 2, 4, 8, 16)
            for n in (256, 400, 1024, 2048)
        ]
        law = fit_one(runs, "power_offset", recall=RECALL)
        for probability in needed:
            plan = rank_for_recall(law, 400, share=0.5, pairs=40, probability=probability)
            assert plan.rank is not None
            assert plan.rank_confidence_interval is not None
            low, high = (257 if end is None else end for end in plan.rank_confidence_interval)
            inside[probability] += low <= needed[probability] <= high
            width[probability] += (high - low) / draws
    # Of 24, 22.8 are expected, with a standard deviation of 1.1. The width shows that intervals are not trivially wide.
    assert all(count >= 20 for count in inside.values()), (inside, width, needed)
    assert all(0 < width[probability] < 0.5 * rank for probability, rank in needed.items()), (inside, width, needed)


def test_a_higher_probability_of_recall_raises_the_rank_and_both_ends_of_its_interval(noisy: LawFit) -> None:
    plans = [rank_for_recall(noisy, 400, share=0.5, pairs=40, probability=p) for p in (0.5, 0.99)]
    ends = [(plan.rank, *(plan.rank_confidence_interval or (None, None))) for plan in plans]
    assert all(some is not None and more is not None and some < more for some, more in zip(*ends, strict=True)), ends


def test_the_final_loss_is_less_certain_if_the_frozen_loss_of_the_text_is_unknown(noisy: LawFit) -> None:
    unknown, known = (outcome_of_rank(noisy, 2, 400, initial_loss=loss).outcome for loss in (None, 13.0))
    assert unknown is not None
    assert known is not None
    spread, run_alone = (float(np.ptp(outcome.final_loss_prediction_interval)) for outcome in (unknown, known))
    assert spread > 1.2 * run_alone
    # The loss reduction depends little on the text, and that part is already in the scatter of the runs.
    unknown_spread, known_spread = (np.ptp(o.loss_reduction_prediction_interval) for o in (unknown, known))
    assert unknown_spread == pytest.approx(known_spread, rel=0.5)


@pytest.mark.parametrize("loss", [0.0, -1.0, float("nan"), float("inf")])
def test_an_initial_loss_that_is_not_positive_and_finite_is_refused(law: LawFit, loss: float) -> None:
    with pytest.raises(InputError, match="initial loss is"):
        outcome_of_rank(law, 1, 400, initial_loss=loss)


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (lambda law: outcome_of_rank(law, 0, 400), "rank is 0; expected a whole number of at least 1"),
        (lambda law: outcome_of_rank(law, 1, 0), "length is 0; expected at least 1 target token"),
        (lambda law: outcome_of_rank(law, 1, 10, pairs=11), "pairs is 11; expected between 1 and the 10 target tokens"),
        (lambda law: rank_for_loss_reduction(law, 400, 13.0), "loss reduction is 13 nats; expected above 0 and below"),
        (lambda law: rank_for_recall(law, 400, share=1.5), "recall is 1.5; expected above 0 and at most 1"),
        (lambda law: rank_for_recall(law, 400, probability=1.0), "probability is 1; expected above 0 and below 1"),
        (lambda law: rank_for_recall(law.model_copy(update={"recall": None}), 400), "this law has no recall model"),
    ],
)
def test_an_invalid_question_is_refused(law: LawFit, question: Callable[[LawFit], Plan], message: str) -> None:
    with pytest.raises(InputError, match=message):
        question(law)


def test_the_command_answers_from_a_law_file_and_refuses_conflicting_options(
    law: LawFit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(tmp_path / LAW_NAME, law.to_json())
    asked = ["plan", str(tmp_path), "--length", "400"]
    assert main([*asked, "--loss_reduction", "6", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rank"] == 7
    assert main([*asked, "--rank", "8", "--initial_loss", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["outcome"]["final_loss"] == 0.0
    assert main([*asked, "--rank", "8", "--recall", "1"]) == 2
    assert "--recall and --rank: expected one question at a time" in capsys.readouterr().err
    assert main([*asked, "--rank", "8", "--probability", "0.9"]) == 2
    assert "--probability and --rank: a probability is only for --recall" in capsys.readouterr().err
    assert main([*asked, "--recall", "0.5", "--pairs", "400", "--probability", "0.5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rank"] == 25
