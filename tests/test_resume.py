"""Going on: a fit that was stopped at any step, and resumed, ends bit for bit as one that was not."""

import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from callbacks import RunRecord, StopWhenRecalled, TokenThresholds
from pml import stopping
from pml.adapter import AdapterConfig, adapter_parameters
from pml.checkpoints import Checkpoints, newest_checkpoint
from pml.curriculum import PrefixRatio
from pml.modules import SFT, MemFT, Memorization
from pml.records import Record, read_record
from pml.stopping import Stopped
from pml.weighting import OnlyThreshold, SlidingWindow
from tests.fits import module_on, save_sharpened
from tests.tiny_runs import Ids, make_trainer, uneven

DROPOUT = AdapterConfig(rank=4, block=2, dropout=0.3)


@pytest.fixture(scope="module")
def sharp(tiny_backbone_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sharpened(tiny_backbone_folder, tmp_path_factory.mktemp("sharp"))


CASES: dict[str, tuple[Callable[[Path], Memorization], int, dict[str, Any]]] = {
    "dropout, window, accumulation": (
        lambda folder: module_on(folder, MemFT, adapter=DROPOUT, weighting=SlidingWindow(window=2, patience=1)),
        2,
        {"max_epochs": 4, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0},
    ),
    "dropout, curriculum, validation": (
        lambda folder: module_on(
            folder, MemFT, adapter=DROPOUT, curriculum=PrefixRatio([0.3, 0.6, 1.0], [1, 3, 9]), schedule="linear"
        ),
        1,
        {"max_epochs": 5, "limit_val_batches": 1.0, "check_val_every_n_epoch": 2},
    ),
    "a number of steps": (
        lambda folder: module_on(folder, SFT, adapter=DROPOUT, schedule="linear", warmup_steps=3),
        2,
        {"max_epochs": -1, "max_steps": 13},
    ),
    "one batch an epoch": (
        lambda folder: module_on(folder, MemFT, adapter=DROPOUT, weighting=OnlyThreshold(when_memorized="uniform")),
        7,
        {"max_epochs": 12},
    ),
    "recalled before its end": (lambda folder: module_on(folder, MemFT), 3, {"max_epochs": 200}),
    "validation within epochs": (
        lambda folder: module_on(folder, SFT, adapter=DROPOUT),
        2,
        {"max_epochs": 3, "limit_val_batches": 1.0, "val_check_interval": 2, "accumulate_grad_batches": 3},
    ),
}


class StopAt(Callback):
    """Asks for a stop, as a signal does, in the middle of one training batch, counted over the whole fit from 0."""

    def __init__(self, batch: int | None) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            stopping.request(signal.SIGTERM)


def fit(
    case: str, backbone: Path, folder: Path, stop_at: int | None = None, checkpoint: Path | None = None
) -> tuple[dict[str, Tensor], Record | None, int]:
    """One process' worth of a fit: the adapter it ends with, its record, and the training batches there were."""
    make, batch_size, trainer_arguments = CASES[case]
    torch.manual_seed(4)
    module = make(backbone)
    callbacks = [StopAt(stop_at), TokenThresholds(), StopWhenRecalled(), RunRecord(str(folder)), Checkpoints()]
    trainer = make_trainer(folder, enable_checkpointing=True, callbacks=callbacks, **trainer_arguments)
    with stopping.listening(), stopping.at_step_ends():
        try:
            trainer.fit(
                module, datamodule=Ids(uneven(7), batch_size=batch_size), ckpt_path=checkpoint, weights_only=True
            )
        except Stopped as stop:
            assert stop.code == 143
            assert not stop.at_once
    adapter = {name: parameter.detach().clone() for name, parameter in adapter_parameters(module.model).items()}
    return adapter, read_record(folder / "record.json"), trainer.fit_loop.total_batch_idx + 1


NOT_OF_THE_RESULT = {"wall_seconds", "resumed"}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_fit_is_the_uninterrupted_one_bit_for_bit(case: str, sharp: Path, tmp_path: Path) -> None:
    whole, record, batches = fit(case, sharp, tmp_path / "whole")
    assert record is not None
    draw = random.Random(case)
    for chain in range(4):
        points = sorted(draw.sample(range(batches - 1), 2))
        checkpoint = None
        for part, stop_at in enumerate([*points, None]):
            folder = tmp_path / f"{chain}-{part}"
            adapter, again, _ = fit(case, sharp, folder, stop_at, checkpoint)
            assert again is not None
            assert again.resumed == part
            assert (again.status == "interrupted") is (stop_at is not None and again.optimizer_steps < batches)
            checkpoint = newest_checkpoint(folder)
        assert again is not None
        where = f"{case}: stopped in the batches {points} of {batches}"
        assert {n for n, p in whole.items() if not torch.equal(p, adapter[n])} == set(), where
        expected, got = (r.model_dump(exclude=NOT_OF_THE_RESULT) for r in (record, again))
        assert got == expected, where
