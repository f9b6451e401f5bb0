"""Stopping and resuming on the command line: messages, files, refusals and exit codes."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import callbacks
from pml import stopping
from pml.checkpoints import newest_checkpoint
from pml.cli import main
from pml.errors import InputError
from pml.grid import read_grid, resolve
from pml.records import read_record
from pml.same_folder import logger_settings
from pml.same_model import refuse_other_model
from tests import fits  # one thread

assert fits.torch.get_num_threads() == 1

ROOT = Path(__file__).resolve().parents[1]


class StopAt(callbacks.StopWhenRecalled):
    """Requests a stop, as a signal does, at a given step of a fit that has not been resumed."""

    def __init__(self, step: int = 3, signum: int = 15, times: int = 1) -> None:
        super().__init__()
        self.step, self.signum, self.times = step, signum, times

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == self.step and not pl_module.resumed:
            for _ in range(self.times):
                stopping.request(self.signum)


@pytest.fixture
def arguments(tiny_backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a fit of ten steps, to which a test can add callbacks."""
    monkeypatch.chdir(tmp_path)
    return ten_steps(tiny_backbone_folder)


def ten_steps(backbone: Path) -> list[str]:
    made = ["fit", "--model=SFT", f"--model.backbone={backbone}", "--model.adapter.block=1"]
    made += ["--model.adapter.dropout=0.2", "--data=RandomTokens", "--data.length=8", "--trainer.max_epochs=10"]
    made += ["--trainer.accelerator=cpu", "--model.compile=never"]
    made += ["--trainer.callbacks=[]", "--trainer.callbacks+=callbacks.RunRecord"]
    made += ["--trainer.log_every_n_steps=1"]
    return made


def stop_at(step: int = 3, **more: Any) -> list[str]:
    name = "--trainer.callbacks+=tests.test_going_on.StopAt"
    return [name, f"--trainer.callbacks.step={step}", *(f"--trainer.callbacks.{k}={v}" for k, v in more.items())]


def adapter(run: str) -> dict[str, torch.Tensor]:
    return load_file(Path(run) / "adapter" / "adapter_model.safetensors")


RUN = "runs/fit/version_0"


@pytest.mark.parametrize(("signum", "name", "code"), [(15, "SIGTERM", 143), (2, "Ctrl-C", 130)])
def test_a_stopped_fit_prints_a_command_that_resumes_it_as_if_it_had_not_stopped(
    signum: int, name: str, code: int, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*arguments, "--trainer.callbacks+=callbacks.TokenThresholds"]
    assert main([*arguments, *stop_at(signum=signum)]) == code
    last = capsys.readouterr().err.splitlines()[-1]
    said, _, command = last.partition("; go on with: ")
    assert said == f"pml fit: stopped by {name}"
    record = read_record(Path(RUN, "record.json"))
    assert (record.status, record.optimizer_steps, record.resumed) == ("interrupted", 4, 0)
    assert Path(RUN, "adapter", "adapter_model.safetensors").is_file()

    assert command == f"pml fit --config {RUN}/config.yaml --ckpt_path last"
    assert main(command.split()[1:]) == 0
    going_on = read_record(Path(RUN, "record.json"))
    assert (going_on.status, going_on.optimizer_steps, going_on.resumed) == ("finished", 10, 1)
    assert [path.name for path in Path("runs/fit").iterdir()] == ["version_0"]
    assert main([*arguments, "--trainer.logger.name=whole"]) == 0
    whole = adapter("runs/whole/version_0")
    assert all(torch.equal(values, whole[key]) for key, values in adapter(RUN).items())
    # The curves are those of an uninterrupted run, and the configuration is still that of a new run.
    curves, expected = (EventAccumulator(run).Reload() for run in (RUN, "runs/whole/version_0"))
    assert curves.Tags()["scalars"] == expected.Tags()["scalars"]
    theirs, ours = ([(e.step, e.value) for e in events.Scalars("train/loss")] for events in (expected, curves))
    assert ours == theirs
    config = yaml.safe_load(Path(RUN, "config.yaml").read_text())
    assert (config["trainer"]["logger"]["init_args"]["name"], config["ckpt_path"]) == ("fit", None)


def test_a_fit_that_gets_a_signal_in_its_last_step_finishes_and_cannot_be_resumed(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, *stop_at(step=9)]) == 0
    assert read_record(Path(RUN, "record.json")).status == "finished"
    assert main(["fit", f"--config={RUN}/config.yaml", "--ckpt_path=last"]) == 2
    assert "had taken all of its steps, so nothing was trained; raise trainer.max_epochs" in capsys.readouterr().err


def test_a_second_signal_ends_a_fit_at_once_without_a_record(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, *stop_at(times=2, signum=2)]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == (
        "pml fit: stopped by Ctrl-C; there is no checkpoint to go on from yet"
    )
    assert not Path(RUN, "record.json").exists()
    assert [path for path in Path(RUN).rglob("*") if "partial" in path.name] == []


def test_a_fit_stopped_without_checkpoints_leaves_a_record_and_says_it_cannot_be_resumed(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, *stop_at(), "--trainer.enable_checkpointing=false"]) == 143
    assert capsys.readouterr().err.splitlines()[-1].endswith("it made no checkpoints to go on from")
    assert read_record(Path(RUN, "record.json")).optimizer_steps == 4
    assert not Path(RUN, "checkpoints").exists()


def test_a_finished_fit_resumes_with_more_epochs(arguments: list[str]) -> None:
    assert main([*arguments, "--model.schedule=constant"]) == 0
    longer = ["fit", f"--config={RUN}/config.yaml", "--ckpt_path=last", "--trainer.max_epochs=14"]
    assert main(longer) == 0
    record = read_record(Path("runs/fit/version_1/record.json"))
    assert (record.optimizer_steps, record.training["max_epochs"], record.resumed) == (14, 14, 1)


def losses(path: Path) -> list[tuple[str, str]]:
    with path.open() as file:
        return [(row["step"], row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


@pytest.mark.parametrize("logger", ["lightning.pytorch.loggers.CSVLogger", "false"])
def test_a_fit_with_another_logger_or_none_resumes_in_the_same_folder(
    logger: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    more = [f"--trainer.logger={logger}", "--trainer.default_root_dir=here"]
    assert main([*arguments, *more, *stop_at()]) == 143
    command = capsys.readouterr().err.splitlines()[-1].partition("go on with: pml ")[2]
    assert main(command.split()) == 0
    (path,) = Path().rglob("record.json")
    record = read_record(path)
    assert (record.status, record.optimizer_steps, record.resumed) == ("finished", 10, 1)
    if logger != "false":
        assert main([*arguments, *more, "--trainer.logger.name=whole"]) == 0
        ours, whole = (sorted(losses(folder / "metrics.csv")) for folder in (path.parent, Path("runs/whole/version_0")))
        assert ours == whole


def test_two_loggers_of_one_class_each_continue_their_own_files() -> None:
    kept = [{"class": "CSVLogger", "folder": folder, "version": "0"} for folder in (".", "b/version_0")]
    asked = [{"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "runs"}} for _ in kept]
    made = logger_settings(asked, Path("runs/a"), {"global_step": 7, "pml_loggers": kept})
    assert [(one["init_args"]["save_dir"], one["init_args"]["name"]) for one in made] == [
        ("runs", "a"),
        ("runs/a/b", "version_0"),
    ]


@pytest.fixture(scope="module")
def stopped_once(tiny_backbone_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Working directory of a stopped fit, which tests must not change."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*ten_steps(tiny_backbone_folder), *stop_at()]) == 143
    return folder


class TestResuming:
    @pytest.fixture
    def stopped(self, arguments: list[str], stopped_once: Path) -> list[str]:
        """Arguments of a stopped fit, of which the test has a copy in its working directory."""
        shutil.copytree(stopped_once, Path.cwd(), dirs_exist_ok=True)
        return arguments

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--model.learning_rate=0.5"], "model.learning_rate is 0.5, in the checkpoint 0.05"),
            (["--model.adapter.rank=9"], "model.adapter.rank is 9, in the checkpoint 4"),
            (
                ["--model.adapter.rank=9", "--model.betas=[0.8,0.9]"],
                "in the checkpoint 4; model.betas is [0.8, 0.9], in",
            ),
            # Null in the checkpoint is a value too.
            (["--model.kl_penalty.weight=8"], "model.kl_penalty is {'weight': 8}, in the checkpoint null"),
            (["--model.adapter.alpha=8"], "model.adapter.alpha is 8, in the checkpoint null"),
            (["--model.frozen_prefix.release=true"], "model.frozen_prefix.release is True, in the checkpoint False"),
            (["--data.seed=7"], "this checkpoint is of a fit to other data"),
            (["--weights_only=false"], "weights_only is false; checkpoints are read as data alone"),
        ],
    )
    def test_an_option_that_contradicts_the_checkpoint_is_refused(
        self, options: list[str], message: str, stopped: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["fit", f"--config={RUN}/config.yaml", "--ckpt_path=last", *options]) == 2
        err = capsys.readouterr().err.splitlines()[-1]
        assert err.startswith("pml fit: error: ")
        assert message in err

    def test_a_method_other_than_that_of_the_checkpoint_is_refused(
        self, stopped: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        other = ["--model=MemFT" if argument == "--model=SFT" else argument for argument in stopped]
        assert main([*other, f"--ckpt_path={RUN}/checkpoints/last.ckpt"]) == 2
        assert "model is MemFT, in the checkpoint SFT: " in capsys.readouterr().err

    def test_a_later_configuration_file_is_checked_even_if_it_names_only_a_class(
        self, stopped: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "other.yaml"
        for content, said in (
            ("model: MemFT\n", "model is MemFT, in the checkpoint SFT"),
            ("model: {init_args: {learning_rate: 0.5}}\n", "model.learning_rate is 0.5, in the checkpoint 0.05"),
        ):
            path.write_text(content)
            with pytest.raises(InputError, match=said):
                refuse_other_model(
                    ["--model.learning_rate=0.05", f"--config={path}"],
                    {"_class_path": "pml.modules.SFT", "learning_rate": 0.05},
                )

    def test_a_class_is_compared_by_its_name_however_it_is_given(self) -> None:
        weighting = {"class_path": "pml.weighting.OnlyThreshold", "init_args": {"threshold": 0.5}}
        made_with = {"_class_path": "pml.modules.MemFT", "weighting": weighting}
        same = ["--model.class_path=pml.modules.MemFT", "--model.weighting.class_path=pml.weighting.OnlyThreshold"]
        refuse_other_model(same, made_with)
        refuse_other_model(["--model=MemFT", "--model.weighting=OnlyThreshold"], made_with)
        with pytest.raises(InputError, match=r"model\.weighting is SlidingWindow, in the checkpoint OnlyThreshold"):
            refuse_other_model(["--model.weighting=SlidingWindow", "--model.weighting.window=3"], made_with)

    def test_a_setting_that_is_not_given_is_taken_from_the_checkpoint(self, stopped: list[str]) -> None:
        without = [argument for argument in stopped if "dropout" not in argument]
        assert main([*without, f"--ckpt_path={RUN}/checkpoints/last.ckpt"]) == 0
        assert read_record(Path(RUN, "record.json")).method_settings["dropout"] == 0.2

    def test_ckpt_path_last_without_a_run_or_without_a_checkpoint_is_an_error(
        self, arguments: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main([*arguments, "--ckpt_path=last"]) == 2
        assert "ckpt_path is last, but no run is given" in capsys.readouterr().err
        Path("config.yaml").write_text("trainer: {max_epochs: 1}\n")
        assert main([*arguments, "--config=config.yaml", "--ckpt_path=last"]) == 2
        assert "no checkpoint in it, so there is nothing to go on from" in capsys.readouterr().err
        assert not Path("runs").exists()

    def test_a_damaged_checkpoint_is_named_and_the_previous_one_is_used(
        self, stopped: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        last = Path(RUN, "checkpoints", "last.ckpt")
        last.rename(last.with_name("previous.ckpt"))
        last.write_bytes(b"PK damaged")
        assert main(["fit", f"--config={RUN}/config.yaml", "--ckpt_path=last"]) == 0
        assert f"{last}: damaged, so the checkpoint before it is taken" in capsys.readouterr().err
        assert read_record(Path(RUN, "record.json")).resumed == 1

    def test_a_checkpoint_of_another_program_is_named_and_skipped(
        self, stopped: list[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        foreign = Path(RUN, "checkpoints", "zz.ckpt")
        torch.save({"x": 1}, foreign)
        assert newest_checkpoint(Path(RUN)).name == "last.ckpt"
        assert f"{foreign}: " in caplog.text


def test_a_stopped_sweep_resumes_the_cell_that_was_running(
    tiny_backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    init = {"backbone": str(tiny_backbone_folder), "adapter": {"rank": 2, "block": 1, "dropout": 0.2}}
    stop = {"class_path": "tests.test_going_on.StopAt", "init_args": {"step": 3}}
    base = {
        "model": {"class_path": "SFT", "init_args": init},
        "data": {"class_path": "RandomTokens", "init_args": {"length": 8}},
        "trainer": {
            "max_epochs": 6,
            "accelerator": "cpu",
            "log_every_n_steps": 1,
            "callbacks": [stop, {"class_path": "callbacks.RunRecord"}],
        },
    }
    Path("base.yaml").write_text(yaml.safe_dump(base))
    method = {"class_path": "MemFT", "init_args": {"weighting": {"class_path": "pml.weighting.OnlyThreshold"}}}
    grid = {"base": "base.yaml", "out": "out", "grid": {"model": [method], "model.init_args.adapter.rank": [2, 3]}}
    Path("grid.yaml").write_text(yaml.safe_dump(grid))
    assert main(["sweep", "grid.yaml"]) == 143
    assert capsys.readouterr().err.splitlines()[-1] == (
        "pml sweep: stopped by SIGTERM; 0 of 2 cells are done; go on with: pml sweep grid.yaml"
    )
    first, second = (cell.folder for cell in resolve(read_grid(Path("grid.yaml"))))
    assert read_record(first / "record.json").status == "interrupted"
    assert not second.exists()
    assert main(["sweep", "grid.yaml"]) == 143  # the second cell stops too
    assert main(["sweep", "grid.yaml"]) == 0
    for folder in (first, second):
        record = read_record(folder / "record.json")
        assert (record.status, record.optimizer_steps, record.resumed) == ("finished", 6, 1)
        curve = [event.step for event in EventAccumulator(str(folder)).Reload().Scalars("train/loss")]
        assert curve == [0, 1, 2, 3, 4, 5]
    assert not list(Path("out").glob("*.unfinished-*"))


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_libraries_are_loading_prints_one_line(signum: int, code: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pml", "fit", "--model=SFT", "--data=RandomTokens"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signum)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert err == f"pml fit: stopped by {'Ctrl-C' if code == 130 else 'SIGTERM'}\n"


class SignalMidway(Callback):
    """Sends SIGTERM while a validation has batches left, or between two micro-batches of one step."""

    def __init__(self, where: str) -> None:
        self.where = where

    def on_validation_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        if self.where == "validation" and (trainer.global_step, batch_idx) == (4, 0):
            os.kill(os.getpid(), signal.SIGTERM)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.where == "micro-batch" and trainer.global_step == 2 and batch_idx % 2 == 1:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("where", ["validation", "micro-batch"])
def test_a_signal_in_validation_or_between_micro_batches_leaves_a_checkpoint_to_resume_from(
    where: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    midway = ["--trainer.callbacks+=tests.test_going_on.SignalMidway", f"--trainer.callbacks.where={where}"]
    batches = [
        "--data.count=4",
        "--data.batch_size=1",
        "--trainer.accumulate_grad_batches=2",
        "--trainer.check_val_every_n_epoch=1",
    ]
    assert main([*arguments, *batches, *midway]) == 143
    assert "stopped by SIGTERM; go on with: pml fit" in capsys.readouterr().err
    assert read_record(Path(RUN, "record.json")).status == "interrupted"
    assert Path(RUN, "checkpoints", "last.ckpt").is_file()


class SignalAt(Callback):
    """Sends a signal in the third step."""

    def __init__(self, name: str) -> None:
        self.signum = signal.Signals[name]

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 2 and not pl_module.resumed:
            os.kill(os.getpid(), self.signum)


def test_under_slurm_its_signal_stops_a_fit_and_only_the_given_checkpoint_is_loaded(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = {"JOB_ID": "12345", "JOB_NAME": "fit", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    # Lightning would load this file, and requeue the job by `scontrol`.
    Path("hpc_ckpt_1.ckpt").write_text("of another fit")
    commands = mock.Mock()
    monkeypatch.setattr("lightning.pytorch.trainer.connectors.signal_connector.call", commands)
    midway = ["--trainer.callbacks+=tests.test_going_on.SignalAt", "--trainer.callbacks.name=SIGUSR1"]
    assert main([*arguments, *midway]) == 128 + signal.SIGUSR1
    command = f"pml fit --config {RUN}/config.yaml --ckpt_path last"
    assert capsys.readouterr().err.splitlines()[-1] == f"pml fit: stopped by SIGUSR1; go on with: {command}"
    assert read_record(Path(RUN, "record.json")).optimizer_steps == 3
    assert [path.name for path in Path().glob("hpc*")] == ["hpc_ckpt_1.ckpt"]
    commands.assert_not_called()
    assert main(command.split()[1:]) == 0
    assert read_record(Path(RUN, "record.json")).optimizer_steps == 10
    assert main(["test", RUN]) == 0


class Enough(Callback):
    """Requests the end of the fit from the second step on, as an early-stopping callback does."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= 2


def test_a_signal_stops_a_fit_that_only_min_epochs_keeps_running(arguments: list[str]) -> None:
    enough = ["--trainer.callbacks+=tests.test_going_on.Enough", "--trainer.min_epochs=9"]
    assert main([*arguments, *enough, *stop_at(step=7)]) == 143
    assert read_record(Path(RUN, "record.json")).optimizer_steps == 8


def test_a_sigterm_that_a_launcher_repeats_counts_as_one_signal() -> None:
    with stopping.listening(), stopping.at_step_ends():
        for _ in range(2):
            stopping.request(signal.SIGTERM)
        assert stopping.requested() == signal.SIGTERM


def test_a_monitored_metric_that_is_never_logged_is_a_one_line_error(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    stop = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/lss"]
    assert main([*arguments, *stop, "--trainer.callbacks.check_on_train_epoch_end=true"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("pml fit: error: Early stopping conditioned on metric `val/lss` which is not available.")
    assert len(err.splitlines()) == 1
