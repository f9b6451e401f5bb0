"""A fit that is stopped at any step and resumed ends bit for bit like an uninterrupted one."""

import contextlib
import errno
import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from callbacks import RunRecord, StopWhenRecalled, TokenThresholds, VerbatimRecall
from pml import stopping
from pml.adapter import AdapterConfig, adapter_parameters
from pml.checkpoints import Checkpoints, newest_checkpoint, read_checkpoint
from pml.cpu import CpuConfig
from pml.curriculum import PrefixRatio
from pml.errors import InputError
from pml.kl_penalty import KlPenaltyConfig
from pml.modules import SFT, MemFT, Memorization
from pml.records import Record, read_record
from pml.state_store import CacheConfig
from pml.stopping import Stopped
from pml.token_history import read_history
from pml.weighting import OnlyThreshold, SlidingWindow, WholeTargets
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
    "a weighting with a last share": (
        lambda folder: module_on(folder, MemFT, adapter=DROPOUT, weighting=WholeTargets(last_share=0.4)),
        2,
        {"max_epochs": 4},
    ),
    "one batch an epoch": (
        lambda folder: module_on(folder, MemFT, adapter=DROPOUT, weighting=OnlyThreshold(when_memorized="uniform")),
        7,
        {"max_epochs": 12},
    ),
    "a number of steps, limited": (
        lambda folder: module_on(folder, SFT, adapter=DROPOUT, schedule="linear"),
        2,
        {"max_epochs": -1, "max_steps": 7, "limit_train_batches": 2},
    ),
    "recalled before its end": (lambda folder: module_on(folder, MemFT), 3, {"max_epochs": 200}),
    "validation within epochs": (
        lambda folder: module_on(folder, SFT, adapter=DROPOUT),
        2,
        {"max_epochs": 3, "limit_val_batches": 1.0, "val_check_interval": 2, "accumulate_grad_batches": 3},
    ),
}


class StopAt(Callback):
    """Requests a stop, as a signal does, during one training batch, counted from 0 over the whole fit."""

    def __init__(self, batch: int | None) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            stopping.request(signal.SIGTERM)


def fit(
    case: str, backbone: Path, folder: Path, stop_at: int | None = None, checkpoint: Path | None = None
) -> tuple[dict[str, Tensor], Record | None, int]:
    """Run one process of a fit and return its final adapter, its record and the training batches of the fit so far."""
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


def test_a_fit_resumed_within_its_last_epoch_is_certified_at_the_same_step(sharp: Path, tmp_path: Path) -> None:
    # Stopped in the second of the three batches of the epoch at whose end the corpus is certified.
    case = "recalled before its end"
    _, whole, batches = fit(case, sharp, tmp_path / "whole")
    fit(case, sharp, tmp_path / "first", stop_at=batches - 2)
    _, record, _ = fit(case, sharp, tmp_path / "second", checkpoint=newest_checkpoint(tmp_path / "first"))
    assert whole is not None and record is not None
    assert record.resumed == 1
    assert record.steps_to_recall == whole.steps_to_recall == record.optimizer_steps


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_fit_equals_the_uninterrupted_one_bit_for_bit(case: str, sharp: Path, tmp_path: Path) -> None:
    whole, record, batches = fit(case, sharp, tmp_path / "whole")
    assert record is not None
    draw = random.Random(case)
    for chain in range(2):
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


@pytest.mark.parametrize(
    ("case", "stop_at"),
    [("a number of steps", n) for n in range(8)] + [("a number of steps, limited", n) for n in range(6)],
)
def test_a_fit_with_max_steps_resumes_exactly_from_within_an_epoch_or_from_its_end(
    case: str, stop_at: int, sharp: Path, tmp_path: Path
) -> None:
    # An epoch of four batches ends with batch 3; limited to two batches, it ends with batch 1.
    whole, record, _ = fit(case, sharp, tmp_path / "whole")
    fit(case, sharp, tmp_path / "part", stop_at)
    adapter, again, _ = fit(case, sharp, tmp_path / "rest", None, newest_checkpoint(tmp_path / "part"))
    assert {n for n, p in whole.items() if not torch.equal(p, adapter[n])} == set()
    assert record is not None and again is not None
    assert again.target_tokens_trained == record.target_tokens_trained


class Rates(Callback):
    """Records the learning rate and the examples of each step."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, list[int]]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen[-1] = (self.seen[-1][0], batch["example_id"].tolist())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        self.seen.append((optimizer.param_groups[0]["lr"], []))


STEPS = [{"max_epochs": -1, "max_steps": n} for n in range(13)]
LIMITED = [{**steps, "limit_train_batches": 2} for steps in STEPS]


@pytest.mark.parametrize(
    ("first", "longer"),
    [
        *((STEPS[n], STEPS[12]) for n in (3, 4, 5, 8)),
        *((LIMITED[n], LIMITED[9]) for n in (3, 4)),
        (STEPS[3], {"max_epochs": 4}),
        ({"max_epochs": 4, "max_steps": 5}, {"max_epochs": 4}),
        ({"max_epochs": 2}, {"max_epochs": 4}),
        ({"max_epochs": 2}, STEPS[12]),
    ],
    ids=str,
)
def test_extending_a_finished_fit_gives_the_batches_and_learning_rates_of_the_longer_fit(
    first: dict[str, int], longer: dict[str, int], sharp: Path, tmp_path: Path
) -> None:
    def steps(folder: Path, length: dict[str, int], checkpoint: Path | None = None) -> list[tuple[float, list[int]]]:
        torch.manual_seed(4)
        rates = Rates()
        trainer = make_trainer(folder, enable_checkpointing=True, callbacks=[rates, Checkpoints()], **length)
        module, data = module_on(sharp, SFT, schedule="linear"), Ids(uneven(7), batch_size=2)
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        return rates.seen

    whole = steps(tmp_path / "longer", longer)
    done = len(steps(tmp_path / "first", first))
    rest = steps(tmp_path / "rest", longer, newest_checkpoint(tmp_path / "first"))
    assert 0 < done < len(whole)
    assert rest == whole[done:]


def test_evaluating_a_checkpoint_leaves_nothing_of_its_fit_to_the_next_one(sharp: Path, tmp_path: Path) -> None:
    def observers(name: str) -> tuple[VerbatimRecall, RunRecord, list[Callback]]:
        recall, record = VerbatimRecall(generate_every=2, generate_at_end=False), RunRecord(str(tmp_path / name))
        return recall, record, [recall, TokenThresholds(), StopWhenRecalled(), record]

    def fitting(callbacks: list[Callback], epochs: int) -> Trainer:
        return make_trainer(tmp_path, max_epochs=epochs, limit_val_batches=1.0, callbacks=callbacks)

    data = Ids(uneven(7), batch_size=7)
    first = fitting(observers("first")[-1], 21)
    first.fit(module_on(sharp), datamodule=data)
    first.save_checkpoint(tmp_path / "first.ckpt")
    recall, record, callbacks = observers("second")
    evaluating: dict[str, Any] = {"ckpt_path": tmp_path / "first.ckpt", "weights_only": True, "verbose": False}
    fitting(callbacks, 1).validate(module_on(sharp), datamodule=data, **evaluating)
    fitting(callbacks, 3).fit(module_on(sharp), datamodule=data)
    assert recall.generated_at_step == 2
    assert read_history(tmp_path / "second").step.tolist() == [0, 1, 2, 3]
    # It takes 20 steps to see how fast the loss still falls.
    assert record.record is not None and record.record.late_loss_drop is None


class SaveBetween(Callback):
    """Saves a checkpoint after the first of two accumulated micro-batches, as a user's callback may."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.fit_loop.total_batch_idx == 4:
            assert pl_module.global_batch.is_open
            trainer.save_checkpoint(self.path)


def test_a_checkpoint_between_two_micro_batches_holds_the_accumulated_gradients(sharp: Path, tmp_path: Path) -> None:
    adapters = []
    for checkpoint in (None, tmp_path / "between.ckpt"):
        module = module_on(sharp, MemFT, adapter=DROPOUT, weighting=SlidingWindow(window=2))
        callbacks = [] if checkpoint else [SaveBetween(tmp_path / "between.ckpt")]
        trainer = make_trainer(tmp_path, max_epochs=3, accumulate_grad_batches=2, callbacks=callbacks)
        trainer.fit(module, datamodule=Ids(uneven(7), batch_size=2), ckpt_path=checkpoint, weights_only=True)
        adapters.append([parameter.detach() for parameter in adapter_parameters(module.model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*adapters, strict=True))


def test_resuming_within_an_epoch_with_another_batch_size_is_refused(sharp: Path, tmp_path: Path) -> None:
    fit("a number of steps", sharp, tmp_path, stop_at=1)
    module, _, trainer_arguments = CASES["a number of steps"]
    trainer = make_trainer(tmp_path, **trainer_arguments)
    with pytest.raises(InputError, match="epoch that was batched otherwise: batch_size was 2, is now 3"):
        trainer.fit(
            module(sharp),
            datamodule=Ids(uneven(7), batch_size=3),
            ckpt_path=newest_checkpoint(tmp_path),
            weights_only=True,
        )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"learning_rate": 0.001}, "model.learning_rate is 0.001, in the checkpoint 0.02"),
        ({"weight_decay": 0.1}, "model.weight_decay is 0.1, in the checkpoint 0.0"),
        ({"kl_penalty": KlPenaltyConfig(weight=8)}, r"model.kl_penalty is .*8.*, in the checkpoint null"),
        ({"adapter": AdapterConfig(rank=4, block=2)}, "model.adapter.dropout is 0.0, in the checkpoint 0.3"),
        ({"adapter": None}, "model.adapter.block is "),
        ({"compile": "never", "cpu": CpuConfig(), "frozen_prefix": CacheConfig(release=True)}, None),
    ],
)
def test_a_module_resumes_only_with_the_settings_of_its_checkpoint(
    changes: dict[str, Any], said: str | None, sharp: Path, tmp_path: Path
) -> None:
    fit("a number of steps", sharp, tmp_path, stop_at=1)
    settings = {"adapter": DROPOUT, "schedule": "linear", "warmup_steps": 3, **changes}
    trainer = make_trainer(tmp_path, **CASES["a number of steps"][2])
    given = {"datamodule": Ids(uneven(7), batch_size=2), "ckpt_path": newest_checkpoint(tmp_path)}
    with pytest.raises(InputError, match=said) if said is not None else contextlib.nullcontext():
        trainer.fit(module_on(sharp, SFT, **settings), **given, weights_only=True)


@pytest.mark.parametrize(("case", "other"), [("a number of steps", MemFT), ("one batch an epoch", SFT)])
def test_resuming_with_another_method_is_refused(
    case: str, other: type[Memorization], sharp: Path, tmp_path: Path
) -> None:
    fit(case, sharp, tmp_path, stop_at=1)
    _, batch_size, settings = CASES[case]
    given = {"datamodule": Ids(uneven(7), batch_size=batch_size), "ckpt_path": newest_checkpoint(tmp_path)}
    was = {SFT: "MemFT", MemFT: "SFT"}[other]
    with pytest.raises(InputError, match=f"this checkpoint is of the method {was}, and the module is {other.__name__}"):
        make_trainer(tmp_path, **settings).fit(module_on(sharp, other, adapter=DROPOUT), **given, weights_only=True)


def test_resuming_on_other_frozen_weights_is_refused(tiny_backbone_folder: Path, tmp_path: Path) -> None:
    sharp = save_sharpened(tiny_backbone_folder, tmp_path / "sharp")
    fit("a number of steps", sharp, tmp_path / "run", stop_at=1)
    (sharp / "config.json").write_text(json.dumps({**json.loads((sharp / "config.json").read_text()), "pml_test": 1}))
    with pytest.raises(InputError, match="this checkpoint is of a fit on other weights: its backbone has the hash "):
        fit("a number of steps", sharp, tmp_path / "again", checkpoint=newest_checkpoint(tmp_path / "run"))


class Validations(Callback):
    """Notes the steps at which the fit validates."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.steps.append(trainer.global_step)


@pytest.mark.parametrize("stop_at", range(7))
def test_a_stop_misses_no_validation_within_an_epoch(stop_at: int, sharp: Path, tmp_path: Path) -> None:
    # Four batches an epoch, validated after every second one.
    seen, checkpoint = Validations(), None
    for stop in (StopAt(stop_at), None):
        callbacks = [seen, Checkpoints(), *([stop] if stop else [])]
        settings = {"max_epochs": 2, "limit_val_batches": 1.0, "val_check_interval": 2}
        trainer = make_trainer(tmp_path, enable_checkpointing=True, callbacks=callbacks, **settings)
        given = {"datamodule": Ids(uneven(7), batch_size=2), "ckpt_path": checkpoint}
        with stopping.listening(), stopping.at_step_ends(), contextlib.suppress(Stopped):
            trainer.fit(module_on(sharp, SFT), **given, weights_only=True)
        checkpoint = newest_checkpoint(tmp_path)
    assert seen.steps == [2, 4, 6, 8]


EMPTY: dict[str, Any] = {"state_dict": {}, "pml": {}, "optimizer_states": []}


def save(folder: Path, content: Any, name: str = "last.ckpt") -> Path:
    path = folder / "checkpoints" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def test_the_newest_intact_checkpoint_is_found_and_a_damaged_one_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    previous = save(tmp_path, {**EMPTY, "noise": torch.ones(100)}, "previous.ckpt")
    last = save(tmp_path, {**EMPTY, "noise": torch.ones(100)})
    os.utime(previous, (1, 1))
    assert newest_checkpoint(tmp_path) == last
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 255
    for damaged in (bytes(content), last.read_bytes()[:-50], b""):
        last.write_bytes(damaged)
        caplog.clear()
        assert newest_checkpoint(tmp_path) == previous
        assert caplog.messages == [f"{last}: damaged, so the checkpoint before it is taken"]
    previous.unlink()
    with pytest.raises(InputError, match="none of its 1 checkpoints can be resumed, so there is nothing"):
        newest_checkpoint(tmp_path)
    last.unlink()
    with pytest.raises(InputError, match="no checkpoint in it, so there is nothing to go on from"):
        newest_checkpoint(tmp_path)


def test_the_newest_checkpoint_of_a_copied_run_is_its_last_one_whatever_the_times_of_the_copies(tmp_path: Path) -> None:
    last = save(tmp_path, EMPTY)
    save(tmp_path, EMPTY, "previous.ckpt")
    os.utime(last, (1, 1))
    assert newest_checkpoint(tmp_path) == last


def test_a_newer_checkpoint_that_holds_only_weights_is_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    last = save(tmp_path, EMPTY)
    os.utime(last, (1, 1))
    weights = save(tmp_path, {"state_dict": {}, "pml": {}}, "epoch=3.ckpt")
    assert newest_checkpoint(tmp_path) == last
    assert caplog.messages == [f"{weights}: holds only weights, so it is skipped"]


def test_a_checkpoint_that_could_execute_code_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds more than tensors and plain Python, which is never read"):
        read_checkpoint(save(tmp_path, {"state_dict": {}, "pml": Path("a")}))


@pytest.mark.parametrize("content", [{"state_dict": {}}, [1], torch.ones(2), "text"])
def test_a_torch_file_that_is_not_a_checkpoint_of_pml_is_refused(content: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a checkpoint of pml"):
        read_checkpoint(save(tmp_path, content))


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 and nothing more"])
def test_a_file_that_torch_cannot_load_is_refused_as_a_checkpoint(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "some.ckpt").write_bytes(content)
    with pytest.raises(InputError, match="damaged, or not a checkpoint; expected one written by `pml fit`"):
        read_checkpoint(tmp_path / "some.ckpt")


def test_checkpoints_are_saved_every_few_minutes_and_the_previous_one_is_kept(
    sharp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 100_000, 60))  # a minute passes with every reading
    monkeypatch.setattr("pml.checkpoints.time.monotonic", lambda: float(next(clock)))
    trainer = make_trainer(tmp_path, enable_checkpointing=True, max_epochs=6, callbacks=[Checkpoints(minutes=3)])
    saved: list[int] = []
    save_checkpoint = trainer.save_checkpoint
    monkeypatch.setattr(trainer, "save_checkpoint", lambda p: saved.append(trainer.global_step) or save_checkpoint(p))
    trainer.fit(module_on(sharp, SFT), datamodule=Ids(uneven(4), batch_size=2))
    assert saved == [3, 6, 9, 12]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"last.ckpt", "previous.ckpt"}
    assert [
        read_checkpoint(tmp_path / "checkpoints" / f"{name}.ckpt")["global_step"] for name in ("previous", "last")
    ] == [
        9,
        12,
    ]


def test_a_fast_dev_run_leaves_the_checkpoints_of_a_real_run_as_they_are(sharp: Path, tmp_path: Path) -> None:
    for kind in ({"max_epochs": 2}, {"fast_dev_run": True}):
        callbacks = [Checkpoints(minutes=1e-9)]
        trainer = make_trainer(tmp_path, **{**kind, "enable_checkpointing": True, "callbacks": callbacks})
        trainer.fit(module_on(sharp, SFT), datamodule=Ids(uneven(4), batch_size=2))
    assert read_checkpoint(newest_checkpoint(tmp_path))["global_step"] == 4


class DiesMeasuring(Callback):
    """Raises after the last step, before the results are written."""

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        raise RuntimeError("killed")


def test_a_fit_that_dies_before_writing_its_record_can_be_resumed_and_finished(sharp: Path, tmp_path: Path) -> None:
    for dies, checkpoint in (([DiesMeasuring()], None), ([], tmp_path)):
        callbacks = [*dies, RunRecord(str(tmp_path)), Checkpoints(minutes=1e-9)]
        trainer = make_trainer(tmp_path, enable_checkpointing=True, max_epochs=3, callbacks=callbacks)
        path = newest_checkpoint(checkpoint) if checkpoint else None
        with contextlib.suppress(RuntimeError):
            trainer.fit(
                module_on(sharp, SFT), datamodule=Ids(uneven(4), batch_size=2), ckpt_path=path, weights_only=True
            )
    record = read_record(tmp_path / "record.json")
    assert (record.status, record.optimizer_steps, record.resumed) == ("finished", 6, 1)


class TestSignals:
    def test_outside_a_fit_the_first_signal_stops_the_process_at_once(self) -> None:
        with stopping.listening(), pytest.raises(Stopped) as caught:
            os.kill(os.getpid(), signal.SIGTERM)
        assert (caught.value.code, caught.value.at_once, str(caught.value)) == (143, True, "stopped by SIGTERM")

    def test_in_a_fit_the_first_signal_waits_for_the_step_and_the_second_does_not(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with stopping.listening(), stopping.at_step_ends(), pytest.raises(Stopped) as caught:
            os.kill(os.getpid(), signal.SIGINT)
            assert stopping.requested() == signal.SIGINT
            os.kill(os.getpid(), signal.SIGINT)
        assert (caught.value.code, caught.value.at_once, str(caught.value)) == (130, True, "stopped by Ctrl-C")
        assert capsys.readouterr().err.startswith("stopping after this step; repeat to stop at once")

    def test_a_closed_terminal_stops_a_command_as_a_signal_does(self) -> None:
        with stopping.listening(), pytest.raises(Stopped) as caught:
            os.kill(os.getpid(), signal.SIGHUP)
        assert (caught.value.code, str(caught.value)) == (129, "stopped by SIGHUP")

    def test_a_closed_terminal_stops_nothing_under_nohup(self) -> None:
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            with stopping.listening():
                os.kill(os.getpid(), signal.SIGHUP)
        finally:
            signal.signal(signal.SIGHUP, before)

    def test_a_signal_is_heeded_when_nobody_can_be_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sys.stderr", mock.Mock(**{"write.side_effect": OSError(errno.EIO, "no terminal")}))
        with stopping.listening(), stopping.at_step_ends():
            os.kill(os.getpid(), signal.SIGHUP)
            assert stopping.requested() == signal.SIGHUP

    def test_the_previous_signal_handlers_are_restored_afterwards(self) -> None:
        before = [signal.getsignal(signum) for signum in stopping.SIGNALS]
        with stopping.listening():
            assert signal.getsignal(signal.SIGTERM) is stopping.request
        assert [signal.getsignal(signum) for signum in stopping.SIGNALS] == before
