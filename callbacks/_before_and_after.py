"""Base class of callbacks that measure texts outside the corpus before and after a fit."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks._logging import log_everywhere
from pml.modules import Memorization


class BeforeAndAfter(Callback):
    """Measures losses of the frozen model before a fit, and of the adapted one after it, in nats per token."""

    tag: str
    """Prefix of the curves, and field of the record."""

    def __init__(self) -> None:
        self._before: dict[str, float] = {}
        self._after: dict[str, float] = {}
        self._measured_at: int | None = None

    def losses(self, module: Memorization) -> dict[str, float]:
        """Losses by name, in nats per token."""
        raise NotImplementedError

    def tokens(self, name: str) -> int:
        """Number of target tokens in the loss of this name."""
        raise NotImplementedError

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Memorization)
        self._measured_at = None
        with pl_module.frozen():
            self._before = self.losses(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:
            self._log(trainer, self._before)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.measure(trainer, pl_module)

    def record_fields(self, trainer: Trainer, pl_module: LightningModule, ended: bool) -> dict[str, Any]:
        """`target_tokens`, `loss_before` and `loss_after` by name; see `pml.records.MeasuresForRecord`."""
        if not ended:
            return {}
        self.measure(trainer, pl_module)
        return {
            self.tag: {
                name: {"target_tokens": self.tokens(name), "loss_before": self._before[name], "loss_after": after}
                for name, after in self._after.items()
            }
        }

    def measure(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Measure and log the adapted model, unless that was done at this step. All ranks must call it."""
        if self._measured_at == trainer.global_step:
            return False
        assert isinstance(pl_module, Memorization)
        self._measured_at, self._after = trainer.global_step, self.losses(pl_module)
        self._log(trainer, self._after)
        return True

    def _log(self, trainer: Trainer, losses: dict[str, float]) -> None:
        log_everywhere(trainer, {f"{self.tag}/{name}": loss for name, loss in losses.items()})
