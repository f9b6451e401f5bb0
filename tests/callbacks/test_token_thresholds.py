"""Where tokens stand against the threshold, as it is logged."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks import TokenThresholds
from pml.errors import InputError
from pml.recall import score_corpus
from tests.fits import module_on
from tests.tiny_runs import Ids, uneven


class Losses(Callback):
    """Keeps the losses of all target tokens, of training batches and of the corpus at each validation."""

    def __init__(self, data: Ids) -> None:
        self.data = data
        self.train: list[list[float]] = []
        self.val: list[list[float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.train.append(outputs["scores"].losses[outputs["scores"].mask].tolist())

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        scores = score_corpus(pl_module, self.data.val_dataloader())
        self.val.append(scores.losses[scores.mask].tolist())


def share_at_most(losses: list[float], threshold: float) -> float:
    return sum(math.exp(-loss) <= threshold for loss in losses) / len(losses)


@pytest.mark.parametrize("threshold", [0.5, 0.2])
def test_logged_values_are_those_of_the_tokens_one_by_one(
    threshold: float, sharp: Path, tmp_path: Path, logged_trainer: Callable[..., Trainer]
) -> None:
    data = Ids(uneven(5), batch_size=2)
    losses = Losses(data)
    trainer = logged_trainer(max_epochs=15, callbacks=[TokenThresholds(threshold, looks=0), losses])
    trainer.fit(module_on(sharp), datamodule=data)
    events = EventAccumulator(str(tmp_path / "run")).Reload()

    def logged(tag: str) -> list[float]:
        return [event.value for event in events.Scalars(tag)]

    shares = [share_at_most(epoch, threshold) for epoch in losses.val]
    assert logged("val/sub_threshold_fraction") == pytest.approx(shares, rel=1e-6)
    assert logged("val/loss") == pytest.approx([sum(epoch) / len(epoch) for epoch in losses.val], rel=1e-5)
    weakest = [math.exp(-max(epoch)) for epoch in losses.val]
    assert logged("val/min_target_probability") == pytest.approx(weakest, rel=1e-5)
    batches = [share_at_most(batch, threshold) for batch in losses.train]
    assert logged("train/sub_threshold_fraction") == pytest.approx(batches, rel=1e-6)
    assert len(set(shares)) > 3


@pytest.mark.parametrize("threshold", [0.0, 1.0, 1.5])
def test_a_threshold_that_is_no_probability_is_refused(threshold: float) -> None:
    with pytest.raises(InputError, match=rf"threshold is {threshold}; expected a probability strictly between 0 and 1"):
        TokenThresholds(threshold)
