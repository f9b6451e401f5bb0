"""From loss to recall: hand-worked values, and what a fit gets back from runs of a known model."""

import numpy as np
import pytest

from pml.calibration import RecallModel, RunTokens, fit_recall, run_tokens
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


def test_token_accuracy_by_hand() -> None:
    # 1 / (1 + (2 / 1)^2)
    np.testing.assert_allclose(model().token_accuracy([0.0, 1.0, 2.0]), [1.0, 0.5, 0.2], rtol=1e-9)


def test_independent_tokens_are_all_right_with_the_product_of_their_chances() -> None:
    # q = 1 / (1 + 0.5^2) = 0.8, and 0.8^3; the concentration of 10^6 changes that by n^2 / c.
    np.testing.assert_allclose(model().exact_match(0.5, 3), 0.512, rtol=1e-5)


def test_tokens_that_fail_together_make_whole_targets_likelier() -> None:
    # Beta(1, 1) has E[p^2] = 1/3, where independent tokens have 1/4.
    np.testing.assert_allclose(model(concentration=2.0).exact_match(1.0, 2), 1 / 3, rtol=1e-9)


def test_the_probability_that_a_share_of_targets_is_right_by_hand() -> None:
    # One token a target, half of them right: of two, both with 1/4, at least one with 3/4.
    np.testing.assert_allclose(model().recall_probability(1.0, 1, pairs=2), 0.25, rtol=1e-6)
    np.testing.assert_allclose(model().recall_probability(1.0, 1, pairs=2, share=0.5), 0.75, rtol=1e-6)


def test_a_fit_gets_back_the_model_that_runs_were_drawn_from() -> None:
    fitted = fit_recall(runs_of(1.5, 2.0, 30.0))
    assert fitted is not None
    # Ranges that 20 other seeds stay in: 1,800 targets say this much.
    assert fitted.half_loss == pytest.approx(1.5, rel=0.1)
    assert fitted.steepness == pytest.approx(2.0, rel=0.1)
    assert fitted.concentration == pytest.approx(30.0, rel=0.5)
    assert fitted.brier < 0.6 * fitted.brier_reference
    assert (fitted.runs, fitted.targets, fitted.tokens) == (30, 1800, 14400)
    assert sum(row.targets for row in fitted.reliability) == 1800
    for row in fitted.reliability:
        spread = (row.predicted * (1 - row.predicted) / row.targets) ** 0.5
        assert abs(row.observed - row.predicted) < 4 * spread + 0.01


def test_runs_that_cannot_tell_give_no_model() -> None:
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
