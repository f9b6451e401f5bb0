"""From loss to recall: how many target tokens, and how many whole targets, are right at a given mean loss.

Recall depends on each token (p > 0.5 makes a token certain), which the mean does not show: the same mean loss may come
from a few stubborn tokens or from many doubtful ones. How losses spread around their mean depends on the backbone and
the kind of text, so the model is fitted to the per-token results of runs. It has three parameters:

    q(L) = 1 / (1 + (L / L_half)^k)                       share of target tokens right at mean loss L
    right tokens of a target of n ~ BetaBinomial(n, q c, (1 - q) c)

L_half is the mean loss at which half of the tokens are right, k the steepness, and the concentration c says how
independent the tokens of one target are. For large c they are independent, and a target is right with probability q^n.
For small c errors concentrate in few targets, and more whole targets are right at the same token accuracy.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydantic
from scipy.optimize import minimize
from scipy.special import betaln, digamma, expit
from scipy.stats import binned_statistic, binom

from pml.content import Content
from pml.errors import InputError
from pml.token_results import TOKENS_NAME, TokenResults, read_tokens

__all__ = ["RecallModel", "ReliabilityBin", "RunTokens", "fit_recall", "fit_recall_from_folders", "run_tokens"]

Array = npt.NDArray[np.float64]

FEWEST_RUNS = 4
# Most refits, each without some of the runs. One per run would take minutes for a few thousand runs.
MOST_FOLDS = 200
# Bins of the reliability table by predicted probability. Nine in ten targets tend to lie in the outer two.
BIN_EDGES = (0.0, 0.05, 0.2, 0.4, 0.6, 0.8, 0.95, 1.0)
# Losses from float32 logits are not more exact than this; it keeps ln L finite.
SMALLEST_LOSS = 1e-6
# Shares stay this far from 0 and 1, where the likelihood has no logarithm.
SMALLEST_SHARE = 1e-12
# Weak normal priors on ln k and ln c, as (mean, standard deviation), keep finite what the runs do not determine.
STEEPNESS_PRIOR = (math.log(2.0), 1.0)
CONCENTRATION_PRIOR = (math.log(20.0), 2.0)


@dataclass(frozen=True)
class RunTokens:
    """The per-token results of one run, counted by example.

    Attributes:
        mean_loss: Mean target loss in nats per target token.
        tokens: Target tokens of each example, `(examples,)`.
        right: Number of them with the right argmax, `(examples,)`.
    """

    mean_loss: float
    tokens: npt.NDArray[np.int64]
    right: npt.NDArray[np.int64]


class ReliabilityBin(Content):
    """Targets whose probability of being right, predicted from the other runs, lies in one range.

    Attributes:
        low: Lower end of the range.
        high: Upper end.
        targets: Number of targets.
        predicted: Mean of the predicted probabilities.
        observed: Share of the targets that were right.
    """

    low: float
    high: float
    targets: int
    predicted: float
    observed: float


class RecallModel(Content):
    """Token accuracy and exact match as functions of the mean loss; the module docstring describes the model.

    Attributes:
        half_loss: Mean loss in nats at which half of the target tokens are right, L_half.
        steepness: How steeply the token accuracy changes with the loss, k.
        concentration: How independent the tokens of one target are, c.
        runs: Number of runs that it was fitted to.
        targets: Number of targets in these runs.
        tokens: Number of target tokens in these runs.
        loss_range: Smallest and largest mean loss of these runs, in nats per target token.
        tokens_per_target_range: Length of the shortest and the longest target.
        token_accuracy_error: Mean absolute error of a run's token accuracy, as a share, predicted from the others.
        exact_match_error: The same for its exact match.
        brier: Mean squared error of the predicted probability that a target is right, predicted from the other runs.
        brier_reference: The same if every target is predicted with the other runs' share of exact targets. A useful
            model has a smaller `brier`.
        reliability: Predicted against observed exact match.
    """

    half_loss: float = pydantic.Field(gt=0)
    steepness: float = pydantic.Field(gt=0)
    concentration: float = pydantic.Field(gt=0)
    runs: int
    targets: int
    tokens: int
    loss_range: tuple[float, float]
    tokens_per_target_range: tuple[int, int]
    token_accuracy_error: float
    exact_match_error: float
    brier: float
    brier_reference: float
    reliability: list[ReliabilityBin]

    def token_accuracy(self, loss: npt.ArrayLike) -> Array:
        """Expected share of target tokens that are right at a mean loss in nats, in the shape of `loss`.

        Example:
            >>> model = RecallModel.model_construct(half_loss=2.0, steepness=1.0, concentration=5.0)
            >>> model.token_accuracy([0.0, 2.0, 6.0]).round(6).tolist()
            [1.0, 0.5, 0.25]
        """
        return np.asarray(_accuracy(self._theta, np.asarray(loss, dtype=np.float64)))

    def exact_match(self, loss: npt.ArrayLike, tokens_per_target: npt.ArrayLike) -> Array:
        """Probability that a target of this many tokens is right, which is also the expected share of right targets.

        The loss is the mean over the corpus in nats per target token. The arguments broadcast.
        """
        return np.exp(_log_all_right(self._theta, np.asarray(loss, dtype=np.float64), np.asarray(tokens_per_target)))

    def recall_probability(
        self, loss: npt.ArrayLike, tokens_per_target: npt.ArrayLike, pairs: int, share: float = 1.0
    ) -> Array:
        """Probability that at least a share of the targets is right, with independent targets given the loss.

        Args:
            loss: Mean loss in nats per target token over the corpus.
            tokens_per_target: Tokens of each target.
            pairs: Targets in the corpus.
            share: The share; 1 for all targets.
        """
        # The margin keeps 0.7 * 10 at 7 targets whatever its rounding.
        needed = math.ceil(share * pairs - 1e-9)
        return np.asarray(binom.sf(needed - 1, pairs, self.exact_match(loss, tokens_per_target)))

    @property
    def _theta(self) -> Array:
        return np.log([self.half_loss, self.steepness, self.concentration])


def run_tokens(results: TokenResults) -> RunTokens:
    """Count the per-token results of a run by example."""
    _, example = np.unique(results.example_id, return_inverse=True)
    right = np.bincount(example, weights=results.correct)
    return RunTokens(float(results.loss.mean()), np.bincount(example), right.astype(np.int64))


def fit_recall_from_folders(folders: Iterable[Path]) -> tuple[RecallModel | None, list[str]]:
    """Fit the recall model to the runs in these folders with `fit_recall`; return it with warnings.

    Runs without per-token results are skipped. Damaged results are skipped with a warning that names the file.
    """
    runs, warnings = [], []
    for folder in folders:
        if (folder / TOKENS_NAME).is_file():
            try:
                runs.append(run_tokens(read_tokens(folder)))
            except InputError as error:
                warnings.append(f"the recall model leaves out a run: {error}")
    return fit_recall(runs), warnings


def fit_recall(runs: Sequence[RunTokens]) -> RecallModel | None:
    """Fit the recall model by maximum likelihood with a weak prior, and measure its calibration.

    Every error is out of sample: each run is predicted from the others, or by 200-fold cross-validation with more than
    200 runs.

    Args:
        runs: Runs of one backbone and one kind of text.

    Returns:
        The model, or None with fewer than 4 runs or fewer than 2 with a wrong token.
    """
    if len(runs) < FEWEST_RUNS or sum(bool((run.right < run.tokens).any()) for run in runs) < 2:
        return None
    likelihood = _Likelihood.of(runs)
    theta = likelihood.most_likely(np.log([1.0, 2.0, 20.0]))
    fold = np.arange(len(runs)) % MOST_FOLDS
    of_others = [likelihood.most_likely(theta, kept=fold != i) for i in range(fold.max() + 1)]
    without = [of_others[i] for i in fold]
    accuracy = [
        abs(float(_accuracy(held, np.array(run.mean_loss))) - run.right.sum() / run.tokens.sum())
        for held, run in zip(without, runs, strict=True)
    ]
    predicted = [
        np.exp(_log_all_right(held, np.array(run.mean_loss), run.tokens))
        for held, run in zip(without, runs, strict=True)
    ]
    observed = [run.right == run.tokens for run in runs]
    exact = [abs(float(p.mean() - o.mean())) for p, o in zip(predicted, observed, strict=True)]
    p, o = np.concatenate(predicted), np.concatenate(observed)
    targets = np.array([len(x) for x in observed])
    exact_of_others = o.sum() - np.bincount(fold, [x.sum() for x in observed])
    share_of_others = exact_of_others / (len(o) - np.bincount(fold, targets))
    tokens = np.concatenate([run.tokens for run in runs])
    losses = [run.mean_loss for run in runs]
    half, steepness, concentration = np.exp(theta).tolist()
    return RecallModel(
        half_loss=half,
        steepness=steepness,
        concentration=concentration,
        runs=len(runs),
        targets=len(o),
        tokens=int(tokens.sum()),
        loss_range=(min(losses), max(losses)),
        tokens_per_target_range=(int(tokens.min()), int(tokens.max())),
        token_accuracy_error=float(np.mean(accuracy)),
        exact_match_error=float(np.mean(exact)),
        brier=float(np.mean((p - o) ** 2)),
        brier_reference=float(np.mean((np.repeat(share_of_others[fold], targets) - o) ** 2)),
        reliability=_reliability(p, o),
    )


def _accuracy(theta: Array, loss: Array) -> Array:
    """q(L) from (ln L_half, ln k, ln c)."""
    return np.asarray(expit(-np.exp(theta[1]) * (np.log(np.maximum(loss, SMALLEST_LOSS)) - theta[0])))


def _log_all_right(theta: Array, loss: Array, tokens: npt.NDArray[Any]) -> Array:
    """Log probability that all n tokens are right; n may be fractional, which scipy's betabinom refuses."""
    share = np.clip(_accuracy(theta, loss), SMALLEST_SHARE, 1 - SMALLEST_SHARE)
    concentration = np.exp(theta[2])
    right, wrong = share * concentration, (1.0 - share) * concentration
    # Where the concentration is large, rounding may give slightly more than 0.
    return np.minimum(betaln(right + tokens, wrong) - betaln(right, wrong), 0.0)


@dataclass(frozen=True)
class _Likelihood:
    """The penalised likelihood of runs, any of which can be left out.

    Targets of one run with the same number of tokens and of right tokens are of one kind and counted together.

    Attributes:
        loss: Mean loss of each run in nats per target token, `(runs,)`.
        run: Index of the run of each kind, `(kinds,)`.
        right: Right tokens of a target of each kind, `(kinds,)`.
        tokens: Tokens of a target of each kind, `(kinds,)`.
        times: Number of targets of each kind, `(kinds,)`.
    """

    loss: Array
    run: npt.NDArray[np.int64]
    right: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    times: npt.NDArray[np.int64]

    @classmethod
    def of(cls, runs: Sequence[RunTokens]) -> "_Likelihood":
        found = [np.unique([run.right, run.tokens], axis=1, return_counts=True) for run in runs]
        run = np.repeat(np.arange(len(runs)), [len(times) for _, times in found])
        kinds = np.concatenate([kinds for kinds, _ in found], axis=1)
        times = np.concatenate([times for _, times in found])
        return cls(np.array([run.mean_loss for run in runs]), run, kinds[0], kinds[1], times)

    def most_likely(self, start: Array, kept: npt.NDArray[np.bool_] | None = None) -> Array:
        """(ln L_half, ln k, ln c) at the maximum over all runs, or over those kept by the mask, `(runs,)`."""
        weights = np.ones_like(self.loss) if kept is None else kept.astype(np.float64)
        bounds = [(-7.0, 7.0), (-3.0, 4.0), (-3.0, 12.0)]
        # Leaving out one run of many moves the maximum so little that the default 2e-9 would stop at the start.
        options = {"ftol": 1e-13}
        found = minimize(self.penalised, start, (weights,), "L-BFGS-B", jac=True, bounds=bounds, options=options)
        return np.asarray(found.x)

    def penalised(self, theta: Array, weights: Array) -> tuple[float, Array]:
        """Negative log of likelihood times prior, up to a constant, and its gradient.

        Args:
            theta: (ln L_half, ln k, ln c).
            weights: One weight per run; 0 leaves the run out.
        """
        c, loss, times = np.exp(theta[2]), self.loss[self.run], weights[self.run] * self.times
        accuracy = _accuracy(theta, loss)
        share = np.clip(accuracy, SMALLEST_SHARE, 1 - SMALLEST_SHARE)
        a, b, wrong = share * c, (1 - share) * c, self.tokens - self.right
        value = -float(times @ (betaln(a + self.right, b + wrong) - betaln(a, b)))
        by_both = digamma(c + self.tokens) - digamma(c)
        by_a, by_b = digamma(a + self.right) - digamma(a) - by_both, digamma(b + wrong) - digamma(b) - by_both
        # A clipped share does not change with theta.
        by_logit = np.where(share == accuracy, share * (1 - share), 0.0) * c * (by_a - by_b) * np.exp(theta[1])
        distance = np.log(np.maximum(loss, SMALLEST_LOSS)) - theta[0]
        gradient = -np.array([by_logit, -distance * by_logit, a * by_a + b * by_b]) @ times
        for i, (mean, spread) in ((1, STEEPNESS_PRIOR), (2, CONCENTRATION_PRIOR)):
            value += ((theta[i] - mean) / spread) ** 2 / 2
            gradient[i] += (theta[i] - mean) / spread**2
        return value, gradient


def _reliability(predicted: Array, observed: npt.NDArray[np.bool_]) -> list[ReliabilityBin]:
    """The reliability bins that hold at least one target."""
    numbers = np.histogram(predicted, BIN_EDGES)[0].tolist()
    means = binned_statistic(predicted, [predicted, observed], bins=BIN_EDGES).statistic.tolist()
    return [
        ReliabilityBin(low=low, high=high, targets=number, predicted=mean, observed=share)
        for (low, high), number, mean, share in zip(pairwise(BIN_EDGES), numbers, *means, strict=True)
        if number
    ]
