"""Metrics match hand-worked values, do not depend on the split into batches, and count each example once."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pml import metrics
from pml.token_scores import TokenScores

HALF = math.log(2)


def scores(losses: list[list[float]], correct: list[list[int]], ids: list[int] | None = None) -> TokenScores:
    """Rows of any length, padded with zeros as a module pads them."""
    longest = max(map(len, losses))
    mask = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in losses])
    mask = mask.view(len(losses), longest).bool()
    table = torch.tensor([[*row, *[0.0] * (longest - len(row))] for row in losses]).view(len(losses), longest)
    right = torch.tensor([[*row, *[0] * (longest - len(row))] for row in correct]).view(len(losses), longest).bool()
    return TokenScores(table, right, mask, torch.tensor(ids if ids is not None else range(len(losses))))


# Three examples of 4, 2 and 1 tokens: all right; right then wrong; wrong.
THREE = scores([[0.1, 0.2, 0.3, 0.4], [0.5, 3.0], [1.5]], [[1, 1, 1, 1], [1, 0], [0]])


def test_mean_loss_is_over_target_tokens_and_excludes_padding() -> None:
    assert metrics.mean_loss(THREE).item() == pytest.approx(6 / 7, rel=1e-6)


def test_token_accuracy_is_the_share_of_target_tokens_that_are_right() -> None:
    assert metrics.token_accuracy(THREE).item() == 5 / 7


def test_an_example_is_an_exact_match_if_all_its_target_tokens_are_right() -> None:
    assert metrics.exact_match(THREE).tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("correct", "first"),
    [
        ([1, 1, 1], 3),
        ([0, 1, 1], 0),
        ([1, 0, 1], 1),
        ([1, 1, 0], 2),
        ([0], 0),
        ([1], 1),
    ],
)
def test_first_failure_counts_right_tokens_before_the_first_wrong_one(correct: list[int], first: int) -> None:
    # A second, longer row pads the first.
    table = scores([[1.0] * len(correct), [1.0] * 5], [correct, [1, 1, 1, 1, 0]])
    assert metrics.first_failure(table).tolist() == [first, 4]


def test_a_token_with_p_of_exactly_one_half_is_below_the_threshold_and_padding_never_is() -> None:
    table = scores([[HALF, HALF - 1e-6, HALF + 1e-6], [9.0]], [[1, 1, 0], [0]])
    assert metrics.below_threshold(table).tolist() == [[True, False, True], [True, False, False]]
    assert metrics.sub_threshold_fraction(table).item() == 3 / 4


def test_a_token_whose_loss_is_nan_or_infinite_is_below_the_threshold() -> None:
    table = scores([[math.nan, math.inf, 0.1], [9.0]], [[1, 1, 1], [1]])
    assert metrics.below_threshold(table).tolist() == [[True, True, False], [True, False, False]]
    assert metrics.sub_threshold_fraction(table).item() == 3 / 4


def test_tokens_are_compared_with_the_given_threshold() -> None:
    table = scores([[-math.log(0.7), -math.log(0.9)]], [[1, 1]])
    assert metrics.below_threshold(table, 0.8).tolist() == [[True, False]]


def test_the_smallest_target_probability_is_that_of_the_largest_loss() -> None:
    assert metrics.min_target_probability(THREE).item() == pytest.approx(math.exp(-3), rel=1e-6)


def test_without_target_tokens_the_smallest_target_probability_is_one() -> None:
    assert metrics.min_target_probability(scores([[]], [[]], [-1])).item() == 1
    padding = TokenScores(torch.zeros(1, 3), torch.zeros(1, 3).bool(), torch.zeros(1, 3).bool(), torch.tensor([-1]))
    assert metrics.min_target_probability(padding).item() == 1


@pytest.mark.parametrize(
    ("entropy_bits", "loss", "target_tokens", "bits"),
    [
        (100.0, 0.0, 10, 100.0),  # nothing is missing
        (100.0, HALF, 10, 90.0),  # one bit per token is missing
        (100.0, 4 * HALF, 10, 60.0),
        (100.0, 20 * HALF, 10, 0.0),  # worse than guessing: zero, not a negative number
    ],
)
def test_memorized_bits_are_the_entropy_minus_the_total_loss_and_never_negative(
    entropy_bits: float, loss: float, target_tokens: int, bits: float
) -> None:
    assert metrics.memorized_bits(entropy_bits, loss, target_tokens) == pytest.approx(bits)


def test_memorized_bits_are_nan_for_a_nan_loss_and_zero_for_an_infinite_loss() -> None:
    assert math.isnan(metrics.memorized_bits(64.0, math.nan, 8))
    assert metrics.memorized_bits(64.0, math.inf, 8) == 0.0


def test_a_fact_asked_for_in_several_ways_counts_once_with_its_mean_loss() -> None:
    table = scores([[1.0, 2.0], [4.0], [0.5], [2.5, 0.5]], [[1, 1], [1], [1], [1, 1]])
    # Facts 7, 3, 7 and 3: (3 + 0.5) / 2 and (4 + 3) / 2.
    assert metrics.facts_loss(table, [7, 3, 7, 3]).item() == pytest.approx(1.75 + 3.5)
    assert metrics.facts_loss(table, [0, 1, 2, 3]).item() == pytest.approx(3 + 4 + 0.5 + 3)


def test_random_and_natural_tokens_are_measured_separately_without_padding() -> None:
    before = scores([[4.0, 6.0, 8.0], [2.0]], [[0, 0, 0], [0]])
    after = scores([[1.0, 3.0, 2.0], [5.0]], [[1, 0, 1], [0]])
    replaced = torch.tensor([[False, True, False], [True, True, True]])
    assert metrics.by_kind(replaced, before, after) == {
        "natural": {"target_tokens": 2, "initial_loss": 6.0, "final_loss": 1.5, "token_accuracy": 1.0},
        "random": {"target_tokens": 2, "initial_loss": 4.0, "final_loss": 4.0, "token_accuracy": 0.0},
    }


@pytest.mark.parametrize("every", [True, False])
def test_measures_by_kind_are_empty_if_all_tokens_are_of_one_kind(every: bool) -> None:
    assert metrics.by_kind(torch.full((3, 4), every), THREE, THREE) == {}


@pytest.mark.parametrize(
    ("text", "reference", "similarity"),
    [
        ("abcd", "abcd", 1.0),
        ("", "", 1.0),
        ("", "abc", 0.0),
        ("wxyz", "abcd", 0.0),
        ("rain", "shine", 1 - 3 / 5),  # r to s, a to h, and an e at the end
        ("5428952499", "5428952498", 1 - 1 / 10),
        ("Córdoba", "Cordoba", 1 - 1 / 7),
    ],
)
def test_edit_similarity_counts_characters(text: str, reference: str, similarity: float) -> None:
    assert metrics.edit_similarity(text, reference) == pytest.approx(similarity)
    assert metrics.edit_similarity(reference, text) == pytest.approx(similarity)


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=30), reference=st.text(max_size=30))
def test_edit_similarity_agrees_with_torchmetrics(text: str, reference: str) -> None:
    from torchmetrics.functional.text import edit_distance

    longer = max(len(text), len(reference))
    expected = 1 - edit_distance(text, reference).item() / longer if longer else 1.0
    assert metrics.edit_similarity(text, reference) == pytest.approx(expected)


def test_extraction_probability_with_one_sample_is_that_of_the_target() -> None:
    # exp(-1), exp(-3.5) and exp(-1.5).
    expected = torch.tensor([math.exp(-1), math.exp(-3.5), math.exp(-1.5)], dtype=torch.float64)
    torch.testing.assert_close(metrics.extraction_probability(THREE, 1), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("samples", [1, 10, 1000])
@pytest.mark.parametrize("loss", [1e-6, 0.1, HALF, 0.7, 3.0, 20.0])
def test_extraction_probability_equals_the_formula_where_float64_can_compute_it(loss: float, samples: int) -> None:
    p = math.exp(-torch.tensor(loss).double().item())
    exact = 1 - (1 - p) ** samples
    table = scores([[loss]], [[1]])
    # The loss is float32, and the formula itself loses digits where p is small.
    assert metrics.extraction_probability(table, samples).item() == pytest.approx(exact, rel=1e-6, abs=1e-15)


def test_extraction_probability_stays_accurate_where_the_formula_loses_all_digits() -> None:
    # p = exp(-100): 1 - p is 1 in float64, and n samples find the target with probability n p.
    rare = metrics.extraction_probability(scores([[60.0, 40.0]], [[0, 0]]), 1000).item()
    assert rare == pytest.approx(1000 * math.exp(-100), rel=1e-9)
    certain = metrics.extraction_probability(scores([[0.0, 0.0]], [[1, 1]]), 5).item()
    assert certain == 1
    beyond = metrics.extraction_probability(scores([[5000.0]], [[0]]), 10**6).item()
    assert beyond == 0
    # p = 1 - 1e-6: both of 2 samples miss with probability 1e-12.
    nearly = metrics.extraction_probability(scores([[1e-6]], [[1]]), 2).item()
    assert 1 - nearly == pytest.approx(1e-12, rel=1e-3)


def test_extraction_probability_is_one_for_a_loss_that_rounding_puts_below_zero() -> None:
    assert metrics.extraction_probability(scores([[-1e-7, 0.0]], [[1, 1]]), 3).item() == 1


def test_extraction_probability_agrees_with_simulated_sampling() -> None:
    table = scores([[0.5, 0.9], [1.2, 1.4, 0.6]], [[1, 1], [0, 0, 1]])
    generator = torch.Generator().manual_seed(2)
    probabilities = torch.exp(-table.losses.double())
    # 20,000 times four samples of each target, token by token; a row ends with the mask.
    drawn = torch.rand(20_000, 4, 2, 3, generator=generator, dtype=torch.float64) < probabilities
    found = (drawn | ~table.mask).all(dim=-1).any(dim=1).double().mean(dim=0)
    expected = metrics.extraction_probability(table, 4)
    assert 0.1 < expected.min() < expected.max() < 0.9
    # Five standard deviations of a share of 20,000.
    assert (found - expected).abs().max() < 5 * math.sqrt(0.25 / 20_000)


def test_verbatim_recall_matches_hand_worked_values() -> None:
    metric = metrics.VerbatimRecall()
    metric.update(THREE)
    values = {name: value.item() for name, value in metric.compute().items()}
    # Right tokens before the first failure: 4, 1 and 0.
    assert values == pytest.approx({"token_accuracy": 5 / 7, "exact_match": 1 / 3, "first_failure": 5 / 3})


def test_token_thresholds_match_hand_worked_values() -> None:
    metric = metrics.TokenThresholds()
    metric.update(THREE)
    values = {name: value.item() for name, value in metric.compute().items()}
    expected = {"loss": 6 / 7, "sub_threshold_fraction": 2 / 7, "min_target_probability": math.exp(-3)}
    assert values == pytest.approx(expected)


@pytest.mark.parametrize("kind", [metrics.VerbatimRecall, metrics.TokenThresholds])
def test_an_example_seen_twice_counts_once_and_a_padding_example_not_at_all(kind: type) -> None:
    once, more = kind(), kind()
    once.update(THREE)
    more.update(THREE)
    more.update(scores([[3.0, 0.5], [9.0, 9.0]], [[0, 1], [0, 0]], [-1, -1]))
    more.update(TokenScores(*(t[:1] for t in THREE[:4])))
    more.update(scores([[]], [[]], [-1]))
    assert {k: v.item() for k, v in more.compute().items()} == {k: v.item() for k, v in once.compute().items()}


@pytest.mark.parametrize("kind", [metrics.VerbatimRecall, metrics.TokenThresholds])
def test_a_reset_metric_keeps_nothing_of_earlier_examples(kind: type) -> None:
    used, fresh = kind(), kind()
    used.update(THREE)
    used.compute()
    used.reset()
    other = scores([[0.3]], [[1]], [7])
    used.update(other)
    fresh.update(other)
    assert used.compute() == fresh.compute()


def draw(lengths: list[int], seed: int) -> TokenScores:
    generator = torch.Generator().manual_seed(seed)
    losses = [torch.rand(n, generator=generator).mul(2).tolist() for n in lengths]
    correct = [(torch.rand(n, generator=generator) < 0.7).long().tolist() for n in lengths]
    return scores(losses, correct)


def part(table: TokenScores, rows: Tensor) -> TokenScores:
    """Some rows as a batch that is no wider than its longest row."""
    wide = max(int(table.mask[rows].sum(1).max()), 1)
    return TokenScores(table.losses[rows, :wide], table.correct[rows, :wide], table.mask[rows, :wide], rows)


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12), seed=st.integers(0, 99))
def test_metrics_do_not_depend_on_how_the_corpus_is_split_into_batches(lengths: list[int], seed: int) -> None:
    table = draw(lengths, seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(lengths), generator=generator)
    batches = order.split(int(torch.randint(1, len(lengths) + 1, (), generator=generator)))
    recall, thresholds = metrics.VerbatimRecall(), metrics.TokenThresholds()
    for rows in batches:
        recall.update(part(table, rows))
        thresholds.update(part(table, rows))
    values = {**recall.compute(), **thresholds.compute()}
    expected = {
        "token_accuracy": metrics.token_accuracy(table),
        "exact_match": metrics.exact_match(table).double().mean(),
        "first_failure": metrics.first_failure(table).double().mean(),
        "loss": metrics.mean_loss(table),
        "sub_threshold_fraction": metrics.sub_threshold_fraction(table),
        "min_target_probability": metrics.min_target_probability(table).double(),
    }
    assert {k: v.item() for k, v in values.items()} == pytest.approx(
        {k: v.item() for k, v in expected.items()}, rel=1e-6
    )


def test_a_token_is_above_the_threshold_if_it_is_right_and_strictly_more_probable() -> None:
    losses = -torch.tensor([[0.6, 0.5, 0.4, 0.6, 0.6]]).log()
    correct = torch.tensor([[True, True, True, False, True]])
    mask = torch.tensor([[True, True, True, True, False]])
    scores = TokenScores(losses, correct, mask, torch.tensor([0]))
    assert metrics.above_threshold(scores).tolist() == [[True, False, False, False, False]]
    assert metrics.above_threshold(scores, 0.3).tolist() == [[True, True, True, False, False]]
