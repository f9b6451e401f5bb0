"""`VerbatimRecall` logs exact metrics at each validation and decodes greedily only when asked to."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks import VerbatimRecall
from pml import metrics
from pml.errors import InputError
from pml.recall import greedy_recall, score_corpus
from tests.fits import module_on
from tests.tiny_runs import Ids, make_trainer, uneven


class Expected(Callback):
    """Computes from its own scores, at each validation, the values that should be logged."""

    def __init__(self, data: Ids) -> None:
        self.data = data
        self.values: list[dict[str, float]] = []

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        scores = score_corpus(pl_module, self.data.val_dataloader())
        self.values.append(
            {
                "val/token_accuracy": metrics.token_accuracy(scores).item(),
                "val/exact_match": metrics.exact_match(scores).float().mean().item(),
                "val/first_failure": metrics.first_failure(scores).float().mean().item(),
            }
        )


def scalars(folder: Path, tag: str) -> list[float]:
    events = EventAccumulator(str(folder)).Reload()
    return [event.value for event in events.Scalars(tag)] if tag in events.Tags()["scalars"] else []


def test_each_validation_logs_metrics_of_the_whole_corpus_across_batches(
    sharp: Path, tmp_path: Path, logged_trainer: Callable[..., Trainer]
) -> None:
    data = Ids(uneven(5), batch_size=2)
    expected = Expected(data)
    trainer = logged_trainer(max_epochs=12, callbacks=[VerbatimRecall(), expected])
    trainer.fit(module_on(sharp), datamodule=data)
    for tag in expected.values[0]:
        assert scalars(tmp_path / "run", tag) == pytest.approx([values[tag] for values in expected.values], rel=1e-6)
    assert len({values["val/token_accuracy"] for values in expected.values}) > 3


def test_greedy_decoding_is_measured_and_logged_at_the_end_of_a_fit(
    sharp: Path, tmp_path: Path, logged_trainer: Callable[..., Trainer]
) -> None:
    data, recall = Ids(uneven(5)), VerbatimRecall()
    module = module_on(sharp)
    logged_trainer(max_epochs=30, callbacks=[recall]).fit(module, datamodule=data)
    answers = [(g.token_ids, g.example.target_ids) for g in greedy_recall(module, data.examples)]
    exact = sum(a == b for a, b in answers) / 5
    right = sum(x == y for a, b in answers for x, y in zip(a, b, strict=True)) / data.corpus.target_tokens
    assert recall.shares() == {"generated_exact_match": exact, "generated_token_accuracy": right}
    assert scalars(tmp_path / "run", "val/generated_exact_match") == pytest.approx([0, exact])
    # Decoded only at the end, token accuracy would be a single point, not a curve.
    assert scalars(tmp_path / "run", "val/generated_token_accuracy") == []
    assert recall.generated_at_step == 30
    assert 0 < right < 1


@pytest.mark.parametrize(("every", "decoded"), [(0, 0), (1, 1 + 6), (2, 1 + 3), (4, 1 + 1)])
def test_greedy_decoding_runs_at_every_nth_validation(
    every: int, decoded: int, sharp: Path, tmp_path: Path, logged_trainer: Callable[..., Trainer]
) -> None:
    recall = VerbatimRecall(generate_every=every, generate_at_end=False)
    logged_trainer(max_epochs=6, callbacks=[recall]).fit(module_on(sharp), datamodule=Ids(uneven(2)))
    assert len(scalars(tmp_path / "run", "val/generated_exact_match")) == decoded
    assert len(scalars(tmp_path / "run", "val/token_accuracy")) == 6
    assert len(scalars(tmp_path / "run", "val/generated_token_accuracy")) == decoded


def test_the_sanity_check_does_not_count_as_a_validation(
    sharp: Path, tmp_path: Path, logged_trainer: Callable[..., Trainer]
) -> None:
    recall = VerbatimRecall(generate_every=2, generate_at_end=False)
    trainer = logged_trainer(max_epochs=4, num_sanity_val_steps=2, callbacks=[recall])
    trainer.fit(module_on(sharp), datamodule=Ids(uneven(2)))
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    steps = [event.step for event in events.Scalars("val/generated_exact_match")]
    validated = [event.step for event in events.Scalars("val/token_accuracy")]
    assert steps[1:] == validated[1::2]


def test_every_nth_validation_is_counted_over_a_resumed_fit(
    sharp: Path, tmp_path: Path, logged_trainer: Callable[..., Trainer]
) -> None:
    def recall() -> VerbatimRecall:
        return VerbatimRecall(generate_every=2, generate_at_end=False)

    first = make_trainer(tmp_path / "first", max_epochs=1, limit_val_batches=1.0, callbacks=[recall()])
    first.fit(module_on(sharp), datamodule=Ids(uneven(2)))
    first.save_checkpoint(tmp_path / "last.ckpt")
    resumed = recall()
    second = logged_trainer(max_epochs=2, callbacks=[resumed])
    second.fit(module_on(sharp), datamodule=Ids(uneven(2)), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert resumed.generated_at_step == second.global_step


def test_shares_are_empty_before_the_first_greedy_decoding() -> None:
    assert VerbatimRecall().shares() == {}


def test_the_test_loop_measures_recall_under_teacher_forcing_and_by_greedy_decoding(
    sharp: Path, logged_trainer: Callable[..., Trainer]
) -> None:
    module, data = module_on(sharp), Ids(uneven(3), batch_size=2)
    (values,) = logged_trainer(callbacks=[VerbatimRecall()]).test(module, datamodule=data, verbose=False)
    scores = score_corpus(module, data.test_dataloader())
    assert values["test/token_accuracy"] == pytest.approx(metrics.token_accuracy(scores).item())
    assert values["test/exact_match"] == values["test/generated_exact_match"] == 0
    answers = greedy_recall(module, data.examples)
    right = sum(g.right_tokens for g in answers) / data.corpus.target_tokens
    assert values["test/generated_token_accuracy"] == pytest.approx(right)


def test_metrics_are_reset_between_validations(sharp: Path, logged_trainer: Callable[..., Trainer]) -> None:
    module, data = module_on(sharp), Ids(uneven(4), batch_size=3)
    trainer = logged_trainer(callbacks=[VerbatimRecall()])
    (first,) = trainer.validate(module, datamodule=data, verbose=False)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    (second,) = trainer.validate(module, datamodule=data, verbose=False)
    scores = score_corpus(module, data.val_dataloader())
    assert second["val/token_accuracy"] == pytest.approx(metrics.token_accuracy(scores).item())
    assert second["val/first_failure"] == pytest.approx(metrics.first_failure(scores).float().mean().item())
    assert first.keys() == second.keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"generate_every": -1}, "generate_every is -1; expected a number of validations, or 0 for never"),
        ({"generate_batch_size": 0}, "generate_batch_size is 0; expected at least 1 prompt"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        VerbatimRecall(**settings)  # type: ignore[arg-type]
