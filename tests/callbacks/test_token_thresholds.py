"""What is logged about target tokens and the threshold, at evaluations and at looks."""

import csv
import math
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks import RunRecord, TokenThresholds, VerbatimRecall
from pml import metrics
from pml.curriculum import PrefixRatio
from pml.errors import InputError
from pml.looks import look_steps
from pml.modules import MemFT
from pml.recall import score_corpus
from pml.token_history import read_history
from tests.fits import module_on
from tests.tiny_runs import Ids, make_trainer, uneven


class Losses(Callback):
    """Keeps the losses of all target tokens in each training batch, and in the whole corpus at each validation."""

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
def test_logged_values_agree_with_those_computed_token_by_token(
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
def test_a_threshold_outside_zero_and_one_is_refused(threshold: float) -> None:
    with pytest.raises(InputError, match=rf"threshold is {threshold}; expected a probability strictly between 0 and 1"):
        TokenThresholds(threshold)


def all_callbacks(**thresholds: Any) -> list[Callback]:
    return [VerbatimRecall(), TokenThresholds(**thresholds), RunRecord()]


def test_looks_are_logged_to_tensorboard_as_curves_images_histograms_and_text(
    sharp: Path, tmp_path: Path, logged_trainer: Callable[..., Trainer]
) -> None:
    data = Ids(uneven(5), batch_size=2)
    module = module_on(sharp)
    logged_trainer(max_epochs=20, limit_val_batches=0, callbacks=all_callbacks(looks=8)).fit(module, datamodule=data)
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"images": 0, "tensors": 0}).Reload()
    tags = events.Tags()
    for tag in tags["scalars"]:
        steps = [event.step for event in events.Scalars(tag)]
        assert steps[0] == 0, tag
        assert len(steps) > 1, tag
    looks = [event.step for event in events.Scalars("corpus/certain_tokens")]
    assert looks[:2] == [0, 1]
    assert looks[-1] == 60
    assert len(looks) == 9
    assert [event.step for event in events.Images("tokens/grid")] == looks
    assert [event.step for event in events.Images("tokens/history")] == [60]
    assert {"tokens/p", "tokens/margin_in_logits"} <= set(tags["histograms"])
    assert len(events.Tensors("tokens/most_stubborn/text_summary")) == 9
    scores = score_corpus(module, data.val_dataloader())
    certain = (scores.correct & (scores.losses < math.log(2))).sum().item() / scores.mask.sum().item()
    assert events.Scalars("corpus/certain_tokens")[-1].value == pytest.approx(certain)
    history = read_history(tmp_path / "run")
    assert history.step.tolist() == looks
    assert scores.margin is not None
    np.testing.assert_allclose(history.probability[-1], torch.exp(-scores.losses)[scores.mask].numpy(), rtol=1e-5)
    np.testing.assert_allclose(history.margin[-1], scores.margin[scores.mask].numpy(), rtol=1e-4, atol=1e-5)


class Fake(Logger):
    """Keeps what it is given; all runs share its folder, as with W&B's logger."""

    def __init__(self, folder: Path, version: str) -> None:
        super().__init__()
        self.folder, self._version = folder, version
        self.values: dict[str, list[tuple[int, float]]] = {}
        self.settings: dict[str, Any] = {}

    name = "shared"

    @property
    def version(self) -> str:
        return self._version

    @property
    def save_dir(self) -> str:
        return str(self.folder)

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        for name, value in metrics.items():
            self.values.setdefault(name, []).append((step or 0, float(value)))

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        self.settings.update(params)


def test_all_loggers_get_the_same_curves_whatever_their_order(sharp: Path, tmp_path: Path) -> None:
    seen = []
    for order in (1, -1):
        fake = Fake(tmp_path / "shared", f"run{order}")
        loggers = [fake, CSVLogger(tmp_path / f"csv{order}", name="", version="")][::order]
        options: dict[str, Any] = {"logger": loggers, "log_every_n_steps": 1, "max_epochs": 4}
        make_trainer(tmp_path, callbacks=all_callbacks(), **options).fit(
            module_on(sharp), datamodule=Ids(uneven(3), batch_size=2)
        )
        with (tmp_path / f"csv{order}" / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        for name in ("val/loss", "val/exact_match", "corpus/certain_tokens", "train/learning_rate"):
            by_step = {int(row["step"]): float(row[name]) for row in rows if row[name]}
            assert by_step == pytest.approx(dict(fake.values[name])), name
            assert {0, 8} <= by_step.keys()
        assert {"method", "rank", "target_tokens", "learning_rate", "seed"} <= fake.settings.keys()
        assert (tmp_path / f"csv{order}" / "record.json").is_file()
        seen.append({name: value for name, value in fake.values.items() if name != "run/wall_seconds"})
    assert seen[0] == seen[1]


def test_runs_whose_loggers_share_a_folder_have_a_folder_each(sharp: Path, tmp_path: Path) -> None:
    for version in ("one", "two"):
        options: dict[str, Any] = {"logger": Fake(tmp_path, version), "callbacks": [RunRecord()]}
        make_trainer(tmp_path, **options).fit(module_on(sharp), datamodule=Ids(uneven(2)))
        assert (tmp_path / "shared" / version / "record.json").is_file()


def test_a_failed_fit_leaves_the_looks_taken_so_far(sharp: Path, tmp_path: Path) -> None:
    class Broken(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 3:
                raise RuntimeError("broken")

    callbacks = [TokenThresholds(), RunRecord(), Broken()]
    with pytest.raises(RuntimeError, match="broken"):
        make_trainer(tmp_path, max_epochs=9, callbacks=callbacks).fit(module_on(sharp), datamodule=Ids(uneven(3)))
    assert read_history(tmp_path).step.tolist() == [0, 1, 2, 3, 4]


def test_a_resumed_fit_has_the_looks_of_both_parts(sharp: Path, tmp_path: Path) -> None:
    data = Ids(uneven(3))
    first = make_trainer(tmp_path / "first", max_epochs=3, callbacks=[TokenThresholds(), RunRecord()])
    first.fit(module_on(sharp), datamodule=data)
    first.save_checkpoint(tmp_path / "last.ckpt")
    second = make_trainer(tmp_path / "second", max_epochs=6, callbacks=[TokenThresholds(), RunRecord()])
    second.fit(module_on(sharp), datamodule=Ids(uneven(3)), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert read_history(tmp_path / "second").step.tolist() == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_the_event_files_of_two_thousand_steps_stay_below_five_megabytes(
    sharp: Path, tmp_path: Path, logged_trainer: Callable[..., Trainer]
) -> None:
    data = Ids(uneven(100), batch_size=100)
    trainer = logged_trainer(
        max_epochs=-1, max_steps=2000, limit_val_batches=0, log_every_n_steps=10, callbacks=all_callbacks()
    )
    trainer.fit(module_on(sharp), datamodule=data)
    assert sum(path.stat().st_size for path in (tmp_path / "run").glob("events*")) < 5e6


def test_only_the_last_of_two_callbacks_takes_looks(
    sharp: Path, tmp_path: Path, logged_trainer: Callable[..., Trainer]
) -> None:
    callbacks = [*all_callbacks(), TokenThresholds(looks=2)]
    logged_trainer(max_epochs=9, callbacks=callbacks).fit(module_on(sharp), datamodule=Ids(uneven(3)))
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [event.step for event in events.Scalars("corpus/certain_tokens")] == [0, 1, 9]


def test_the_threshold_of_the_last_of_two_callbacks_is_logged(
    sharp: Path, tmp_path: Path, logged_trainer: Callable[..., Trainer]
) -> None:
    module, data, own = module_on(sharp), Ids(uneven(3)), TokenThresholds(threshold=0.004)
    trainer = logged_trainer(max_epochs=1, callbacks=[TokenThresholds(), own])
    trainer.fit(module, datamodule=data)
    scores = score_corpus(module, data.val_dataloader())
    shares = [metrics.sub_threshold_fraction(scores, threshold).item() for threshold in (0.5, 0.004)]
    assert shares[0] != shares[1]
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert events.Scalars("val/sub_threshold_fraction")[-1].value == pytest.approx(shares[1], rel=1e-6)


def test_all_points_of_a_curve_have_the_threshold_of_the_last_callback(
    sharp: Path, tmp_path: Path, logged_trainer: Callable[..., Trainer]
) -> None:
    callbacks = [TokenThresholds(), TokenThresholds(threshold=0.004), RunRecord()]
    module, data = module_on(sharp), Ids(uneven(3))
    logged_trainer(max_epochs=1, callbacks=callbacks).fit(module, datamodule=data)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    after = score_corpus(module, data.val_dataloader())
    with module.frozen():
        before = score_corpus(module, data.val_dataloader())
    expected = [metrics.sub_threshold_fraction(scores, 0.004).item() for scores in (before, after, after)]
    assert [e.value for e in events.Scalars("val/sub_threshold_fraction")] == pytest.approx(expected, rel=1e-6)
    assert expected[0] != metrics.sub_threshold_fraction(before, 0.5).item()


def test_looks_are_spaced_over_the_steps_that_a_curriculum_takes(sharp: Path, tmp_path: Path) -> None:
    # The first two epochs have one batch each, the other two have eight.
    module = module_on(sharp, MemFT, curriculum=PrefixRatio(ratios=[0.1, 1.0], boundaries=[2, 3]))
    callbacks = [TokenThresholds(looks=4), RunRecord(dirpath=str(tmp_path / "run"))]
    make_trainer(tmp_path, max_epochs=4, callbacks=callbacks).fit(module, datamodule=Ids(uneven(8), batch_size=1))
    assert read_history(tmp_path / "run").step.tolist() == [0, *(step for step in islice(look_steps(18, 4), 1, 5))]


def test_a_single_look_is_refused() -> None:
    with pytest.raises(InputError, match="looks is 1; expected at least 2, the first step and the last, or 0"):
        TokenThresholds(looks=1)
