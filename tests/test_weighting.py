"""Token weights against values worked out by hand."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pml.errors import InputError
from pml.token_scores import TokenScores, critical_loss
from pml.weighting import (
    ExpectedRecall,
    FallingThreshold,
    OnlyThreshold,
    SlidingWindow,
    Uniform,
    Weighting,
    WholeTargets,
    expected_recall_slope,
    weighted_mean,
    within_reach,
)


def scores(losses: list[list[float]], correct: list[list[int]], lengths: list[int], ids: list[int]) -> TokenScores:
    mask = torch.arange(len(losses[0])) < torch.tensor(lengths)[:, None]
    return TokenScores(torch.tensor(losses), torch.tensor(correct).bool() & mask, mask, torch.tensor(ids))


ONE = scores([[0.1, 2.0, 0.7, 3.0, 9.0]], [[1, 0, 1, 0, 0]], [4], [0])


def test_uniform_gives_every_target_token_weight_one_and_padding_none() -> None:
    assert Uniform().weights(ONE).tolist() == [[1, 1, 1, 1, 0]]


def test_only_threshold_weighs_tokens_below_the_threshold_and_never_padding() -> None:
    assert OnlyThreshold().weights(ONE).tolist() == [[0, 1, 1, 1, 0]]
    assert OnlyThreshold(threshold=0.2).weights(ONE).tolist() == [[0, 1, 0, 1, 0]]


@pytest.mark.parametrize("weighting", [OnlyThreshold(), FallingThreshold(start=0.5, end=0.4)], ids=repr)
def test_a_token_exactly_at_the_threshold_has_no_weight(weighting: Weighting) -> None:
    at = scores([[critical_loss(0.5)]], [[0]], [1], [0])
    at = at._replace(losses=at.losses.double().fill_(critical_loss(0.5)))
    assert weighting.weights(at).tolist() == [[0]]


@pytest.mark.parametrize("kind", [OnlyThreshold, SlidingWindow, FallingThreshold, ExpectedRecall, WholeTargets])
def test_weights_are_detached_from_the_graph(kind: type[Weighting]) -> None:
    weighting = kind()
    weighting.prepare(1, torch.device("cpu"))
    right = ONE._replace(losses=ONE.losses.clone().requires_grad_(), margin=torch.full((1, 5), 3.0))
    assert not weighting.weights(right).requires_grad
    assert not right.detach().losses.requires_grad


@pytest.mark.parametrize("kind", [OnlyThreshold, FallingThreshold])
def test_every_token_needs_a_gradient_if_memorised_tokens_are_trained_on(kind: Any) -> None:
    assert kind().gradient_above == critical_loss(0.5 if kind is OnlyThreshold else 0.999)
    assert kind(when_memorized="uniform").gradient_above is None


def test_the_position_weight_falls_from_one_to_exp_minus_lambda_over_the_active_tokens() -> None:
    weights = OnlyThreshold(position_decay=2.0).weights(ONE)[0].tolist()
    assert weights == pytest.approx([0, 1, math.exp(-1), math.exp(-2), 0])


def test_the_position_weight_of_a_lone_active_token_is_one() -> None:
    assert OnlyThreshold(position_decay=2.0).weights(scores([[0.1, 2.0]], [[1, 0]], [2], [0])).tolist() == [[0, 1]]


def test_sliding_window_weights_agree_with_values_worked_out_by_hand() -> None:
    weighting = SlidingWindow(window=2, tau=2.0, floor=0.01, scale=1.0)
    weighting.prepare(1, torch.device("cpu"))
    weights = weighting.weights(ONE)[0].tolist()
    # The anchor is position 1; the window holds 1 and 2, so 3 gets the floor.
    soft = [1 / (1 + math.exp(-(loss - math.log(2)))) for loss in (0.1, 2.0, 0.7, 3.0)]
    assert weights == pytest.approx([soft[0], soft[1], soft[2] * math.exp(-0.5), soft[3] * 0.01, 0], rel=1e-6)


def test_padding_is_not_the_first_wrong_token() -> None:
    # The first target is all right and shorter than the batch; only the last token of the second is wrong.
    two = scores([[0.1, 0.2, 0.0], [0.1, 0.2, 3.0]], [[1, 1, 0], [1, 1, 0]], [2, 3], [0, 1])
    assert SlidingWindow.anchors(two).tolist() == [-1, 2]


def test_a_target_without_errors_is_weighted_without_a_window() -> None:
    right = scores([[0.1, 2.0]], [[1, 1]], [2], [0])
    weighting = SlidingWindow(window=1, scale=1.0)
    weighting.prepare(1, torch.device("cpu"))
    soft = [1 / (1 + math.exp(-(loss - math.log(2)))) for loss in (0.1, 2.0)]
    assert weighting.weights(right)[0].tolist() == pytest.approx(soft, rel=1e-6)


def test_the_window_state_follows_the_example_and_not_the_row() -> None:
    two = scores([[2.0, 2.0], [2.0, 2.0]], [[0, 0], [1, 0]], [2, 2], [0, 1])
    swapped = TokenScores(*(t.flip(0) for t in two[:4]))
    weighting = SlidingWindow()
    weighting.prepare(2, torch.device("cpu"))
    for batch in (two, swapped, two, swapped):
        weighting.weights(batch)
    assert weighting.state_dict()["stuck"].tolist() == [3, 3]
    assert weighting.state_dict()["anchor"].tolist() == [0, 1]


def test_the_window_grows_to_its_limit_and_falls_back_when_the_anchor_moves() -> None:
    weighting = SlidingWindow(patience=3, growth=0.5, max_growth=4.0)
    stuck = torch.tensor([0, 2, 3, 4, 8, 9, 100])
    assert weighting.growth_factor(stuck).tolist() == [1, 1, 1.5, 2, 4, 4, 4]
    weighting.prepare(1, torch.device("cpu"))
    for _ in range(5):
        weighting.weights(ONE)
    moved = ONE._replace(correct=torch.tensor([[True, True, False, False, False]]))
    weighting.weights(moved)
    assert weighting.state_dict()["stuck"].tolist() == [0]


def test_the_window_state_survives_a_checkpoint() -> None:
    # The window has grown: a new one would give the tokens after the anchor other weights.
    first, second = (SlidingWindow(window=1, patience=2) for _ in range(2))
    first.prepare(1, torch.device("cpu"))
    for _ in range(4):
        first.weights(ONE)
    second.load_state_dict(first.state_dict())
    second.prepare(1, torch.device("cpu"))
    torch.testing.assert_close(second.weights(ONE), first.weights(ONE))


def test_a_second_fit_begins_with_new_windows() -> None:
    weighting = SlidingWindow(window=1, patience=2)
    weighting.prepare(1, torch.device("cpu"))
    first = weighting.weights(ONE)
    for _ in range(4):
        weighting.weights(ONE)
    assert not torch.equal(weighting.weights(ONE), first)
    weighting.prepare(1, torch.device("cpu"))
    torch.testing.assert_close(weighting.weights(ONE), first)


def test_a_padding_example_leaves_the_window_state_unchanged() -> None:
    weighting = SlidingWindow()
    weighting.prepare(1, torch.device("cpu"))
    weighting.weights(scores([[0.0]], [[0]], [0], [-1]))
    assert weighting.state_dict()["anchor"].tolist() == [-2]


def test_the_weighted_mean_without_any_weight_is_a_zero_connected_to_the_graph() -> None:
    losses = torch.tensor([[1.0, 2.0]], requires_grad=True)
    loss = weighted_mean(losses, torch.zeros(1, 2))
    loss.backward()
    assert loss.item() == 0
    assert losses.grad is not None
    assert losses.grad.tolist() == [[0, 0]]


@pytest.mark.parametrize("threshold", [0.0, 1.0, -0.5, 2.0, float("nan")])
@pytest.mark.parametrize("kind", [OnlyThreshold, SlidingWindow])
def test_a_threshold_outside_zero_and_one_is_refused(kind: type, threshold: float) -> None:
    with pytest.raises(InputError, match=r"threshold is .*; expected a probability strictly between 0 and 1"):
        kind(threshold=threshold)


@pytest.mark.parametrize("name", ["scale", "window", "tau", "max_growth"])
def test_a_sliding_window_setting_of_zero_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=rf"{name} is 0; expected a number above 0"):
        SlidingWindow(**{name: 0})


def test_a_falling_threshold_starts_as_the_plain_loss_and_ends_as_a_hard_threshold() -> None:
    weighting = FallingThreshold(start=0.999, end=0.5)
    assert weighting.weights(ONE).tolist() == [[1, 1, 1, 1, 0]]
    weighting.progress = 1.0
    assert weighting.weights(ONE).tolist() == OnlyThreshold(0.5).weights(ONE).tolist()


def test_a_falling_threshold_may_be_constant() -> None:
    weighting = FallingThreshold(start=0.6, end=0.6)
    weighting.progress = 0.3
    assert weighting.critical == pytest.approx(-math.log(0.6))


def test_the_critical_loss_rises_geometrically() -> None:
    weighting = FallingThreshold(start=math.exp(-0.01), end=math.exp(-0.64))
    critical = []
    for weighting.progress in (0.0, 0.5, 1.0):
        critical.append(weighting.gradient_above)
    assert critical == pytest.approx([0.01, 0.08, 0.64])


def test_the_slope_is_the_scaled_derivative_of_the_expected_number_of_tokens_above_threshold() -> None:
    losses = torch.tensor([0.0, 0.3, 0.7, 2.0, 9.0], dtype=torch.float64, requires_grad=True)
    expected = torch.sigmoid((math.log(2) - losses) / 1.5).sum()
    expected.backward()
    assert losses.grad is not None
    torch.testing.assert_close(expected_recall_slope(losses.detach(), 1.5), -losses.grad * 4 * 1.5)


def test_a_hot_slope_weighs_all_tokens_alike_and_a_cold_one_only_those_near_the_threshold() -> None:
    losses = torch.tensor([0.0, math.log(2), 5.0])
    assert expected_recall_slope(losses, 1e4).tolist() == pytest.approx([1, 1, 1], abs=1e-6)
    # At T = 0.1: s = sigmoid(6.93) and sigmoid(-43.1).
    assert expected_recall_slope(losses, 0.1).tolist() == pytest.approx([4 * 0.99902 * 0.00098, 1, 0], abs=2e-5)


def test_the_reach_of_a_target_falls_with_the_shortfall_of_its_tokens() -> None:
    ln2 = math.log(2)
    losses = torch.tensor([[0.1, ln2, 9.0], [ln2 + 1, 0.2, ln2 + 2]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    # The first target has no shortfall (its 9.0 is padding); that of the second is 3 nats.
    reach = within_reach(losses, mask, temperature=1.5, floor=0.2)
    assert reach.flatten().tolist() == pytest.approx([1, 0.2 + 0.8 * math.exp(-2)])


def test_whole_targets_multiplies_expected_recall_and_reach() -> None:
    weighting = WholeTargets(start=0.9, end=0.6, reach_start=8, reach_end=2, reach_floor=0.25)
    weighting.progress = 0.5
    reach = 0.25 + 0.75 * math.exp(-((2 - math.log(2)) + (0.7 - math.log(2)) + (3 - math.log(2))) / 4)
    # 0.1 lies below the critical loss of sqrt(ln 0.9 ln 0.6) = 0.232; wrong tokens have the reach as weight.
    wrong = ONE._replace(margin=torch.full((1, 5), -1.0))
    assert weighting.weights(wrong)[0].tolist() == pytest.approx([0, reach, reach, reach, 0], rel=1e-5)
    right = ONE._replace(margin=torch.full((1, 5), 1.0))
    tokens = ExpectedRecall(start=0.9, end=0.6)
    tokens.progress = 0.5
    torch.testing.assert_close(weighting.weights(right), tokens.weights(right) * reach)


def test_a_target_out_of_reach_keeps_the_floor() -> None:
    far = scores([[50.0, 60.0], [2.0, 0.1]], [[0, 0], [0, 1]], [2, 2], [0, 1])
    far = far._replace(margin=torch.full((2, 2), -1.0))
    weighting = WholeTargets(reach_floor=0.25)
    weighting.progress = 1.0
    assert weighting.weights(far)[0].tolist() == pytest.approx([0.25, 0.25])


def test_expected_recall_weighs_right_tokens_by_the_slope_at_the_current_temperature() -> None:
    weighting = ExpectedRecall(start=0.999, temperature_start=4.0, temperature_end=1.0)
    weighting.progress = 0.5

    def by_hand(loss: float) -> float:
        s = 1 / (1 + math.exp((loss - math.log(2)) / 2.0))
        return 4 * s * (1 - s)

    right = ONE._replace(margin=torch.full((1, 5), 3.0))
    assert weighting.weights(right)[0].tolist() == pytest.approx([*map(by_hand, (0.1, 2, 0.7, 3)), 0], rel=1e-6)


def test_expected_recall_gives_the_floor_to_uncertain_right_tokens_and_nothing_to_safe_ones() -> None:
    weighting = ExpectedRecall(end=0.6, temperature_end=0.1, floor=0.25)
    weighting.progress = 1.0
    right = ONE._replace(margin=torch.full((1, 5), 3.0))
    # 0.1 lies below -ln 0.6; s = sigmoid(-0.0685) for 0.7.
    assert weighting.weights(right)[0].tolist() == pytest.approx([0, 0.25, 0.99883, 0.25, 0], abs=1e-5)


def test_expected_recall_gives_full_weight_to_tokens_that_do_not_win_by_the_margin() -> None:
    weighting = ExpectedRecall(temperature_end=0.1, floor=0.25, margin=1.5)
    weighting.progress = 1.0
    # Token 2 wins by just enough, token 3 by too little, token 4 loses; padding never has weight.
    won_by = ONE._replace(margin=torch.tensor([[-1.0, 1.5, 1.4, -0.1, -9.0]]))
    assert weighting.weights(won_by)[0].tolist() == pytest.approx([0, 0.25, 1, 1, 0])


@pytest.mark.parametrize(
    ("progress", "in_last_share"), [(0.0, False), (323 / 360, False), (324 / 360, True), (1.0, True)]
)
def test_whole_targets_trains_all_uncertain_tokens_alike_in_the_last_share(
    progress: float, in_last_share: bool
) -> None:
    weighting, usual = WholeTargets(last_share=0.1), WholeTargets()
    weighting.progress = usual.progress = progress
    scores = ONE._replace(margin=torch.full((1, 5), 3.0))
    if in_last_share:
        assert weighting.weights(scores).tolist() == OnlyThreshold().weights(scores).tolist() == [[0, 1, 1, 1, 0]]
        assert weighting.gradient_above == math.log(2)
    else:
        assert weighting.weights(scores).tolist() == usual.weights(scores).tolist() != [[0, 1, 1, 1, 0]]
        assert weighting.gradient_above == usual.gradient_above


def test_whole_targets_chooses_among_targets_to_the_end_unless_told_otherwise() -> None:
    weighting = WholeTargets()
    weighting.progress = 1.0
    hopeless = ONE._replace(losses=10 * ONE.losses, margin=torch.full((1, 5), -3.0))
    assert weighting.weights(hopeless).max() < 0.11


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: FallingThreshold(start=0.5, end=0.9), "the threshold rises from 0.5 to 0.9"),
        (lambda: ExpectedRecall(temperature_start=0.0), "temperature_start is 0.0; expected a number above 0"),
        (lambda: ExpectedRecall(temperature_end=0.0), "temperature_end is 0.0; expected a number above 0"),
        (lambda: WholeTargets(reach_start=-1.0), "reach_start is -1.0; expected a number above 0"),
        (lambda: WholeTargets(reach_end=float("nan")), "reach_end is nan; expected a number above 0"),
        (lambda: WholeTargets(reach_floor=0.0), "reach_floor is 0.0; expected a share above 0"),
        (lambda: WholeTargets(last_share=1.0), "last_share is 1.0; expected a share from 0 to below 1"),
        (lambda: WholeTargets(last_share=-0.1), "last_share is -0.1; expected a share from 0 to below 1"),
        (lambda: WholeTargets(last_share=float("nan")), "last_share is nan; expected a share from 0 to below 1"),
        (lambda: ExpectedRecall(floor=1.5), "ExpectedRecall: floor is 1.5; expected a share above 0"),
        (lambda: SlidingWindow(floor=-1.0), "SlidingWindow: floor is -1.0; expected a share above 0"),
        (lambda: OnlyThreshold(position_decay=float("nan")), "position_decay is nan; expected a number above 0"),
    ],
)
def test_invalid_settings_are_refused(make: Callable[[], object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        make()
