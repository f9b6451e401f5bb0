"""LightningModules that write a corpus into an adapter: `SFT` with the plain loss, `MemFT` with a weighted one."""

from typing import Any

from torch.optim import Optimizer

from pml.curriculum import PrefixRatio
from pml.errors import InputError
from pml.memorization import Memorization
from pml.optimizer import trained_by
from pml.plain import from_plain
from pml.weighting import Weighting, WholeTargets

__all__ = ["SFT", "MemFT", "Memorization"]


class SFT(Memorization):
    """Supervised fine-tuning: every target token has the same weight."""

    method = "sft"


class MemFT(Memorization):
    """MemFT: spend the training budget on target tokens that are not memorised yet (Eq. 8-10).

    Args:
        weighting: How the budget is shared among tokens; None takes `WholeTargets`. The paper uses `OnlyThreshold`.
        curriculum: How it is shared among examples, epoch by epoch; None trains on all examples from the start.
        **kwargs: See `Memorization`.
    """

    method = "memft"

    def __init__(
        self,
        weighting: Weighting | None = None,
        curriculum: PrefixRatio | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.weighting = from_plain(weighting, Weighting) or WholeTargets()
        if self.weighting.when_memorized not in ("skip", "uniform"):
            raise InputError(f"when_memorized is {self.weighting.when_memorized!r}; expected skip or uniform")
        self.curriculum = from_plain(curriculum, PrefixRatio)
        self._keep_plain_hyperparameters()

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # A skipped step has no gradients, and PyTorch refuses to clip none by value.
        if any(parameter.grad is not None for parameter in trained_by(optimizer)):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
