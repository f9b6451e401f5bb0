"""Token weights, which share the training budget among target tokens by how well each one is known.

The loss of a global batch is sum(w L) / sum(w) (Eq. 8); weights are detached. A weighting maps the token losses of a
micro-batch to weights. The module normalises them, because only the module sees the global batch.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from pml.errors import InputError
from pml.ranks import several_ranks
from pml.token_scores import TokenScores, critical_loss

__all__ = [
    "ExpectedRecall",
    "FallingThreshold",
    "OnlyThreshold",
    "SlidingWindow",
    "Uniform",
    "Weighting",
    "WholeTargets",
    "expected_recall_slope",
    "geometric",
    "weighted_mean",
    "within_reach",
]


def weighted_mean(losses: Tensor, weights: Tensor) -> Tensor:
    """sum(w L) / sum(w) in nats (Eq. 8); if all weights are 0, a zero that stays connected to the graph."""
    total = weights.sum()
    return (weights * losses).sum() / total.where(total > 0, torch.ones_like(total))


def geometric(start: float, end: float, progress: float) -> float:
    """Geometric interpolation start^(1 - progress) end^progress, from `start` at 0 to `end` at 1."""
    return start ** (1 - progress) * end**progress


def expected_recall_slope(losses: Tensor, temperature: float, threshold: float = 0.5) -> Tensor:
    """4 s (1 - s) with s = sigmoid((L_crit - L) / T), which is 1 at the threshold.

    If s is the probability that a token ends above threshold, this is proportional to the gain in the expected number
    of tokens above threshold per nat of lower loss.

    Args:
        losses: Token losses in nats, any shape.
        temperature: T in nats; a large T treats all tokens alike, a small one ignores tokens far from L_crit.
        threshold: Probability whose loss is L_crit.
    """
    s = torch.sigmoid((critical_loss(threshold) - losses) / temperature)
    return 4 * s * (1 - s)


def within_reach(losses: Tensor, mask: Tensor, temperature: float, floor: float, threshold: float = 0.5) -> Tensor:
    """floor + (1 - floor) exp(-D / T) for each target; D sums max(0, L - L_crit) over its tokens.

    Args:
        losses: Token losses (B, L) in nats.
        mask: (B, L), True where there is a target token.
        temperature: T in nats.
        floor: Value for a target out of reach. At 0 nothing would train on it, and its loss could grow without bound.
        threshold: Probability whose loss is L_crit.

    Returns:
        (B, 1), 1 for a target whose tokens are all above threshold.
    """
    shortfall = ((losses - critical_loss(threshold)).clamp(min=0) * mask).sum(dim=1, keepdim=True)
    return floor + (1 - floor) * torch.exp(-shortfall / temperature)


class Weighting:
    """A rule that gives every target token a weight.

    Attributes:
        scheduled: Whether the weights depend on `progress`; the run then needs an end.
        progress: Fraction of the run's optimiser steps taken, from 0 to 1. The module sets it before each step, the
            same for all micro-batches and ranks. It follows from the step, so checkpoints need not hold it.
        when_memorized: What to do when no token of the global batch has weight: `skip` takes no step, `uniform` falls
            back to the plain mean.
        gradient_above: Loss in nats up to which every token has weight 0, so its gradient need not be computed; None
            if any token may have weight.
    """

    when_memorized: Literal["skip", "uniform"] = "skip"
    scheduled = False
    progress = 0.0

    @property
    def gradient_above(self) -> float | None:
        return None

    def weights(self, scores: TokenScores) -> Tensor:
        """Detached weights (B, L), 0 where there is no token."""
        raise NotImplementedError

    def prepare(self, examples: int, device: torch.device) -> None:
        """Prepare for a corpus of `examples` examples; called before training."""

    def state_dict(self) -> dict[str, Any]:
        """State that a checkpoint must hold for training to resume exactly."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


@dataclass
class Uniform(Weighting):
    """Every token has weight 1: the plain mean loss (SFT)."""

    def weights(self, scores: TokenScores) -> Tensor:
        return scores.mask.to(scores.losses.dtype)


@dataclass
class OnlyThreshold(Weighting):
    """OT: weight 1 for tokens with p < threshold, 0 for the others (Eq. 9).

    Args:
        threshold: Probability above which a token counts as memorised.
        position_decay: lambda of the position weight exp(-lambda * rank / (n - 1)) over the n tokens of an example
            that are below threshold, so that earlier ones are learnt first. The published value is 2; None disables it.
        when_memorized: What to do when no token of the global batch is below threshold: `skip` takes no step,
            `uniform` trains on the plain mean.
    """

    threshold: float = 0.5
    position_decay: float | None = None
    when_memorized: Literal["skip", "uniform"] = "skip"

    def __post_init__(self) -> None:
        self._critical = critical_loss(self.threshold)
        if self.position_decay is not None:
            _positive(self, "position_decay")

    @property
    def gradient_above(self) -> float | None:
        return self._critical if self.when_memorized == "skip" else None

    def weights(self, scores: TokenScores) -> Tensor:
        active = (scores.losses.detach() > self._critical) & scores.mask
        weights = active.to(scores.losses.dtype)
        if self.position_decay is not None:
            # An integer cumsum: that of floats is not deterministic on a GPU, and refused in deterministic mode.
            rank = active.cumsum(dim=1).to(weights.dtype) - 1
            last = (weights.sum(dim=1, keepdim=True) - 1).clamp(min=1)
            weights = weights * torch.exp(-self.position_decay * rank / last)
        return weights


@dataclass
class FallingThreshold(Weighting):
    """Weight 1 for tokens with L > L_crit(progress), 0 for the others; the threshold falls over the run.

    Aim: to make every token certain in the fewest steps if the corpus fits the adapter, and to reach a lower loss than
    `OnlyThreshold` if it does not. Training starts close to plain SFT and ends on the tokens that are not certain by a
    margin. L_crit rises geometrically from -ln(start) to -ln(end).

    Args:
        start: Probability above which a token gets no weight at the start of the run.
        end: The same at the end of the run. Above 0.5, so that tokens do not stop at the edge of certainty.
    """

    start: float = 0.999
    end: float = 0.6
    when_memorized: Literal["skip", "uniform"] = "skip"
    scheduled = True

    def __post_init__(self) -> None:
        if not critical_loss(self.start) <= critical_loss(self.end):
            raise InputError(
                f"{type(self).__name__}: the threshold rises from {self.start} to {self.end}; expected one that falls, "
                "such as start 0.999 and end 0.6"
            )

    @property
    def critical(self) -> float:
        """L_crit at the current progress: loss in nats up to which a token has no weight."""
        return geometric(critical_loss(self.start), critical_loss(self.end), self.progress)

    @property
    def gradient_above(self) -> float | None:
        return self.critical if self.when_memorized == "skip" else None

    def weights(self, scores: TokenScores) -> Tensor:
        active = (scores.losses.detach() > self.critical) & scores.mask
        return active.to(scores.losses.dtype)


@dataclass
class ExpectedRecall(FallingThreshold):
    """`FallingThreshold`, with `expected_recall_slope` as the weight of tokens that are already right.

    Aim: to make as many tokens certain as possible without making others wrong. A right token takes less capacity than
    a certain one. So a token that is not right by `margin` has full weight; among right tokens, the slope favours those
    with a probability near 0.5. Its temperature falls over the run: the weight of a right token far from certain falls
    to the floor, and returns to 1 when its lead drops below the margin.

    Args:
        start: As in `FallingThreshold`; the default is lower, which leaves more of the budget to uncertain tokens.
        temperature_start: Temperature of the slope in nats at the start of the run.
        temperature_end: The same at the end of the run; it falls geometrically.
        floor: Least weight of a right token below the threshold.
        margin: Logit margin by which the target token has to win to count as right.
    """

    start: float = 0.8
    temperature_start: float = 2.0
    temperature_end: float = 0.5
    floor: float = 0.1
    margin: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "temperature_start", "temperature_end")
        _share(self, "floor")

    def weights(self, scores: TokenScores) -> Tensor:
        assert scores.margin is not None
        temperature = geometric(self.temperature_start, self.temperature_end, self.progress)
        slope = expected_recall_slope(scores.losses.detach(), temperature).clamp(min=self.floor)
        return super().weights(scores) * slope.where(scores.margin >= self.margin, torch.ones_like(slope))


@dataclass
class WholeTargets(ExpectedRecall):
    """`ExpectedRecall`, with more weight for targets that are nearly certain as a whole: `within_reach`.

    Aim: to make as many whole targets certain as possible when the adapter cannot hold all of them. The temperature of
    `within_reach` falls over the run. With a single target in the global batch, it is the same as `ExpectedRecall`,
    unless `last_share` is set.

    Targets that are given up have wrong tokens in the end. `last_share` returns to them: for this last part of the run,
    the weights are those of `OnlyThreshold`. More single tokens then end right and fewer certain.

    Args:
        reach_start: Temperature of `within_reach` in nats at the start of the run: this shortfall cuts a target's
            weight, above the floor, to 1/e.
        reach_end: The same at the end of the run; it falls geometrically.
        reach_floor: Share of its weight that a target out of reach keeps.
        last_share: Share of the run, at its end, in which every token with p < 0.5 has weight 1, and no other any.
    """

    reach_start: float = 32.0
    reach_end: float = 4.0
    reach_floor: float = 0.1
    last_share: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "reach_start", "reach_end")
        _share(self, "reach_floor")
        if not 0 <= self.last_share < 1:
            raise InputError(
                f"WholeTargets: last_share is {self.last_share}; expected a share from 0 to below 1, such as 0.1"
            )

    @property
    def critical(self) -> float:
        return critical_loss(0.5) if self._in_last_share else super().critical

    @property
    def _in_last_share(self) -> bool:
        return self.last_share > 0 and self.progress >= 1 - self.last_share

    def weights(self, scores: TokenScores) -> Tensor:
        if self._in_last_share:
            return FallingThreshold.weights(self, scores)
        temperature = geometric(self.reach_start, self.reach_end, self.progress)
        reach = within_reach(scores.losses.detach(), scores.mask, temperature, self.reach_floor)
        return super().weights(scores) * reach


@dataclass
class SlidingWindow(Weighting):
    """SW: a soft threshold times a window that follows the first wrong token of each example (Eq. 10).

    w_t = sigmoid(scale (L_t - L_crit)) m_t with m_t = exp(-max(0, t - a) / tau) while t < a + window * growth, else
    `floor`. The anchor a is the first position whose argmax is wrong; m_t = 1 if there is none. An example's window
    grows while its anchor stays in place, and falls back when the anchor moves. Each anchor and the number of steps it
    has stayed are kept per example id and shared by all ranks.

    Args:
        threshold: Probability above which a token counts as memorised.
        scale: Steepness of the soft threshold, per nat.
        window: Length of the window in tokens, from the anchor on.
        tau: Tokens after the anchor over which the weight falls to 1/e.
        floor: Factor for tokens beyond the window.
        patience: Further steps that an anchor has to stay before its window grows.
        growth: Increase of the window's factor at each step from then on.
        max_growth: Largest factor.
        when_memorized: What to do when no token of the global batch has weight; only a steep `scale` leaves none.
    """

    threshold: float = 0.5
    scale: float = 10.0
    window: int = 50
    tau: float = 20.0
    floor: float = 0.01
    patience: int = 3
    growth: float = 0.5
    max_growth: float = 4.0
    when_memorized: Literal["skip", "uniform"] = "skip"

    def __post_init__(self) -> None:
        self._critical = critical_loss(self.threshold)
        _positive(self, "scale", "window", "tau", "max_growth")
        _share(self, "floor")
        self._anchor = torch.empty(0, dtype=torch.long)
        self._stuck = torch.empty(0, dtype=torch.long)
        self._restored = False

    def prepare(self, examples: int, device: torch.device) -> None:
        # Windows of an earlier fit say nothing about this one; those of a checkpoint are its own.
        if not self._restored or len(self._anchor) != examples:
            # -2: not seen yet, so the first anchor always counts as moved; -1: seen without any error.
            self._anchor = torch.full((examples,), -2, dtype=torch.long)
            self._stuck = torch.zeros(examples, dtype=torch.long)
        self._anchor, self._stuck = self._anchor.to(device), self._stuck.to(device)
        self._restored = False

    def weights(self, scores: TokenScores) -> Tensor:
        if len(self._anchor) == 0:
            raise InputError("SlidingWindow keeps a window for each example; give Trainer.fit a datamodule of pml")
        anchor = self.anchors(scores)
        factor = self._advance(scores.example_id, anchor)
        position = torch.arange(scores.losses.shape[1], device=scores.losses.device)
        behind = (position - anchor[:, None]).clamp(min=0).to(scores.losses.dtype)
        inside = position < anchor[:, None] + (self.window * factor)[:, None]
        window = torch.exp(-behind / self.tau).where(inside, torch.full_like(behind, self.floor))
        window = window.where(anchor[:, None] >= 0, torch.ones_like(window))
        soft = torch.sigmoid(self.scale * (scores.losses.detach() - self._critical))
        return soft * window * scores.mask

    @staticmethod
    def anchors(scores: TokenScores) -> Tensor:
        """First position whose argmax is wrong (B,); -1 if every target token is right."""
        wrong = scores.mask & ~scores.correct
        return torch.where(wrong.any(dim=1), wrong.to(torch.int8).argmax(dim=1), -1)

    def growth_factor(self, stuck: Tensor) -> Tensor:
        """Factor of the window after the anchor has stayed for `stuck` further steps."""
        return (1 + self.growth * (stuck - self.patience + 1).clamp(min=0)).clamp(max=self.max_growth)

    def _advance(self, example_id: Tensor, anchor: Tensor) -> Tensor:
        """Record the current anchors; returns the window factor (B,) of each row."""
        rows = example_id >= 0
        seen = example_id.clamp(min=0)
        stuck = torch.where(self._anchor[seen] == anchor, self._stuck[seen] + 1, 0)
        # Padding examples write to an extra slot: filtering them out would make the host wait for the device.
        places = torch.where(rows, example_id, len(self._anchor))
        # Shuffling may give an example to another rank next time, so every rank needs every update.
        news = torch.full((2, len(self._anchor) + 1), -3, dtype=torch.long, device=self._anchor.device)
        news[:, places] = torch.stack([anchor, stuck])
        news = news[:, :-1].contiguous()
        if several_ranks():
            dist.all_reduce(news, op=dist.ReduceOp.MAX)
        moved = news[1] >= 0
        self._anchor = torch.where(moved, news[0], self._anchor)
        self._stuck = torch.where(moved, news[1], self._stuck)
        return torch.where(rows, self.growth_factor(stuck).float(), 1.0)

    def state_dict(self) -> dict[str, Any]:
        return {"anchor": self._anchor.cpu(), "stuck": self._stuck.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._anchor, self._stuck = state["anchor"].clone(), state["stuck"].clone()
        self._restored = True


def _positive(weighting: Weighting, *names: str) -> None:
    for name in names:
        if not (value := getattr(weighting, name)) > 0:
            raise InputError(f"{type(weighting).__name__}: {name} is {value}; expected a number above 0")


def _share(weighting: Weighting, name: str) -> None:
    value = getattr(weighting, name)
    if not 0 < value <= 1:
        raise InputError(
            f"{type(weighting).__name__}: {name} is {value}; expected a share above 0 and at most 1, such as 0.1"
        )
