"""Where loggers go on: settings, by hand."""

import inspect
from pathlib import Path

import pytest
from lightning.pytorch import loggers

from pml.records import write_record
from pml.same_folder import GO_ON_BY, logger_settings, run_to_go_on_in
from tests.record_factory import make_record

CHECKPOINT = {
    "global_step": 7,
    "pml_loggers": [
        {"class": "TensorBoardLogger", "folder": ".", "version": "0"},
        {"class": "CSVLogger", "folder": "../../rows/version_3", "version": "3"},
        {"class": "WandbLogger", "folder": "", "version": "k2j3h4"},
        {"class": "MLFlowLogger", "folder": "", "version": "abc"},
    ],
}


def test_each_logger_goes_on_where_it_was() -> None:
    asked = [
        {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": "runs", "name": "fit"}},
        {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "runs"}},
        {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {"project": "law"}},
        {"class_path": "mine.Logger"},
    ]
    board, rows, weights_and_biases, mine = logger_settings(asked, Path("runs/fit/version_2"), CHECKPOINT)
    assert board["init_args"] == {"save_dir": "runs/fit", "name": "version_2", "version": ""}
    assert board["dict_kwargs"] == {"purge_step": 8}
    assert rows["init_args"] == {"save_dir": "runs/rows", "name": "version_3", "version": ""}
    assert weights_and_biases["init_args"] == {"project": "law", "version": "k2j3h4"}
    assert mine["init_args"] == {}


@pytest.mark.parametrize("folder", ["/etc/cron.d", "../../../../elsewhere", "../version_1"])
def test_a_checkpoint_cannot_send_a_logger_out_of_its_run(folder: str, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = {"global_step": 7, "pml_loggers": [{"class": "TensorBoardLogger", "folder": folder, "version": "0"}]}
    found = logger_settings(True, Path("runs/fit/version_2"), checkpoint)
    assert found["init_args"] == {"save_dir": "runs/fit", "name": "version_2", "version": ""}
    assert "outside of its run; it goes on in runs/fit/version_2" in caplog.text


@pytest.mark.parametrize("asked", [False, None])
def test_no_logger_stays_none(asked: bool | None) -> None:
    assert logger_settings(asked, Path("run"), CHECKPOINT) is asked


@pytest.mark.parametrize("name", GO_ON_BY)
def test_loggers_take_the_argument_by_which_they_go_on(name: str) -> None:
    assert GO_ON_BY[name] in inspect.signature(getattr(loggers, name).__init__).parameters


def test_a_run_that_has_ended_keeps_its_record(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    assert run_to_go_on_in(checkpoint) == tmp_path
    write_record(tmp_path, make_record(status="interrupted"))
    assert run_to_go_on_in(checkpoint) == tmp_path
    write_record(tmp_path, make_record())
    assert run_to_go_on_in(checkpoint) is None
    assert run_to_go_on_in(tmp_path / "elsewhere.ckpt") is None
