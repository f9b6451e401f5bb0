"""A callback that logs one torchmetric over the corpus, and how it goes with others of its kind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torchmetrics import Metric

from callbacks import CorpusMetricCallback, Generalization, VerbatimRecall
from data_modules import LinearRule
from pml.token_scores import TokenScores
from tests.fits import module_on
from tests.tiny_runs import Ids, uneven


class Tokens(Metric):
    """Counts target tokens, and multiplies them by a factor."""

    def __init__(self, factor: int = 1) -> None:
        super().__init__()
        self.factor = factor
        self.add_state("tokens", default=Tensor([0]), dist_reduce_fx="sum")

    def update(self, scores: TokenScores) -> None:
        self.tokens += scores.mask.sum()

    def compute(self) -> dict[str, Tensor]:
        return {"tokens": self.factor * self.tokens}


class Pairs(Tokens):
    """Counts pairs."""

    def update(self, scores: TokenScores) -> None:
        self.tokens += len(scores.mask)

    def compute(self) -> dict[str, Tensor]:
        return {"pairs": self.tokens}


def test_each_kind_of_metric_is_logged_and_of_one_kind_only_that_of_the_last_callback(
    sharp: Path, logged_trainer: Callable[..., Trainer]
) -> None:
    metrics = [Tokens(), Tokens(factor=10), Pairs()]
    trainer = logged_trainer(callbacks=[*map(CorpusMetricCallback, metrics), VerbatimRecall()])
    data = Ids(uneven(5), batch_size=2)
    (values,) = trainer.validate(module_on(sharp), datamodule=data, verbose=False)
    assert (values["val/tokens"], values["val/pairs"]) == (280, 5)
    assert "val/token_accuracy" in values


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_points_of_validations_are_at_the_steps_that_they_follow(
    accumulate: int, sharp: Path, tmp_path: Path, logged_trainer: Callable[..., Trainer]
) -> None:
    data: Any = LinearRule(size=4, held_out_share=0.25, batch_size=3, chat_template=False)
    callbacks = [VerbatimRecall(generate_every=1, generate_at_end=False), Generalization(generate_at_end=False)]
    trainer = logged_trainer(max_epochs=2, accumulate_grad_batches=accumulate, callbacks=callbacks)
    trainer.fit(module_on(sharp), datamodule=data)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    validated = {"val/token_accuracy", "val/generated_exact_match", "val/held_out_loss"}
    # Twelve pairs in batches of three: two epochs of four batches.
    steps = {tag: [event.step for event in events.Scalars(tag) if event.step] for tag in validated}
    ends = [4 // accumulate, 8 // accumulate]
    assert steps.pop("val/held_out_loss") == [*ends, ends[-1]]
    assert steps == dict.fromkeys(steps, ends)
    assert trainer.callback_metrics["val/token_accuracy"] == events.Scalars("val/token_accuracy")[-1].value
