"""From loss to recall: hand-worked values, and fits that recover the known model of simulated runs."""

import math

import numpy as np
import pytest
from scipy.optimize import approx_fprime, minimize
from scipy.stats import betabinom, binom

from pml.recall_model import RecallModel, RunTokens, _Likelihood, fit_recall, run_tokens
from pml.token_results import TokenResults


def model(half_loss: float = 1.0, steepness: float = 2.0, concentration: float = 1e6) -> RecallModel:
    return RecallModel.model_construct(half_loss=half_loss, steepness=steepness, concentration=concentration)


def runs_of(half_loss: float, steepness: float, concentration: float, seed: int = 0) -> list[RunTokens]:
    """30 runs of 60 targets of 8 tokens each, drawn from a known model."""
    generator = np.random.default_rng(seed)
    runs = []
    for loss in np.geomspace(half_loss / 8, half_loss * 4, 30):
        share = 1 / (1 + (loss / half_loss) ** steepness)
        chances = generator.beta(share * concentration, (1 - share) * concentration, size=60)
        runs.append(RunTokens(float(loss), np.full(60, 8), generator.binomial(8, chances)))
    return runs


def runs_of_all_lengths(count: int = 6) -> list[RunTokens]:
    """Runs of different sizes with targets of 1 to 9 tokens, from hardly any of them right to all."""
    generator = np.random.default_rng(1)
    runs = []
    for i, loss in enumerate(np.geomspace(0.05, 6.0, count)):
        tokens = generator.integers(1, 10, size=40 + i % 5)
        chances = generator.beta(20 / (1 + loss**2), 20 * loss**2 / (1 + loss**2), size=len(tokens))
        runs.append(RunTokens(float(loss), tokens, generator.binomial(tokens, chances)))
    runs[0] = RunTokens(runs[0].mean_loss, runs[0].tokens, runs[0].tokens)
    return runs


def plain_likelihood(theta: np.ndarray, runs: list[RunTokens]) -> float:
    """Minus the logarithm of likelihood times prior, target by target."""
    half_loss, steepness, concentration = np.exp(theta)
    total = ((theta[1] - math.log(2)) / 1) ** 2 / 2 + ((theta[2] - math.log(20)) / 2) ** 2 / 2
    for run in runs:
        share = 1 / (1 + (run.mean_loss / half_loss) ** steepness)
        total -= betabinom.logpmf(run.right, run.tokens, share * concentration, (1 - share) * concentration).sum()
    return float(total)


def plain_fit(runs: list[RunTokens]) -> RecallModel:
    options = {"xatol": 1e-7, "fatol": 1e-10}
    half_loss, steepness, concentration = np.exp(
        minimize(plain_likelihood, np.log([1.0, 2.0, 20.0]), (runs,), "Nelder-Mead", options=options).x
    )
    return model(half_loss, steepness, concentration)


def test_probabilities_do_not_exceed_1_where_the_concentration_is_large() -> None:
    losses = np.concatenate([[0.0], np.geomspace(1e-9, 1e-2, 200)])
    for concentration in (5e3, 1e5, 1e7):
        doubtless = model(steepness=3.0, concentration=concentration)
        assert (doubtless.exact_match(losses, 24) <= 1).all()
        # With a probability above 1, the binomial distribution has no values.
        assert doubtless.recall_probability(losses, 24, 200)[0] == pytest.approx(1.0)


def test_token_accuracy_matches_hand_worked_values() -> None:
    # 1 / (1 + (2 / 1)^2)
    np.testing.assert_allclose(model().token_accuracy([0.0, 1.0, 2.0]), [1.0, 0.5, 0.2], rtol=1e-9)


def test_exact_match_of_independent_tokens_is_the_product_of_their_probabilities() -> None:
    # q = 1 / (1 + 0.5^2) = 0.8, and 0.8^3; the concentration of 10^6 changes that by n^2 / c.
    np.testing.assert_allclose(model().exact_match(0.5, 3), 0.512, rtol=1e-5)


def test_tokens_that_fail_together_raise_the_probability_of_an_exact_match() -> None:
    # Beta(1, 1) has E[p^2] = 1/3, where independent tokens have 1/4.
    np.testing.assert_allclose(model(concentration=2.0).exact_match(1.0, 2), 1 / 3, rtol=1e-9)


def test_the_probability_that_a_share_of_targets_is_recalled_matches_hand_worked_values() -> None:
    # Two targets of one token, each right with probability 1/2: both with 1/4, at least one with 3/4.
    np.testing.assert_allclose(model().recall_probability(1.0, 1, pairs=2), 0.25, rtol=1e-6)
    np.testing.assert_allclose(model().recall_probability(1.0, 1, pairs=2, share=0.5), 0.75, rtol=1e-6)
    # 0.07 * 100 is slightly more than 7 in floats, but requires 7 targets.
    probability = model().recall_probability(1.0, 5, pairs=100, share=0.07)
    np.testing.assert_allclose(probability, binom.sf(6, 100, model().exact_match(1.0, 5)), rtol=1e-9)


def test_a_fit_recovers_the_model_that_the_runs_were_drawn_from() -> None:
    fitted = fit_recall(runs_of(1.5, 2.0, 30.0))
    assert fitted is not None
    # 20 other seeds stay within these ranges too, which reflect the precision of 1,800 targets.
    assert fitted.half_loss == pytest.approx(1.5, rel=0.1)
    assert fitted.steepness == pytest.approx(2.0, rel=0.1)
    assert fitted.concentration == pytest.approx(30.0, rel=0.5)
    assert fitted.brier < 0.6 * fitted.brier_reference
    assert (fitted.runs, fitted.targets, fitted.tokens) == (30, 1800, 14400)
    assert sum(row.targets for row in fitted.reliability) == 1800
    for row in fitted.reliability:
        spread = (row.predicted * (1 - row.predicted) / row.targets) ** 0.5
        assert abs(row.observed - row.predicted) < 4 * spread + 0.01


@pytest.mark.parametrize("theta", [(0.0, 0.7, 3.0), (0.8, 0.1, 1.0), (-1.0, 1.5, 6.0)])
@pytest.mark.parametrize("left_out", [(), (2,), (0, 5)])
def test_the_likelihood_and_its_gradient_match_those_computed_target_by_target(
    theta: tuple[float, ...], left_out: tuple[int, ...]
) -> None:
    runs, at, start = runs_of_all_lengths(), np.array(theta), np.zeros(3)
    kept = [i for i in range(len(runs)) if i not in left_out]
    likelihood, weights = _Likelihood.of(runs), np.isin(np.arange(len(runs)), kept).astype(float)
    value, gradient = likelihood.penalised(at, weights)
    others = [runs[i] for i in kept]
    # The plain likelihood includes binomial coefficients, which do not depend on the parameters.
    change = plain_likelihood(at, others) - plain_likelihood(start, others)
    assert value - likelihood.penalised(start, weights)[0] == pytest.approx(change, rel=1e-9)
    # Forward differences are accurate to about the square root of the precision of a likelihood of hundreds.
    np.testing.assert_allclose(gradient, approx_fprime(at, plain_likelihood, 1e-6, others), rtol=1e-3, atol=1e-3)


def test_the_gradient_matches_finite_differences_where_shares_are_almost_0_or_1() -> None:
    # A steepness of e^4 puts the share of a loss of 0.05 or 6 within 1e-12 of 0 or 1.
    likelihood, weights, at = _Likelihood.of(runs_of_all_lengths()), np.ones(6), np.array([0.1, 4.0, 3.0])
    expected = approx_fprime(at, lambda theta: likelihood.penalised(theta, weights)[0], 1e-6)
    np.testing.assert_allclose(likelihood.penalised(at, weights)[1], expected, rtol=1e-3, atol=1e-3)


def test_cross_validated_errors_match_those_of_plain_fits_that_leave_out_one_run() -> None:
    runs = runs_of_all_lengths()
    fitted, whole = fit_recall(runs), plain_fit(runs)
    assert fitted is not None
    for name in ("half_loss", "steepness", "concentration"):
        assert getattr(fitted, name) == pytest.approx(getattr(whole, name), rel=1e-4)
    accuracy, exact, squared, reference = [], [], [], []
    for i, run in enumerate(runs):
        others = [*runs[:i], *runs[i + 1 :]]
        held, is_right = plain_fit(others), run.right == run.tokens
        predicted = held.exact_match(run.mean_loss, run.tokens)
        accuracy.append(abs(float(held.token_accuracy(run.mean_loss)) - run.right.sum() / run.tokens.sum()))
        exact.append(abs(predicted.mean() - is_right.mean()))
        squared.extend((predicted - is_right) ** 2)
        reference.extend((np.concatenate([o.right == o.tokens for o in others]).mean() - is_right) ** 2)
    assert fitted.token_accuracy_error == pytest.approx(np.mean(accuracy), rel=1e-4)
    assert fitted.exact_match_error == pytest.approx(np.mean(exact), rel=1e-4)
    assert fitted.brier == pytest.approx(np.mean(squared), rel=1e-4)
    assert fitted.brier_reference == pytest.approx(np.mean(reference), rel=1e-9)


def test_the_maximum_likelihood_without_one_run_is_found_for_many_targets() -> None:
    runs = [RunTokens(run.mean_loss, np.tile(run.tokens, 200), np.tile(run.right, 200)) for run in runs_of(1.5, 2, 30)]
    likelihood = _Likelihood.of(runs)
    theta = likelihood.most_likely(np.log([1.0, 2.0, 20.0]))
    for i in range(len(runs)):
        kept = np.arange(len(runs)) != i
        _, gradient = likelihood.penalised(likelihood.most_likely(theta, kept), kept.astype(float))
        # The gradient starts at up to a thousand; a search with the usual tolerance would leave up to 30.
        assert np.abs(gradient).max() < 1


def test_runs_of_one_fold_are_left_out_together_if_there_are_more_runs_than_folds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pml.recall_model.MOST_FOLDS", 4)
    runs = runs_of_all_lengths()
    fitted = fit_recall(runs)
    assert fitted is not None
    errors, reference = [], []
    for i, run in enumerate(runs):
        # Runs 0 and 4 go together, and 1 and 5.
        others = [other for j, other in enumerate(runs) if j % 4 != i % 4]
        errors.append(abs(float(plain_fit(others).token_accuracy(run.mean_loss)) - run.right.sum() / run.tokens.sum()))
        exact = np.concatenate([other.right == other.tokens for other in others])
        reference.extend((exact.mean() - (run.right == run.tokens)) ** 2)
    assert fitted.token_accuracy_error == pytest.approx(np.mean(errors), rel=1e-4)
    assert fitted.brier_reference == pytest.approx(np.mean(reference), rel=1e-9)


def test_too_few_or_uninformative_runs_give_no_model() -> None:
    runs = runs_of(1.5, 2.0, 30.0)
    perfect = [RunTokens(0.1, run.tokens, run.tokens) for run in runs]
    assert fit_recall(runs[:3]) is None
    assert fit_recall([*perfect, runs[-1]]) is None


def test_tokens_are_counted_by_example() -> None:
    results = TokenResults(
        np.array([4, 4, 4, 9]),
        np.array([0, 1, 2, 0]),
        np.array([0.5, 1.0, 0.3, 0.2]),
        np.array([True, False, True, True]),
    )
    counted = run_tokens(results)
    assert counted.mean_loss == pytest.approx(0.5)
    assert (counted.tokens.tolist(), counted.right.tolist()) == ([3, 1], [2, 1])
